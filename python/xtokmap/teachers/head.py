"""A teacher's output head without its body: what makes whole rows of the hidden states that a server gives."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.models import one_line
from xtokmap.torch.logits import Logits

#: Names of a head, the first that there is, and of the embeddings that stand for it where a model has none.
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")

#: The final norm, and no layer's.
_NORM = re.compile(r"(?:^|\.)(?:norm|final_norm|ln_f|final_layernorm|final_layer_norm)\.(weight|bias)$")

#: What configurations call a factor of the logits, and a divisor.
_FACTORS, _DIVISORS = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)

#: Of the final norm; all families have one of them.
NORMS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "RMSNorm": lambda x, w, b, eps: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w,
    "RMSNorm of 1 + weight": lambda x, w, b, eps: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + w),
    "LayerNorm": lambda x, w, b, eps: torch.nn.functional.layer_norm(x, x.shape[-1:], w, b, eps),
}


@dataclass(frozen=True, eq=False)
class Head:
    """What comes behind a model's hidden states.

    Attributes:
        weight: `[V, H]`.
        bias: `[V]`, or None.
        scale: factor of the logits (Cohere; Granite divides).
        softcap: of the scaled logits (Gemma 2).
        norm: a name of `NORMS`, where the states come before the final norm; empty: they come after it.
        norm_weight: `[H]`, where the model's files have it.
        norm_bias: `[H]`, likewise.
        eps: of the norm.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    norm: str = ""
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    eps: float = 1e-6

    @property
    def width(self) -> int:
        """H."""
        return self.weight.shape[1]

    def __repr__(self) -> str:
        return f"Head({tuple(self.weight.shape)}, {self.weight.dtype}, {self.weight.device})"

    def logits(self, states: Tensor) -> Logits:
        """Rows of logits of hidden states `[..., H]`, never made as a whole; on the head's device, in its dtype."""
        rows = states.to(self.weight.device)
        if self.norm:
            assert self.norm_weight is not None
            shift = torch.zeros_like(self.norm_weight) if self.norm_bias is None else self.norm_bias
            rows = NORMS[self.norm](rows.float(), self.norm_weight.float(), shift.float(), self.eps)
        if self.softcap is not None:  # which comes after the scale
            rows = rows * self.scale if self.scale != 1 else rows
            bias = None if self.bias is None else self.bias * self.scale
            return Logits(rows.to(self.weight.dtype), self.weight, bias, softcap=self.softcap)
        return Logits(rows.to(self.weight.dtype), self.weight, self.bias, temperature=1 / self.scale)


def read_head(source: str, device: torch.device, dtype: str = "auto") -> Head:
    """The head of a model, from its safetensors alone, sharded or not: one tensor, and the final norm's.

    Args:
        source: a directory, or a hub id, of which the file with the head is downloaded once.
        device: of the head.
        dtype: as `models.load`: bfloat16 on a GPU, float32 elsewhere, or by name.

    Raises:
        XTokMapError: there is none, or it cannot be read.
    """
    from transformers import AutoConfig

    if source.endswith(".gguf"):
        raise XTokMapError(
            f"{source}: the output head is read from safetensors, not from a .gguf file; make them once with "
            "xtokmap.models.load and save_pretrained, or serve sums (teacher_rows=sums), which need no head here"
        )
    kind = torch.bfloat16 if dtype == "auto" and device.type == "cuda" else torch.float32
    kind = kind if dtype == "auto" else getattr(torch, dtype)
    try:
        names, config = _of_safetensors(source), AutoConfig.from_pretrained(source)
    except XTokMapError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        raise XTokMapError(f"{source}: its output head cannot be read: {one_line(error)}") from error
    text = config.get_text_config()
    found = next((name for suffix in (*_HEADS, *_EMBEDDINGS) for name in names if _ends(name, suffix)), None)
    if found is None:
        raise XTokMapError(f"{source}: no output head among its {len(names)} tensors ({', '.join(_HEADS)}, or tied)")
    head = Head(
        names[found]().to(device, kind),
        next((read().to(device, kind) for name, read in names.items() if _ends(name, "lm_head.bias")), None),
        scale=_scale(text),
        softcap=getattr(text, "final_logit_softcapping", None) or None,
        eps=next(
            (float(eps) for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
             if (eps := getattr(text, name, None)) is not None),
            1e-6,
        ),
    )  # fmt: skip
    norms = {match[1]: name for name in names if (match := _NORM.search(name)) and "layers." not in name}
    if head.weight.ndim != 2:
        raise XTokMapError(f"{source}: {found} has shape {tuple(head.weight.shape)}; a head is [V, H]")
    parts = {part: names[name]().to(device) for part, name in norms.items()}
    parts = {part: x for part, x in parts.items() if tuple(x.shape) == (head.width,)}
    return replace(head, norm_weight=parts.get("weight"), norm_bias=parts.get("bias"))


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _scale(config: Any) -> float:
    """The factor of the logits, by the names that configurations have for it; others are found out by who asks."""
    for names, inverse in ((_FACTORS, False), (_DIVISORS, True)):
        for name in names:
            value = getattr(config, name, None)
            if isinstance(value, (int, float)) and 0 < value != 1:
                return 1 / value if inverse else float(value)
    return 1.0


def _of_safetensors(source: str) -> dict[str, Callable[[], Tensor]]:
    """How to read each tensor; nothing is read, and of a model on the hub nothing but the index downloaded, yet."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    whole = cached_file(source, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if whole is None:
        index = cached_file(source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
        if index is None:
            raise XTokMapError(
                f"{source}: has no safetensors (model.safetensors, or model.safetensors.index.json with its parts), "
                "from which the output head could be read"
            )
        parts: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
    else:
        with safe_open(whole, "pt") as file:
            parts = dict.fromkeys(file.keys(), "model.safetensors")

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with safe_open(cached_file(source, parts[name]), "pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor

        return read

    return {name: reader(name) for name in parts}

"""Models for a run: loaded, and made ready to be updated."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from xtokmap._core import XTokMapError
from xtokmap.files import obstacle


def pick_device(name: str = "auto") -> torch.device:
    """`auto`: CUDA, then MPS, then CPU.

    Raises:
        XTokMapError: no such device here.
    """
    if name != "auto":
        try:
            device = torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise XTokMapError(f"device={name!r}: {one_line(error)}") from error
        if device.type == "meta":
            raise XTokMapError("device='meta': nothing is computed there; use cpu, cuda or mps")
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load(source: str, device: torch.device, dtype: str = "auto") -> tuple[Any, Any]:
    """A causal language model and its tokenizer, from a directory, a .gguf file (needs `gguf`) or a hub id.

    Raises:
        XTokMapError: nothing is there, or transformers cannot read it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, place, kwargs = _place(source)
    kind = torch.bfloat16 if dtype == "auto" and device.type == "cuda" else torch.float32
    kind = kind if dtype == "auto" else getattr(torch, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **kwargs)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=kind, **kwargs)
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        raise XTokMapError(
            f"{path}: transformers cannot load it as a causal language model: {one_line(error)}"
        ) from error
    if kwargs:
        # The weights are plain tensors now; without this they could not be saved.
        with suppress(AttributeError):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    return model.to(device), tokenizer


def load_tokenizer(source: str) -> Any:
    """The tokenizer alone, from what `load` takes; no weights need be there.

    Raises:
        XTokMapError: nothing is there, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    path, place, kwargs = _place(source)
    try:
        return AutoTokenizer.from_pretrained(place, **kwargs)
    except Exception as error:  # as in `load`
        raise XTokMapError(f"{path}: transformers cannot load a tokenizer from it: {one_line(error)}") from error


def _place(source: str) -> tuple[Path, str, dict[str, str]]:
    """What to name in messages, and what to give to transformers."""
    path, kwargs = Path(source), {}
    if source.endswith(".gguf"):
        source, kwargs = str(path.parent), {"gguf_file": path.name}
    if (kwargs or source.startswith((".", "/", "~"))) and not path.exists():
        raise XTokMapError(f"{path}: no such model; pass a directory, a .gguf file or a hub id")
    if (problem := obstacle(path, inside=True)) is not None:
        raise XTokMapError(problem)
    return path, source, kwargs


@torch.no_grad()
def check_finite(model: Any, whose: str) -> None:
    """Refuses weights of which nothing could be sampled.

    Args:
        model: whole, on any device.
        whose: "student" or "teacher", and where it is from.

    Raises:
        XTokMapError: which parameters have values that are not finite.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.is_floating_point() and p.element_size() > 1]
    named = [(name, p) for name, p in named if p.numel()]
    # Both ends: NaN is in them, too, and nothing as large as the weights is made.
    finite = [torch.isfinite(torch.stack(torch.aminmax(p))).all() for _, p in named]
    whole = torch.stack(finite).tolist() if finite else []
    bad = [(name, int((~torch.isfinite(p)).sum())) for (name, p), good in zip(named, whole, strict=True) if not good]
    if bad:
        (name, n), more = bad[0], f" (and {len(bad) - 1} more parameters)" if len(bad) > 1 else ""
        raise XTokMapError(
            f"the {whose}: {n} values of {name}{more} are not finite (NaN or infinite); the file is damaged, or "
            "training had diverged before it was saved: take other weights"
        )


def with_adapter(model: Any, rank: int, alpha: float = 32.0, targets: str = "all-linear") -> Any:
    """The model with a LoRA adapter (arXiv 2106.09685), which alone is trained: float32 whatever the model is.

    Args:
        model: a transformers causal language model; its own weights are frozen, in place.
        rank: of the adapter.
        alpha: its product is scaled by alpha / rank.
        targets: names of modules, separated by commas, or "all-linear": every linear layer but the output head.

    Raises:
        XTokMapError: peft is not installed, or the model has no such modules.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise XTokMapError("lora_rank needs the package peft: pip install 'xtokmap[lora]'") from None
    names = [name.strip() for name in targets.split(",")]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=names[0] if names == ["all-linear"] else names,
        lora_dropout=0.0,  # the policy that is updated is the one that sampled
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft asks for it
            return get_peft_model(model, config)
    except ValueError as error:
        raise XTokMapError(f"lora_targets={targets!r}: {one_line(error)}") from error
    except RuntimeError as error:
        raise XTokMapError(f"lora_rank={rank}: no such adapter can be made: {one_line(error)[:200]}") from error


def without_wrapper(model: Any) -> Any:
    """The transformers model inside a PEFT one, with the adapter in its layers; another model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks, or its name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


#: Whose float32 copy a parameter is.
_OWN: Any = WeakTensorKeyDictionary()


def own_parameter(parameter: Tensor) -> Tensor:
    """The model's parameter that an optimizer's is the float32 copy of; itself where it is none."""
    own: Tensor = _OWN.get(parameter, parameter)
    return own


def float32_parameters(model: Any) -> list[torch.nn.Parameter]:
    """What to optimize: the model's own parameters where they are float32, else a float32 copy of each.

    A step of 1e-6 is less than half the distance to the next bfloat16 number for nearly every weight of a trained model
    (SmolLM2 135M: 99.6 %), so that an optimizer on bfloat16 weights would leave them where they are. Gradients of
    micro-batches are summed in float32, too. `write_back` brings the copies' values into the model.
    """
    copies = []
    for own in model.parameters():
        if not own.requires_grad or own.dtype == torch.float32:
            copies += [own] if own.requires_grad else []
            continue
        copy = torch.nn.Parameter(own.detach().float())
        _OWN[copy] = own
        copies.append(copy)

        def hand_over(own: Tensor, copy: Tensor = copy) -> None:
            assert own.grad is not None
            copy.grad = own.grad.float() if copy.grad is None else copy.grad.add_(own.grad)
            own.grad = None

        own.register_post_accumulate_grad_hook(hand_over)
    return copies


@torch.no_grad()
def write_back(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """After a step: the optimizer's float32 copies, rounded, into the model that they are copies of."""
    for group in optimizer.param_groups:
        for copy in group["params"]:
            if copy in _OWN:
                _OWN[copy].copy_(copy)

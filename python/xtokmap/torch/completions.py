"""The rows of a transformers causal language model that score completions, and the logprobs in them.

One convention everywhere: `logprobs[i]` scores `ids[i]` given `ids[<i]`. Hugging Face models give logits whose row i
scores token i + 1; the shift happens here and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.boundary import cover
from xtokmap.models import without_wrapper
from xtokmap.torch.logits import Logits, token_logprobs, token_logprobs_from_hidden


def spans(cu: npt.NDArray[np.int64], rows: Sequence[int], *, but_last: bool = False) -> Tensor:
    """Flat places of some rows, one after the other."""
    spans = (np.arange(cu[b], cu[b + 1] - but_last) for b in rows)
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *spans]))


def row_ends(rows: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """int64 `[B+1]`: tokens before each row."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum([len(row) for row in rows], dtype=np.int64)])


def token_mask(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """bool `[B, T]`: where ragged rows have a token."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return torch.arange(max(map(len, rows), default=0), device=device) < lengths[:, None]


def flat_ids(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 `[N]`: the ids of ragged rows, one row after the other."""
    return torch.tensor([i for row in rows for i in row], dtype=torch.long).to(device)


def padded_inputs(
    rows: Sequence[Sequence[int]], device: torch.device | str | None, *, left: bool = False, pad: int = 0
) -> dict[str, Tensor]:
    """Rows of ids as a transformers model takes them.

    Args:
        rows: B rows.
        device: of the tensors.
        left: whether to pad on the left, as `generate` wants it.
        pad: the id of padding, which the mask leaves out.

    Returns:
        `input_ids` and `attention_mask`, int64 `[B, L]`.
    """
    length = max(map(len, rows), default=0)

    def padded(row: list[int], value: int) -> list[int]:
        padding = [value] * (length - len(row))
        return padding + row if left else row + padding

    ids = torch.tensor([padded([*row], pad) for row in rows], dtype=torch.long)
    mask = torch.tensor([padded([1] * len(row), 0) for row in rows], dtype=torch.long)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def ragged(ids: Any, mask: Any = None, stops: Sequence[int] = ()) -> list[list[int]]:
    """Rows of ids as lists, from whatever holds them.

    Args:
        ids: B rows, or padded `[B, T]`.
        mask: `[B, T]`, where there is a token. None: of a padded row all up to its first end of turn.
        stops: the ends of turns.

    Raises:
        XTokMapError: a mask of another shape.
    """
    rows = [as_list(row) for row in ids]
    if mask is not None:
        keep = torch.as_tensor(mask).bool().tolist()
        if [len(row) for row in rows] != [len(row) for row in keep]:
            raise XTokMapError("completion_mask and completion_ids have other shapes")
        return [[i for i, k in zip(row, flags, strict=True) if k] for row, flags in zip(rows, keep, strict=True)]
    if not hasattr(ids, "shape"):
        return rows
    ends = (next((k for k, i in enumerate(row) if i in stops), len(row)) for row in rows)
    return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]


def emptied(rows: Sequence[list[Any]], which: Container[int]) -> list[list[Any]]:
    """Ragged rows of which some are empty."""
    return [[] if b in which else row for b, row in enumerate(rows)]


def as_list(row: Any) -> list[int]:
    """One row of ids as a list."""
    found: list[int] = row.tolist() if hasattr(row, "tolist") else list(row)
    return found


def flat_logprobs(rows: Logits, ids: Tensor) -> Tensor:
    """float32 `[N]`: of token `ids[i]` in row i; differentiable. Rows that are a view are copied: N of them."""
    if rows.positions is not None:
        picked = rows.rows.flatten(0, -2).index_select(0, rows.positions.reshape(-1))
        rows = replace(rows, rows=picked, positions=None)
    if rows.weight is None:
        return token_logprobs(rows.rows, ids, temperature=rows.temperature, softcap=rows.softcap)
    return token_logprobs_from_hidden(
        rows.rows, rows.weight, ids, bias=rows.bias, temperature=rows.temperature, softcap=rows.softcap
    )


def completion_rows(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    after: bool = False,
) -> Logits:
    """The rows of a transformers causal language model that score completions, flat, row of the batch after row.

    Args:
        model: its parameters' device is used. With a gradient where grad is enabled.
        prompt_ids: B rows, each of at least one id.
        completion_ids: B rows of N ids together.
        temperature: of the distribution that sampled.
        after: also the row after each completion's last token: `[N + B]` instead of `[N]`.
    """
    check_pairs(prompt_ids, completion_ids)
    device = next(model.parameters()).device
    rows = [[*p, *c] for p, c in zip(prompt_ids, completion_ids, strict=True)]
    length = max(map(len, rows), default=0)
    # Everything about lengths is known here, so that the device is never asked.
    ids, mask = padded_inputs(rows, device).values()
    source: list[int] = []
    for b, (p, c) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        first = b * length + len(p) - 1
        source += range(first, first + len(c) + after)
    at = torch.tensor(source, device=device, dtype=torch.long)

    body, head = body_and_head(model)
    if body is None:
        # Rows before the shortest prompt's last token score nothing that is wanted.
        skip = min(map(len, prompt_ids), default=1) - 1
        if skip and "logits_to_keep" in inspect.signature(model.forward).parameters:
            out = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=length - skip).logits
            at = at - skip * (at // length + 1)
        else:
            out = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return Logits(out.flatten(0, 1).index_select(0, at), temperature=temperature)
    hidden = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return headed(model, head, hidden.flatten(0, 1).index_select(0, at), temperature)


def headed(model: Any, head: Any, hidden: Tensor, temperature: float = 1.0) -> Logits:
    """Hidden states `[..., H]` of a model with its output head, as autocast would multiply them; differentiable."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    weight, bias = (x if x is None else _whole(x).to(dtype) for x in (head.weight, head.bias))
    return Logits(hidden.to(dtype), weight, bias, temperature=temperature, softcap=_softcap(model))


def _whole(x: Any) -> Any:
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # where it is sharded


def output_rows(
    output: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, after: bool = False
) -> Logits:
    """The rows of a model's output, or of its logits, that score completions, as `completion_rows` has them.

    Raises:
        XTokMapError: no such output, or rows of another batch.
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, Tensor):
        logits = Logits(logits)
    if not isinstance(logits, Logits):
        raise XTokMapError(f"expected a model's output, logits, Logits or Scores, got {type(output).__name__}")
    count = sum(len(c) + after for c in completions)
    if tuple(logits.shape) == (count,) and logits.rows.ndim == 2:
        return logits
    length = max((len(p) + len(c) for p, c in zip(prompts, completions, strict=True)), default=0)
    if len(logits.shape) != 2 or logits.shape[0] != len(completions):
        raise XTokMapError(
            f"rows of shape {tuple(logits.shape)}; the batch has {len(completions)} rows of {length} tokens: pass the "
            "output for batch.student_inputs or batch.teacher_inputs"
        )
    width = logits.shape[1]
    skipped = length - width  # logits_to_keep leaves the first ones out
    if not 0 <= skipped <= min(map(len, prompts), default=1) - 1:
        raise XTokMapError(
            f"{width} rows for {length} tokens, the shortest prompt having {min(map(len, prompts), default=0)}: rows "
            "that score completions are missing; pass all of them, or a larger logits_to_keep"
        )
    at: list[int] = []
    for b, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        first = b * width + len(p) - 1 - skipped
        at += range(first, first + len(c) + after)
    return logits.at(torch.tensor(at, dtype=torch.long).to(logits.rows.device))


def completion_logprobs(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    width: int | None = None,
) -> Tensor:
    """Logprobs of completions under a transformers causal language model, with a gradient where grad is enabled.

    The output head runs on completion rows only and one slice of the vocabulary's logits exists at a time, so that
    memory is that of the hidden states.

    Args:
        model: its parameters' device is used.
        prompt_ids: B rows, each of at least one id.
        completion_ids: B rows.
        temperature: of the distribution that sampled.
        width: T of the result; None takes the longest completion.

    Returns:
        float32 `[B, T]`; 0 on padding, which is on the right.
    """
    rows = completion_rows(model, prompt_ids, completion_ids, temperature=temperature)
    return padded_logprobs(rows, completion_ids, width)


def padded_logprobs(rows: Logits, completion_ids: Sequence[Sequence[int]], width: int | None = None) -> Tensor:
    """Logprobs of completions from their flat rows: float32 `[B, width]`, 0 on padding; differentiable."""
    device = rows.rows.device
    width = max(map(len, completion_ids), default=0) if width is None else width
    flat = flat_logprobs(rows, flat_ids(completion_ids, device))
    shape = (len(completion_ids), width)
    return (
        flat.new_zeros(shape).view(-1).index_copy(0, padded_places(completion_ids, width).to(device), flat).view(shape)
    )


def padded_places(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """int64 `[N]`, on the CPU: where the tokens of ragged rows lie in `[B, width]`, flat."""
    return torch.from_numpy(cover.padded_places(row_ends(rows), None, width))


def by_length(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], size: int
) -> Iterator[list[int]]:
    """Rows in order of length, `size` at a time, so that a micro-batch has little padding."""
    lengths = [len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for first in range(0, len(order), size):
        yield order[first : first + size]


@torch.no_grad()
def batched_logprobs(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    micro_batch: int,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """`completion_logprobs` of any number of rows, a few at a time and without a gradient: float32 `[B, T]`."""
    device = next(model.parameters()).device
    width = max(map(len, completion_ids), default=0)
    logprobs = torch.zeros(len(completion_ids), width, device=device)
    for rows in by_length(prompt_ids, completion_ids, micro_batch):
        prompts, completions = [prompt_ids[b] for b in rows], [completion_ids[b] for b in rows]
        part = completion_logprobs(model, prompts, completions, temperature=temperature, width=width)
        logprobs[torch.tensor(rows, device=device)] = part
    return logprobs


def check_pairs(prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> None:
    """Raises where there are other numbers of rows, or an empty prompt."""
    if len(prompt_ids) != len(completion_ids):
        raise XTokMapError(f"{len(prompt_ids)} prompts and {len(completion_ids)} completions; they must go in pairs")
    for b, row in enumerate(prompt_ids):
        if len(row) == 0:
            raise XTokMapError(f"prompt_ids[{b}] is empty: the first token of a completion is scored given something")


#: Whether a model's logits are its head's, of its hidden states; asked of every model once.
_plain: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def body_and_head(model: Any) -> tuple[Any, Any]:
    """The body that gives hidden states and the linear head, or None where a model is not made of just these two."""
    inner = without_wrapper(model)  # an adapter's wrapper calls its tuner `base_model`
    body, head = getattr(inner, "base_model", None), inner.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or body is None or body is inner:
        return None, None
    if model not in _plain:
        _plain[model] = _is_plain(model, body, head)
    return (body, head) if _plain[model] else (None, None)


def _softcap(model: Any) -> float | None:
    cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return cap


@torch.no_grad()
def _is_plain(model: Any, body: Any, head: torch.nn.Linear) -> bool:
    """Compares both ways on two tokens: families scale or cap their logits under many names, only `forward` knows."""
    inner, ids = without_wrapper(model), torch.tensor([[0, 1]], device=next(model.parameters()).device)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        hidden = getattr(body(input_ids=ids, use_cache=False), "last_hidden_state", None)
        if hidden is None or hidden.shape[-1] != head.in_features:
            return False
        # Not what others have put over `forward`: accelerate's, for one, computes in another dtype.
        want = type(inner).forward(inner, input_ids=ids, use_cache=False).logits.float()
        got = head(hidden).float()
        if (cap := _softcap(model)) is not None:
            got = cap * torch.tanh(got / cap)
    finally:
        for module, mode in training.items():
            module.training = mode
    scale = float(want.abs().max())
    return bool((want - got).abs().max() <= scale * max(1e-4, 4 * torch.finfo(hidden.dtype).eps))

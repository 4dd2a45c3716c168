"""Losses on whole next-token distributions across tokenizers, differentiable in the student.

Notation: p is the student and q the teacher; a chunk is a span between two consecutive common byte ends. All take rows
of logits as `xtokmap.torch.Logits`, go through them a slice at a time, and return a `Loss`.

| loss | teacher | where it speaks | source |
|---|---|---|---|
| `strict_kl` | logits or top-k | tokens that are the same on both sides | arXiv 2610.08448, with the rest as a bin |
| `alm` | sampled logprobs | every chunk | arXiv 2503.20083 |
| `uld_hybrid` | logits | every chunk | arXiv 2402.12030, TRL's GOLD |
| `byte_kl` | logits | every token of an aligned text | arXiv 2607.22334 |
| `completion` | logits | the token after one that begins a teacher token | arXiv 2609.34738 |

`beta` is that of the generalized Jensen-Shannon divergence (arXiv 2306.13649): 0 is KL(q || p), forward; 1 is
KL(p || q), reverse; between them beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.alignment import Kind
from xtokmap.torch.index import ChunkIndex, VocabTensors
from xtokmap.torch.logits import _SLICE, Logits, TopK, _widened, entropy_of, softmax_and_sums
from xtokmap.torch.summed import Lying, RowGradient, sum_rows

REWRITTEN, STOP, MARKER = int(Kind.REWRITTEN), int(Kind.STOP), int(Kind.MARKER)

#: Where a bin of one side holds nothing at all: about 1e-13, so that no divergence is infinite by rounding.
LOG_NOTHING = -30.0


class Loss(NamedTuple):
    """A loss, what it is made of, and what to watch.

    Attributes:
        loss: float32 scalar; the sum of `terms` over the number of scored tokens (of chunks, where a loss says so), or
            over `denominator`.
        terms: float32 `[B, Ts]`; what every student token adds to the sum, 0 where unscored.
        figures: tensors by name, without a gradient and not read back from the device: `scored` (share of the
            response tokens that are scored), `tokens` (how many those are), `kinds` (int64 `[len(Kind)]`, how many in
            chunks of each kind), `nonfinite` (tokens left out because their term is NaN or infinite), and what each
            loss adds.
        logprobs: float32 `[B, Ts]`; the student's own, without a gradient and NaN where not worked out, of a loss that
            comes by them.
        entropy: likewise; of the student's distribution at every token, nats.
    """

    loss: Tensor
    terms: Tensor
    figures: dict[str, Tensor]
    logprobs: Tensor | None = None
    entropy: Tensor | None = None


def reduce_terms(
    terms: Tensor,
    scored: Tensor,
    index: ChunkIndex,
    mask: Tensor | None = None,
    denominator: Tensor | float | None = None,
    *,
    weight: Tensor | None = None,
    **figures: Tensor,
) -> Loss:
    """The mean of the scored terms, which are selected: whatever stands elsewhere reaches no sum and no gradient.

    Args:
        terms: `[B, Ts]`.
        scored: bool `[B, Ts]`.
        index: of the same rows.
        mask: bool or 0/1 `[B, Ts]`, the response tokens; None: all aligned ones.
        denominator: what to divide by instead of the number of scored tokens, so that micro-batches add up.
        weight: `[B, Ts]`; what a token counts in that number, instead of 1.
        figures: of every token, `[B, Ts]`; their means over the scored tokens are handed on.
    """
    response = index.student_chunk >= 0 if mask is None else mask.bool()
    scored = scored & response
    finite = torch.isfinite(terms.detach())
    kept = scored & finite
    terms = torch.where(kept, terms, 0)
    tokens = kept.sum()
    if denominator is None:
        denominator = tokens.clamp(min=1) if weight is None else torch.where(kept, weight, 0).sum().clamp(min=1)
    slot = torch.where(kept, index.kind_of_student(), len(Kind)).reshape(-1)
    kinds = tokens.new_zeros(len(Kind) + 1).scatter_add(0, slot, torch.ones_like(slot))[:-1]
    means = {name: torch.where(kept, x.detach(), 0).sum() / tokens.clamp(min=1) for name, x in figures.items()}
    counts = {"scored": tokens / response.sum().clamp(min=1), "tokens": tokens, "kinds": kinds}
    return Loss(terms.sum() / denominator, terms, {**counts, "nonfinite": (scored & ~finite).sum(), **means})


def summed_terms(
    fn: RowGradient,
    student: Logits,
    others: Sequence[Any],
    scored: Tensor,
    index: ChunkIndex,
    mask: Tensor | None = None,
    denominator: Tensor | float | None = None,
    *,
    figures: Sequence[str],
    rows: Tensor | None = None,
    ids: Tensor | None = None,
    size: int | None = None,
    **more: Tensor,
) -> tuple[Loss, list[Tensor]]:
    """The mean of the scored terms that `fn` works out, by one pass over the student's rows (`sum_rows`).

    Args:
        fn: returns the term, and figures.
        student: `[B, Ts]` rows.
        others: what `fn` needs beside them: tensors `[B, Ts]`, `Logits` or `TopK` of that shape, or what lies in the
            order of `rows` and has a `slice`.
        scored: bool `[B, Ts]`.
        index: of the same rows.
        mask: as for `reduce_terms`.
        denominator: likewise.
        figures: names of what `fn` returns behind the term.
        rows: int64 `[N]` or None; the flat positions that matter, none twice.
        ids: int64 `[B, Ts]` or None; tokens whose logprobs, and the entropies beside them, are to be found as well.
        size: rows of a slice; None takes 64 MiB of float32 for the largest vocabulary.
        more: further figures, `[B, Ts]`.

    Returns:
        The loss, whose `loss` has a gradient and whose terms have none, and what `fn` returns behind the figures,
        `[B, Ts]` each.
    """
    shape = student.shape
    flat = [
        o.reshape(-1, *o.shape[len(shape) :]) if isinstance(o, Tensor) else o
        for o in [*others, *[ids] * (ids is not None)]
    ]
    if rows is not None:
        student = student.at(rows)
        flat = [o[rows] if isinstance(o, Tensor) else o.at(rows) if hasattr(o, "at") else o for o in flat]
    if size is None:
        size = max(1, _SLICE // max(1, *(x.vocab_size for x in (student, *flat) if isinstance(x, Logits))))
    response = index.student_chunk >= 0 if mask is None else mask.bool()
    weights = (scored & response).reshape(-1).to(_widened(student.rows[:0]).dtype)
    weights = weights if rows is None else weights[rows]
    if denominator is not None:
        weights = weights / denominator
    parts = [o if isinstance(o, Tensor | Logits) else Lying(o) for o in flat]
    total, *found = sum_rows(fn if ids is None else _with_own(fn), student, weights, *parts, size=size)
    count = len(found) - 2 * (ids is not None)
    if rows is not None:
        fill = [0.0] * count + [math.nan] * (len(found) - count)
        found = [x.new_full((shape.numel(),), f).index_copy(0, rows, x) for x, f in zip(found, fill, strict=True)]
    found = [x.view(shape) for x in found]
    named = dict(zip(figures, found[1:count], strict=False))
    loss = reduce_terms(found[0], scored, index, mask, denominator, **named, **more)
    if denominator is None:
        total = total / loss.figures["tokens"].clamp(min=1)
    loss = loss._replace(loss=total)
    if ids is not None:
        loss = loss._replace(logprobs=found[count], entropy=found[count + 1])
    return loss, found[1 + len(named) : count]


def _with_own(fn: RowGradient) -> RowGradient:
    """Has a function return the logprob of the token that comes last among its arguments, and the entropy, as well."""

    def found(x: Tensor, *parts: Any) -> tuple[Tensor, ...]:
        p, log_sum = softmax_and_sums(x)
        own = x.gather(1, parts[-1][:, None])[:, 0] - log_sum, entropy_of(p, x, log_sum)
        return *fn(x, *parts[:-1]), *own

    return found


def weighted_sum(losses: Sequence[Loss], weights: Sequence[float]) -> Loss:
    """Several losses of the same student tokens as one, each teacher with its own alignment and index.

    Figures are named after the place of their loss: `0/scored`, `1/scored`, ...

    Raises:
        XTokMapError: no losses, different numbers of losses and weights, or losses of different tokens.
    """
    if not losses or len(losses) != len(weights):
        raise XTokMapError(f"{len(losses)} losses and {len(weights)} weights; give as many of both, at least one")
    for i, one in enumerate(losses):
        if one.terms.shape != losses[0].terms.shape:
            raise XTokMapError(
                f"losses[{i}] has terms {tuple(one.terms.shape)}, losses[0] {tuple(losses[0].terms.shape)}; a sum is "
                "over the same student tokens"
            )
    loss = torch.stack([w * one.loss for w, one in zip(weights, losses, strict=True)]).sum()
    terms = torch.stack([w * one.terms for w, one in zip(weights, losses, strict=True)]).sum(0)
    return Loss(loss, terms, {f"{i}/{name}": x for i, one in enumerate(losses) for name, x in one.figures.items()})


def divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Generalized Jensen-Shannon divergence over the last dimension; -inf on both sides means that there is no bin.

    Args:
        log_p: `[..., K]`, the student's.
        log_q: `[..., K]`, the teacher's.
        beta: 0 is KL(q || p), 1 is KL(p || q); see the module.

    Returns:
        `[...]`; it is at least 0 where both sum to the same.
    """
    # One -inf is a probability of 0; two would make NaN in gradients.
    there = (log_p > -math.inf) | (log_q > -math.inf)
    p, q = torch.where(there, log_p, 0), torch.where(there, log_q, 0)
    if beta == 0:
        found = _kl_bins(q, p)
    elif beta == 1:
        found = _kl_bins(p, q)
    else:
        m = torch.logaddexp(q + math.log(beta), p + math.log1p(-beta))
        found = beta * _kl_bins(q, m) + (1 - beta) * _kl_bins(p, m)
    return torch.where(there, found, 0).sum(-1)


def divergence_and_slope(p: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The same of probabilities `[..., K]`, with its derivative by each p, up to a constant.

    The derivative is finite also where p = 0; it counts for nothing there, as it is multiplied by p.
    """
    least = 4 * torch.finfo(p.dtype).tiny  # no quotient is 0 or infinite
    some_p, some_q = p.clamp(min=least), q.clamp(min=least)
    if beta == 1:
        slope = some_p.div_(some_q).log_()
        return (p * slope).sum(-1), slope
    if beta == 0:
        slope = (q / some_p).neg_()
        return (some_q.div_(some_p).log_().mul_(q)).sum(-1), slope
    m = torch.add(beta * q, p, alpha=1 - beta).clamp_(min=least)
    slope = some_p.div_(m).log_().mul_(1 - beta)
    return (p * slope).sum(-1) + beta * some_q.div_(m).log_().mul_(q).sum(-1), slope


def event_and_slopes(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(q || p) of whether an event happens, and its derivatives by the p of what is in the event and of what is not.

    Args:
        p: `[...]`, the student's probability of it.
        q: `[...]`, the teacher's.
    """
    kinds = torch.finfo(p.dtype)
    p, other, q = p.clamp(min=kinds.tiny), (1 - p).clamp(min=kinds.eps), q.clamp(0, 1)
    value = torch.xlogy(q, q) - q * p.log() + torch.xlogy(1 - q, 1 - q) - (1 - q) * other.log()
    return value, -q / p, -(1 - q) / other


def _kl_bins(a: Tensor, b: Tensor) -> Tensor:
    return a.exp() * torch.where(a > -math.inf, a - b, 0)


# ---- helpers -----------------------------------------------------------------------------------------------------


def wanted_rows(scored: Tensor, rows: Tensor | None) -> Tensor | None:
    """The flat positions to work on; only the CPU can be asked which they are without waiting for it."""
    if rows is not None:
        return rows.to(scored.device, non_blocking=True)
    return scored.reshape(-1).nonzero()[:, 0] if scored.device.type == "cpu" else None


def last_of_chunk(chunk: Tensor, index: ChunkIndex) -> Tensor:
    """The place of the last token of every chunk: int64 `[B, C]`, -1 where there is none."""
    place = torch.arange(chunk.shape[1], device=chunk.device).expand_as(chunk)
    last = chunk.new_full((len(chunk), index.kind.shape[1] + 1), -1)
    return last.scatter_reduce(1, index._slot(chunk), place, "amax")[:, :-1]


def log_left(x: Tensor, lse: Tensor, used: Tensor) -> Tensor:
    """log of 1 - the mass of what is used, from what is left: 1 minus a sum near 1 would be rounding."""
    left = x.masked_fill(used, -math.inf).logsumexp(-1) - lse
    return torch.where(left > -math.inf, left, LOG_NOTHING).clamp(min=LOG_NOTHING)


def _flags(x: Tensor, ids: Tensor) -> Tensor:
    """bool, as `x` `[n, V]`: True at these ids `[n, k]`; V stands for none."""
    flags = torch.zeros(len(x), x.shape[1] + 1, dtype=torch.bool, device=x.device)
    return flags.scatter_(1, ids, True)[:, :-1]


def _column(flag: Tensor | bool, x: Tensor) -> Tensor:
    return flag if isinstance(flag, Tensor) else torch.full((len(x),), flag, device=x.device)


def _scattered(size: int, at: Tensor, values: Tensor) -> Tensor:
    return values.new_full((size,), -1).index_copy(0, at, values)


def _others(size: int, ids: Tensor) -> Tensor:
    """The ids below `size` that are not these; how many is known, so that the device is not asked."""
    taken = torch.zeros(size, dtype=torch.int8, device=ids.device).index_fill(0, ids, 1)
    return taken.argsort(stable=True)[: size - len(ids)]


def check_rows(
    vocab_map: Any, student: Logits, teacher: Logits | TopK, index: ChunkIndex, mask: Tensor | None
) -> VocabTensors:
    """The maps on the index's device, after a look at everything that must fit."""
    for name, x, like in (("student", student, index.student_chunk), ("teacher", teacher, index.teacher_chunk)):
        if x.shape != like.shape:
            raise XTokMapError(f"{name} has rows {tuple(x.shape)}, the index has {tuple(like.shape)} {name} tokens")
    check_mask(mask, index)
    device = index.student_chunk.device
    same = isinstance(vocab_map, VocabTensors)
    maps = vocab_map.to(device) if same else VocabTensors.from_map(vocab_map, device)
    for name, x, size in (
        ("student", student, len(maps.student_to_teacher)),
        ("teacher", teacher, len(maps.teacher_to_student)),
    ):
        if isinstance(x, Logits) and x.vocab_size < size:
            raise XTokMapError(
                f"{name} has {x.vocab_size} logits a row and its vocabulary {size} tokens; every token needs a logit "
                "(more logits than tokens are fine)"
            )
    return maps


def check_teacher(teacher: Any, known: tuple[type, ...], loss: str) -> None:
    """Raises XTokMapError for a teacher in a form that the loss cannot use."""
    if not isinstance(teacher, known):
        raise XTokMapError(
            f"{loss}: a teacher given as {type(teacher).__name__}; it takes {' or '.join(t.__name__ for t in known)}"
        )


def check_beta(beta: float) -> None:
    """Raises XTokMapError for a beta outside [0, 1]."""
    if not 0 <= beta <= 1:
        raise XTokMapError(f"beta={beta} is outside [0, 1]: 0 is forward, 1 reverse KL")


def check_mask(mask: Tensor | None, index: ChunkIndex) -> None:
    """Raises XTokMapError for a mask that has not one element for each student token."""
    if mask is not None:
        check_shape("mask", mask, index.student_chunk)


def check_shape(name: str, x: Tensor, like: Tensor) -> None:
    """Raises XTokMapError, naming the argument, where two shapes differ."""
    if x.shape != like.shape:
        raise XTokMapError(f"{name} has shape {tuple(x.shape)}, expected {tuple(like.shape)}")

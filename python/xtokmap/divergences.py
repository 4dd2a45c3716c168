"""Losses on whole next-token distributions across tokenizers, differentiable in the student.

Notation: p is the student and q the teacher; a chunk is a span between two consecutive common byte ends. All take rows
of logits as `xtokmap.torch.Logits`, go through them a slice at a time, and return a `Loss`.

| loss | teacher | where it speaks | source |
|---|---|---|---|
| `strict_kl` | logits or top-k | tokens that are the same on both sides | arXiv 2610.08448, with the rest as a bin |
| `alm` | sampled logprobs | every chunk | arXiv 2503.20083 |
| `uld_hybrid` | logits | every chunk | arXiv 2402.12030, TRL's GOLD |
| `prefixes.byte_kl` | logits | every token of an aligned text | arXiv 2607.22334 |
| `prefixes.completion` | logits | the token after one that begins a teacher token | arXiv 2609.34738 |

`beta` is that of the generalised Jensen-Shannon divergence (arXiv 2306.13649): 0 is KL(q || p), forward; 1 is
KL(p || q), reverse; between them beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.alignment import Kind
from xtokmap.torch import ChunkIndex, Logits, TopK, VocabTensors, map_rows

REWRITTEN, STOP = int(Kind.REWRITTEN), int(Kind.STOP)

#: Where a bin of one side holds nothing at all: about 1e-13, so that no divergence is infinite by rounding.
_LOG_NOTHING = -30.0


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
    """

    loss: Tensor
    terms: Tensor
    figures: dict[str, Tensor]


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
    """Generalised Jensen-Shannon divergence over the last dimension; -inf on both sides means that there is no bin.

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


def _kl_bins(a: Tensor, b: Tensor) -> Tensor:
    return a.exp() * torch.where(a > -math.inf, a - b, 0)


# ---- strict_kl ---------------------------------------------------------------------------------------------------


def strict_kl(
    student: Logits,
    teacher: Logits | TopK,
    index: ChunkIndex,
    vocab_map: Any,
    *,
    k: int | None = 16,
    beta: float = 1.0,
    support: Literal["rest", "renorm"] = "rest",
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    size: int | None = None,
    denominator: Tensor | float | None = None,
) -> Loss:
    """Divergence where both sides have the same token (ONE_TO_ONE and STOP chunks), on a few tokens and the rest.

    U is the student's top k that the teacher has as well, byte for byte (a `TopK` teacher: what its row lists and the
    student has as well); to it comes the end of a turn as one event, of all stop ids of a side. With p' = p on U and
    1 - p(U), q' likewise, the loss is JSD_beta(p', q'): at least 0, never above that of the whole distributions, and
    equal to it with k = V on equal vocabularies.

    Args:
        student: `[B, Ts]` rows.
        teacher: `[B, Tt]` rows: logits, hidden states with their head, or `TopK`.
        index: of the same rows.
        vocab_map: `VocabTensors`, or what it can be made from (then it is, every time).
        k: how many of the student's tokens; None: all. Not for `TopK`.
        beta: see the module; 1 is KL(p' || q').
        support: "rest"; "renorm" renormalises p and q on U instead (arXiv 2610.08448), which is blind to what lies
            outside.
        mask: bool or 0/1 `[B, Ts]`; the response tokens.
        rows: int64 `[N]`; flat positions of the tokens that can be scored, as in `map_rows`. None: found out on the
            CPU, every row on another device.
        size: rows of a slice.
        denominator: what to divide by instead of the number of scored tokens, so that micro-batches add up.

    Returns:
        The loss; figures `student_rest` and `teacher_rest`, the mass outside of U. It costs a head pass (two with a
        gradient) of either side for the scored rows.

    Raises:
        XTokMapError: shapes or vocabularies that do not fit, unknown support, beta outside [0, 1].
    """
    check_beta(beta)
    if support not in ("rest", "renorm"):
        raise XTokMapError(f"support={support!r}: use 'rest' or 'renorm'")
    if k is not None and k < 1:
        raise XTokMapError(f"k={k}: at least 1, or None for every token")
    check_teacher(teacher, (Logits, TopK), "strict_kl")
    maps = check_rows(vocab_map, student, teacher, index, mask)
    pos = index.strict_teacher_pos()
    scored = pos >= 0
    if mask is not None:
        scored &= mask.bool()

    width = student.vocab_size
    stops, others = maps.student_stops, maps.teacher_stops
    with_stops = bool(len(stops) and len(others))
    to_teacher = _scattered(width, maps.shared[:, 0], maps.shared[:, 1])
    to_student = _scattered(len(maps.teacher_to_student), maps.shared[:, 1], maps.shared[:, 0])

    def student_bins(x: Tensor, ids: Tensor, valid: Tensor, stop: Tensor | bool) -> tuple[Tensor, Tensor]:
        """Logprobs of U and the end of a turn, and of what is left."""
        lse = x.logsumexp(-1)
        bins = torch.where(valid, x.gather(1, ids) - lse[:, None], -math.inf)
        used = _flags(x, torch.where(valid, ids, width))
        if with_stops:
            ends = torch.where(_column(stop, x), x[:, stops].logsumexp(-1) - lse, -math.inf)
            bins = torch.cat([bins, ends[:, None]], 1)
            used |= _flags(x, stops.expand(len(x), -1)) & _column(stop, x)[:, None]
        return bins, log_left(x, lse, used)

    def on_logits(x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        z = z.to(x.dtype)
        ids = x.detach().topk(min(k, width), -1).indices if k else maps.shared[:, 0].expand(len(x), -1)
        at = to_teacher[ids]
        valid = at >= 0
        p, p_rest = student_bins(x, ids, valid, True)
        lse = z.logsumexp(-1)
        q = torch.where(valid, z.gather(1, at.clamp(min=0)) - lse[:, None], -math.inf)
        used = _flags(z, torch.where(valid, at, z.shape[1]))
        if with_stops:
            q = torch.cat([q, (z[:, others].logsumexp(-1) - lse)[:, None]], 1)
            used |= _flags(z, others.expand(len(z), -1))
        return finish(p, q, p_rest, log_left(z, lse, used))

    def on_top_k(x: Tensor, listed: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        ids, q = listed[0], listed[1].to(x.dtype)
        there = (ids >= 0) & (ids < len(to_student))
        at = torch.where(there, to_student[torch.where(there, ids, 0)], -1)
        ends = (ids[..., None] == others).any(-1) & with_stops
        # The end of a turn is compared where the teacher says anything about it.
        stop = ends.any(-1)
        valid = at >= 0
        p, p_rest = student_bins(x, at.clamp(min=0), valid, stop)
        q_ends = torch.where(ends, q, -math.inf).logsumexp(-1)
        q = torch.where(valid, q, -math.inf)
        if with_stops:
            q = torch.cat([q, q_ends[:, None]], 1)
        # Logprobs from a server are rounded; their sum may be 1 or more.
        rest = (1 - q.double().exp().sum(-1)).clamp(min=1e-7).log().to(q.dtype)
        return finish(p, q, p_rest, rest)

    def finish(p: Tensor, q: Tensor, p_rest: Tensor, q_rest: Tensor) -> tuple[Tensor, ...]:
        if support == "renorm":
            p, q = (torch.where(y == -math.inf, y, y - y.logsumexp(-1, keepdim=True)) for y in (p, q))
        else:
            p, q = torch.cat([p, p_rest[:, None]], 1), torch.cat([q, q_rest[:, None]], 1)
        return divergence(p, q, beta), p_rest.detach().exp(), q_rest.exp()

    fn = on_logits if isinstance(teacher, Logits) else on_top_k
    rows = wanted_rows(scored, rows)
    terms, p_rest, q_rest = map_rows(fn, student, teacher.at(index.teacher_rows(pos)), size=size, rows=rows)
    return reduce_terms(terms, scored, index, mask, denominator, student_rest=p_rest, teacher_rest=q_rest)


# ---- losses of chunks --------------------------------------------------------------------------------------------


def alm(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    index: ChunkIndex,
    *,
    tau: float = math.inf,
    mask: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> Loss:
    """Likelihoods of whole chunks, compared as yes or no (ALM, arXiv 2503.20083).

    With x and y the sums of a chunk's teacher and student logprobs: KL of the Bernoullis e^(x / tau) and e^(y / tau).
    An infinite tau is the limit of tau times that: x - y + x ln(y / x). At least 0, and 0 only where x = y. Every chunk
    with tokens on both sides counts, REWRITTEN and STOP ones too.

    Args:
        student_logprobs: `[B, Ts]`, with a gradient; nats.
        teacher_logprobs: `[B, Tt]`; nats.
        index: of the same rows.
        tau: see above.
        mask: bool or 0/1 `[B, Ts]`; the response tokens. A chunk counts if all its student tokens do.
        denominator: what to divide by instead of the number of scored chunks, so that micro-batches add up.

    Returns:
        The loss; its terms are a chunk's share for each of its tokens.

    Raises:
        XTokMapError: shapes that do not fit the index, a tau that is not positive.
    """
    if not tau > 0:
        raise XTokMapError(f"tau={tau} must be positive; math.inf is the limit")
    check_shape("student_logprobs", student_logprobs, index.student_chunk)
    check_shape("teacher_logprobs", teacher_logprobs, index.teacher_chunk)
    check_mask(mask, index)
    # 0 is a certain chunk, whose complement has no logarithm.
    x = index.sum_teacher(teacher_logprobs.detach()).clamp(max=-1e-6)
    y = index.sum_student(student_logprobs).clamp(max=-1e-6)
    usable = (index.student_count > 0) & (index.teacher_count > 0) & torch.isfinite(x) & torch.isfinite(y)
    if mask is not None:
        usable &= index.sum_student(mask.long()) == index.student_count
    x, y = torch.where(usable, x, -1), torch.where(usable, y, -1)
    if tau == math.inf:
        value = x - y + x * (y / x).log()
    else:
        x, y = x / tau, y / tau
        value = x.exp() * (x - y) - torch.expm1(x) * ((-torch.expm1(x)).log() - (-torch.expm1(y)).log())
    share = 1 / index.student_count.clamp(min=1).to(y.dtype)
    terms = index.to_student(value * share)
    # A chunk with a bad logprob is scored with a term that is left out.
    both = index.to_student(((index.student_count > 0) & (index.teacher_count > 0)).long()) > 0
    terms = torch.where(index.to_student(usable.long()) > 0, terms, torch.nan)
    if mask is not None:
        both &= index.to_student((index.sum_student(mask.long()) == index.student_count).long()) > 0
    return reduce_terms(terms, both, index, mask, denominator, weight=index.to_student(share))


def uld_hybrid(
    student: Logits,
    teacher: Logits,
    index: ChunkIndex,
    vocab_map: Any,
    *,
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    hybrid: bool = True,
    beta: float = 0.5,
    matched_weight: float | None = None,
    stops: bool = True,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    size: int | None = None,
    denominator: Tensor | float | None = None,
) -> Loss:
    """Sorted probabilities (ULD, arXiv 2402.12030) and the hybrid of TRL's GOLD, as a baseline and for migration.

    A chunk's distribution is that of its last token times the probabilities of its earlier ones (GOLD's "bayesian"
    merge). ULD is the sum of the absolute differences of both sides' sorted probabilities. The hybrid is
    w JSD_beta on tokens of equal bytes + (1 - w) ULD on the others, w = shared tokens / V_T; 0 for ULD where one side
    has no others. REWRITTEN chunks are left out.

    TRL 1.16 matches tokens by how a vocabulary writes them, so that byte-level and byte-fallback pairs share little;
    its default merge ("observed") leaves the row that predicts the first token out; and its mean is over the means of
    rows. Otherwise the values are TRL's, probabilities below 1e-8 being cut as there.

    Args:
        student: `[B, Ts]` rows.
        teacher: `[B, Tt]` rows: logits, or hidden states with their head.
        index: of the same rows.
        vocab_map: `VocabTensors`, or what it can be made from.
        student_logprobs: `[B, Ts]`; a gradient goes through them if they have one.
        teacher_logprobs: `[B, Tt]`; nats.
        hybrid: False is ULD alone.
        beta: see the module.
        matched_weight: w, if it is not to depend on the vocabularies.
        stops: whether the ends of turns count.
        mask: as for `strict_kl`; of the last token of a chunk.
        rows: as for `strict_kl`.
        size: rows of a slice.
        denominator: what to divide by instead of the number of scored chunks, so that micro-batches add up.

    Returns:
        The loss, its terms at the last student token of every chunk; figures `matched` and `unmatched`, the two parts
        before weighting. Both vocabularies are sorted for every row: the slowest loss here.

    Raises:
        XTokMapError: shapes or vocabularies that do not fit; a `TopK` teacher; beta outside [0, 1].
    """
    check_beta(beta)
    check_teacher(teacher, (Logits,), "uld_hybrid")
    maps = check_rows(vocab_map, student, teacher, index, mask)
    check_shape("student_logprobs", student_logprobs, index.student_chunk)
    check_shape("teacher_logprobs", teacher_logprobs, index.teacher_chunk)
    place = torch.arange(index.student_chunk.shape[1], device=index.student_chunk.device)
    last = (index.student_chunk >= 0) & (index.to_student(last_of_chunk(index.student_chunk, index)) == place)
    last_teacher = last_of_chunk(index.teacher_chunk, index)
    kind = index.kind_of_student()
    scored = last & (kind != REWRITTEN) & (index.to_student(index.teacher_count) > 0)
    if not stops:
        scored &= kind != STOP
    if mask is not None:
        scored &= mask.bool()

    eps = 1e-8
    s = torch.where(last, 0, student_logprobs.clamp(min=math.log(eps)))
    place = torch.arange(index.teacher_chunk.shape[1], device=place.device)
    at_end = (
        torch.nn.functional.pad(last_teacher, (0, 1), value=-1).gather(1, index._slot(index.teacher_chunk)) == place
    )
    t = torch.where(at_end, 0, teacher_logprobs.detach().clamp(min=math.log(eps)))
    earlier_s, earlier_t = (index.to_student(x) for x in (index.sum_student(s), index.sum_teacher(t)))

    shared_s, shared_t = (maps.shared[:, 0], maps.shared[:, 1]) if hybrid else (maps.shared[:0, 0], maps.shared[:0, 1])
    own_s, own_t = _others(student.vocab_size, shared_s), _others(teacher.vocab_size, shared_t)
    weight = len(shared_t) / teacher.vocab_size if matched_weight is None else matched_weight
    with_unmatched = bool(len(shared_s) < student.vocab_size and len(shared_t) < teacher.vocab_size)

    def fn(x: Tensor, z: Tensor, earlier_s: Tensor, earlier_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = torch.softmax(x, -1) * earlier_s.exp()[:, None]
        q = torch.softmax(z.to(x.dtype), -1) * earlier_t.to(x.dtype).exp()[:, None]
        zero = p[:, 0] * 0
        log_p, log_q = (y.clamp(min=eps).log() for y in (p[:, shared_s], q[:, shared_t]))
        matched = divergence(log_p, log_q, beta) if len(shared_s) else zero
        unmatched = _sorted_l1(p[:, own_s], q[:, own_t]) if with_unmatched else zero
        if not hybrid:
            return unmatched, matched.detach(), unmatched.detach()
        return weight * matched + (1 - weight) * unmatched, matched.detach(), unmatched.detach()

    partner = teacher.at(index.teacher_rows(torch.where(scored, index.to_student(last_teacher), -1)))
    rows = wanted_rows(scored, rows)
    terms, matched, unmatched = map_rows(fn, student, partner, earlier_s, earlier_t, size=size, rows=rows)
    return reduce_terms(terms, scored, index, mask, denominator, matched=matched, unmatched=unmatched)


def _sorted_l1(p: Tensor, q: Tensor) -> Tensor:
    p, q = (x.sort(-1, descending=True).values for x in (p, q))
    short = min(p.shape[1], q.shape[1])
    both = (p[:, :short] - q[:, :short]).abs().sum(-1)
    return both + p[:, short:].sum(-1) + q[:, short:].sum(-1)


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
    return torch.where(left > -math.inf, left, _LOG_NOTHING).clamp(min=_LOG_NOTHING)


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

"""`alm`: the likelihood of chunks, binarized; and `uld_hybrid`: TRL GOLD's loss, matched by bytes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.losses.rule import Computed, LossInput, sums_of, there, wanted, whole_rows
from xtokmap.losses.terms import (
    REWRITTEN,
    STOP,
    Loss,
    _others,
    check_beta,
    check_mask,
    check_rows,
    check_shape,
    check_teacher,
    divergence,
    last_of_chunk,
    reduce_terms,
    summed_terms,
    wanted_rows,
)
from xtokmap.torch.index import ChunkIndex
from xtokmap.torch.logits import Logits
from xtokmap.torch.summed import graded

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
    with tokens on both sides counts, REWRITTEN, STOP and MARKER ones too.

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
    loss, (slope,) = summed_terms(
        graded(fn, student.needs_gradient or earlier_s.requires_grad, also=1),
        student,
        (partner, earlier_s.detach(), earlier_t),
        scored,
        index,
        mask,
        denominator,
        figures=("matched", "unmatched"),
        rows=rows,
        size=size,
    )
    # Through the earlier tokens comes a gradient and nothing else.
    through = torch.where(scored & torch.isfinite(earlier_s), slope * (earlier_s - earlier_s.detach()), 0).sum()
    over = loss.figures["tokens"].clamp(min=1) if denominator is None else denominator
    return loss._replace(loss=loss.loss + through / over)


def _sorted_l1(p: Tensor, q: Tensor) -> Tensor:
    p, q = (x.sort(-1, descending=True).values for x in (p, q))
    short = min(p.shape[1], q.shape[1])
    both = (p[:, :short] - q[:, :short]).abs().sum(-1)
    return both + p[:, short:].sum(-1) + q[:, short:].sum(-1)


def computed_alm(x: LossInput) -> Computed:
    """The table's `alm`."""
    mask = wanted(x.mask, x.index, x.settings)
    teacher = there(x.teacher_logprobs, "teacher_logprobs")
    return sums_of(alm(x.logprobs, teacher, x.index, mask=mask, denominator=x.denominator))


def computed_uld_hybrid(x: LossInput) -> Computed:
    """The table's `uld_hybrid`."""
    loss = uld_hybrid(
        x.student,
        whole_rows(x),
        x.index,
        there(x.maps, "maps"),
        student_logprobs=x.logprobs,
        teacher_logprobs=there(x.teacher_logprobs, "teacher_logprobs"),
        stops=x.settings.score_stop,
        mask=wanted(x.mask, x.index, x.settings),
        denominator=x.denominator,
    )
    return sums_of(loss)

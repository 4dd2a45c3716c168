"""`strict_kl`: where one student token stands against one teacher token, on its likeliest tokens and the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.losses.rule import Computed, LossInput, met_alone, sums_of, there
from xtokmap.losses.terms import (
    Loss,
    _column,
    _flags,
    _scattered,
    check_beta,
    check_rows,
    check_teacher,
    divergence,
    log_left,
    summed_terms,
    wanted_rows,
)
from xtokmap.torch.index import ChunkIndex, VocabTensors
from xtokmap.torch.logits import Logits, TopK
from xtokmap.torch.summed import graded


def strict_kl(
    student: Logits,
    teacher: Logits | TopK,
    index: ChunkIndex,
    vocab_map: Any,
    *,
    k: int | None = 16,
    beta: float = 1.0,
    support: Literal["rest", "renorm"] = "rest",
    student_ids: Tensor | None = None,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    size: int | None = None,
    denominator: Tensor | float | None = None,
) -> Loss:
    """Divergence where both sides have the same token (ONE_TO_ONE, STOP, MARKER chunks), on a few tokens and the rest.

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
        support: "rest"; "renorm" renormalizes p and q on U instead (arXiv 2610.08448), which is blind to what lies
            outside.
        student_ids: int64 `[B, Ts]`; tokens whose logprobs are to be found on the way.
        mask: bool or 0/1 `[B, Ts]`; the response tokens.
        rows: int64 `[N]`; flat positions of the tokens that can be scored, as in `map_rows`. None: found out on the
            CPU, every row on another device.
        size: rows of a slice.
        denominator: what to divide by instead of the number of scored tokens, so that micro-batches add up.

    Returns:
        The loss; figures `student_rest` and `teacher_rest`, the mass outside of U. It costs a head pass of either
        side for the scored rows, no more with a gradient.

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

    compared = _Compared.of(maps, student.vocab_size, k, beta, support)
    fn = compared.with_logits if isinstance(teacher, Logits) else compared.with_top_k
    rows = wanted_rows(scored, rows)
    loss, _ = summed_terms(
        graded(fn, student.needs_gradient),
        student,
        (teacher.at(index.teacher_rows(pos)),),
        scored,
        index,
        mask,
        denominator,
        figures=("student_rest", "teacher_rest"),
        rows=rows,
        ids=student_ids,
        size=size,
    )
    return loss


@dataclass(frozen=True, eq=False)
class _Compared:
    """What a row compares: the bins of U and of the end of a turn on both sides, and what is left beside them.

    Attributes:
        width: V, of the student's rows.
        shared: int64 `[S]`; the student's ids that the teacher has as well.
        to_teacher: int64 `[V]`; the teacher's id of a student token, -1 for none.
        to_student: int64 `[V_T]`; the other way round.
        stops: the student's stop ids.
        teacher_stops: the teacher's.
        k: see `strict_kl`.
        beta: likewise.
        renorm: whether U is all there is.
    """

    width: int
    shared: Tensor
    to_teacher: Tensor
    to_student: Tensor
    stops: Tensor
    teacher_stops: Tensor
    k: int | None
    beta: float
    renorm: bool

    @classmethod
    def of(cls, maps: VocabTensors, width: int, k: int | None, beta: float, support: str) -> _Compared:
        own, theirs = maps.shared[:, 0], maps.shared[:, 1]
        to_teacher = _scattered(width, own, theirs)
        to_student = _scattered(len(maps.teacher_to_student), theirs, own)
        stops = maps.student_stops, maps.teacher_stops
        return cls(width, own, to_teacher, to_student, *stops, k, beta, support == "renorm")

    @property
    def with_stops(self) -> bool:
        """Whether both sides can end a turn."""
        return bool(len(self.stops) and len(self.teacher_stops))

    def with_logits(self, x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        """U is the student's top k. Returns the divergence `[n]` and what is left on both sides."""
        z = z.to(x.dtype)
        ids = x.detach().topk(min(self.k, self.width), -1).indices if self.k else self.shared.expand(len(x), -1)
        at = self.to_teacher[ids]
        valid = at >= 0
        p, p_rest = self._student(x, ids, valid, True)
        lse = z.logsumexp(-1)
        q = torch.where(valid, z.gather(1, at.clamp(min=0)) - lse[:, None], -math.inf)
        used = _flags(z, torch.where(valid, at, z.shape[1]))
        if self.with_stops:
            q = torch.cat([q, (z[:, self.teacher_stops].logsumexp(-1) - lse)[:, None]], 1)
            used |= _flags(z, self.teacher_stops.expand(len(z), -1))
        return self._divergence(p, q, p_rest, log_left(z, lse, used))

    def with_top_k(self, x: Tensor, listed: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """U is what the teacher lists."""
        ids, q = listed[0], listed[1].to(x.dtype)
        there = (ids >= 0) & (ids < len(self.to_student))
        at = torch.where(there, self.to_student[torch.where(there, ids, 0)], -1)
        ends = (ids[..., None] == self.teacher_stops).any(-1) & self.with_stops
        # The end of a turn is compared where the teacher says anything about it.
        stop = ends.any(-1)
        valid = at >= 0
        p, p_rest = self._student(x, at.clamp(min=0), valid, stop)
        q_ends = torch.where(ends, q, -math.inf).logsumexp(-1)
        q = torch.where(valid, q, -math.inf)
        if self.with_stops:
            q = torch.cat([q, q_ends[:, None]], 1)
        # Logprobs from a server are rounded; their sum may be 1 or more.
        rest = (1 - q.double().exp().sum(-1)).clamp(min=1e-7).log().to(q.dtype)
        return self._divergence(p, q, p_rest, rest)

    def _student(self, x: Tensor, ids: Tensor, valid: Tensor, stop: Tensor | bool) -> tuple[Tensor, Tensor]:
        """The student's logprobs of U and the end of a turn, and of what is left."""
        lse = x.logsumexp(-1)
        bins = torch.where(valid, x.gather(1, ids) - lse[:, None], -math.inf)
        used = _flags(x, torch.where(valid, ids, self.width))
        if self.with_stops:
            ends = torch.where(_column(stop, x), x[:, self.stops].logsumexp(-1) - lse, -math.inf)
            bins = torch.cat([bins, ends[:, None]], 1)
            used |= _flags(x, self.stops.expand(len(x), -1)) & _column(stop, x)[:, None]
        return bins, log_left(x, lse, used)

    def _divergence(self, p: Tensor, q: Tensor, p_rest: Tensor, q_rest: Tensor) -> tuple[Tensor, ...]:
        if self.renorm:
            p, q = (torch.where(y == -math.inf, y, y - y.logsumexp(-1, keepdim=True)) for y in (p, q))
        else:
            p, q = torch.cat([p, p_rest[:, None]], 1), torch.cat([q, q_rest[:, None]], 1)
        return divergence(p, q, self.beta), p_rest.detach().exp(), q_rest.exp()


def computed(x: LossInput) -> Computed:
    """The table's `strict_kl`."""
    common: Any = {
        "beta": x.settings.beta,
        "mask": met_alone(x.index, x.mask, x.settings),
        "denominator": x.denominator,
    }
    teacher = there(x.teacher_rows, "teacher_rows")
    k = None if isinstance(teacher, TopK) else 16
    loss = strict_kl(x.student, teacher, x.index, there(x.maps, "maps"), k=k, student_ids=x.student_ids, **common)
    x.came_by(loss)
    return sums_of(loss)

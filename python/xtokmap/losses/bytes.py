"""Losses against the teacher's distribution read through the bytes of its tokens: `byte_kl` and `completion`.

What the words, `beta` and the common arguments mean is in `xtokmap.losses.terms`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xtokmap._core import ByteTable, XTokMapError
from xtokmap.alignment import InteriorQueries
from xtokmap.losses.rule import Computed, LossInput, sums_of, there, wanted, whole_rows
from xtokmap.losses.terms import (
    LOG_NOTHING,
    MARKER,
    REWRITTEN,
    STOP,
    Loss,
    check_beta,
    check_rows,
    check_shape,
    check_teacher,
    divergence,
    divergence_and_slope,
    last_of_chunk,
    summed_terms,
    wanted_rows,
)
from xtokmap.torch.index import ChunkIndex, VocabTensors
from xtokmap.torch.logits import Logits, map_rows, softmax_and_sums
from xtokmap.torch.summed import graded

Phi: TypeAlias = Literal["longest", "canonical"]
Residual: TypeAlias = Literal["compact", "column"]


class Spelling(NamedTuple):
    """What it takes to see which student tokens span several teacher tokens.

    Attributes:
        student_ids: int64 `[B, Ts]`.
        teacher_ids: int64 `[B, Tt]`.
        teacher_logprobs: float `[B, Tt]`; of the teacher's tokens, nats.
    """

    student_ids: Tensor
    teacher_ids: Tensor
    teacher_logprobs: Tensor


def byte_kl(
    student: Logits,
    teacher: Logits,
    index: ChunkIndex,
    vocab_map: Any,
    queries: InteriorQueries,
    *,
    spelling: Spelling | None = None,
    student_ids: Tensor | None = None,
    beta: float = 0.0,
    phi: Phi = "longest",
    residual: Residual = "compact",
    stop_bridge: float = 0.0,
    whitespace: Tensor | None = None,
    floor: float = 1e-6,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    size: int | None = None,
    denominator: Tensor | float | None = None,
) -> Loss:
    """Divergence to the teacher's distribution marginalized to the student's tokens by bytes (arXiv 2607.22334).

    The target of a student token that starts where a teacher token starts is t(u) = sum of q(v) over the teacher
    tokens v with phi(v) = u, phi(v) the longest student token that v begins with. Behind c bytes of a teacher token
    it is the same of what follows c in the tokens that go on behind c, given that one of them stands there. With
    `spelling`, a student token s that reaches beyond the teacher token gets what is known of it: the product of the
    teacher's probabilities of the tokens that s covers, times the mass of all that begins with the rest of s; that
    much is taken from the token to which the first of them would have gone. The ends of turns correspond as one event
    of all stop ids of a side.

    The teacher's boundaries are taken as they stand, so the row behind one is used as if its bytes could not have been
    put another way; see the repair in `transfer_kl`. REWRITTEN chunks are left out.

    Args:
        student: `[B, Ts]` rows.
        teacher: `[B, Tt]` rows: logits, or hidden states with their head.
        index: of the same rows.
        vocab_map: `VocabTensors`, or what it can be made from.
        queries: of the same rows.
        spelling: ids and teacher logprobs; None leaves such student tokens to what starts with them.
        student_ids: int64 `[B, Ts]`; tokens whose logprobs are to be found on the way.
        beta: see the module; 0 is KL(t || p).
        phi: "longest", or "canonical": the first token of the student's own encoding of v. Inside a teacher token it
            is what the queries say.
        residual: mass of t that no student token covers. "compact": against everything that phi never gives;
            "column": against the student's ids without bytes.
        stop_bridge: weight of a KL(q || p) of the event {stop, no stop}, whatever beta is.
        whitespace: bool `[B, Ts]`; tokens to leave out, see `whitespace_tokens` (their rows can collapse indentation).
        floor: least target mass of the residual and of what phi never gives, for beta > 0: nothing there would make
            the divergence infinite.
        mask: as for `strict_kl`.
        rows: as for `strict_kl`; best on the CPU.
        size: rows of a slice.
        denominator: as for `strict_kl`.

    Returns:
        The loss; figures `residual` (mean mass), `inside`, `spanning` (shares of the scored tokens) and `whitespace`
        (tokens left out). A head pass of either side, no more with a gradient, and one more of the teacher's for
        the spanning tokens.

    Raises:
        XTokMapError: shapes or vocabularies that do not fit; unknown options; a `TopK` teacher; a spelling with queries
            that lack `prefix_range`; "column" where the student has no ids without bytes.
    """
    check_beta(beta)
    for name, value, known in (("phi", phi, get_args(Phi)), ("residual", residual, get_args(Residual))):
        if value not in known:
            raise XTokMapError(f"{name}={value!r}: use {' or '.join(map(repr, known))}")
    if beta > 0 and not floor > 0:
        raise XTokMapError(f"floor={floor} with beta={beta}: it must be positive, or the divergence is infinite")
    check_teacher(teacher, (Logits,), "byte_kl")
    maps = check_rows(vocab_map, student, teacher, index, mask)
    if whitespace is not None:
        check_shape("whitespace", whitespace, index.student_chunk)
    slots = _Slots.of(maps, phi, student.vocab_size, teacher.vocab_size)
    with_bytes_or_stop = len(maps.student_order) + slots.with_stops * len(maps.student_stops)
    if residual == "column" and student.vocab_size == with_bytes_or_stop:
        raise XTokMapError("residual='column' needs student ids without bytes to stand for it; use 'compact'")

    inside = _inside(index, queries)
    kind = index.kind_of_student()
    scored = (index.teacher_pos >= 0) & (kind != REWRITTEN) & ((index.teacher_off == 0) | inside)
    left_out = torch.zeros_like(scored) if whitespace is None else scored & whitespace
    if mask is not None:
        left_out &= mask.bool()
        scored &= mask.bool()
    scored &= ~left_out
    worked = wanted_rows(scored, rows)
    # Where the rows are known on the CPU they are asked there.
    host = worked if rows is None else rows
    device = index.student_chunk.device
    entries = _Ragged(queries.position, queries.indptr, host, device, queries.teacher_ids, queries.student_ids)
    if spelling is None:
        none = torch.full_like(index.student_chunk, -1)
        spans = _Spans(none.float(), none, none)
    else:
        spans = _spans(teacher, index, maps, queries, spelling, scored, size)

    fn = _ByteTerm(slots, beta, residual == "column", stop_bridge, floor, student.needs_gradient)
    at = index.teacher_rows(index.teacher_pos)
    loss, _ = summed_terms(
        fn,
        student,
        (teacher.at(at), inside, *spans, entries),
        scored,
        index,
        mask,
        denominator,
        figures=("residual",),
        rows=worked,
        ids=student_ids,
        size=size,
        inside=inside.float(),
        spanning=(spans.to >= 0).float(),
    )
    loss.figures["whitespace"] = left_out.sum()
    return loss


def whitespace_tokens(table: ByteTable) -> Tensor:
    """Which tokens are white space only: bool `[V]` on the CPU; `whitespace_tokens(table)[ids]` is for `byte_kl`."""
    return torch.tensor([(table[i] or b"").isspace() for i in range(len(table))], dtype=torch.bool)


class _Spans(NamedTuple):
    """Student tokens that reach beyond the teacher token in which they start.

    Attributes:
        log_mass: `[B, Ts]`; log of the mass known of them, not yet given that the text goes on behind c.
        to: int64 `[B, Ts]`; their ids, -1 elsewhere.
        realized: int64 `[B, Ts]`; the teacher token in which each starts.
    """

    log_mass: Tensor
    to: Tensor
    realized: Tensor


@dataclass(frozen=True, eq=False)
class _Slots:
    """Where a row's mass goes: a slot for each of V student tokens, one for nowhere, and one for the end of a turn.

    Attributes:
        slot: int64 `[V_T]`; of every teacher token.
        given: bool `[V + 2]`; slots that some teacher token goes to.
        stops: the student's stop ids.
        no_bytes: bool `[V]`; student ids without bytes that are no stops, and that nothing goes to.
        with_stops: whether both sides can end a turn.
    """

    slot: Tensor
    given: Tensor
    stops: Tensor
    no_bytes: Tensor
    with_stops: bool

    @classmethod
    def of(cls, maps: VocabTensors, phi: Phi, width: int, teacher_width: int) -> _Slots:
        with_stops = bool(len(maps.student_stops) and len(maps.teacher_stops))
        nowhere, stop = width, width + 1
        slot = _padded(maps.prefix if phi == "longest" else maps.canonical, teacher_width)
        slot = torch.where(slot >= 0, slot, nowhere).index_fill(0, maps.teacher_stops, stop if with_stops else nowhere)
        given = torch.zeros(width + 2, dtype=torch.bool, device=slot.device).index_fill(0, slot, True)
        is_stop = given.new_zeros(width).index_fill(0, maps.student_stops, with_stops)
        no_bytes = given.new_ones(width).index_fill(0, maps.student_order, False) & ~is_stop & ~given[:width]
        return cls(slot, given, maps.student_stops, no_bytes, with_stops)

    @property
    def nowhere(self) -> int:
        """The slot of mass that goes to no token."""
        return len(self.given) - 2

    def target(self, z: Tensor, inside: Tensor, spans: _Spans, entries: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The mass of every slot `[n, V + 2]`, and which are explicit."""
        nowhere, slots = self.nowhere, len(self.given)
        q = torch.softmax(z, -1)
        t = q.new_zeros(len(q), slots).index_add_(1, self.slot, q)
        t.mul_(~inside[:, None])
        explicit = self.given & ~inside[:, None]
        row, ids, to = entries[0], entries[1], torch.where(entries[2] >= 0, entries[2], nowhere)
        mass = q[row, ids]
        pi = q.new_zeros(len(q)).index_add_(0, row, mass)
        t.view(-1).index_add_(0, row * slots + to, mass / pi[row])
        explicit.view(-1).index_fill_(0, row * slots + to, True)
        # What spans is moved from where the first of its teacher tokens went.
        source = self.slot[spans.realized.clamp(min=0)]
        found = torch.where(ids == spans.realized[row], to, 0)
        source = torch.where(inside, source.new_zeros(len(q)).index_add_(0, row, found), source)[:, None]
        moved = torch.where(spans.to >= 0, spans.log_mass.to(q.dtype).exp() / torch.where(inside, pi, 1), 0)[:, None]
        moved = torch.minimum(moved, t.gather(1, source))
        goal = torch.where(spans.to >= 0, spans.to, nowhere)[:, None]
        t.scatter_add_(1, source, -moved).scatter_add_(1, goal, moved)
        return t, explicit.scatter_(1, goal, True)


@dataclass(frozen=True, eq=False)
class _ByteTerm:
    """What `sum_rows` works out of rows: the divergence from the target, and the target's mass of nowhere.

    The logits become the gradient. Of the explicit tokens it is formed by hand, over the whole row; of the few bins
    beside them autograd finds it, by the logarithms of their masses.

    Attributes:
        slots: of the two vocabularies.
        beta: see `byte_kl`.
        column: whether the student's ids without bytes stand for the mass of nowhere.
        stop_bridge: see `byte_kl`.
        floor: likewise.
        graded: whether a gradient is needed.
    """

    slots: _Slots
    beta: float
    column: bool
    stop_bridge: float
    floor: float
    graded: bool

    def __call__(
        self, x: Tensor, z: Tensor, inside: Tensor, log_mass: Tensor, to: Tensor, realized: Tensor, entries: Any
    ) -> tuple[Tensor, Tensor]:
        slots = self.slots
        t, explicit = slots.target(z.to(x.dtype), inside, _Spans(log_mass, to, realized), entries)
        lost, stop = t[:, slots.nowhere].clone(), t[:, slots.nowhere + 1].clone()
        p, lse = softmax_and_sums(x)
        # Masks are factors: a choice takes as long as many products.
        its = explicit[:, : slots.nowhere].to(x.dtype)
        left = 1 - its
        if slots.with_stops:
            within = inside[:, None].to(x.dtype)
            its[:, slots.stops] *= within
            left[:, slots.stops] *= within
        t = t[:, : slots.nowhere].mul_(its)
        masses, targets = [], [self._at_least(lost)]
        if self.column:
            no_bytes = slots.no_bytes.to(x.dtype)
            masses.append(p @ no_bytes)
            left *= 1 - no_bytes
            targets.append(self._at_least(torch.zeros_like(lost)))
        masses.append((p * left).sum(-1))
        ends = x[:, slots.stops] if slots.with_stops else x[:, :0]
        value, by_left, by_ends = self._beside(masses, targets, ends.logsumexp(-1) - lse, stop, inside)
        if self.beta == 0:
            common = t.sum(-1)
            log_p = (x - lse[:, None]).clamp_(min=-1e30)  # 0 * -inf would be NaN
            more = t.clamp(min=torch.finfo(t.dtype).tiny).log_().sub_(log_p).mul_(t).sum(-1)
            value = value + torch.where(more > 1e20, math.inf, more)
            d = t.neg()
        else:
            t = t.clamp(min=torch.finfo(torch.float32).tiny).mul_(its)
            more, slope = divergence_and_slope(its.mul_(p), t, self.beta)
            if self.beta == 1:
                slope += 1  # the constant that it leaves out; the bins beside have theirs
            value, common = value + more, -(its * slope).sum(-1)
            d = slope.mul_(its)
        if not self.graded:
            return value, lost
        ends = torch.nan_to_num(ends.softmax(-1)).mul_(by_ends[:, None])
        common = common - by_ends - sum(by * mass for by, mass in zip(by_left, masses, strict=True))
        left.mul_(by_left[-1][:, None]).add_(common[:, None])
        if self.column:
            left.addcmul_(no_bytes, by_left[0][:, None])
        torch.addcmul(d, p, left, out=x)
        if slots.with_stops:
            x.index_add_(1, slots.stops, ends)
        return value, lost

    def _beside(
        self, masses: list[Tensor], targets: list[Tensor], ends: Tensor, stop: Tensor, inside: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """What the bins beside the explicit tokens add, which are what goes nowhere, all that phi never gives, and the
        end of a turn: the value, its slopes by the masses of the former, and by the logarithm of that of the end.
        """
        logs = torch.stack([mass.clamp(min=math.exp(LOG_NOTHING)).log() for mass in masses], 1)
        leaves, slots = [logs, ends], self.slots
        with torch.set_grad_enabled(self.graded):
            for leaf in leaves:
                leaf.requires_grad_(self.graded)
            log_p, mass = logs, torch.stack(targets, 1)
            if slots.with_stops:
                log_p = torch.cat([logs, torch.where(inside, -math.inf, ends)[:, None]], 1)
                mass = torch.cat([mass, torch.where(inside, 0, stop)[:, None]], 1)
            value = divergence(log_p, mass.log(), self.beta)
            if slots.with_stops and self.stop_bridge:
                value = value + self.stop_bridge * torch.where(inside, 0, _stop_or_not(ends, stop))
            if not self.graded:
                return value, [], ends
            found = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        by_logs, by_ends = (torch.zeros_like(x) if d is None else d for x, d in zip(leaves, found, strict=True))
        least = math.exp(LOG_NOTHING)
        slopes = [
            torch.where(mass > least, by / mass.clamp(min=least), 0)
            for by, mass in zip(by_logs.unbind(1), masses, strict=True)
        ]
        return value.detach(), slopes, by_ends

    def _at_least(self, mass: Tensor) -> Tensor:
        return mass.clamp(min=self.floor) if self.beta > 0 else mass


def _stop_or_not(ends: Tensor, stop: Tensor) -> Tensor:
    """KL(q || p) of the event {stop, no stop}, from log p and q of a stop."""
    goes_on = torch.log1p(-ends.exp().clamp(max=1 - 1e-7))
    both = torch.stack([stop, 1 - stop], 1).clamp(min=0).log()
    return divergence(torch.stack([ends, goes_on], 1), both, 0)


def _inside(index: ChunkIndex, queries: InteriorQueries) -> Tensor:
    """bool `[B, Ts]`; which student tokens start inside a teacher token, so that there is a query."""
    position = torch.from_numpy(np.ascontiguousarray(queries.position)).to(index.student_chunk.device)
    flat = torch.zeros(index.student_chunk.numel(), dtype=torch.bool, device=position.device)
    return flat.index_fill(0, position, True).view(index.student_chunk.shape)


def _spans(
    teacher: Logits,
    index: ChunkIndex,
    maps: VocabTensors,
    queries: InteriorQueries,
    spelling: Spelling,
    scored: Tensor,
    size: int | None,
) -> _Spans:
    """The student tokens that reach beyond the teacher token in which they start."""
    if queries.prefix_range is None:
        raise XTokMapError("spelling needs queries with prefix_range: where the teacher's tokens lie that begin with c")
    for name, x, like in zip(
        Spelling._fields, spelling, (index.student_chunk, index.teacher_chunk, index.teacher_chunk), strict=True
    ):
        check_shape(name, x, like)
    chunk, pos, off = index.student_chunk, index.teacher_pos, index.teacher_off
    device = chunk.device
    if not index.teacher_chunk.shape[1]:
        nothing = torch.full_like(pos, -1)
        return _Spans(torch.full_like(pos, -math.inf, dtype=torch.float32), nothing, nothing)
    # The next student token of the same chunk starts where this one ends.
    place = torch.arange(chunk.shape[1], device=device)
    aligned = torch.where(chunk >= 0, place, chunk.shape[1])
    after = torch.nn.functional.pad(aligned.flip(1).cummin(1).values.flip(1), (0, 1), value=chunk.shape[1])[:, 1:]
    padded = [torch.nn.functional.pad(x, (0, 1), value=-1).gather(1, after) for x in (chunk, pos, off)]
    follows = (chunk >= 0) & (padded[0] == chunk)
    # The last teacher token of which this one has bytes.
    of_teacher = torch.arange(index.teacher_chunk.shape[1], device=device)
    with_bytes = torch.where(index.teacher_chunk >= 0, of_teacher, -1).cummax(1).values
    before = torch.nn.functional.pad(with_bytes, (1, 0), value=-1)
    last = index.to_student(last_of_chunk(index.teacher_chunk, index))
    cut = follows & (padded[2] > 0)  # it ends inside a teacher token
    whole = torch.where(follows, before.gather(1, padded[1].clamp(min=0)), last)
    last = torch.where(cut, padded[1], whole)
    kind = index.kind_of_student()
    spans = scored & (kind != STOP) & (kind != MARKER) & (last > pos)

    ids = spelling.teacher_ids
    realized = torch.where(pos >= 0, ids.gather(1, pos.clamp(min=0)), -1)
    flat = torch.zeros(chunk.numel(), 2, dtype=torch.int64, device=device)
    position, found = (
        torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in (queries.position, queries.prefix_range)
    )
    of_query = flat.index_copy(0, position, found.to(torch.int64)).view(*chunk.shape, 2)
    of_query = torch.nn.functional.pad(of_query, (0, 0, 0, 1)).gather(1, after[..., None].expand(-1, -1, 2))
    tail = ids.gather(1, last.clamp(min=0)).clamp(min=0)
    bounds = torch.where(cut[..., None], of_query, _fitted(maps.teacher_range, teacher.vocab_size)[tail])
    bounds = torch.where(spans[..., None], bounds, 0)

    def mass(z: Tensor, bounds: Tensor) -> Tensor:
        everyone = torch.arange(len(z), device=z.device)
        return _range_mass(torch.softmax(z, -1)[:, maps.teacher_order], everyone, bounds).clamp(min=0).to(z.dtype)

    with torch.no_grad():
        (tails,) = map_rows(
            mass, teacher.at(index.teacher_rows(last)), bounds, size=size, rows=wanted_rows(spans, None)
        )
    logprobs = torch.where(index.teacher_chunk >= 0, spelling.teacher_logprobs.detach().double(), 0)
    # A bad logprob costs what spans it, and not the rest of the row.
    bad = ~torch.isfinite(logprobs)
    product, in_the_way = (
        y.gather(1, last.clamp(min=0)) - y.gather(1, pos.clamp(min=0))
        for y in (torch.nn.functional.pad(x.cumsum(1), (1, 0)) for x in (torch.where(bad, 0, logprobs), bad.long()))
    )
    product = torch.where(in_the_way > 0, math.nan, product)
    log_span = torch.where(spans, product + tails.double().log(), -math.inf).to(tails.dtype)
    return _Spans(log_span, torch.where(spans, spelling.student_ids, -1), realized)


# ---- completion --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CompletionQueries:
    """For student tokens a that begin teacher tokens, what would complete those; as compressed rows.

    Attributes:
        position: int64 `[Q]`, rising; the student token after a, as the flat position `b * Ts + i`.
        teacher_row: int64 `[Q]`; the teacher token that starts where a does, as `b * Tt + j`.
        indptr: int64 `[Q+1]`; query k has the entries `indptr[k]:indptr[k+1]`.
        group: int64 `[nnz]`; a group of teacher tokens whose shortest member begins with a.
        student_range: int64 `[nnz, 2]`; where in the byte-sorted student ids the tokens are that begin with what a
            leaves of that member; never empty.
    """

    position: npt.NDArray[np.int64]
    teacher_row: npt.NDArray[np.int64]
    indptr: npt.NDArray[np.int64]
    group: npt.NDArray[np.int64]
    student_range: npt.NDArray[np.int64]


class Completions:
    """Finds the `CompletionQueries` of batches, and keeps what it found for every student token.

    Args:
        student: the student's byte table.
        teacher: the teacher's.
        vocab_map: of the two; arrays, as `VocabTensors.from_map` takes them.
    """

    def __init__(self, student: ByteTable, teacher: ByteTable, vocab_map: Any) -> None:
        self._student = student
        self._sorted = [student[int(i)] or b"" for i in vocab_map.student_order]
        order, group = np.asarray(vocab_map.teacher_order), np.asarray(vocab_map.group)
        ordered = group[order]
        # A group's shortest member is a prefix of the others and comes first.
        _, first = np.unique(ordered[ordered >= 0], return_index=True)
        members = order[ordered >= 0][first]
        roots = sorted((teacher[int(i)] or b"", int(group[i])) for i in members)
        self._roots, self._groups = [r for r, _ in roots], [g for _, g in roots]
        self._known: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}

    def queries(self, index: ChunkIndex, student_ids: Tensor) -> CompletionQueries:
        """The queries of a batch whose index is on the CPU.

        Args:
            index: of the batch.
            student_ids: int64 `[B, Ts]`.

        Raises:
            XTokMapError: ids that do not fit the index, an index on another device.
        """
        check_shape("student_ids", student_ids, index.student_chunk)
        if index.student_chunk.device.type != "cpu":
            raise XTokMapError(f"queries are made on the CPU, before the index goes to {index.student_chunk.device}")
        kind = index.kind_of_student()
        root = (index.teacher_off == 0) & (kind != REWRITTEN) & (kind != STOP) & (kind != MARKER)
        # The token behind must be one of the text.
        root &= torch.nn.functional.pad(kind, (0, 1), value=-1)[:, 1:] >= 0
        flat = root.reshape(-1).nonzero()[:, 0]
        found = [self._of(int(a)) for a in student_ids.reshape(-1)[flat].tolist()]
        counts = np.asarray([len(group) for group, _ in found], dtype=np.int64)
        some = counts > 0
        at = index.teacher_rows(index.teacher_pos).reshape(-1)[flat].numpy()
        groups = [group for group, _ in found if len(group)]
        ranges = [r for _, r in found if len(r)]
        return CompletionQueries(
            position=flat.numpy()[some] + 1,
            teacher_row=at[some],
            indptr=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts[some])]),
            group=np.concatenate(groups) if groups else np.zeros(0, np.int64),
            student_range=np.concatenate(ranges) if ranges else np.zeros((0, 2), np.int64),
        )

    def _of(self, token: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        if token not in self._known:
            a = (self._student[token] or b"") if 0 <= token < len(self._student) else b""
            lo, hi = _begin_with(self._roots, a) if a else (0, 0)
            groups, ranges = [], []
            for root, group in zip(self._roots[lo:hi], self._groups[lo:hi], strict=True):
                start, stop = _begin_with(self._sorted, root[len(a) :]) if root != a else (0, 0)
                if stop > start:
                    groups.append(group)
                    ranges.append((start, stop))
            self._known[token] = np.asarray(groups, np.int64), np.asarray(ranges, np.int64).reshape(-1, 2)
        return self._known[token]


def _begin_with(ordered: list[bytes], prefix: bytes) -> tuple[int, int]:
    """Where in sorted byte strings those lie that begin with `prefix`."""
    lo = bisect_left(ordered, prefix)
    behind = prefix.rstrip(b"\xff")  # the first string that sorts behind them all
    return lo, bisect_left(ordered, behind[:-1] + bytes([behind[-1] + 1]), lo) if behind else len(ordered)


def completion(
    student: Logits,
    teacher: Logits,
    index: ChunkIndex,
    vocab_map: Any,
    queries: CompletionQueries,
    *,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    size: int | None = None,
    denominator: Tensor | float | None = None,
) -> Loss:
    """Asks the student to complete the teacher tokens that it has begun (ESCD, arXiv 2609.34738).

    Behind a sampled student token a, for every group g of teacher tokens without an equal student token whose
    shortest member y begins with a: -sum of M_g log sum of p(u | a) over the student tokens u that begin with what a
    leaves of y; M_g is the group's teacher mass where a starts. At least 0. It goes with the root of `byte_kl`.

    Args:
        student: `[B, Ts]` rows.
        teacher: `[B, Tt]` rows: logits, or hidden states with their head.
        index: of the same rows.
        vocab_map: `VocabTensors`, or what it can be made from.
        queries: of the same rows, from `Completions`.
        mask: as for `strict_kl`; of the tokens behind a.
        rows: as for `strict_kl`; best on the CPU.
        size: rows of a slice.
        denominator: as for `strict_kl`.

    Returns:
        The loss, its terms at the tokens behind a; figure `begun`, the mean teacher mass of the groups. It costs a head
        pass of either side for the scored rows, no more with a gradient.

    Raises:
        XTokMapError: shapes or vocabularies that do not fit; a `TopK` teacher.
    """
    check_teacher(teacher, (Logits,), "completion")
    maps = check_rows(vocab_map, student, teacher, index, mask)
    shape, device = index.student_chunk.shape, index.student_chunk.device
    position, teacher_row = (
        torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in (queries.position, queries.teacher_row)
    )
    none = torch.full((shape.numel(),), -1, dtype=torch.int64, device=device)
    at = none.index_copy(0, position, teacher_row).view(shape)
    scored = at >= 0
    if mask is not None:
        scored &= mask.bool()
    worked = wanted_rows(scored, rows)
    # Where the rows are known on the CPU they are asked there.
    host = worked if rows is None else rows
    entries = _Ragged(queries.position, queries.indptr, host, device, queries.group, queries.student_range)
    group = _padded(maps.group, teacher.vocab_size)
    group = torch.where(group >= 0, group, maps.num_groups)

    def fn(x: Tensor, z: Tensor, entries: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        row, groups, bounds = entries
        q = torch.softmax(z.to(x.dtype), -1)
        mass = q.new_zeros(len(q), maps.num_groups + 1).index_add_(1, group, q)[row, groups]
        p = _range_mass(torch.softmax(x, -1)[:, maps.student_order], row, bounds)
        log_p = p.clamp(min=1e-15).log().to(x.dtype)
        zero = x.new_zeros(len(x))
        # A rounded sum may be a little above 1.
        return zero.index_add(0, row, -mass * log_p.clamp(max=0)), zero.index_add(0, row, mass)

    loss, _ = summed_terms(
        graded(fn, student.needs_gradient),
        student,
        (teacher.at(at), entries),
        scored,
        index,
        mask,
        denominator,
        figures=("begun",),
        rows=worked,
        size=size,
    )
    return loss


# ---- helpers -----------------------------------------------------------------------------------------------------


class _Ragged:
    """Compressed rows of queries, by slices of the rows that are worked on; their bounds are known on the host."""

    def __init__(
        self,
        position: npt.NDArray[Any],
        indptr: npt.NDArray[Any],
        rows: Tensor | None,
        device: torch.device,
        *columns: npt.NDArray[Any],
    ) -> None:
        place, counts = np.asarray(position, np.int64), np.diff(indptr)
        entries = np.ones(int(indptr[-1]), dtype=np.bool_)
        if rows is not None:  # the places of their rows among those that are worked on
            worked = (rows if rows.device.type == "cpu" else rows.cpu()).numpy()
            order = np.argsort(worked, kind="stable")
            at = np.searchsorted(worked, place, sorter=order)
            place, wanted = order[np.minimum(at, len(order) - 1)] if len(order) else place * 0, at < len(order)
            wanted &= worked[place] == position if len(order) else False
            entries = np.repeat(wanted, counts)
            place, counts = place[wanted], counts[wanted]
        columns = tuple(np.asarray(c, np.int64)[entries] for c in columns)
        if len(place) and (np.diff(place) < 0).any():
            order = np.argsort(place, kind="stable")
            moved = np.argsort(np.repeat(np.argsort(order), counts), kind="stable")
            columns = tuple(c[moved] for c in columns)
            place, counts = place[order], counts[order]
        self._place = place
        self._start = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        self._row = torch.from_numpy(np.repeat(place, counts)).to(device)
        self._columns = [torch.from_numpy(c).to(device) for c in columns]

    def slice(self, a: int, b: int) -> tuple[Tensor, ...]:
        """The row of the slice and the columns of every entry."""
        first, last = (int(self._start[i]) for i in np.searchsorted(self._place, [a, b]))
        return self._row[first:last] - a, *(c[first:last] for c in self._columns)


def _range_mass(p: Tensor, row: Tensor, bounds: Tensor) -> Tensor:
    """Sums of p[row, lo:hi] for rows of `p` `[n, V]` and bounds `[k, 2]`: float64 `[k]`.

    In float64: it is a difference of two sums that may be near 1.
    """
    sums = p.cumsum(1, dtype=torch.float64)
    hi, lo = (torch.where(at > 0, sums[row, (at - 1).clamp(min=0)], 0) for at in (bounds[:, 1], bounds[:, 0]))
    return hi - lo


def _padded(ids: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(ids, (0, size - len(ids)), value=-1)


def _fitted(ranges: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(ranges, (0, 0, 0, size - len(ranges)))


def computed(x: LossInput) -> Computed:
    """The table's `byte_kl`."""
    mask = wanted(x.mask, x.index, x.settings)
    queries = there(x.interior, "interior")
    bridge = x.settings.stop_bridge if x.settings.score_stop else 0.0
    common: Any = {"beta": x.settings.beta, "stop_bridge": bridge, "mask": mask, "denominator": x.denominator}
    loss = byte_kl(
        x.student, whole_rows(x), x.index, there(x.maps, "maps"), queries, student_ids=x.student_ids, **common
    )
    x.came_by(loss)
    return sums_of(loss, "residual")

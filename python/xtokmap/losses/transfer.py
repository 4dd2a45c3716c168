"""The teacher's view of the student's own encoding, from rows that its pass over the finished text already has.

`transfer` evaluates `CoverQueries`: log q*(s_i | s_<i) of every sampled token. `TransferTarget` is the whole
distribution q*(u | s_<i) over the student's vocabulary, a slice of positions at a time. Both repair the bias that every
credit takes over from the boundaries of the teacher's encoding (tokenization bias, arXiv 2406.16829 and 2410.09303): a
boundary says what did not come next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.boundary.cover import CoverQueries
from xtokmap.boundary.vocab_map import VocabMap
from xtokmap.ids import Int64
from xtokmap.losses.terms import STOP, Loss, check_beta, divergence, reduce_terms
from xtokmap.torch.index import ChunkIndex
from xtokmap.torch.logits import _SLICE, Logits, TopK, _widened, map_rows


class Transferred(NamedTuple):
    """What `transfer` finds; flat, as the batch of the queries lies.

    Attributes:
        logprobs: float32 `[N]`; of the teacher's own tokens.
        transferred: float32 `[M]`; log q*(s_i | s_<i) of every student token, NaN where there is no query.
        phi: float64 `[M]`; log probability of the student's encoding up to each token, from the start of its row.
        before: float64 `[N + B]`; the sum of a row's teacher logprobs before each place.
        elements: float32 `[E]`; logprobs of the alternatives, in the order of `TransferTarget`.
        missing: float32 `[N + B]`; the mass of each row that top-k rows do not show; 0 for whole rows.
    """

    logprobs: Tensor
    transferred: Tensor
    phi: Tensor
    before: Tensor
    elements: Tensor
    missing: Tensor


class _Plan:
    """The queries as positions in the flat teacher rows: made on the CPU, so that the device is never asked.

    Row k of batch row b is flat row `teacher_cu[b] + b + k`: one more a row than there are tokens.
    """

    def __init__(self, q: CoverQueries) -> None:
        lengths, counts = np.diff(q.teacher_cu), np.diff(q.student_cu)
        self.rows = int(q.teacher_cu[-1]) + len(q)
        self.students = len(q.base)
        #: Flat row that predicts each teacher token.
        self.token_row = np.arange(int(q.teacher_cu[-1]), dtype=np.int64) + np.repeat(np.arange(len(q)), lengths)
        self.first_row = q.teacher_cu[:-1] + np.arange(len(q))
        self.row_of_batch = np.repeat(np.arange(len(q)), lengths + 1)
        first = np.repeat(self.first_row, counts)  # of every student token's batch row
        owner = np.repeat(np.arange(self.students, dtype=np.int64), np.diff(q.indptr))
        row = q.row + first[owner]
        # A row has at most one complement: that of the student token that ends where its teacher token starts.
        sets = q.sets
        kept = np.zeros(len(q.set), np.bool_)
        kept[q.set >= 0] = sets.complement[q.set[q.set >= 0]]
        # Terms by row, so that a slice of rows has its terms side by side.
        order = np.argsort(row, kind="stable")
        self.owner, self.row, self.set, self.kept = owner[order], row[order], q.set[order], kept[order]
        self.sets = sets
        #: Sum before `base` where a stretch begins; the token before it elsewhere.
        self.base = np.where(q.base >= 0, q.base + first, -1)
        self.known = q.base > -2
        #: Terms that are elements one by one, and their elements.
        self.sparse = np.flatnonzero(~self.kept)
        self.element_term, at = _expand(sets.indptr, self.set[self.sparse])
        one = self.set[self.sparse][self.element_term] < 0
        at = np.where(one, 0, at)
        self.element_id = np.where(
            one, -1 - self.set[self.sparse][self.element_term].astype(np.int64), _take(sets.ids, at)
        )
        self.element_next = np.where(one, -2, _take(sets.next, at))  # -2: the student token that really comes next
        self.element_whole = ~one & _take(sets.whole, at)
        self.element_row = self.row[self.sparse][self.element_term]

    def holes(self, terms: Int64) -> tuple[Int64, Int64]:
        """For complement terms: which term (counted in `terms`) leaves which teacher id out."""
        owner, at = _expand(self.sets.indptr, self.set[terms])
        return owner, _take(self.sets.ids, at).astype(np.int64)


def _take(values: npt.NDArray[Any], at: Int64) -> npt.NDArray[Any]:
    return values[at] if len(values) else np.zeros(len(at), values.dtype)


def _expand(indptr: Int64, sets: npt.NDArray[Any]) -> tuple[Int64, Int64]:
    """Owner and place of every element of some sets; a negative set has one, whose place means nothing."""
    known, one = np.append(indptr, indptr[-1]), sets < 0
    at = np.maximum(sets, 0)
    starts = np.where(one, 0, known[at])
    return _spread(starts, np.where(one, starts + 1, known[at + 1]))


def _spread(starts: Int64, stops: Int64) -> tuple[Int64, Int64]:
    """Owner and place of every element of the ranges `[starts, stops)`."""
    lengths = stops - starts
    owner = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    return owner, np.arange(len(owner)) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)


def _on(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def plan(queries: CoverQueries) -> _Plan:
    """Where the queries' terms lie; kept as long as the queries are."""
    made = _PLANS.get(queries)
    if made is None:
        made = _PLANS[queries] = _Plan(queries)
    return made


_PLANS: WeakKeyDictionary[CoverQueries, _Plan] = WeakKeyDictionary()


@torch.no_grad()
def transfer(
    teacher: Logits | TopK, teacher_ids: Tensor, queries: CoverQueries, *, size: int | None = None
) -> Transferred:
    """Evaluates cover queries beside the teacher's output head, a slice of rows at a time: never `[T, V]`.

    log q*(s_i | s_<i) = Phi(i) - Phi(i - 1), Phi(i) = logsumexp over the terms of token i of (the teacher's logprobs
    before the term's row) + log (mass of the term's set in that row). Masses are sums of positive parts, whatever is
    left out is left out before the sum, and logits of any float dtype are taken in float32: nothing cancels.

    Args:
        teacher: flat rows `[N + B]`: for each batch row those that predict its n tokens and the one after the last.
        teacher_ids: int64 `[N]`, flat.
        queries: of the same batch, from `Aligner.cover_queries`.
        size: rows of a slice; None takes 64 MiB of float32.

    Raises:
        XTokMapError: another number of rows or ids.
    """
    p = plan(queries)
    if tuple(teacher.shape) != (p.rows,) or tuple(teacher_ids.shape) != (len(p.token_row),):
        raise XTokMapError(
            f"teacher rows {tuple(teacher.shape)} and ids {tuple(teacher_ids.shape)}; these queries need ({p.rows},) "
            f"rows (one more than tokens for each of {len(queries)} completions) and ({len(p.token_row)},) ids"
        )
    device = teacher_ids.device

    on = partial(_on, device=device)
    size = size or max(1, _SLICE // (teacher.vocab_size if isinstance(teacher, Logits) else 4096))
    dtype = _widened((teacher.rows if isinstance(teacher, Logits) else teacher.logprobs)[:0]).dtype
    logprobs, elements, kept, missing = (
        torch.zeros(n, device=device, dtype=dtype) for n in (len(p.token_row), len(p.element_id), p.rows, p.rows)
    )
    kept_terms = np.flatnonzero(p.kept)
    for a in range(0, p.rows, size):
        b = min(p.rows, a + size)
        rows = _Rows(teacher, a, b)
        missing[a:b] = rows.missing
        t0, t1 = np.searchsorted(p.token_row, (a, b))
        logprobs[t0:t1] = rows.logprobs(on(p.token_row[t0:t1] - a), teacher_ids[t0:t1])
        e0, e1 = np.searchsorted(p.element_row, (a, b))
        elements[e0:e1] = rows.logprobs(on(p.element_row[e0:e1] - a), on(p.element_id[e0:e1]))
        k0, k1 = np.searchsorted(p.row[kept_terms], (a, b))
        terms = kept_terms[k0:k1]
        owner, ids = p.holes(terms)
        at = on(p.row[terms] - a)
        kept[on(p.row[terms])] = rows.mass_without(on(p.row[terms][owner] - a), on(ids))[at]

    # Terms: those that are one row but some tokens, and those that are elements.
    values = torch.zeros(len(p.row), device=device, dtype=dtype)
    values[on(kept_terms)] = kept[on(p.row[kept_terms])]
    values[on(p.sparse)] = _logsumexp(elements, on(p.element_term), len(p.sparse))
    return _joined(p, logprobs, values, elements, missing)


@torch.no_grad()
def transfer_masses(logprobs: Tensor, masses: Tensor, queries: CoverQueries) -> Transferred:
    """As `transfer`, from what somebody else has found in the rows: then there are no elements.

    Args:
        logprobs: float `[N]`, flat; of the teacher's own tokens.
        masses: float `[K]`; the log of the mass of every term, in the order of `plan`.
        queries: of the same batch.
    """
    p = plan(queries)
    if tuple(logprobs.shape) != (len(p.token_row),) or tuple(masses.shape) != (len(p.row),):
        raise XTokMapError(
            f"{tuple(logprobs.shape)} logprobs and {tuple(masses.shape)} masses; these queries have "
            f"{len(p.token_row)} teacher tokens and {len(p.row)} terms"
        )
    return _joined(p, logprobs, masses, logprobs.new_zeros(0), logprobs.new_zeros(p.rows))


def _joined(p: _Plan, logprobs: Tensor, values: Tensor, elements: Tensor, missing: Tensor) -> Transferred:
    """What follows from the masses of the terms."""
    on = partial(_on, device=logprobs.device)
    before = _sums_before(logprobs, p, on)
    phi = _logsumexp(before[on(p.row)] + values, on(p.owner), p.students)
    previous = torch.cat([phi.new_zeros(1), phi[:-1]])
    base = on(p.base)
    previous = torch.where(base >= 0, before[base.clamp(min=0)], previous) if p.rows else previous
    transferred = torch.where(on(p.known), phi - previous, torch.nan).to(logprobs.dtype)
    return Transferred(logprobs, transferred, phi, before, elements, missing)


@torch.no_grad()
def boundary_leak(teacher: Logits, teacher_ids: Tensor, vocab_map: VocabMap, *, size: int | None = None) -> Tensor:
    """What a teacher token's end says about what comes next: log pi(t) - log q(t), in nats, of every token.

    pi(t) is the mass of all teacher tokens that begin with the bytes of t. A credit that takes log q(t) for the
    teacher's opinion of the text is off by this much where nothing else has ended there. (The sum that byte-level
    sampling from tokens makes, arXiv 2410.09303.)

    Args:
        teacher: flat rows `[N]`, each the one that predicts its token.
        teacher_ids: int64 `[N]`.
        vocab_map: of the pair.
        size: rows of a slice; None takes 64 MiB of float32.

    Returns:
        float32 `[N]`, at least 0; 0 for tokens without bytes.
    """
    device = teacher_ids.device
    order = torch.from_numpy(vocab_map.teacher_order.astype(np.int64)).to(device)
    ranges = vocab_map.teacher_range[teacher_ids.cpu().numpy()].astype(np.int64)
    size = size or max(1, _SLICE // teacher.vocab_size)
    parts = [torch.zeros(0, device=device)]
    for a in range(0, len(ranges), size):
        rows = _Rows(teacher, a, min(len(ranges), a + size))
        ids = teacher_ids[a : a + size]
        owner, at = _spread(*ranges[a : a + size].T)
        own = _on(owner, device)
        masses = rows.logprobs(own, order[_on(at, device)])
        token = rows.logprobs(torch.arange(len(ids), device=device), ids)
        pi = _logsumexp(masses, own, len(ids))
        parts.append(torch.where(torch.isfinite(pi), pi - token, 0).float())
    return torch.cat(parts)


def _sums_before(logprobs: Tensor, p: _Plan, on: Any) -> Tensor:
    """float64 `[N + B]`: sums of a row's logprobs before each place. Long rows add up to thousands of nats."""
    steps = torch.zeros(p.rows + 1, dtype=torch.float64, device=logprobs.device)
    steps[on(p.token_row + 1)] = logprobs.double()
    total = steps.cumsum(0)[:-1]
    # The step into a batch row's first place is the last token of the row before.
    return total - total[on(p.first_row)][on(p.row_of_batch)] if p.rows else total


def _logsumexp(values: Tensor, owner: Tensor, n: int) -> Tensor:
    """Of the values of every owner: `[n]`, -inf where there are none."""
    top = values.new_full((n,), -torch.inf).scatter_reduce(0, owner, values, "amax")
    shift = torch.where(torch.isfinite(top), top, 0)
    return values.new_zeros(n).index_add(0, owner, torch.exp(values - shift[owner])).log() + shift


class _Rows:
    """A slice of teacher rows: whole, or as far as a served teacher's top-k shows them."""

    def __init__(self, teacher: Logits | TopK, a: int, b: int) -> None:
        if isinstance(teacher, Logits):
            x = teacher.slice(a, b)
            self._top = x.amax(-1, keepdim=True)
            self._x = x
            self._exp = torch.exp(x - self._top)
            self._lse = self._exp.sum(-1).log() + self._top[:, 0]
            self.missing: Tensor | float = 0.0
            self._ids = None
        else:
            ids, logprobs = teacher.slice(a, b)
            self._ids, order = ids.sort(-1)  # padding, -1, comes first
            self._x = torch.where(self._ids < 0, -torch.inf, logprobs.gather(1, order))
            self.missing = (1 - self._x.exp().sum(-1)).clamp(min=0)

    def logprobs(self, row: Tensor, ids: Tensor) -> Tensor:
        if self._ids is None:
            return self._x[row, ids] - self._lse[row]
        at = self._places(row, ids)
        return torch.where(self._ids[row, at] == ids, self._x[row, at], -torch.inf)

    def _places(self, row: Tensor, ids: Tensor) -> Tensor:
        assert self._ids is not None
        # One search for all rows: ids of row r are moved by r vocabularies.
        stride = 2**32
        keys = (self._ids + 1 + torch.arange(len(self._ids), device=row.device)[:, None] * stride).reshape(-1)
        found = torch.searchsorted(keys, ids + 1 + row * stride) - row * self._ids.shape[1]
        return found.clamp(0, self._ids.shape[1] - 1)

    def mass_without(self, row: Tensor, ids: Tensor) -> Tensor:
        """log of every row's mass without some tokens. To be asked last: it clears them."""
        if self._ids is None:
            self._exp[row, ids] = 0
            return self._exp.sum(-1).clamp(min=1e-38).log() + self._top[:, 0] - self._lse
        at = self._places(row, ids)
        hit = self._ids[row, at] == ids
        left_out = torch.zeros_like(self._x).index_put((row, at), hit.to(self._x.dtype), accumulate=True)
        # What is missing may be anything: it counts as kept.
        shown = torch.where(left_out > 0, -torch.inf, self._x).exp().sum(-1)
        return (shown + self.missing).clamp(min=1e-38).log()


@dataclass(frozen=True, eq=False)
class TransferTarget:
    """q*(u | s_<i) over the student's vocabulary at every position with a query, worked out a slice at a time.

    At a boundary between two teacher tokens the row of the next one gives the mass of each token to the student token
    with which the encoding of its bytes begins, but for tokens that would have merged with the student token before; a
    teacher token that could have reached past the boundary gives its mass to what would be left of it. Divided by exp
    Phi(i - 1) that adds up to 1, with `rest` for what belongs to no one student token.
    """

    teacher: Logits
    values: Transferred
    queries: CoverQueries
    #: On the CPU: the positions (flat student tokens), dense row and its complement term of each (-1: none), and the
    #: alternatives of each, as compressed rows of elements.
    _at: Int64
    _dense: tuple[Int64, Int64]
    _elements: tuple[Int64, Int64]
    #: Teacher id -> student id (V_S: rest), and whether its mass is open, `[V_T]`; on the device.
    _to_student: Tensor
    _open: Tensor
    #: log probability of everything before each position, float64 `[P]`.
    _before: Tensor
    #: The event of every student token, and how many tokens each's has, `[V_S]`.
    _event: Tensor
    _members: Tensor
    #: Batch rows of a selection, and which positions those are.
    _rows: tuple[int, ...] | None = None
    _chosen: Int64 | None = None

    @classmethod
    def of(cls, teacher: Logits, values: Transferred, queries: CoverQueries) -> TransferTarget:
        """The target of rows that `transfer` has been through.

        Raises:
            XTokMapError: top-k rows, which do not show the whole distribution.
        """
        if not isinstance(teacher, Logits):
            raise XTokMapError(
                "the whole q* needs whole teacher rows (logits, or hidden states and head), not top-k; take the "
                "credit 'cover'"
            )
        p = plan(queries)
        device = values.logprobs.device
        at = np.flatnonzero(p.known)
        # What stands behind a position are the terms of the token before it; where a stretch begins, a whole row.
        inside = p.base[at] < 0
        context = at[inside] - 1
        kept = np.flatnonzero(p.kept)
        term_of = np.full(p.students, -1, np.int64)
        term_of[p.owner[kept]] = kept
        term, row = np.full(len(at), -1, np.int64), p.base[at].copy()
        term[inside] = term_of[context]
        row[term >= 0] = p.row[term[term >= 0]]
        position = np.full(p.students, -1, np.int64)
        position[context] = np.flatnonzero(inside)
        owner = position[p.owner[p.sparse][p.element_term]]
        order = np.argsort(owner, kind="stable")
        order = order[np.searchsorted(owner[order], 0) :]
        ptr = np.searchsorted(owner[order], np.arange(len(at) + 1))
        before = values.before.new_zeros(len(at))
        before[torch.from_numpy(np.flatnonzero(inside)).to(device)] = values.phi[torch.from_numpy(context).to(device)]
        start = torch.from_numpy(np.flatnonzero(~inside)).to(device)
        before[start] = values.before[torch.from_numpy(p.base[at][~inside]).to(device)]
        to_student, opened = _dense_map(queries)
        events = _events(queries)
        return cls(
            teacher,
            values,
            queries,
            at,
            (row, term),
            (ptr, order),
            torch.from_numpy(to_student).to(device),
            torch.from_numpy(opened).to(device),
            before,
            torch.from_numpy(events).to(device),
            torch.from_numpy(np.bincount(events, minlength=len(events))[events]).to(device),
        )

    def __len__(self) -> int:
        return len(self._at if self._chosen is None else self._chosen)

    def select(self, rows: Sequence[int]) -> TransferTarget:
        """The target of some rows of the batch, in this order, for a micro-batch."""
        bounds = np.searchsorted(self._at, self.queries.student_cu)
        chosen = [np.arange(bounds[b], bounds[b + 1]) for b in rows]
        return replace(self, _rows=tuple(rows), _chosen=np.concatenate([np.zeros(0, np.int64), *chosen]))

    def places(self) -> tuple[Int64, tuple[int, int]]:
        """Where the positions lie in `[B, Ts]`: flat, and (B, Ts); a selection in its rows, as wide as the batch."""
        places, (rows, width) = self.queries.places()
        if self._rows is None or self._chosen is None:
            return places[self._at], (rows, width)
        moved = np.full(rows, 0, np.int64)
        moved[list(self._rows)] = np.arange(len(self._rows))
        row, column = np.divmod(places[self._at[self._chosen]], max(width, 1))
        return moved[row] * width + column, (len(self._rows), width)

    def slice(self, a: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """Positions a to b: target `[b-a, V_S]`, rest `[b-a]`, and undetermined mass `[b-a]` (a part of both).

        Undetermined: on student tokens of which a longer one exists that the teacher would cut after them, and, inside
        a teacher token, in `rest`.
        """
        p, values, device = plan(self.queries), self.values, self._before.device

        on = partial(_on, device=device)
        which = np.arange(a, b) if self._chosen is None else self._chosen[a:b]
        size = len(self.queries.vocab_map.student_to_teacher)
        dtype = values.logprobs.dtype
        target = torch.zeros(b - a, size + 1, device=device, dtype=dtype)
        undetermined = torch.zeros(b - a, device=device, dtype=dtype)
        before = self._before[on(which)]
        row, term = self._dense[0][which], self._dense[1][which]
        dense = np.flatnonzero(row >= 0)
        if len(dense):
            rows, at = on(row[dense]), on(dense)
            mass = torch.softmax(self.teacher.at(rows).slice(0, len(dense)), -1)
            with_holes = np.flatnonzero(term[dense] >= 0)
            owner, ids = p.holes(term[dense][with_holes])
            mass[on(with_holes[owner]), on(ids)] = 0
            mass *= torch.exp(values.before[rows] - before[at]).to(dtype)[:, None]
            undetermined[at] = mass @ self._open.to(dtype)
            into = torch.zeros(len(dense), size + 1, device=device, dtype=dtype)
            target[at] = into.scatter_add_(1, self._to_student.expand(len(dense), -1), mass)
        owner, place = _expand(self._elements[0], which)
        element, at = _take(self._elements[1], place), on(owner)
        rows = on(p.element_row[element])
        mass = torch.exp(values.before[rows] - before[at] + values.elements[on(element)]).to(dtype)
        following = p.element_next[element].astype(np.int64)
        real = self.queries.student_ids[self._at[which[owner]]].astype(np.int64)
        following = np.where(following == -2, real, np.where(following < 0, size, following))
        target.index_put_((at, on(following)), mass, accumulate=True)
        # A token that ends at the boundary: its mass is known, what comes next is not.
        opened = p.element_whole[element] & np.append(self.queries.vocab_map.open, False)[following] | (
            following == size
        )
        undetermined.index_add_(0, at, mass * on(opened))
        return target[:, :size], target[:, size], undetermined


def _dense_map(queries: CoverQueries) -> tuple[Int64, npt.NDArray[np.bool_]]:
    """Student id for every teacher id (V_S where there is none), and whether its mass may belong to a longer token."""
    vm = queries.vocab_map
    size = len(vm.student_to_teacher)
    if queries.identical:
        same = np.minimum(np.arange(len(vm.canonical), dtype=np.int64), size)
        return same, np.zeros(len(same), np.bool_)
    to_student = np.where(vm.canonical >= 0, vm.canonical, size).astype(np.int64)
    opened = (vm.teacher_to_student == vm.canonical) & np.append(vm.open, False)[to_student]
    if vm.student_stops:
        to_student[list(vm.teacher_stops)] = vm.student_stops[0]
    return to_student, opened


def _events(queries: CoverQueries) -> Int64:
    """The event of every student token: a token stands for itself and for those that the teacher would begin with it.

    The teacher's mass on such a beginning may go on to any of them, so that it is known of them together.
    """
    vm = queries.vocab_map
    events = np.arange(len(vm.student_to_teacher), dtype=np.int64)
    if queries.identical:
        return events
    first = np.append(vm.canonical, -1)[vm.teacher_first]
    split = (vm.student_to_teacher < 0) & (first >= 0)
    events[split] = first[split]
    if vm.student_stops:
        events[list(vm.student_stops)] = vm.student_stops[0]
    while (events[events] != events).any():  # each is shorter than what it stands for
        events = events[events]
    return events


def transfer_kl(
    student: Logits,
    target: TransferTarget,
    index: ChunkIndex,
    *,
    student_ids: Tensor | None = None,
    transferred: Tensor | None = None,
    beta: float = 1.0,
    clamp: float = 10.0,
    stops: bool = True,
    floor: float = 1e-2,
    mask: Tensor | None = None,
    size: int | None = None,
    denominator: Tensor | float | None = None,
) -> Loss:
    """Divergence between the student and the teacher as the student's vocabulary sees it (xtokmap's own).

    The target is q*(u | s_<i), see `TransferTarget`. Mass on a token that the teacher may go on from to a longer
    student token is known of the two together, so the divergence is over such events e; and over the rest, the student
    tokens that get no mass. Which token of the event it is, is learned from the sampled one: its term is

        D(p(e) || q*(e)) - A log p(s_i),   A = log q*(s_i | e) - log p(s_i | e), clipped,

    whose expected gradient for beta = 1 is that of KL(p || q*), by the chain rule of the divergence. Events of one
    token have A = 0: with one tokenizer on both sides it is the exact per-token KL.

    Args:
        student: `[B, Ts]` rows.
        target: of the same batch.
        index: of the same batch.
        student_ids: int64 `[B, Ts]`; the sampled tokens, needed with `transferred`.
        transferred: `[B, Ts]`, from `LocalTeacher.score` or `transfer`; None leaves the second part out.
        beta: 1 is KL(p || q*), 0 is KL(q* || p), between them the generalized Jensen-Shannon divergence.
        clamp: largest absolute A.
        stops: whether the end of a turn counts; False leaves its mass out on both sides.
        floor: least probability of the rest, so that mass which the student has where the teacher has none costs no
            more than -log floor nats.
        mask: bool or 0/1 `[B, Ts]`; the response tokens.
        size: rows of a slice; None takes 64 MiB of float32 for the larger vocabulary.
        denominator: what to divide by instead of the number of scored tokens, so that micro-batches add up.

    Returns:
        The loss; figures `undetermined` (mass known of several tokens together), `rest` (mass known of none), `shared`
        (share of the scored tokens whose event has several). It costs a head pass (two with a gradient) of either side
        beside that of `transfer`.

    Raises:
        XTokMapError: shapes that do not fit, beta outside [0, 1].
    """
    check_beta(beta)
    places, shape = target.places()
    if tuple(student.shape) != shape or tuple(index.student_chunk.shape) != shape:
        raise XTokMapError(
            f"student rows {tuple(student.shape)} and index {tuple(index.student_chunk.shape)}; the queries: {shape}"
        )
    if transferred is not None and student_ids is None:
        raise XTokMapError("transferred= needs student_ids=, the tokens that it is of")
    device = student.rows.device
    ids = torch.zeros(shape, dtype=torch.long, device=device) if student_ids is None else student_ids
    sampled = torch.full(shape, torch.nan, device=device) if transferred is None else transferred.detach().float()
    stop_ids = [] if stops else list(target.queries.vocab_map.student_stops)
    event, members = target._event, target._members

    def on_slice(x: Tensor, part: tuple[Tensor, Tensor, Tensor], ids: Tensor, sampled: Tensor) -> tuple[Tensor, ...]:
        q, rest, undetermined = (t.to(x) for t in part)
        if stop_ids:
            stop = torch.tensor(stop_ids, device=x.device)
            left = (1 - q[:, stop].sum(-1)).clamp(min=floor)
            q, rest = q.index_fill(1, stop, 0) / left[:, None], rest / left
            sampled = sampled - left.log()
            x = x.index_fill(1, stop, -torch.inf)
        log_p = x.log_softmax(-1)
        into = event.expand(len(x), -1)
        p = torch.zeros_like(log_p).scatter_add(1, into, log_p.exp())
        q = torch.zeros_like(log_p).scatter_add(1, into, q)
        there = q > 0
        p_rest = torch.where(there, 0, p).sum(-1, keepdim=True)
        # What the student cannot say at all is no bin: it would make a forward KL infinite, and has no gradient.
        q_rest = torch.where(p_rest > 0, rest.clamp(min=floor)[:, None], 0)
        p_bins, q_bins = _log(torch.cat([torch.where(there, p, 0), p_rest], 1)), _log(torch.cat([q, q_rest], 1))
        value = divergence(p_bins, q_bins, beta)
        own = ids[:, None]
        bin_of = torch.where(there.gather(1, event[own]), event[own], q.shape[1])
        several = (members[ids] > 1) | (bin_of[:, 0] == q.shape[1])
        chosen = log_p.gather(1, own)[:, 0]
        a = (sampled - q_bins.gather(1, bin_of)[:, 0]) - (chosen - p_bins.gather(1, bin_of)[:, 0])
        a = torch.where(several & torch.isfinite(sampled), a, 0).detach().clamp(-clamp, clamp)
        value = value - torch.where(a != 0, a * torch.where(a != 0, chosen, 0), 0)
        return value, undetermined, rest, several.to(x.dtype)

    scored = torch.zeros(shape, dtype=torch.bool, device=device)
    rows = torch.from_numpy(places).to(device)
    scored.view(-1)[rows] = True
    if not stops:
        scored &= index.kind_of_student() != STOP
    size = size or max(1, _SLICE // max(student.vocab_size, target.teacher.vocab_size))
    terms, undetermined, rest, several = map_rows(on_slice, student, target, ids, sampled, size=size, rows=rows)
    return reduce_terms(terms, scored, index, mask, denominator, undetermined=undetermined, rest=rest, shared=several)


def _log(x: Tensor) -> Tensor:
    """log x, -inf at 0 without a NaN in the gradient."""
    return torch.where(x > 0, torch.where(x > 0, x, 1).log(), -torch.inf)

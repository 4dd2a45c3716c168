"""`transfer`: log q*(s_i | s_<i) of every sampled token, from rows that the teacher's pass over the text already has.

This is `CoverQueries` evaluated. It repairs the bias that every credit takes over from the boundaries of the teacher's
encoding (tokenization bias, arXiv 2406.16829 and 2410.09303): a boundary says what did not come next.
"""

from __future__ import annotations

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
from xtokmap.torch.logits import _SLICE, Logits, TopK, _widened, blocks, softmax_and_sums

_NONE = np.zeros(0, np.int64)


class Transferred(NamedTuple):
    """What `transfer` finds; flat, as the batch of the queries lies.

    Attributes:
        logprobs: float32 `[N]`; of the teacher's own tokens.
        transferred: float32 `[M]`; log q*(s_i | s_<i) of every student token, NaN where there is no query.
        phi: float64 `[M]`; log probability of the student's encoding up to each token, from the start of its row.
        before: float64 `[N + B]`; the sum of a row's teacher logprobs before each place.
        elements: float32 `[E]`; logprobs of the alternatives, in the order of the plan's parts.
        missing: float32 `[N + B]`; the mass of each row that top-k rows do not show; 0 for whole rows.
    """

    logprobs: Tensor
    transferred: Tensor
    phi: Tensor
    before: Tensor
    elements: Tensor
    missing: Tensor


class Plan:
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
        self.element_term, at = expand(sets.indptr, self.set[self.sparse])
        one = self.set[self.sparse][self.element_term] < 0
        at = np.where(one, 0, at)
        self.element_id = np.where(
            one, -1 - self.set[self.sparse][self.element_term].astype(np.int64), take(sets.ids, at)
        )
        self.element_next = np.where(one, -2, take(sets.next, at))  # -2: the student token that really comes next
        self.element_whole = ~one & take(sets.whole, at)
        self.element_row = self.row[self.sparse][self.element_term]
        #: Complements of which one student token comes next, and those whose tokens say what comes next.
        fixed = np.where(self.kept, take(sets.fixed, np.maximum(self.set, 0)), -2)
        self.fixed = np.flatnonzero(fixed > -2)
        self.mapped = np.flatnonzero(self.kept & (fixed == -2))
        #: Parts: the elements, and behind them each such complement as one.
        self.part_owner = self.owner[np.concatenate([self.sparse[self.element_term], self.fixed])]
        self.part_row = np.concatenate([self.element_row, self.row[self.fixed]])
        self.part_next = np.concatenate([self.element_next, fixed[self.fixed]])
        self.part_whole = np.concatenate([self.element_whole, np.zeros(len(self.fixed), np.bool_)])

    def holes(self, terms: Int64) -> tuple[Int64, Int64]:
        """For complement terms: which term (counted in `terms`) leaves which teacher id out."""
        owner, at = expand(self.sets.indptr, self.set[terms])
        return owner, take(self.sets.ids, at).astype(np.int64)


def take(values: npt.NDArray[Any], at: Int64) -> npt.NDArray[Any]:
    """Some values; zeros of nothing."""
    return values[at] if len(values) else np.zeros(len(at), values.dtype)


def expand(indptr: Int64, sets: npt.NDArray[Any]) -> tuple[Int64, Int64]:
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


def on_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """An array as a tensor, without waiting for it."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def plan(queries: CoverQueries) -> Plan:
    """Where the queries' terms lie; kept as long as the queries are."""
    made = _PLANS.get(queries)
    if made is None:
        made = _PLANS[queries] = Plan(queries)
    return made


_PLANS: WeakKeyDictionary[CoverQueries, Plan] = WeakKeyDictionary()


@torch.no_grad()
def transfer(
    teacher: Logits | TopK, teacher_ids: Tensor, queries: CoverQueries, *, size: int | None = None
) -> Transferred:
    """Evaluates cover queries beside the teacher's output head, a slice of rows at a time: never `[T, V]`.

    log q*(s_i | s_<i) = Phi(i) - Phi(i - 1), Phi(i) = logsumexp over the terms of token i of (the teacher's logprobs
    before the term's row) + log (mass of the term's set in that row). Logits of any float dtype are taken in float32;
    a row without some tokens is a difference of two sums of the same float32 numbers in float64, right to 1e-12.

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

    on = partial(on_device, device=device)
    size = size or max(1, _SLICE // (teacher.vocab_size if isinstance(teacher, Logits) else 4096))
    dtype = _widened((teacher.rows if isinstance(teacher, Logits) else teacher.logprobs)[:0]).dtype
    kept_terms = np.flatnonzero(p.kept)
    logprobs, elements, kept, missing = (
        torch.zeros(n, device=device, dtype=dtype)
        for n in (len(p.token_row), len(p.element_id), len(kept_terms), p.rows)
    )
    for a in range(0, p.rows, size):
        b = min(p.rows, a + size)
        k0, k1 = np.searchsorted(p.row[kept_terms], (a, b))
        terms = kept_terms[k0:k1]
        rows = _Rows(teacher, a, b, p.row[terms] - a, *p.holes(terms))
        missing[a:b] = rows.missing
        t0, t1 = np.searchsorted(p.token_row, (a, b))
        logprobs[t0:t1] = rows.logprobs(on(p.token_row[t0:t1] - a), teacher_ids[t0:t1])
        e0, e1 = np.searchsorted(p.element_row, (a, b))
        elements[e0:e1] = rows.logprobs(on(p.element_row[e0:e1] - a), on(p.element_id[e0:e1]))
        kept[k0:k1] = rows.kept

    # Terms: those that are one row but some tokens, and those that are elements.
    values = torch.zeros(len(p.row), device=device, dtype=dtype)
    values[on(kept_terms)] = kept
    values[on(p.sparse)] = _logsumexp(elements, on(p.element_term), len(p.sparse))
    return _joined(p, logprobs, values, torch.cat([elements, values[on(p.fixed)]]), missing)


@torch.no_grad()
def transfer_masses(logprobs: Tensor, masses: Tensor, queries: CoverQueries) -> Transferred:
    """As `transfer`, from what somebody else has found in the rows: then there are no elements.

    Args:
        logprobs: float `[N]`, flat; of the teacher's own tokens.
        masses: float `[K]`; the log of the mass of every term, in the order of `plan`.
        queries: of the same batch.

    Raises:
        XTokMapError: another number of logprobs or masses.
    """
    p = plan(queries)
    if tuple(logprobs.shape) != (len(p.token_row),) or tuple(masses.shape) != (len(p.row),):
        raise XTokMapError(
            f"{tuple(logprobs.shape)} logprobs and {tuple(masses.shape)} masses; these queries have "
            f"{len(p.token_row)} teacher tokens and {len(p.row)} terms"
        )
    return _joined(p, logprobs, masses, logprobs.new_zeros(0), logprobs.new_zeros(p.rows))


def _joined(p: Plan, logprobs: Tensor, values: Tensor, elements: Tensor, missing: Tensor) -> Transferred:
    """What follows from the masses of the terms."""
    on = partial(on_device, device=logprobs.device)
    before = _sums_before(logprobs, p, on)
    phi = _logsumexp(before[on(p.row)] + values, on(p.owner), p.students)
    previous = torch.cat([phi.new_zeros(1), phi[:-1]])
    base = on(p.base)
    previous = torch.where(base >= 0, before[base.clamp(min=0)], previous) if p.rows else previous
    transferred = torch.where(on(p.known), phi - previous, torch.nan).to(logprobs.dtype)
    return Transferred(logprobs, transferred, phi, before, elements, missing)


@torch.no_grad()
def boundary_leak(teacher: Logits, teacher_ids: Tensor, vocab_map: VocabMap) -> Tensor:
    """What a teacher token's end says about what comes next: log pi(t) - log q(t), in nats, of every token.

    pi(t) is the mass of all teacher tokens that begin with the bytes of t. A credit that takes log q(t) for the
    teacher's opinion of the text is off by this much where nothing else has ended there. (The sum that byte-level
    sampling from tokens makes, arXiv 2410.09303.) For some tokens of a text: only the logits of those that begin with
    each are made.

    Args:
        teacher: flat rows `[N]`, each the one that predicts its token.
        teacher_ids: int64 `[N]`.
        vocab_map: of the pair.

    Returns:
        float32 `[N]`, at least 0; 0 for tokens without bytes.
    """
    order = vocab_map.teacher_order.astype(np.int64)
    leaks = torch.zeros(len(teacher_ids), device=teacher_ids.device)
    for i, token in enumerate(teacher_ids.tolist()):
        a, b = vocab_map.teacher_range[token]
        if a < b:
            # Its own logit comes last.
            x = teacher.some(i, on_device(np.append(order[a:b], token), teacher_ids.device))
            leaks[i] = x[:-1].logsumexp(-1) - x[-1]
    return leaks.clamp(min=0)


def _sums_before(logprobs: Tensor, p: Plan, on: Any) -> Tensor:
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
    """A slice of teacher rows: whole, or as far as a served teacher's top-k shows them.

    Args:
        teacher: the rows.
        a: the first.
        b: behind the last.
        row: of every mass that is wanted, its row counted from a, rising.
        owner: of every token that is left out of such a mass, which of them it is, rising.
        ids: the tokens.

    Attributes:
        missing: the mass of each row that is not shown.
        kept: log of the mass of each of `row` without its tokens.
    """

    def __init__(
        self, teacher: Logits | TopK, a: int, b: int, row: Int64 = _NONE, owner: Int64 = _NONE, ids: Int64 = _NONE
    ) -> None:
        self.missing: Tensor | float = 0.0
        self._ids = None
        if isinstance(teacher, TopK):
            shown, logprobs = teacher.slice(a, b)
            self._ids, order = shown.sort(-1)  # padding, -1, comes first
            self._x = torch.where(self._ids < 0, -torch.inf, logprobs.gather(1, order))
            # What is missing may be anything: it counts as kept.
            mass = self._x.double().exp().sum(-1)
            self.missing = (1 - mass).clamp(min=0).to(self._x.dtype)
            on = partial(on_device, device=shown.device)
            at, tokens = on(row[owner]), on(ids)
            place = self._places(at, tokens)
            left_out = torch.where(self._ids[at, place] == tokens, self._x[at, place].double().exp(), 0)
            kept = (mass + self.missing)[on(row)].index_add(0, on(owner), left_out, alpha=-1)
            self.kept = kept.clamp(min=1e-38).log().to(self._x.dtype)
            return
        self._logits = teacher.made(a, b)
        device = self._logits.logits.device
        of, at, tokens, owners = (on_device(x, device) for x in (row, row[owner], ids, owner))
        sums, masses = [], []
        for c, d in blocks(b - a, teacher.vocab_size, device):
            p, log_sum = softmax_and_sums(self._logits.slice(c, d))
            sums.append(log_sum)
            first, last = np.searchsorted(row, (c, d))
            if first < last:
                lo, hi = np.searchsorted(owner, (first, last))
                # The same float32 numbers are added up and taken away, so that little cancels.
                whole = p.sum(-1, dtype=torch.float64)[of[first:last] - c]
                left_out = p[at[lo:hi] - c, tokens[lo:hi]].double()
                masses.append(whole.index_add(0, owners[lo:hi] - first, left_out, alpha=-1))
        self._lse = torch.cat(sums)
        kept = torch.cat([self._lse.new_zeros(0, dtype=torch.float64), *masses])
        self.kept = kept.clamp(min=1e-38).log().to(self._lse.dtype)

    def logprobs(self, row: Tensor, ids: Tensor) -> Tensor:
        if self._ids is None:
            return self._logits.at(row, ids) - self._lse[row]
        at = self._places(row, ids)
        return torch.where(self._ids[row, at] == ids, self._x[row, at], -torch.inf)

    def _places(self, row: Tensor, ids: Tensor) -> Tensor:
        assert self._ids is not None
        # One search for all rows: ids of row r are moved by r vocabularies.
        stride = 2**32
        keys = (self._ids + 1 + torch.arange(len(self._ids), device=row.device)[:, None] * stride).reshape(-1)
        found = torch.searchsorted(keys, ids + 1 + row * stride) - row * self._ids.shape[1]
        return found.clamp(0, self._ids.shape[1] - 1)

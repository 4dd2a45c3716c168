"""Plan: cover queries as positions in the flat teacher rows, what is asked there, and what is found."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xtokmap.boundary.cover import CoverQueries
from xtokmap.boundary.vocab_map import once
from xtokmap.ids import Int64


class Asked(NamedTuple):
    """What is asked of flat teacher rows; rows rise.

    Attributes:
        row: int64 `[E]`; of every logprob its row.
        id: int64 `[E]`; and its teacher token.
        mass_row: int64 `[K]`; of every mass its row.
        mass_set: `[K]`; the set, of `CoverQueries.sets`, of the tokens that it is without.
    """

    row: Int64
    id: Int64
    mass_row: Int64
    mass_set: npt.NDArray[Any]


class Transferred(NamedTuple):
    """What `transfer` finds; flat, as the batch of the queries lies.

    Attributes:
        logprobs: float32 `[N]`; of the teacher's own tokens.
        transferred: float32 `[M]`; log q*(s_i | s_<i) of every student token, NaN where there is no query.
        phi: float64 `[M]`; log probability of the student's encoding up to each token, from the start of its row.
        before: float64 `[N + B]`; the sum of a row's teacher logprobs before each place.
        elements: float32 `[E]`; logprobs of the alternatives, in the order of the plan's parts.
        missing: float32 `[N + B]`; the mass of each row that top-k rows do not show; 0 for whole rows.
        within: what `Within` asks of whole rows: logprobs, logs of masses, and probabilities that these are without.
    """

    logprobs: Tensor
    transferred: Tensor
    phi: Tensor
    before: Tensor
    elements: Tensor
    missing: Tensor
    within: tuple[Tensor, ...] | None = None


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
        self.complements = np.flatnonzero(self.kept)
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
        #: The terms of every student token, and how many rows must have been read for Phi of it and of those before.
        self.by_owner = np.argsort(self.owner, kind="stable")
        self.owner_ptr = sums(np.bincount(self.owner, minlength=self.students))
        last = np.full(self.students, -1, np.int64)
        np.maximum.at(last, self.owner, self.row)
        self.rows_for = np.maximum.accumulate(last) + 1
        #: Tokens with a query, the row behind which each whole begins (-1: inside a teacher token), and the complement
        #: term that this row is (-1: all of it, where a stretch begins).
        self.at = np.flatnonzero(self.known)
        self.inside = self.base[self.at] < 0
        context = self.at[self.inside] - 1
        term_of = np.full(self.students, -1, np.int64)
        term_of[self.owner[self.mapped]] = self.mapped
        self.dense_term, self.dense_row = np.full(len(self.at), -1, np.int64), self.base[self.at].copy()
        self.dense_term[self.inside] = term_of[context]
        self.dense_row[self.dense_term >= 0] = self.row[self.dense_term[self.dense_term >= 0]]

    @once
    def behind(self) -> tuple[Int64, Int64]:
        """The parts that stand behind each token of `at`, as compressed rows; for whole rows alone."""
        position = np.full(self.students, -1, np.int64)
        position[self.at[self.inside] - 1] = np.flatnonzero(self.inside)
        of = position[self.part_owner]
        by = np.argsort(of, kind="stable")
        by = by[np.searchsorted(of[by], 0) :]
        return np.searchsorted(of[by], np.arange(len(self.at) + 1)), by

    @once
    def asked(self) -> Asked:
        """The elements, and the complements as masses."""
        return Asked(self.element_row, self.element_id, self.row[self.complements], self.set[self.complements])

    def holes(self, terms: Int64) -> tuple[Int64, Int64]:
        """For complement terms: which term (counted in `terms`) leaves which teacher id out."""
        owner, at = expand(self.sets.indptr, self.set[terms])
        return owner, take(self.sets.ids, at).astype(np.int64)


def take(values: npt.NDArray[Any], at: Int64) -> npt.NDArray[Any]:
    """Some values; zeros of nothing."""
    return values[at] if len(values) else np.zeros(len(at), values.dtype)


def sums(lengths: Int64) -> Int64:
    """Compressed rows of these lengths: `[n+1]`."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def rows_of(indptr: Int64, rows: npt.NDArray[Any]) -> tuple[Int64, Int64]:
    """Some of the compressed rows, in this order: their own `indptr`, and where their elements were."""
    owner, at = expand(indptr, rows)
    return sums(np.bincount(owner, minlength=len(rows))), at


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

"""`TransferTarget`: the whole q*(u | s_<i) over the student's vocabulary, a slice of positions at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.boundary.cover import CoverQueries, padded_places
from xtokmap.ids import Int64
from xtokmap.losses.events import EventMaps, Groups, Within
from xtokmap.losses.plan import Transferred, expand, on_device, plan, rows_of, take
from xtokmap.losses.queries import Reading, transfer
from xtokmap.torch.logits import Logits


class TransferTarget:
    """q*(u | s_<i) over the student's vocabulary at every position with a query, worked out a slice at a time.

    At a boundary between two teacher tokens the row of the next one gives the mass of each token to the student token
    with which the encoding of its bytes begins, but for tokens that would have merged with the student token before; a
    teacher token that could have reached past the boundary gives its mass to what would be left of it. Divided by exp
    Phi(i - 1) that adds up to 1, with `rest` for what belongs to no one student token.

    Args:
        teacher: flat rows `[N + B]`, as `transfer`.
        teacher_ids: int64 `[N]`, flat.
        queries: of the same batch, from `Aligner.cover_queries`.

    Attributes:
        maps: what tokens of the two vocabularies stand for, on the device.

    Raises:
        XTokMapError: top-k rows, which do not show the whole distribution.
    """

    def __init__(self, teacher: Logits, teacher_ids: Tensor, queries: CoverQueries) -> None:
        if not isinstance(teacher, Logits):
            raise XTokMapError(
                "the whole q* needs whole teacher rows (logits, or hidden states and head), not top-k; take the "
                "credit 'cover'"
            )
        self.teacher, self.teacher_ids, self.queries = teacher, teacher_ids, queries
        self.maps = EventMaps.of(queries, teacher_ids.device)
        # Where the student's tokens lie in `[B, Ts]`, and that shape.
        self._places, self._shape = queries.places()
        self._whole: tuple[TransferTarget, Sequence[int]] | None = None  # of which batch these are which rows
        self._seen = np.zeros(len(queries), np.bool_)  # rows that selections have gone through
        self._logprobs = torch.zeros(len(teacher_ids), device=teacher_ids.device)
        self._transferred = self._logprobs.new_full((len(queries.base),), torch.nan)

    def __len__(self) -> int:
        return len(plan(self.queries).at)

    def select(self, rows: Sequence[int]) -> TransferTarget:
        """The target of some rows of the batch, in this order, for a micro-batch."""
        q, first = self.queries, plan(self.queries).first_row
        device, width = self.teacher_ids.device, self._shape[1]
        at = _places_of(np.append(first, plan(q).rows), rows)
        ids = self.teacher_ids[on_device(_places_of(q.teacher_cu, rows), device)]
        some = TransferTarget(self.teacher.at(on_device(at, device)), ids, q.select(rows))
        columns = self._places[_places_of(q.student_cu, rows)] % max(width, 1)
        counts = np.diff(some.queries.student_cu)
        some._places = np.repeat(np.arange(len(rows)), counts) * width + columns
        some._shape = len(rows), width
        some._whole = self, rows
        return some

    def _finished(self, values: Transferred) -> None:
        """Takes note of what was found on the way, also for the batch that these rows are selected from."""
        self._seen[:] = True
        self._logprobs, self._transferred = values.logprobs.float(), values.transferred.float()
        if self._whole is not None:
            batch, rows = self._whole
            batch._seen[list(rows)] = True
            for into, found, cu in (
                (batch._logprobs, self._logprobs, batch.queries.teacher_cu),
                (batch._transferred, self._transferred, batch.queries.student_cu),
            ):
                into[on_device(_places_of(cu, rows), into.device)] = found

    def places(self) -> tuple[Int64, tuple[int, int]]:
        """Where the positions lie in `[B, Ts]`: flat, and (B, Ts); a selection in its rows, as wide as the batch."""
        return self._places[plan(self.queries).at], self._shape

    def logprobs(self, width: int | None = None) -> Tensor:
        """Of the teacher's own tokens: float32 `[B, Tt]`, 0 on padding; as wide as the batch, or wider."""
        cu, found = self.queries.teacher_cu, self._known()._logprobs
        width = int(np.diff(cu).max(initial=0)) if width is None else width
        places = on_device(padded_places(cu, None, width), found.device)
        return found.new_zeros(len(self.queries) * width).index_copy(0, places, found).view(-1, width)

    def transferred(self) -> Tensor:
        """log q*(s_i | s_<i): float32 `[B, Ts]`, NaN where there is no query and on padding."""
        found = self._known()._transferred
        places = on_device(self._places, found.device)
        flat = found.new_full((self._shape[0] * self._shape[1],), torch.nan)
        return flat.index_copy(0, places, found).view(self._shape)

    def _known(self) -> TransferTarget:
        """The same, gone through: now, unless selections of all rows have been."""
        if not self._seen.all():
            self._finished(transfer(self.teacher, self.teacher_ids, self.queries))
        return self

    def slice(self, a: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """Positions a to b: target `[b-a, V_S]`, rest `[b-a]`, and undetermined mass `[b-a]` (a part of both).

        Undetermined: on student tokens of which a longer one exists that the teacher would cut after them, and, inside
        a teacher token, in `rest`.
        """
        target, undetermined = Stream(self, events=False).made(a, b).slice(0, b - a)[:2]
        return target[:, :-1], target[:, -1], undetermined


def _places_of(cu: Int64, rows: Sequence[int]) -> Int64:
    """Where the elements of some ragged rows lie."""
    return rows_of(cu, np.asarray(rows, np.int64))[1]


class Stream:
    """Goes through the rows of a target, from the first position to the last.

    Every teacher row is made once: for what the queries ask of it, and, where a position begins there, for what stands
    behind that. So a slice of positions reads the rows that Phi of its last token needs; what later positions need of
    these is kept.

    Args:
        target: whose.
        events: whether bins are events of student tokens; else the tokens.
    """

    def __init__(self, target: TransferTarget, *, events: bool = True) -> None:
        self._target, self._events, p = target, events, plan(target.queries)
        self._plan, self._within = p, Within.of(target.queries) if events else None
        self.vocab_size = target.teacher.vocab_size
        # The rows that positions need whole, which of them each position does, and the last one that does.
        dense = np.flatnonzero(p.dense_row >= 0)
        self._whole, which = np.unique(p.dense_row[dense], return_inverse=True)
        self._which = np.full(len(p.at), -1, np.int64)
        self._which[dense] = which
        self._last = np.zeros(len(self._whole), np.int64)
        np.maximum.at(self._last, which, dense)
        until = np.maximum(take(p.rows_for, p.at), p.dense_row + 1)
        if self._within is not None:
            at = self._within.position
            until[at] = np.maximum(until[at], p.dense_row[at] + 2)
        self._until = np.maximum.accumulate(until)
        self._begin()
        self._memory = self._reading.values.logprobs.new_empty(0, target.teacher.vocab_size)

    def _begin(self) -> None:
        target = self._target
        self._reading, self._next = Reading(target.teacher, target.teacher_ids, target.queries), 0
        self._slot = np.full(len(self._whole), -1, np.int64)  # where in memory each row is

    def made(self, a: int, b: int) -> Masses:
        """Masses by bin of positions a to b, to be taken a block at a time: see `Part`. Slices come in their order."""
        if a < self._next:
            self._begin()
        self._next = b
        target, p, event = self._target, self._plan, self._target.maps.event
        probabilities = self._read(a, b)
        values, device = self._reading.values, target.teacher_ids.device
        if b == len(p.at):
            target._finished(values)
            self._memory = self._memory[:0].clone()  # what is left of it goes with what is made here
        on, dtype = partial(on_device, device=device), values.logprobs.dtype
        tokens = len(target.queries.vocab_map.student_to_teacher)
        width = target.maps.count if self._events else tokens
        at, inside, before = p.at[a:b], p.inside[a:b], values.before.new_zeros(b - a)
        before[on(np.flatnonzero(inside))] = values.phi[on(at[inside] - 1)]
        before[on(np.flatnonzero(~inside))] = values.before[on(p.base[at[~inside]])]
        row, term = p.dense_row[a:b], p.dense_term[a:b]
        dense = np.flatnonzero(row >= 0)
        with_holes = np.flatnonzero(term[dense] >= 0)
        hole, ids = p.holes(term[dense][with_holes])
        owner, place = expand(p.behind[0], np.arange(a, b))
        element, of = take(p.behind[1], place), on(owner)
        mass = torch.exp(values.before[on(p.part_row[element])] - before[of] + values.elements[on(element)]).to(dtype)
        following = p.part_next[element].astype(np.int64)
        real = take(target.queries.student_ids, at[owner]).astype(np.int64)
        following = np.where(following == -2, real, np.where(following < 0, tokens, following))
        # A token that ends at the boundary: its mass is known, what comes next is not.
        may = np.append(target.queries.vocab_map.open, False)[following]
        opened = p.part_whole[element] & may | (following == tokens)
        return Masses(
            width,
            (dense, probabilities),
            torch.exp(values.before[on(row[dense])] - before[on(dense)]).to(dtype),
            (with_holes[hole], on(with_holes[hole]), on(ids)),
            (target.maps.teacher_event if self._events else target.maps.to_student, target.maps.open.to(dtype)),
            (owner, of, on(np.append(event, width)[following] if self._events else following)),
            (mass, mass * on(opened)),
            values.transferred[on(at)],
            None if self._within is None else self._within.groups(values, (a, b), before),
        )

    def _read(self, a: int, b: int) -> Tensor:
        """Reads what the positions a to b need: probabilities of the rows that stand behind them, `[D, V]`."""
        reading, slot = self._reading, self._slot
        done = b == len(self._until)
        to = self._plan.rows if done else int(self._until[b - 1]) if b else 0
        kept = np.flatnonzero((slot >= 0) & (self._last >= a))
        first, last = np.searchsorted(self._whole, (reading.rows, max(to, reading.rows)))
        new = first + np.flatnonzero(self._last[first:last] >= a)
        kept_rows = self._memory[on_device(slot[kept], self._memory.device)]
        # How many rows are read at a time, and how many of them are kept behind those that there are.
        at = [*range(reading.rows, to, reading.size), max(to, reading.rows)]
        bounds = np.searchsorted(self._whole[new], at)
        size = max([len(kept), *(len(kept) + int(c) + e - s for c, s, e in zip(bounds, at, at[1:], strict=False))])
        if len(self._memory) < size:
            self._memory = kept_rows  # what there was goes before there is more, and the next slice may need more
            self._memory = kept_rows.new_empty(size + size // 8, kept_rows.shape[1])
        self._memory[: len(kept)] = kept_rows
        slot[:] = -1
        slot[kept], slot[new] = np.arange(len(kept)), np.arange(len(kept), len(kept) + len(new))
        for start, end, c, d in zip(at, at[1:], bounds, bounds[1:], strict=False):
            into = self._memory[len(kept) + c :][: end - start] if c < d else None
            reading.read(end, into)
            if into is not None and d - c < end - start:
                into[: d - c] = into[on_device(self._whole[new[c:d]] - start, into.device)]
        wanted = slot[self._which[a:b][self._which[a:b] >= 0]]
        # What is handed out is overwritten, and may be needed again where positions share a row.
        if len(self._whole) == len(self._which[self._which >= 0]) and np.array_equal(wanted, np.arange(len(wanted))):
            return self._memory[: len(wanted)]
        return self._memory[on_device(wanted, self._memory.device)]


class Behind(NamedTuple):
    """What stands behind some positions.

    Attributes:
        masses: `[n, bins + 1]`; by bin, the rest last.
        undetermined: `[n]`; how much is known of several student tokens together.
        sampled: `[n]`; log q* of the token that is there.
        groups: of events that rows behind say more of.
    """

    masses: Tensor
    undetermined: Tensor
    sampled: Tensor
    groups: Groups | None


class Masses(NamedTuple):
    """Mass by bin of some positions, worked out a block at a time; what is asked of the CPU lies there.

    Attributes:
        width: how many bins there are beside the rest.
        dense: positions behind which a whole teacher row stands, rising, and its probabilities, which are overwritten.
        scale: of the probabilities of these, `[D]`.
        holes: tokens that are left out of them: which of them, rising, on the CPU and on the device, and the token.
        bins: the bin of every teacher token, and 1 where its mass is undetermined.
        at: of every alternative the position, rising, on the CPU and on the device, and its bin.
        mass: of every alternative, and how much of it is undetermined.
        sampled: log q* of the tokens that are there.
        groups: of events that rows behind say more of.
    """

    width: int
    dense: tuple[Int64, Tensor]
    scale: Tensor
    holes: tuple[Int64, Tensor, Tensor]
    bins: tuple[Tensor, Tensor]
    at: tuple[Int64, Tensor, Tensor]
    mass: tuple[Tensor, Tensor]
    sampled: Tensor
    groups: Groups | None

    def slice(self, a: int, b: int) -> Behind:
        """Of the positions a to b among these; once."""
        target = self.scale.new_zeros(b - a, self.width + 1)
        undetermined = self.scale.new_zeros(b - a)
        rows, probabilities = self.dense
        c, d = np.searchsorted(rows, (a, b))
        if c < d:
            bins, opened = self.bins
            mass = probabilities[c:d]
            first, last = np.searchsorted(self.holes[0], (c, d))
            mass[self.holes[1][first:last] - c, self.holes[2][first:last]] = 0
            whole = d - c == b - a
            into = target if whole else target.new_zeros(d - c, self.width + 1)
            into.scatter_add_(1, bins.expand(d - c, -1), mass).mul_(self.scale[c:d, None])
            unknown = (mass @ opened).mul_(self.scale[c:d])
            if whole:
                undetermined = unknown
            else:
                at = on_device(rows[c:d] - a, target.device)
                target[at], undetermined[at] = into, unknown
        first, last = np.searchsorted(self.at[0], (a, b))
        at, column = (x[first:last] for x in self.at[1:])
        target.index_put_((at - a, column), self.mass[0][first:last], accumulate=True)
        undetermined.index_add_(0, at - a, self.mass[1][first:last])
        groups = None if self.groups is None else self.groups.slice(a, b)
        return Behind(target, undetermined, self.sampled[a:b], groups)

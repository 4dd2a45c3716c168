"""`TransferTarget`: the whole q*(u | s_<i) over the student's vocabulary, a slice of positions at a time."""

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
from xtokmap.losses.queries import Transferred, expand, on_device, plan, take
from xtokmap.torch.logits import Logits, Made


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
    #: alternatives of each, as compressed rows of the plan's parts.
    _at: Int64
    _dense: tuple[Int64, Int64]
    _elements: tuple[Int64, Int64]
    #: What tokens of the two vocabularies stand for; on the device.
    maps: EventMaps
    #: log probability of everything before each position, float64 `[P]`.
    _before: Tensor
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
        term_of = np.full(p.students, -1, np.int64)
        term_of[p.owner[p.mapped]] = p.mapped
        term, row = np.full(len(at), -1, np.int64), p.base[at].copy()
        term[inside] = term_of[context]
        row[term >= 0] = p.row[term[term >= 0]]
        position = np.full(p.students, -1, np.int64)
        position[context] = np.flatnonzero(inside)
        owner = position[p.part_owner]
        order = np.argsort(owner, kind="stable")
        order = order[np.searchsorted(owner[order], 0) :]
        ptr = np.searchsorted(owner[order], np.arange(len(at) + 1))
        before = values.before.new_zeros(len(at))
        before[torch.from_numpy(np.flatnonzero(inside)).to(device)] = values.phi[torch.from_numpy(context).to(device)]
        start = torch.from_numpy(np.flatnonzero(~inside)).to(device)
        before[start] = values.before[torch.from_numpy(p.base[at][~inside]).to(device)]
        return cls(
            teacher,
            values,
            queries,
            at,
            (row, term),
            (ptr, order),
            EventMaps.of(queries, device),
            before,
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
        target, undetermined = self._masses(a, b, self.maps.to_student, None).slice(0, b - a)
        return target[:, :-1], target[:, -1], undetermined

    def made(self, a: int, b: int) -> Masses:
        """The same of events of student tokens (`EventMaps`), to be taken a block at a time."""
        return self._masses(a, b, self.maps.teacher_event, self.maps.event)

    def _masses(self, a: int, b: int, bins: Tensor, named: Int64 | None) -> Masses:
        """Masses by bin of positions a to b.

        Args:
            a: first position.
            b: behind the last.
            bins: the bin of every teacher token.
            named: the bin of every student token; None: itself.
        """
        p, values, device = plan(self.queries), self.values, self._before.device

        on = partial(on_device, device=device)
        which = np.arange(a, b) if self._chosen is None else self._chosen[a:b]
        size = len(self.queries.vocab_map.student_to_teacher)
        width = size if named is None else self.maps.count
        dtype = values.logprobs.dtype
        before = self._before[on(which)]
        row, term = self._dense[0][which], self._dense[1][which]
        dense = np.flatnonzero(row >= 0)
        rows = on(row[dense])
        with_holes = np.flatnonzero(term[dense] >= 0)
        hole, ids = p.holes(term[dense][with_holes])
        owner, place = expand(self._elements[0], which)
        element, at = take(self._elements[1], place), on(owner)
        behind = on(p.part_row[element])
        mass = torch.exp(values.before[behind] - before[at] + values.elements[on(element)]).to(dtype)
        following = p.part_next[element].astype(np.int64)
        real = self.queries.student_ids[self._at[which[owner]]].astype(np.int64)
        following = np.where(following == -2, real, np.where(following < 0, size, following))
        column = following if named is None else np.append(named, width)[following]
        # A token that ends at the boundary: its mass is known, what comes next is not.
        opened = p.part_whole[element] & np.append(self.queries.vocab_map.open, False)[following] | (following == size)
        return Masses(
            width,
            (dense, self.teacher.at(rows).made(0, len(dense))),
            torch.exp(values.before[rows] - before[on(dense)]).to(dtype),
            (with_holes[hole], on(with_holes[hole]), on(ids)),
            (bins, self.maps.open.to(dtype)),
            (owner, at, on(column)),
            (mass, mass * on(opened)),
        )


class Masses(NamedTuple):
    """Mass by bin of some positions, worked out a block at a time; what is asked of the CPU lies there.

    Attributes:
        width: how many bins there are beside the rest.
        dense: positions behind which a whole teacher row stands, rising, and their logits.
        scale: of the probabilities of these, `[D]`.
        holes: tokens that are left out of them: which of them, rising, on the CPU and on the device, and the token.
        bins: the bin of every teacher token, and 1 where its mass is undetermined.
        at: of every alternative the position, rising, on the CPU and on the device, and its bin.
        mass: of every alternative, and how much of it is undetermined.
    """

    width: int
    dense: tuple[Int64, Made]
    scale: Tensor
    holes: tuple[Int64, Tensor, Tensor]
    bins: tuple[Tensor, Tensor]
    at: tuple[Int64, Tensor, Tensor]
    mass: tuple[Tensor, Tensor]

    def slice(self, a: int, b: int) -> tuple[Tensor, Tensor]:
        """Of the positions a to b among these: `[b-a, width + 1]`, the rest last, and undetermined mass `[b-a]`."""
        target = self.scale.new_zeros(b - a, self.width + 1)
        undetermined = self.scale.new_zeros(b - a)
        rows, logits = self.dense
        c, d = np.searchsorted(rows, (a, b))
        if c < d:
            bins, opened = self.bins
            mass = logits.slice(c, d).softmax(-1)
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
        return target, undetermined


@dataclass(frozen=True, eq=False)
class EventMaps:
    """What tokens of two vocabularies stand for, where a teacher is asked about the student's tokens.

    A student token stands for itself, but for one that the teacher would begin with a shorter student token: its mass
    on the shorter may go on to any of them, so that it is known of them together, their event.

    Attributes:
        to_student: int64 `[V_T]`; the student token that a teacher token's mass belongs to, V_S for none.
        open: bool `[V_T]`; whether it may belong to a longer one.
        event: int64 `[V_S]`, on the CPU; the event of every student token.
        student_event: the same on the device.
        members: int64 `[V_S]`; how many tokens that event has.
        teacher_event: int64 `[V_T]`; the event that a teacher token's mass belongs to, E for none.
        stops: int64; the student's tokens that end a turn.
        stop_events: int64; their events.
        count: E, the number of events.
    """

    to_student: Tensor
    open: Tensor
    event: Int64
    student_event: Tensor
    members: Tensor
    teacher_event: Tensor
    stops: Tensor
    stop_events: Tensor
    count: int

    @classmethod
    def of(cls, queries: CoverQueries, device: torch.device) -> EventMaps:
        """Of the two vocabularies of some queries; kept as long as their map is."""
        known = _MAPS.setdefault(queries.vocab_map, {})
        key = (device, queries.identical)
        if key not in known:
            to_student, opened = _dense_map(queries)
            names, event = np.unique(_events(queries), return_inverse=True)
            members, teacher = np.bincount(event)[event], np.append(event, len(names))[to_student]
            stops = np.array(queries.vocab_map.student_stops, np.int64)

            def there(part: npt.NDArray[Any]) -> Tensor:
                return torch.from_numpy(part).to(device)

            known[key] = cls(
                *(there(to_student), there(opened), event, there(event), there(members), there(teacher)),
                *(there(stops), there(np.unique(event[stops])), len(names)),
            )
        return known[key]


_MAPS: WeakKeyDictionary[VocabMap, dict[tuple[torch.device, bool], EventMaps]] = WeakKeyDictionary()


def _dense_map(queries: CoverQueries) -> tuple[Int64, npt.NDArray[np.bool_]]:
    """Student id for every teacher id (V_S where there is none), and whether its mass may belong to a longer token."""
    vm = queries.vocab_map
    size = len(vm.student_to_teacher)
    if queries.identical:
        same = np.minimum(np.arange(len(vm.canonical), dtype=np.int64), size)
        return same, np.zeros(len(same), np.bool_)
    to_student = np.where(vm.canonical >= 0, vm.canonical, size).astype(np.int64)
    opened = (vm.teacher_to_student == vm.canonical) & np.append(vm.open, False)[to_student]
    opened |= (vm.canonical < 0) & (vm.prefix >= 0)  # white space, of which the word behind it takes the last
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

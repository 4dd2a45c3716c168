"""Events: student tokens that a teacher's row knows of together only, and which of them it is by the row behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xtokmap.boundary.cover import CoverQueries
from xtokmap.boundary.vocab_map import VocabMap
from xtokmap.ids import Int64
from xtokmap.losses.plan import Asked, Plan, Transferred, expand, on_device, plan, rows_of, sums, take


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
        members_of: the student tokens of every event, as compressed rows: `[E+1]` and `[V_S]`, rising, on the CPU.
        rank: int64 `[V_S]`, on the CPU; which of its event's members every student token is.
        teachers_of: the same of the teacher tokens whose mass belongs to each, with the student token that it is on.
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
    members_of: tuple[Int64, Int64]
    rank: Int64
    teachers_of: tuple[Int64, Int64, Int64]

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
                (own := _by_event(event, len(names))),
                _rank(event, *own),
                (*(by := _by_event(np.append(event, len(names))[to_student], len(names))), to_student[by[1]]),
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


def _by_event(event: Int64, count: int) -> tuple[Int64, Int64]:
    """The places of every event, as compressed rows; those of `count` and above are left out."""
    order = np.argsort(event, kind="stable")
    ptr = np.searchsorted(event[order], np.arange(count + 1))
    return ptr, order[: ptr[-1]]


def _rank(event: Int64, ptr: Int64, order: Int64) -> Int64:
    rank = np.empty(len(event), np.int64)
    rank[order] = np.arange(len(order)) - ptr[event[order]]
    return rank


@dataclass(frozen=True, eq=False)
class Within:
    """Which token of an event it is, where the event begins with the teacher token that really stands there.

    A row gives the mass of an event. Where the sampled token is one of several, and begins with the teacher token that
    stands there, the row behind that one goes on: each of its tokens v' leaves the student with the token with which
    the encoding of both together begins. So the event falls into groups, mostly of one token, whose masses are known.
    A group has more where v', too, may go on to several.

    All on the CPU. K places, M members, G groups, A alternatives.

    Attributes:
        position: int64 `[K]`; which of the plan's positions each is, rising.
        row: int64 `[K]`; the row that predicts that token.
        teacher: int64 `[K]`; the teacher token with which each begins, flat.
        group_ptr: int64 `[K+1]`; the groups of each place.
        member_ptr: int64 `[K+1]`; the members of each place.
        member_id: int64 `[M]`; their student ids, rising.
        member_group: int64 `[M]`; and groups.
        root: int64 `[K]`; the group of the student token that is the teacher token alone.
        own: int64 `[K]`; the group of the student token that is there.
        asked: of the rows: the mass that leaves the student the root, without what changes it, and other teacher tokens
            of the event.
        behind_ptr: int64 `[K+1]`; how many tokens the masses are without, summed up.
        kind: int64 `[K]`; which of `kinds` each place is.
        kinds: of places.
        others: int64; of every other teacher token its group and its place.
        reaching: the plan's parts that stand at a place as well, and the row, the group and the place of each.
    """

    position: Int64
    row: Int64
    teacher: Int64
    group_ptr: Int64
    member_ptr: Int64
    member_id: Int64
    member_group: Int64
    root: Int64
    own: Int64
    asked: Asked
    behind_ptr: Int64
    kind: Int64
    kinds: _Kinds
    others: tuple[Int64, Int64]
    reaching: tuple[Int64, Int64, Int64, Int64]

    def groups(self, found: Transferred, positions: tuple[int, int], before: Tensor) -> Groups:
        """The groups of some positions in a row.

        Args:
            found: what was asked, of all places up to there.
            positions: the first, and behind the last.
            before: float64, of every position the log probability of everything before it.
        """
        c, d = np.searchsorted(self.position, positions)
        on = partial(on_device, device=before.device)
        group_ptr, member_ptr = (ptr[c : d + 1] - ptr[c] for ptr in (self.group_ptr, self.member_ptr))
        members, first = slice(self.member_ptr[c], self.member_ptr[d]), self.group_ptr[c]
        group, own, row = self.member_group[members] - first, self.own[c:d] - first, self.position[c:d] - positions[0]
        place = np.repeat(np.arange(d - c), np.diff(group_ptr))
        several = np.bincount(group, minlength=len(place))[own] > 1
        masses, known = self._masses(found, c, d, before[on(row)])
        dtype = found.logprobs.dtype
        return Groups(
            (row, group_ptr, member_ptr),
            (on(row), on(own), on(several).to(dtype), known.to(dtype)),
            (on(place), masses.to(dtype)),
            (on(np.repeat(row, np.diff(member_ptr))), on(self.member_id[members]), on(group)),
        )

    def _masses(self, found: Transferred, c: int, d: int, before: Tensor) -> tuple[Tensor, Tensor]:
        """The mass of every group of places c to d, divided by that of all before: `[G]`; and whether to use it, `[K]`.

        What comes behind other teacher tokens of the event is not known, and their mass stays with the group that they
        begin with; some of what comes behind leaves the event. Where that is more than `_UNKNOWN`, groups mean little.
        """
        on, first = partial(on_device, device=before.device), self.group_ptr[c]
        assert found.within is not None
        logprobs, kept, left = found.within
        scale = found.before[on(self.row[c:d])] - before
        behind = scale + found.logprobs[on(self.teacher[c:d])]
        b0, b1 = self.behind_ptr[[c, d]]
        place, at_kind = expand(self.kinds.behind_ptr, self.kind[c:d])
        group = self.kinds.behind_group[at_kind]
        group = np.where(group < 0, -1, group + (self.group_ptr[c:d] - first)[place])
        (other, at), (o0, o1) = self.others, np.searchsorted(self.others[1], (c, d))
        (part, part_row, reached, reaching), (r0, r1) = self.reaching, np.searchsorted(self.reaching[-1], (c, d))
        other, at = other[o0:o1] - first, at[o0:o1] - c
        part, part_row, reached, reaching = part[r0:r1], part_row[r0:r1], reached[r0:r1] - first, reaching[r0:r1] - c
        going_on = left[b0:b1] * behind.exp()[on(place)]
        others = (logprobs[o0:o1] + scale[on(at)]).exp()
        beyond = (found.before[on(part_row)] - before[on(reaching)] + found.elements[on(part)]).exp()
        inside, outside = np.flatnonzero(group >= 0), np.flatnonzero(group < 0)
        masses = before.new_zeros(int(self.group_ptr[d] - first))
        masses.index_add_(0, on(self.root[c:d] - first), (kept[c:d] + behind).exp())
        masses.index_add_(0, on(group[inside]), going_on[on(inside)])
        masses.index_add_(0, on(other), others).index_add_(0, on(reached), beyond)
        unknown = torch.zeros_like(behind).index_add_(0, on(at), others).index_add_(0, on(reaching), beyond)
        unknown.index_add_(0, on(place[outside]), going_on[on(outside)])
        return masses, unknown <= _UNKNOWN * (behind.exp() + unknown)

    @classmethod
    def of(cls, queries: CoverQueries) -> Within | None:
        """Of queries that were asked for whole rows; None for others. Kept as long as the queries are."""
        if queries.within is None:
            return None
        made = _WITHIN.get(queries)
        if made is None:
            made = _WITHIN[queries] = cls._made(queries, plan(queries), EventMaps.of(queries, torch.device("cpu")))
        return made

    @classmethod
    def _made(cls, q: CoverQueries, p: Plan, maps: EventMaps) -> Within:
        vm = q.vocab_map
        assert q.within is not None
        # Where: the teacher token is the root of the sampled token's event, and not among what its row leaves out.
        position = np.flatnonzero((q.within[p.at] >= 0) & (p.dense_row >= 0))
        row, token = p.dense_row[position], p.at[position]
        teacher = row - p.row_of_batch[row]
        ids = take(q.teacher_ids, teacher).astype(np.int64)
        root = vm.teacher_to_student[ids].astype(np.int64)
        event = maps.event[root]
        fits = event == maps.event[take(q.student_ids, token).astype(np.int64)]
        fits &= (maps.members[root].numpy() > 1) & ~np.isin(root, vm.student_stops)
        held, term = _Elements(q), p.dense_term[position]
        without = np.where(term < 0, -1, take(p.set, np.maximum(term, 0)))  # the set that its row leaves out
        fits &= held.place(without, ids) < 0
        position, teacher, without = position[fits], teacher[fits], without[fits]
        names, kind = np.unique(np.stack([q.within[token[fits]], ids[fits]]), axis=1, return_inverse=True)
        kinds = _Kinds.of(q, maps, held, *names.astype(np.int64))
        return cls._spread(q, p, kinds, kind, position, teacher, lambda at, ids: held.place(without[at], ids) < 0)

    @classmethod
    def _spread(
        cls,
        q: CoverQueries,
        p: Plan,
        kinds: _Kinds,
        kind: Int64,
        position: Int64,
        teacher: Int64,
        stands: Callable[[Int64, Int64], npt.NDArray[np.bool_]],
    ) -> Within:
        """Places from what is the same at all of a kind; `stands`: whether teacher tokens are in the rows of places."""
        maps = EventMaps.of(q, torch.device("cpu"))
        group_ptr = sums(kinds.groups[kind])
        row, every = p.dense_row[position], np.arange(len(kind))

        def moved(group: Int64, place: Int64) -> Int64:
            return np.where(group < 0, -1, group + group_ptr[place])

        member_ptr, at = rows_of(kinds.member_ptr, kind)
        of_member = np.repeat(every, np.diff(member_ptr))
        member_id, member_group = kinds.member_id[at], moved(kinds.member_group[at], of_member)
        # Rows rise: those of a batch row do, and one batch row is behind the other.
        behind_ptr = sums(np.diff(kinds.behind_ptr)[kind])
        there, t = expand(kinds.there_ptr, kind)
        counts = (kinds.there_group[t] >= 0) & stands(there, kinds.there_id[t])
        there, t = there[counts], t[counts]
        asked = Asked(row[there], kinds.there_id[t], row + 1, kinds.set[kind])
        # Teacher tokens that began before, and reach into the event.
        place, o = expand(p.behind[0], position)
        part = p.behind[1][o]
        real = take(q.student_ids, p.at[position[place]]).astype(np.int64)
        following = np.where(p.part_next[part] == -2, real, p.part_next[part].astype(np.int64))
        mine = (following >= 0) & (np.append(maps.event, -1)[following] == kinds.event[kind][place])
        place, part, following = place[mine], part[mine], following[mine]
        reached = kinds.member_group[kinds.member_ptr[kind][place] + maps.rank[following]]
        own: Int64 = kinds.member_group[kinds.member_ptr[kind] + maps.rank[q.student_ids[p.at[position]]]]
        return cls(
            *(position, row, teacher, group_ptr, member_ptr, member_id, member_group),
            *(moved(kinds.root_group[kind], every), moved(own, every), asked),
            *(behind_ptr, kind, kinds),
            (moved(kinds.there_group[t], there), there),
            (part, p.part_row[part], moved(reached, place), place),
        )


_WITHIN: WeakKeyDictionary[CoverQueries, Within] = WeakKeyDictionary()


class _Elements:
    """The elements of the sets of some queries, to be looked up."""

    def __init__(self, q: CoverQueries) -> None:
        sets = q.sets
        self.next = sets.next
        self._keys = self._key(np.repeat(np.arange(len(sets.indptr) - 1), np.diff(sets.indptr)), sets.ids)

    @staticmethod
    def _key(of: npt.NDArray[Any], ids: npt.NDArray[Any]) -> Int64:
        return np.asarray(of.astype(np.int64) * 2**32 + ids)

    def place(self, of: npt.NDArray[Any], ids: npt.NDArray[Any]) -> Int64:
        """Where each id stands in its set; -1 where it does not."""
        if not len(self._keys):
            return np.full(len(ids), -1, np.int64)
        keys = self._key(of, ids)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where((self._keys[at] == keys) & (ids >= 0), at, -1)


@dataclass(frozen=True, eq=False)
class _Kinds:
    """What is the same wherever a teacher token begins an event: its members, in groups, and what has their mass.

    Groups are counted in the event; the arrays are compressed rows of the kinds.

    Attributes:
        event: the event.
        groups: how many there are.
        root_group: the one of the root.
        member_ptr: of the members.
        member_id: student ids.
        member_group: the group of each.
        set: of the teacher tokens that may come behind and change what the student has.
        behind_ptr: of these.
        behind_group: -1 where the student's token is none of the event's.
        there_ptr: of other teacher tokens of the event.
        there_id: teacher ids.
        there_group: the group of each.
    """

    event: Int64
    groups: Int64
    root_group: Int64
    member_ptr: Int64
    member_id: Int64
    member_group: Int64
    set: Int64
    behind_ptr: Int64
    behind_group: Int64
    there_ptr: Int64
    there_id: Int64
    there_group: Int64

    @classmethod
    def of(cls, q: CoverQueries, maps: EventMaps, held: _Elements, within: Int64, teacher: Int64) -> _Kinds:
        """Of pairs of a set, of what may come behind a teacher token, and that token."""
        vm, sets = q.vocab_map, q.sets
        root = vm.teacher_to_student[teacher].astype(np.int64)
        event = maps.event[root]
        ptr, at = rows_of(maps.members_of[0], event)
        member = maps.members_of[1][at]
        kind = np.repeat(np.arange(len(event)), np.diff(ptr))

        def place(of: Int64, ids: Int64) -> Int64:
            return np.asarray(ptr[of] + maps.rank[ids])

        def here(of: Int64, ids: Int64) -> npt.NDArray[np.bool_]:
            return np.asarray((ids >= 0) & (np.append(maps.event, -1)[ids] == event[of]))

        # Every member leads to a shorter one or to itself: by its second teacher token, where the first is the root.
        first, own = vm.teacher_first[member], root[kind]
        found = held.place(within[kind], vm.teacher_second[member])
        by_second = np.where(found >= 0, take(held.next, np.maximum(found, 0)), -1).astype(np.int64)
        parent = np.append(vm.canonical, -1)[first].astype(np.int64)
        to = np.where(np.append(vm.teacher_to_student, -1)[first] == own, by_second, parent)
        to = np.where(here(kind, to) & (member != own), to, own)
        leads = place(kind, to)
        while (leads[leads] != leads).any():
            leads = leads[leads]
        heads = leads == np.arange(len(leads))
        number = np.cumsum(heads) - 1
        groups = np.bincount(kind[heads], minlength=len(event))
        group = number[leads] - sums(groups)[kind]

        behind_ptr, at = rows_of(sets.indptr, within)
        of = np.repeat(np.arange(len(event)), np.diff(behind_ptr))
        following = take(sets.next, at).astype(np.int64)
        mine = here(of, following)
        behind_group = np.where(mine, group[place(of, np.where(mine, following, root[of]))], -1)
        there_ptr, t = rows_of(maps.teachers_of[0], event)
        of = np.repeat(np.arange(len(event)), np.diff(there_ptr))
        there_id, student = maps.teachers_of[1][t], maps.teachers_of[2][t]
        others = there_id != teacher[of]
        there_group = np.where(others, group[place(of, student)], -1)
        return cls(
            *(event, groups, group[place(np.arange(len(event)), root)], ptr, member, group),
            *(within, behind_ptr, behind_group, there_ptr, there_id, there_group),
        )


#: Share of an event's mass of which the row behind may say nothing.
_UNKNOWN = 0.05


class Groups(NamedTuple):
    """The groups of the events of some rows, to be taken a block at a time; R rows have any.

    Attributes:
        bounds: on the CPU: the rows `[R]`, rising, and where the groups and the members of each begin, `[R+1]`.
        rows: int64 `[R]`; the group of the sampled token, 1 where it has several members, and 1 where the masses of
            the groups are known.
        groups: of every group which of the R rows it is of, and its mass, divided by that of what lies before.
        members: of every member its row, its student id and its group.
    """

    bounds: tuple[Int64, Int64, Int64]
    rows: tuple[Tensor, Tensor, Tensor, Tensor]
    groups: tuple[Tensor, Tensor]
    members: tuple[Tensor, Tensor, Tensor]

    def slice(self, a: int, b: int) -> Groups | None:
        """Of the rows a to b; None where none has groups."""
        c, d = np.searchsorted(self.bounds[0], (a, b))
        if c == d:
            return None
        (g, h), (m, n) = ((int(ptr[c]), int(ptr[d])) for ptr in self.bounds[1:])
        row, own, several, known = (x[c:d] for x in self.rows)
        place, mass = (x[g:h] for x in self.groups)
        of, ids, group = (x[m:n] for x in self.members)
        bounds = self.bounds[0][c:d] - a, self.bounds[1][c : d + 1] - g, self.bounds[2][c : d + 1] - m
        return Groups(bounds, (row - a, own - g, several, known), (place - c, mass), (of - a, ids, group - g))

    def join(
        self, p: Tensor, use: Tensor, floor: float, clamp: float, *, into: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> Tensor:
        """The divergence of the groups, given the event, where it is known and to be used.

        Args:
            p: `[n, V]`, the student's probabilities.
            use: `[n]`, 1 or 0.
            floor: least probability of the groups that the teacher never makes, together.
            clamp: largest absolute log ratio.
            into: `[n]` each, overwritten in such rows: the student's and the teacher's probability of the event, by
                that of the sampled token's group; the divergence; whether that group has several members.

        Returns:
            `[M]`; for every member p(member | event) log p(group | event) / q(group | event): the derivative of the
            divergence by its logit, and p(member | event) times the divergence itself.
        """
        (at, own, *flags), (place, mass), (row, ids, group) = self.rows, self.groups, self.members
        several, known, mass = (x.to(p.dtype) for x in (*flags, mass))
        n, tiny = len(at), torch.finfo(p.dtype).tiny
        each = p[row, ids]
        of_group = torch.zeros_like(mass).index_add_(0, group, each)

        def per_row(x: Tensor) -> Tensor:
            return x.new_zeros(n).index_add_(0, place, x)

        event = per_row(of_group).clamp(min=tiny)[place]
        share, said = of_group / event, mass > 0
        q = torch.where(said, mass / per_row(mass).clamp(min=tiny)[place], floor)
        lost = torch.where(said, share, per_row(torch.where(said, 0, share))[place])
        ratio = (lost.clamp(min=tiny) / q.clamp(min=tiny)).log().clamp(-clamp, clamp)
        known = known * use[at]
        student, teacher, divergence, more = into
        student[at] = torch.where(known > 0, of_group[own], student[at])
        teacher[at] *= torch.where(known > 0, q[own], 1)
        divergence[at] = known * per_row(share * ratio)
        more[at] = torch.where(known > 0, several, more[at])
        return each * (ratio * known[place] / event)[group]

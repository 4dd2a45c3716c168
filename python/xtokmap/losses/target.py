"""`TransferTarget`: the whole q*(u | s_<i) over the student's vocabulary, a slice of positions at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.boundary.cover import CoverQueries
from xtokmap.ids import Int64
from xtokmap.losses.events import EventMaps, Groups, Within
from xtokmap.losses.plan import Plan, expand, on_device, plan, rows_of, take
from xtokmap.losses.queries import Transferred
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
    #: What tokens of the two vocabularies stand for; on the device.
    maps: EventMaps
    #: log probability of everything before each position, float64 `[P]`.
    _before: Tensor
    #: Where rows behind say more of events, and the masses (see `_group_masses`).
    _within: Within | None = None
    _masses_within: tuple[Tensor, Tensor] | None = None
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
        at = p.at
        before = values.before.new_zeros(len(at))
        inside = torch.from_numpy(np.flatnonzero(p.inside)).to(device)
        before[inside] = values.phi[torch.from_numpy(at[p.inside] - 1).to(device)]
        start = torch.from_numpy(np.flatnonzero(~p.inside)).to(device)
        before[start] = values.before[torch.from_numpy(p.base[at][~p.inside]).to(device)]
        within = None if values.within is None else Within.of(queries)
        masses = None if within is None else _group_masses(within, p, values, before)
        return cls(teacher, values, queries, EventMaps.of(queries, device), before, within, masses)

    def __len__(self) -> int:
        return len(plan(self.queries).at if self._chosen is None else self._chosen)

    def select(self, rows: Sequence[int]) -> TransferTarget:
        """The target of some rows of the batch, in this order, for a micro-batch."""
        bounds = np.searchsorted(plan(self.queries).at, self.queries.student_cu)
        chosen = [np.arange(bounds[b], bounds[b + 1]) for b in rows]
        return replace(self, _rows=tuple(rows), _chosen=np.concatenate([np.zeros(0, np.int64), *chosen]))

    def places(self) -> tuple[Int64, tuple[int, int]]:
        """Where the positions lie in `[B, Ts]`: flat, and (B, Ts); a selection in its rows, as wide as the batch."""
        places, (rows, width) = self.queries.places()
        at = plan(self.queries).at
        if self._rows is None or self._chosen is None:
            return places[at], (rows, width)
        moved = np.full(rows, 0, np.int64)
        moved[list(self._rows)] = np.arange(len(self._rows))
        row, column = np.divmod(places[at[self._chosen]], max(width, 1))
        return moved[row] * width + column, (len(self._rows), width)

    def slice(self, a: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """Positions a to b: target `[b-a, V_S]`, rest `[b-a]`, and undetermined mass `[b-a]` (a part of both).

        Undetermined: on student tokens of which a longer one exists that the teacher would cut after them, and, inside
        a teacher token, in `rest`.
        """
        target, undetermined, _ = self._masses(a, b, self.maps.to_student, None).slice(0, b - a)
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
        row, term = p.dense_row[which], p.dense_term[which]
        dense = np.flatnonzero(row >= 0)
        rows = on(row[dense])
        with_holes = np.flatnonzero(term[dense] >= 0)
        hole, ids = p.holes(term[dense][with_holes])
        owner, place = expand(p.behind_ptr, which)
        element, at = take(p.behind, place), on(owner)
        behind = on(p.part_row[element])
        mass = torch.exp(values.before[behind] - before[at] + values.elements[on(element)]).to(dtype)
        following = p.part_next[element].astype(np.int64)
        real = self.queries.student_ids[p.at[which[owner]]].astype(np.int64)
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
            None if self._within is None or named is None else self._groups(which, dtype),
        )

    def _groups(self, which: Int64, dtype: torch.dtype) -> Groups:
        """The groups of the positions `which`."""
        w, device = self._within, self._before.device
        assert w is not None
        assert self._masses_within is not None
        masses, known = self._masses_within
        on = partial(on_device, device=device)
        row, k = w.at(which)
        group_ptr, group = rows_of(w.group_ptr, k)
        member_ptr, member = rows_of(w.member_ptr, k)
        place = np.repeat(np.arange(len(k)), np.diff(group_ptr))
        of_member = np.repeat(np.arange(len(k)), np.diff(member_ptr))
        local = (group_ptr[:-1] - w.group_ptr[k])[of_member] + w.member_group[member]
        own = w.own[k] + group_ptr[:-1] - w.group_ptr[k]
        several = np.bincount(local, minlength=len(group))[own] > 1
        return Groups(
            (row, group_ptr, member_ptr),
            (on(row), on(own), on(several).to(dtype), known[on(k)].to(dtype)),
            (on(place), masses[on(group)].to(dtype)),
            (on(row[of_member]), on(w.member_id[member]), on(local)),
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
        groups: of events that rows behind say more of.
    """

    width: int
    dense: tuple[Int64, Made]
    scale: Tensor
    holes: tuple[Int64, Tensor, Tensor]
    bins: tuple[Tensor, Tensor]
    at: tuple[Int64, Tensor, Tensor]
    mass: tuple[Tensor, Tensor]
    groups: Groups | None

    def slice(self, a: int, b: int) -> tuple[Tensor, Tensor, Groups | None]:
        """Of the positions a to b among these: `[b-a, width + 1]`, the rest last, undetermined mass `[b-a]`, groups."""
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
        return target, undetermined, None if self.groups is None else self.groups.slice(a, b)


def _group_masses(w: Within, p: Plan, values: Transferred, before: Tensor) -> tuple[Tensor, Tensor]:
    """The mass of every group, divided by that of all before its place: float64 `[G]`, and `[K]` whether to use it.

    What comes behind other teacher tokens of the event is not known, and their mass stays with the group that they
    begin with; some of what comes behind leaves the event. Where that is more than `_UNKNOWN`, the groups mean little.
    """
    assert values.within is not None
    on = partial(on_device, device=before.device)
    logprobs, kept, left = (x.double() for x in values.within)
    scale = values.before[on(p.dense_row[w.position])] - before[on(w.position)]
    behind = scale + values.logprobs[on(w.teacher)]
    (group, place), (other, at), (part, reached, reaching) = w.behind, w.others, w.reaching
    root = (kept + behind).exp()
    going_on = left * behind.exp()[on(place)]
    others = (logprobs + scale[on(at)]).exp()
    known = np.flatnonzero(group >= 0)
    fellows = np.flatnonzero(other >= 0)
    beyond = (values.before[on(p.part_row[part])] - before[on(w.position[reaching])] + values.elements[on(part)]).exp()
    found = before.new_zeros(int(w.group_ptr[-1])).index_add_(0, on(w.root), root)
    found.index_add_(0, on(group[known]), going_on[on(known)])
    found.index_add_(0, on(other[fellows]), others[on(fellows)]).index_add_(0, on(reached), beyond)
    unknown = torch.zeros_like(root).index_add_(0, on(at[fellows]), others[on(fellows)])
    outside = np.flatnonzero(group < 0)
    unknown.index_add_(0, on(reaching), beyond).index_add_(0, on(place[outside]), going_on[on(outside)])
    every = behind.exp() + unknown
    return found, unknown <= _UNKNOWN * every


#: Share of an event's mass of which the row behind may say nothing.
_UNKNOWN = 0.05

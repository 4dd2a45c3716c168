"""Several teachers of one student, each of a family of its own: what they think of a batch, weighted row by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from xtokmap.losses.measured import PairLoss, means
from xtokmap.teachers.scores import Scores
from xtokmap.torch.batch import PairBatch
from xtokmap.torch.logits import Logits
from xtokmap.torch.pair import Pair


@dataclass(frozen=True, eq=False)
class View:
    """What one teacher thinks of a batch of B rows.

    Attributes:
        pair: of student and teacher.
        batch: the rows that it was asked about.
        scores: of these.
        weights: how much it counts in each row of the batch, B.
        at: number of a row that it was asked about -> where it lies in `batch`.
        name: of the teacher, for figures.
    """

    pair: Pair
    batch: PairBatch
    scores: Scores | None
    weights: list[float]
    at: dict[int, int]
    name: str = ""


class Share(NamedTuple):
    """One teacher's loss of rows in which it counts as much.

    Attributes:
        view: whose.
        weight: how much.
        rows: which of the rows, counted among those of the student.
        places: int64, on the CPU; their tokens among those of all rows, flat.
        found: their loss, not weighted.
    """

    view: View
    weight: float
    rows: list[int]
    places: Tensor
    found: PairLoss


def shares(
    views: Sequence[View],
    student: Logits,
    rows: Sequence[int],
    *,
    lengths: Sequence[int] | None = None,
    old_logprobs: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> Iterator[Share]:
    """Each teacher's loss of a micro-batch; the loss is the sum of `weight * found.loss`.

    Args:
        views: of the batch.
        student: the rows that score the micro-batch's tokens, flat.
        rows: the micro-batch's rows, by their numbers in the batch.
        lengths: student tokens of each; None: the first teacher was asked about all rows, and its batch has them.
        old_logprobs: `[len(rows), Ts]`, as `Pair.loss`.
        denominator: as `Pair.loss`.

    Yields:
        For every teacher at least one share, which may be of no rows.
    """
    if lengths is None:
        lengths = [len(views[0].batch.student_ids[views[0].at[b]]) for b in rows]
    for view in views:
        for weight, own in _by_weight([view.weights[b] for b in rows]):
            batch = view.batch.select([view.at[rows[k]] for k in own])
            places = _places(lengths, own)
            old = None
            if old_logprobs is not None:
                old = old_logprobs[torch.tensor(own, dtype=torch.long), : batch.completion_mask.shape[1]]
            student_rows = student.at(places.to(batch.completion_mask.device))
            some = view.pair.loss(student_rows, view.scores, batch, old_logprobs=old, denominator=denominator)
            yield Share(view, weight, own, places, some)


def mixed(found: Iterable[Share], width: int, count: int) -> PairLoss:
    """The loss of several teachers as one, where each row's weights add up to 1.

    Args:
        found: of a micro-batch.
        width: Ts of its batch.
        count: its rows.

    Returns:
        Sums and means are weighted as the losses are; beside them `NAME/nats` and `NAME/bytes` of every teacher.
    """
    found = list(found)
    device = found[0].view.batch.completion_mask.device
    total = torch.stack([share.weight * share.found.loss for share in found]).sum()
    logprobs = torch.zeros(count, width, device=device)
    sums: dict[str, Tensor] = {}
    rows = {name: torch.zeros(count, device=device) for name in ("nats", "bytes")}
    for view, weight, own, _, part in found:
        at = torch.tensor(own, dtype=torch.long, device=device)
        logprobs[at, : part.logprobs.shape[1]] = part.logprobs
        for name, value in part.sums.items():
            if name in rows:
                rows[name].index_add_(0, at, weight * value.float())
                key = f"{view.name}/{name}"
                sums[key] = sums.get(key, 0) + value.sum()
            else:
                sums[name] = sums.get(name, 0) + weight * value
    if any(name.endswith("/nats") for name in sums):
        sums |= rows
    return PairLoss(total, means(sums), logprobs, sums, entropies(found))


def entropies(found: Sequence[Share], count: int | None = None) -> Tensor | None:
    """The entropies of a micro-batch's rows, as `PairLoss.entropy`; None unless the losses have come by all.

    Args:
        found: its shares.
        count: how many rows it has; None: those of the shares.
    """
    parts = [share.found.entropy for share in found]
    covered = len({place for share in found for place in share.places.tolist()})
    count = covered if count is None else count
    if covered < count or any(part is None for part in parts):
        return None
    known = torch.cat([part[:0] for part in parts if part is not None]).new_full((count,), torch.nan)
    for share, part in zip(found, parts, strict=True):
        assert part is not None
        known[share.places.to(known.device)] = part
    return known


def _by_weight(weights: Sequence[float]) -> list[tuple[float, list[int]]]:
    """Rows with the same weight together, those with none left out; at least one group, which may be empty."""
    groups = {w: [k for k, own in enumerate(weights) if own == w] for w in sorted({*weights} - {0.0})}
    return list(groups.items()) or [(0.0, [])]


def _places(lengths: Sequence[int], rows: Sequence[int]) -> Tensor:
    """Where the tokens of some rows lie among those of all, flat."""
    first = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return torch.cat([torch.zeros(0, dtype=torch.long), *(torch.arange(first[k], first[k + 1]) for k in rows)])

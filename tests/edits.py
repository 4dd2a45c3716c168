"""Texts with known edits, and how much of an alignment an edit costs.

The oracle is the table of edit distances of all beginnings and all ends: what a shortest edit leaves alone is right,
and so is what was really left alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import xtokmap
from xtokmap import Kind

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Edited:
    """A text, what became of it, and where each character of it went: -1 for those that are gone."""

    before: str
    after: str
    place: tuple[int, ...]


def edited(rng: random.Random, text: str, edits: int, kinds: str = "rid") -> Edited:
    """`text` with as many characters replaced (r), others put before them (i), or left out (d)."""
    chosen = set(rng.sample(range(len(text)), min(edits, len(text))))
    after: list[str] = []
    place = []
    for k, char in enumerate(text):
        kind = rng.choice(kinds) if k in chosen else ""
        if kind == "r":
            after.append(rng.choice([letter for letter in LETTERS if letter != char]))
        if kind == "i":
            after.append(rng.choice(LETTERS))
        place.append(-1 if kind in ("r", "d") and kind else len(after))
        if place[-1] >= 0:
            after.append(char)
    return Edited(text, "".join(after), tuple(place))


class Distances:
    """Edit distances (insertions, deletions, replacements) of all beginnings and all ends of two texts."""

    def __init__(self, x: str, y: str) -> None:
        self.before, self.after = _table(x, y), _table(x[::-1], y[::-1])
        self.x, self.y, self.shortest = x, y, self.before[len(x)][len(y)]

    def passes(self, i: int, j: int) -> bool:
        """Whether a shortest edit makes the first i characters into the first j."""
        return self.before[i][j] + self.after[len(self.x) - i][len(self.y) - j] == self.shortest

    def keeps(self, i: int, j: int) -> bool:
        """Whether a shortest edit leaves character i alone, as character j."""
        rest = self.after[len(self.x) - i - 1][len(self.y) - j - 1]
        return self.x[i] == self.y[j] and self.before[i][j] + rest == self.shortest


def _table(x: str, y: str) -> list[list[int]]:
    rows = [list(range(len(y) + 1))]
    for i, char in enumerate(x, 1):
        row = [i]
        for j, other in enumerate(y, 1):
            row.append(min(row[j - 1] + 1, rows[-1][j] + 1, rows[-1][j - 1] + (char != other)))
        rows.append(row)
    return rows


@dataclass
class Cost:
    """Of some rows: characters that no edit touched, those of them whose partner is right, and what is wrong."""

    untouched: int = 0
    kept: int = 0
    wrong: int = 0
    lost_tails: int = 0
    rows: int = 0

    @property
    def share(self) -> float:
        return self.kept / self.untouched


#: One token for each byte, so that a chunk is a pair of characters.
BYTES = xtokmap.ByteTable.from_bytes([bytes([byte]) for byte in range(256)])


def cost_in_bytes(rows: Sequence[Edited]) -> Cost:
    """In a vocabulary of bytes: a character is kept if it is ONE_TO_ONE with the one that it became."""
    al, cost = xtokmap.Aligner(BYTES, BYTES), Cost(rows=len(rows))
    batch = al.align_batch([list(r.before.encode()) for r in rows], [list(r.after.encode()) for r in rows])
    for row, a in zip(rows, batch, strict=True):
        found = {c.student.start: c.teacher.start for c in a if c.kind != Kind.REWRITTEN}
        stays = [k for k, place in enumerate(row.place) if place >= 0]
        cost.untouched += len(stays)
        cost.kept += sum(found.get(k) == row.place[k] for k in stays)
        cost.lost_tails += row.place[-1] >= 0 and len(row.before) - 1 not in found
        off = [(i, j) for i, j in found.items() if row.place[i] != j]
        if off:
            distances = Distances(row.before, row.after)
            cost.wrong += sum(not distances.keeps(i, j) for i, j in off)
    return cost


def cost_in_tokens(rows: Sequence[Edited], student: Any, teacher: Any, al: xtokmap.Aligner) -> Cost:
    """With real tokenizers, of ASCII text: a character is kept if its chunk is no longer than its neighborhood.

    That is its student token and the teacher tokens over it, with what else those tokens touch; a REWRITTEN chunk may
    hold them where one of the touched characters was edited. A chunk that ends where no shortest edit passes is wrong.
    """
    cost = Cost(rows=len(rows))
    ids = [student(r.before) for r in rows]
    others = [teacher(r.after) for r in rows]
    for row, a, own, other in zip(rows, al.align_batch(ids, others), ids, others, strict=True):
        x, y = len(row.before), len(row.after)
        # A prefix space is before the text.
        lead, other_lead = a.student_end[-1] - x, a.teacher_end[-1] - y
        assert min(lead, other_lead) >= 0, (own, other)
        chunk_of = [-1] * x
        distances: Distances | None = None
        for g, c in enumerate(a):
            start = 0 if c.student.start == 0 else int(a.student_end[c.student.start - 1]) - lead
            end = (int(a.student_end[c.student.stop - 1]) if len(c.student) else start + lead) - lead
            other_end = int(a.teacher_end[c.teacher.stop - 1]) - other_lead if len(c.teacher) else None
            for k in range(max(start, 0), end):
                chunk_of[k] = g
            # The path of the edits passes between the characters before and behind the end.
            if other_end is None or not len(c.student) or not 0 <= other_end <= y:
                continue
            right = (end == x and other_end == y) or (end < x and row.place[end] == other_end)
            right |= end > 0 and row.place[end - 1] == other_end - 1
            if not right:
                distances = distances or Distances(row.before, row.after)
                cost.wrong += not distances.passes(end, other_end)
        stays = [k for k, place in enumerate(row.place) if place >= 0]
        cost.untouched += len(stays)
        cost.kept += sum(chunk_of[k] >= 0 for k in stays)
        cost.lost_tails += row.place[-1] >= 0 and chunk_of[-1] < 0
    return cost


def texts(rng: random.Random, source: str, length: int, count: int) -> Iterator[str]:
    """Pieces of `source`."""
    for _ in range(count):
        start = rng.randrange(len(source) - length)
        yield source[start : start + length]

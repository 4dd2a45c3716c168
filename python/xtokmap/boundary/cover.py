"""VocabMap and CoverQueries: what two vocabularies are to each other, and the teacher mass behind a token end."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from xtokmap import _core
from xtokmap._core import ByteTable
from xtokmap.boundary.encoding import EncodingRule
from xtokmap.boundary.vocab_map import VocabMap, once
from xtokmap.ids import Bool, Int32, Int64


class Term(NamedTuple):
    """A part of Phi: teacher tokens that could stand at one place.

    Attributes:
        row: the teacher row: the place of the teacher token that it predicts.
        ranges: `[k, 2]`; disjoint `[lo, hi)` ranges of `VocabMap.teacher_order`, rising.
        special: whether tokens without bytes count too.
    """

    row: int
    ranges: Int64
    special: bool


class Sets(NamedTuple):
    """Sets of teacher tokens, as compressed rows.

    Attributes:
        indptr: int64 `[n+1]`.
        ids: int32; teacher ids, rising inside a set.
        next: int32; the student token that comes next if this teacher token stands there, -1 where that is not known.
        whole: bool; whether that student token is all that is left of the teacher token.
        complement: bool `[n]`; the set is every token but these.
        fixed: int32 `[n]`; of a complement the student token that comes next whichever stands there, -1 where that is
            not known; -2: the one with which the encoding of that token begins (`VocabMap.canonical`).
    """

    indptr: Int64
    ids: Int32
    next: Int32
    whole: Bool
    complement: Bool
    fixed: Int32


NOT_CANONICAL, FORCED = 1, 2


@dataclass(frozen=True, eq=False, repr=False)
class CoverQueries:
    """For every student token of a batch, which teacher mass makes Phi (the teacher's view of the student's encoding).

    Phi(i) = log of the probability, under the teacher, that the text goes on as the student's tokens up to and with i
    say, in the student's own encoding: the sum over `terms` of the probability of the teacher tokens before `row`,
    times the mass of `set` in that row. log q*(s_i | s_<i) = Phi(i) - Phi(i - 1).

    Attributes:
        indptr: int64 `[M+1]`; the terms of student token i of the flat batch are `indptr[i]:indptr[i+1]`.
        row: int32 `[N]`; the teacher row of every term, counted in its batch row: row k predicts teacher token k, and
            row n is the one after the last token.
        set: int32 `[N]`; the place in `sets`, or `-1 - id` for a single teacher token.
        base: int32 `[M]`; where an unbroken stretch begins, the teacher token it begins with: its first student token
            has log q* = Phi(i) - (teacher logprobs before `base`). -1 inside a stretch, -2 for tokens without a query:
            REWRITTEN chunks, unaligned tokens, and what is left of a chunk that a special token cuts.
        flags: uint8 `[M]`; bit 1: the student's tokenizer would not have put this token beside the next one, so nothing
            is taken to merge there; bit 2: the teacher token that was really there would have been left out, and
            counts.
        student_ids: uint32 `[M]`, flat.
        teacher_ids: uint32, flat.
        student_cu: int64 `[B+1]`.
        teacher_cu: int64 `[B+1]`.
        student_mask: as in the batch.
        vocab_map: of the two vocabularies.
        within: int32 `[M]` or None; for a student token that begins with a teacher token, after which longer student
            tokens may go on, the place in `sets` of the teacher tokens with which they do, each with the student token
            with which both together begin; -1 where there is none. None: it was not asked for.
        identical: whether both sides are one tokenizer, so that the teacher's own rows are the answer.
    """

    indptr: Int64
    row: Int32
    set: Int32
    base: Int32
    flags: npt.NDArray[np.uint8]
    student_ids: npt.NDArray[np.uint32]
    teacher_ids: npt.NDArray[np.uint32]
    student_cu: Int64
    teacher_cu: Int64
    student_mask: Bool | None
    vocab_map: VocabMap
    within: Int32 | None = None
    identical: bool = False
    _sets: _core._Sets | Sets = field(kw_only=True)

    def __len__(self) -> int:
        return len(self.student_cu) - 1

    @once
    def sets(self) -> Sets:
        """The sets that the terms name."""
        return self._sets if isinstance(self._sets, Sets) else Sets(*self._sets.arrays())

    def select(self, rows: Sequence[int]) -> CoverQueries:
        """The queries of some rows, for a micro-batch; the student tokens are then padded on the right."""
        spans = [(self.student_cu[b], self.student_cu[b + 1]) for b in rows]
        others = [(self.teacher_cu[b], self.teacher_cu[b + 1]) for b in rows]
        tokens = np.concatenate([np.arange(a, b) for a, b in spans]) if spans else np.zeros(0, np.int64)
        counts = np.diff(self.indptr)[tokens]
        terms = [np.arange(self.indptr[a], self.indptr[b]) for a, b in spans]
        at = np.concatenate(terms) if terms else np.zeros(0, np.int64)

        def sums(lengths: Int64) -> Int64:
            return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])

        return replace(
            self,
            indptr=sums(counts),
            row=self.row[at],
            set=self.set[at],
            base=self.base[tokens],
            flags=self.flags[tokens],
            student_ids=self.student_ids[tokens],
            teacher_ids=np.concatenate([self.teacher_ids[:0], *(self.teacher_ids[a:b] for a, b in others)]),
            within=None if self.within is None else self.within[tokens],
            student_cu=sums(np.diff(self.student_cu)[list(rows)]),
            teacher_cu=sums(np.diff(self.teacher_cu)[list(rows)]),
            student_mask=None,
            _sets=self.sets,
        )

    def places(self) -> tuple[Int64, tuple[int, int]]:
        """Where the flat student tokens lie in `[B, Ts]`: int64 `[M]` flat positions, and (B, Ts)."""
        width = (
            int(np.diff(self.student_cu).max(initial=0)) if self.student_mask is None else self.student_mask.shape[1]
        )
        return padded_places(self.student_cu, self.student_mask), (len(self), width)

    def terms(self, i: int) -> list[Term]:
        """The terms of student token i of the flat batch, as ranges of the byte-sorted teacher vocabulary."""
        order = self.vocab_map.teacher_order
        place = np.full(max(len(self.vocab_map.teacher_to_student), 1), -1, np.int64)
        place[order] = np.arange(len(order))
        terms = []
        for k in range(self.indptr[i], self.indptr[i + 1]):
            s = int(self.set[k])
            ids = np.asarray([-1 - s]) if s < 0 else self.sets.ids[self.sets.indptr[s] : self.sets.indptr[s + 1]]
            at = np.sort(place[ids][place[ids] >= 0])
            special = bool(len(at) < len(ids))
            if s >= 0 and self.sets.complement[s]:
                at, special = np.setdiff1d(np.arange(len(order)), at), True
            cuts = np.flatnonzero(np.diff(at) != 1) + 1
            runs = [run for run in np.split(at, cuts) if len(run)]
            ranges = np.asarray([(run[0], run[-1] + 1) for run in runs], np.int64).reshape(-1, 2)
            terms.append(Term(int(self.row[k]), ranges, special))
        return terms

    def figures(self) -> dict[str, int]:
        """Counts of student tokens: all, with a query, first of a stretch, not canonical, forced (see `flags`)."""
        return {
            "tokens": len(self.base),
            "queries": int((self.base > -2).sum()),
            "stretches": int((self.base >= 0).sum()),
            "not_canonical": int((self.flags & NOT_CANONICAL > 0).sum()),
            "forced": int((self.flags & FORCED > 0).sum()),
        }

    def __repr__(self) -> str:
        return f"CoverQueries({', '.join(f'{name}={n}' for name, n in self.figures().items())})"


def padded_places(cu: Int64, mask: Bool | None, width: int | None = None) -> Int64:
    """Where the flat tokens of ragged or masked rows lie in `[B, T]`: int64 flat positions."""
    if mask is not None:
        return np.flatnonzero(mask)
    lengths = np.diff(cu)
    row = np.repeat(np.arange(len(lengths)), lengths)
    places: Int64 = row * int(width or lengths.max(initial=0)) + np.arange(len(row)) - cu[:-1][row]
    return places


class Transfer:
    """The encoding rules of a pair of tokenizers, and what follows from them; made when it is first asked for."""

    def __init__(
        self,
        student: Any,
        student_table: ByteTable,
        teacher: Any,
        teacher_table: ByteTable,
        pairs: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.rule = EncodingRule(student, student_table)
        # The teacher's own rule only matters where it may be the student's; specials may have been added to either.
        n = min(len(student_table), len(teacher_table))
        same = bool(np.array_equal(student_table.lengths[:n], teacher_table.lengths[:n]))
        teacher_rule = EncodingRule(teacher if same else teacher_table, teacher_table)
        own = teacher_rule if same else EncodingRule(teacher, teacher_table, classes=False)
        letter = _letter((self.rule, student_table), (own, teacher_table))
        pieces = self.rule.pieces(teacher_table, letter)
        self.core = _core.Cover(self.rule.core, teacher_rule.core, pieces, ord(letter) if letter else None)
        names = _names(student), _names(teacher)
        arrays = self.core.vocab_map()
        for s, t in pairs:  # the first tokens of two markers are the same event, whatever they spell
            for name in ("teacher_to_student", "canonical", "prefix"):
                arrays[name][t] = s
            for name in ("student_to_teacher", "teacher_first"):
                arrays[name][s] = t
        ends = student_table.stop_ids, teacher_table.stop_ids
        self._doubt = not self.core.same and self.rule.counts_from_the_right()
        self.vocab_map = VocabMap(
            **arrays,
            student_stops=tuple(i for i in ends[0] if i not in {s for s, _ in pairs}),
            teacher_stops=tuple(i for i in ends[1] if i not in {t for _, t in pairs}),
            _names=None if names[0] is None or names[1] is None else (names[0], names[1]),
        )

    def queries(
        self,
        batch: Any,
        students: npt.NDArray[np.uint32],
        teachers: npt.NDArray[np.uint32],
        rows: bool,
        threads: int | None,
    ) -> CoverQueries:
        """The queries of an `AlignmentBatch` whose flat ids are given; `rows`: with `within`."""
        if self._doubt:
            self._doubt = False
            warnings.warn(
                "the student's tokenizer groups digits from the right (1|11, 11|11), so that how it cuts a number is "
                "decided by digits that are still to come: cover and transfer_kl are wrong inside numbers, where a "
                "student can unlearn to count; give it a tokenizer that groups them from the left, or take prior",
                stacklevel=3,
            )
        self.rule.learn(students)
        arrays, cu = batch._core_arguments()
        found = self.core.queries(arrays, cu, students, teachers, rows, threads)
        return CoverQueries(
            **{name: found[name] for name in ("indptr", "row", "set", "base", "flags")},
            student_ids=students,
            teacher_ids=teachers,
            within=found["within"] if rows else None,
            student_cu=batch.student_cu,
            teacher_cu=batch.teacher_cu,
            student_mask=batch.student_mask,
            vocab_map=self.vocab_map,
            identical=self.core.same,
            _sets=found["sets"],
        )


def _letter(student: tuple[EncodingRule, ByteTable], teacher: tuple[EncodingRule, ByteTable]) -> str:
    """A letter that says how white space is cut where a word stands behind it; none where that makes no difference.

    A teacher that keeps runs of spaces whole ("   ", "x") puts words behind them, and nothing else but the end of a
    line; a student that gives the last space to the word ("  ", " x") cuts them as what comes behind says.
    """
    single = [{table[i] for i in np.flatnonzero(table.lengths == 1).tolist()} for _, table in (student, teacher)]
    letter = next((c for c in ascii_lowercase if c.encode() in single[0] & single[1]), "")
    differs = letter and student[0].takes_a_space(letter) and not teacher[0].takes_a_space(letter)
    return letter if differs else ""


def _names(tokenizer: Any) -> Mapping[str, int] | None:
    """Vocabulary strings, where the tokenizer has them and they can be read at once."""
    if isinstance(tokenizer, (str, os.PathLike)) and str(tokenizer).endswith("tokenizer.json"):
        vocab = json.loads(Path(tokenizer).read_bytes())["model"]["vocab"]
        return vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    get_vocab = getattr(tokenizer, "get_vocab", None)
    names: Mapping[str, int] | None = get_vocab() if get_vocab is not None else None
    return names

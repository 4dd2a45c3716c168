"""Alignment and AlignmentBatch: the chunks of two token sequences that spell the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from xtokmap import _core
from xtokmap._core import ByteTable, XTokMapError
from xtokmap.ids import Bool, Int32, Int64, _offsets


class Kind(IntEnum):
    """What the two sides of a chunk are to each other."""

    ONE_TO_ONE = _core.KINDS["ONE_TO_ONE"]
    ONE_TO_MANY = _core.KINDS["ONE_TO_MANY"]
    MANY_TO_ONE = _core.KINDS["MANY_TO_ONE"]
    MANY_TO_MANY = _core.KINDS["MANY_TO_MANY"]
    REWRITTEN = _core.KINDS["REWRITTEN"]
    STOP = _core.KINDS["STOP"]
    MARKER = _core.KINDS["MARKER"]


class Chunk(NamedTuple):
    """One chunk: positions of its tokens on both sides, the student's bytes, and its kind.

    `text` is None where the alignment was made from offsets, without bytes.
    """

    student: range
    teacher: range
    text: bytes | None
    kind: Kind


class Overlaps(NamedTuple):
    """Which teacher tokens each student token shares bytes with, as compressed rows.

    Attributes:
        indptr: int64 `[m+1]`; student token i has the entries `indptr[i]:indptr[i+1]`.
        indices: int32 `[nnz]`; the teacher token of every entry.
        nbytes: int32 `[nnz]`; how many bytes the two share.
    """

    indptr: Int64
    indices: Int32
    nbytes: Int32


@dataclass(frozen=True, eq=False)
class InteriorQueries:
    """What can follow inside a teacher token, for every student token that starts inside one; as compressed rows.

    c stands for the bytes of the teacher token that lie before the student token. Query k has the entries
    `indptr[k]:indptr[k+1]`.

    Attributes:
        position: int64 `[Q]`, rising; the student token, as the flat position `b * Ts + i`.
        teacher_row: int64 `[Q]`; the teacher token in which it starts, as `b * Tt + j`.
        indptr: int64 `[Q+1]`.
        teacher_ids: int32 `[nnz]`; the teacher's tokens that go on behind c.
        student_ids: int32 `[nnz]`; the longest student token that what follows c in them begins with, -1 for none.
        prefix_range: int64 `[Q, 2]` or None; where in the byte-sorted teacher ids the tokens are that begin with c,
            one that is c itself among them. Student tokens that span several teacher tokens need it.
    """

    position: Int64
    teacher_row: Int64
    indptr: Int64
    teacher_ids: Int32
    student_ids: Int32
    prefix_range: Int64 | None = None


_Arrays: TypeAlias = tuple[npt.NDArray[Any], ...]


class _Bytes(NamedTuple):
    """What it takes to spell the tokens of an alignment; the ids of a batch are as they were given, padding and all."""

    student: ByteTable
    student_ids: npt.NDArray[Any]
    teacher: ByteTable
    teacher_ids: npt.NDArray[Any]


@dataclass(eq=False, repr=False)
class Alignment:
    """The alignment of one row: m student tokens, n teacher tokens, G chunks.

    Attributes:
        student_ptr: int32 `[G+1]`; chunk g starts at student token `student_ptr[g]`.
        teacher_ptr: int32 `[G+1]`; the same for the teacher. Tokens without bytes may lie between the tokens of a
            chunk and of the next one; go by `student_chunk` and `teacher_chunk` to leave them out.
        kind: uint8 `[G]`; a `Kind` each.
        student_chunk: int32 `[m]`; the chunk of every student token, -1 where unaligned.
        teacher_chunk: int32 `[n]`; the chunk of every teacher token, -1 where unaligned.
        student_end: int32 `[m]`; byte end of every student token, in the student's own bytes.
        teacher_end: int32 `[n]`; byte end of every teacher token, in the teacher's own bytes.
        teacher_pos: int32 `[m]`; the teacher token in which student token i starts; -1 where unaligned, and
            inside a REWRITTEN chunk, where it is known for the first token only.
        teacher_off: int32 `[m]`; the byte inside that teacher token, -1 where `teacher_pos` is.
    """

    student_ptr: Int32
    teacher_ptr: Int32
    kind: npt.NDArray[np.uint8]
    student_chunk: Int32
    teacher_chunk: Int32
    student_end: Int32
    teacher_end: Int32
    teacher_pos: Int32
    teacher_off: Int32
    _bytes: _Bytes | None = field(default=None, kw_only=True)
    #: Where the tokens of both sides start, if they leave gaps or overlap.
    _starts: tuple[Int32, Int32] | None = field(default=None, kw_only=True)

    @property
    def num_chunks(self) -> int:
        """Number of chunks G."""
        return len(self.kind)

    def __len__(self) -> int:
        return len(self.kind)

    def __iter__(self) -> Iterator[Chunk]:
        for g, kind in enumerate(self.kind):
            student = _positions(self.student_chunk, self.student_ptr, g)
            teacher = _positions(self.teacher_chunk, self.teacher_ptr, g)
            text = None
            if self._bytes is not None:
                text = self._bytes.student.decode(self._bytes.student_ids[student.start : student.stop].tolist())
            yield Chunk(student, teacher, text, Kind(kind))

    def __repr__(self) -> str:
        return _repr(self, f"{len(self.student_chunk)} student and {len(self.teacher_chunk)} teacher tokens")

    def _repr_html_(self) -> str:
        """What a notebook shows: as `html`, the first chunks of a long row."""
        return _notebook([("", self)], 1)

    def html(
        self,
        *,
        logprobs: tuple[Sequence[float], Sequence[float]] | None = None,
        advantages: Sequence[float] | None = None,
        names: tuple[Callable[[int], str], Callable[[int], str]] | None = None,
        title: str = "Alignment",
    ) -> str:
        """A page that shows both tokenizations under each other, chunks colored by kind; it needs nothing but itself.

        Args:
            logprobs: of the m student and the n teacher tokens, in nats; shown under them, NaN as a dash.
            advantages: of the m student tokens.
            names: what both sides call an id without bytes, such as `tokenizer.convert_ids_to_tokens`.
            title: of the page.

        Raises:
            XTokMapError: logprobs or advantages that are not one for each token.
        """
        from xtokmap.columns import columns
        from xtokmap.view import page

        return page([(_size(self), columns(self, names, logprobs, advantages))], title)

    def _as_batch(self) -> AlignmentBatch:
        counts = {"student_cu": len(self.student_chunk), "teacher_cu": len(self.teacher_chunk), "chunk_cu": len(self)}
        arrays: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "_starts"}
        arrays.update({name: np.asarray([0, n], np.int64) for name, n in counts.items()})
        return AlignmentBatch(**arrays)

    @property
    def scored(self) -> Bool:
        """bool `[m]`: student tokens in a chunk that has teacher tokens, so that they can receive a signal."""
        return _scored(self.student_chunk, self.teacher_chunk, self.num_chunks)

    @property
    def coverage(self) -> float:
        """Share of the student tokens that can receive a teacher signal; 1.0 for an empty row."""
        return _share(self.scored)

    def coverage_by_kind(self) -> dict[Kind, float]:
        """Share of the student tokens in chunks of each kind. What is missing to 1 is unaligned."""
        return _by_kind(self.student_chunk, self.kind)

    def overlaps(self) -> Overlaps:
        """For every student token the teacher tokens with which it shares bytes, and how many bytes.

        REWRITTEN chunks have no entries: which byte became which is not known inside. The tokens of a STOP or MARKER
        chunk are listed with 0 bytes.
        """
        return Overlaps(*_core.overlaps(_arrays(self), self._starts))

    def map_spans(self, spans: Any, to: str = "teacher", mode: str = "cover") -> Int64:
        """Token spans of one side -> token spans of the other, in bulk.

        Args:
            spans: `[k, 2]` integers; (start, stop) positions of tokens of the side that `to` is not.
            to: "teacher" or "student".
            mode: "cover": the smallest span that holds all bytes of the given one; "inside": the largest span that
                holds no other bytes. A REWRITTEN chunk is only taken whole.

        Returns:
            int64 `[k, 2]`; -1, -1 where there is none. Unaligned tokens are passed over.

        Raises:
            XTokMapError: a span outside the tokens, another shape, an unknown side or mode.
        """
        if to not in ("teacher", "student"):
            raise XTokMapError(f"to={to!r}: use 'teacher' or 'student'")
        if mode not in ("cover", "inside"):
            raise XTokMapError(f"mode={mode!r}: use 'cover' or 'inside'")
        array = _offsets(spans, "spans")
        return _core.map_spans(_arrays(self), self._starts, array, to == "teacher", mode == "cover")


def align_offsets(student_offsets: Any, teacher_offsets: Any) -> Alignment:
    """Align two lists of spans over one text; no vocabulary is needed.

    Chunks are the smallest groups in which spans overlap only each other. Spans may leave gaps, and tokens that share
    a character may have equal spans. Empty spans, and those that overlap nothing, are unaligned.

    Args:
        student_offsets: `[m, 2]` sorted (start, stop) spans, in bytes or in characters.
        teacher_offsets: `[n, 2]`, in the same unit.

    Raises:
        XTokMapError: spans that are not sorted, negative, beyond 2^31, or of another shape.
    """
    arrays, starts = _core.align_offsets(
        _offsets(student_offsets, "student_offsets"), _offsets(teacher_offsets, "teacher_offsets")
    )
    return Alignment(*arrays, _starts=starts)


def get_alignments(tokens_a: Sequence[str], tokens_b: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
    """For every token of `tokens_a` the tokens of `tokens_b` that share characters with it, and the other way round.

    A drop-in for `tokenizations.get_alignments` and `spacy_alignments.get_alignments`: case and compatibility forms
    (NFKD) are ignored, and where the texts differ a shortest edit (Myers) decides.

    Returns:
        a2b (a list of positions for each token of `tokens_a`) and b2a.
    """
    return _core.get_alignments(list(tokens_a), list(tokens_b))


@dataclass(eq=False, repr=False)
class AlignmentBatch:
    """The alignments of B rows, flat: row after row, values local to the row.

    The fields are those of `Alignment`, concatenated; they are views of one piece of memory, which the aligner uses
    again once nothing looks at it any more. `student_ptr` and `teacher_ptr` hold `G_b + 1` entries for row
    b: row b is `[chunk_cu[b] + b : chunk_cu[b+1] + b + 1]`.

    Attributes:
        student_cu: int64 `[B+1]`; student tokens before each row, padding left out.
        teacher_cu: int64 `[B+1]`; teacher tokens before each row.
        chunk_cu: int64 `[B+1]`; chunks before each row.
        student_mask: bool `[B, Ts]` or None; where padded student ids had their tokens. None: ragged input, which
            index tensors pad on the right.
        teacher_mask: bool `[B, Tt]` or None; the same for the teacher.
    """

    student_ptr: Int32
    teacher_ptr: Int32
    kind: npt.NDArray[np.uint8]
    student_chunk: Int32
    teacher_chunk: Int32
    student_end: Int32
    teacher_end: Int32
    teacher_pos: Int32
    teacher_off: Int32
    student_cu: Int64
    teacher_cu: Int64
    chunk_cu: Int64
    student_mask: Bool | None = None
    teacher_mask: Bool | None = None
    _bytes: _Bytes | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.chunk_cu) - 1

    def __getitem__(self, row: int) -> Alignment:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of a batch of {len(self)}")
        row %= len(self)
        chunks = slice(self.chunk_cu[row], self.chunk_cu[row + 1])
        ptr = slice(chunks.start + row, chunks.stop + row + 1)
        student = slice(self.student_cu[row], self.student_cu[row + 1])
        teacher = slice(self.teacher_cu[row], self.teacher_cu[row + 1])
        spelled = self._bytes and self._bytes._replace(
            student_ids=_row(self._bytes.student_ids, self.student_mask, row, student),
            teacher_ids=_row(self._bytes.teacher_ids, self.teacher_mask, row, teacher),
        )
        return Alignment(
            student_ptr=self.student_ptr[ptr],
            teacher_ptr=self.teacher_ptr[ptr],
            kind=self.kind[chunks],
            student_chunk=self.student_chunk[student],
            teacher_chunk=self.teacher_chunk[teacher],
            student_end=self.student_end[student],
            teacher_end=self.teacher_end[teacher],
            teacher_pos=self.teacher_pos[student],
            teacher_off=self.teacher_off[student],
            _bytes=spelled,
        )

    def __iter__(self) -> Iterator[Alignment]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        tokens = f"{len(self.student_chunk)} student and {len(self.teacher_chunk)} teacher tokens"
        return _repr(self, f"{len(self)} rows, {tokens}")

    def _repr_html_(self) -> str:
        """What a notebook shows: the first rows, and how many that are."""
        return _notebook([(f"row {k}: ", self[k]) for k in range(min(len(self), _ROWS))], len(self))

    @property
    def num_chunks(self) -> int:
        """Number of chunks of all rows."""
        return len(self.kind)

    @property
    def scored(self) -> Bool:
        """bool, flat: student tokens in a chunk that has teacher tokens."""
        return _scored(self._global("student"), self._global("teacher"), self.num_chunks)

    @property
    def coverage(self) -> float:
        """Share of all student tokens that can receive a teacher signal; 1.0 for an empty batch."""
        return _share(self.scored)

    def coverage_by_kind(self) -> dict[Kind, float]:
        """Share of all student tokens in chunks of each kind. What is missing to 1 is unaligned."""
        return _by_kind(self._global("student"), self.kind)

    def _flat_ids(self) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
        """Both sides' ids without padding."""
        assert self._bytes is not None
        sides = ((self._bytes.student_ids, self.student_mask), (self._bytes.teacher_ids, self.teacher_mask))
        student, teacher = (ids if mask is None else ids.reshape(mask.shape)[mask] for ids, mask in sides)
        return np.ascontiguousarray(student, np.uint32), np.ascontiguousarray(teacher, np.uint32)

    def _core_arguments(self) -> tuple[_Arrays, tuple[Int64, Int64, Int64]]:
        """The batch as the core takes it."""
        return _arrays(self), (self.student_cu, self.teacher_cu, self.chunk_cu)

    def _global(self, side: str) -> Int64:
        """The chunk of every token of one side, counted over the whole batch; -1 where unaligned."""
        chunk, cu = getattr(self, f"{side}_chunk"), getattr(self, f"{side}_cu")
        first = np.repeat(self.chunk_cu[:-1], np.diff(cu))
        return np.where(chunk < 0, -1, chunk + first)


#: The nine arrays of an Alignment or an AlignmentBatch, in the core's order.
_arrays: Callable[[Alignment | AlignmentBatch], _Arrays] = attrgetter(*_core.ARRAYS)


#: What a notebook shows at most: rows of a batch, and chunks in all.
_ROWS, _CHUNKS = 8, 2000


def _notebook(rows: list[tuple[str, Alignment]], of: int) -> str:
    from xtokmap.columns import columns
    from xtokmap.view import fragment

    left, shown, cut = _CHUNKS, [], False
    for about, row in rows:
        if left <= 0:
            break
        more = f"; its first {left:,} chunks" if len(row) > left else ""
        shown.append((f"{about}{_size(row)}{more}", columns(row, first=left)))
        left, cut = left - len(row), bool(more)
    notes = [f"{len(shown)} of {of:,} rows are shown; `batch[i]` is a row"] if of != len(shown) else []
    notes += ["`html()` of a row makes a page of all its chunks"] if cut else []
    return fragment(shown, "; ".join(notes))


def _size(row: Alignment) -> str:
    tokens = f"{len(row.student_chunk):,} student and {len(row.teacher_chunk):,} teacher tokens"
    return f"{tokens}, {len(row):,} chunks; coverage {row.coverage:.1%}"


def _row(ids: npt.NDArray[Any], mask: Bool | None, row: int, tokens: slice) -> npt.NDArray[Any]:
    """The ids of one row of a batch, without padding."""
    return ids[tokens] if mask is None else ids.reshape(mask.shape)[row][mask[row]]


def _positions(chunk: Int32, ptr: Int32, g: int) -> range:
    """Where the tokens of chunk g lie: from its first token to its last."""
    start, stop = int(ptr[g]), int(ptr[g + 1])
    while stop > start and chunk[stop - 1] != g:
        stop -= 1
    return range(start, stop)


def _scored(student_chunk: npt.NDArray[Any], teacher_chunk: npt.NDArray[Any], chunks: int) -> Bool:
    has_teacher = np.zeros(chunks + 1, dtype=np.bool_)  # one more, for -1
    has_teacher[teacher_chunk] = True
    has_teacher[-1] = False
    scored: Bool = has_teacher[student_chunk]
    return scored


def _share(flags: Bool) -> float:
    return float(flags.mean()) if flags.size else 1.0


def _by_kind(student_chunk: npt.NDArray[Any], kinds: npt.NDArray[np.uint8]) -> dict[Kind, float]:
    counts = np.bincount(kinds[student_chunk[student_chunk >= 0]], minlength=len(Kind))
    return {kind: float(counts[kind] / max(student_chunk.size, 1)) for kind in Kind}


def _repr(alignment: Alignment | AlignmentBatch, size: str) -> str:
    counts = np.bincount(alignment.kind, minlength=len(Kind))
    kinds = ", ".join(f"{counts[kind]} {kind.name}" for kind in Kind if counts[kind])
    name = type(alignment).__name__
    return f"{name}({size}; {alignment.num_chunks} chunks: {kinds or 'none'}; coverage {alignment.coverage:.3f})"

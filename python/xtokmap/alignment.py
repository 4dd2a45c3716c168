"""Aligner, Alignment, AlignmentBatch: chunks of two token sequences that spell the same bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from numpy.ma import MaskedArray  # now: an import that a fork interrupts in another thread never ends

from xtokmap import _core
from xtokmap._core import ByteTable, XTokMapError
from xtokmap.cover import CoverQueries, Transfer, VocabMap, once, padded_places
from xtokmap.tokenizers import TextCodec, byte_table, text_codec

Int32: TypeAlias = npt.NDArray[np.int32]
Int64: TypeAlias = npt.NDArray[np.int64]
Bool: TypeAlias = npt.NDArray[np.bool_]
#: One row of token ids: a list, a numpy array or a torch CPU tensor of integers, 1-D.
Ids: TypeAlias = Any


class Kind(IntEnum):
    """What the two sides of a chunk are to each other."""

    ONE_TO_ONE = _core.KINDS["ONE_TO_ONE"]
    ONE_TO_MANY = _core.KINDS["ONE_TO_MANY"]
    MANY_TO_ONE = _core.KINDS["MANY_TO_ONE"]
    MANY_TO_MANY = _core.KINDS["MANY_TO_MANY"]
    REWRITTEN = _core.KINDS["REWRITTEN"]
    STOP = _core.KINDS["STOP"]


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


class _Bytes(NamedTuple):
    """What it takes to spell the tokens of an alignment; the ids of a batch are as they were given, padding and all."""

    student: ByteTable
    student_ids: npt.NDArray[Any]
    teacher: ByteTable
    teacher_ids: npt.NDArray[Any]


@dataclass(frozen=True, eq=False, repr=False)
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

        REWRITTEN chunks have no entries: which byte became which is not known inside. The two tokens of a STOP chunk
        are listed with 0 bytes.
        """
        return Overlaps(*_core.overlaps(self))

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
        return _core.map_spans(self, array, to == "teacher", mode == "cover")


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
    arrays: dict[str, Any] = _core.align_offsets(
        _offsets(student_offsets, "student_offsets"), _offsets(teacher_offsets, "teacher_offsets")
    )
    return Alignment(**arrays)


def get_alignments(tokens_a: Sequence[str], tokens_b: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
    """For every token of `tokens_a` the tokens of `tokens_b` that share characters with it, and the other way round.

    A drop-in for `tokenizations.get_alignments` and `spacy_alignments.get_alignments`: case and compatibility forms
    (NFKD) are ignored, and where the texts differ a shortest edit (Myers) decides.

    Returns:
        a2b (a list of positions for each token of `tokens_a`) and b2a.
    """
    return _core.get_alignments(list(tokens_a), list(tokens_b))


@dataclass(frozen=True, eq=False, repr=False)
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

    def _global(self, side: str) -> Int64:
        """The chunk of every token of one side, counted over the whole batch; -1 where unaligned."""
        chunk, cu = getattr(self, f"{side}_chunk"), getattr(self, f"{side}_cu")
        first = np.repeat(self.chunk_cu[:-1], np.diff(cu))
        return np.where(chunk < 0, -1, chunk + first)


class Aligner:
    """Aligns token ids of a student's and of a teacher's vocabulary.

    Args:
        student: a `ByteTable`, or anything that `byte_table` reads.
        teacher: the same; `retokenize` needs a tokenizer that can encode.

    Raises:
        UnsupportedTokenizerError: a tokenizer whose tokens' bytes cannot be known exactly.
    """

    def __init__(self, student: Any, teacher: Any) -> None:
        self.student = byte_table(student)
        self.teacher = byte_table(teacher)
        self._core = _core.Aligner(self.student, self.teacher)
        self._student_source, self._teacher_source = student, teacher
        self._codec: TextCodec | None = None

    def align(self, student_ids: Ids, teacher_ids: Ids, *, strict: bool = False) -> Alignment:
        """Align one row.

        Args:
            student_ids: m ids; a list, a numpy array or a torch CPU tensor, 1-D; int32, int64 or uint32.
            teacher_ids: n ids, likewise.
            strict: raise where the bytes differ, instead of putting the changed stretch in a REWRITTEN chunk.

        Raises:
            TokenIdError: an id outside its vocabulary.
            ByteMismatchError: the sides spell different bytes and `strict` is set.
            XTokMapError: ids that are no 1-D integers.
        """
        student = _Rows.of_one(student_ids, "student_ids")
        teacher = _Rows.of_one(teacher_ids, "teacher_ids")
        arrays = self._core.align_batch(student.ids, student.layout, teacher.ids, teacher.layout, strict, 1)
        spelled = _Bytes(self.student, student.ids, self.teacher, teacher.ids)
        return _made(Alignment, dict(zip(_FIELDS[:9], arrays, strict=False), _bytes=spelled))

    def align_batch(
        self,
        student_ids: Any,
        teacher_ids: Any,
        student_mask: Any = None,
        teacher_mask: Any = None,
        *,
        student_cu: Any = None,
        teacher_cu: Any = None,
        strict: bool = False,
        threads: int | None = None,
    ) -> AlignmentBatch:
        """Align B rows, over all cores and without the GIL.

        Args:
            student_ids: a sequence of B rows as `align` takes them, a padded `[B, Ts]` array or CPU tensor, or, with
                `student_cu`, the tokens of all rows in one flat row. Arrays and tensors are not copied.
            teacher_ids: likewise; the sides need not have the same form.
            student_mask: `[B, Ts]` bool or 0/1, for padded ids: which of them are tokens. None: all.
            teacher_mask: `[B, Tt]`, likewise.
            student_cu: `[B+1]` int32 or int64, for flat ids: row b is `student_ids[student_cu[b] : student_cu[b+1]]`
                (`cu_seqlens` of flash-attention).
            teacher_cu: `[B+1]`, likewise.
            strict: raise where the bytes differ.
            threads: number of threads, of which more than 64 are only made where there are as many cores; None follows
                `RAYON_NUM_THREADS`, or takes every core. A process that is forked has threads of its own.

        Raises:
            TokenIdError, ByteMismatchError, XTokMapError: as `align`, naming the row; also for a mask or `cu` that does
                not fit, for both of them, and for sides with different numbers of rows.
        """
        student = _Rows.of_batch(student_ids, student_mask, student_cu, "student")
        teacher = _Rows.of_batch(teacher_ids, teacher_mask, teacher_cu, "teacher")
        return self._align(student, teacher, strict=strict, threads=threads)

    def retokenize(
        self,
        student_ids: Any,
        student_mask: Any = None,
        *,
        student_cu: Any = None,
        stop_id: int | None = None,
        threads: int | None = None,
    ) -> tuple[list[Int64], AlignmentBatch]:
        """Student completions -> what the teacher is given for them, and the alignment of the two, in bulk.

        The text is what the student's own decoder makes of its ids: what is not UTF-8 becomes U+FFFD, as often as
        `byte_table` says. The student's ids are aligned as sampled. Where a student row has an end-of-turn token the
        teacher's row gets the teacher's own, and the two form a STOP chunk.

        Args:
            student_ids: B rows, as `align_batch` takes them.
            student_mask: as for `align_batch`.
            student_cu: as for `align_batch`.
            stop_id: the teacher's end of turn; None takes the first of `teacher.stop_ids`, if there is one.
            threads: as for `align_batch`.

        Returns:
            B int64 arrays of teacher ids, and the `AlignmentBatch`.

        Raises:
            UnsupportedTokenizerError: the teacher was given as something that cannot encode (a `ByteTable`).
            XTokMapError: a `stop_id` that is none of the teacher's stop ids.
        """
        student = _Rows.of_batch(student_ids, student_mask, student_cu, "student")
        teacher = self._encode(student, stop_id, threads)
        batch = self._align(student, teacher, strict=False, threads=threads)
        return teacher.split(), batch

    def teacher_ids(
        self,
        student_ids: Any,
        student_mask: Any = None,
        *,
        student_cu: Any = None,
        stop_id: int | None = None,
        threads: int | None = None,
    ) -> list[Int64]:
        """The first half of `retokenize`: what the teacher is given, without the alignment."""
        student = _Rows.of_batch(student_ids, student_mask, student_cu, "student")
        return self._encode(student, stop_id, threads).split()

    @property
    def vocab_map(self) -> VocabMap:
        """What the tokens of the two vocabularies are to each other; worked out when it is first asked for."""
        return self._transfer.vocab_map

    @property
    def student_rule(self) -> str:
        """How the student's tokenizer cuts, as far as `cover_queries` follows it: bpe, unigram or longest match."""
        return self._transfer.rule.name

    def cover_queries(self, batch: AlignmentBatch | Alignment, *, threads: int | None = None) -> CoverQueries:
        """For every student token, which teacher mass makes log q* of it: the teacher's view of the student's encoding.

        A teacher scores its own encoding of the finished text, whose boundaries say what did not come next; every
        credit that takes its logprobs as they are inherits that (tokenization bias, arXiv 2406.16829). What these
        queries name is the repair: the mass of all teacher tokens that could have stood there and leave the student
        its token. `LocalTeacher.score` evaluates them.

        The rule by which the student's tokenizer cuts is followed on the bytes of two neighbours (`EncodingRule`); what
        repeats is kept, so that known tokens cost about as much as their alignment.

        Args:
            batch: from this aligner.
            threads: as for `align_batch`.

        Raises:
            XTokMapError: an alignment that was made without ids (`align_offsets`) or by another aligner.
        """
        self._check_own(batch, "cover_queries")
        if isinstance(batch, Alignment):
            batch = batch._as_batch()
        return self._transfer.queries(batch, *batch._flat_ids(), threads)

    def interior_queries(self, batch: AlignmentBatch, *, width: int | None = None) -> InteriorQueries:
        """What can follow inside the teacher tokens of a batch, for `losses.byte_kl`.

        Args:
            batch: from this aligner.
            width: Ts of the student's rows where that is more than the batch's own; for ragged batches.

        Raises:
            XTokMapError: a batch that this aligner did not make.
        """
        self._check_own(batch, "interior_queries")
        student, teacher, ranges, sets = self._transfer.core.interior(batch, *batch._flat_ids())
        indptr, teacher_ids, following, _, _ = sets.arrays()
        places = (
            padded_places(batch.student_cu, batch.student_mask, width)[student],
            padded_places(batch.teacher_cu, batch.teacher_mask, None)[teacher],
        )
        return InteriorQueries(*places, indptr, teacher_ids, following, ranges)

    def _check_own(self, batch: AlignmentBatch | Alignment, what: str) -> None:
        if batch._bytes is None or (batch._bytes.student, batch._bytes.teacher) != (self.student, self.teacher):
            raise XTokMapError(f"{what} needs a batch that this aligner made: align or retokenize the ids with it")

    @once
    def _transfer(self) -> Transfer:
        return Transfer(self._student_source, self.student, self._teacher_source, self.teacher)

    def _encode(self, student: _Rows, stop_id: int | None, threads: int | None) -> _Rows:
        if self._codec is None:
            self._codec = text_codec(self._teacher_source)
        if stop_id is not None and stop_id not in self.teacher.stop_ids:
            raise XTokMapError(f"stop_id={stop_id} is none of the teacher's stop ids {self.teacher.stop_ids}")
        texts, counts = self._core.student_texts(student.ids, student.layout, threads)
        ids, cu = self._codec.encode_batch(texts)
        # A row's texts are what lies before, between and after its end-of-turn tokens: the teacher's goes between.
        first = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
        inner = np.ones(len(texts) + 1, dtype=np.bool_)
        inner[first] = False
        if stop_id is not None or self.teacher.stop_ids:
            ids = np.insert(ids, cu[inner], self.teacher.stop_ids[0] if stop_id is None else stop_id)
            cu = cu + np.cumsum(inner)
        return _Rows(ids, cu[first])

    def _align(self, student: _Rows, teacher: _Rows, *, strict: bool, threads: int | None) -> AlignmentBatch:
        arrays = self._core.align_batch(student.ids, student.layout, teacher.ids, teacher.layout, strict, threads)
        spelled = _Bytes(self.student, student.ids, self.teacher, teacher.ids)
        masks = {"student_mask": student.mask, "teacher_mask": teacher.mask}
        return _made(AlignmentBatch, dict(zip(_FIELDS, arrays, strict=False), **masks, _bytes=spelled))


class _Rows(NamedTuple):
    """Ids as the core takes them: flat, with `cu_seqlens` or with a mask."""

    ids: npt.NDArray[Any]
    layout: npt.NDArray[Any]
    mask: Bool | None = None

    def split(self) -> list[npt.NDArray[Any]]:
        """The rows of ragged ids, one array each."""
        return np.split(self.ids, self.layout[1:])[:-1]

    @classmethod
    def of_one(cls, ids: Ids, name: str) -> _Rows:
        array = _integers(ids, name)
        if array.ndim != 1:
            raise XTokMapError(
                f"{name}: expected one row of ids (1-D), got shape {array.shape}; use align_batch for a batch"
            )
        return cls(array, np.asarray([0, len(array)], dtype=np.int64))

    @classmethod
    def of_batch(cls, ids: Any, mask: Any, cu: Any, side: str) -> _Rows:
        name = f"{side}_ids"
        if cu is not None:
            if mask is not None:
                raise XTokMapError(
                    f"{side}_mask and {side}_cu: give one of them; a mask goes with padded {name} (2-D), cu_seqlens "
                    "with flat ones (1-D)"
                )
            array = _integers(ids, name)
            if array.ndim != 1:
                raise XTokMapError(f"{side}_cu goes with flat {name} (1-D), got shape {array.shape}")
            ends = _integers(cu, f"{side}_cu", "cu_seqlens")
            if ends.ndim != 1:
                raise XTokMapError(f"{side}_cu: expected cu_seqlens of shape [B+1], got shape {ends.shape}")
            return cls(array, ends.astype(np.int64, copy=False))
        if isinstance(ids, (list, tuple)):
            if mask is not None:
                raise XTokMapError(
                    f"{side}_mask: a mask goes with padded {name} (a 2-D array); {name} is a sequence of rows"
                )
            return cls._of_ragged(ids, name)
        array = _integers(ids, name)
        if array.ndim != 2:
            raise XTokMapError(
                f"{name}: expected a sequence of rows or a padded [B, T] array, got shape {array.shape}; flat ids go "
                f"with {side}_cu"
            )
        if mask is None:
            rows, width = array.shape
            return cls(array.reshape(-1), np.arange(rows + 1, dtype=np.int64) * width)
        flags = _as_numpy(mask, f"{side}_mask")
        if flags.shape != array.shape:
            raise XTokMapError(f"{side}_mask has shape {flags.shape}, {name} has {array.shape}; they must be equal")
        if flags.dtype != np.bool_:
            if flags.dtype.kind not in "iu" or (flags.size and not 0 <= flags.min() <= flags.max() <= 1):
                raise XTokMapError(
                    f"{side}_mask: expected bool or integers 0 and 1, got {flags.dtype}; compare it first (mask > 0)"
                )
            flags = flags.astype(np.bool_)
        flags = np.ascontiguousarray(flags)
        # A view of other bytes as bool: numpy takes every byte but 0 for True, and counts bytes that are 1.
        if (bytes_ := flags.view(np.uint8)).max(initial=0) > 1:
            flags = bytes_ != 0
        # Rows without any column cannot be counted from a flat mask.
        layout = flags if flags.size else np.zeros(len(flags) + 1, dtype=np.int64)
        return cls(array.reshape(-1), layout, flags)

    @classmethod
    def _of_ragged(cls, rows: Sequence[Any], name: str) -> _Rows:
        kinds = set(map(type, rows))
        ids: Any = None
        if kinds <= {list, tuple}:
            try:
                ids = _integers(list(chain.from_iterable(rows)), name)
            except XTokMapError:
                # Say which row it is.
                for b, row in enumerate(rows):
                    cls.of_one(row, f"{name}[{b}]")
                raise
        elif len(kinds) == 1:
            ids = _joined(rows)
        if ids is None or ids.ndim != 1:
            arrays = [cls.of_one(row, f"{name}[{b}]").ids for b, row in enumerate(rows)]
            rows, ids = arrays, np.concatenate(arrays)
        cu = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)), out=cu[1:])
        return cls(_integers(ids, name), cu)


def _joined(rows: Sequence[Any]) -> Any:
    """Arrays or tensors of one type and dtype end to end; None where they must be looked at one by one."""
    torch = sys.modules.get("torch")
    try:
        if len(set(map(attrgetter("dtype"), rows))) > 1:
            return None
        joined = np.concatenate(rows) if type(rows[0]) is np.ndarray else torch and torch.cat(list(rows)).numpy()
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None
    return joined if joined is not None and joined.dtype.kind in "iu" else None


_ID_DTYPES = (np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.uint32))


#: What the core returns, in this order.
_FIELDS = tuple(f.name for f in fields(AlignmentBatch))[:12]
_Made = TypeVar("_Made", Alignment, AlignmentBatch)


def _made(cls: type[_Made], values: dict[str, Any]) -> _Made:
    """As `cls(**values)`, which sets the fields of a frozen dataclass one by one: as long as a short row takes."""
    made = object.__new__(cls)
    made.__dict__.update(values)
    return made


def _row(ids: npt.NDArray[Any], mask: Bool | None, row: int, tokens: slice) -> npt.NDArray[Any]:
    """The ids of one row of a batch, without padding."""
    return ids[tokens] if mask is None else ids.reshape(mask.shape)[row][mask[row]]


def _as_numpy(array: Any, name: str) -> npt.NDArray[Any]:
    """A numpy view of a list, an array or a torch CPU tensor."""
    if type(array) is np.ndarray:
        return array
    if isinstance(array, MaskedArray):
        raise XTokMapError(
            f"{name}: a numpy.ma masked array, whose own mask nothing here looks at; pass its data "
            f"(numpy.ma.getdata), and which of them are tokens (~numpy.ma.getmaskarray) as a mask of bool"
        )
    if hasattr(array, "detach") and hasattr(array, "is_cpu"):
        if not array.is_cpu:
            raise XTokMapError(f"{name}: a tensor on {array.device}; alignment runs on the CPU, pass {name}.cpu()")
        if array.requires_grad:
            raise XTokMapError(f"{name}: a tensor that requires grad cannot be token ids or a mask; pass .detach()")
        try:
            view: npt.NDArray[Any] = array.numpy()
        except TypeError:
            raise XTokMapError(f"{name}: a tensor of {array.dtype}; pass integers, or bool for a mask") from None
        return view
    try:
        return np.asarray(array)
    except ValueError:
        raise XTokMapError(
            f"{name}: lists of different lengths where numbers of one shape are expected; a row is one flat list, and "
            "rows of different lengths go to align_batch as a list of rows"
        ) from None


def _integers(numbers: Any, name: str, what: str = "token ids") -> npt.NDArray[Any]:
    """`numbers` as a contiguous int32, int64 or uint32 array in the machine's byte order."""
    array = _as_numpy(numbers, name)
    if array.dtype in _ID_DTYPES and array.flags.c_contiguous and array.flags.aligned:
        return array
    if array.size == 0 and array.dtype.kind in "fO":
        array = array.astype(np.int64)  # an empty list
    if array.dtype.kind not in "iu":
        odd = array.reshape(-1)[:1].tolist()
        if array.dtype.kind == "O":
            odd = [number for number in array.flat if not isinstance(number, int)][:1]
            if not odd:
                raise XTokMapError(f"{name}: {what} beyond 64 bits; they are larger than any vocabulary or text")
        raise XTokMapError(f"{name}: {what} must be integers, got {array.dtype} {odd}; pass int32, int64 or uint32")
    native = array.dtype.newbyteorder("=")
    if native not in _ID_DTYPES:
        if native == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
            raise XTokMapError(f"{name}: id {array.max()} is larger than any vocabulary")
        native = np.dtype(np.int64)
    array = np.asarray(array, dtype=native, order="C")
    return array if array.flags.aligned else array.copy()


def _offsets(spans: Any, name: str) -> Int64:
    array = _as_numpy(spans, name)
    if array.size == 0:
        return np.zeros((0, 2), dtype=np.int64)
    if array.ndim != 2 or array.shape[1] != 2:
        raise XTokMapError(f"{name}: expected [k, 2] (start, stop) pairs, got shape {array.shape}")
    return _integers(array, name, "spans").astype(np.int64, copy=False)


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

"""Aligner: two vocabularies, and everything that is asked of the pair."""

from __future__ import annotations

from typing import Any

import numpy as np

from xtokmap import _core
from xtokmap._core import ByteTable, XTokMapError
from xtokmap.alignment import Alignment, AlignmentBatch, InteriorQueries, _Bytes
from xtokmap.boundary.cover import CoverQueries, Transfer, padded_places
from xtokmap.boundary.vocab_map import VocabMap, once
from xtokmap.ids import Ids, Int64, _Rows
from xtokmap.tokenizers import byte_table, text_codec
from xtokmap.tokenizers.base import TextCodec


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

    def __getstate__(self) -> tuple[ByteTable, ByteTable, Any, Any]:
        """Its byte tables, so that no tokenizer is read again, and what it was given, which encodes."""
        return self.student, self.teacher, self._student_source, self._teacher_source

    def __setstate__(self, state: tuple[ByteTable, ByteTable, Any, Any]) -> None:
        self.student, self.teacher, self._student_source, self._teacher_source = state
        self._core = _core.Aligner(self.student, self.teacher)

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
        return Alignment(*arrays[:9], _bytes=spelled)

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

        The rule by which the student's tokenizer cuts is followed on the bytes of two neighbors (`EncodingRule`); what
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
        student, teacher, ranges, sets = self._transfer.core.interior(*batch._core_arguments(), *batch._flat_ids())
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

    @once
    def _student_codec(self) -> TextCodec:
        return text_codec(self._student_source)

    @once
    def _teacher_codec(self) -> TextCodec:
        return text_codec(self._teacher_source)

    def _encode(self, student: _Rows, stop_id: int | None, threads: int | None) -> _Rows:
        if stop_id is not None and stop_id not in self.teacher.stop_ids:
            raise XTokMapError(f"stop_id={stop_id} is none of the teacher's stop ids {self.teacher.stop_ids}")
        texts, counts = self._core.student_texts(student.ids, student.layout, threads)
        ids, cu = self._teacher_codec.encode_batch(texts)
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
        masks: dict[str, Any] = {"student_mask": student.mask, "teacher_mask": teacher.mask}
        return AlignmentBatch(*arrays, **masks, _bytes=spelled)

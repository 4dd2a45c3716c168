"""Aligner: two vocabularies, and everything that is asked of the pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from xtokmap import _core
from xtokmap._core import XTokMapError
from xtokmap.alignment import Alignment, AlignmentBatch, InteriorQueries, _Bytes
from xtokmap.boundary.cover import CoverQueries, Transfer, padded_places
from xtokmap.boundary.vocab_map import VocabMap, once
from xtokmap.ids import Ids, Int64, _Rows
from xtokmap.markers import Foreign, Piece, Voice, joined, parts, voice_of
from xtokmap.tokenizers import byte_table, text_codec
from xtokmap.tokenizers.base import TextCodec

#: Flags of every row of the student and of the teacher: whether its prompt leaves a thought open.
Thinking: TypeAlias = tuple[Sequence[bool], Sequence[bool]]


class Aligner:
    """Aligns token ids of a student's and of a teacher's vocabulary.

    Args:
        student: a `ByteTable`, or anything that `byte_table` reads.
        teacher: the same; `retokenize` needs a tokenizer that can encode.
        markers: whether thoughts and tool calls are known by their markers, in the formats of the chat templates: these
            correspond by role, in MARKER chunks, and `retokenize` writes the teacher's own. Without, added tokens
            such as `<think>` are text.
        foreign: with markers, what becomes of thoughts or calls for which the other side has no format. "omit": the
            other side is not given them, and none of their tokens is aligned; "text": they are text.

    Raises:
        UnsupportedTokenizerError: a tokenizer whose tokens' bytes cannot be known exactly.
        XTokMapError: markers of something that is no tokenizer of transformers or tokenizers, or another `foreign`.
    """

    def __init__(self, student: Any, teacher: Any, *, markers: bool = False, foreign: Foreign = "omit") -> None:
        self.student = byte_table(student)
        self.teacher = byte_table(teacher)
        self.foreign, self._student_source, self._teacher_source = foreign, student, teacher
        self._voices: tuple[Voice, Voice] | None = None
        if foreign not in ("omit", "text"):
            raise XTokMapError(f'foreign={foreign!r}: use "omit" or "text"')
        if markers:
            own, other = self._voices = self._voices_of(student, teacher)
            self.student = self.student.with_markers(own.markers(other.format, foreign))
            self.teacher = self.teacher.with_markers(other.markers(own.format, foreign))
        self._core = _core.Aligner(self.student, self.teacher)

    def __getstate__(self) -> tuple[Any, ...]:
        """Its byte tables, so that no tokenizer is read again, and what it was given, which encodes."""
        voices = () if self._voices is None else tuple(voice.tokenizer for voice in self._voices)
        return self.student, self.teacher, self._student_source, self._teacher_source, self.foreign, *voices

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.student, self.teacher, self._student_source, self._teacher_source, self.foreign, *voices = state
        self._voices = self._voices_of(*voices) if voices else None
        self._core = _core.Aligner(self.student, self.teacher)

    def swapped(self) -> Aligner:
        """The other way round: the teacher's completions for the student."""
        markers = self._voices is not None
        return Aligner(self._teacher_source, self._student_source, markers=markers, foreign=self.foreign)

    def _voices_of(self, student: Any, teacher: Any) -> tuple[Voice, Voice]:
        return voice_of(student, self.student, "student"), voice_of(teacher, self.teacher, "teacher")

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
        thinking: Thinking | None = None,
        threads: int | None = None,
    ) -> tuple[list[Int64], AlignmentBatch]:
        """Student completions -> what the teacher is given for them, and the alignment of the two, in bulk.

        The text is what the student's own decoder makes of its ids: what is not UTF-8 becomes U+FFFD, as often as
        `byte_table` says. The student's ids are aligned as sampled. Where a student row has an end-of-turn token the
        teacher's row gets the teacher's own, and the two form a STOP chunk. With markers, so it is with these, and
        what the teacher's format has around them is written as there: new lines, how a call spells name and arguments.

        Args:
            student_ids: B rows, as `align_batch` takes them.
            student_mask: as for `align_batch`.
            student_cu: as for `align_batch`.
            stop_id: the teacher's end of turn; None takes the first of `teacher.stop_ids`, if there is one.
            thinking: with markers, whether the student's and the teacher's prompt of each row leaves a thought open,
                as `open_thoughts` says; None: none does.
            threads: as for `align_batch`.

        Returns:
            B int64 arrays of teacher ids, and the `AlignmentBatch`.

        Raises:
            UnsupportedTokenizerError: the teacher was given as something that cannot encode (a `ByteTable`).
            XTokMapError: a `stop_id` that is none of the teacher's stop ids.
        """
        student = _Rows.of_batch(student_ids, student_mask, student_cu, "student")
        teacher = self._encode(student, stop_id, thinking, threads)
        batch = self._align(student, teacher, strict=False, threads=threads)
        return teacher.split(), batch

    def teacher_ids(
        self,
        student_ids: Any,
        student_mask: Any = None,
        *,
        student_cu: Any = None,
        stop_id: int | None = None,
        thinking: Thinking | None = None,
        threads: int | None = None,
    ) -> list[Int64]:
        """The first half of `retokenize`: what the teacher is given, without the alignment."""
        student = _Rows.of_batch(student_ids, student_mask, student_cu, "student")
        return self._encode(student, stop_id, thinking, threads).split()

    def open_thoughts(
        self, student_prompt_ids: Sequence[Sequence[int]], teacher_prompt_ids: Sequence[Sequence[int]]
    ) -> Thinking:
        """Of which prompts the end is a thought that was opened, on each side; without markers, of none."""
        if self._voices is None:
            return [False] * len(student_prompt_ids), [False] * len(teacher_prompt_ids)
        own, other = self._voices
        return list(map(own.opens, student_prompt_ids)), list(map(other.opens, teacher_prompt_ids))

    def _answers(
        self, prompts: Sequence[Sequence[Sequence[int]]], answers: Ids, stop_id: int | None
    ) -> list[list[int]]:
        """The student's answers as the teacher's: `teacher_ids` after prompts of both sides."""
        thinking = self.open_thoughts(prompts[0], prompts[1])
        return [row.tolist() for row in self.teacher_ids(answers, stop_id=stop_id, thinking=thinking)]

    @property
    def vocab_map(self) -> VocabMap:
        """What the tokens of the two vocabularies are to each other; worked out when it is first asked for."""
        return self._transfer.vocab_map

    @property
    def student_rule(self) -> str:
        """How the student's tokenizer cuts, as far as `cover_queries` follows it: bpe, unigram or longest match."""
        return self._transfer.rule.name

    def cover_queries(
        self, batch: AlignmentBatch | Alignment, *, rows: bool = True, threads: int | None = None
    ) -> CoverQueries:
        """For every student token, which teacher mass makes log q* of it: the teacher's view of the student's encoding.

        A teacher scores its own encoding of the finished text, whose boundaries say what did not come next; every
        credit that takes its logprobs as they are inherits that (tokenization bias, arXiv 2406.16829). What these
        queries name is the repair: the mass of all teacher tokens that could have stood there and leave the student
        its token. `LocalTeacher.score` evaluates them.

        The rule by which the student's tokenizer cuts is followed on the bytes of two neighbors (`EncodingRule`); what
        repeats is kept, so that known tokens cost about as much as their alignment.

        Args:
            batch: from this aligner.
            rows: whether they are to tell of whole rows, for `transfer_kl`; a credit needs only the tokens.
            threads: as for `align_batch`.

        Raises:
            XTokMapError: an alignment that was made without ids (`align_offsets`) or by another aligner.
        """
        self._check_own(batch, "cover_queries")
        if isinstance(batch, Alignment):
            batch = batch._as_batch()
        return self._transfer.queries(batch, *batch._flat_ids(), rows, threads)

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
        indptr, teacher_ids, following, *_ = sets.arrays()
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
        pairs = self._core.marker_pairs()
        return Transfer(self._student_source, self.student, self._teacher_source, self.teacher, pairs)

    @once
    def _student_codec(self) -> TextCodec:
        return text_codec(self._student_source)

    @once
    def _teacher_codec(self) -> TextCodec:
        return text_codec(self._teacher_source)

    def _encode(self, student: _Rows, stop_id: int | None, thinking: Thinking | None, threads: int | None) -> _Rows:
        if stop_id is not None and stop_id not in self.teacher.stop_ids:
            raise XTokMapError(f"stop_id={stop_id} is none of the teacher's stop ids {self.teacher.stop_ids}")
        texts, counts, cuts = self._core.student_texts(student.ids, student.layout, threads)
        if self._voices is not None:
            own, other = (voice.format for voice in self._voices)
            plain = not other.answer_open and not own.calls_alone and not any(map(any, thinking or ()))
            if not plain or any(cut is not None for cut in cuts):
                return self._spoken(student, texts, counts, cuts, stop_id, thinking)
        ids, cu = self._teacher_codec.encode_batch(texts)
        # A row's texts are what lies before, between and after its end-of-turn tokens: the teacher's goes between.
        first = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
        if len(texts) > len(counts) and (stop_id is not None or self.teacher.stop_ids):
            inner = np.ones(len(texts) + 1, dtype=np.bool_)
            inner[first] = False
            ids = np.insert(ids, cu[inner], self.teacher.stop_ids[0] if stop_id is None else stop_id)
            cu = cu + np.cumsum(inner)
        return _Rows(ids, cu[first])

    def _spoken(
        self,
        student: _Rows,
        texts: list[str],
        counts: list[int],
        cuts: list[int | None],
        stop_id: int | None,
        thinking: Thinking | None,
    ) -> _Rows:
        """Rows as the teacher says them: its markers around what was thought, called and answered."""
        assert self._voices is not None
        own, other = self._voices
        if stop_id is None and self.teacher.stop_ids:
            stop_id = self.teacher.stop_ids[0]
        if thinking is None:
            thinking = [False] * len(counts), [False] * len(counts)
        rows: list[list[Piece]] = []
        sampled, at = student.split(), 0
        for row, (count, own_open, open_there) in enumerate(zip(counts, *thinking, strict=True)):
            said, between = texts[at : at + count], cuts[at - row : at - row + count - 1]
            at += count
            told = other.format.think is not None
            if own_open and not told and self.foreign == "omit" and not own.closes(sampled[row].tolist()):
                rows.append([])  # all of it is what is left out
                continue
            turn = parts(said, between, own.format, thinking=own_open and told)
            rows.append(joined(other.says(turn, own.format, stop_id, thinking=open_there)))
        pieces = [piece for row in rows for piece in row]
        ids, cu = self._teacher_codec.encode_batch([piece for piece in pieces if isinstance(piece, str)])
        encoded = iter(np.split(ids, cu[1:-1]) if len(cu) > 1 else ())
        filled = [
            [next(encoded) if isinstance(piece, str) else np.asarray(piece, np.int64) for piece in row] for row in rows
        ]
        lengths = [sum(map(len, row)) for row in filled]
        flat = [np.zeros(0, np.int64), *(part for row in filled for part in row)]
        return _Rows(np.concatenate(flat), np.cumsum([0, *lengths], dtype=np.int64))

    def _align(self, student: _Rows, teacher: _Rows, *, strict: bool, threads: int | None) -> AlignmentBatch:
        arrays = self._core.align_batch(student.ids, student.layout, teacher.ids, teacher.layout, strict, threads)
        spelled = _Bytes(self.student, student.ids, self.teacher, teacher.ids)
        masks: dict[str, Any] = {"student_mask": student.mask, "teacher_mask": teacher.mask}
        return AlignmentBatch(*arrays, **masks, _bytes=spelled)

"""Index tensors of alignments and of vocabulary maps: sums over chunks and back, on any device, without a host sync."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.alignment import Alignment, AlignmentBatch, Kind


@dataclass(frozen=True, eq=False)
class ChunkIndex:
    """The chunks of B rows as index tensors; C is the largest number of chunks of a row.

    Attributes:
        student_chunk: int64 `[B, Ts]`; the chunk of every student token, -1 where unaligned or padding.
        teacher_chunk: int64 `[B, Tt]`; the same for the teacher.
        num_chunks: int64 `[B]`; chunks of each row.
        kind: int64 `[B, C]`; a `Kind` each, -1 where the row has no such chunk.
        student_len: int64 `[B, Ts]`; bytes of every student token, 0 for specials and padding.
        student_count: int64 `[B, C]`; student tokens of every chunk.
        teacher_count: int64 `[B, C]`; teacher tokens of every chunk.
        teacher_pos: int64 `[B, Ts]`; the teacher token (its place in the row of `teacher_chunk`) in which a student
            token starts; -1 where unaligned, and inside a REWRITTEN chunk, where it is known for the first token only;
            likewise in a MARKER chunk, if the first tokens of both sides begin this role and no other.
        teacher_off: int64 `[B, Ts]`; the byte inside that teacher token, -1 where `teacher_pos` is.
    """

    student_chunk: Tensor
    teacher_chunk: Tensor
    num_chunks: Tensor
    kind: Tensor
    student_len: Tensor
    student_count: Tensor
    teacher_count: Tensor
    teacher_pos: Tensor
    teacher_off: Tensor

    @classmethod
    def from_alignment(
        cls, alignment: AlignmentBatch | Alignment, device: torch.device | str | None = None
    ) -> ChunkIndex:
        """Index tensors on `device`, from one copy of each array and no loop over rows or chunks.

        Rows lie as the ids did that were aligned: where a mask was given, token k of a row is at its k-th True;
        otherwise at position k, and shorter rows are padded on the right. An `Alignment` is a batch of one.
        """
        b = alignment if isinstance(alignment, AlignmentBatch) else alignment._as_batch()
        rows, chunks = len(b), np.diff(b.chunk_cu)
        width = int(chunks.max(initial=0))
        kind = np.full((rows, width), -1, dtype=np.int64)
        row_of_chunk = np.repeat(np.arange(rows), chunks)
        kind[row_of_chunk, np.arange(len(b.kind)) - np.repeat(b.chunk_cu[:-1], chunks)] = b.kind

        def count(chunk: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            row, _ = np.nonzero(chunk >= 0)
            flat = row * width + chunk[chunk >= 0]
            return np.bincount(flat, minlength=rows * width).astype(np.int64).reshape(rows, width)

        student = _padded(b.student_chunk, b.student_cu, b.student_mask, -1)
        teacher = _padded(b.teacher_chunk, b.teacher_cu, b.teacher_mask, -1)
        start = np.concatenate([np.zeros(1, np.int32), b.student_end[:-1]])
        first = b.student_cu[:-1]
        start[first[first < len(start)]] = 0  # the first token of every row
        length = _padded(b.student_end - start[: len(b.student_end)], b.student_cu, b.student_mask, 0)
        pos = b.teacher_pos.astype(np.int64)
        if b.teacher_mask is not None:
            column = np.append(np.nonzero(b.teacher_mask)[1], -1)  # one more, for -1
            pos = column[np.where(pos < 0, -1, pos + np.repeat(b.teacher_cu[:-1], np.diff(b.student_cu)))]
        pos = _padded(pos, b.student_cu, b.student_mask, -1)
        off = _padded(b.teacher_off, b.student_cu, b.student_mask, -1)
        arrays = (student, teacher, chunks, kind, length, count(student), count(teacher), pos, off)
        return cls(*(torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arrays))

    def to(self, device: torch.device | str) -> ChunkIndex:
        """The same index on another device."""
        return ChunkIndex(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def rows(self, select: slice | Tensor) -> ChunkIndex:
        """The index of some of the rows, for a micro-batch."""
        return ChunkIndex(*(getattr(self, f.name)[select] for f in fields(self)))

    def sum_student(self, x: Tensor) -> Tensor:
        """Sums `x` `[B, Ts]` over the student tokens of every chunk: `[B, C]`, float32 (integers and float64 as is).

        Unaligned tokens are left out by selection: whatever stands there, a NaN too, reaches neither sum nor gradient.
        """
        return self._sum(x, self.student_chunk, "student")

    def sum_teacher(self, x: Tensor) -> Tensor:
        """Sums `x` `[B, Tt]` over the teacher tokens of every chunk: `[B, C]`, as `sum_student`."""
        return self._sum(x, self.teacher_chunk, "teacher")

    def to_student(self, y: Tensor) -> Tensor:
        """Hands `y` `[B, C]` to the student tokens of every chunk: `[B, Ts]`, 0 where unaligned."""
        if y.shape != self.kind.shape:
            raise XTokMapError(f"y has shape {tuple(y.shape)}; one value a chunk is {tuple(self.kind.shape)}")
        padded = torch.cat([y, y.new_zeros(y.shape[0], 1)], dim=1)
        return padded.gather(1, self._slot(self.student_chunk))

    def kind_of_student(self) -> Tensor:
        """The `Kind` of every student token's chunk: int64 `[B, Ts]`, -1 where unaligned."""
        return torch.where(self.student_chunk >= 0, self.to_student(self.kind), -1)

    def strict_teacher_pos(self) -> Tensor:
        """The teacher token of a student token in a ONE_TO_ONE, STOP or MARKER chunk: int64 `[B, Ts]`, -1 elsewhere."""
        kind = self.kind_of_student()
        strict = (kind == int(Kind.ONE_TO_ONE)) | (kind == int(Kind.STOP)) | (kind == int(Kind.MARKER))
        return torch.where(strict, self.teacher_pos, -1)

    def teacher_rows(self, teacher_pos: Tensor) -> Tensor:
        """Places in rows, int64 `[B, Ts]`, as flat positions `b * Tt + j` for `Logits.at`; -1 stays."""
        rows, width = self.teacher_chunk.shape
        first = torch.arange(rows, device=teacher_pos.device)[:, None] * width
        return torch.where(teacher_pos >= 0, teacher_pos + first, -1)

    def _slot(self, chunk: Tensor) -> Tensor:
        return torch.where(chunk >= 0, chunk, self.kind.shape[1])

    def _sum(self, x: Tensor, chunk: Tensor, side: str) -> Tensor:
        if x.shape != chunk.shape:
            raise XTokMapError(f"x has shape {tuple(x.shape)}; the index has {tuple(chunk.shape)} {side} tokens")
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        sums = x.new_zeros(x.shape[0], self.kind.shape[1] + 1)
        return sums.scatter_add(1, self._slot(chunk), torch.where(chunk >= 0, x, 0))[:, :-1]


@dataclass(frozen=True, eq=False)
class VocabTensors:
    """What the tokens of two vocabularies are to each other, as index tensors; -1 for none.

    Attributes:
        teacher_to_student: int64 `[V_T]`; the student token with the same bytes.
        student_to_teacher: int64 `[V_S]`; the teacher token with the same bytes.
        prefix: int64 `[V_T]`; the longest student token that a teacher token begins with.
        canonical: int64 `[V_T]`; the first token of the student's own encoding of a teacher token's bytes.
        student_order: int64; the student's ids that have bytes, sorted by them.
        teacher_order: int64; the teacher's.
        student_range: int64 `[V_S, 2]`; where in `student_order` the tokens are that begin with this one's bytes.
        teacher_range: int64 `[V_T, 2]`; the same in `teacher_order`.
        group: int64 `[V_T]`; teacher tokens without an equal student token, connected by one beginning another.
        student_stops: int64; ids that end a turn.
        teacher_stops: int64; the teacher's.
        shared: int64 `[S, 2]`; (student, teacher) pairs of equal bytes, no token twice and no stops.
        num_groups: how many groups there are.
    """

    teacher_to_student: Tensor
    student_to_teacher: Tensor
    prefix: Tensor
    canonical: Tensor
    student_order: Tensor
    teacher_order: Tensor
    student_range: Tensor
    teacher_range: Tensor
    group: Tensor
    student_stops: Tensor
    teacher_stops: Tensor
    shared: Tensor
    num_groups: int

    @classmethod
    def from_map(cls, vocab_map: Any, device: torch.device | str | None = None) -> VocabTensors:
        """Index tensors on `device` of anything that has these attributes as arrays or sequences."""
        names = [f.name for f in fields(cls) if f.name not in ("shared", "num_groups")]
        arrays = {name: np.asarray(getattr(vocab_map, name), dtype=np.int64) for name in names}
        of_student, of_teacher = arrays["student_to_teacher"], arrays["teacher_to_student"]
        student = np.flatnonzero((of_student >= 0) & ~np.isin(np.arange(len(of_student)), arrays["student_stops"]))
        teacher = of_student[student]
        # Ids of equal bytes: the two that name each other.
        mutual = (of_teacher[teacher] == student) & ~np.isin(teacher, arrays["teacher_stops"])
        arrays["shared"] = np.stack([student, teacher], axis=1)[mutual]
        groups = int(arrays["group"].max(initial=-1)) + 1
        tensors = {name: torch.from_numpy(np.ascontiguousarray(a)).to(device) for name, a in arrays.items()}
        return cls(**tensors, num_groups=groups)

    def to(self, device: torch.device | str) -> VocabTensors:
        """The same on another device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "num_groups"}
        moved = {name: x.to(device, non_blocking=True) for name, x in tensors.items()}
        return VocabTensors(**moved, num_groups=self.num_groups)


def _padded(flat: npt.NDArray[Any], cu: npt.NDArray[np.int64], mask: Any, fill: int) -> npt.NDArray[np.int64]:
    lengths = np.diff(cu)
    if mask is None:
        mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    out = np.full(mask.shape, fill, dtype=np.int64)
    out[mask] = flat
    return out


def coverage_counts(index: ChunkIndex) -> Tensor:
    """Student tokens in chunks of each kind that have tokens on both sides: int64 `[len(Kind)]`."""
    both = (index.teacher_count > 0) & (index.kind >= 0)
    counts = index.kind.new_zeros(len(Kind) + 1)
    slot = torch.where(both, index.kind, len(Kind))
    return counts.scatter_add(0, slot.reshape(-1), index.student_count.reshape(-1))[:-1]

"""Index tensors of alignments, and logprobs of tokens without a copy of the logits.

Everything here runs on any device, is differentiable where that makes sense, and needs no host-device sync.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.alignment import Alignment, AlignmentBatch, Kind

#: Float32 values of one slice of logits: 64 MiB.
_SLICE = 2**24


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
    """

    student_chunk: Tensor
    teacher_chunk: Tensor
    num_chunks: Tensor
    kind: Tensor
    student_len: Tensor
    student_count: Tensor
    teacher_count: Tensor

    @classmethod
    def from_alignment(
        cls, alignment: AlignmentBatch | Alignment, device: torch.device | str | None = None
    ) -> ChunkIndex:
        """Index tensors on `device`, from one copy of each array and no loop over rows or chunks.

        Rows lie as the ids did that were aligned: where a mask was given, token k of a row is at its k-th True;
        otherwise at position k, and shorter rows are padded on the right. An `Alignment` is a batch of one.
        """
        b = _as_batch(alignment)
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
        arrays = (student, teacher, chunks, kind, length, count(student), count(teacher))
        return cls(*(torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arrays))

    def to(self, device: torch.device | str) -> ChunkIndex:
        """The same index on another device."""
        return ChunkIndex(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def rows(self, select: slice | Tensor) -> ChunkIndex:
        """The index of some of the rows, for a micro-batch."""
        return ChunkIndex(*(getattr(self, f.name)[select] for f in fields(self)))

    def sum_student(self, x: Tensor) -> Tensor:
        """Sums `x` `[B, Ts]` over the student tokens of every chunk: float32 (or x's integer dtype) `[B, C]`.

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

    def _slot(self, chunk: Tensor) -> Tensor:
        return torch.where(chunk >= 0, chunk, self.kind.shape[1])

    def _sum(self, x: Tensor, chunk: Tensor, side: str) -> Tensor:
        if x.shape != chunk.shape:
            raise XTokMapError(f"x has shape {tuple(x.shape)}; the index has {tuple(chunk.shape)} {side} tokens")
        x = x.float() if x.is_floating_point() else x
        sums = x.new_zeros(x.shape[0], self.kind.shape[1] + 1)
        return sums.scatter_add(1, self._slot(chunk), torch.where(chunk >= 0, x, 0))[:, :-1]


def _as_batch(a: AlignmentBatch | Alignment) -> AlignmentBatch:
    if isinstance(a, AlignmentBatch):
        return a
    counts = {"student_cu": len(a.student_chunk), "teacher_cu": len(a.teacher_chunk), "chunk_cu": len(a.kind)}
    arrays: dict[str, Any] = {f.name: getattr(a, f.name) for f in fields(a) if f.name != "_starts"}
    arrays.update({name: np.asarray([0, n], dtype=np.int64) for name, n in counts.items()})
    return AlignmentBatch(**arrays)


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


def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """log softmax(logits / temperature)[ids], in slices: never a float32 copy of `logits`.

    Args:
        logits: `[..., T, V]`, any float dtype; row t is the one that scores `ids[t]` (the caller shifts).
        ids: int64 `[..., T]`.
        temperature: of the distribution that sampled.
        softcap: final logit soft-capping (Gemma 2), for logits that do not have it yet.
        chunk_size: rows of a slice; None takes 64 MiB of float32.

    Returns:
        float32 `[..., T]`. Differentiable in `logits`; the softmax is recomputed slice by slice in the backward pass,
        and the gradient has the dtype of `logits`.
    """
    _check_rows(logits, ids, "logits")
    size = chunk_size or max(1, _SLICE // max(1, logits.shape[-1]))
    flat = _TokenLogprobs.apply(logits.reshape(-1, logits.shape[-1]), ids.reshape(-1), temperature, softcap, size)
    return flat.view(ids.shape)  # type: ignore[no-any-return]


def token_logprobs_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """`token_logprobs` of `hidden @ weight.T`, with the output head inside: the logits exist one slice at a time.

    Args:
        hidden: `[..., T, H]`; row t is the state that scores `ids[t]`.
        weight: `[V, H]`, the output head.
        ids: int64 `[..., T]`.
        bias: `[V]` or None.
        temperature: as for `token_logprobs`.
        softcap: as for `token_logprobs`.
        chunk_size: as for `token_logprobs`.

    Returns:
        float32 `[..., T]`, differentiable in `hidden`, `weight` and `bias`; logits are recomputed in the backward
        pass (the idea of cut cross-entropy, arXiv 2411.09009).
    """
    _check_rows(hidden, ids, "hidden")
    size = chunk_size or max(1, _SLICE // max(1, weight.shape[0]))
    flat = _HeadLogprobs.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, ids.reshape(-1), temperature, softcap, size
    )
    return flat.view(ids.shape)  # type: ignore[no-any-return]


def _check_rows(rows: Tensor, ids: Tensor, name: str) -> None:
    if rows.shape[:-1] != ids.shape:
        raise XTokMapError(
            f"{name} has shape {tuple(rows.shape)} and ids {tuple(ids.shape)}; {name} needs one row for each id"
        )


def _scaled(logits: Tensor, temperature: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """float32 logits as the softmax takes them, and tanh of the capped ones (for the derivative)."""
    x, tanh = logits.float(), None
    if softcap is not None:
        tanh = torch.tanh(x / softcap)
        x = softcap * tanh
    return (x if temperature == 1.0 else x / temperature), tanh


def _forward_slice(logits: Tensor, ids: Tensor, temperature: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    x, _ = _scaled(logits, temperature, softcap)
    lse = torch.logsumexp(x, dim=-1)
    return x.gather(1, ids[:, None])[:, 0] - lse, lse


def _backward_slice(
    logits: Tensor, ids: Tensor, lse: Tensor, grad: Tensor, temperature: float, softcap: float | None
) -> Tensor:
    """d loss / d logits of a slice, float32: grad * (one-hot - softmax)."""
    x, tanh = _scaled(logits, temperature, softcap)
    d = torch.exp(x - lse[:, None]) * -grad[:, None]
    d = d.scatter_add(1, ids[:, None], grad[:, None])
    # A row without gradient may hold anything, also what makes 0 * inf.
    d = torch.where(grad[:, None] != 0, d, 0)
    if temperature != 1.0:
        d = d / temperature
    return d if tanh is None else d * (1 - tanh * tanh)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float, softcap: float | None, size: int) -> Tensor:
        slices = zip(torch.split(logits, size), torch.split(ids, size), strict=True)
        parts = [_forward_slice(x, i, temperature, softcap) for x, i in slices]
        ctx.save_for_backward(logits, ids, torch.cat([lse for _, lse in parts]))
        ctx.temperature, ctx.softcap, ctx.size = temperature, softcap, size
        return torch.cat([logprobs for logprobs, _ in parts])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, ids, lse = ctx.saved_tensors
        out = torch.empty_like(logits)
        parts = zip(*(torch.split(t, ctx.size) for t in (out, logits, ids, lse, grad)), strict=True)
        for o, x, i, z, g in parts:
            o.copy_(_backward_slice(x, i, z, g, ctx.temperature, ctx.softcap))
        return out, None, None, None, None


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: float,
        softcap: float | None,
        size: int,
    ) -> Tensor:
        slices = zip(torch.split(hidden, size), torch.split(ids, size), strict=True)
        head = torch.nn.functional.linear
        parts = [_forward_slice(head(h, weight, bias), i, temperature, softcap) for h, i in slices]
        ctx.save_for_backward(hidden, weight, bias, ids, torch.cat([lse for _, lse in parts]))
        ctx.temperature, ctx.softcap, ctx.size = temperature, softcap, size
        return torch.cat([logprobs for logprobs, _ in parts])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, lse = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight) if need_weight else None
        d_bias = torch.zeros_like(weight[:, 0]) if need_bias else None
        parts = zip(*(torch.split(t, ctx.size) for t in (d_hidden, hidden, ids, lse, grad)), strict=True)
        for o, h, i, z, g in parts:
            logits = torch.nn.functional.linear(h, weight, bias)
            d = _backward_slice(logits, i, z, g, ctx.temperature, ctx.softcap).to(weight.dtype)
            if need_hidden:
                o.copy_(d @ weight)
            if d_weight is not None:
                d_weight.addmm_(d.T, torch.where(g[:, None] != 0, h, 0))
            if d_bias is not None:
                d_bias.add_(d.sum(0))
        return (d_hidden if need_hidden else None), d_weight, d_bias, None, None, None, None

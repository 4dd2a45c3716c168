"""`sum_rows`: a weighted sum over rows of logits, whose gradient is formed while a slice of them is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xtokmap.torch.logits import _SLICE, Logits, RowFunction, Sliceable, _scaled, _widened, blocks

#: Dtypes that the losses compute in.
_WIDE = (torch.float32, torch.float64)

#: Values of `[n, V]` logits and of what belongs to the same rows: a value a row, and others without a gradient. It
#: overwrites the logits by the gradient of the first.
RowGradient: TypeAlias = Callable[..., tuple[Tensor, ...]]


class Part(Protocol):
    """What a `RowGradient` is given beside tensors: made for a slice of rows, and taken a block at a time."""

    def made(self, a: int, b: int) -> Sliceable:
        """For rows a to b; its `slice(c, d)` is for rows c to d among these."""


class Lying:
    """A part that there is already, with a `slice` of its own."""

    def __init__(self, there: Sliceable, first: int = 0) -> None:
        self._there, self._first = there, first

    def made(self, a: int, b: int) -> Lying:
        """See `Part`."""
        return Lying(self._there, a)

    def slice(self, a: int, b: int) -> Any:
        """See `Part`."""
        return self._there.slice(self._first + a, self._first + b)


def sum_rows(
    fn: RowGradient, student: Logits, weights: Tensor, *others: Tensor | Part, size: int | None = None
) -> tuple[Tensor, ...]:
    """The sum of `weights[i] * fn(row i)`, differentiable in the student.

    Of `map_rows` it differs in this: the weights are known beforehand and `fn` says its own gradient. So every slice
    of logits is made once instead of twice, by one pass through the head, and nothing of it is copied (as fused linear
    losses do, Liger-Kernel's among them). The gradient of the head is kept from the forward pass on, in its own dtype.
    On the CPU the product with the head is that of a slice, and `fn` is given a block of it that its cache holds: what
    a pass over a row costs there is memory, most of all memory that is new.

    Args:
        fn: called as `fn(logits [n, V], *parts)`, float32 (float64 for float64 rows), scaled, and its to overwrite. It
            returns tensors `[n]`, and must not mix rows. A row of which the first is not finite counts for nothing.
        student: N rows, flat.
        weights: `[N]`.
        others: tensors `[N, ...]` or `Part`s of N rows, as `Logits` are; `fn` gets those of its rows.
        size: rows of a slice, at most; None takes 64 MiB of float32.

    Returns:
        The sum, and as many tensors `[N]` as `fn` returns, without a gradient.
    """
    size = size or max(1, _SLICE // max(1, student.vocab_size))
    out: tuple[Tensor, ...] = _SumRows.apply(
        fn, student, weights.detach(), others, size, torch.is_grad_enabled(), student.rows, student.weight, student.bias
    )
    return out


def graded(fn: RowFunction, enabled: bool, *, also: int | None = None) -> RowGradient:
    """A function of rows with the gradient that autograd finds, for `sum_rows`.

    Args:
        fn: as `map_rows` takes it.
        enabled: whether a gradient is needed.
        also: which of its other arguments gets a gradient as well: of every row, the last of the values.
    """

    def found(x: Tensor, *parts: Any) -> tuple[Tensor, ...]:
        leaf, given = x.detach(), list(parts)
        leaves = [leaf]
        if also is not None:
            given[also] = given[also].detach()
            leaves.append(given[also])
        with torch.set_grad_enabled(enabled):
            for one in leaves:
                one.requires_grad_(enabled)
            out = fn(leaf, *given)
            values = out if isinstance(out, tuple) else (out,)
            slopes: Sequence[Tensor | None] = [None] * len(leaves)
            if values[0].requires_grad:
                slopes = torch.autograd.grad(values[0].sum(), leaves, allow_unused=True)
        filled = [torch.zeros_like(one) if d is None else d for one, d in zip(leaves, slopes, strict=True)]
        x.copy_(filled[0])
        finite = torch.isfinite(values[0].detach())
        return *(value.detach() for value in values), *(torch.where(finite, d, 0) for d in filled[1:])

    return found


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        fn: RowGradient,
        student: Logits,
        weights: Tensor,
        others: tuple[Tensor | Part, ...],
        size: int,
        enabled: bool,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, ...]:
        needed = [enabled and need for need in ctx.needs_input_grad[-3:]]
        values, ctx.gradients = _worked(fn, student, weights, others, size, needed)
        ctx.save_for_backward(*inputs)
        ctx.again = fn, replace(student, rows=student.rows[:0].detach()), weights, others, size, needed
        finite = torch.isfinite(values[0])
        total = (torch.where(finite, values[0], 0) * torch.where(finite, weights, 0)).sum()
        ctx.mark_non_differentiable(*values)
        return total, *values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        rows, weight, bias = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # handed out by a backward pass before, of a graph that was retained
            fn, student, *how = ctx.again
            gradients = _worked(fn, replace(student, rows=rows, weight=weight, bias=bias), *how)[1]
        if grad.device.type != "cpu" or float(grad) != 1:
            gradients = [None if x is None else x.mul_(grad.to(x.dtype)) for x in gradients]
        return *[None] * 6, *gradients


def _worked(
    fn: RowGradient,
    student: Logits,
    weights: Tensor,
    others: tuple[Tensor | Part, ...],
    size: int,
    needed: list[bool],
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """The values of all rows, and the gradients of rows, head and bias that are needed."""
    gradients = _Gradients(student, needed)
    found: list[tuple[Tensor, ...]] = []
    n, memory = student.shape.numel(), _Memory(student)
    size = max(1, -(-n // max(1, -(-n // size))))  # as many slices, equally long: a short one's product is no cheaper
    # Nothing happens to logits before the softmax: what `fn` overwrites are they themselves.
    in_place = student.temperature == 1 and student.softcap is None and student.rows.dtype in _WIDE
    # Of the parts, too, as many rows as a cache holds.
    widest = max([student.vocab_size, *(getattr(other, "vocab_size", 0) for other in others)])
    parts: list[Any] = []
    for a in range(0, max(n, 1), size):  # no rows: one empty slice, which says what fn returns
        b = min(n, a + size)
        parts.clear()  # before there are new ones
        hidden = student._rows(a, b)
        logits = memory.head(hidden)
        parts.extend(o[a:b] if isinstance(o, Tensor) else o.made(a, b) for o in others)
        scale = (weights[a:b] / student.temperature)[:, None]
        for c, d in blocks(b - a, widest, logits.device):
            x, tanh = _scaled(logits[c:d], student.temperature, student.softcap)
            if in_place and student.weight is None:
                x = x.clone()  # the caller's own
            values = fn(x, *[p[c:d] if isinstance(p, Tensor) else p.slice(c, d) for p in parts])
            found.append(values)
            if any(needed):
                if tanh is not None:
                    x.mul_(1 - tanh * tanh)
                useless = ~torch.isfinite(values[0]) | (weights[a + c : a + d] == 0)
                if useless.device.type != "cpu" or bool(useless.any()):  # only the CPU can be asked
                    x.masked_fill_(useless[:, None], 0)
                    scale[c:d].masked_fill_(useless[:, None], 0)
                gradients.block(a + c, a + d, x, scale[c:d])
                if student.weight is not None and not in_place:
                    logits[c:d] = x
        if any(needed):
            gradients.slice(a, b, logits, hidden, scale)
    return tuple(torch.cat(x) for x in zip(*found, strict=True)), gradients.found()


class _Memory:
    """Logits of one slice after the other in the same memory: on the CPU new memory costs more than a pass over it."""

    def __init__(self, student: Logits) -> None:
        self._student = student
        self._held: Tensor | None = None

    def head(self, hidden: Tensor) -> Tensor:
        if self._held is None or len(hidden) > len(self._held):
            self._held = self._student._head(hidden)
            return self._held
        return self._student._head(hidden, self._held[: len(hidden)])


class _Gradients:
    """The gradients of rows, head and bias that are needed, added up from those in the logits."""

    def __init__(self, student: Logits, needed: list[bool]) -> None:
        self._student = student
        rows, head, bias = needed
        like, empty = student.rows, torch.zeros if student.positions is not None else torch.empty
        self._rows = empty(like.shape, dtype=like.dtype, device=like.device).view(-1, like.shape[-1]) if rows else None
        # The first slice writes all of it.
        self._head = torch.empty_like(student.weight) if student.weight is not None and head else None
        self._bias = torch.zeros_like(_widened(student.bias)) if student.bias is not None and bias else None

    def block(self, a: int, b: int, d: Tensor, scale: Tensor) -> None:
        """Rows a to b, of gradient `d` in their logits, times `scale`: what is not a product with the head."""
        if self._bias is not None:
            self._bias.add_(scale[:, 0].to(d.dtype) @ d)
        if self._rows is not None and self._student.weight is None:
            self._add(a, b, d.mul_(scale))

    def slice(self, a: int, b: int, d: Tensor, hidden: Tensor, scale: Tensor) -> None:
        """The products with the head."""
        weight, scale = self._student.weight, scale.to(d.dtype)
        if weight is None:
            return
        if self._rows is not None:
            self._add(a, b, (d @ weight).mul_(scale))
        if self._head is not None:
            # A row that counts for nothing may hold anything.
            scaled = (hidden * scale).masked_fill_(scale == 0, 0)
            self._head.addmm_(d.T, scaled, beta=0 if a == 0 else 1)

    def _add(self, a: int, b: int, per_row: Tensor) -> None:
        assert self._rows is not None
        if self._student.positions is None:
            self._rows[a:b] = per_row
        else:
            self._rows.index_add_(0, self._student._at(a, b), per_row.to(self._rows.dtype))

    def found(self) -> list[Tensor | None]:
        """Of rows, head and bias."""
        rows, bias = self._rows, self._bias
        dtype = self._student.rows.dtype
        return [
            None if rows is None else rows.view(self._student.rows.shape),
            self._head,
            None if bias is None else bias.to(dtype),
        ]

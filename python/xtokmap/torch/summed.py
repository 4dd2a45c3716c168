"""`sum_rows`: a weighted sum over rows of logits, whose gradient is formed while a slice of them is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xtokmap.torch.logits import _SLICE, Logits, _scaled

#: Values of `[n, V]` logits and of what belongs to the same rows: a value a row, and others without a gradient. It
#: overwrites the logits by the gradient of the first.
RowGradient: TypeAlias = Callable[..., tuple[Tensor, ...]]

#: What a `RowGradient` is given for the rows a to b.
Part: TypeAlias = Callable[[int, int], Any]


def sum_rows(
    fn: RowGradient, student: Logits, weights: Tensor, *others: Tensor | Part, size: int | None = None
) -> tuple[Tensor, ...]:
    """The sum of `weights[i] * fn(row i)`, differentiable in the student.

    Of `map_rows` it differs in this: the weights are known beforehand and `fn` says its own gradient. So every slice
    of logits is made once instead of twice, by one pass through the head, and nothing of it is copied (as fused linear
    losses do, Liger-Kernel's among them). The gradient of the head is kept from the forward pass on, in its own dtype.

    Args:
        fn: called as `fn(logits [n, V], *parts)`, float32 (float64 for float64 rows), scaled, and its to overwrite. It
            returns tensors `[n]`. A row of which the first is not finite counts for nothing.
        student: N rows, flat.
        weights: `[N]`.
        others: tensors `[N, ...]`, of which `fn` gets the rows of the slice, or functions of its bounds.
        size: rows of a slice; None takes 64 MiB of float32.

    Returns:
        The sum, and as many tensors `[N]` as `fn` returns, without a gradient.
    """
    size = size or max(1, _SLICE // max(1, student.vocab_size))
    out: tuple[Tensor, ...] = _SumRows.apply(
        fn, student, weights.detach(), others, size, torch.is_grad_enabled(), student.rows, student.weight, student.bias
    )
    return out


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
    inputs = (student.rows, student.weight, student.bias)
    gradients = [
        torch.zeros_like(x) if x is not None and need else None for x, need in zip(inputs, needed, strict=True)
    ]
    found: list[tuple[Tensor, ...]] = []
    n = student.shape.numel()
    for a in range(0, max(n, 1), size):  # no rows: one empty slice, which says what fn returns
        b = min(n, a + size)
        hidden = student._rows(a, b)
        logits = student._head(hidden)
        x, tanh = _scaled(logits, student.temperature, student.softcap)
        if student.weight is None and x is logits:
            x = x.clone()  # the caller's own
        values = fn(x, *[o[a:b] if isinstance(o, Tensor) else o(a, b) for o in others])
        found.append(values)
        if any(needed):
            if tanh is not None:
                x.mul_(1 - tanh * tanh)
            useless = ~torch.isfinite(values[0]) | (weights[a:b] == 0)
            if useless.device.type != "cpu" or bool(useless.any()):  # only the CPU can be asked
                x.masked_fill_(useless[:, None], 0)
                hidden = hidden.masked_fill(useless[:, None], 0)
            _add(gradients, student, a, b, x, hidden, weights[a:b] / student.temperature)
    return tuple(torch.cat(x) for x in zip(*found, strict=True)), gradients


def _add(
    gradients: list[Tensor | None], student: Logits, a: int, b: int, d: Tensor, hidden: Tensor, weights: Tensor
) -> None:
    """Adds what rows a to b, of gradient `d` in their logits, give to the gradients of rows, head and bias."""
    to_rows, to_head, to_bias = gradients
    dtype = student.rows.dtype
    if to_bias is not None:
        to_bias.add_((weights.to(d.dtype) @ d).to(dtype))
    d, column = d.to(dtype), weights.to(dtype)[:, None]
    if to_rows is not None:
        per_row = d.mul_(column) if student.weight is None else (d @ student.weight).mul_(column)
        if student.positions is None:
            to_rows.view(-1, to_rows.shape[-1])[a:b] = per_row
        else:
            to_rows.view(-1, to_rows.shape[-1]).index_add_(0, student._at(a, b), per_row)
    if to_head is not None:
        to_head.addmm_(d.T, hidden * column)

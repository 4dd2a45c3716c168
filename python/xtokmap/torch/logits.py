"""What is computed from rows of logits without a copy of them all: a slice at a time, differentiable.

Everything here runs on any device and needs no host sync.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xtokmap._core import XTokMapError

#: Float32 values of one slice of logits: 64 MiB, of which one product with the head is worth its while.
_SLICE = 2**24
#: Values of a block of a slice, which stays in a CPU's cache from one pass over it to the next: 2 MiB of float32.
_BLOCK = 2**19


@dataclass(frozen=True, eq=False)
class Logits:
    """Next-token logits that are worked out a slice of rows at a time, with the output head inside if it is given.

    Row i is the one that scores token i: the caller shifts.

    Attributes:
        rows: `[..., V]` logits, or `[..., H]` hidden states where `weight` is given; any float dtype.
        weight: `[V, H]`, the output head, or None.
        bias: `[V]`, of the head, or None.
        temperature: of the distribution that sampled.
        softcap: final logit soft-capping (Gemma 2), for hidden states and for logits that do not have it yet.
        positions: int64 `[...]` or None; which of the flattened `rows` this is a view of (see `at`).

    Raises:
        XTokMapError: shapes, dtypes or devices that do not go together; a temperature or softcap that is not positive.
    """

    rows: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    temperature: float = 1.0
    softcap: float | None = None
    positions: Tensor | None = None

    def __post_init__(self) -> None:
        if self.rows.ndim < 2 or not self.rows.is_floating_point():
            raise XTokMapError(
                f"rows: expected floats [..., V] or, with a head, [..., H]; got {self.rows.dtype} "
                f"{tuple(self.rows.shape)}"
            )
        if self.weight is None and self.bias is not None:
            raise XTokMapError("bias goes with weight: rows that are logits already have it")
        if self.weight is not None and (self.weight.ndim != 2 or self.weight.shape[1] != self.rows.shape[-1]):
            raise XTokMapError(
                f"weight has shape {tuple(self.weight.shape)}; hidden states {tuple(self.rows.shape)} need "
                f"[V, {self.rows.shape[-1]}]"
            )
        if self.weight is not None and self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise XTokMapError(f"bias has shape {tuple(self.bias.shape)}, expected {tuple(self.weight.shape[:1])}")
        for name, x in (("weight", self.weight), ("bias", self.bias)):
            if x is not None and (x.dtype != self.rows.dtype or x.device != self.rows.device):
                raise XTokMapError(
                    f"{name} is {x.dtype} on {x.device}, rows are {self.rows.dtype} on {self.rows.device}; "
                    "the head needs one dtype and one device"
                )
        if not self.temperature > 0:
            raise XTokMapError(f"temperature={self.temperature} must be positive")
        if self.softcap is not None and not self.softcap > 0:
            raise XTokMapError(f"softcap={self.softcap} must be positive; None leaves it out")

    @property
    def shape(self) -> torch.Size:
        """The leading shape: one row of V logits for each of its elements."""
        return self.rows.shape[:-1] if self.positions is None else self.positions.shape

    @property
    def vocab_size(self) -> int:
        """V, the number of logits of a row."""
        return self.rows.shape[-1] if self.weight is None else self.weight.shape[0]

    @property
    def needs_gradient(self) -> bool:
        """Whether what is worked out of them has one."""
        inputs = (self.rows, self.weight, self.bias)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)

    def at(self, positions: Tensor) -> Logits:
        """The rows at these flat positions (int64, any shape), without a copy.

        -1 stands for a row that is not needed: some row is there, which the caller must not use.
        """
        flat = positions.clamp(min=0)
        if self.positions is not None:
            flat = self.positions.reshape(-1)[flat]
        return replace(self, positions=flat)

    def detach(self) -> Logits:
        """The same without a gradient."""
        weight, bias = (None if x is None else x.detach() for x in (self.weight, self.bias))
        return replace(self, rows=self.rows.detach(), weight=weight, bias=bias)

    def slice(self, a: int, b: int) -> Tensor:
        """Logits of the flattened rows a to b, scaled as the softmax takes them: float32 `[b-a, V]` (or float64)."""
        return _scaled(self._head(self._rows(a, b)), self.temperature, self.softcap)[0]

    def some(self, row: int, ids: Tensor) -> Tensor:
        """Logits of one of the flattened rows at these ids, scaled, and no others: float32 `[k]` (or float64)."""
        x = self._rows(row, row + 1)
        if self.weight is None:
            x = x[:, ids]
        else:
            bias = None if self.bias is None else self.bias[ids]
            x = torch.nn.functional.linear(x, self.weight[ids], bias)
        return _scaled(x[0], self.temperature, self.softcap)[0]

    def made(self, a: int, b: int, out: Tensor | None = None) -> Made:
        """The flattened rows a to b by one product with the head, to be taken a few at a time.

        Args:
            a: the first.
            b: behind the last.
            out: `[b-a, V]`, where the product may be put if it has the dtype.
        """
        return Made(self, self._head(self._rows(a, b), out))

    def _rows(self, a: int, b: int) -> Tensor:
        """Rows a to b as they are; never a copy of all of them, also where they are no contiguous block."""
        width = self.rows.shape[-1]
        if self.positions is None and self.rows.is_contiguous():
            return self.rows.view(-1, width)[a:b]
        at = torch.arange(a, b, device=self.rows.device) if self.positions is None else self._at(a, b)
        if not self.rows.shape[:-1].numel():  # nothing but -1 can ask for them
            return self.rows.new_zeros(b - a, width)
        if self.rows.is_contiguous():
            return self.rows.view(-1, width).index_select(0, at)
        return self.rows[torch.unravel_index(at, self.rows.shape[:-1])]

    def _at(self, a: int, b: int) -> Tensor:
        assert self.positions is not None
        return self.positions.reshape(-1)[a:b]

    def _head(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        if self.weight is None:
            return rows
        if out is None or out.dtype != rows.dtype:
            return torch.nn.functional.linear(rows, self.weight, self.bias)
        if self.bias is None:
            return torch.mm(rows, self.weight.t(), out=out)
        return torch.addmm(self.bias, rows, self.weight.t(), out=out)


@dataclass(frozen=True, eq=False)
class Made:
    """Logits of some rows, in the dtype of the head; scaled where they are taken.

    Attributes:
        source: whose they are.
        logits: `[n, V]`, not scaled.
    """

    source: Logits
    logits: Tensor

    def slice(self, a: int, b: int) -> Tensor:
        """Rows a to b of these, as `Logits.slice`."""
        return _scaled(self.logits[a:b], self.source.temperature, self.source.softcap)[0]

    def at(self, row: Tensor, ids: Tensor) -> Tensor:
        """Some logits, of these rows and ids, scaled: float32 `[k]` (or float64)."""
        return _scaled(self.logits[row, ids], self.source.temperature, self.source.softcap)[0]


def blocks(n: int, vocab_size: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Bounds of blocks of n rows that are worked on together: on the CPU as many as its cache holds, else all."""
    size = max(1, _BLOCK // max(1, vocab_size)) if device.type == "cpu" else max(1, n)
    return ((a, min(n, a + size)) for a in range(0, max(n, 1), size))


def softmax_and_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(x) of `[n, V]`, and logsumexp(x) `[n]`, with one exponential."""
    p = x.softmax(-1)
    # The likeliest token has a probability of at least 1 / V.
    return p, x.amax(-1) - p.amax(-1).log()


def entropy_of(p: Tensor, x: Tensor, log_sum: Tensor) -> Tensor:
    """Entropies of rows in nats, from what `softmax_and_sums` has found of them."""
    return log_sum - x.clamp(min=torch.finfo(x.dtype).min).mul_(p).sum(-1)  # 0 * -inf would be NaN


@dataclass(frozen=True, eq=False)
class TopK:
    """Rows of a served teacher: the logprobs of a few tokens each.

    Put the token that was realized among them (vLLM's `prompt_logprobs` do), so that it always counts.

    Attributes:
        ids: int64 `[..., k]`; -1 is padding. No id twice in a row.
        logprobs: float `[..., k]`; nats, of the whole distribution; anything on padding.

    Raises:
        XTokMapError: shapes that differ, ids that are no integers.
    """

    ids: Tensor
    logprobs: Tensor

    def __post_init__(self) -> None:
        if self.ids.shape != self.logprobs.shape or self.ids.ndim < 2:
            raise XTokMapError(
                f"ids have shape {tuple(self.ids.shape)} and logprobs {tuple(self.logprobs.shape)}; both are [..., k]"
            )
        if self.ids.dtype != torch.int64 or not self.logprobs.is_floating_point():
            raise XTokMapError(
                f"ids are {self.ids.dtype} and logprobs {self.logprobs.dtype}; expected torch.int64 and floats"
            )

    @property
    def shape(self) -> torch.Size:
        """The leading shape."""
        return self.ids.shape[:-1]

    def to(self, device: torch.device | str) -> TopK:
        """The same on another device."""
        return TopK(self.ids.to(device, non_blocking=True), self.logprobs.to(device, non_blocking=True))

    def at(self, positions: Tensor) -> TopK:
        """The rows at these flat positions (int64, any shape), as `Logits.at`; a copy, as rows are small."""
        flat, k = positions.clamp(min=0), self.ids.shape[-1]
        if not self.shape.numel():  # nothing but -1 can ask for them
            empty = self.ids.new_full((*positions.shape, k), -1)
            return TopK(empty, torch.zeros_like(empty, dtype=self.logprobs.dtype))
        return TopK(self.ids.reshape(-1, k)[flat], self.logprobs.reshape(-1, k)[flat])

    def slice(self, a: int, b: int) -> tuple[Tensor, Tensor]:
        """Ids and logprobs (float32 or float64) of the flattened rows a to b: `[b-a, k]` each."""
        k = self.ids.shape[-1]
        return self.ids.reshape(-1, k)[a:b], _widened(self.logprobs.reshape(-1, k)[a:b].detach())


class Sliceable(Protocol):
    """What `map_rows` takes beside tensors: anything that can give its part for the rows a to b of the slice."""

    def slice(self, a: int, b: int) -> Any:
        """What `fn` is handed for rows a to b."""


#: A function of `[n, V]` student logits and of what belongs to the same rows.
RowFunction: TypeAlias = Callable[..., "Tensor | tuple[Tensor, ...]"]


def map_rows(
    fn: RowFunction,
    student: Logits,
    *others: Tensor | Sliceable,
    size: int | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`fn` of every row of logits, a slice of rows at a time, differentiable in the student.

    The logits of a slice exist while it is worked on, and are worked out again in the backward pass; the gradient of
    rows, head and bias is added up slice by slice in their own dtypes. A row that gets no gradient may hold anything.

    Args:
        fn: called as `fn(student_logits [n, V], *parts of others)`; float32 (float64 for float64 rows), scaled. It
            returns one value for each row or a tuple of such tensors `[n]`; it must not mix rows. Only the first
            tensor has a gradient.
        student: the rows.
        others: what `fn` needs beside them: tensors with the same leading shape, `Logits` or `TopK` of the same shape
            (see `at`), or anything with a `slice(a, b)`. Only tensors that require a gradient get one.
        size: rows of a slice; None takes 64 MiB of float32 for the largest vocabulary.
        rows: int64 `[N]` or None; the flat positions that matter, none twice. The others are not worked on and give 0.
            Made on the CPU beside the alignment it costs the device no question. What has a `slice` and no `at` must
            be in the order of `rows`.

    Returns:
        As many tensors as `fn` returns, in the student's leading shape.

    Raises:
        XTokMapError: others that have not one element for each row.
    """
    shape = student.shape
    for i, other in enumerate(others):
        leading = other.shape[: len(shape)] if isinstance(other, Tensor) else getattr(other, "shape", shape)
        if leading != shape:
            raise XTokMapError(f"others[{i}] has leading shape {tuple(leading)}, the student's rows {tuple(shape)}")
    parts: list[Any] = [o.reshape(-1, *o.shape[len(shape) :]) if isinstance(o, Tensor) else o for o in others]
    if rows is not None:
        student = student.at(rows)
        parts = [o[rows] if isinstance(o, Tensor) else o.at(rows) if hasattr(o, "at") else o for o in parts]
    if size is None:
        size = max(1, _SLICE // max(1, *(x.vocab_size for x in (student, *parts) if isinstance(x, Logits))))
    # Tensors go in one by one, so that autograd sees them.
    tensors = [o for o in parts if isinstance(o, Tensor)]
    sliceable = [None if isinstance(o, Tensor) else o for o in parts]
    out = _MapRows.apply(fn, student, sliceable, size, student.rows, student.weight, student.bias, *tensors)
    if rows is not None:
        out = tuple(x.new_zeros(shape.numel()).index_copy(0, rows, x) for x in out)
    return tuple(x.view(shape) for x in out)


class _MapRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        fn: RowFunction,
        student: Logits,
        others: list[Any],
        size: int,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rows, weight, bias, *tensors)
        ctx.fn, ctx.student, ctx.others, ctx.size = fn, replace(student, rows=rows[:0].detach()), others, size
        n = student.shape.numel()
        parts = []
        for a in range(0, max(n, 1), size):  # no rows: one empty slice, which says what fn returns
            b = min(n, a + size)
            out = fn(student.slice(a, b), *_parts(others, [x[a:b] for x in tensors], a, b))
            parts.append(out if isinstance(out, tuple) else (out,))
        joined = tuple(torch.cat(x) for x in zip(*parts, strict=True))
        ctx.mark_non_differentiable(*joined[1:])
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        rows, weight, bias, *tensors = ctx.saved_tensors
        student = replace(ctx.student, rows=rows, weight=weight, bias=bias)
        need_rows, need_weight, need_bias, *need = ctx.needs_input_grad[4:]
        whole = student.positions is None
        d_rows = (torch.empty if whole else torch.zeros)(rows.shape, dtype=rows.dtype, device=rows.device)
        flat = d_rows.view(-1, rows.shape[-1])
        d_weight = torch.zeros_like(weight) if need_weight else None
        d_bias = torch.zeros_like(bias) if need_bias else None
        d_tensors = [torch.empty_like(x) if needed else None for x, needed in zip(tensors, need, strict=True)]
        n = student.shape.numel()
        for a in range(0, n, ctx.size):
            b = min(n, a + ctx.size)
            g, h = grad[a:b], student._rows(a, b)
            wanted = (g != 0)[:, None]
            part = [x[a:b].detach().requires_grad_(needed) for x, needed in zip(tensors, need, strict=True)]
            d, *d_part = _row_gradients(ctx, student, student._head(h), part, a, b, g)
            for into in d_tensors:
                if into is not None:
                    into[a:b] = d_part.pop(0)
            if need_rows:
                to_rows = d if weight is None else torch.where(wanted, d @ weight, 0)
                if whole:
                    flat[a:b] = to_rows
                else:
                    flat.index_add_(0, student._at(a, b), to_rows)
            if d_weight is not None:
                d_weight.addmm_(d.T, torch.where(wanted, h, 0))
            if d_bias is not None:
                d_bias.add_(d.sum(0))
        return None, None, None, None, (d_rows if need_rows else None), d_weight, d_bias, *d_tensors


def _parts(others: list[Any], tensors: Sequence[Tensor], a: int, b: int) -> list[Any]:
    """Rows a to b of all that `fn` is given beside the student; None in `others` stands for the next tensor."""
    left = iter(tensors)
    with torch.no_grad():
        parts = [None if other is None else other.slice(a, b) for other in others]  # one of no rows is falsy
    return [next(left) if part is None else part for part in parts]


def _row_gradients(
    ctx: Any, student: Logits, logits: Tensor, tensors: list[Tensor], a: int, b: int, grad: Tensor
) -> list[Tensor]:
    """d loss / d logits of a slice, in the dtype of the logits, and of the tensors that require it."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        x = _scaled(leaf, student.temperature, student.softcap)[0]
        out = ctx.fn(x, *_parts(ctx.others, tensors, a, b))
    out = out[0] if isinstance(out, tuple) else out
    inputs = [leaf, *(x for x in tensors if x.requires_grad)]
    if not out.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(out, inputs, grad, allow_unused=True)
    gradients = []
    for x, d in zip(inputs, found, strict=True):
        # A row without gradient may hold anything, also what makes 0 * inf.
        wanted = (grad != 0).view(-1, *[1] * (x.ndim - 1))
        gradients.append(torch.zeros_like(x) if d is None else torch.where(wanted, d, 0))
    return gradients


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


def _widened(x: Tensor) -> Tensor:
    """float32, or float64 where it is already."""
    return x if x.dtype == torch.float64 else x.float()


def _scaled(logits: Tensor, temperature: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Logits in float32 (or float64) as the softmax takes them, and tanh of capped ones (for the derivative)."""
    x, tanh = _widened(logits), None
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

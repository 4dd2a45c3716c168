"""`transfer`: log q*(s_i | s_<i) of every sampled token, from rows that the teacher's pass over the text already has.

This is `CoverQueries` evaluated. It repairs the bias that every credit takes over from the boundaries of the teacher's
encoding (tokenization bias, arXiv 2406.16829 and 2410.09303): a boundary says what did not come next.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.boundary.cover import CoverQueries
from xtokmap.boundary.vocab_map import VocabMap
from xtokmap.ids import Int64
from xtokmap.losses.events import Within
from xtokmap.losses.plan import Asked, Plan, on_device, plan
from xtokmap.torch.logits import _SLICE, Logits, TopK, _widened, blocks, softmax_and_sums

_NONE = np.zeros(0, np.int64)


class Transferred(NamedTuple):
    """What `transfer` finds; flat, as the batch of the queries lies.

    Attributes:
        logprobs: float32 `[N]`; of the teacher's own tokens.
        transferred: float32 `[M]`; log q*(s_i | s_<i) of every student token, NaN where there is no query.
        phi: float64 `[M]`; log probability of the student's encoding up to each token, from the start of its row.
        before: float64 `[N + B]`; the sum of a row's teacher logprobs before each place.
        elements: float32 `[E]`; logprobs of the alternatives, in the order of the plan's parts.
        missing: float32 `[N + B]`; the mass of each row that top-k rows do not show; 0 for whole rows.
        within: what `Within` asks of whole rows: logprobs, logs of masses, and probabilities that these are without.
    """

    logprobs: Tensor
    transferred: Tensor
    phi: Tensor
    before: Tensor
    elements: Tensor
    missing: Tensor
    within: tuple[Tensor, Tensor, Tensor] | None = None


@torch.no_grad()
def transfer(
    teacher: Logits | TopK, teacher_ids: Tensor, queries: CoverQueries, *, size: int | None = None
) -> Transferred:
    """Evaluates cover queries beside the teacher's output head, a slice of rows at a time: never `[T, V]`.

    log q*(s_i | s_<i) = Phi(i) - Phi(i - 1), Phi(i) = logsumexp over the terms of token i of (the teacher's logprobs
    before the term's row) + log (mass of the term's set in that row). Logits of any float dtype are taken in float32;
    a row without some tokens is a difference of two sums of the same float32 numbers in float64, right to 1e-12.

    Args:
        teacher: flat rows `[N + B]`: for each batch row those that predict its n tokens and the one after the last.
        teacher_ids: int64 `[N]`, flat.
        queries: of the same batch, from `Aligner.cover_queries`.
        size: rows of a slice; None takes 64 MiB of float32.

    Raises:
        XTokMapError: another number of rows or ids.
    """
    p = plan(queries)
    if tuple(teacher.shape) != (p.rows,) or tuple(teacher_ids.shape) != (len(p.token_row),):
        raise XTokMapError(
            f"teacher rows {tuple(teacher.shape)} and ids {tuple(teacher_ids.shape)}; these queries need ({p.rows},) "
            f"rows (one more than tokens for each of {len(queries)} completions) and ({len(p.token_row)},) ids"
        )
    device = teacher_ids.device

    on = partial(on_device, device=device)
    size = size or max(1, _SLICE // (teacher.vocab_size if isinstance(teacher, Logits) else 4096))
    dtype = _widened((teacher.rows if isinstance(teacher, Logits) else teacher.logprobs)[:0]).dtype
    within = Within.of(queries) if isinstance(teacher, Logits) else None
    asked, orders = Asked.joined([p.asked, *([] if within is None else [within.asked])])
    logprobs, elements, kept, left, missing = (
        torch.zeros(n, device=device, dtype=dtype)
        for n in (len(p.token_row), len(asked.row), len(asked.mass_row), len(asked.mass_id), p.rows)
    )
    for a in range(0, p.rows, size):
        b = min(p.rows, a + size)
        k0, k1 = np.searchsorted(asked.mass_row, (a, b))
        ptr = asked.mass_ptr[k0 : k1 + 1]
        owner = np.repeat(np.arange(k1 - k0), np.diff(ptr))
        rows = _Rows(teacher, a, b, asked.mass_row[k0:k1] - a, owner, asked.mass_id[ptr[0] : ptr[-1]])
        missing[a:b] = rows.missing
        t0, t1 = np.searchsorted(p.token_row, (a, b))
        logprobs[t0:t1] = rows.logprobs(on(p.token_row[t0:t1] - a), teacher_ids[t0:t1])
        e0, e1 = np.searchsorted(asked.row, (a, b))
        elements[e0:e1] = rows.logprobs(on(asked.row[e0:e1] - a), on(asked.id[e0:e1]))
        kept[k0:k1], left[ptr[0] : ptr[-1]] = rows.kept, rows.left

    elements, kept, left = (
        torch.empty_like(x).index_copy_(0, on(order), x)
        for x, order in zip((elements, kept, left), orders, strict=True)
    )
    n, m, k = len(p.asked.row), len(p.asked.mass_row), len(p.asked.mass_id)
    # Terms: those that are one row but some tokens, and those that are elements.
    values = torch.zeros(len(p.row), device=device, dtype=dtype)
    values[on(np.flatnonzero(p.kept))] = kept[:m]
    values[on(p.sparse)] = _logsumexp(elements[:n], on(p.element_term), len(p.sparse))
    found = _joined(p, logprobs, values, torch.cat([elements[:n], values[on(p.fixed)]]), missing)
    return found if within is None else found._replace(within=(elements[n:], kept[m:], left[k:]))


@torch.no_grad()
def transfer_masses(logprobs: Tensor, masses: Tensor, queries: CoverQueries) -> Transferred:
    """As `transfer`, from what somebody else has found in the rows: then there are no elements.

    Args:
        logprobs: float `[N]`, flat; of the teacher's own tokens.
        masses: float `[K]`; the log of the mass of every term, in the order of `plan`.
        queries: of the same batch.

    Raises:
        XTokMapError: another number of logprobs or masses.
    """
    p = plan(queries)
    if tuple(logprobs.shape) != (len(p.token_row),) or tuple(masses.shape) != (len(p.row),):
        raise XTokMapError(
            f"{tuple(logprobs.shape)} logprobs and {tuple(masses.shape)} masses; these queries have "
            f"{len(p.token_row)} teacher tokens and {len(p.row)} terms"
        )
    return _joined(p, logprobs, masses, logprobs.new_zeros(0), logprobs.new_zeros(p.rows))


def _joined(p: Plan, logprobs: Tensor, values: Tensor, elements: Tensor, missing: Tensor) -> Transferred:
    """What follows from the masses of the terms."""
    on = partial(on_device, device=logprobs.device)
    before = _sums_before(logprobs, p, on)
    phi = _logsumexp(before[on(p.row)] + values, on(p.owner), p.students)
    previous = torch.cat([phi.new_zeros(1), phi[:-1]])
    base = on(p.base)
    previous = torch.where(base >= 0, before[base.clamp(min=0)], previous) if p.rows else previous
    transferred = torch.where(on(p.known), phi - previous, torch.nan).to(logprobs.dtype)
    return Transferred(logprobs, transferred, phi, before, elements, missing)


@torch.no_grad()
def boundary_leak(teacher: Logits, teacher_ids: Tensor, vocab_map: VocabMap) -> Tensor:
    """What a teacher token's end says about what comes next: log pi(t) - log q(t), in nats, of every token.

    pi(t) is the mass of all teacher tokens that begin with the bytes of t. A credit that takes log q(t) for the
    teacher's opinion of the text is off by this much where nothing else has ended there. (The sum that byte-level
    sampling from tokens makes, arXiv 2410.09303.) For some tokens of a text: only the logits of those that begin with
    each are made.

    Args:
        teacher: flat rows `[N]`, each the one that predicts its token.
        teacher_ids: int64 `[N]`.
        vocab_map: of the pair.

    Returns:
        float32 `[N]`, at least 0; 0 for tokens without bytes.
    """
    order = vocab_map.teacher_order.astype(np.int64)
    leaks = torch.zeros(len(teacher_ids), device=teacher_ids.device)
    for i, token in enumerate(teacher_ids.tolist()):
        a, b = vocab_map.teacher_range[token]
        if a < b:
            # Its own logit comes last.
            x = teacher.some(i, on_device(np.append(order[a:b], token), teacher_ids.device))
            leaks[i] = x[:-1].logsumexp(-1) - x[-1]
    return leaks.clamp(min=0)


def _sums_before(logprobs: Tensor, p: Plan, on: Any) -> Tensor:
    """float64 `[N + B]`: sums of a row's logprobs before each place. Long rows add up to thousands of nats."""
    steps = torch.zeros(p.rows + 1, dtype=torch.float64, device=logprobs.device)
    steps[on(p.token_row + 1)] = logprobs.double()
    total = steps.cumsum(0)[:-1]
    # The step into a batch row's first place is the last token of the row before.
    return total - total[on(p.first_row)][on(p.row_of_batch)] if p.rows else total


def _logsumexp(values: Tensor, owner: Tensor, n: int) -> Tensor:
    """Of the values of every owner: `[n]`, -inf where there are none."""
    top = values.new_full((n,), -torch.inf).scatter_reduce(0, owner, values, "amax")
    shift = torch.where(torch.isfinite(top), top, 0)
    return values.new_zeros(n).index_add(0, owner, torch.exp(values - shift[owner])).log() + shift


class _Rows:
    """A slice of teacher rows: whole, or as far as a served teacher's top-k shows them.

    Args:
        teacher: the rows.
        a: the first.
        b: behind the last.
        row: of every mass that is wanted, its row counted from a, rising.
        owner: of every token that is left out of such a mass, which of them it is, rising.
        ids: the tokens.

    Attributes:
        missing: the mass of each row that is not shown.
        kept: log of the mass of each of `row` without its tokens.
        left: the probabilities of these.
    """

    def __init__(
        self, teacher: Logits | TopK, a: int, b: int, row: Int64 = _NONE, owner: Int64 = _NONE, ids: Int64 = _NONE
    ) -> None:
        self.missing: Tensor | float = 0.0
        self._ids = None
        if isinstance(teacher, TopK):
            shown, logprobs = teacher.slice(a, b)
            self._ids, order = shown.sort(-1)  # padding, -1, comes first
            self._x = torch.where(self._ids < 0, -torch.inf, logprobs.gather(1, order))
            # What is missing may be anything: it counts as kept.
            mass = self._x.double().exp().sum(-1)
            self.missing = (1 - mass).clamp(min=0).to(self._x.dtype)
            on = partial(on_device, device=shown.device)
            at, tokens = on(row[owner]), on(ids)
            place = self._places(at, tokens)
            left_out = torch.where(self._ids[at, place] == tokens, self._x[at, place].double().exp(), 0)
            kept = (mass + self.missing)[on(row)].index_add(0, on(owner), left_out, alpha=-1)
            self.kept, self.left = kept.clamp(min=1e-38).log().to(self._x.dtype), left_out.to(self._x.dtype)
            return
        self._logits = teacher.made(a, b)
        device = self._logits.logits.device
        of, at, tokens, owners = (on_device(x, device) for x in (row, row[owner], ids, owner))
        sums, masses, left = [], [], []
        for c, d in blocks(b - a, teacher.vocab_size, device):
            p, log_sum = softmax_and_sums(self._logits.slice(c, d))
            sums.append(log_sum)
            first, last = np.searchsorted(row, (c, d))
            if first < last:
                lo, hi = np.searchsorted(owner, (first, last))
                # The same float32 numbers are added up and taken away, so that little cancels.
                whole = p.sum(-1, dtype=torch.float64)[of[first:last] - c]
                left.append(p[at[lo:hi] - c, tokens[lo:hi]])
                masses.append(whole.index_add(0, owners[lo:hi] - first, left[-1].double(), alpha=-1))
        self._lse = torch.cat(sums)
        kept = torch.cat([self._lse.new_zeros(0, dtype=torch.float64), *masses])
        self.kept = kept.clamp(min=1e-38).log().to(self._lse.dtype)
        self.left = torch.cat([self._lse.new_zeros(0), *left])

    def logprobs(self, row: Tensor, ids: Tensor) -> Tensor:
        if self._ids is None:
            return self._logits.at(row, ids) - self._lse[row]
        at = self._places(row, ids)
        return torch.where(self._ids[row, at] == ids, self._x[row, at], -torch.inf)

    def _places(self, row: Tensor, ids: Tensor) -> Tensor:
        assert self._ids is not None
        # One search for all rows: ids of row r are moved by r vocabularies.
        stride = 2**32
        keys = (self._ids + 1 + torch.arange(len(self._ids), device=row.device)[:, None] * stride).reshape(-1)
        found = torch.searchsorted(keys, ids + 1 + row * stride) - row * self._ids.shape[1]
        return found.clamp(0, self._ids.shape[1] - 1)

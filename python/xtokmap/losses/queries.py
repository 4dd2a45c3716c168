"""`transfer`: log q*(s_i | s_<i) of every sampled token, from rows that the teacher's pass over the text already has.

This is `CoverQueries` evaluated. It repairs the bias that every credit takes over from the boundaries of the teacher's
encoding (tokenization bias, arXiv 2406.16829 and 2410.09303): a boundary says what did not come next.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.boundary.cover import CoverQueries
from xtokmap.boundary.vocab_map import VocabMap
from xtokmap.ids import Int64
from xtokmap.losses.events import Within
from xtokmap.losses.plan import Plan, Transferred, on_device, plan, rows_of, take
from xtokmap.torch.logits import _SLICE, Logits, TopK, _widened, blocks, softmax_and_sums


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
    reading = Reading(teacher, teacher_ids, queries, size=size)
    reading.read(reading.plan.rows)
    return reading.values


class Reading:
    """Cover queries, evaluated as the teacher's rows come: each is made once, from the first to the last.

    Args:
        teacher: as `transfer`.
        teacher_ids: as `transfer`.
        queries: as `transfer`.
        size: as `transfer`.

    Attributes:
        plan: of the queries.
        values: what was found so far; the tensors fill up.
        rows: how many rows have been read.
        size: how many are read at a time.
    """

    def __init__(
        self, teacher: Logits | TopK, teacher_ids: Tensor, queries: CoverQueries, *, size: int | None = None
    ) -> None:
        p = self.plan = plan(queries)
        if tuple(teacher.shape) != (p.rows,) or tuple(teacher_ids.shape) != (len(p.token_row),):
            raise XTokMapError(
                f"teacher rows {tuple(teacher.shape)} and ids {tuple(teacher_ids.shape)}; these queries need "
                f"({p.rows},) rows (one more than tokens for each of {len(queries)} completions) and "
                f"({len(p.token_row)},) ids"
            )
        self._teacher, self._ids = teacher, teacher_ids
        self._on = partial(on_device, device=teacher_ids.device)
        self.size = size or max(1, _SLICE // (teacher.vocab_size if isinstance(teacher, Logits) else 4096))
        within = Within.of(queries) if isinstance(teacher, Logits) else None
        self._asked = [p.asked, *([] if within is None else [within.asked])]
        dtype = _widened((teacher.rows if isinstance(teacher, Logits) else teacher.logprobs)[:0]).dtype

        def zeros(size: int) -> Tensor:
            return torch.zeros(size, device=teacher_ids.device, dtype=dtype)

        self._terms = zeros(len(p.row))
        behind = None
        if within is not None:
            behind = zeros(len(within.asked.row)), zeros(len(within.asked.mass_row)), zeros(int(within.behind_ptr[-1]))
            self._behind_ptr = within.behind_ptr
        self._sums = _Sums(p, zeros(len(p.part_row)), behind)
        self.values, self.rows = self._sums.values, 0

    @torch.no_grad()
    def read(self, to: int, into: Tensor | None = None) -> None:
        """Reads on until so many rows have been read.

        Args:
            to: how many.
            into: `[n, V]`, for the probabilities of the n rows that are read, at most `size`; of whole rows.
        """
        while self.rows < to:
            b = min(to, self.rows + self.size)
            self._slice(self.rows, b, into)
            self.rows = b

    def _slice(self, a: int, b: int, into: Tensor | None) -> None:
        p, on, values, none = self.plan, self._on, self.values, np.zeros(0, np.int64)
        t0, t1 = np.searchsorted(p.token_row, (a, b))
        parts = [_Part(p.token_row[t0:t1] - a, self._ids[t0:t1], none, np.zeros(1, np.int64), none)]
        bounds = [[np.searchsorted(rows, (a, b)) for rows in (asked.row, asked.mass_row)] for asked in self._asked]
        for asked, ((e0, e1), (k0, k1)) in zip(self._asked, bounds, strict=True):
            ptr, at = rows_of(p.sets.indptr, asked.mass_set[k0:k1])
            without = take(p.sets.ids, at).astype(np.int64)
            parts.append(_Part(asked.row[e0:e1] - a, on(asked.id[e0:e1]), asked.mass_row[k0:k1] - a, ptr, without))
        if isinstance(self._teacher, TopK):
            (own, *found), values.missing[a:b] = _of_top(self._teacher, a, b, parts)
        else:
            own, *found = _of_whole(self._teacher, a, b, parts, into)
        values.logprobs[t0:t1] = own.logprobs
        # Terms: those that are one row but some tokens, and those that are elements.
        (e0, e1), (k0, k1) = bounds[0]
        self._terms[on(p.complements[k0:k1])] = found[0].kept
        s0, s1 = np.searchsorted(p.row[p.sparse], (a, b))
        values.elements[e0:e1] = logprobs = found[0].logprobs
        self._terms[on(p.sparse[s0:s1])] = _logsumexp(logprobs, on(p.element_term[e0:e1] - s0), s1 - s0)
        f0, f1 = np.searchsorted(p.row[p.fixed], (a, b))
        values.elements[len(p.element_id) + f0 : len(p.element_id) + f1] = self._terms[on(p.fixed[f0:f1])]
        if values.within is not None:
            ((e0, e1), (k0, k1)), (logprobs, kept, left) = bounds[1], values.within
            logprobs[e0:e1], kept[k0:k1] = found[1].logprobs, found[1].kept
            left[self._behind_ptr[k0] : self._behind_ptr[k1]] = found[1].left
        self._sums.add(a, b, self._terms)


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
    sums = _Sums(p, logprobs.new_zeros(0))
    sums.values.logprobs.copy_(logprobs)
    sums.add(0, p.rows, masses)
    return sums.values


class _Sums:
    """Phi and log q* from the masses of the terms, as far as rows have been read."""

    def __init__(self, p: Plan, elements: Tensor, within: tuple[Tensor, ...] | None = None) -> None:
        self._plan, self._on = p, partial(on_device, device=elements.device)
        #: Sums of the teacher's logprobs before each row, over all rows. Long ones add up to thousands of nats.
        self._total = torch.zeros(p.rows + 1, dtype=torch.float64, device=elements.device)
        self._tokens = 0
        logprobs, missing = elements.new_zeros(len(p.token_row)), elements.new_zeros(p.rows)
        transferred = elements.new_full((p.students,), torch.nan)
        phi, before = self._total.new_zeros(p.students), self._total.new_zeros(p.rows)
        self.values = Transferred(logprobs, transferred, phi, before, elements, missing, within)

    def add(self, a: int, b: int, terms: Tensor) -> None:
        """Takes rows a to b, of which the logprobs are there; `terms`: log of the mass of every term."""
        p, on, values = self._plan, self._on, self.values
        t0, t1 = np.searchsorted(p.token_row, (a, b))
        steps = self._total.new_zeros(b - a)
        steps[on(p.token_row[t0:t1] - a)] = values.logprobs[t0:t1].double()
        self._total[a + 1 : b + 1] = self._total[a] + steps.cumsum(0)
        values.before[a:b] = self._total[a:b] - self._total[on(p.first_row[p.row_of_batch[a:b]])]
        i, j = self._tokens, int(np.searchsorted(p.rows_for, b, side="right"))
        own = on(p.by_owner[p.owner_ptr[i] : p.owner_ptr[j]])
        of = np.repeat(np.arange(j - i), np.diff(p.owner_ptr[i : j + 1]))
        values.phi[i:j] = phi = _logsumexp(values.before[on(p.row)[own]] + terms[own], on(of), j - i)
        previous = torch.cat([phi.new_zeros(1), values.phi])[i:j]
        base = on(p.base[i:j])
        previous = torch.where(base >= 0, values.before[base.clamp(min=0)], previous)
        values.transferred[i:j] = torch.where(on(p.known[i:j]), phi - previous, torch.nan).to(terms.dtype)
        self._tokens = j


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


def _logsumexp(values: Tensor, owner: Tensor, n: int) -> Tensor:
    """Of the values of every owner: `[n]`, -inf where there are none."""
    top = values.new_full((n,), -torch.inf).scatter_reduce(0, owner, values, "amax")
    shift = torch.where(torch.isfinite(top), top, 0)
    return values.new_zeros(n).index_add(0, owner, torch.exp(values - shift[owner])).log() + shift


class _Part(NamedTuple):
    """What is asked of a slice of rows, which are counted from its first: as `Asked`.

    Attributes:
        row: of every logprob its row.
        ids: int64, on the device; and its token.
        mass_row: of every mass its row, rising.
        mass_ptr: compressed rows of the tokens that each is without.
        mass_ids: these.
    """

    row: Int64
    ids: Tensor
    mass_row: Int64
    mass_ptr: Int64
    mass_ids: Int64


class _Rows(NamedTuple):
    """What was asked.

    Attributes:
        logprobs: of the tokens that were asked for.
        kept: log of every mass.
        left: the probabilities of the tokens that the masses are without.
    """

    logprobs: Tensor
    kept: Tensor
    left: Tensor


def _of_top(teacher: TopK, a: int, b: int, parts: list[_Part]) -> tuple[list[_Rows], Tensor]:
    """Of rows a to b as far as a served teacher's top-k shows them, and the mass of each that it does not."""
    shown, logprobs = teacher.slice(a, b)
    on = partial(on_device, device=shown.device)
    shown, order = shown.sort(-1)  # padding, -1, comes first
    x = torch.where(shown < 0, -torch.inf, logprobs.gather(1, order))
    # One search for all rows: ids of row r are moved by r vocabularies.
    stride = 2**32
    keys = (shown + 1 + torch.arange(len(shown), device=shown.device)[:, None] * stride).reshape(-1)

    def found(row: Tensor, ids: Tensor) -> Tensor:
        place = torch.searchsorted(keys, ids + 1 + row * stride) - row * shown.shape[1]
        place = place.clamp(0, shown.shape[1] - 1)
        return torch.where(shown[row, place] == ids, x[row, place], -torch.inf)

    # What is missing may be anything: it counts as kept.
    mass = x.double().exp().sum(-1)
    missing = (1 - mass).clamp(min=0).to(x.dtype)
    rows = []
    for part in parts:
        owner = np.repeat(np.arange(len(part.mass_row)), np.diff(part.mass_ptr))
        left = found(on(part.mass_row[owner]), on(part.mass_ids)).double().exp()
        kept = (mass + missing)[on(part.mass_row)].index_add(0, on(owner), left, alpha=-1)
        rows.append(_Rows(found(on(part.row), part.ids), kept.clamp(min=1e-38).log().to(x.dtype), left.to(x.dtype)))
    return rows, missing


def _of_whole(teacher: Logits, a: int, b: int, parts: list[_Part], into: Tensor | None) -> list[_Rows]:
    """Of rows a to b, whole; their probabilities are left in `into` `[b-a, V]`."""
    made = teacher.made(a, b, into)
    device = made.logits.device
    on = partial(on_device, device=device)
    # Now: the memory may be that of the probabilities.
    logits = [made.at(on(part.row), part.ids) for part in parts]
    sums: list[Tensor] = []
    masses, left = ([[x.new_zeros(0)] for x in logits] for _ in range(2))
    for c, d in blocks(b - a, teacher.vocab_size, device):
        p, log_sum = softmax_and_sums(made.slice(c, d))
        sums.append(log_sum)
        for part, own, without in zip(parts, masses, left, strict=True):
            first, last = np.searchsorted(part.mass_row, (c, d))
            if first < last:
                lo, hi = part.mass_ptr[first], part.mass_ptr[last]
                owner = np.repeat(np.arange(last - first), np.diff(part.mass_ptr[first : last + 1]))
                row = part.mass_row[first:last] - c
                without.append(p[on(row[owner]), on(part.mass_ids[lo:hi])])
                # The same float32 numbers are added up and taken away, so that little cancels.
                kept = p.sum(-1, dtype=torch.float64)[on(row)].index_add(0, on(owner), without[-1].double(), alpha=-1)
                own.append(kept.clamp(min=1e-38).log().to(p.dtype))
        if into is not None:
            into[c:d] = p
    every = torch.cat(sums)
    return [
        _Rows(x - every[on(part.row)], torch.cat(own), torch.cat(without))
        for x, part, own, without in zip(logits, parts, masses, left, strict=True)
    ]

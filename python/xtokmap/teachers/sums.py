"""Sums of a teacher's mass over sets of its tokens: what `cover` needs of whole rows, without the rows.

The sets depend on the two tokenizers and on what was sampled, not on the teacher's weights. Sorted by their bytes, the
tokens of a set lie in a few ranges, so that a request has some 800 bytes a token; the answer has one number for each
set. `Terms` goes over the wire, `masses` is the server's part, `terms_of` and `question` are the client's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xtokmap._core import ByteTable, XTokMapError
from xtokmap.boundary.cover import CoverQueries
from xtokmap.ids import Int32
from xtokmap.losses.plan import plan
from xtokmap.teachers import binary, http1
from xtokmap.teachers.client import _ABOVE, BadAnswerError, Question
from xtokmap.torch.logits import _SLICE, Logits

#: Where this package's servers are asked.
PATH = "/v1/sums"

#: Terms, and ranges of them, that a server works on for each place of a row, and how many more than that: real
#: requests have two, and some two hundred ranges.
_TERMS, _RANGES, _MORE = 64, 4096, 2**10

#: Ranges that are summed up at a time.
_AT_ONCE = 2**20


@dataclass(frozen=True, eq=False)
class Terms:
    """Sets of tokens of which some rows' masses are asked; K terms, S sets, R ranges.

    Attributes:
        row: int32 `[K]`, rising; the place whose row is meant, counted from the first one that is asked about.
        set: int32 `[K]`; the place of the set, or `-1 - id` for a single token.
        indptr: int32 `[S+1]`; the ranges of each set.
        ranges: int32 `[R, 2]`; `[lo, hi)` in the order of `byte_order`, disjoint and rising inside a set.
        special: bool `[S]`; whether all tokens without bytes are in the set, too.
    """

    row: Int32
    set: Int32
    indptr: Int32
    ranges: Int32
    special: npt.NDArray[np.bool_]

    def tensors(self) -> dict[str, Tensor]:
        """What goes over the wire."""
        arrays = {name: getattr(self, name) for name in ("row", "set", "indptr", "ranges", "special")}
        return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in arrays.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], places: int, vocab_size: int, ordered: int) -> Terms:
        """Terms that came over the wire, checked.

        Args:
            tensors: as `tensors` gives them.
            places: rows that are asked about.
            vocab_size: of the model.
            ordered: tokens that have bytes.

        Raises:
            XTokMapError: they are no terms, or too many.
        """
        shapes = {"row": (None,), "set": (None,), "indptr": (None,), "ranges": (None, 2), "special": (None,)}
        for name, shape in shapes.items():
            x, dtype = tensors.get(name), torch.bool if name == "special" else torch.int32
            if x is None or x.dtype != dtype or x.ndim != len(shape) or x.shape[1:] != shape[1:]:
                found = "missing" if x is None else f"{x.dtype} {tuple(x.shape)}"
                raise XTokMapError(f"{name} is {found}; it must be {dtype} of shape {shape}")
        row, which, indptr, ranges, special = (tensors[name].numpy() for name in shapes)
        if len(row) != len(which) or len(row) > _TERMS * places + _MORE:
            raise XTokMapError(f"{len(row)} rows and {len(which)} sets of terms for {places} places")
        if (
            len(indptr) != len(special) + 1
            or indptr[0] != 0
            or indptr[-1] != len(ranges)
            or (np.diff(indptr) < 0).any()
        ):
            raise XTokMapError(f"indptr does not divide {len(ranges)} ranges into {len(special)} sets")
        if len(row) and not (row[0] >= 0 and row[-1] < places and (np.diff(row) >= 0).all()):
            raise XTokMapError(f"row does not rise from 0 to {places - 1}")
        if len(which) and not (-1 - vocab_size < which.min() and which.max() < len(special)):
            raise XTokMapError(f"set has values beyond {len(special)} sets and {vocab_size} tokens")
        flat = ranges.reshape(-1)
        rises = np.diff(flat.astype(np.int64)) >= 0
        rises[2 * indptr[1:-1][(indptr[1:-1] > 0) & (indptr[1:-1] < len(ranges))] - 1] = True  # from set to set
        if len(flat) and not (flat.min() >= 0 and flat.max() <= ordered and rises.all()):
            raise XTokMapError(f"ranges do not rise from 0 to {ordered}")
        counts = np.diff(indptr)
        if len(counts) and int(counts[which[which >= 0]].astype(np.int64).sum()) > _RANGES * (places + _TERMS):
            raise XTokMapError(f"the terms have more than {_RANGES} ranges for each of {places} places")
        return cls(row, which, indptr, ranges, special)


def byte_order(table: ByteTable) -> Int32:
    """The ids of the tokens that have bytes, sorted by these; equal ones by id. As `VocabMap.teacher_order`."""
    spelled = [(table[i], i) for i in range(len(table))]
    return np.array([i for _, i in sorted((b, i) for b, i in spelled if b)], np.int32)


def digest(order: Int32) -> str:
    """What tells one order from another, so that ranges are of the tokens that are meant."""
    return hashlib.sha256(np.ascontiguousarray(order, np.int32).tobytes()).hexdigest()


@torch.no_grad()
def masses(rows: Logits, ids: Tensor, terms: Terms, order: Tensor) -> tuple[Tensor, Tensor]:
    """Logprobs of some tokens, and the log of the mass of each term, a slice of rows at a time.

    Sums are of positive parts, pairwise and in float64: nothing cancels, and nothing is lost in a small one.

    Args:
        rows: flat `[n + 1]`, or one less where the row after the last token is not asked for.
        ids: int64 `[n]`, the tokens that rows 0 to n - 1 predict.
        terms: checked.
        order: int64, from `byte_order`, on the device of the rows.

    Returns:
        float32 `[n]` and `[K]`; -inf for a mass of 0.
    """
    device, v = rows.rows.device, rows.vocab_size
    logprobs = torch.zeros(len(ids), device=device)
    found = torch.zeros(len(terms.row), device=device)
    special = torch.ones(v, dtype=torch.bool, device=device)
    special[order] = False
    size, n = max(1, _SLICE // 4 // v), rows.shape.numel()
    counts = np.where(terms.set >= 0, np.diff(terms.indptr, append=0)[np.maximum(terms.set, 0)], 0).astype(np.int64)
    for a in range(0, n, size):
        b = min(n, a + size)
        log_p = rows.slice(a, b).double().log_softmax(-1)
        own = ids[a:b]
        logprobs[a : a + len(own)] = log_p[: len(own)].gather(1, own[:, None])[:, 0].float()
        first, last = np.searchsorted(terms.row, (a, b))
        at = np.arange(first, last)
        single = at[terms.set[at] < 0]
        found[_on(single, device)] = log_p[
            _on(terms.row[single] - a, device), _on(-1 - terms.set[single].astype(np.int64), device)
        ].float()
        p = log_p.exp()
        tree, others = _Tree(p[:, order]), p[:, special].sum(-1)
        several = at[terms.set[at] >= 0]
        ends = np.searchsorted(
            counts[several].cumsum(), np.arange(_AT_ONCE, counts[several].sum() + _AT_ONCE, _AT_ONCE)
        )
        for some in np.split(several, np.unique(ends) + 1):
            row, which = _on(terms.row[some] - a, device), terms.set[some]
            owner = np.repeat(np.arange(len(some)), counts[some])
            place = np.arange(len(owner)) + np.repeat(
                terms.indptr[which].astype(np.int64) - (counts[some].cumsum() - counts[some]), counts[some]
            )
            sums = torch.where(_on(terms.special[which], device), others[row], 0.0)
            of = _on(owner, device)
            sums = sums.index_add(0, of, tree.sums(row[of], _on(terms.ranges[place].astype(np.int64), device)))
            found[_on(some, device)] = sums.log().float()
    return logprobs, found


class _Tree:
    """Sums over pairs, pairs of pairs and so on, of rows `[r, N]`: any range is a few of them."""

    def __init__(self, rows: Tensor) -> None:
        self.levels = [rows]
        while (width := self.levels[-1].shape[1]) > 1:
            below = self.levels[-1]
            below = torch.nn.functional.pad(below, (0, width % 2))
            self.levels[-1] = below
            self.levels.append(below.view(len(below), -1, 2).sum(-1))

    def sums(self, row: Tensor, ranges: Tensor) -> Tensor:
        """Of the ranges `[R, 2]` in the rows `[R]`."""
        lo, hi = ranges.unbind(-1)
        total = torch.zeros(len(row), dtype=self.levels[0].dtype, device=row.device)
        for level in self.levels:
            last = level.shape[1] - 1
            left = (lo < hi) & (lo % 2 == 1)
            total += torch.where(left, level[row, lo.clamp(max=last)], 0)
            lo = lo + left.long()
            right = (lo < hi) & (hi % 2 == 1)
            hi = hi - right.long()
            total += torch.where(right, level[row, hi.clamp(max=last)], 0)
            lo, hi = lo // 2, hi // 2
        return total


def _on(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def question(ids: Sequence[int], first: int, terms: Terms, order: str, model: str) -> Question:
    """The request for the logprobs of a row's ids from `first` on, and for the masses of terms.

    Args:
        ids: of the row, prompt and completion.
        first: the first one that is scored.
        terms: of the rows behind `first`.
        order: `digest` of the order in which the ranges are meant.
        model: its name.
    """
    tensors = {"ids": torch.tensor(ids, dtype=torch.int32), **terms.tensors()}
    payload = binary.pack(tensors, {"first": str(first), "order": order, "model": model})
    n, k = len(ids) - first, len(terms.row)

    def read(answer: http1.Answer) -> tuple[Tensor, Tensor]:
        try:
            found, _ = binary.unpack(answer.content)
        except ValueError as error:
            raise BadAnswerError(str(error)) from None
        parts = []
        for name, size in (("logprobs", n), ("masses", k)):
            x = found.get(name)
            if x is None or x.dtype != torch.float32 or tuple(x.shape) != (size,):
                said = "no" if x is None else f"{x.dtype} {tuple(x.shape)} as"
                raise BadAnswerError(f"{said} {name} for {n} tokens and {k} sets")
            if not bool((x <= _ABOVE).all()):  # NaN is not, either
                raise BadAnswerError(f"{name} with {float(x[~(x <= _ABOVE)][0])}")
            parts.append(x.clamp(max=0))
        return parts[0], parts[1]

    return Question(PATH, payload, 2**16 + 4 * (n + k), read, "application/octet-stream", binary=True)


def terms_of(queries: CoverQueries) -> list[Terms]:
    """The terms of each row of a batch, in the order of `transfer`'s plan.

    Raises:
        XTokMapError: a set has some tokens without bytes, and not all.
    """
    p, sets, vm = plan(queries), queries.sets, queries.vocab_map
    n, size = len(vm.teacher_order), len(sets.complement)
    place = np.full(max(len(vm.teacher_to_student), 1), -1, np.int64)
    place[vm.teacher_order] = np.arange(n)
    at = place[sets.ids]
    if (at < 0).any():
        raise XTokMapError("a set of tokens has some that have no bytes; ask for hidden states, or for the top k")
    # Ranges of what is listed, and with the two ends what lies between them.
    stride = n + 2
    owner = np.repeat(np.arange(size), np.diff(sets.indptr))
    keys = np.sort(owner * stride + at + 1)
    cuts = np.flatnonzero(np.diff(keys, prepend=-9) != 1)
    stops = np.append(cuts[1:], len(keys)) - 1
    lo, hi = keys[cuts], keys[stops] + 1 if len(keys) else keys[cuts]
    listed = sets.complement[keys[cuts] // stride] if len(keys) else np.zeros(0, np.bool_)
    # A complement begins at 0 and behind each listed range, and ends before each and at n.
    ends = np.flatnonzero(sets.complement).astype(np.int64) * stride
    starts = np.sort(np.concatenate([lo[~listed], hi[listed], ends + 1]))
    stops = np.sort(np.concatenate([hi[~listed], lo[listed], ends + n + 1]))
    kept = starts < stops
    starts, stops = starts[kept], stops[kept]
    indptr = np.searchsorted(starts, np.arange(size + 1) * stride)
    ranges = np.stack([starts % stride - 1, stops - starts // stride * stride - 1], -1).astype(np.int32)
    found = []
    bounds = np.searchsorted(p.row, np.append(p.first_row, p.rows))
    for b, (k0, k1) in enumerate(pairwise(bounds)):
        which = p.set[k0:k1]
        used, moved = np.unique(which[which >= 0], return_inverse=True)
        own = which.astype(np.int32)
        own[which >= 0] = moved
        parts = [ranges[indptr[s] : indptr[s + 1]] for s in used]
        ptr = np.concatenate([np.zeros(1, np.int64), np.cumsum([len(part) for part in parts], dtype=np.int64)])
        found.append(
            Terms(
                (p.row[k0:k1] - p.first_row[b]).astype(np.int32),
                own,
                ptr.astype(np.int32),
                np.concatenate([np.zeros((0, 2), np.int32), *parts]),
                sets.complement[used],
            )
        )
    return found

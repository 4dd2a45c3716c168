"""Losses on whole next-token distributions across tokenizers, differentiable in the student.

Notation: p is the student and q the teacher; a chunk is a span between two consecutive common byte ends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.torch import ChunkIndex


class Loss(NamedTuple):
    """A loss, what it is made of, and what to watch.

    Attributes:
        loss: float32 scalar; the sum of `terms` over the number of scored tokens, or over `denominator`.
        terms: float32 `[B, Ts]`; what every student token adds to the sum, 0 where unscored.
        figures: tensors by name, without a gradient and not read back from the device: `scored` (share of the
            response tokens that are scored), `tokens` (how many those are), `nonfinite` (tokens left out because
            their term is NaN or infinite), and what each loss adds.
    """

    loss: Tensor
    terms: Tensor
    figures: dict[str, Tensor]


def reduce_terms(
    terms: Tensor,
    scored: Tensor,
    mask: Tensor | None = None,
    denominator: Tensor | float | None = None,
    figures: dict[str, Tensor] | None = None,
) -> Loss:
    """The mean of the scored terms, which are selected: whatever stands elsewhere reaches no sum and no gradient.

    Args:
        terms: `[B, Ts]`.
        scored: bool `[B, Ts]`.
        mask: bool or 0/1 `[B, Ts]`, the response tokens, of which the scored ones are some; None: all tokens.
        denominator: what to divide by instead of the number of scored terms, so that micro-batches add up.
        figures: to hand on.
    """
    if mask is not None:
        scored = scored & mask.bool()
    finite = torch.isfinite(terms.detach())
    kept = scored & finite
    terms = torch.where(kept, terms, 0)
    count = kept.sum()
    response = torch.as_tensor(kept.numel(), device=count.device) if mask is None else mask.bool().sum()
    figures = {name: x.detach() for name, x in (figures or {}).items()}
    figures |= {"scored": count / response.clamp(min=1), "tokens": count, "nonfinite": (scored & ~finite).sum()}
    return Loss(terms.sum() / (count.clamp(min=1) if denominator is None else denominator), terms, figures)


def check_mask(mask: Tensor | None, index: ChunkIndex) -> None:
    """Raises XTokMapError where `mask` has not one element for each student token."""
    if mask is not None and mask.shape != index.student_chunk.shape:
        raise XTokMapError(f"mask has shape {tuple(mask.shape)}, expected {tuple(index.student_chunk.shape)}")

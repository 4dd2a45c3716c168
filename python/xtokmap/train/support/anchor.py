"""Anchor: a student that is held to what it was."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from xtokmap.torch.batch import PairBatch
from xtokmap.torch.completions import completion_rows
from xtokmap.torch.logits import Logits
from xtokmap.torch.summed import sum_rows


class Anchor:
    """The student's reverse KL to what it was, exact, at every token of its samples: the usual remedy for drift.

    Args:
        student: as it is; what it is trained to later does not matter. One with an adapter is its own start without
            it, any other one is copied.
        weight: of the KL in the loss.
        temperature: of the distribution that samples.
    """

    def __init__(self, student: Any, weight: float, temperature: float = 1.0) -> None:
        self.weight, self.temperature = weight, temperature
        self._adapted = student if hasattr(student, "disable_adapter") else None
        self._start = deepcopy(student).eval().requires_grad_(False) if self._adapted is None else student

    def _as_it_was(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._adapted is None else self._adapted.disable_adapter()

    def loss(self, rows: Logits, batch: PairBatch, denominator: Tensor | float) -> tuple[Tensor, Tensor]:
        """What it adds to the loss, and the sum of the KL in nats.

        Args:
            rows: of the student, flat, as they score the batch's tokens.
            batch: the samples.
            denominator: of the loss.
        """
        with torch.no_grad(), self._as_it_was():
            ids = (batch.student_prompt_ids, batch.student_ids)
            start = completion_rows(self._start, *ids, temperature=self.temperature)
        weights = torch.full((rows.shape.numel(),), self.weight, device=rows.rows.device) / denominator
        total, values = sum_rows(_reverse_kl, rows, weights, start)
        return total, torch.where(torch.isfinite(values), values, 0).sum()


def _reverse_kl(x: Tensor, start: Tensor) -> tuple[Tensor, ...]:
    """KL(softmax(x) || softmax(start)) of rows; `x` becomes its gradient."""
    gap = x.log_softmax(-1).sub_(start.log_softmax(-1))
    p = x.softmax(-1)
    value = (p * gap).sum(-1)
    torch.mul(p, gap.sub_(value[:, None]), out=x)
    return (value,)

"""Rollouts: samples on their way through a step."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from xtokmap.chat import Prompt
from xtokmap.losses.credit import chunk_gap
from xtokmap.teachers.scores import Scores
from xtokmap.torch.batch import PairBatch
from xtokmap.torch.completions import emptied
from xtokmap.torch.mixture import View
from xtokmap.torch.pair import Pair


@dataclass
class Rollouts:
    """Samples of one side, as the other side spells them, and what the teacher thinks of them; B rows.

    Attributes:
        prompts: what was asked.
        batch: prompts and answers as both sides' tokens, aligned.
        completed: whether the end of turn came.
        seconds: wall time by part.
        teacher: what the teacher thinks of them; None where nobody asked it (method sft, or not yet).
        old_logprobs: float32 `[B, Ts]`, of the policy that sampled, where another one may be updated by then.
        hidden: seconds of the scoring that nobody waited for.
        skipped: rows that a served teacher does not take, and how many student tokens they had; their answers are
            empty here, so that nothing is learned from them.
        refusal: why it does not.
        views: what each of several teachers thinks of it; empty of one.
        version: how many updates are in the weights that a server sampled with; -1: they were sampled here.
    """

    prompts: list[Prompt]
    batch: PairBatch
    completed: list[bool]
    seconds: dict[str, float]
    teacher: Scores | None = None
    old_logprobs: Tensor | None = None
    hidden: float = 0.0
    skipped: dict[int, int] = field(default_factory=dict)
    refusal: str = ""
    views: list[View] = field(default_factory=list)
    version: int = -1

    @property
    def lengths(self) -> list[int]:
        """Student tokens of every completion, its end of turn included."""
        return [len(row) for row in self.batch.student_ids]

    @property
    def sampled(self) -> list[int]:
        """The same as they were sampled: with those of the skipped rows."""
        return [self.skipped.get(b, length) for b, length in enumerate(self.lengths)]

    def gap(self, logprobs: Tensor, *, stops: bool, markers: bool) -> tuple[Tensor, Tensor]:
        """Nats between student and teacher, and bytes that they are of: `losses.chunk_gap`, of several weighted.

        Args:
            logprobs: float32 `[B, Ts]`, the student's.
            stops: whether ends of turns count.
            markers: whether markers of thoughts and tool calls do.
        """
        counted = {"stops": stops, "markers": markers}
        if not self.views:
            assert self.teacher is not None
            return chunk_gap(logprobs, self.teacher.logprobs, self.batch.index, **counted)
        nats, nbytes = (torch.zeros(len(logprobs), device=logprobs.device) for _ in range(2))
        for view in self.views:
            assert view.scores is not None
            rows = torch.tensor(list(view.at), device=logprobs.device)
            weights = torch.tensor([view.weights[b] for b in view.at], device=logprobs.device)
            own = logprobs[rows, : view.batch.completion_mask.shape[1]]
            part = chunk_gap(own, view.scores.logprobs, view.batch.index, **counted)
            nats.index_add_(0, rows, weights * part[0])
            nbytes.index_add_(0, rows, weights * part[1].float())
        return nats, nbytes

    def without(self, rows: Collection[int], why: str, pair: Pair) -> Rollouts:
        """The same with some rows empty."""
        sides = [emptied(side, rows) if k % 2 else side for k, side in enumerate(self.batch.sides)]
        batch = pair.aligned(*sides, device=self.batch.completion_mask.device)
        old = None if self.old_logprobs is None else self.old_logprobs[:, : batch.completion_mask.shape[1]]
        skipped = self.skipped | {b: self.lengths[b] for b in rows}
        return replace(self, batch=batch, old_logprobs=old, skipped=skipped, refusal=why)

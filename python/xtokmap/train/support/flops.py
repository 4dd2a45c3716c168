"""Floating-point operations of a step, worked out from the shapes of the models: 2 for a weight and token forward,
4 more backward, and the attention's own.

The convention is that of model FLOPs (PaLM, arXiv 2204.02311, appendix B): a multiplication and an addition count as
two, rows are counted at their own lengths without padding, attention as the whole square of a row, and element-wise
work and what is measured for the report not at all. `torch.utils.flop_counter` counts the same matrix products where
nothing is padded; the tests hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from xtokmap._core import XTokMapError
from xtokmap.losses.rule import LossRule


@dataclass(frozen=True)
class ModelFlops:
    """What a dense transformer costs.

    Attributes:
        body: weights that every token is multiplied with, without embeddings and output head.
        head: weights of the output head.
        attention: layers times heads times head size; a token costs 4 of these for every token that it looks at.
    """

    body: int
    head: int
    attention: int

    @classmethod
    def of(cls, model: Any) -> ModelFlops:
        """Of a transformers causal language model.

        Raises:
            XTokMapError: a mixture of experts: which weights a token meets is not known from its shapes.
        """
        config = model.config.get_text_config()
        for name in ("num_local_experts", "num_experts", "n_routed_experts"):
            if (getattr(config, name, None) or 1) > 1:
                raise XTokMapError(
                    f"{name}={getattr(config, name)}: only dense models have known FLOPs; a mixture's depend on "
                    "its routing"
                )
        head = model.get_output_embeddings()
        weights = {
            id(weight): weight.numel()
            for module in model.modules()
            if not isinstance(module, nn.Embedding)
            and module is not head
            and (weight := getattr(module, "weight", None)) is not None
            and weight.ndim == 2
        }
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = config.num_hidden_layers * config.num_attention_heads * size
        return cls(sum(weights.values()), head.weight.numel(), attention)

    def forward(self, lengths: Iterable[int], head_rows: int) -> int:
        """One pass over rows of so many tokens, of which `head_rows` in all go through the output head."""
        total = 2 * self.head * head_rows
        for n in lengths:
            total += 2 * self.body * n + 4 * self.attention * n * n
        return total

    def generate(self, prompts: Sequence[int], completions: Sequence[int]) -> int:
        """Sampling with a key-value cache: a pass over the prompt, then one token after the other.

        Args:
            prompts: tokens of every prompt.
            completions: tokens of every answer; the last one is never fed back.
        """
        total = 0
        for p, n in zip(prompts, completions, strict=True):
            fed = max(n - 1, 0)
            total += self.forward([p], min(n, 1)) + 2 * (self.body + self.head) * fed
            total += 4 * self.attention * (fed * p + fed * (fed + 1) // 2)
        return total


@dataclass(frozen=True)
class StepFlops:
    """What the parts of a training step cost, from the lengths of its rows.

    Args:
        student: the model that is trained.
        teacher: the model that it learns from.
    """

    student: ModelFlops
    teacher: ModelFlops

    def step(
        self,
        rule: LossRule,
        prompts: Sequence[int],
        completions: Sequence[int],
        teacher_prompts: Sequence[int],
        teacher_completions: Sequence[int],
        *,
        updates: int = 1,
        on_policy: bool = True,
        anchored: bool = False,
    ) -> dict[str, int]:
        """FLOPs of sampling, of the teacher's scoring and of the updates.

        Args:
            rule: of the loss: what it asks of the teacher, and its passes through the heads (of losses of whole
                distributions at most so many, as tokens without a signal are left out).
            prompts: student tokens of every prompt.
            completions: student tokens of every answer.
            teacher_prompts: teacher tokens of every prompt.
            teacher_completions: teacher tokens of every answer.
            updates: optimizer steps on these samples.
            on_policy: whether the student sampled.
            anchored: whether it is held to what it was.
        """
        rows = [p + n for p, n in zip(prompts, completions, strict=True)]
        teacher_rows = [p + n for p, n in zip(teacher_prompts, teacher_completions, strict=True)]
        n, m = sum(completions), sum(teacher_completions)
        sampler, of = (self.student, (prompts, completions)) if on_policy else (
            self.teacher, (teacher_prompts, teacher_completions))  # fmt: skip
        student_passes, teacher_passes = rule.head_passes
        forward = self.student.forward(rows, 0)
        # A target goes through all of the teacher's rows while the loss does, others have been through them before.
        scored, looked_at = (0, m) if rule.keep and rule.queries else (m, n)
        update = 3 * forward + 2 * (
            n * self.student.head * student_passes + looked_at * self.teacher.head * teacher_passes
        )
        if anchored:
            # What it was: a pass, with the head. Its KL: logits, and gradients of the states and of the head.
            update += self.student.forward(rows, n) + 3 * 2 * n * self.student.head
        old = self.student.forward(rows, n) if updates > 1 and rule.on_policy else 0
        return {
            "sample": sampler.generate(*of),
            "teacher": 0 if rule.teacher == "nothing" else self.teacher.forward(teacher_rows, scored),
            "update": updates * update + old,
        }

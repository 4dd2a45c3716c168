"""Samples, and what the teacher thinks of them: everything in a step that comes before its update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.aligner import Aligner
from xtokmap.chat import PromptLike, prompts_of, render, stop_id
from xtokmap.teachers.client import RowRefusedError
from xtokmap.teachers.local import LocalTeacher, Teacher
from xtokmap.torch.completions import batched_logprobs, completion_rows, emptied
from xtokmap.torch.logits import Logits
from xtokmap.torch.pair import Pair, PairBatch
from xtokmap.train.config import Config
from xtokmap.train.generation import sample
from xtokmap.train.rollouts import Rollouts
from xtokmap.train.sampler import Sampled, ServerSampler, padded
from xtokmap.train.several import Others
from xtokmap.train.support.anchor import Anchor
from xtokmap.train.support.clock import Clock
from xtokmap.train.support.distributed import Processes, gathered


class Roller:
    """Samples from the student (or the teacher, as `Config.method` says) and has the teacher score the samples."""

    def __init__(
        self,
        student: Any,
        tokenizer: Any,
        teacher: Teacher,
        config: Config,
        processes: Processes | None = None,
        sampler: ServerSampler | None = None,
    ) -> None:
        self.student, self.tokenizer, self.teacher, self.config = student, tokenizer, teacher, config
        self.processes, self.sampler = processes or Processes(), sampler
        how = {"plain_template": config.plain_template, "foreign": config.foreign, **asdict(config.loss_settings)}
        self.pair = Pair(tokenizer, teacher.tokenizer, config.rule, **how)
        self.aligner = self.pair.aligner
        self.device = next(student.parameters()).device
        self.stop_id = stop_id(tokenizer)
        self.others: Others | None = None  # teachers beside the first, which score where they count
        self.anchor = Anchor(student, config.anchor, config.temperature) if config.anchor else None
        if config.method != "opd" and not isinstance(teacher, LocalTeacher):
            raise XTokMapError(f"method={config.method!r}: a served teacher does not sample; use method='opd'")
        for side, stops in (("student", self.aligner.student.stop_ids), ("teacher", self.aligner.teacher.stop_ids)):
            if not stops and (side == "student" or config.method != "opd"):
                raise XTokMapError(f"the {side}'s tokenizer has no end-of-turn token: set its eos_token")

    @cached_property
    def from_teacher(self) -> Aligner:
        """The other way round, for samples of the teacher."""
        return self.aligner.swapped()

    def roll(self, prompts: Sequence[PromptLike], config: Config | None = None) -> Rollouts:
        """One batch: sampled, retokenized, aligned, scored by the teacher; by `config` instead of the roller's own."""
        return self.score(self.sample(prompts, config), config)

    def sample(self, prompts: Sequence[PromptLike], config: Config | None = None) -> Rollouts:
        """One batch, sampled, retokenized and aligned, that the teacher has not scored yet."""
        config, clock = config or self.config, Clock(self.device)
        prompts = prompts_of(prompts)
        prompt_ids = render(self.tokenizer, prompts, config.plain_template)
        elsewhere: Sampled | None = None
        with clock("sample"):
            if config.method == "opd" and self.sampler is not None:
                elsewhere = self.sampler.sample(prompt_ids, self.aligner.student.stop_ids, config)
                answers, completed = elsewhere.ids, elsewhere.completed
            elif config.method == "opd":
                with gathered(self.student):
                    answers, completed = sample(self.student, prompt_ids, self.aligner.student.stop_ids, config)
            else:
                answers, completed = self.answers(prompts, self.teacher.render(prompts))
        rollouts = self.take(prompts, answers, completed, config, clock.seconds, prompt_ids)
        if elsewhere is not None:
            rollouts.version = elsewhere.version
            rollouts.old_logprobs = padded(
                emptied(elsewhere.logprobs, rollouts.skipped), rollouts.batch.completion_mask
            )
        return rollouts

    def answers(
        self, prompts: Sequence[PromptLike], teacher_prompts: Sequence[Sequence[int]]
    ) -> tuple[list[list[int]], list[bool]]:
        """The teacher's answers as its own ids, and whether they ended: sampled here, and for others to store."""
        assert isinstance(self.teacher, LocalTeacher)
        return sample(self.teacher.model, teacher_prompts, self.aligner.teacher.stop_ids, self.config)

    def take(
        self,
        prompts: Sequence[PromptLike],
        answers: list[list[int]],
        completed: list[bool],
        config: Config | None = None,
        seconds: dict[str, float] | None = None,
        prompt_ids: list[list[int]] | None = None,
    ) -> Rollouts:
        """Answers that there are already, as ids of whoever sampled them, retokenized and aligned.

        Args:
            prompts: what was asked, B.
            answers: B rows.
            completed: whether the end of turn came, B.
            config: instead of the roller's own; says who sampled.
            seconds: what sampling took, by part.
            prompt_ids: as the student's tokens, where they are rendered already.
        """
        config, clock = config or self.config, Clock(self.device, seconds)
        prompts = prompts_of(prompts)
        if prompt_ids is None:
            prompt_ids = render(self.tokenizer, prompts, config.plain_template)
        asked = prompt_ids, self.teacher.render(prompts)
        with clock("retokenize"):
            if config.method == "opd":
                completions, teacher_ids = answers, self.aligner._answers(asked, answers, self.teacher.stop_id)
            else:
                completions, teacher_ids = self.from_teacher._answers(asked[::-1], answers, self.stop_id), answers
        with clock("align"):
            batch = self.pair.aligned(asked[0], completions, asked[1], teacher_ids, device=self.device)
            rollouts = Rollouts(prompts, batch, completed, clock.seconds)
            longer, why = self.teacher.too_long(asked[1], teacher_ids)
            return rollouts.without(longer, why, self.pair) if longer else rollouts

    def score(self, rollouts: Rollouts, config: Config | None = None) -> Rollouts:
        """The batch with what the teacher thinks of it, where the loss asks for it; the student is not touched.

        Rows that a server refuses are empty in what comes back.
        """
        config = config or self.config
        if config.loss_rule.teacher == "nothing":
            return rollouts
        with Clock(self.device, rollouts.seconds)("teacher"):
            return self._scored(rollouts, config)

    def _scored(self, rollouts: Rollouts, config: Config) -> Rollouts:
        pair = self.pair.with_loss(config.rule)
        try:
            scores = pair.scores(self.teacher, rollouts.batch)
        except RowRefusedError as error:
            if not error.rows:
                raise
            return self._scored(rollouts.without(error.rows, str(error), self.pair), config)
        rollouts = replace(rollouts, teacher=scores)
        if self.others is not None:
            rollouts.views = self.others.views(rollouts, pair)
        return rollouts

    def rows(self, batch: PairBatch) -> Logits:
        """The student's logits that score a batch's tokens, flat; with a gradient where grad is enabled."""
        ids = batch.student_prompt_ids, batch.student_ids
        return completion_rows(self.student, *ids, temperature=self.config.temperature)

    def all_logprobs(self, batch: PairBatch) -> Tensor:
        """The student's logprobs of all rows, float32 `[B, Ts]`, without a gradient."""
        ids, config = (batch.student_prompt_ids, batch.student_ids), self.config
        with gathered(self.student):
            return batched_logprobs(self.student, *ids, config.micro_batch, temperature=config.temperature)

"""Samples, and what the teacher thinks of them: everything in a step that comes before its update."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.aligner import Aligner
from xtokmap.chat import Prompt, PromptLike, render, stop_id
from xtokmap.models import one_line, without_wrapper
from xtokmap.teachers.local import LocalTeacher, Teacher
from xtokmap.teachers.scores import Scores
from xtokmap.torch.completions import batched_logprobs, completion_rows, padded_inputs
from xtokmap.torch.index import ChunkIndex
from xtokmap.torch.logits import Logits
from xtokmap.torch.pair import Pair, PairBatch
from xtokmap.train.config import Config
from xtokmap.train.support.distributed import Processes, gathered


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
    """

    prompts: list[Prompt]
    batch: PairBatch
    completed: list[bool]
    seconds: dict[str, float]
    teacher: Scores | None = None
    old_logprobs: Tensor | None = None
    hidden: float = 0.0

    @property
    def prompt_ids(self) -> list[list[int]]:
        """What was asked, as the student's tokens."""
        return self.batch.student_prompt_ids

    @property
    def completion_ids(self) -> list[list[int]]:
        """The answers, as the student's tokens."""
        return self.batch.student_ids

    @property
    def teacher_prompt_ids(self) -> list[list[int]]:
        """What was asked, as the teacher's tokens."""
        return self.batch.teacher_prompt_ids

    @property
    def teacher_ids(self) -> list[list[int]]:
        """The answers, as the teacher's tokens."""
        return self.batch.teacher_ids

    @property
    def index(self) -> ChunkIndex:
        """Of the alignment of the two."""
        return self.batch.index

    @property
    def lengths(self) -> list[int]:
        """Student tokens of every completion, its end of turn included."""
        return [len(row) for row in self.completion_ids]


def asked(prompts: Sequence[PromptLike]) -> list[Prompt]:
    """Prompts, whatever they were given as."""
    return [Prompt.of(prompt, f"prompt {k}") for k, prompt in enumerate(prompts)]


class Roller:
    """Samples from the student (or the teacher, as `Config.method` says) and has the teacher score the samples."""

    def __init__(
        self,
        student: Any,
        tokenizer: Any,
        teacher: Teacher,
        config: Config,
        processes: Processes | None = None,
    ) -> None:
        self.student, self.tokenizer, self.teacher, self.config = student, tokenizer, teacher, config
        self.processes = processes or Processes()
        settings = asdict(config.loss_settings)
        how: Any = {"plain_template": config.plain_template, "foreign": config.foreign}
        self.pair = Pair(tokenizer, teacher.tokenizer, config.rule, **how, **settings)
        self.aligner = self.pair.aligner
        self.device = next(student.parameters()).device
        self.stop_id = stop_id(tokenizer)
        if config.method != "opd" and not isinstance(teacher, LocalTeacher):
            raise XTokMapError(f"method={config.method!r}: a served teacher does not sample; use method='opd'")
        for side, stops in (("student", self.aligner.student.stop_ids), ("teacher", self.aligner.teacher.stop_ids)):
            if not stops and (side == "student" or config.method != "opd"):
                raise XTokMapError(f"the {side}'s tokenizer has no end-of-turn token: set its eos_token")

    @cached_property
    def from_teacher(self) -> Aligner:
        """The other way round, for samples of the teacher."""
        foreign: Any = self.config.foreign
        return Aligner(self.teacher.tokenizer, self.tokenizer, markers=True, foreign=foreign)

    def answers(
        self, prompts: Sequence[PromptLike], teacher_prompts: Sequence[Sequence[int]]
    ) -> tuple[list[list[int]], list[bool]]:
        """The teacher's answers as its own ids, and whether they ended: sampled here, and for others to store."""
        assert isinstance(self.teacher, LocalTeacher)
        return sample(self.teacher.model, teacher_prompts, self.aligner.teacher.stop_ids, self.config)

    def roll(self, prompts: Sequence[PromptLike], config: Config | None = None) -> Rollouts:
        """One batch: sampled, retokenized, aligned, scored by the teacher; by `config` instead of the roller's own."""
        return self.score(self.sample(prompts, config), config)

    def sample(self, prompts: Sequence[PromptLike], config: Config | None = None) -> Rollouts:
        """One batch, sampled, retokenized and aligned, that the teacher has not scored yet."""
        config, clock = config or self.config, Clock(self.device)
        prompts = asked(prompts)
        prompt_ids = render(self.tokenizer, prompts, config.plain_template)
        with clock("sample"):
            if config.method == "opd":
                stops = self.aligner.student.stop_ids
                with gathered(self.student):
                    answers, completed = sample(self.student, prompt_ids, stops, config)
            else:
                answers, completed = self.answers(prompts, self.teacher.render(prompts))
        return self.take(prompts, answers, completed, config, clock.seconds, prompt_ids)

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
        prompts = asked(prompts)
        if prompt_ids is None:
            prompt_ids = render(self.tokenizer, prompts, config.plain_template)
        teacher_prompts = self.teacher.render(prompts)
        with clock("retokenize"):
            if config.method == "opd":
                thinking = self.aligner.open_thoughts(prompt_ids, teacher_prompts)
                completions = answers
                teacher_ids = _lists(self.aligner.teacher_ids(answers, stop_id=self.teacher.stop_id, thinking=thinking))
            else:
                thinking = self.from_teacher.open_thoughts(teacher_prompts, prompt_ids)
                completions = _lists(self.from_teacher.teacher_ids(answers, stop_id=self.stop_id, thinking=thinking))
                teacher_ids = answers
        with clock("align"):
            pair = self.pair.with_loss(config.rule)
            batch = pair.aligned(prompt_ids, completions, teacher_prompts, teacher_ids, device=self.device)
        return Rollouts(prompts, batch, completed, clock.seconds)

    def score(self, rollouts: Rollouts, config: Config | None = None) -> Rollouts:
        """Adds what the teacher thinks of a batch, where the loss asks for it; the student is not touched."""
        config = config or self.config
        if config.loss_rule.teacher != "nothing":
            with Clock(self.device, rollouts.seconds)("teacher"):
                rollouts.teacher = self.teacher.score(
                    rollouts.teacher_prompt_ids,
                    rollouts.teacher_ids,
                    queries=self.pair.with_loss(config.rule).queries(rollouts.batch),
                    # A server gives no whole rows; its top k are all that can be looked at.
                    **({"keep" if isinstance(self.teacher, LocalTeacher) else "top": config.loss_rule.keep}),
                )
        return rollouts

    def rows(self, rollouts: Rollouts, rows: list[int]) -> Logits:
        """The student's logits that score some rows' tokens, flat; with a gradient where grad is enabled."""
        return completion_rows(
            self.student,
            [rollouts.prompt_ids[b] for b in rows],
            [rollouts.completion_ids[b] for b in rows],
            temperature=self.config.temperature,
        )

    def all_logprobs(self, rollouts: Rollouts) -> Tensor:
        """The student's logprobs of all rows, float32 `[B, Ts]`, without a gradient."""
        with gathered(self.student):
            return batched_logprobs(
                self.student,
                rollouts.prompt_ids,
                rollouts.completion_ids,
                self.config.micro_batch,
                temperature=self.config.temperature,
            )


class Scoring:
    """A batch that the teacher scores in a thread of its own, while the student samples or is updated.

    Args:
        roller: whose teacher is a served one.
        rollouts: sampled, not scored.
        after: the batch before, whose turn comes first: the server is asked for one at a time.

    Attributes:
        rollouts: the batch.
    """

    def __init__(self, roller: Roller, rollouts: Rollouts, after: Scoring | None = None) -> None:
        self.rollouts = rollouts
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(roller, after), daemon=True, name="scoring")
        self._thread.start()

    def _run(self, roller: Roller, after: Scoring | None) -> None:
        if after is not None:
            after._thread.join()
        try:
            roller.score(self.rollouts)
        except BaseException as error:
            self._failure = error

    def wait(self) -> Rollouts:
        """The batch with its scores; its time for them becomes that of this call.

        Raises:
            TeacherError: what `Teacher.score` raised.
        """
        start = time.perf_counter()
        self._thread.join()
        waited = time.perf_counter() - start
        if self._failure is not None:
            raise self._failure
        self.rollouts.hidden = max(0.0, self.rollouts.seconds["teacher"] - waited)
        self.rollouts.seconds["teacher"] = waited
        return self.rollouts


@torch.no_grad()
def sample(
    model: Any, prompt_ids: Sequence[Sequence[int]], stops: Sequence[int], config: Config, *, greedy: bool = False
) -> tuple[list[list[int]], list[bool]]:
    """Answers of a model: `config.max_new_tokens` at most, at `config.temperature`, top-p 1, whatever the model likes.

    Args:
        model: a transformers causal language model; left in evaluation mode.
        prompt_ids: B rows, each of at least one id.
        stops: ids that end an answer.
        config: length and temperature.
        greedy: the likeliest token every time instead.

    Returns:
        B rows of completion ids, up to the first end of turn, included; and whether that came.

    Raises:
        XTokMapError: the model's probabilities are not finite.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    width, pad = max(map(len, prompt_ids)), stops[0]
    inputs = padded_inputs(prompt_ids, device, left=True, pad=pad)
    how = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=not greedy,
        eos_token_id=list(stops),
        pad_token_id=pad,
        **({} if greedy else {"temperature": config.temperature, "top_k": 0, "top_p": 1.0}),
    )
    model.eval()
    model = without_wrapper(model)
    with _only(model, how):
        try:
            out = model.generate(**inputs, generation_config=how)
        except RuntimeError as error:  # on a GPU the sampler's assertion, after which nothing more can be asked
            if not any(sign in str(error) for sign in ("probability tensor contains", "device-side assert")):
                raise
            raise XTokMapError(
                f"nothing can be sampled: probabilities are not finite; a learning_rate that is too large for the "
                f"weights, or temperature={config.temperature}, makes them so ({one_line(error)[:200]})"
            ) from error
    completions, completed = [], []
    for row in out[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in stops), None)
        completions.append(row if end is None else row[: end + 1])
        completed.append(end is not None)
    return completions, completed


def _lists(rows: Sequence[Any]) -> list[list[int]]:
    return [row.tolist() for row in rows]


@contextmanager
def _only(model: Any, how: Any) -> Iterator[None]:
    """Samples of the policy itself: what `how` leaves open, `generate` would take from the model (a penalty, min_p)."""
    own, model.generation_config = model.generation_config, how
    try:
        yield
    finally:
        model.generation_config = own


class Clock:
    """Wall time of a step's parts; on a GPU each part waits for its kernels, so that the split is true."""

    def __init__(self, device: torch.device, seconds: dict[str, float] | None = None) -> None:
        self.device = device
        self.seconds: dict[str, float] = {} if seconds is None else seconds

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the time of a `with` block to part `name`."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

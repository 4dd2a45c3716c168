"""Samples, and what the teacher thinks of them: everything in a step that comes before its update."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.alignment import Aligner, Kind
from xtokmap.config import WHOLE, Config
from xtokmap.cover import CoverQueries
from xtokmap.losses import chunk_gap
from xtokmap.models import one_line, without_wrapper
from xtokmap.processes import Processes, gathered
from xtokmap.teacher import (
    LocalTeacher,
    Scores,
    Teacher,
    TeacherError,
    batched_logprobs,
    completion_rows,
    render,
    stop_id,
)
from xtokmap.torch import ChunkIndex, Logits, VocabTensors, coverage_counts


@dataclass
class Rollouts:
    """Samples of one side, as the other side spells them, and what the teacher thinks of them; B rows.

    Attributes:
        prompts: what was asked.
        prompt_ids: as the student's tokens.
        completion_ids: the answers, as the student's tokens.
        completed: whether the end of turn came.
        teacher_prompt_ids: what was asked, as the teacher's tokens.
        teacher_ids: the answers, as the teacher's tokens.
        index: of the alignment of the two.
        seconds: wall time by part.
        queries: what `cover` and `transfer_kl` ask the teacher's rows.
        teacher: what the teacher thinks of them; None where nobody asked it (method sft, or not yet).
        old_logprobs: float32 `[B, Ts]`, of the policy that sampled, where another one may be updated by then.
        hidden: seconds of the scoring that nobody waited for.
    """

    prompts: list[str]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    completed: list[bool]
    teacher_prompt_ids: list[list[int]]
    teacher_ids: list[list[int]]
    index: ChunkIndex
    seconds: dict[str, float]
    queries: CoverQueries | None = None
    teacher: Scores | None = None
    old_logprobs: Tensor | None = None
    hidden: float = 0.0

    @property
    def lengths(self) -> list[int]:
        """Student tokens of every completion, its end of turn included."""
        return [len(row) for row in self.completion_ids]


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
        self.aligner = Aligner(tokenizer, teacher.tokenizer)
        self.device = next(student.parameters()).device
        self.stop_id = stop_id(tokenizer)
        if config.method != "opd" and not isinstance(teacher, LocalTeacher):
            raise XTokMapError(f"method={config.method!r}: a served teacher does not sample; use method='opd'")
        for side, stops in (("student", self.aligner.student.stop_ids), ("teacher", self.aligner.teacher.stop_ids)):
            if not stops and (side == "student" or config.method != "opd"):
                raise XTokMapError(f"the {side}'s tokenizer has no end-of-turn token: set its eos_token")

    @cached_property
    def vocab_tensors(self) -> VocabTensors:
        """The two vocabularies' map, on the device."""
        return self.aligner.vocab_map.torch(self.device)

    @cached_property
    def from_teacher(self) -> Aligner:
        """The other way round, for samples of the teacher."""
        return Aligner(self.teacher.tokenizer, self.tokenizer)

    def answers(
        self, prompts: Sequence[str], teacher_prompts: Sequence[Sequence[int]]
    ) -> tuple[list[list[int]], list[bool]]:
        """The teacher's answers as its own ids, and whether they ended: sampled here, and for others to store."""
        assert isinstance(self.teacher, LocalTeacher)
        return sample(self.teacher.model, teacher_prompts, self.aligner.teacher.stop_ids, self.config)

    def roll(self, prompts: Sequence[str], config: Config | None = None) -> Rollouts:
        """One batch: sampled, retokenised, aligned, scored by the teacher; by `config` instead of the roller's own."""
        return self.score(self.sample(prompts, config), config)

    def sample(self, prompts: Sequence[str], config: Config | None = None) -> Rollouts:
        """One batch, sampled, retokenised and aligned, that the teacher has not scored yet."""
        config, clock = config or self.config, Clock(self.device)
        prompt_ids = render(self.tokenizer, prompts, config.plain_template)
        with clock("sample"):
            if config.method == "opd":
                stops = self.aligner.student.stop_ids
                with gathered(self.student):
                    answers, completed = sample(self.student, prompt_ids, stops, config)
            else:
                answers, completed = self.answers(prompts, self.teacher.render(prompts))
        return self.pair(prompts, answers, completed, config, clock.seconds)

    def pair(
        self,
        prompts: Sequence[str],
        answers: list[list[int]],
        completed: list[bool],
        config: Config | None = None,
        seconds: dict[str, float] | None = None,
    ) -> Rollouts:
        """Answers that there are already, as ids of whoever sampled them, retokenised and aligned.

        Args:
            prompts: what was asked, B.
            answers: B rows.
            completed: whether the end of turn came, B.
            config: instead of the roller's own; says who sampled.
            seconds: what sampling took, by part.
        """
        config, clock = config or self.config, Clock(self.device, seconds)
        prompt_ids = render(self.tokenizer, prompts, config.plain_template)
        with clock("retokenise"):
            if config.method == "opd":
                completions = answers
                teacher_ids = _lists(self.aligner.teacher_ids(answers, stop_id=self.teacher.stop_id))
            else:
                completions = _lists(self.from_teacher.teacher_ids(answers, stop_id=self.stop_id))
                teacher_ids = answers
        with clock("align"):
            batch = self.aligner.align_batch(completions, teacher_ids)
            index = ChunkIndex.from_alignment(batch, self.device)
            queries = self.aligner.cover_queries(batch) if config.rule in ("cover", "transfer_kl") else None
        sides = (prompt_ids, completions, completed, self.teacher.render(prompts), teacher_ids)
        return Rollouts(list(prompts), *sides, index, clock.seconds, queries)

    def score(self, rollouts: Rollouts, config: Config | None = None) -> Rollouts:
        """Adds what the teacher thinks of a batch, where the loss asks for it; the student is not touched."""
        config = config or self.config
        if config.rule != "imitation":
            with Clock(self.device, rollouts.seconds)("teacher"):
                rollouts.teacher = self.teacher.score(
                    rollouts.teacher_prompt_ids,
                    rollouts.teacher_ids,
                    queries=rollouts.queries,
                    keep=config.rule in WHOLE,
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
    ids = torch.tensor([[pad] * (width - len(row)) + [*row] for row in prompt_ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompt_ids], device=device)
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
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=how)
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


def ratio_with_error(nats: Sequence[float], nbytes: Sequence[float]) -> tuple[float, float]:
    """Sum of nats / sum of bytes over independent rows, and its standard error (linearised ratio estimator)."""
    n, total = len(nats), sum(nbytes)
    if total == 0:
        return math.nan, math.nan
    ratio = sum(nats) / total
    if n < 2:
        return ratio, math.nan
    residual = sum((a - ratio * b) ** 2 for a, b in zip(nats, nbytes, strict=True))
    return ratio, math.sqrt(residual * n / (n - 1)) / total


def coverage_shares(counts: Sequence[int], tokens: int) -> dict[str, float]:
    """Share of the response tokens in chunks of each kind, and of those in none."""
    shares = {kind.name: counts[kind] / max(tokens, 1) for kind in Kind}
    return {**shares, "UNALIGNED": max(0.0, 1 - sum(shares.values()))}


@dataclass
class Evaluation:
    """What the student is like on held-out prompts; one entry a prompt, its samples summed."""

    prompts: list[str]
    nats: list[float]
    nbytes: list[float]
    responses: list[str]
    completed: float
    length: float
    coverage: dict[str, float]

    @property
    def kl_per_byte(self) -> tuple[float, float]:
        """Reverse KL to the teacher, nats per byte (sampled estimate), and its standard error over prompts."""
        return ratio_with_error(self.nats, self.nbytes)

    def fall_since(self, before: Evaluation) -> tuple[float, float]:
        """How far the KL has fallen, and the standard error of that, paired by prompt."""
        r0, r1 = before.kl_per_byte[0], self.kl_per_byte[0]
        n, b0, b1 = len(self.nats), sum(before.nbytes), sum(self.nbytes)
        parts = [
            (x0 - r0 * y0) / b0 - (x1 - r1 * y1) / b1
            for x0, y0, x1, y1 in zip(before.nats, before.nbytes, self.nats, self.nbytes, strict=True)
        ]
        error = math.sqrt(sum(part * part for part in parts) * n / (n - 1)) if n > 1 else math.nan
        return r0 - r1, error

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        kl, error = self.kl_per_byte
        keys = ("completed", "length", "coverage")
        return {"kl_per_byte": kl, "kl_error": error, **{key: getattr(self, key) for key in keys}}


@torch.no_grad()
def evaluate(roller: Roller, prompts: Sequence[str], samples: int = 1, *, seed: int = 1234) -> Evaluation:
    """Samples answers to held-out prompts (the same seed every time) and measures the gap to the teacher.

    Args:
        roller: student and teacher.
        prompts: held-out prompts.
        samples: for each prompt.
        seed: of the samples; the state of the random generators is restored afterwards.

    Every process of the run has to call it, and samples its share of the answers.

    Raises:
        TeacherError: some process' samples have no scores; in every process, so that none waits for another.
    """
    # Whatever the run learns from: the student's samples, and the logprobs of their text.
    config, n = replace(roller.config, method="opd", loss="full"), len(prompts)
    nats, nbytes = [0.0] * n, [0.0] * n
    responses = [""] * n
    completed, lengths, counts = 0, 0, torch.zeros(len(Kind), dtype=torch.long, device=roller.device)
    processes = roller.processes
    found: list[tuple[int, float, float, str]] = []
    failure: str | None = None
    devices = [roller.device] if roller.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(processes.seed(seed))
        work = processes.share([i for i in range(n) for _ in range(samples)])
        size = -(-config.batch_size // processes.count)
        for first in range(0, len(work), size):
            batch = work[first : first + size]
            rollouts = roller.sample([prompts[i] for i in batch], config)
            try:
                roller.score(rollouts, config)
            except TeacherError as error:
                failure = failure or str(error)
            own = roller.all_logprobs(rollouts)  # which takes all processes, where the student is parted
            if failure is not None:
                continue
            assert rollouts.teacher is not None
            gap, bytes_of = chunk_gap(own, rollouts.teacher.logprobs, rollouts.index, stops=config.score_stop)
            counts += coverage_counts(rollouts.index)
            answers = roller.tokenizer.batch_decode(rollouts.completion_ids, skip_special_tokens=True)
            found += zip(batch, gap.tolist(), bytes_of.tolist(), answers, strict=True)
            completed += sum(rollouts.completed)
            lengths += sum(rollouts.lengths)
    failures = [text for text in processes.gather(failure) if text is not None]
    if failures:
        raise TeacherError(failures[0])
    for i, x, y, answer in (row for part in processes.gather(found) for row in part):
        nats[i] += x
        nbytes[i] += y
        responses[i] = responses[i] or answer
    completed, lengths = map(sum, zip(*processes.gather((completed, lengths)), strict=True))
    counts = processes.sum(counts)
    total = max(n * samples, 1)
    coverage = coverage_shares(counts.tolist(), lengths)
    return Evaluation(list(prompts), nats, nbytes, responses, completed / total, lengths / total, coverage)

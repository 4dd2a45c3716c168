"""Run: everything that changes in the course of a run, and its steps."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from xtokmap._core import XTokMapError
from xtokmap.alignment import Kind
from xtokmap.chat import Prompt, PromptLike, prompts_of, render
from xtokmap.models import (
    float32_parameters,
    write_back,
)
from xtokmap.teachers.client import Client, OtherTeacherError, TeacherError
from xtokmap.teachers.local import LocalTeacher, Teacher
from xtokmap.train.evaluation import Evaluation, coverage_shares, ratio_with_error
from xtokmap.train.rollouts import Rollouts
from xtokmap.train.sampling import Roller
from xtokmap.train.step import StepResult, update
from xtokmap.train.support.clock import Clock
from xtokmap.train.support.distributed import Processes, is_shard, whole_weights
from xtokmap.train.support.flops import ModelFlops, StepFlops
from xtokmap.train.support.health import Entropy, Monitor, measure, together
from xtokmap.train.support.overlap import Scoring
from xtokmap.train.support.samples import Samples


class Order:
    """Every index below `n` once in random order, and again.

    Attributes:
        drawn: how many there have been.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.drawn = n, 0
        self._generator = torch.Generator().manual_seed(seed)
        self._round: list[int] = []

    def __iter__(self) -> Order:
        return self

    def __next__(self) -> int:
        at = self.drawn % self.n
        if at == 0:
            self._round = torch.randperm(self.n, generator=self._generator).tolist()
        self.drawn += 1
        return self._round[at]

    def skip(self, count: int) -> None:
        """Draws some without giving them."""
        for _ in range(count):
            next(self)


class Run:
    """Everything that changes in the course of a run: the weights, their optimizer, and where it is in the prompts.

    Args:
        roller: student, teacher and config.
        prompts: to draw from, each once in random order, then all again.
        watch: whether to watch the run's health and keep samples; at most a tenth of a step's time.

    Attributes:
        done: steps made.
        history: their lines of `metrics.jsonl`.
        before: the evaluation before the first one, where it was made.
        saved: the step of the checkpoint that this run wrote or read last; -1: none.
        lost: batches in a row that a served teacher did not score.
        refusal: how many of the last batch's answers a server does not take, of how many, and why.
        say: shows a line of its own, in the first process.
        ahead: the next batch, sampled already and being scored (with `Config.overlap`).
        monitor: watches over its health.
        samples: some of what was sampled.
        untrained: digests of the weights that are not trained, where a checkpoint has asked for them.
    """

    def __init__(self, roller: Roller, prompts: Sequence[PromptLike], *, watch: bool = True) -> None:
        config = roller.config
        self.watch = watch
        self.roller, self.config, self.processes = roller, config, roller.processes
        self.prompts = _fitting(prompts_of(prompts), roller)
        self.order = Order(len(self.prompts), config.seed)
        if config.batch_size < self.processes.count:
            raise XTokMapError(
                f"batch_size={config.batch_size}: each of the {self.processes.count} processes needs a prompt"
            )
        parameters = float32_parameters(roller.student)
        # Sharded parameters and whole ones, where there are both: the optimizer works on a group at once.
        groups = [[p for p in parameters if is_shard(p) == sharded] for sharded in (False, True)]
        self.optimizer = torch.optim.AdamW(
            [{"params": group} for group in groups if group],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.95),
            # One pass over a parameter instead of ten, and no copies of it.
            fused=all(p.device.type in ("cpu", "cuda") for p in parameters),
        )
        self.optimizer.register_step_post_hook(write_back)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, config.rate)
        self.done, self.saved, self.lost = 0, -1, 0
        self.refusal, self._said_refusal = (0, 0, ""), False
        self.say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
        self.ahead: Scoring | None = None
        self.history: list[dict[str, Any]] = []
        self.before: Evaluation | None = None
        self.monitor = Monitor(config, (len(roller.aligner.student), len(roller.aligner.teacher)))
        self.samples = Samples()
        self.untrained: dict[str, dict[str, str]] | None = None
        self.flops: StepFlops | None = None
        if isinstance(roller.teacher, LocalTeacher):  # of a served one nothing is known
            with suppress(XTokMapError):  # nobody knows what a mixture of experts costs
                self.flops = StepFlops(ModelFlops.of(roller.student), ModelFlops.of(roller.teacher.model))
        self.more_flops: dict[str, StepFlops] = {}
        if roller.others is not None and self.flops is not None:
            for name, teacher in roller.others.local().items():
                with suppress(XTokMapError):
                    self.more_flops[name] = StepFlops(self.flops.student, ModelFlops.of(teacher.model))

    @property
    def teachers(self) -> list[Teacher]:
        """All of them, the first one first."""
        others = self.roller.others
        return [self.roller.teacher, *(one for one, _ in others.teachers.values())] if others else [self.roller.teacher]

    @property
    def clients(self) -> list[Client]:
        """Of all servers that are asked."""
        sampler = self.roller.sampler
        return [c for one in self.teachers for c in one.clients] + ([sampler.client] if sampler is not None else [])

    def draw(self) -> Sequence[Prompt]:
        """This rank's share of the next prompts."""
        return self.processes.share([self.prompts[next(self.order)] for _ in range(self.config.batch_size)])

    def rollouts(self) -> Rollouts:
        """The next batch that the teacher has scored; one that a server fails on is left out, and said.

        With `Config.overlap` the batch behind it is sampled before, and its scoring begun.

        Raises:
            TeacherError: more than `Config.teacher_failures` batches in a row.
        """
        while (rollouts := self._scored()) is None:
            pass
        return rollouts

    def hand_over(self, every: int = 1) -> None:
        """Gives a server that samples the student's weights, where its own are so many updates old.

        Raises:
            TeacherError: it does not take them; in every process.
        """
        sampler = self.roller.sampler
        if sampler is None or (sampler.version >= 0 and self.done - sampler.version < every):
            return
        weights, problem = whole_weights(self.roller.student), None
        try:
            sampler.load(self.roller.student, self.done, weights)
        except XTokMapError as error:
            problem = str(error)
        problems = [text for text in self.processes.gather(problem) if text is not None]
        if problems:
            sampler.version = -1
            raise TeacherError(problems[0])

    def _drawn(self) -> Rollouts:
        """The next batch, sampled by weights that are as new as they have to be."""
        seconds: dict[str, float] = {}
        if self.roller.sampler is not None:
            with Clock(self.roller.device, seconds)("weights"):
                self.hand_over(self.config.sampler_every)
        rollouts = self.roller.sample(self.draw())
        rollouts.seconds.update(seconds)
        return rollouts

    def _sampled(self) -> Rollouts:
        rollouts = self._drawn()
        with Clock(self.roller.device, rollouts.seconds)("logprobs"):
            if rollouts.old_logprobs is None:
                rollouts.old_logprobs = self.roller.all_logprobs(rollouts.batch)
        return rollouts

    def _scored(self) -> Rollouts | None:
        waiting, self.ahead = self.ahead, None
        rollouts, failure, other = None, None, False
        try:
            if self.config.overlap:
                waiting = waiting or Scoring(self.roller, self._sampled())
                if self.done + 1 < self.config.steps:
                    self.ahead = Scoring(self.roller, self._sampled(), after=waiting)
            rollouts = waiting.wait() if waiting else self.roller.score(self._drawn())
        except TeacherError as error:
            failure, other = str(error), isinstance(error, OtherTeacherError)
        found = self.processes.gather((failure, other))
        # A batch that one rank has no scores for is left out on every rank.
        failures = [text for text, _ in found if text is not None]
        if not failures:
            assert rollouts is not None
            rows = self.processes.gather((len(rollouts.skipped), len(rollouts.prompts), rollouts.refusal))
            skipped, total = sum(n for n, *_ in rows), sum(n for _, n, _ in rows)
            self.refusal = (skipped, total, next((why for n, _, why in rows if n), ""))
            if skipped < total:
                return rollouts
            failures = [f"the server takes none of its {total} answers: {self.refusal[2]}"]
        if any(changed for _, changed in found):
            raise OtherTeacherError(failures[0])
        self.lost += 1
        if self.lost > self.config.teacher_failures:
            raise TeacherError(f"{self.lost} batches in a row have no scores; the last: {failures[0]}")
        self.say(f"warning: a batch has no scores and is left out ({self.lost} in a row): {failures[0]}")
        return None

    def take_up(
        self,
        answers: list[list[int]],
        completed: list[bool],
        old_logprobs: torch.Tensor,
        sampled: list[int],
        version: int,
    ) -> None:
        """The next batch, that an earlier run had sampled: this rank's rows, and the logprobs of who sampled them.

        Rows that were skipped are empty; `sampled` has the lengths that they had.
        """
        rollouts = self.roller.take(self.draw(), answers, completed)
        rollouts.skipped |= {b: length for b, length in enumerate(sampled) if length and not answers[b]}
        rollouts.version = version
        rollouts.seconds.update({"sample": 0.0, "logprobs": 0.0})
        rollouts.old_logprobs = old_logprobs[:, : rollouts.batch.completion_mask.shape[1]].to(self.roller.device)
        self.ahead = Scoring(self.roller, rollouts)

    def close(self) -> None:
        """Cancels open requests to a server; the checkpoint has the next batch, which is sampled already."""
        for client in self.clients:
            client.give_up()
        self.ahead = None

    def step(self) -> dict[str, Any]:
        """Samples, scores and updates once; returns the step's line of `metrics.jsonl`, the same on every rank."""
        start = time.perf_counter()
        rollouts = self.rollouts()
        entropy = Entropy(sum(rollouts.lengths))
        with Clock(self.roller.device, rollouts.seconds)("update"):
            result = update(self.roller, rollouts, self.optimizer, entropy if self.watch else None)
            self.schedule.step()
        self.done += 1
        seen = self._watched(result, entropy) if self.watch else {}
        metrics = _metrics(self.done, result, time.perf_counter() - start, self.processes)
        metrics["skipped_batches"], self.lost = self.lost, 0
        metrics["skipped_rows"], total, why = self.refusal
        if metrics["skipped_rows"] and not self._said_refusal:
            self._said_refusal = True
            self.say(
                f"warning: {metrics['skipped_rows']} of {total} answers are left out of step {self.done}: {why}. "
                "Further ones are counted in metrics.jsonl (skipped_rows)"
            )
        if self.config.overlap:
            metrics["hidden_seconds"] = max(self.processes.gather(rollouts.hidden))
        if rollouts.version >= 0:
            metrics["sampler"] = self._elsewhere(result)
        metrics |= self._account(rollouts) | seen
        if self.watch:
            metrics["warnings"] = self.monitor.check(metrics)
        self.history.append(metrics)
        return metrics

    def _elsewhere(self, result: StepResult) -> dict[str, float]:
        """How far the policy that sampled is from the one that was updated; over the tokens of all processes.

        `staleness`: updates between them. `gap`: nats between their logprobs of a token, in the mean, and `largest`.
        `clipped`: the share of tokens whose importance weight is outside `clip_low` and `clip_high`, and truncated.
        """
        rollouts, config = result.rollouts, self.config
        assert rollouts.old_logprobs is not None
        gap = (result.logprobs - rollouts.old_logprobs)[rollouts.batch.completion_mask]
        clipped = (gap < math.log1p(-min(config.clip_low, 1 - 1e-9))) | (gap > math.log1p(config.clip_high))
        largest = float(gap.abs().max()) if len(gap) else 0.0
        own = (float(gap.abs().sum()), largest, int(clipped.sum()), len(gap))
        parts = self.processes.gather(own)
        tokens = max(sum(n for *_, n in parts), 1)
        return {
            "staleness": self.done - 1 - rollouts.version,
            "gap": sum(total for total, *_ in parts) / tokens,
            "largest": max(most for _, most, *_ in parts),
            "clipped": sum(n for *_, n, _ in parts) / tokens,
        }

    def _watched(self, result: StepResult, entropy: Entropy) -> dict[str, Any]:
        """The step's health."""
        with Clock(self.roller.device, result.rollouts.seconds)("health"):
            alone = self.processes.count == 1 and isinstance(self.roller.teacher, LocalTeacher)
            seen = measure(self.roller, result, entropy, probe=alone and not self.monitor.lines)
            self.samples.add(self.done, self.roller, result.rollouts, result.logprobs)
            return together(self.processes.gather(seen))

    def catch_up(self, samples: Path) -> None:
        """After a resume: the health of the steps before, and the samples that were kept of them."""
        for line in self.history:
            self.monitor.check(line)
        if self.processes.first:  # which writes them
            self.samples.read(samples)

    def _account(self, rollouts: Rollouts) -> dict[str, Any]:
        """What the step took, and what a served teacher did not show; over the rows of all ranks."""
        config, teacher = self.config, rollouts.teacher
        own: dict[str, Any] = {}
        if self.flops is not None:
            lengths = [[len(row) for row in side] for side in rollouts.batch.sides]
            on_policy, anchored = config.method == "opd", config.anchor > 0
            own["flops"] = self.flops.step(
                config.loss_rule, *lengths, updates=config.updates, on_policy=on_policy, anchored=anchored
            )
            for view in rollouts.views[1:]:
                flops, sides = self.more_flops.get(view.name), [[len(row) for row in side] for side in view.batch.sides]
                own["flops"]["teacher"] += flops.step(config.loss_rule, *sides)["teacher"] if flops else 0
        if teacher is not None and teacher.missing is not None:
            own["missing"] = (float(teacher.missing.sum()), int(teacher.mask.sum()))
        parts = self.processes.gather(own)
        found: dict[str, Any] = {}
        if self.flops is not None:
            found["flops"] = {name: sum(part["flops"][name] for part in parts) for name in own["flops"]}
        if "missing" in own:
            mass, tokens = map(sum, zip(*(part["missing"] for part in parts), strict=True))
            found["missing"] = mass / max(tokens, 1)
        return found


def _fitting(prompts: list[Prompt], roller: Roller) -> list[Prompt]:
    limit = roller.config.max_prompt_tokens
    lengths = map(len, render(roller.tokenizer, prompts, roller.config.plain_template))
    kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= limit]
    if not kept:
        raise XTokMapError(f"every prompt is longer than max_prompt_tokens={limit} student tokens")
    if len(kept) < len(prompts):
        warnings.warn(f"{len(prompts) - len(kept)} prompts longer than {limit} tokens are left out", stacklevel=3)
    return kept


def _metrics(step: int, result: StepResult, seconds: float, processes: Processes) -> dict[str, Any]:
    """A step's line, over the rows of all ranks; times are those of the slowest."""
    rollouts = result.rollouts
    own = {
        "nats": result.nats.tolist(),
        "bytes": result.nbytes.tolist(),
        "lengths": rollouts.lengths,
        "sampled": rollouts.sampled,
        "completed": rollouts.completed,
    }
    others = processes.gather((own, seconds, rollouts.seconds))
    rows = {name: [value for part, *_ in others for value in part[name]] for name in own}
    seconds = max(part for _, part, _ in others)
    times = {name: max(part[name] for *_, part in others) for name in rollouts.seconds}
    kl, error = ratio_with_error(rows["nats"], rows["bytes"])
    figures = {name: float(value) for name, value in result.sums.items()}
    tokens, scored, nonfinite = (int(figures.pop(name)) for name in ("tokens", "scored", "nonfinite"))
    counts = [int(figures.pop(f"coverage/{kind.name}")) for kind in Kind]
    named = [name.removesuffix("/nats") for name in figures if name.endswith("/nats")]
    of_each = {name: figures.pop(f"{name}/nats") / max(figures.pop(f"{name}/bytes"), 1) for name in named}
    return {
        "step": step,
        "kl_per_byte": kl,
        "kl_error": error,
        **({"kl_by_teacher": of_each} if of_each else {}),
        "loss": float(result.loss),
        "grad_norm": float(result.grad_norm),
        "skipped_updates": result.skipped,
        "coverage": coverage_shares(counts, tokens),
        "scored": scored / max(tokens, 1),
        "nonfinite_tokens": nonfinite,
        **{name: value / max(scored, 1) for name, value in figures.items()},
        "response_length": sum(rows["sampled"]) / len(rows["sampled"]),
        "completed": sum(rows["completed"]) / len(rows["completed"]),
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "time": {name: round(value, 6) for name, value in times.items()},
    }

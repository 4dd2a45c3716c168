"""What the student is like on held-out prompts: the gap to the teacher, and figures of it with their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from xtokmap.alignment import Kind
from xtokmap.chat import PromptLike, prompts_of, render
from xtokmap.teachers.client import TeacherError
from xtokmap.torch.index import coverage_counts
from xtokmap.train.generation import sample
from xtokmap.train.sampling import Roller
from xtokmap.train.support.distributed import gathered

#: How many prompts a reader is shown answers to, at most.
SHOWN = 8


def ratio_with_error(nats: Sequence[float], nbytes: Sequence[float]) -> tuple[float, float]:
    """Sum of nats / sum of bytes over independent rows, and its standard error (linearized ratio estimator)."""
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
    """What the student is like on held-out prompts; one entry a prompt, its samples summed.

    `responses` are sampled; `likeliest` has greedy answers to those prompts that are `picked`, as samples of a small
    model are no fair picture of it (none where a server samples). `skipped` is how many answers a served teacher does
    not take; only length and completed are of these, too.
    """

    prompts: list[str]
    nats: list[float]
    nbytes: list[float]
    responses: list[str]
    completed: float
    length: float
    coverage: dict[str, float]
    skipped: int = 0
    likeliest: list[str] = field(default_factory=list)

    def shown(self, i: int) -> str:
        """The answer to a prompt that a reader is shown."""
        return dict(zip(picked(len(self.prompts)), self.likeliest, strict=False)).get(i, self.responses[i])

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


def picked(n: int, most: int = SHOWN) -> range:
    """Which of n prompts a reader is shown: evenly spaced."""
    return range(0, n, max(1, -(-n // most)))


def _likeliest(roller: Roller, prompts: Sequence[PromptLike]) -> list[str]:
    """Greedy answers to a few prompts; every process makes them, as a sharded student needs them all."""
    if roller.sampler is not None or not prompts:
        return []
    config, some = roller.config, [prompts[i] for i in picked(len(prompts))]
    ids = render(roller.tokenizer, prompts_of(some), config.plain_template)
    with gathered(roller.student):
        answers, _ = sample(roller.student, ids, roller.aligner.student.stop_ids, config, greedy=True)
    return list(roller.tokenizer.batch_decode(answers, skip_special_tokens=True))


@torch.no_grad()
def evaluate(roller: Roller, prompts: Sequence[PromptLike], samples: int = 1, *, seed: int = 1234) -> Evaluation:
    """Samples answers to held-out prompts (the same seed every time) and measures the gap to the teacher.

    Args:
        roller: student and teacher.
        prompts: held-out prompts.
        samples: for each prompt.
        seed: of the samples; the state of the random generators is restored afterwards.

    Every process of the run has to call it, and samples its share of the answers.

    Raises:
        TeacherError: some rank's samples have no scores; raised on every rank, so that none waits for another.
    """
    # Whatever the run learns from: the student's samples, and the logprobs of their text.
    config, n = replace(roller.config, method="opd", loss="full"), len(prompts)
    nats, nbytes = [0.0] * n, [0.0] * n
    responses = [""] * n
    completed, sampled, lengths, skipped = 0, 0, 0, 0
    counts = torch.zeros(len(Kind), dtype=torch.long, device=roller.device)
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
                rollouts = roller.score(rollouts, config)
            except TeacherError as error:
                failure = failure or str(error)
            own = roller.all_logprobs(rollouts.batch)  # which needs every rank where the student is sharded
            if failure is not None:
                continue
            gap, bytes_of = rollouts.gap(own, stops=config.score_stop, markers=config.score_markers)
            counts += coverage_counts(rollouts.batch.index)
            answers = roller.tokenizer.batch_decode(rollouts.batch.student_ids, skip_special_tokens=True)
            found += zip(batch, gap.tolist(), bytes_of.tolist(), answers, strict=True)
            completed += sum(rollouts.completed)
            sampled += sum(rollouts.sampled)
            lengths += sum(rollouts.lengths)
            skipped += len(rollouts.skipped)
    failures = [text for text in processes.gather(failure) if text is not None]
    if failures:
        raise TeacherError(failures[0])
    for i, x, y, answer in (row for part in processes.gather(found) for row in part):
        nats[i] += x
        nbytes[i] += y
        responses[i] = responses[i] or answer
    totals = processes.gather((completed, sampled, lengths, skipped))
    completed, sampled, lengths, skipped = map(sum, zip(*totals, strict=True))
    counts = processes.sum(counts)
    total = max(n * samples, 1)
    coverage = coverage_shares(counts.tolist(), lengths)
    return Evaluation(
        [prompt.title for prompt in prompts_of(prompts)],
        nats,
        nbytes,
        responses,
        completed / total,
        sampled / total,
        coverage,
        skipped,
        _likeliest(roller, prompts),
    )

"""On-policy distillation across tokenizers: a `Config`, and one loop that reads from top to bottom.

A step samples answers from the student, retokenises their text for the teacher, asks the teacher what it thinks of
them, aligns the two, and makes an update: by default of the divergence from the teacher's whole distribution as the
student's vocabulary sees it (`losses.transfer_kl`); or, as in arXiv 2606.09456, of a policy gradient.
Different from a textbook PPO loop: there is no value function and no reward model; the advantage of a token is the
teacher's logprob, handed over by `losses.chunk_credit`, minus the student's own.
"""

from __future__ import annotations

import json
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import xtokmap
from xtokmap import page
from xtokmap._core import XTokMapError
from xtokmap.config import Config
from xtokmap.health import Monitor, measure
from xtokmap.models import float32_parameters, load, pick_device, with_adapter, without_wrapper, write_back
from xtokmap.report import Progress, evaluation_line, plot
from xtokmap.rollouts import (
    Clock,
    Evaluation,
    Roller,
    Rollouts,
    coverage_shares,
    evaluate,
    ratio_with_error,
)
from xtokmap.samples import Samples
from xtokmap.teacher import LocalTeacher, render
from xtokmap.torch import coverage_counts
from xtokmap.track import tracker
from xtokmap.updates import update

__all__ = [
    "Config",
    "Evaluation",
    "LocalTeacher",
    "Result",
    "Roller",
    "Rollouts",
    "Run",
    "evaluate",
    "load",
    "pick_device",
    "read_prompts",
    "train",
    "update",
]


def read_prompts(path: str | Path) -> tuple[list[str], list[str]]:
    """Training and held-out prompts of a .jsonl file (`prompt`, optional `split`) or of a .txt file, one a line.

    Raises:
        XTokMapError: no such file, no prompt in it, or a line that cannot be used, by number.
    """
    path = Path(path)
    if not path.is_file():
        raise XTokMapError(f"{path}: no such prompt file; give a .jsonl or .txt file")
    train: list[str] = []
    heldout: list[str] = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise XTokMapError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    # Not splitlines(), which also parts at U+2028 and its like: they may stand inside a prompt.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            train.append(line)
            continue
        try:
            row = json.loads(line)
            prompt, split = row["prompt"], row.get("split", "train")
        except (ValueError, TypeError, KeyError, AttributeError):
            raise XTokMapError(f'{path}, line {number}: expected an object with "prompt", got {line[:80]!r}') from None
        if not isinstance(prompt, str) or split not in ("train", "heldout"):
            raise XTokMapError(
                f"{path}, line {number}: prompt must be a string and split train or heldout, got {line[:80]!r}"
            )
        (train if split == "train" else heldout).append(prompt)
    if not train:
        raise XTokMapError(f"{path}: no training prompt in it")
    return train, heldout


@dataclass
class Result:
    """What a run leaves: where it is, its last step, and the evaluations before and after (None where not made)."""

    output: Path
    metrics: list[dict[str, Any]]
    before: Evaluation | None
    after: Evaluation | None
    interrupted: bool


class Run:
    """Everything that changes in the course of a run: the weights, their optimizer, and where it is in the prompts.

    Args:
        roller: student, teacher and config.
        prompts: to draw from, each once in random order and then again.

    Attributes:
        done: steps made.
        monitor: watches over its health.
        samples: some of what was sampled.
    """

    def __init__(self, roller: Roller, prompts: Sequence[str]) -> None:
        config = roller.config
        self.roller, self.config = roller, config
        self.prompts = _fitting(prompts, roller)
        self.order = _shuffled(len(self.prompts), torch.Generator().manual_seed(config.seed))
        self.optimizer = torch.optim.AdamW(
            float32_parameters(roller.student),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.95),
        )
        self.optimizer.register_step_post_hook(write_back)
        self.warmup = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda k: min(1.0, (k + 1) / max(1, config.warmup_steps))
        )
        self.done = 0
        self.monitor = Monitor(config, (len(roller.aligner.student), len(roller.aligner.teacher)))
        self.samples = Samples()

    def step(self) -> dict[str, Any]:
        """Samples, scores and updates once; returns the step's line of `metrics.jsonl`."""
        start = time.perf_counter()
        rollouts = self.roller.roll([self.prompts[next(self.order)] for _ in range(self.config.batch_size)])
        with Clock(self.roller.device, rollouts.seconds)("update"):
            found = update(self.roller, rollouts, self.optimizer)
            self.warmup.step()
        with Clock(self.roller.device, rollouts.seconds)("health"):
            seen = measure(self.roller, rollouts, found, probe=not self.monitor.lines)
            self.done += 1
            self.samples.add(self.done, self.roller, rollouts, found["logprobs"])
        line = {**_metrics(self.done, rollouts, found, time.perf_counter() - start), **seen}
        line["warnings"] = self.monitor.check(line)
        return line


def train(config: Config, *, models: tuple[Any, Any, Any, Any] | None = None) -> Result:
    """Distil the teacher into the student, on the student's own samples.

    Writes `config.json`, `metrics.jsonl` (a line a step), `samples.jsonl`, `report.html`, `curves.png` and `student/`
    (safetensors) into `config.output`. Ctrl-C ends the loop after saving what there is.

    Args:
        config: the run.
        models: (student, its tokenizer, teacher, its tokenizer), already loaded; None loads what `config` names.

    Raises:
        XTokMapError: prompts or models that cannot be used.
    """
    prompts, heldout = read_prompts(config.prompts)
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    if models is None:
        student, tokenizer = load(config.student, device, config.dtype)
        teacher_model, teacher_tokenizer = load(config.teacher, device, config.dtype)
    else:
        student, tokenizer, teacher_model, teacher_tokenizer = models
    if config.lora_rank:
        student = with_adapter(student, config.lora_rank, config.lora_alpha, config.lora_targets)
    teacher = LocalTeacher(
        teacher_model, teacher_tokenizer, micro_batch=config.micro_batch, plain_template=config.plain_template
    )
    roller = Roller(student, tokenizer, teacher, config)
    run = Run(roller, prompts)

    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.json").write_text(json.dumps(asdict(config), indent=2, ensure_ascii=False) + "\n")
    (output / "environment.json").write_text(json.dumps(_environment(roller), indent=2, ensure_ascii=False) + "\n")
    history: list[dict[str, Any]] = []
    before = after = None
    interrupted = False
    try:
        with (
            open(output / "metrics.jsonl", "w", encoding="utf-8") as log,
            tracker(config.track, output.name, asdict(config)) as track,
            Progress(config.steps) as progress,
        ):
            if heldout and config.eval_samples:
                progress.say(f"evaluating on {len(heldout)} held-out prompts")
                before = evaluate(roller, heldout, config.eval_samples)
                progress.say(evaluation_line("before", before))
            while run.done < config.steps:
                history.append(run.step())
                log.write(json.dumps(history[-1]) + "\n")
                log.flush()
                track(history[-1])
                progress.step(history[-1])
                for warning in history[-1]["warnings"]:
                    progress.say(f"warning: {warning['text']}")
                if config.report_every and run.done % config.report_every == 0:
                    _report(run, output, before)
            if heldout and config.eval_samples:
                after = evaluate(roller, heldout, config.eval_samples)
                progress.say(evaluation_line("after", after))
    except KeyboardInterrupt:
        interrupted = True
        print(f"interrupted after {len(history)} steps: saving to {output}", file=sys.stderr)
    student.save_pretrained(output / "student")
    tokenizer.save_pretrained(output / "student")
    _report(run, output, before, after)
    if history:
        plot(history, output / "curves.png", before, after)
    return Result(output, history, before, after, interrupted)


def _report(run: Run, output: Path, before: Evaluation | None, after: Evaluation | None = None) -> None:
    evaluations = {"before": before and before.as_dict(), "after": after and after.as_dict()}
    (output / "evaluation.json").write_text(json.dumps(evaluations, indent=2) + "\n")
    run.samples.add_evaluations(before, after)
    run.samples.write(output / "samples.jsonl")
    page.write(output)


def _environment(roller: Roller) -> dict[str, Any]:
    """What a run ran on, for its report."""

    def model(side: Any, vocabulary: int) -> str:
        parameters = sum(p.numel() for p in side.parameters())
        trained = sum(p.numel() for p in side.parameters() if p.requires_grad)
        part = f" ({trained:,} trained)" if 0 < trained < parameters else ""
        inner = without_wrapper(side)
        return f"{type(inner).__name__}, {parameters:,} parameters{part}, {inner.dtype}, {vocabulary:,} tokens"

    aligner = roller.aligner
    return {
        "student": model(roller.student, len(aligner.student)),
        "teacher": model(roller.teacher.model, len(aligner.teacher)),
        "device": str(roller.device),
        "versions": {
            "xtokmap": xtokmap.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
        },
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _fitting(prompts: Sequence[str], roller: Roller) -> list[str]:
    limit = roller.config.max_prompt_tokens
    lengths = map(len, render(roller.tokenizer, prompts, roller.config.plain_template))
    kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= limit]
    if not kept:
        raise XTokMapError(f"every prompt is longer than max_prompt_tokens={limit} student tokens")
    if len(kept) < len(prompts):
        warnings.warn(f"{len(prompts) - len(kept)} prompts longer than {limit} tokens are left out", stacklevel=3)
    return kept


def _shuffled(n: int, generator: torch.Generator) -> Iterator[int]:
    """Every index once in random order, and again."""
    while True:
        yield from torch.randperm(n, generator=generator).tolist()


def _metrics(step: int, rollouts: Rollouts, found: dict[str, Any], seconds: float) -> dict[str, Any]:
    tokens = sum(rollouts.lengths)
    kl, error = ratio_with_error(found["nats"].tolist(), found["bytes"].tolist())
    figures = {name: float(value) for name, value in found["figures"].items()}
    scored = int(figures.pop("scored"))
    nonfinite = int(figures.pop("nonfinite"))
    return {
        "step": step,
        "kl_per_byte": kl,
        "kl_error": error,
        "loss": float(found["loss"]),
        "grad_norm": float(found["grad_norm"]),
        "skipped_updates": found["skipped"],
        "coverage": coverage_shares(coverage_counts(rollouts.index).tolist(), tokens),
        "scored": scored / max(tokens, 1),
        "nonfinite_tokens": nonfinite,
        **{name: value / max(scored, 1) for name, value in figures.items()},
        "response_length": tokens / len(rollouts.lengths),
        "completed": sum(rollouts.completed) / len(rollouts.completed),
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "time": {name: round(value, 6) for name, value in rollouts.seconds.items()},
    }

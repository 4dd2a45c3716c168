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
import signal
import stat
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import xtokmap
from xtokmap import page
from xtokmap._core import XTokMapError
from xtokmap.checkpoint import CheckpointError, found, restore, save, writing
from xtokmap.config import Config
from xtokmap.files import alone_in, check_text, decoded, in_use, obstacle
from xtokmap.flops import ModelFlops, StepFlops
from xtokmap.health import Monitor, measure, together
from xtokmap.models import (
    check_finite,
    float32_parameters,
    load,
    load_tokenizer,
    pick_device,
    with_adapter,
    without_wrapper,
    write_back,
)
from xtokmap.processes import Processes, is_part, launched, shard, whole_weights
from xtokmap.report import Progress, evaluation_line, plot
from xtokmap.rollouts import (
    Clock,
    Evaluation,
    Roller,
    Rollouts,
    Scoring,
    coverage_shares,
    evaluate,
    ratio_with_error,
)
from xtokmap.samples import Samples
from xtokmap.teacher import LocalTeacher, ServerTeacher, Teacher, TeacherError, render
from xtokmap.torch import coverage_counts
from xtokmap.track import tracker
from xtokmap.updates import update

__all__ = [
    "CheckpointError",
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
    if (problem := obstacle(path)) is not None:
        raise XTokMapError(problem)
    if not path.is_file():
        raise XTokMapError(f"{path}: no such prompt file; give a .jsonl or .txt file")
    train: list[str] = []
    heldout: list[str] = []
    text = (
        decoded(path.read_bytes(), path, "; save it as UTF-8")
        .removeprefix("\ufeff")
        .replace("\r\n", "\n")
        .replace("\r", "\n")
    )
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
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise XTokMapError(f'{path}, line {number}: expected an object with "prompt", got {line[:80]!r}') from None
        if not isinstance(prompt, str) or split not in ("train", "heldout"):
            raise XTokMapError(
                f"{path}, line {number}: prompt must be a string and split train or heldout, got {line[:80]!r}"
            )
        check_text(prompt, f"{path}, line {number}: prompt")
        (train if split == "train" else heldout).append(prompt)
    if not train:
        raise XTokMapError(f"{path}: no training prompt in it")
    return train, heldout


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
        watch: whether to look after the run's health and to keep samples, a tenth of a step's time and less.

    Attributes:
        done: steps made.
        history: their lines of `metrics.jsonl`.
        before: the evaluation before the first one, where it was made.
        saved: the step of the checkpoint that this run wrote or read last; -1: none.
        lost: batches in a row that a served teacher did not score.
        ahead: the next batch, sampled already and being scored (with `Config.overlap`).
        monitor: watches over its health.
        samples: some of what was sampled.
        untrained: digests of the weights that are not trained, where a checkpoint has asked for them.
    """

    def __init__(self, roller: Roller, prompts: Sequence[str], *, watch: bool = True) -> None:
        config = roller.config
        self.watch = watch
        self.roller, self.config, self.processes = roller, config, roller.processes
        self.prompts = _fitting(prompts, roller)
        self.order = Order(len(self.prompts), config.seed)
        if config.batch_size < self.processes.count:
            raise XTokMapError(
                f"batch_size={config.batch_size}: each of the {self.processes.count} processes needs a prompt"
            )
        parameters = float32_parameters(roller.student)
        # Parted parameters and whole ones, where there are both: the optimizer works on a group at once.
        groups = [[p for p in parameters if is_part(p) == parted] for parted in (False, True)]
        self.optimizer = torch.optim.AdamW(
            [{"params": group} for group in groups if group],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.95),
        )
        self.optimizer.register_step_post_hook(write_back)
        self.warmup = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda k: min(1.0, (k + 1) / max(1, config.warmup_steps))
        )
        self.done, self.saved, self.lost = 0, -1, 0
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

    def draw(self) -> Sequence[str]:
        """This process' share of the next prompts."""
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

    def _sampled(self) -> Rollouts:
        rollouts = self.roller.sample(self.draw())
        with Clock(self.roller.device, rollouts.seconds)("logprobs"):
            rollouts.old_logprobs = self.roller.all_logprobs(rollouts)
        return rollouts

    def _scored(self) -> Rollouts | None:
        waiting, self.ahead = self.ahead, None
        if self.config.overlap:
            waiting = waiting or Scoring(self.roller, self._sampled())
            if self.done + 1 < self.config.steps:
                self.ahead = Scoring(self.roller, self._sampled(), after=waiting)
        rollouts, failure = None, None
        try:
            rollouts = waiting.wait() if waiting else self.roller.roll(self.draw())
        except TeacherError as error:
            failure = str(error)
        # What one process has no scores for, none learns from.
        failures = [text for text in self.processes.gather(failure) if text is not None]
        if not failures:
            return rollouts
        self.lost += 1
        if self.lost > self.config.teacher_failures:
            raise TeacherError(f"{self.lost} batches in a row have no scores; the last: {failures[0]}")
        warnings.warn(f"this batch has no scores and is left out: {failures[0]}", stacklevel=4)
        return None

    def take_up(self, answers: list[list[int]], completed: list[bool], old_logprobs: torch.Tensor) -> None:
        """The next batch, that an earlier run had sampled: this process' rows, and the logprobs of who sampled them."""
        rollouts = self.roller.pair(self.draw(), answers, completed)
        rollouts.seconds.update({"sample": 0.0, "logprobs": 0.0})
        rollouts.old_logprobs = old_logprobs.to(self.roller.device)
        self.ahead = Scoring(self.roller, rollouts)

    def close(self) -> None:
        """Gives up what a server is still asked for; a checkpoint has the batch that comes next sampled."""
        if isinstance(self.roller.teacher, ServerTeacher):
            self.roller.teacher.client.give_up()
        self.ahead = None

    def step(self) -> dict[str, Any]:
        """Samples, scores and updates once; returns the step's line of `metrics.jsonl`, the same in every process."""
        start = time.perf_counter()
        rollouts = self.rollouts()
        with Clock(self.roller.device, rollouts.seconds)("update"):
            found = update(self.roller, rollouts, self.optimizer, self.watch)
            self.warmup.step()
        self.done += 1
        seen = self._watched(rollouts, found) if self.watch else {}
        metrics = _metrics(self.done, rollouts, found, time.perf_counter() - start, self.processes)
        metrics["skipped_batches"], self.lost = self.lost, 0
        if self.config.overlap:
            metrics["hidden_seconds"] = max(self.processes.gather(rollouts.hidden))
        metrics |= self._account(rollouts) | seen
        if self.watch:
            metrics["warnings"] = self.monitor.check(metrics)
        self.history.append(metrics)
        return metrics

    def _watched(self, rollouts: Rollouts, found: dict[str, Any]) -> dict[str, Any]:
        """The step's health."""
        with Clock(self.roller.device, rollouts.seconds)("health"):
            alone = self.processes.count == 1 and isinstance(self.roller.teacher, LocalTeacher)
            seen = measure(self.roller, rollouts, found, probe=alone and not self.monitor.lines)
            self.samples.add(self.done, self.roller, rollouts, found["logprobs"])
            return together(self.processes.gather(seen))

    def catch_up(self, samples: Path) -> None:
        """After a resume: the health of the steps before, and the samples that were kept of them."""
        for line in self.history:
            self.monitor.check(line)
        if self.processes.first:  # which writes them
            self.samples.read(samples)

    def _account(self, rollouts: Rollouts) -> dict[str, Any]:
        """What the step took, and what a served teacher did not show; over the rows of all processes."""
        sides = (rollouts.prompt_ids, rollouts.completion_ids, rollouts.teacher_prompt_ids, rollouts.teacher_ids)
        config, teacher = self.config, rollouts.teacher
        own: dict[str, Any] = {}
        if self.flops is not None:
            lengths = [[len(row) for row in side] for side in sides]
            on_policy = config.method == "opd"
            own["flops"] = self.flops.step(config.rule, *lengths, updates=config.updates, on_policy=on_policy)
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


def train(config: Config, *, models: tuple[Any, Any, Any, Any] | None = None) -> Result:
    """Distil the teacher into the student, on the student's own samples.

    Writes `config.json`, `metrics.jsonl` (a line a step), `samples.jsonl`, `report.html`, `curves.png`, `student/`
    (safetensors) and `checkpoints/` into `config.output`. Ctrl-C and SIGTERM end the loop after the step that is being
    made and save what there is; a second Ctrl-C does so at once, without a checkpoint of the half step.

    Args:
        config: the run.
        models: (student, its tokenizer, teacher, its tokenizer), already loaded; None loads what `config` names. With
            `config.teacher_url` nothing is done with the teacher.

    Raises:
        XTokMapError: prompts or models that cannot be used, or another run is at work in the output folder.
        CheckpointError: checkpoints of another run are in the way, or something cannot be written.
        TeacherError: a server that cannot be the teacher; or one that stopped answering, after saving what there is.
    """
    output = Path(config.output)
    checkpoints = output / "checkpoints"
    with launched(config.device) as (processes, where), _alone(output, processes, new=not config.resume):
        prompts, heldout = read_prompts(config.prompts)
        device = pick_device(where)
        torch.manual_seed(config.seed)
        if models is None:
            # Layers that are to be parted go to the device one by one.
            half = config.dtype == "auto" and device.type == "cuda"
            at = (torch.device("cpu"), "bfloat16" if half else config.dtype) if config.shard else (device, config.dtype)
            student, tokenizer = load(config.student, *at)
            if config.teacher_url:
                teacher_model, teacher_tokenizer = None, load_tokenizer(config.teacher)
            else:
                teacher_model, teacher_tokenizer = load(config.teacher, device, config.dtype)
        else:
            student, tokenizer, teacher_model, teacher_tokenizer = models
        check_finite(student, f"student {config.student}")
        if teacher_model is not None and not config.teacher_url:
            check_finite(teacher_model, f"teacher {config.teacher}")
        if config.lora_rank:
            student = with_adapter(student, config.lora_rank, config.lora_alpha, config.lora_targets)
        teacher = _teacher(config, teacher_model, teacher_tokenizer, device)
        if config.shard:
            shard(student, processes, device)
        roller = Roller(student, tokenizer, teacher, config, processes)
        run = Run(roller, prompts)
        if processes.count > 1:
            torch.manual_seed(processes.seed(config.seed))  # answers of its own in each
        resumed = config.resume and restore(run, checkpoints)
        if resumed:
            run.catch_up(output / "samples.jsonl")

        if processes.first:
            _begin(output, run)
        after = None
        interrupted, failure = False, None
        try:
            with _progress(run) as (say, show), _asked_to_stop() as asked:
                if resumed:
                    say(f"going on from step {run.done} of {config.steps}")
                elif heldout and config.eval_samples:
                    say(f"evaluating on {len(heldout)} held-out prompts")
                    run.before = _evaluated("before", roller, heldout, say)
                while run.done < config.steps and not processes.any(asked()):
                    line = run.step()
                    if processes.first:
                        _log(output, line)
                    show(line)
                    for warning in line["warnings"]:
                        say(f"warning: {warning['text']}")
                    if processes.first and config.report_every and run.done % config.report_every == 0:
                        with writing(output):
                            _report(run, output)
                    if config.save_every and run.done % config.save_every == 0:
                        save(run, checkpoints, keep=config.keep_checkpoints)
                if config.save_every:
                    save(run, checkpoints, keep=config.keep_checkpoints)
                interrupted = run.done < config.steps
                if heldout and config.eval_samples and not interrupted:
                    after = _evaluated("after", roller, heldout, say)
        except KeyboardInterrupt:
            interrupted = True
            if processes.count > 1:  # the others are in the middle of something else
                raise
        except TeacherError as error:
            failure = error
            if config.save_every:
                save(run, checkpoints, keep=config.keep_checkpoints)
        finally:
            run.close()
        if interrupted and processes.first:
            print(f"interrupted after {run.done} steps: saving to {output}", file=sys.stderr)
        weights = whole_weights(student)
        if processes.first:
            _end(output, run, weights, after)
        if failure is not None:
            raise TeacherError(f"ended after {run.done} steps, which are saved in {output}: {failure}") from failure
        return Result(output, run.history, run.before, after, interrupted)


@contextmanager
def _alone(output: Path, processes: Processes, *, new: bool) -> Iterator[None]:
    """No other run in the folder, and none before a new one; the first process looks, and all of them learn of it."""
    checkpoints = output / "checkpoints"

    def check() -> None:
        if new and (there := found(checkpoints)):
            raise CheckpointError(
                f"{there[-1]} is of an earlier run: pass resume to go on with it, another output, or delete "
                f"{checkpoints}"
            )

    with ExitStack() as stack:
        problem: XTokMapError | None = None
        if processes.first:
            try:
                if not in_use(output):
                    check()  # before the folder is touched
                with writing(output):
                    stack.enter_context(alone_in(output))
                check()
            except XTokMapError as error:
                problem = error
        problem = processes.gather(problem)[0]
        if problem is not None:
            raise problem
        yield


#: Files of a run, and folders.
_FILES = (
    *("config.json", "environment.json", "metrics.jsonl", "evaluation.json", "samples.jsonl", "report.html"),
    "curves.png",
)
_FOLDERS = ("student", "checkpoints")


def _begin(output: Path, run: Run) -> None:
    # What only the end of a run would find.
    for name in (*_FILES, *_FOLDERS):
        path = output / name
        mode = path.stat().st_mode if path.exists() else 0
        if mode and (stat.S_ISDIR(mode) != (name in _FOLDERS) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
            kind = "folder" if name in _FOLDERS else "file"
            raise CheckpointError(f"{path}: cannot be written: it is no {kind}; move it away")
    with writing(output):
        config = json.dumps(asdict(run.config), indent=2, ensure_ascii=False)
        (output / "config.json").write_text(config + "\n")
        environment = json.dumps(_environment(run.roller), indent=2, ensure_ascii=False)
        (output / "environment.json").write_text(environment + "\n")
        (output / "metrics.jsonl").write_text("")
    _log(output, *run.history)  # up to the checkpoint's step


def _end(output: Path, run: Run, weights: dict[str, Any] | None, after: Evaluation | None) -> None:
    with writing(output):
        run.roller.student.save_pretrained(output / "student", state_dict=weights)
        run.roller.tokenizer.save_pretrained(output / "student")
        _report(run, output, after)
        if run.history:
            plot(run.history, output / "curves.png", run.before, after)


def _log(output: Path, *lines: dict[str, Any]) -> None:
    with writing(output / "metrics.jsonl"), open(output / "metrics.jsonl", "a", encoding="utf-8") as log:
        log.writelines(json.dumps(line) + "\n" for line in lines)


@contextmanager
def _progress(run: Run) -> Iterator[tuple[Callable[[str], None], Callable[[dict[str, Any]], None]]]:
    """How to say something and to show a step: on the first process, nothing on the others."""
    if not run.processes.first:
        yield (lambda text: None), (lambda line: None)
        return
    config = run.config
    with (
        tracker(config.track, Path(config.output).name, asdict(config)) as track,
        Progress(config.steps) as progress,
    ):

        def show(line: dict[str, Any]) -> None:
            track(line)
            progress.step(line)

        yield progress.say, show


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM only ask, so that no step is cut in two; a second Ctrl-C, a second later, does not ask."""
    first: list[float] = []

    def ask(number: int, frame: object) -> None:
        if number == signal.SIGINT and first and time.monotonic() - first[0] > 1:
            raise KeyboardInterrupt
        if not first:
            first.append(time.monotonic())
            print("stopping after this step; Ctrl-C again to stop at once", file=sys.stderr, flush=True)

    before = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere signals cannot be taken
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(first)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _teacher(config: Config, model: Any, tokenizer: Any, device: torch.device) -> Teacher:
    """The teacher that `config` names; a server has passed its self-test."""
    if not config.teacher_url:
        return LocalTeacher(model, tokenizer, micro_batch=config.micro_batch, plain_template=config.plain_template)
    teacher = ServerTeacher(
        config.teacher_url,
        tokenizer,
        protocol=config.teacher_protocol,
        model=config.teacher_model,
        topk=config.teacher_topk,
        plain_template=config.plain_template,
        device=device,
        concurrency=config.teacher_concurrency,
        timeout=config.teacher_timeout,
        retries=config.teacher_retries,
    )
    if (unknown := teacher.self_test()) is not None:
        warnings.warn(f"{config.teacher_url}: {unknown}", stacklevel=3)
    return teacher


def _evaluated(name: str, roller: Roller, heldout: Sequence[str], say: Callable[[str], None]) -> Evaluation | None:
    """An evaluation, said; None where a served teacher failed on it, which costs no more than that."""
    try:
        found = evaluate(roller, heldout, roller.config.eval_samples)
    except TeacherError as error:
        say(f"{name}: not evaluated: {error}")
        return None
    say(evaluation_line(name, found))
    return found


def _report(run: Run, output: Path, after: Evaluation | None = None) -> None:
    before = run.before
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

    aligner, side = roller.aligner, roller.teacher
    teacher = f"served, {len(aligner.teacher):,} tokens"
    if isinstance(side, LocalTeacher):
        teacher = model(side.model, len(aligner.teacher))
    return {
        "student": model(roller.student, len(aligner.student)),
        "teacher": teacher,
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


def _metrics(
    step: int, rollouts: Rollouts, found: dict[str, Any], seconds: float, processes: Processes
) -> dict[str, Any]:
    """A step's line, over the rows of all processes; times are those of the slowest."""
    own = {
        "nats": found["nats"].tolist(),
        "bytes": found["bytes"].tolist(),
        "lengths": rollouts.lengths,
        "completed": rollouts.completed,
    }
    others = processes.gather((own, coverage_counts(rollouts.index).tolist(), seconds, rollouts.seconds))
    rows = {name: [value for part, *_ in others for value in part[name]] for name in own}
    counts = [sum(kind) for kind in zip(*(part for _, part, *_ in others), strict=True)]
    seconds = max(part for *_, part, _ in others)
    times = {name: max(part[name] for *_, part in others) for name in rollouts.seconds}
    tokens = sum(rows["lengths"])
    kl, error = ratio_with_error(rows["nats"], rows["bytes"])
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
        "coverage": coverage_shares(counts, tokens),
        "scored": scored / max(tokens, 1),
        "nonfinite_tokens": nonfinite,
        **{name: value / max(scored, 1) for name, value in figures.items()},
        "response_length": tokens / len(rows["lengths"]),
        "completed": sum(rows["completed"]) / len(rows["completed"]),
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "time": {name: round(value, 6) for name, value in times.items()},
    }

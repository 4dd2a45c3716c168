"""On-policy distillation across tokenizers: a `Config`, and one loop that reads from top to bottom.

A step samples answers from the student, retokenizes their text for the teacher, asks the teacher what it thinks of
them, aligns the two, and makes an update: by default of the divergence from the teacher's whole distribution as the
student's vocabulary sees it (`losses.transfer_kl`); or, as in arXiv 2606.09456, of a policy gradient.
Different from a textbook PPO loop: there is no value function and no reward model; the advantage of a token is the
teacher's logprob, handed over by `losses.chunk_credit`, minus the student's own.
"""

from __future__ import annotations

import json
import platform
import secrets
import signal
import stat
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import xtokmap
from xtokmap import report as page
from xtokmap._core import XTokMapError
from xtokmap.chat import Prompt, PromptLike, render
from xtokmap.files import alone_in, in_use
from xtokmap.models import (
    check_finite,
    load,
    load_tokenizer,
    pick_device,
    with_adapter,
    without_wrapper,
)
from xtokmap.teachers.client import TeacherError
from xtokmap.teachers.head import read_head
from xtokmap.teachers.local import LocalTeacher, Teacher
from xtokmap.teachers.remote import ROWS, ServerTeacher
from xtokmap.train.config import AUTO, Config
from xtokmap.train.evaluation import Evaluation, evaluate
from xtokmap.train.prompts import read_prompts
from xtokmap.train.run import Run
from xtokmap.train.sampler import ServerSampler
from xtokmap.train.sampling import Roller
from xtokmap.train.several import FIRST, Others, named_teachers, shares_by_domain
from xtokmap.train.support.checkpoint import CheckpointError, found, restore, save, writing
from xtokmap.train.support.distributed import Processes, gathered, launched, shard, whole_weights
from xtokmap.train.support.progress import Progress, evaluation_line
from xtokmap.train.support.track import tracker
from xtokmap.waiting import waiting


@dataclass
class Result:
    """What a run leaves: where it is, its last step, and the evaluations before and after (None where not made)."""

    output: Path
    metrics: list[dict[str, Any]]
    before: Evaluation | None
    after: Evaluation | None
    interrupted: bool


def train(config: Config, *, models: tuple[Any, Any, Any, Any] | None = None) -> Result:
    """Distill the teacher into the student, on the student's own samples.

    Writes `config.json`, `metrics.jsonl` (a line a step), `samples.jsonl`, `report.html`, `student/`
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
        with waiting("loading the models") if processes.first else nullcontext():
            student, tokenizer, teacher_model, teacher_tokenizer = models or _models(config, device)
        check_finite(student, f"student {config.student}")
        if teacher_model is not None and not config.teacher_url:
            check_finite(teacher_model, f"teacher {config.teacher}")
        if config.lora_rank:
            student = with_adapter(student, config.lora_rank, config.lora_alpha, config.lora_targets)
        teacher, config, taken = _teacher(config, teacher_model, teacher_tokenizer, device, processes)
        if config.shard:
            shard(student, processes, device)
        roller = Roller(student, tokenizer, teacher, config, processes, _sampler(config, processes))
        if config.more_teachers:
            roller.others, said = _others(roller, [*prompts, *heldout])
            taken += said
        run = Run(roller, prompts)
        for side in run.teachers:
            side.render([*prompts, *heldout])  # what its template cannot put is found here, not in mid-run
        if processes.count > 1:
            torch.manual_seed(processes.seed(config.seed))  # answers of its own in each
        resumed = config.resume and restore(run, checkpoints)
        if resumed:
            run.catch_up(output / "samples.jsonl")

        if roller.sampler is not None:
            _try_out(run, prompts)
        if processes.first:
            _begin(output, run)
        after = None
        interrupted, failure = False, None
        try:
            with _progress(run) as (say, show), _asked_to_stop() as asked:
                run.say = say
                for client in run.clients:
                    client.say = say
                for text in taken:
                    say(text)
                if resumed:
                    say(f"resuming at step {run.done} of {config.steps}")
                elif heldout and config.eval_samples:
                    say(f"evaluating on {len(heldout)} held-out prompts")
                    run.before = _evaluated("before", roller, heldout, say)
                while run.done < config.steps and not processes.any(asked()):
                    _step(run, output, checkpoints, say, show)
                if config.save_every:
                    save(run, checkpoints, keep=config.keep_checkpoints)
                interrupted = run.done < config.steps
                if heldout and config.eval_samples and not interrupted:
                    run.hand_over()
                    say(f"evaluating on {len(heldout)} held-out prompts again")
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
            how = "--resume goes on from there" if config.save_every else "no checkpoint is kept (save_every=0)"
            raise TeacherError(
                f"ended after {run.done} steps, which are saved in {output}; {how}: {failure}"
            ) from failure
        return Result(output, run.history, run.before, after, interrupted)


def _step(
    run: Run, output: Path, checkpoints: Path, say: Callable[[str], None], show: Callable[[dict[str, Any]], None]
) -> None:
    """One step of the run, and what is written and said of it."""
    config, first = run.config, run.processes.first
    line = run.step()
    if first:
        _log(output, line)
    show(line)
    for warning in line["warnings"]:
        say(f"warning: {warning['text']}")
    if first and config.report_every and run.done % config.report_every == 0:
        with writing(output):
            _report(run, output)
    if config.save_every and run.done % config.save_every == 0:
        save(run, checkpoints, keep=config.keep_checkpoints)


def _models(config: Config, device: torch.device) -> tuple[Any, Any, Any, Any]:
    """The models and tokenizers that `config` names; no teacher's model where a server has it."""
    # Layers that are to be sharded go to the device one by one.
    half = config.dtype == "auto" and device.type == "cuda"
    at = (torch.device("cpu"), "bfloat16" if half else config.dtype) if config.shard else (device, config.dtype)
    student = load(config.student, *at)
    if config.teacher_url:
        return *student, None, load_tokenizer(config.teacher)
    return *student, *load(config.teacher, device, config.dtype)


def _plain(text: str) -> None:
    print(text, flush=True)


def _nothing(text: str) -> None:
    """Said by the first process."""


@contextmanager
def _alone(output: Path, processes: Processes, *, new: bool) -> Iterator[None]:
    """No other run in the folder, and none before a new one; the first process looks, and all of them learn of it."""
    checkpoints = output / "checkpoints"

    def check() -> None:
        if new and (there := found(checkpoints)):
            raise CheckpointError(
                f"{there[-1]} is of an earlier run: --resume (in Python: resume=True) goes on with it; or "
                f"give another output, or delete {checkpoints}"
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
_FILES = (*("config.json", "environment.json", "metrics.jsonl", "evaluation.json", "samples.jsonl", "report.html"),)
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


def _log(output: Path, *lines: dict[str, Any]) -> None:
    with writing(output / "metrics.jsonl"), open(output / "metrics.jsonl", "a", encoding="utf-8") as log:
        log.writelines(json.dumps(line) + "\n" for line in lines)


@contextmanager
def _progress(run: Run) -> Iterator[tuple[Callable[[str], None], Callable[[dict[str, Any]], None]]]:
    """How to say something and to show a step: on the first process, nothing on the others."""
    if not run.processes.first:
        yield _nothing, (lambda line: None)
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


def _teacher(
    config: Config, model: Any, tokenizer: Any, device: torch.device, processes: Processes
) -> tuple[Teacher, Config, list[str]]:
    """The teacher that `config` names; a server has passed its self-test.

    Returns:
        The teacher; the config with what a server's rows were found to allow; and what is to be said of that.
    """
    if not config.teacher_url:
        teacher = LocalTeacher(model, tokenizer, micro_batch=config.micro_batch, plain_template=config.plain_template)
        return teacher, config, []
    mine, problem = None, None
    if processes.first:
        try:
            mine = _served(config, config.teacher_ways, tokenizer, device, _plain)
        except XTokMapError as error:
            problem = error
    # What one process has found the others take, or say why they cannot.
    rows, problem = processes.gather((mine.rows if mine else "", problem))[0]
    if problem is not None:
        raise problem
    mine = mine or _served(config, (rows,), tokenizer, device, _nothing)
    loss = AUTO[mine.rows] if config.loss == "auto" else config.loss
    said = [f"the teacher gives {ROWS[mine.rows]}; loss={loss}"]
    if mine.rows == "top":
        said[0] += f", teacher_topk={config.teacher_topk}"
    if mine.bytes_per_token:
        said[0] += f"; {mine.bytes_per_token:,} bytes a token"
    said += [f"not {way}: {why}" for way, why in mine.refused.items()]
    return mine, replace(config, loss=loss, teacher_rows=mine.rows), said


def _others(roller: Roller, prompts: Sequence[Prompt]) -> tuple[Others, list[str]]:
    """The teachers beside the first one, and what is to be said of them."""
    config, device, teachers, said = roller.config, roller.device, {}, []
    for name, (model, url) in named_teachers(config.more_teachers).items():
        own = replace(config, teacher=model, teacher_url=url, teacher_states_url="", more_teachers="", domains="")
        if not url:
            loaded = load(model, device, config.dtype)
            check_finite(loaded[0], f"teacher {name}={model}")
        else:
            loaded = (None, load_tokenizer(model))
        teachers[name], _, found = _teacher(own, *loaded, device, roller.processes)
        said += [f"{name}: {text}" for text in found]
    domains = shares_by_domain(config.domains, (FIRST, *teachers))
    others = Others(roller.pair, teachers, domains)
    unknown = sorted({prompt.domain for prompt in prompts} - {*domains})
    if unknown:
        said.append(
            f"all {len(teachers) + 1} teachers count the same where the domain is {', '.join(map(repr, unknown[:5]))}"
        )
    return others, said


def _served(
    config: Config, ways: Sequence[str], tokenizer: Any, device: torch.device, say: Callable[[str], None]
) -> ServerTeacher:
    """A served teacher that gives the first of these ways that it has."""
    teacher = ServerTeacher(
        config.teacher_url,
        tokenizer,
        rows=ways,
        head=lambda: read_head(config.teacher, device, config.dtype),
        states_url=config.teacher_states_url,
        protocol=config.teacher_protocol,
        model=config.teacher_model,
        topk=config.teacher_topk,
        plain_template=config.plain_template,
        device=device,
        concurrency=config.teacher_concurrency,
        timeout=config.teacher_timeout,
        retries=config.teacher_retries,
        patience=config.teacher_patience,
    )
    for client in teacher.clients:
        client.say = say
    if (unknown := teacher.self_test()) is not None:
        warnings.warn(f"{config.teacher_url}: {unknown}", stacklevel=4)
    return teacher


def _sampler(config: Config, processes: Processes) -> ServerSampler | None:
    """Where the student samples, if not here."""
    if not config.sampler_url:
        return None
    sampler = ServerSampler(
        config.sampler_url,
        Path(config.sampler_folder or Path(config.output) / "sampler"),
        f"xtokmap-{processes.gather(secrets.token_hex(8))[0]}",
        first=processes.first,
        concurrency=config.sampler_concurrency,
        timeout=config.sampler_timeout,
        retries=config.teacher_retries,
        patience=config.teacher_patience,
    )
    sampler.client.say = _plain if processes.first else _nothing
    return sampler


def _try_out(run: Run, prompts: Sequence[PromptLike]) -> None:
    """Whether the server that samples takes the student's weights, and has them then."""
    roller, config, problem = run.roller, run.config, None
    run.hand_over()
    assert roller.sampler is not None
    try:
        with gathered(roller.student):
            some = render(roller.tokenizer, prompts[:4], config.plain_template)
            roller.sampler.self_test(roller.student, some, roller.aligner.student.stop_ids, config)
    except TeacherError as error:
        problem = str(error)
    problems = [text for text in run.processes.gather(problem) if text is not None]
    if problems:
        raise TeacherError(problems[0])


def _evaluated(
    name: str, roller: Roller, heldout: Sequence[PromptLike], say: Callable[[str], None]
) -> Evaluation | None:
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
    teacher = f"served ({roller.config.teacher_rows}), {len(aligner.teacher):,} tokens"
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

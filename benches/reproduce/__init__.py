"""The comparison of arXiv 2606.09456, small enough for two cores: fine-tuning against distillation across tokenizers.

Models of two families are trained from scratch, the student learns from the teacher by every method of the loop, and
right answers are held against the FLOPs and the processor time that they took. `reproduce` runs it and resumes where it
was; `tables` turns its runs into tables and plots.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from reproduce import families, runs
from reproduce.runs import METHODS, Bench, Pool, Setting
from reproduce.tasks import TASKS, problem_of
from xtokmap._core import XTokMapError
from xtokmap.files import replacing

#: Steps of a teacher's training; differences and negative numbers take longer.
TEACHER_STEPS = {"addition": 3000, "chain_sum": 6000}

#: Learning rates that are tried for every method.
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)

#: Steps of a run by how it samples, and after which of them the student is judged.
POINTS = {
    "opd": (5, 10, 20, 40, 80, 120, 160),
    "kd": (10, 25, 50, 100),
    "sft": (20, 50, 100, 200, 400, 800, 1200),
}
SWEEP_POINTS = {"opd": (20, 40, 60), "kd": (50,), "sft": (300, 600)}

#: Fine-tuning on answers in few ways is where it will get after so many steps.
FEW_WAYS_STEPS = 400

#: On-policy runs end that are at less than half of where they started, twice on end: they do not come back. Fine-tuning
#: and off-policy distillation begin with a fall.
FLOOR = 0.5


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        cells: task, arrangement, ways and methods.
        seeds: reported.
        sweep_seeds: on which the learning rate is chosen; none of the reported.
    """

    cells: tuple[tuple[str, str, int, tuple[str, ...]], ...]
    seeds: tuple[int, ...]
    sweep_seeds: tuple[int, ...]


_SOME = ("sft", "opd prior", "opd cover", "opd transfer_kl")

FULL = Plan(
    cells=(
        ("addition", "student_finer", 8, tuple(METHODS)),
        ("addition", "teacher_finer", 8, tuple(METHODS)),
        ("addition", "crossing", 8, tuple(METHODS)),
        ("addition", "student_finer", 1, _SOME),
        ("addition", "student_finer", 2, _SOME),
        ("chain_sum", "student_finer", 8, _SOME),
    ),
    seeds=(0, 1, 2, 3, 4),
    sweep_seeds=(100,),
)
QUICK = Plan(cells=(("addition", "student_finer", 8, _SOME),), seeds=(0, 1), sweep_seeds=())

#: For a quick run: what the sweep of the full one chose.
QUICK_RATES = {"sft": 3e-3, "opd prior": 3e-5, "opd cover": 1e-4, "opd transfer_kl": 1e-4}


def points_of(method: str, ways: int, *, sweep: bool = False) -> tuple[int, ...]:
    """After which steps a run of this method is judged; the last one is its length."""
    points = (SWEEP_POINTS if sweep else POINTS)[METHODS[method].get("method", "opd")]
    few = method == "sft" and ways < 8
    return tuple(step for step in points if step <= FEW_WAYS_STEPS) if few else points


# ---- what the workers do -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One thing to be made, and its name for the progress line."""

    name: str
    make: Callable[..., Any]
    arguments: tuple[Any, ...]


def _load(model: Any, path: Path) -> Any:
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()}, strict=False)
    return model.eval()


def _save(model: Any, path: Path, dtype: torch.dtype | None = None) -> None:
    own = {name: p.detach().to(dtype or p.dtype).contiguous() for name, p in model.named_parameters()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        save_file(own, part)


def teacher_path(folder: Path, task: str, cut: str) -> Path:
    """Where a teacher is kept."""
    return folder / f"{task}-{cut}.safetensors"


def make_teacher(folder: Path, task: str, cut: str) -> dict[str, Any]:
    """Trains a teacher and keeps it, rounded to half precision."""
    path = teacher_path(folder, task, cut)
    model = families.fit_teacher(task, cut, steps=TEACHER_STEPS[task])
    _save(model, path, torch.float16)
    return {}


def student_path(folder: Path, task: str, cut: str, seed: int) -> Path:
    """Where a student's start is kept."""
    return folder / "students" / f"{task}-{cut}-{seed}.safetensors"


def make_student(folder: Path, task: str, cut: str, seed: int) -> dict[str, Any]:
    """Trains a student until it gets half of other problems right at its likeliest, and keeps it."""
    made = families.tokenizer(cut, task)
    rng = random.Random("students")
    problems = [problem_of(TASKS[task], rng) for _ in range(128)]

    def enough(model: Any) -> bool:
        model.eval()
        found = runs.judge(model, made, TASKS[task], families.STUDENT_TEMPLATE, problems, greedy=True)
        model.train()
        return found >= 0.5

    _save(families.fit_student(task, cut, seed=seed, until=enough), student_path(folder, task, cut, seed))
    return {}


@cache
def bench(folder: Path, teachers: Path, task: str, arrangement: str) -> Bench:
    """A process's own models of a task and arrangement."""
    student_cut, teacher_cut = families.ARRANGEMENTS[arrangement]
    size = len(families.tokenizer(student_cut, task))
    teacher = families.teacher_model(len(families.tokenizer(teacher_cut, task)))

    def student(seed: int) -> Any:
        return _load(families.student_model(size), student_path(folder, task, student_cut, seed))

    return Bench(task, arrangement, _load(teacher, teacher_path(teachers, task, teacher_cut)), student)


def pool_path(folder: Path, task: str, cut: str, ways: int) -> Path:
    """Where a teacher's answers are kept."""
    return folder / "answers" / f"{task}-{cut}-{ways}.json"


def make_answers(folder: Path, teachers: Path, task: str, arrangement: str, ways: int) -> dict[str, Any]:
    """Samples a teacher's answers to the training problems."""
    own = bench(folder, teachers, task, arrangement)
    pool = own.fill(ways)
    path = pool_path(folder, task, own.cuts[1], ways)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps({"answers": pool.answers, "seconds": pool.seconds}))
    return {}


def make_run(folder: Path, teachers: Path, setting: Setting, points: Sequence[int]) -> dict[str, Any]:
    """Trains and judges one student."""
    own = bench(folder, teachers, setting.task, setting.arrangement)
    on_policy = METHODS[setting.method].get("method", "opd") == "opd"
    if not on_policy and setting.ways not in own.pools:
        kept = json.loads(pool_path(folder, setting.task, own.cuts[1], setting.ways).read_text())
        answers = {prompt: (row, done) for prompt, (row, done) in kept["answers"].items()}
        own.pools[setting.ways] = Pool(answers, kept["seconds"])
    return own.run(setting, points, floor=FLOOR if on_policy else 0.0)


def judge_teacher(folder: Path, teachers: Path, task: str, arrangement: str, ways: int) -> dict[str, Any]:
    """A teacher's own share of right answers."""
    own = bench(folder, teachers, task, arrangement)
    template, tok = families.teacher_template(ways), own.teacher_tokenizer
    right = [runs.judge(own.teacher, tok, own.task, template, own.problems, greedy=g) for g in (True, False)]
    return {"task": task, "arrangement": arrangement, "ways": ways, "greedy": right[0], "sampled": right[1]}


def _start_worker() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")


# ---- the plan, carried out ---------------------------------------------------------------------------------------


def _carry_out(pool: ProcessPoolExecutor, title: str, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """Results as they come, with a line of progress for each."""
    if not jobs:
        return
    began, done = time.perf_counter(), 0
    print(f"{title}: {len(jobs)} to do", flush=True)
    waiting: dict[Future[dict[str, Any]], Job] = {pool.submit(job.make, *job.arguments): job for job in jobs}
    while waiting:
        finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for future in finished:
            job = waiting.pop(future)
            done += 1
            took = time.perf_counter() - began
            print(
                f"  {done}/{len(jobs)} {job.name}  [{took:.0f} s, {took / done * (len(jobs) - done):.0f} s to go]",
                flush=True,
            )
            yield future.result()


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")


def _run_all(
    pool: ProcessPoolExecutor,
    title: str,
    path: Path,
    settings: Iterable[Setting],
    folders: tuple[Path, Path],
    sweep: bool,
) -> list[dict[str, Any]]:
    """Runs what `path` does not have yet, and adds it there."""
    wanted = list(dict.fromkeys(settings))
    have = runs.read(path)
    jobs = [
        Job(
            f"{s.task} {s.arrangement} {s.ways} {s.method} rate {s.rate:g} seed {s.seed}",
            make_run,
            (*folders, s, points_of(s.method, s.ways, sweep=sweep)),
        )
        for s in wanted
        if s.key not in have
    ]
    for row in _carry_out(pool, title, jobs):
        _append(path, row)
    have = runs.read(path)
    return [have[s.key] for s in wanted]


def choose_rates(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """For every cell and method the rate with the most right answers over the sweep's points, greedy and at T = 1.

    The mean of the points, as a rate should be quick as well as get far, and as one point of one seed is noisy.
    """
    scores: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        name = f"{row['task']} {row['arrangement']} {row['ways']} {row['method']}"
        right = statistics.mean(point["greedy"] + point["sampled"] for point in row["points"][1:])
        scores.setdefault(name, {}).setdefault(row["rate"], []).append(right)
    return {name: max(by_rate, key=lambda rate: statistics.mean(by_rate[rate])) for name, by_rate in scores.items()}


def reproduce(
    output: str | Path = "runs/reproduce",
    *,
    quick: bool = False,
    teachers: str | Path | None = None,
    workers: int | None = None,
) -> Path:
    """Runs the comparison and writes its tables and plots.

    What is finished is kept in `output` and not done again, so that an interrupted run resumes where it was.

    Args:
        output: folder for models, runs and tables.
        quick: four methods in one arrangement on two seeds, with rates that are known, instead of everything.
        teachers: folder with trained teachers; those that are not there are trained.
        workers: processes, with one thread each; None: as many as there are cores.

    Returns:
        The folder with the tables.

    Raises:
        XTokMapError: `reasoning-gym` is wanted and not installed.
    """
    plan = QUICK if quick else FULL
    if any(task == "chain_sum" for task, *_ in plan.cells):
        try:
            import reasoning_gym  # noqa: F401
        except ImportError as error:
            raise XTokMapError("the task chain_sum needs pip install 'xtokmap[reproduce]'") from error
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    stored = Path(teachers) if teachers is not None else folder / "teachers"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers or os.cpu_count(), context, _start_worker) as pool:
        cuts = dict.fromkeys((task, families.ARRANGEMENTS[arrangement]) for task, arrangement, *_ in plan.cells)
        needed = dict.fromkeys((task, cut) for task, (_, cut) in cuts)
        if not all(teacher_path(stored, *one).exists() for one in needed):
            stored = folder / "teachers"
        missing = [one for one in needed if not teacher_path(stored, *one).exists()]
        jobs = [Job(f"{task} {cut}", make_teacher, (stored, task, cut)) for task, cut in missing]
        list(_carry_out(pool, "teachers", jobs))

        wanted = dict.fromkeys((task, s, seed) for task, (s, _) in cuts for seed in (*plan.sweep_seeds, *plan.seeds))
        jobs = [
            Job(f"{task} {cut} {seed}", make_student, (folder, task, cut, seed))
            for task, cut, seed in wanted
            if not student_path(folder, task, cut, seed).exists()
        ]
        list(_carry_out(pool, "students", jobs))

        folders = (folder, stored)
        jobs = [
            Job(f"{task} {arrangement} {ways}", make_answers, (*folders, task, arrangement, ways))
            for task, arrangement, ways, _ in plan.cells
            if not pool_path(folder, task, families.ARRANGEMENTS[arrangement][1], ways).exists()
        ]
        list(_carry_out(pool, "teacher's answers", jobs))
        jobs = [
            Job(f"{task} {arrangement} {ways}", judge_teacher, (*folders, task, arrangement, ways))
            for task, arrangement, ways, _ in plan.cells
        ]
        judged = sorted(
            _carry_out(pool, "teachers' own answers", jobs),
            key=lambda row: (row["task"], row["arrangement"], row["ways"]),
        )
        (folder / "teachers.json").write_text(json.dumps(judged, indent=2) + "\n")

        sweep = [
            Setting(task, arrangement, ways, method, rate, seed, points_of(method, ways, sweep=True)[-1])
            for seed in plan.sweep_seeds
            for task, arrangement, ways, methods in plan.cells
            for method in methods
            for rate in RATES
        ]
        rows = _run_all(pool, "sweep of learning rates", folder / "sweep.jsonl", sweep, folders, True)
        rates = choose_rates(rows)
        settings = [
            Setting(
                task, arrangement, ways, method,
                QUICK_RATES[method] if quick else rates[f"{task} {arrangement} {ways} {method}"],
                seed, points_of(method, ways)[-1],
            )
            for seed in plan.seeds
            for task, arrangement, ways, methods in plan.cells
            for method in methods
        ]  # fmt: skip
        rows = _run_all(pool, "runs", folder / "runs.jsonl", settings, folders, False)
    from reproduce.tables import write_tables

    return write_tables(folder, rows, runs.read(folder / "sweep.jsonl").values(), judged)

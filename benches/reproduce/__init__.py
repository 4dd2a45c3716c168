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
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from reproduce import families, runs
from reproduce.runs import METHODS, TEACHERLESS, Bench, Pool, Setting
from reproduce.tables import write_tables
from reproduce.tasks import TASKS, problem_of
from xtokmap._core import XTokMapError
from xtokmap.files import replacing

#: Steps of a teacher's training; differences and negative numbers take longer.
TEACHER_STEPS = {"addition": 3000, "chain_sum": 6000}

#: Learning rates that are tried, by how a method samples.
RATES = {"opd": (3e-5, 1e-4, 3e-4, 1e-3), "kd": (1e-4, 3e-4), "sft": (1e-3, 3e-3)}

#: Whose rate it is that a method is run at, where not its own. What is held beside another method shares its rate.
SAME_RATE = {
    "right answers": "opd transfer_kl",
    "right answers, sft's rate": "sft",
    "opd transfer_kl, constant rate": "opd transfer_kl",
    "opd transfer_kl, constant rate, anchor .1": "opd transfer_kl",
    "opd transfer_kl, anchor .1": "opd transfer_kl",
    "opd transfer_kl, anchor .5": "opd transfer_kl",
}


@dataclass(frozen=True)
class Cell:
    """One comparison.

    Attributes:
        task: name of the task.
        arrangement: of the two tokenizers.
        ways: in how many ways the teacher writes.
        budgets: by method, the steps of its runs. Each budget is a run of its own, with a learning rate that falls to
            nothing at its end: a point that is read in the middle of a longer run would be of another rate.
        seeds: how many of the plan's seeds it is run on; None: all.
    """

    task: str
    arrangement: str
    ways: int
    budgets: dict[str, tuple[int, ...]]
    seeds: int | None = None


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        cells: the comparisons.
        seeds: reported.
        sweep_seeds: on which the learning rate is chosen; none of the reported.
    """

    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    sweep_seeds: tuple[int, ...]


_STEPS = (20, 80, 240)
_EIGHT_WAYS = {
    "sft": (300, 1200), "opd prior": (240,), "opd transfer_kl": _STEPS, "right answers": _STEPS,
    "right answers, sft's rate": (400,),
}  # fmt: skip
_FEW_WAYS = {
    "sft": (25, 100, 400), "opd prior": (240,), "opd transfer_kl": (20, 80, 400), "right answers": (20, 80, 400),
}  # fmt: skip
_ALL_LOSSES = {
    "opd strict": (240,), "opd full": (240,), "opd cover": (240,), "opd byte_kl": (240,),
    "kd transfer_kl forward": (100,),
}  # fmt: skip
_AGAINST_DRIFT: dict[str, tuple[int, ...]] = {
    "opd transfer_kl": (400,), "opd transfer_kl, constant rate": (400,),
    "opd transfer_kl, constant rate, anchor .1": (400,),
    "opd transfer_kl, anchor .1": (400,), "opd transfer_kl, anchor .5": (400,),
}  # fmt: skip

#: The first cell of a task and number of ways is the one whose learning rates are swept.
FULL = Plan(
    cells=(
        Cell("addition", "student_finer", 8, {**_EIGHT_WAYS, **_ALL_LOSSES}),
        Cell("addition", "student_finer", 8, _AGAINST_DRIFT, seeds=3),
        Cell("addition", "student_finer", 1, _FEW_WAYS),
        Cell("addition", "student_finer", 2, _FEW_WAYS),
        Cell("addition", "crossing", 8, _EIGHT_WAYS),
        Cell("addition", "teacher_finer", 8, _EIGHT_WAYS),
        Cell("chain_sum", "student_finer", 8, _EIGHT_WAYS),
    ),
    seeds=(0, 1, 2, 3, 4),
    sweep_seeds=(100,),
)
_QUICK = {"sft": (100, 300), "opd prior": (60,), "opd transfer_kl": (20, 60), "right answers": (20, 60)}
QUICK = Plan(cells=(Cell("addition", "student_finer", 8, _QUICK),), seeds=(0, 1), sweep_seeds=())

#: For a quick run: what the sweep of the full one chose.
QUICK_RATES = {
    ("addition", 8, "sft"): 3e-3,
    ("addition", 8, "opd prior"): 3e-4,
    ("addition", 8, "opd transfer_kl"): 1e-3,
}


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
    """Trains a student until, annealed, it gets half of other problems right at its likeliest, and keeps it."""
    made = families.tokenizer(cut, task)
    rng = random.Random("students")
    problems = [problem_of(TASKS[task], rng) for _ in range(128)]

    def judged(model: Any) -> float:
        training = model.training
        found = runs.judge(model.eval(), made, TASKS[task], families.STUDENT_TEMPLATE, problems, greedy=True)
        model.train(training)
        return found.right

    _save(families.fit_student(task, cut, seed=seed, judged=judged), student_path(folder, task, cut, seed))
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


def make_run(folder: Path, teachers: Path, setting: Setting) -> dict[str, Any]:
    """Trains and judges one student."""
    own = bench(folder, teachers, setting.task, setting.arrangement)
    on_policy = METHODS[setting.method].get("method", "opd") == "opd"
    if not on_policy and setting.method not in TEACHERLESS and setting.ways not in own.pools:
        kept = json.loads(pool_path(folder, setting.task, own.cuts[1], setting.ways).read_text())
        answers = {prompt: (row, done) for prompt, (row, done) in kept["answers"].items()}
        own.pools[setting.ways] = Pool(answers, kept["seconds"])
    return own.run(setting)


def judge_teacher(folder: Path, teachers: Path, task: str, arrangement: str, ways: int) -> dict[str, Any]:
    """A teacher's own share of right answers."""
    own = bench(folder, teachers, task, arrangement)
    template, tok = families.teacher_template(ways), own.teacher_tokenizer
    right = [runs.judge(own.teacher, tok, own.task, template, own.problems, greedy=g) for g in (True, False)]
    greedy, sampled = (one.right for one in right)
    return {"task": task, "arrangement": arrangement, "ways": ways, "greedy": greedy, "sampled": sampled}


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
    try:
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
    finally:  # interrupted: what has not begun is left for the next time
        for future in waiting:
            future.cancel()


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")


def _run_all(
    pool: ProcessPoolExecutor, title: str, path: Path, settings: Iterable[Setting], folders: tuple[Path, Path]
) -> list[dict[str, Any]]:
    """Runs what `path` does not have yet, and adds it there."""
    wanted = list(dict.fromkeys(settings))
    have = runs.read(path)
    jobs = [
        Job(
            f"{s.task} {s.arrangement} {s.ways} {s.method} {s.steps} steps rate {s.rate:g} seed {s.seed}",
            make_run,
            (*folders, s),
        )
        for s in wanted
        if s.key not in have
    ]
    for row in _carry_out(pool, title, jobs):
        _append(path, row)
    have = runs.read(path)
    return [have[s.key] for s in wanted]


def _sweep(plan: Plan) -> Iterator[Setting]:
    """Every rate for every method, at its longest, in the first cell of a task and number of ways."""
    swept = set()
    for cell in plan.cells:
        for method, budgets in cell.budgets.items():
            name = (cell.task, cell.ways, method)
            if method in SAME_RATE or name in swept:
                continue
            swept.add(name)
            for seed in plan.sweep_seeds:
                for rate in RATES[METHODS[method].get("method", "opd")]:
                    yield Setting(cell.task, cell.arrangement, cell.ways, method, rate, seed, budgets[-1])


def choose_rates(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, int, str], float]:
    """For every task, number of ways and method the rate with the most right answers, greedy and at T = 1."""
    scores: dict[tuple[str, int, str], dict[float, list[float]]] = {}
    for row in rows:
        name = (row["task"], row["ways"], row["method"])
        right = row["points"][-1]["greedy"] + row["points"][-1]["sampled"]
        scores.setdefault(name, {}).setdefault(row["rate"], []).append(right)
    return {name: max(by_rate, key=lambda rate: statistics.mean(by_rate[rate])) for name, by_rate in scores.items()}


def _settings(plan: Plan, rates: Mapping[tuple[str, int, str], float]) -> Iterator[Setting]:
    """The plan's runs, cell by cell, so that what is cut off has whole comparisons."""
    for cell in plan.cells:
        for seed in plan.seeds[: cell.seeds]:
            for method, budgets in cell.budgets.items():
                rate = rates[cell.task, cell.ways, SAME_RATE.get(method, method)]
                for steps in budgets:
                    yield Setting(cell.task, cell.arrangement, cell.ways, method, rate, seed, steps)


def _whole(settings: Iterable[Setting], have: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of the comparisons that are finished."""
    settings = list(dict.fromkeys(settings))
    missing = {(s.task, s.arrangement, s.ways) for s in settings if s.key not in have}
    return [have[s.key] for s in settings if (s.task, s.arrangement, s.ways) not in missing]


def reproduce(
    output: str | Path = "runs/reproduce",
    *,
    quick: bool = False,
    teachers: str | Path | None = None,
    workers: int | None = None,
) -> Path:
    """Runs the comparison and writes its tables and plots.

    What is finished is kept in `output` and not done again, so that an interrupted run resumes where it was, and leaves
    the tables of the comparisons that are whole.

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
    cells = dict.fromkeys((cell.task, cell.arrangement, cell.ways) for cell in plan.cells)
    if any(task == "chain_sum" for task, *_ in cells):
        try:
            import reasoning_gym  # noqa: F401
        except ImportError as error:
            raise XTokMapError("the task chain_sum needs pip install 'xtokmap[reproduce]'") from error
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    stored = Path(teachers) if teachers is not None else folder / "teachers"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers or os.cpu_count(), context, _start_worker) as pool:
        cuts = dict.fromkeys((task, families.ARRANGEMENTS[arrangement]) for task, arrangement, _ in cells)
        needed = dict.fromkeys((task, cut) for task, (_, cut) in cuts)
        if not all(teacher_path(stored, *one).exists() for one in needed):
            stored = folder / "teachers"
        missing = [one for one in needed if not teacher_path(stored, *one).exists()]
        jobs = [Job(f"{task} {cut}", make_teacher, (stored, task, cut)) for task, cut in missing]
        list(_carry_out(pool, "teachers", jobs))

        wanted = dict.fromkeys(
            (one.task, families.ARRANGEMENTS[one.arrangement][0], one.seed)
            for one in (*_sweep(plan), *_settings(plan, defaultdict(float)))
        )
        jobs = [
            Job(f"{task} {cut} {seed}", make_student, (folder, task, cut, seed))
            for task, cut, seed in wanted
            if not student_path(folder, task, cut, seed).exists()
        ]
        list(_carry_out(pool, "students", jobs))

        folders = (folder, stored)
        jobs = [
            Job(f"{task} {arrangement} {ways}", make_answers, (*folders, task, arrangement, ways))
            for task, arrangement, ways in cells
            if not pool_path(folder, task, families.ARRANGEMENTS[arrangement][1], ways).exists()
        ]
        list(_carry_out(pool, "teacher's answers", jobs))
        jobs = [
            Job(f"{task} {arrangement} {ways}", judge_teacher, (*folders, task, arrangement, ways))
            for task, arrangement, ways in cells
        ]
        judged = sorted(
            _carry_out(pool, "teachers' own answers", jobs),
            key=lambda row: (row["task"], row["arrangement"], row["ways"]),
        )
        (folder / "teachers.json").write_text(json.dumps(judged, indent=2) + "\n")

        swept = _run_all(pool, "sweep of learning rates", folder / "sweep.jsonl", _sweep(plan), folders)
        rates = QUICK_RATES if quick else choose_rates(swept)
        settings = list(_settings(plan, rates))
        try:
            _run_all(pool, "runs", folder / "runs.jsonl", settings, folders)
        finally:  # also if it is interrupted: the comparisons that are whole
            rows = _whole(settings, runs.read(folder / "runs.jsonl"))
            if rows:
                write_tables(folder, rows, swept, judged)
    return folder

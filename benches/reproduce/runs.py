"""One run of the comparison: a student, a teacher and a method; right answers, FLOPs and time along the way."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from reproduce import families
from reproduce.families import ARRANGEMENTS, STUDENT_TEMPLATE, teacher_template, tokenizer
from reproduce.tasks import TASKS, Problem, Task, is_plain, problem_of, solve
from xtokmap.chat import PromptLike, prompts_of, render
from xtokmap.teachers.local import LocalTeacher
from xtokmap.train.config import Config
from xtokmap.train.generation import sample
from xtokmap.train.loop import Run
from xtokmap.train.sampling import Roller

#: What can be compared, as the fields of `Config` that make it. The rate falls to nothing unless it says otherwise.
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"method": "sft"},
    "right answers": {"method": "sft"},
    "right answers, sft's rate": {"method": "sft"},
    "kd transfer_kl forward": {"method": "kd", "loss": "transfer_kl", "beta": 0.0},
    "opd strict": {"loss": "strict"},
    "opd prior": {"loss": "prior"},
    "opd full": {"loss": "full"},
    "opd cover": {"loss": "cover"},
    "opd byte_kl": {"loss": "byte_kl"},
    "opd transfer_kl": {"loss": "transfer_kl"},
    "opd transfer_kl, constant rate": {"loss": "transfer_kl", "decay": "none"},
    "opd transfer_kl, constant rate, anchor .1": {"loss": "transfer_kl", "decay": "none", "anchor": 0.1},
    "opd transfer_kl, anchor .1": {"loss": "transfer_kl", "anchor": 0.1},
    "opd transfer_kl, anchor .5": {"loss": "transfer_kl", "anchor": 0.5},
}

#: Methods without a teacher: right answers, written as the student writes, in place of a teacher's.
TEACHERLESS = ("right answers", "right answers, sft's rate")

BATCH = 64
MAX_NEW_TOKENS = 110
JUDGED = 256
POOL = 16_384


@dataclass(frozen=True)
class Setting:
    """What sets one run apart from the others.

    Attributes:
        task: name of the task.
        arrangement: of the two tokenizers.
        ways: in how many ways the teacher writes, the student's own among them.
        method: one of `METHODS`.
        rate: learning rate.
        seed: of the student's start, of samples and shuffling.
        steps: updates, over which the learning rate falls.
    """

    task: str
    arrangement: str
    ways: int
    method: str
    rate: float
    seed: int
    steps: int

    @property
    def key(self) -> str:
        """The setting as one line of text."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Judgement:
    """Of a model's answers to the held-out problems.

    Attributes:
        right: share that ends in the right answer.
        plain: share that is written in the student's own way, right or wrong.
    """

    right: float
    plain: float


def judge(
    model: Any, tokenizer: Any, task: Task, template: str, problems: Sequence[Problem], *, greedy: bool, seed: int = 0
) -> Judgement:
    """What a model answers to held-out problems, at its likeliest or at temperature 1."""
    prompts = render(tokenizer, [task.prompt(problem) for problem in problems], template)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = Config(max_new_tokens=MAX_NEW_TOKENS)
        answers, _ = sample(model, prompts, [tokenizer.eos_token_id], config, greedy=greedy)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    n = len(problems)
    return Judgement(sum(map(task.is_right, problems, texts)) / n, sum(map(is_plain, texts, problems)) / n)


def heldout_problems(task: Task, n: int = JUDGED) -> list[Problem]:
    """The same problems for everybody."""
    rng = random.Random("heldout")
    return [problem_of(task, rng, heldout=True) for _ in range(n)]


class Pool:
    """Answers to the training problems that are there before a run, and what each cost.

    Fine-tuning and off-policy distillation usually have such a set and go through it several times. In a run's account
    an answer is sampled when the run first uses it, and costs what sampling it took.

    Args:
        answers: by prompt, ids of the teacher's tokenizer and whether they ended.
        seconds: by prompt, processor seconds of sampling.
        given: nobody sampled them.
    """

    def __init__(
        self,
        answers: dict[str, tuple[list[int], bool]] | None = None,
        seconds: dict[str, float] | None = None,
        *,
        given: bool = False,
    ) -> None:
        self.answers = {} if answers is None else answers
        self.seconds = {} if seconds is None else seconds
        self.given = given

    def ask(self, roller: Roller, prompts: Sequence[str]) -> None:
        """Samples what is missing, a large batch at a time."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.answers]
        for first in range(0, len(missing), 256):
            some = missing[first : first + 256]
            began = time.process_time()
            rows, completed = Roller.answers(roller, some, roller.teacher.render(some))
            took = (time.process_time() - began) / len(some)
            for prompt, row, done in zip(some, rows, completed, strict=True):
                self.answers[prompt] = (row, done)
                self.seconds[prompt] = took


class PooledRoller(Roller):
    """A roller whose teacher's answers come from a pool."""

    pool: Pool
    seen: set[str]

    def answers(
        self, prompts: Sequence[PromptLike], teacher_prompts: Sequence[Sequence[int]]
    ) -> tuple[list[list[int]], list[bool]]:
        """From the pool; `fresh` are the prompts that this run had not used before, and that somebody sampled."""
        asked = [prompt.title for prompt in prompts_of(prompts)]
        self.pool.ask(self, asked)
        self.fresh = [] if self.pool.given else [p for p in dict.fromkeys(asked) if p not in self.seen]
        self.seen.update(self.fresh)
        rows, completed = zip(*(self.pool.answers[prompt] for prompt in asked), strict=True)
        return list(rows), list(completed)


class Bench:
    """The models and held-out problems of a task and arrangement, loaded once, on which settings are run.

    Args:
        task: name of the task.
        arrangement: of the two tokenizers.
        teacher: the trained teacher.
        student: makes a student from a seed, from where it starts.
    """

    def __init__(self, task: str, arrangement: str, teacher: Any, student: Callable[[int], Any]) -> None:
        self.task, self.arrangement = TASKS[task], arrangement
        self.cuts = ARRANGEMENTS[arrangement]
        self.student_tokenizer, self.teacher_tokenizer = (tokenizer(cut, task) for cut in self.cuts)
        self.teacher, self.student = teacher, student
        self.pools: dict[int, Pool] = {}

    @cached_property
    def problems(self) -> list[Problem]:
        """To judge by."""
        return heldout_problems(self.task)

    @cached_property
    def _drawn(self) -> dict[str, Problem]:
        rng = random.Random("train")
        return {self.task.prompt(problem): problem for problem in (problem_of(self.task, rng) for _ in range(POOL))}

    @property
    def prompts(self) -> list[str]:
        """To learn from."""
        return list(self._drawn)

    @cached_property
    def own_way(self) -> Pool:
        """Right answers to the training problems, as the student writes, in the tokens of the teacher."""
        rng = random.Random("own way")
        texts = [solve(self.task, problem, 0, rng).text for problem in self._drawn.values()]
        end = self.teacher_tokenizer.eos_token_id
        rows = [[*row, end] for row in self.teacher_tokenizer(texts).input_ids]
        return Pool({prompt: (row, True) for prompt, row in zip(self.prompts, rows, strict=True)}, given=True)

    def judge_student(self, student: Any) -> tuple[Judgement, Judgement]:
        """What the student answers, greedy and at temperature 1."""
        greedy, sampled = (
            judge(student, self.student_tokenizer, self.task, STUDENT_TEMPLATE, self.problems, greedy=greedy)
            for greedy in (True, False)
        )
        return greedy, sampled

    def run(self, setting: Setting) -> dict[str, Any]:
        """Trains a student as the setting says.

        Returns:
            The setting, and two points, before and after it: steps, FLOPs by part, processor seconds, answers the
            teacher gave, greedy and sampled accuracy, and the share of samples that are written in the student's way.
        """
        student = self.student(setting.seed)
        roller = self._roller(student, setting)
        pooled = roller.config.method != "opd"
        torch.manual_seed(setting.seed)
        run = Run(roller, self.prompts, watch=False)
        flops = {"sample": 0, "teacher": 0, "update": 0}
        seconds = 0.0
        found = [self._point(0, flops, seconds, student)]
        for _ in range(setting.steps):
            began = time.process_time()
            metrics = run.step()
            seconds += time.process_time() - began
            spent = metrics["flops"]
            if pooled:
                share = len(roller.fresh) / BATCH
                spent = {**spent, "sample": round(spent["sample"] * share)}
                seconds += sum(roller.pool.seconds[prompt] for prompt in roller.fresh)
            flops = {name: flops[name] + spent[name] for name in flops}
        found.append(self._point(setting.steps, flops, seconds, student))
        return {**asdict(setting), "points": found}

    def fill(self, ways: int) -> Pool:
        """The teacher's answers to all training problems, in so many ways."""
        setting = Setting(self.task.name, self.arrangement, ways, "sft", 1e-3, 0, 1)
        roller = self._roller(families.student_model(len(self.student_tokenizer)), setting)
        roller.pool.ask(roller, self.prompts)
        return roller.pool

    def _roller(self, student: Any, setting: Setting) -> PooledRoller:
        config = Config(
            steps=setting.steps,
            batch_size=BATCH,
            micro_batch=BATCH,
            max_new_tokens=MAX_NEW_TOKENS,
            learning_rate=setting.rate,
            warmup_steps=5,
            max_chunk_tokens=0,
            plain_template=STUDENT_TEMPLATE,
            seed=setting.seed,
            device="cpu",
            **{"decay": "linear", **METHODS[setting.method]},
        )
        teacher = LocalTeacher(
            self.teacher, self.teacher_tokenizer, micro_batch=BATCH, plain_template=teacher_template(setting.ways)
        )
        roller = PooledRoller(student, self.student_tokenizer, teacher, config)
        own = setting.method in TEACHERLESS
        roller.pool = self.own_way if own else self.pools.setdefault(setting.ways, Pool())
        roller.seen = set()
        return roller

    def _point(self, step: int, flops: dict[str, int], seconds: float, student: Any) -> dict[str, Any]:
        greedy, sampled = self.judge_student(student)
        return {
            "step": step, "flops": dict(flops), "seconds": round(seconds, 3),
            "greedy": greedy.right, "sampled": sampled.right, "plain": sampled.plain,
        }  # fmt: skip


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Finished runs by their setting's key."""
    names = Setting.__dataclass_fields__
    found = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found[Setting(**{name: row[name] for name in names}).key] = row
    return found

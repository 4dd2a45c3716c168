"""Fine-tuning and on-policy distillation on a real pair, against FLOPs: python benches/pair_compute.py

Gemma 3 270M, a base model that never ends a turn, learns to answer from SmolLM2 135M Instruct: the pair of `make demo`,
as it is trained there. Every run starts from the same weights, and every budget is a run of its own whose learning rate
falls to nothing at its end. Then the student answers held-out questions, and the answers are held against the teacher:

- ended turns: the share of answers that end before the longest length;
- reverse KL of these answers to the teacher, per byte;
- NLL: nats per byte of the teacher's own answers under the student, which is what fine-tuning minimizes;
- to the point: how much likelier the teacher finds an answer after its own question than after another one, in nats an
  answer, and the share of answers that it finds likelier. A model that babbles well gets nothing here.

Table and plot are in benches/results/ after every measurement.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import math
import platform
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

import xtokmap
from xtokmap import demo
from xtokmap.models import load, with_adapter
from xtokmap.teachers.local import LocalTeacher
from xtokmap.train.config import Config
from xtokmap.train.evaluation import ratio_with_error
from xtokmap.train.loop import Run
from xtokmap.train.prompts import read_prompts
from xtokmap.train.rollouts import Rollouts
from xtokmap.train.sampling import Roller

RESULTS = Path(__file__).parent / "results"
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"method": "sft"},
    "opd transfer_kl": {"loss": "transfer_kl"},
    "opd prior": {"loss": "prior"},
}


@dataclass
class Point:
    """What a student is like; the second of two is the standard error over questions."""

    ended: float
    kl: tuple[float, float]
    nll: tuple[float, float]
    to_the_point: tuple[float, float]
    likelier: float

    def columns(self) -> list[str]:
        """For the table."""
        pairs = [f"{mean:.3f} ± {error:.3f}" for mean, error in (self.kl, self.nll)]
        mean, error = self.to_the_point
        return [f"{self.ended:.0%}", *pairs, f"{mean:.1f} ± {error:.1f}", f"{self.likelier:.0%}"]


class Judge:
    """Holds a student against the teacher on held-out questions."""

    def __init__(self, tokenizer: Any, teacher: LocalTeacher, student: Any, config: Config, questions: Any) -> None:
        self.tokenizer, self.teacher, self.config, self.questions = tokenizer, teacher, config, questions
        with torch.random.fork_rng():
            torch.manual_seed(99)
            kd = replace(config, method="kd")
            self.answers = Roller(student, tokenizer, teacher, kd).roll(questions)

    def _nats(self, roller: Roller, answers: Rollouts, questions: Any) -> torch.Tensor:
        """The teacher's logprob of each answer after such questions."""
        rows, done = answers.batch.student_ids, answers.completed
        asked = roller.take(questions, rows, done, self.config)
        scores = roller.score(asked, replace(self.config, loss="full")).teacher
        assert scores is not None
        return (scores.logprobs * scores.mask).sum(1)

    def _nll(self, roller: Roller) -> tuple[float, float]:
        logprobs = roller.all_logprobs(self.answers.batch)
        rows = self.answers.batch.student_ids
        counted = torch.zeros_like(logprobs, dtype=torch.bool)
        for b, row in enumerate(rows):
            counted[b, : len(row)] = True
        nbytes = [len(roller.aligner.student.decode(row)) for row in rows]
        return ratio_with_error((-logprobs * counted).sum(1).tolist(), nbytes)

    @torch.no_grad()
    def __call__(self, student: Any) -> Point:
        """The student as it is now; the same seed every time."""
        roller = Roller(student, self.tokenizer, self.teacher, replace(self.config, loss="full"))
        with torch.random.fork_rng():
            torch.manual_seed(1234)
            found = roller.roll(self.questions)
        own = roller.all_logprobs(found.batch)
        gap, nbytes = found.gap(own, stops=True, markers=True)
        questions = list(self.questions)
        others = questions[1:] + questions[:1]
        ahead = (self._nats(roller, found, questions) - self._nats(roller, found, others)).tolist()
        n = len(ahead)
        return Point(
            sum(found.completed) / n,
            ratio_with_error(gap.tolist(), nbytes.tolist()),
            self._nll(roller),
            (statistics.mean(ahead), statistics.stdev(ahead) / math.sqrt(n)),
            sum(x > 0 for x in ahead) / n,
        )


def plot(start: Point, found: list[tuple[str, int, float, Point]]) -> None:
    """All measures against FLOPs, the mean over the seeds that have come so far."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(17, 3.6), layout="constrained")
    measures: tuple[tuple[str, Callable[[Point], float]], ...] = (
        ("share of ended turns", lambda p: p.ended),
        ("reverse KL of its answers, nats/byte", lambda p: p.kl[0]),
        ("NLL of the teacher's answers, nats/byte", lambda p: p.nll[0]),
        ("to the point, nats an answer", lambda p: p.to_the_point[0]),
    )
    for axis, (title, value) in zip(axes, measures, strict=True):
        for method in dict.fromkeys(name for name, *_ in found):
            budgets = sorted({steps for name, steps, *_ in found if name == method})
            at = [[(x, p) for name, n, x, p in found if (name, n) == (method, steps)] for steps in budgets]
            x = [0.0, *(statistics.mean(flops for flops, _ in some) for some in at)]
            y = [value(start), *(statistics.mean(value(p) for _, p in some) for some in at)]
            axis.plot(x, y, marker="o", markersize=3, label=method)
        axis.set(xlabel="FLOPs", title=title)
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize="small")
    figure.savefig(RESULTS / "pair_compute.png", dpi=85)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["sft", "opd transfer_kl"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 12], help="budgets; each is a run of its own")
    parser.add_argument("--heldout", type=int, default=32, help="held-out questions")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    device = torch.device("cpu")
    base, tokenizer = load(str(demo.fetch(demo.GEMMA)), device)
    teacher_model, teacher_tokenizer = load(str(demo.fetch(demo.SMOLLM2)), device)
    teacher = LocalTeacher(teacher_model, teacher_tokenizer)
    prompts, heldout = read_prompts(str(resources.files("xtokmap") / "data" / "questions.jsonl"))
    common = Config(**demo.SETTINGS, device="cpu", output=tempfile.gettempdir())
    judge = Judge(tokenizer, teacher, base, common, heldout[: args.heldout])
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    lines = [
        f"`{shlex.join(['python', 'benches/pair_compute.py', *sys.argv[1:]])}`",
        "",
        f"xtokmap {xtokmap.__version__}, {versions}, Python {platform.python_version()}, {platform.machine()}, CPU.",
        f"{common.batch_size} samples a step of at most {common.max_new_tokens} tokens, learning rate "
        f"{common.learning_rate:g} on an adapter of rank {common.lora_rank}, which falls to nothing at the end of each "
        f"run; {min(args.heldout, len(heldout))} held-out questions; ± is the standard error over these.",
        "",
        "| method | seed | steps | FLOPs | of these sampling | seconds | ended turns | reverse KL, nats/byte "
        "| NLL of the teacher's answers, nats/byte | to the point, nats an answer | likelier than after another |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]

    def write(method: str, seed: int | str, steps: int, flops: dict[str, int], seconds: float, point: Point) -> None:
        total = sum(flops.values())
        share = f"{flops['sample'] / total:.0%}" if total else ""
        columns = (method, seed, steps, f"{total:.2e}", share, f"{seconds:.0f}", *point.columns())
        lines.append(f"| {' | '.join(map(str, columns))} |")
        print(lines[-1], flush=True)
        (RESULTS / "pair_compute.md").write_text("\n".join(lines) + "\n", encoding="utf-8")

    nothing = {"sample": 0, "teacher": 0, "update": 0}
    start = judge(base)
    write("start", "", 0, nothing, 0.0, start)
    found: list[tuple[str, int, float, Point]] = []
    for seed in range(args.seeds):
        for steps in args.steps:
            for method in args.methods:
                torch.manual_seed(seed)
                student = with_adapter(copy.deepcopy(base), common.lora_rank, common.lora_alpha)
                config = replace(common, seed=seed, steps=steps, **METHODS[method])
                run = Run(Roller(student, tokenizer, teacher, config), prompts, watch=False)
                flops, began = dict(nothing), time.perf_counter()
                for _ in range(steps):
                    spent = run.step()["flops"]
                    flops = {name: flops[name] + spent[name] for name in flops}
                point = judge(student.eval())
                write(method, seed, steps, flops, time.perf_counter() - began, point)
                found.append((method, steps, float(sum(flops.values())), point))
                plot(start, found)


if __name__ == "__main__":
    main()

"""Fine-tuning and on-policy distillation on a real pair, against FLOPs: python benches/pair_compute.py

SmolLM2 135M Instruct learns from Gemma 3 270M, the pair of `make demo`. Every run starts from the same weights. Along
the way the student is held against the teacher in two ways: the reverse KL of its own answers to held-out prompts, per
byte, and its negative logprob of the teacher's answers to them, per byte. Table and plot are in benches/results/ after
every measurement.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

import xtokmap
from xtokmap import demo
from xtokmap.models import load
from xtokmap.teachers.local import LocalTeacher
from xtokmap.train.config import Config
from xtokmap.train.evaluation import evaluate, ratio_with_error
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


def forward_nll(roller: Roller, answers: Rollouts) -> tuple[float, float]:
    """Nats per byte of the teacher's answers under the student, and the standard error over prompts."""
    logprobs = roller.all_logprobs(answers.batch)
    nbytes = [len(roller.aligner.student.decode(row)) for row in answers.batch.student_ids]
    text = torch.zeros_like(logprobs, dtype=torch.bool)
    special = roller.aligner.student.is_special
    for b, row in enumerate(answers.batch.student_ids):
        text[b, : len(row)] = torch.tensor([not special[i] for i in row], dtype=torch.bool)
    return ratio_with_error((-logprobs * text).sum(1).tolist(), nbytes)


def plot(points: list[tuple[str, int, int, float, float, float]]) -> None:
    """Both measures against FLOPs, the mean over the seeds that have come so far."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    start = points[0]
    for column, (axis, name) in enumerate(
        zip(axes, ("reverse KL of the student's answers", "NLL of the teacher's answers"), strict=True), 4
    ):
        for method in dict.fromkeys(p[0] for p in points[1:]):
            steps = sorted({p[2] for p in points if p[0] == method})
            at = [[p for p in points if p[0] == method and p[2] == step] for step in steps]
            x = [statistics.mean(p[3] for p in some) for some in at]
            y = [statistics.mean(p[column] for p in some) for some in at]  # type: ignore[misc]
            axis.plot([0, *x], [start[column], *y], marker="o", markersize=3, label=method)
        axis.set(xlabel="FLOPs", ylabel="nats/byte", title=name)
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize="small")
    figure.savefig(RESULTS / "pair_compute.png", dpi=85)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 40], help="after which to measure")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--heldout", type=int, default=24, help="held-out prompts")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    device = torch.device("cpu")
    student, tokenizer = load(str(demo.fetch(demo.STUDENT)), device)
    teacher_model, teacher_tokenizer = load(str(demo.fetch(demo.TEACHER)), device)
    teacher = LocalTeacher(teacher_model, teacher_tokenizer)
    start = {name: value.clone() for name, value in student.state_dict().items()}
    prompts, heldout = read_prompts(str(resources.files("xtokmap") / "data" / "prompts.jsonl"))
    heldout = heldout[: args.heldout]
    common = Config(
        batch_size=args.batch,
        max_new_tokens=args.tokens,
        learning_rate=args.learning_rate,
        warmup_steps=4,
        score_stop=False,
        device="cpu",
        output=tempfile.gettempdir(),
    )
    judge = Roller(student, tokenizer, teacher, replace(common, method="kd"))
    torch.manual_seed(99)
    answers = judge.roll(heldout)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    lines = [
        f"`{shlex.join(['python', 'benches/pair_compute.py', *sys.argv[1:]])}`",
        "",
        f"xtokmap {xtokmap.__version__}, {versions}, Python {platform.python_version()}, {platform.machine()}, CPU.",
        f"{args.batch} samples a step of at most {args.tokens} tokens, learning rate {args.learning_rate:g}, "
        f"{len(heldout)} held-out prompts; ± is the standard error over prompts.",
        "",
        "| method | seed | step | FLOPs | of these sampling | seconds | reverse KL, nats/byte | NLL of the teacher's "
        "answers, nats/byte |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]

    points: list[tuple[str, int, int, float, float, float]] = []

    def measure(method: str, seed: int, step: int, flops: dict[str, int], seconds: float) -> None:
        kl, kl_error = evaluate(judge, heldout).kl_per_byte
        nll, nll_error = forward_nll(judge, answers)
        total = sum(flops.values())
        share = f"{flops['sample'] / total:.0%}" if total else ""
        lines.append(
            f"| {method} | {seed} | {step} | {total:.2e} | {share} | {seconds:.0f} "
            f"| {kl:.4f} ± {kl_error:.4f} | {nll:.4f} ± {nll_error:.4f} |"
        )
        print(lines[-1], flush=True)
        points.append((method, seed, step, float(total), kl, nll))
        (RESULTS / "pair_compute.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if step:
            plot(points)

    nothing = {"sample": 0, "teacher": 0, "update": 0}
    measure("start", 0, 0, nothing, 0.0)
    for seed in range(args.seeds):
        for method in args.methods:
            student.load_state_dict(start)
            torch.manual_seed(seed)
            config = replace(common, seed=seed, **METHODS[method])
            run = Run(Roller(student, tokenizer, teacher, config), prompts)
            flops, seconds = dict(nothing), 0.0
            for step in range(1, max(args.steps) + 1):
                began = time.perf_counter()
                metrics = run.step()
                seconds += time.perf_counter() - began
                flops = {name: flops[name] + metrics["flops"][name] for name in flops}
                if step in args.steps:
                    measure(method, seed, step, flops, seconds)


if __name__ == "__main__":
    main()

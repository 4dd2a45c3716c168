"""Losses on a real pair, from one start and on equal samples: python benches/pair_training.py

SmolLM2 135M Instruct learns from Gemma 3 270M, the pair of `make demo`. Every run starts from the same weights and
takes the same number of steps with as many samples; a loss and a seed make a run. What is compared is the sampled
reverse KL of whole answers to held-out prompts, per byte: it favors no way of handing the teacher's signal to tokens.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import statistics
import sys
import tempfile
import time
import warnings
from importlib import resources
from pathlib import Path

import torch

import xtokmap
from xtokmap import demo
from xtokmap.losses.queries import boundary_leak
from xtokmap.models import load
from xtokmap.teachers.local import LocalTeacher
from xtokmap.torch.completions import completion_rows
from xtokmap.train.config import Config
from xtokmap.train.evaluation import evaluate
from xtokmap.train.loop import train
from xtokmap.train.prompts import read_prompts
from xtokmap.train.sampling import Roller

RESULTS = Path(__file__).parent / "results"


def leak(roller: Roller, prompts: list[str]) -> tuple[float, float]:
    """Mean nats a teacher token, and the share of tokens with more than one, on the student's own samples."""
    rollouts = roller.roll(prompts)
    teacher = roller.teacher
    rows = completion_rows(teacher.model, teacher.render(prompts), rollouts.batch.teacher_ids)
    ids = torch.tensor([i for row in rollouts.batch.teacher_ids for i in row])
    found = boundary_leak(rows, ids, roller.aligner.vocab_map)
    return float(found.mean()), float((found > 1).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", nargs="+", default=["prior", "cover", "byte_kl", "transfer_kl"])
    parser.add_argument("--beta", type=float, default=1.0, help="of byte_kl and transfer_kl: 1 is reverse KL")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--name", default="pair_training", help="of the result files")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    student_path, teacher_path = demo.fetch(demo.SMOLLM2), demo.fetch(demo.GEMMA)
    questions = resources.files("xtokmap") / "data" / "prompts.jsonl"
    device = torch.device("cpu")
    student, tokenizer = load(str(student_path), device)
    teacher, teacher_tokenizer = load(str(teacher_path), device)
    start = {name: value.clone() for name, value in student.state_dict().items()}
    common = {
        "prompts": str(questions),
        "steps": args.steps,
        "batch_size": args.batch,
        "max_new_tokens": args.tokens,
        "learning_rate": args.learning_rate,
        "warmup_steps": 4,
        "score_stop": False,
        "eval_samples": 0,
        "beta": args.beta,
        "device": "cpu",
    }
    prompts, heldout = read_prompts(str(questions))

    def measure(config: Config) -> list[float]:
        roller = Roller(student, tokenizer, LocalTeacher(teacher, teacher_tokenizer), config)
        found = evaluate(roller, heldout, 2)
        return [*found.kl_per_byte, found.completed, found.length]

    with tempfile.TemporaryDirectory() as folder:
        plain = Config(**common, output=folder, loss="prior")  # type: ignore[arg-type]
        before = measure(plain)
        print(f"before: {before[0]:.4f} +- {before[1]:.4f} nats/byte", flush=True)
        leaks = leak(Roller(student, tokenizer, LocalTeacher(teacher, teacher_tokenizer), plain), prompts[:32])
        print(f"boundary leak: {leaks[0]:.3f} nats a teacher token; {leaks[1]:.1%} of the tokens have more than one")
        rows: dict[str, list[dict[str, float]]] = {}
        for seed in range(args.seeds):
            for loss in args.losses:
                student.load_state_dict(start)
                config = Config(**common, output=folder, loss=loss, seed=seed)  # type: ignore[arg-type]
                began = time.perf_counter()
                history = train(config, models=(student, tokenizer, teacher, teacher_tokenizer)).metrics
                seconds = (time.perf_counter() - began) / args.steps
                kl, error, _, length = measure(config)
                row = {"seed": seed, "kl": kl, "error": error, "seconds": seconds, "length": length}
                rows.setdefault(loss, []).append({**row, "shared": history[-1].get("shared", math.nan)})
                print(f"{loss} seed {seed}: {kl:.4f} +- {error:.4f}, {seconds:.1f} s a step", flush=True)

    lines = [
        "| loss | held-out reverse KL after, nats/byte | by seed | seconds a step |",
        "|---|---|---|---|",
    ]
    for loss, runs in rows.items():
        kls = [run["kl"] for run in runs]
        spread = statistics.stdev(kls) / math.sqrt(len(kls)) if len(kls) > 1 else math.nan
        seconds = statistics.mean(run["seconds"] for run in runs)
        each = ", ".join(f"{kl:.4f}" for kl in kls)
        lines.append(f"| `{loss}` | {statistics.mean(kls):.4f} +- {spread:.4f} | {each} | {seconds:.1f} |")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    text = "\n".join(
        [
            f"`{' '.join(['python', 'benches/pair_training.py', *sys.argv[1:]])}`",
            "",
            f"xtokmap {xtokmap.__version__}, {versions}, Python {platform.python_version()}, "
            f"{platform.machine()}, CPU only.",
            f"{args.steps} steps of {args.batch} samples of at most {args.tokens} tokens, learning rate "
            f"{args.learning_rate:g}, {args.seeds} seeds, {len(heldout)} held-out prompts with two samples each.",
            f"Before: {before[0]:.4f} +- {before[1]:.4f} nats/byte (standard error over prompts). Boundary leak of the "
            f"student's samples: {leaks[0]:.3f} nats a teacher token; {leaks[1]:.1%} have more than one nat.",
            "",
            *lines,
            "",
        ]
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.md").write_text(text)
    everything = {"before": before, "leak": leaks, "runs": rows}
    (RESULTS / f"{args.name}.json").write_text(json.dumps(everything, indent=1) + "\n")
    print("\n" + text)


if __name__ == "__main__":
    main()

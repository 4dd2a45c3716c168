"""What the teacher's view of the student's encoding costs, on the demo's pair: python benches/transfer.py

Text is the source of Python's standard library, cut by SmolLM2's tokenizer and scored by Gemma 3 270M (262,144 tokens).
Each measurement runs in a process of its own, forward or forward and backward over the same positions. The share of
tokens that the whole distribution alone does not decide is counted for five pairs of tokenizers, without a model.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import xtokmap
from xtokmap import Aligner, demo
from xtokmap.losses.events import EventMaps, Within
from xtokmap.losses.target import TransferTarget
from xtokmap.losses.terms import divergence
from xtokmap.losses.transfer import transfer_kl
from xtokmap.models import load
from xtokmap.teachers.local import LocalTeacher
from xtokmap.tokenizers import text_codec
from xtokmap.torch.completions import completion_rows
from xtokmap.torch.index import ChunkIndex
from xtokmap.torch.logits import Logits, map_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

RESULTS = Path(__file__).parent / "results" / "transfer.md"
MEASURED = ("teacher forward", "cover", "same-tokenizer KL", "transfer_kl")
PAIRS = (
    ("qwen", "cl100k"),
    ("cl100k", "deepseek"),
    ("deepseek", "tekken-240911"),
    ("o200k", "qwen3.6"),
    ("mistral-v3", "qwen"),
)


def text(characters: int) -> str:
    files = sorted(Path(json.__file__).parents[1].glob("*.py"))
    return "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)[:characters]


def student_rows(tokenizer: Any, tokens: int, rows: int) -> list[list[int]]:
    ids = tokenizer(text(tokens * 8)).input_ids[:tokens]
    return [ids[k * tokens // rows : (k + 1) * tokens // rows] for k in range(rows)]


def timed(work: Callable[[], Any]) -> float:
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(what: str, tokens: int) -> dict[str, float]:
    device = torch.device("cpu")
    student, tokenizer = load(str(demo.fetch(demo.SMOLLM2)), device)
    model, other = load(str(demo.fetch(demo.GEMMA)), device)
    teacher = LocalTeacher(model, other)
    aligner = Aligner(tokenizer, other)
    completions = student_rows(tokenizer, tokens, 8)
    teacher_ids, batch = aligner.retokenize(completions)
    ids = [row.tolist() for row in teacher_ids]
    prompts = [[other.bos_token_id]] * len(ids)
    aligner.cover_queries(batch)
    start = time.perf_counter()
    queries = aligner.cover_queries(batch)
    found = {"tokens": tokens, "query_ns": (time.perf_counter() - start) / tokens * 1e9}
    flat = torch.tensor([i for row in ids for i in row])
    rows = teacher.rows(prompts, ids)

    if what == "teacher forward":
        seconds = timed(lambda: teacher.score(prompts, ids))
    elif what == "cover":
        seconds = timed(lambda: teacher.score(prompts, ids, queries=queries))
    else:
        with torch.no_grad():
            own = completion_rows(student, [[0]] * len(ids), completions)
        if what == "transfer_kl":
            target = TransferTarget(rows, flat, queries)
            places, shape = target.places()
            at = torch.zeros(shape[0] * shape[1], dtype=torch.long)
            at[torch.from_numpy(places)] = torch.arange(len(places))
            sampled = torch.zeros(shape[0] * shape[1], dtype=torch.long)
            sampled[torch.from_numpy(places)] = torch.tensor([i for row in completions for i in row])
            index = ChunkIndex.from_alignment(batch)
            leaf = Logits(own.rows.clone().requires_grad_(), own.weight.detach().clone().requires_grad_())

            def work() -> None:
                transfer_kl(leaf.at(at.view(shape)), target, index, student_ids=sampled.view(shape)).loss.backward()
        else:
            # A student of the teacher's family, on as many positions: KL of the two heads' whole distributions.
            n = len(own.rows)
            assert rows.weight is not None
            hidden = rows.rows[torch.arange(n) % len(rows.rows)]
            leaf = Logits((hidden * 0.9).requires_grad_(), rows.weight.detach().clone().requires_grad_())

            def exact(x: Tensor, y: Tensor) -> Tensor:
                return divergence(x.log_softmax(-1), y.log_softmax(-1), 1.0)

            def work() -> None:
                map_rows(exact, leaf, Logits(hidden, rows.weight))[0].mean().backward()

        seconds = timed(work)
    return {**found, "seconds": seconds}


def undecided() -> Iterator[str]:
    """Share of student tokens of a text whose event has several tokens, and what rows behind say of them, by pair."""
    import pairs

    yield (
        "| student | teacher | tokens | in an event of several | a row behind goes on | and leaves one | not canonical "
        "| ns a token, warm |"
    )
    yield "|---|---|--:|--:|--:|--:|--:|--:|"
    for a, b in PAIRS:
        student, teacher = pairs.LOADERS[a](), pairs.LOADERS[b]()
        aligner = Aligner(student, teacher)
        ids = text_codec(student).encode_batch([text(200_000)])[0]
        chunks = [ids[k : k + 2048] for k in range(0, len(ids), 2048)]
        _, batch = aligner.retokenize(chunks)
        aligner.cover_queries(batch)
        start = time.perf_counter()
        queries = aligner.cover_queries(batch)
        ns = (time.perf_counter() - start) / len(ids) * 1e9
        several = EventMaps.of(queries, torch.device("cpu")).members.numpy()[queries.student_ids] > 1
        within = Within.of(queries)
        assert within is not None
        alone = np.bincount(within.member_group)[within.own] == 1
        counts = several.sum(), len(within.own), alone.sum(), queries.figures()["not_canonical"]
        yield f"| {a} | {b} | {len(ids):,} | {' | '.join(f'{n / len(ids):.1%}' for n in counts)} | {ns:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--one", choices=MEASURED)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.one:
        print(json.dumps(measure(args.one, args.tokens)))
        return
    found = {}
    for what in MEASURED:
        command = [sys.executable, __file__, "--one", what, "--tokens", str(args.tokens)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[what] = json.loads(out.splitlines()[-1])
        print(what, found[what], flush=True)
    lines = ["| | seconds | beside |", "|---|--:|--:|"]
    for what, beside in (("cover", "teacher forward"), ("transfer_kl", "same-tokenizer KL")):
        a, b = found[beside], found[what]
        lines.append(f"| {beside} | {a['seconds']:.2f} | 1 |")
        lines.append(f"| {what} | {b['seconds']:.2f} | {b['seconds'] / a['seconds']:.2f} |")
    packages = ("torch", "transformers", "tokenizers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    report = [
        f"`{' '.join(['python', 'benches/transfer.py', *sys.argv[1:]])}`",
        "",
        f"xtokmap {xtokmap.__version__}, {versions}, Python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, CPU only. {args.tokens} student tokens of SmolLM2, teacher Gemma 3 270M.",
        f"Finding the queries: {found['cover']['query_ns']:.0f} ns a student token when its tokens are known.",
        "",
        *lines,
        "",
        *undecided(),
        "",
    ]
    RESULTS.write_text("\n".join(report))
    print("\n".join(report))


if __name__ == "__main__":
    main()

"""What edits cost an alignment, and how its time grows with them: python benches/edits.py [--growth-only]

Rows with known edits, in a vocabulary of bytes and between real tokenizers, against a brute-force edit distance; then
one row of half a million to four million tokens of which 22 % are long stretches of other characters and the rest has
one byte in 64 replaced. Prints the tables and writes them to benches/results/edits.md.
"""

from __future__ import annotations

import platform
import random
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import corpus
import pairs
import xtokmap
from edits import BYTES, Cost, cost_in_bytes, cost_in_tokens, edited, texts

RESULTS = Path(__file__).parent / "results" / "edits.md"
ROWS = 1000
TEXT = (corpus.KINDS["prose"] + corpus.KINDS["code"]).replace("\n", " ").encode("ascii", "ignore").decode()
PAIRS = [("cl100k", "qwen"), ("mistral-v3", "deepseek"), ("tekken-240911", "o200k"), ("qwen", "mistral-v1")]
#: Characters of each stretch that is another text: more than a short edit bridges.
STRETCH = 200
SIZES = [500_000, 1_000_000, 2_000_000, 4_000_000]


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2f} %"


def line(name: str, cost: Cost) -> str:
    kept, tails = percent(cost.kept, cost.untouched), percent(cost.lost_tails, cost.rows)
    return f"| {name} | {kept} | {cost.wrong} of {cost.untouched:,} | {tails} |"


def of_bytes() -> list[str]:
    lines = []
    for length, kinds in ((30, "r"), (60, "r"), (60, "rid"), (200, "rid")):
        for count in (1, 2, 3, 5, 10):
            rng = random.Random(f"{length} {kinds} {count}")
            cost = cost_in_bytes([edited(rng, text, count, kinds) for text in texts(rng, TEXT, length, ROWS)])
            what = "replaced" if kinds == "r" else "replaced, inserted, deleted"
            lines.append(line(f"bytes, {length} characters, {count} {what}", cost))
    return lines


def of_tokens() -> list[str]:
    lines = []
    for student, teacher in PAIRS:
        try:
            codecs = [pairs.tokenizer(name).codec for name in (student, teacher)]
        except pytest.skip.Exception as skipped:
            lines.append(f"| {student}, {teacher}: {skipped} | | | |")
            continue
        encode = [lambda text, codec=codec: codec.encode_batch([text])[0].tolist() for codec in codecs]
        for length, counts in ((30, (2, 3)), (200, (10,))):
            rng = random.Random(f"{student} {teacher} {length}")
            rows = [edited(rng, text, rng.choice(counts)) for text in texts(rng, TEXT, length, ROWS)]
            name = f"{student} to {teacher}, {length} characters, {' or '.join(map(str, counts))} edits"
            lines.append(line(name, cost_in_tokens(rows, *encode, pairs.aligner(student, teacher))))
    return lines


def edited_row(size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz      ", np.uint8)
    x = rng.choice(letters, size)
    y = x.copy()
    y[32::64] = rng.integers(ord("0"), ord("9") + 1, len(y[32::64]))
    for start in range(0, size - STRETCH, int(STRETCH / 0.22)):
        y[start : start + STRETCH] = rng.choice(letters, STRETCH)
    return x.astype(np.int32), y.astype(np.int32)


def seconds_of(size: int, calls: int) -> list[float]:
    al, (student, teacher) = xtokmap.Aligner(BYTES, BYTES), edited_row(size)
    seconds = []
    for _ in range(calls):
        began = time.perf_counter()
        al.align(student, teacher)
        seconds.append(time.perf_counter() - began)
    return seconds


def growth() -> list[str]:
    al = xtokmap.Aligner(BYTES, BYTES)
    lines, firsts = [], []
    for size in SIZES:
        # A process of its own: whether pages are fresh or used again depends on what came before, and on the size.
        first = []
        for _ in range(3):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                first += pool.submit(seconds_of, size, 1).result()
        again = min(seconds_of(size, 6)[1:])
        each = [min(first) / size * 1e9, again / size * 1e9]
        firsts = firsts or each
        student, teacher = edited_row(size)
        a = al.align(student, teacher)
        aligned = a.student_chunk >= 0
        same = np.count_nonzero(a.kind[a.student_chunk[aligned]] == xtokmap.Kind.ONE_TO_ONE)
        kept = percent(same, np.count_nonzero(student == teacher))
        times = " | ".join(f"{ns:.0f} | {ns / least:.2f}" for ns, least in zip(each, firsts, strict=True))
        lines.append(f"| {size:,} | {times} | {kept} |")
    return lines


def main() -> None:
    parts = [
        f"# Edits\n\n`{shlex.join(['python', *sys.argv])}`: Python {platform.python_version()}, "
        f"numpy {np.__version__}, xtokmap {xtokmap.__version__}, {platform.machine()}, CPU only."
    ]
    if "--growth-only" not in sys.argv:
        head = "| rows | characters kept | wrong | last character lost |\n|---|---|---|---|"
        parts.append("\n".join([head, *of_bytes(), *of_tokens()]))
        parts.append(
            "Kept: an untouched character is ONE_TO_ONE with what it became (bytes), or in a chunk (tokens). Wrong: a "
            "pair of characters that no shortest edit leaves alone, or a chunk that ends where none passes."
        )
    times = ["first call: ns a token", "times the first row", "again: ns a token", "times the first row"]
    head = f"| {' | '.join(['tokens', *times, 'equal bytes kept'])} |\n|{'---|' * 6}"
    parts.append("\n".join([head, *growth()]))
    parts.append("Again: arrays of up to some 16 MB are used again by the allocator, larger ones are fresh pages.")
    text = "\n\n".join(parts) + "\n"
    print(text)
    if "--growth-only" not in sys.argv:
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

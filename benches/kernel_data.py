"""Real ids and byte tables for benches/kernel.rs and benches/instructions.sh: python benches/kernel_data.py

Writes benches/.data/<student>-<teacher>.bin for five pairs of real tokenizers, all numbers little-endian u32:

    for the student, then for the teacher: number of ids, the length of every id's bytes (2^32 - 1: special), the bytes
    for the student, then for the teacher: number of tokens, their ids

The text is the documentation and the source of Python's standard library, and tests/corpus.py's texts in many scripts,
in the form (NFKC) that every tokenizer here leaves alone, so that both sides spell the same bytes.
"""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import compare
import corpus
import pairs
import xtokmap

DATA = Path(__file__).parent / ".data"
PAIRS = [
    ("qwen", "deepseek"),
    ("deepseek", "anthropic"),
    ("cl100k", "o200k"),
    ("tekken-240911", "qwen3.6"),
    ("mistral-v3", "qwen"),
]
CHARACTERS = 2_000_000


def text() -> str:
    topics = Path(compare.json.__file__).parent.parent / "pydoc_data" / "topics.py"
    kinds = [kind for name, kind in corpus.KINDS.items() if name not in ("markers", "compatibility")]
    parts = [topics.read_text(encoding="utf-8"), *kinds * 4, compare.text_of(CHARACTERS)]
    # Pieces in turn, so that every stretch of the row is of every kind.
    pieces = [[part[k : k + 2000] for k in range(0, len(part), 2000)] for part in parts]
    mixed = "".join(part[k % len(part)] for k in range(CHARACTERS // 4000) for part in (pieces[0], pieces[-1]))
    others = "".join(piece for part in pieces[1:-1] for piece in part)
    return unicodedata.normalize("NFKC", others + mixed)[:CHARACTERS]


def table(bt: xtokmap.ByteTable) -> bytes:
    tokens = [bt[i] for i in range(len(bt))]
    lengths = [0xFFFFFFFF if token is None else len(token) for token in tokens]
    return numbers([len(tokens), *lengths]) + b"".join(token or b"" for token in tokens)


def numbers(values: object) -> bytes:
    return np.asarray(values, dtype="<u4").tobytes()


def main() -> None:
    DATA.mkdir(exist_ok=True)
    written = text()
    for student, teacher in PAIRS:
        aligner = pairs.aligner(student, teacher)
        ids, _ = pairs.tokenizer(student).codec.encode_batch([written])
        (teacher_ids,), alignment = aligner.retokenize([ids])
        rewritten = int((alignment.kind == xtokmap.Kind.REWRITTEN).sum())
        if rewritten or alignment.coverage < 1:
            raise SystemExit(f"{student}-{teacher}: {rewritten} rewritten chunks, coverage {alignment.coverage}")
        sides = table(aligner.student), table(aligner.teacher)
        rows = [numbers([len(row), *row]) for row in (ids, teacher_ids)]
        (DATA / f"{student}-{teacher}.bin").write_bytes(b"".join([*sides, *rows]))
        print(f"{student}-{teacher}.bin: {alignment}")


if __name__ == "__main__":
    main()

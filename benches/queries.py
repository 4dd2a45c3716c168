"""What cover queries and vocabulary maps cost: python benches/queries.py [smollm2.gguf gemma.gguf]

Times are CPU time of this process with one thread, the best of many calls where a call can be repeated. Prints the
tables and writes them to benches/results/queries.md.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import corpus  # noqa: E402
import real_tokenizers as real  # noqa: E402
import xtokmap  # noqa: E402
from xtokmap import _core  # noqa: E402
from xtokmap.boundary.cover import Transfer  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "queries.md"
ROW = 512
ROWS = 42


def seconds(work: Callable[[], Any], repeat: int = 1) -> float:
    times = []
    for _ in range(repeat):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def of_gguf(path: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def of_json(name: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(real.path(name)))


def sources(files: list[str]) -> dict[str, Callable[[], Any]]:
    all_sources: dict[str, Callable[[], Any]] = {
        "smollm2": lambda: of_gguf(Path(files[0]) if files else real.path("smollm2")),
        "qwen": lambda: real.encoding("qwen"),
        "o200k": lambda: real.encoding("o200k"),
        "deepseek": lambda: of_json("deepseek"),
    }
    if len(files) > 1:
        all_sources["gemma"] = lambda: of_gguf(Path(files[1]))
    return all_sources


def texts() -> list[str]:
    """This project's own files and the texts of the tests, in pieces."""
    files = [*sorted((ROOT / "python").rglob("*.py")), *sorted((ROOT / "rust").glob("*.rs")), ROOT / "README.md"]
    whole = [*corpus.KINDS.values(), *(file.read_text(encoding="utf-8") for file in files)]
    return [text[at : at + 3000] for text in whole for at in range(0, len(text), 3000)][: 2 * ROWS]


def encode(tokenizer: Any, text: str) -> list[int]:
    if hasattr(tokenizer, "encode_ordinary"):
        return list(tokenizer.encode_ordinary(text))
    ids = tokenizer.encode(text, add_special_tokens=False)
    return list(getattr(ids, "ids", ids))


def measure(student: Any, teacher: Any) -> list[str]:
    aligner = xtokmap.Aligner(student, teacher)
    transfer: list[Transfer] = []
    rules = seconds(lambda: transfer.append(aligner._transfer))
    rule = transfer[0].rule
    other = _core.Encoding(aligner.teacher)
    maps = seconds(lambda: _core.Cover(rule.core, other), 3)
    rows = [ids[:ROW] for text in texts() if len(ids := encode(student, text)) >= ROW // 2][:ROWS]
    tokens = sum(map(len, rows))
    _, batch = aligner.retokenize(rows, threads=1)
    learn = seconds(lambda: rule.learn(np.concatenate([np.asarray(row) for row in rows])))
    cold = seconds(lambda: aligner.cover_queries(batch, threads=1))
    warm = seconds(lambda: aligner.cover_queries(batch, threads=1), 100)
    aligned = seconds(lambda: aligner.align_batch(rows, batch_ids(batch), threads=1), 20)
    queries = aligner.cover_queries(batch, threads=1)
    figures = queries.figures()
    return [
        str(tokens),
        f"{len(queries.row) / tokens:.2f}",
        f"{len(queries.sets.ids) / max(len(queries.sets.complement), 1):.0f}",
        f"{100 * figures['not_canonical'] / tokens:.2f}",
        f"{100 * figures['forced'] / tokens:.2f}",
        f"{rules:.2f}",
        f"{maps:.2f}",
        f"{learn * 1e6 / tokens:.1f}",
        f"{cold * 1e6 / tokens:.1f}",
        f"{warm * 1e9 / tokens:.0f}",
        f"{aligned * 1e9 / tokens:.0f}",
    ]


def batch_ids(batch: xtokmap.AlignmentBatch) -> list[Any]:
    assert batch._bytes is not None
    return np.split(np.asarray(batch._bytes.teacher_ids), batch.teacher_cu[1:-1])


def installed(name: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except pytest.skip.Exception as reason:
        print(f"{name} is left out: {reason}", file=sys.stderr)
        return None


def report(files: list[str]) -> Iterator[str]:
    made: dict[str, Any] = {}
    for name, make in sources(files).items():
        if (tokenizer := installed(name, make)) is not None:
            made[name] = tokenizer
    packages = ("xtokmap", "numpy", "tokenizers", "tiktoken", "transformers")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    names = [Path(file).name for file in files]
    yield "# Cover queries"
    yield ""
    command = shlex.join(["python", "benches/queries.py", *names])
    yield f"Command: `{command}`; Python {platform.python_version()}, {versions}."
    yield ""
    yield (
        f"{ROWS} rows of up to {ROW} tokens, one thread, CPU time. `rules`: both encoding rules and the maps, from the "
        "tokenizers; `maps`: the vocabulary maps alone; `classes`: asking the pre-tokenizer about classes of tokens, "
        "`cold`: the first queries of a batch, both microseconds a student token; `warm`: the same batch again, and "
        "`align`: its alignment, both nanoseconds a student token."
    )
    yield ""
    columns = ["student <- teacher", "tokens", "terms a token", "ids a set", "not canonical %", "forced %"]
    columns += ["rules s", "maps s", "classes us", "cold us", "warm ns", "align ns"]
    yield "| " + " | ".join(columns) + " |"
    yield "|---|" + "--:|" * (len(columns) - 1)
    pairs = [("smollm2", "gemma"), ("gemma", "smollm2"), ("o200k", "gemma"), ("qwen", "gemma"), ("smollm2", "qwen")]
    pairs += [("qwen", "deepseek"), ("deepseek", "o200k"), ("smollm2", "smollm2")]
    for student, teacher in pairs:
        if student in made and teacher in made:
            yield f"| {student} <- {teacher} | " + " | ".join(measure(made[student], made[teacher])) + " |"


def main() -> None:
    lines = []
    for line in report(sys.argv[1:]):
        print(line, flush=True)
        lines.append(line)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

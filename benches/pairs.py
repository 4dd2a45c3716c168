"""How exact alignment is between real tokenizers, in one run: python benches/pairs.py

Every ordered pair of the tokenizers in `tests/pairs.py`, on every kind of text in `tests/corpus.py` and on random ids,
token by token against an oracle that knows which byte became which. Prints the tables and writes them to
benches/results/pairs.md.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import pairs
import real_tokenizers as real
from xtokmap import Kind

RESULTS = Path(__file__).parent / "results" / "pairs.md"
HEADINGS = {
    Kind.ONE_TO_ONE: "1:1",
    Kind.ONE_TO_MANY: "1:n",
    Kind.MANY_TO_ONE: "n:1",
    Kind.MANY_TO_MANY: "n:n",
    Kind.REWRITTEN: "rewritten",
    Kind.STOP: "stop",
}

LEGEND = """\
A student token is exact if its chunk has the kind and the student and teacher tokens of the oracle's chunk;
`either way` counts those among them that are right in another equally right place (which one of a run of spaces was
inserted). `wrong`: in a chunk that claims equal bytes at another place of the text; `misplaced`: in a REWRITTEN chunk
whose borders do not correspond. All other columns are percent of the student tokens: exact, over all texts, over those
of which both sides spell the same bytes and over the others; coverage by kind of chunk; unscored."""


def percent(part: float, whole: float, digits: int = 1) -> str:
    """Never rounded up to 100."""
    if not whole:
        return "-"
    scale = 10**digits
    return f"{int(100 * scale * part / whole) / scale:.{digits}f}" if part < whole else "100"


def exact(score: pairs.Score) -> str:
    return percent(score.exact + score.right, score.tokens, 3)


def table(first: str, rows: Sequence[tuple[str, Sequence[pairs.Row]]]) -> Iterator[str]:
    columns = [first, "tokens", "exact", "exact, equal bytes", "exact, other bytes", "either way", "wrong", "misplaced"]
    columns += [*HEADINGS.values(), "unscored"]
    yield "| " + " | ".join(columns) + " |"
    yield "|---|" + "--:|" * (len(columns) - 1)
    for name, measured in rows:
        score = pairs.total(measured)
        same, changed = (pairs.total([row for row in measured if row.agrees == agrees]) for agrees in (True, False))
        cells = [name, str(score.tokens)]
        cells += [exact(s) for s in (score, same, changed)]
        cells += [str(score.right), str(score.wrong), str(score.misplaced)]
        cells += [percent(score.in_kind[kind], score.tokens) for kind in HEADINGS]
        cells.append(percent(score.tokens - score.scored, score.tokens, 2))
        yield "| " + " | ".join(cells) + " |"


def installed(name: str) -> bool:
    try:
        pairs.tokenizer(name)
    except pytest.skip.Exception as reason:
        print(f"{name} is left out: {reason}", file=sys.stderr)
        return False
    return True


def versions(names: Sequence[str]) -> str:
    packages = {package for name, (package, _, _) in real.FILES.items() if any(n.startswith(name) for n in names)}
    packages |= {"xtokmap", "tokenizers", "sentencepiece", "tiktoken", "mistral-common", "numpy"}
    found = [f"{package} {importlib.metadata.version(package)}" for package in sorted(packages)]
    return ", ".join([f"Python {platform.python_version()}", *found])


def report() -> Iterator[str]:
    start = time.perf_counter()
    names = [name for name in pairs.LOADERS if installed(name)]
    by_pair = {(s, t): pairs.measure(s, t) for s, t in product(names, names) if s != t}
    everything = [row for measured in by_pair.values() for row in measured]
    by_kind = [(kind, [row for row in everything if row.kind == kind]) for kind in pairs.KINDS]
    score = pairs.total(everything)
    same, changed = (pairs.total([row for row in everything if row.agrees == agrees]) for agrees in (True, False))

    yield "# Exactness between real tokenizers"
    yield ""
    yield f"Command: `{shlex.join(['python', 'benches/pairs.py'])}`; {versions(names)}."
    yield ""
    yield LEGEND
    yield ""
    yield (
        f"**{len(by_pair)} ordered pairs, {len(everything)} texts, {score.tokens} student tokens: exact where the "
        f"bytes agree {exact(same)} % of {same.tokens}, where they do not {exact(changed)} % of {changed.tokens} "
        f"({score.right} either way), wrong tokens {score.wrong}, misplaced {score.misplaced}.**"
    )
    yield ""
    yield "## By ordered pair (student -> teacher)"
    yield ""
    yield from table("pair", [(f"{s} -> {t}", measured) for (s, t), measured in by_pair.items()])
    yield ""
    yield "## By kind of text"
    yield ""
    yield from table("kind of text", by_kind)
    yield ""
    yield "## Short texts that start with what looks like an inserted space, not counted above"
    yield ""
    edges = [row for pair in by_pair for row in pairs.measure_edges(*pair)]
    starts = dict.fromkeys(row.kind for row in edges)
    yield from table("text", [(f"`{text}`", [row for row in edges if row.kind == text]) for text in starts])
    print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr)


def main() -> None:
    lines = list(report())
    print(*lines, sep="\n")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

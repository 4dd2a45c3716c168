"""How much of q* is left out on a real pair: python benches/exactness.py

`cover` and `transfer_kl` make do with the rows of one teacher pass. Two things are then not known, and here both are
looked up for what a student really writes. Look-ahead: whether a student's token stays as it is may take more than the
next teacher token to say; the row behind that token knows. Extra rows: the text up to a boundary may begin with other
teacher tokens than those of its finished encoding; what would follow on these takes rows that the pass does not make.
Prints a table and writes it to benches/results/exactness.md.
"""

from __future__ import annotations

import argparse
import math
import platform
import shlex
import sys
import time
import warnings
from bisect import bisect_left
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

import xtokmap
from xtokmap import Aligner, demo
from xtokmap.boundary.cover import CoverQueries
from xtokmap.losses.queries import Transferred, transfer
from xtokmap.models import load
from xtokmap.teachers.local import LocalTeacher
from xtokmap.train.config import Config
from xtokmap.train.prompts import read_prompts
from xtokmap.train.sampling import Roller

RESULTS = Path(__file__).parent / "results" / "exactness.md"
#: Of a row behind a token the likeliest this many; alternatives less likely than this beside the text are left alone.
LIKELIEST, LEAST = 256, 1e-4
#: Teacher tokens before a boundary at which another may begin.
BACK = 6


class Beginning(NamedTuple):
    """Another teacher token with which the text may go on at a place."""

    place: int
    token: int
    #: As shares of exp Phi: with anything behind it, and as likely as the text.
    mass: float
    likely: float
    #: Bytes from its end to the boundary.
    rest: bytes


class Boundary(NamedTuple):
    """The end of a student token: its batch row, and what the pass misses there, as shares of exp Phi."""

    row: int
    #: Mass of the realized teacher token that turns out to merge, or not to, by the row behind it.
    decided: float
    beginnings: tuple[Beginning, ...]


def boundaries(case: Case) -> Iterator[Boundary]:
    """Of all scored student tokens but the last of each completion."""
    q, values, table = case.queries, case.values, case.aligner.teacher
    encoding = case.aligner._transfer.rule.core
    ids_of = {bytes_: i for i in range(len(table)) if (bytes_ := table[i])}
    for b, teacher_ids in enumerate(case.teacher_ids):
        first = int(q.teacher_cu[b]) + b
        rows = case.logprobs[first : first + len(teacher_ids) + 1].numpy()
        spelled = [table[t] or b"" for t in teacher_ids]
        starts = np.cumsum([0, *map(len, spelled)])
        text = b"".join(spelled)
        end = 0
        ids = case.student_ids[b]
        ends = np.cumsum([len(case.aligner.student[s] or b"") for s in ids])
        phis = values.phi[int(q.student_cu[b]) : int(q.student_cu[b + 1])].numpy()
        for i, s in enumerate(ids):
            flat = int(q.student_cu[b]) + i
            own = case.aligner.student[s] or b""
            end += len(own)
            if q.base[flat] == -2 or text[end - len(own) : end] != own or end >= len(text):
                continue
            phi = float(values.phi[flat])
            j = int(np.searchsorted(starts, end, "left")) - 1  # holds the byte before the boundary
            # The realized token that reaches past the boundary, or the one that begins there.
            r = j if starts[j + 1] > end else j + 1
            z = text[end : starts[r + 1]]
            decided = 0.0
            if r + 1 < len(rows) and z and not q.flags[flat]:
                usual = encoding.joined(s, encoding.encode(z)[0])
                likeliest = np.argpartition(-rows[r + 1], LIKELIEST)[:LIKELIEST].tolist()
                other = [
                    float(np.exp(rows[r + 1, v])) for v in likeliest
                    if (more := table[v]) and encoding.joined(s, encoding.encode(z + more)[0]) != usual
                ]  # fmt: skip
                reached = float(values.before[first + r + 1])
                decided = float(np.exp(reached - phi)) * sum(other)
            beginnings = []
            for k in range(max(0, j - BACK), j + 1):
                share = float(np.exp(float(values.before[first + k]) - phi))
                rest = text[starts[k] : end]
                for n in range(1, len(rest) + (k < j)):
                    v = ids_of.get(rest[:n])
                    if v is not None and v != teacher_ids[k]:
                        mass = share * float(np.exp(rows[k, v]))
                        known = int(np.searchsorted(ends, starts[k] + n))
                        likely = mass * float(np.exp(phi - phis[known]))
                        if likely > LEAST:
                            beginnings.append(Beginning(k, v, mass, likely, rest[n:]))
            yield Boundary(b, decided, tuple(beginnings))


class Case(NamedTuple):
    """What the student wrote, and the teacher's pass over it."""

    aligner: Aligner
    teacher: LocalTeacher
    prompts: list[list[int]]
    student_ids: list[list[int]]
    teacher_ids: list[list[int]]
    queries: CoverQueries
    values: Transferred
    #: `[N + B, V]`.
    logprobs: torch.Tensor


def written(student: Any, teacher: Any, rows: int, tokens: int) -> Case:
    """Answers of a student at temperature 1, scored by a teacher."""
    (model, tokenizer), (other, other_tokenizer) = student, teacher
    questions = resources.files("xtokmap") / "data" / "questions.jsonl"
    config = Config(prompts=str(questions), batch_size=rows, max_new_tokens=tokens, device="cpu")
    judge = LocalTeacher(other, other_tokenizer)
    roller = Roller(model, tokenizer, judge, config)
    prompts = read_prompts(str(questions))[0][:rows]
    torch.manual_seed(0)
    batch = roller.roll(prompts).batch
    queries = roller.aligner.cover_queries(roller.aligner.align_batch(batch.student_ids, batch.teacher_ids))
    own = judge.render(prompts)
    found = judge.rows(own, batch.teacher_ids)
    values = transfer(found, torch.tensor([t for row in batch.teacher_ids for t in row]), queries)
    logprobs = found.slice(0, found.shape[0]).float().log_softmax(-1)
    return Case(roller.aligner, judge, own, batch.student_ids, batch.teacher_ids, queries, values, logprobs)


def extra_rows(case: Case, wanted: list[tuple[int, int, int]]) -> dict[tuple[int, int, int], torch.Tensor]:
    """The row behind a batch row's first k tokens and another one, for every (batch row, k, token)."""
    found = {}
    for b, k, v in wanted:
        rows = case.teacher.rows([case.prompts[b]], [[*case.teacher_ids[b][:k], v]])
        found[b, k, v] = rows.slice(k + 1, k + 2)[0].float().log_softmax(-1)
    return found


def report(name: str, case: Case) -> str:
    """A row of the table."""
    found = list(boundaries(case))
    rows = sum(map(len, case.teacher_ids))
    decided = np.array([b.decided for b in found])
    bound = np.array([sum(other.likely for other in b.beginnings) for b in found])
    # The rows that promise most, a twentieth of those of the pass.
    masses: dict[tuple[int, int, int], float] = {}
    for b in found:
        for other in b.beginnings:
            key = b.row, other.place, other.token
            masses[key] = max(masses.get(key, 0), other.likely)
    wanted = sorted(masses, key=lambda key: -masses[key])[: rows // 20]
    behind = extra_rows(case, wanted)
    table, changed, order = case.aligner.teacher, [], case.aligner.vocab_map.teacher_order.astype(np.int64)
    spelled = [table[i] or b"" for i in order.tolist()]
    for b in found:
        gained = 0.0
        for other in b.beginnings:
            row = behind.get((b.row, other.place, other.token))
            if row is not None:
                ids = order[bisect_left(spelled, other.rest) : bisect_left(spelled, other.rest + b"\xff" * 8)]
                gained += other.mass * float(row[torch.from_numpy(ids)].exp().sum())
        changed.append(math.log1p(gained))
    change = np.array(changed)
    cells = [
        f"{len(found)}", f"{abs(np.log1p(decided)).mean():.4f}", f"{(decided > 0.05).mean():.1%}",
        f"{np.log1p(bound).mean():.4f}", f"{(bound > 0.05).mean():.1%}", f"{len(masses) / rows:.0%}",
        f"{len(wanted)} of {rows}", f"{change.mean():.4f}", f"{change.max():.2f}",
    ]  # fmt: skip
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=40)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = torch.device("cpu")
    sides = {
        "Gemma 3 270M": load(str(demo.fetch(demo.GEMMA)), device),
        "SmolLM2 135M": load(str(demo.fetch(demo.SMOLLM2)), device),
    }
    start = time.perf_counter()
    lines = []
    for student, teacher in ((a, b) for a in sides for b in sides if a != b):
        lines.append(report(f"{student} <- {teacher}", written(sides[student], sides[teacher], args.rows, args.tokens)))
        print(lines[-1], file=sys.stderr, flush=True)
    command = shlex.join(["python", "benches/exactness.py", *sys.argv[1:]])
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, xtokmap {xtokmap.__version__}"
    head = [
        "# What the rows of one pass do not show",
        "",
        f"Command: `{command}`; {time.perf_counter() - start:.0f} s; Python {platform.python_version()}, {versions}.",
        "",
        LEGEND,
        "",
    ]
    text = "\n".join([*head, "| " + " | ".join(COLUMNS) + " |", "|---|" + "--:|" * 9, *lines, ""])
    print(text)
    RESULTS.write_text(text, encoding="utf-8")


COLUMNS = (
    "student <- teacher", "ends", "look-ahead", "> .05", "beginnings", "> .05", "rows that takes",
    "extra rows", "change", "largest",
)  # fmt: skip
LEGEND = f"""\
The student's own answers at temperature 1; nats of Phi, mean over the ends of its tokens. Look-ahead: the mass of the
realized teacher token behind which the next row (its {LIKELIEST} likeliest tokens) says otherwise of whether the
student's token merges than that token alone did; `> .05`: how often it is more than a twentieth of exp Phi. Beginnings:
the mass of other teacher tokens with which the text before the end could have begun, from {BACK} tokens back, each
above {LEAST:g} of exp Phi, if the text went on behind them as likely as behind its own tokens (a model gives less to
what its tokenizer never writes); and how many rows that takes, as a share of the pass. Extra rows: those of the
likeliest of them, a twentieth of the pass, looked up, and by how much that changes Phi."""


if __name__ == "__main__":
    main()

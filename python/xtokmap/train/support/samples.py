"""Some samples of a run, kept for its report: responses as they come, and those where the two models differ most."""

from __future__ import annotations

import json
import math
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtokmap.alignment import Alignment, Kind
from xtokmap.files import obstacle, replacing
from xtokmap.train.evaluation import Evaluation
from xtokmap.train.sampling import Roller, Rollouts

#: How many are kept of each sort: responses evenly spaced over the run, those with the largest gap of a chunk, the last
#: ones with bytes that the sides spell differently, and held-out prompts.
KEEP = {"sample": 12, "gap": 12, "bytes": 6, "heldout": 8}
#: Chunks shown on either side of the one that a sample was kept for.
AROUND = 24


class Samples:
    """Bounded, whatever the length of the run.

    Attributes:
        records: of every sort, for JSON: `why` (the sort), `step`, `prompt`, `response`, `completed`; `columns`, the
            chunks with the tokens of both sides and their logprobs; `at`, which of these it was kept for, and its `gap`
            L_S - L_T in nats.
    """

    def __init__(self) -> None:
        self.records: dict[str, list[dict[str, Any]]] = {why: [] for why in KEEP}
        self.every = 1

    @torch.no_grad()
    def add(self, step: int, roller: Roller, rollouts: Rollouts, logprobs: Tensor) -> None:
        """Looks through the samples of one more step.

        Args:
            step: its number.
            roller: student and teacher.
            rollouts: of the step.
            logprobs: float32 `[B, Ts]`, the student's own.
        """
        kept = self.records
        if (step - 1) % self.every == 0:
            kept["sample"].append(_record("sample", step, roller, rollouts, logprobs, 0, 0))
            if len(kept["sample"]) > KEEP["sample"]:
                kept["sample"], self.every = kept["sample"][::2], self.every * 2
        index = rollouts.index
        if rollouts.teacher is not None and index.kind.numel():
            theirs = rollouts.teacher.logprobs.to(logprobs.device)
            gap = index.sum_student(logprobs) - index.sum_teacher(theirs)
            usable = (index.student_count > 0) & (index.teacher_count > 0) & torch.isfinite(gap)
            config = roller.config
            for which, scored in ((Kind.STOP, config.score_stop), (Kind.MARKER, config.score_markers)):
                if not scored:
                    usable &= index.kind != int(which)
            b, g = divmod(int(torch.where(usable, gap.abs(), -1).argmax()), gap.shape[1])
            least = kept["gap"][-1]["gap"] if len(kept["gap"]) == KEEP["gap"] else 0.0
            if usable[b, g] and abs(float(gap[b, g])) > abs(least):
                kept["gap"].append(_record("gap", step, roller, rollouts, logprobs, b, g))
                kept["gap"].sort(key=lambda record: -abs(record["gap"]))
                del kept["gap"][KEEP["gap"] :]
        there = torch.arange(index.student_chunk.shape[1]) < torch.tensor(rollouts.lengths)[:, None]
        kind = index.kind_of_student()
        lost = ((kind == int(Kind.REWRITTEN)) | (kind < 0)) & there.to(kind.device)
        if lost.any():
            b = int(lost.sum(1).argmax())
            chunk = int(index.student_chunk[b, int(lost[b].long().argmax())])
            kept["bytes"].append(_record("bytes", step, roller, rollouts, logprobs, b, chunk))
            del kept["bytes"][: -KEEP["bytes"]]

    def add_evaluations(self, before: Evaluation | None, after: Evaluation | None) -> None:
        """Responses to held-out prompts, evenly spaced over them."""
        some = before or after
        if some is None:
            return
        picked = range(0, len(some.prompts), math.ceil(len(some.prompts) / KEEP["heldout"]))
        self.records["heldout"] = [
            {
                "why": "heldout",
                "prompt": some.prompts[i],
                "before": before and before.responses[i],
                "after": after and after.responses[i],
            }
            for i in picked
        ]

    def write(self, path: Path) -> None:
        """One record a line; the file is replaced as a whole."""
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for rows in self.records.values() for record in rows]
        with replacing(path) as part:
            part.write_text("".join(lines), encoding="utf-8")

    def read(self, path: Path) -> None:
        """Goes on from a file that `write` left; of a damaged one from what is good in it, and a warning says where."""
        try:
            if (problem := obstacle(path)) is None:
                lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return
        except OSError as error:
            problem = f"{path}: cannot be read ({error.strerror})"
        if problem is not None:
            warnings.warn(f"{problem}; the samples so far are left out", stacklevel=3)
            if not path.is_file():  # so that new ones can be written
                with suppress(OSError):
                    path.rename(path.with_name(f"{path.name}.damaged"))
            return
        damaged = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            record = _whole_record(line)
            if record is None:
                damaged.append(number)
            else:
                self.records[record["why"]].append(record)
        if damaged:
            more = f" and {len(damaged) - 1} more lines" if len(damaged) > 1 else ""
            warnings.warn(f"{path}, line {damaged[0]}{more}: damaged, and left out", stacklevel=3)
        self.records["gap"].sort(key=lambda record: -abs(record["gap"]))
        steps = [record["step"] for record in self.records["sample"]]
        self.every = max(1, steps[1] - steps[0]) if len(steps) > 1 else 1


_NUMBER = (int, float, type(None))
#: What a record is made of; one of a held-out prompt, and a column of the others.
_PARTS: dict[str, Any] = {
    **{"step": int, "prompt": str, "response": str, "completed": bool, "columns": list, "cut": list, "at": int},
    "gap": _NUMBER,
}
_HELDOUT = {"prompt": str, "before": (str, type(None)), "after": (str, type(None))}
_COLUMN = {"kind": str, "student": list, "teacher": list, "gap": _NUMBER}


def _whole_record(line: bytes) -> dict[str, Any] | None:
    """A line of the file as a record that a report can show; None where it is none."""

    def made_of(value: dict[str, Any], parts: dict[str, Any]) -> bool:
        return all(isinstance(value[name], kind) for name, kind in parts.items())

    try:
        record = json.loads(line)
        if record["why"] == "heldout":
            return record if made_of(record, _HELDOUT) else None
        columns = record["columns"]
        whole = record["why"] in KEEP and made_of(record, _PARTS) and len(record["cut"]) == 2
        whole = whole and 0 <= record["at"] < max(1, len(columns))
        whole = whole and not (record["why"] == "gap" and record["gap"] is None)
        for column in columns:
            whole = whole and made_of(column, _COLUMN)
            for text, logprob in (*column["student"], *column["teacher"]):
                whole = whole and isinstance(text, str) and isinstance(logprob, _NUMBER)
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return record if whole else None


def _record(
    why: str, step: int, roller: Roller, rollouts: Rollouts, logprobs: Tensor, b: int, chunk: int
) -> dict[str, Any]:
    student_ids, teacher_ids = rollouts.completion_ids[b], rollouts.teacher_ids[b]
    alignment = roller.aligner.align(student_ids, teacher_ids)
    own = logprobs[b, : len(student_ids)].tolist()
    theirs = [math.nan] * len(teacher_ids)
    if rollouts.teacher is not None:
        theirs = rollouts.teacher.logprobs[b, : len(teacher_ids)].tolist()
    sides = [
        [(_text(tokenizer, table[i], i), x) for i, x in zip(ids, values, strict=True)]
        for tokenizer, table, ids, values in (
            (roller.tokenizer, roller.aligner.student, student_ids, own),
            (roller.teacher.tokenizer, roller.aligner.teacher, teacher_ids, theirs),
        )
    ]
    columns, at = _columns(alignment, sides[0], sides[1], chunk)
    first = max(0, at - AROUND)
    return {
        "why": why,
        "step": step,
        "prompt": rollouts.prompts[b].title,
        "response": roller.tokenizer.decode(student_ids, skip_special_tokens=True),
        "completed": rollouts.completed[b],
        "columns": columns[first : at + AROUND + 1],
        "cut": [first > 0, at + AROUND + 1 < len(columns)],
        "at": at - first,
        "gap": columns[at]["gap"] if columns else None,
    }


def _text(tokenizer: Any, spelled: bytes | None, token: int) -> str:
    r"""Bytes that are not UTF-8 as \\xNN; a token without bytes by its name."""
    if spelled is None:
        return str(tokenizer.convert_ids_to_tokens(token))
    return spelled.decode(errors="backslashreplace")


def _columns(
    alignment: Alignment, student: list[tuple[str, float]], teacher: list[tuple[str, float]], chunk: int
) -> tuple[list[dict[str, Any]], int]:
    """Every chunk with its tokens, and what is unaligned between them; and which column is chunk `chunk`."""
    columns: list[dict[str, Any]] = []
    at, done = 0, [0, 0]

    def add(kind: str, s: range, t: range) -> None:
        if not (len(s) or len(t)):
            return
        own, theirs = (side[r.start : r.stop] for side, r in ((student, s), (teacher, t)))
        gap = sum(x for _, x in own) - sum(x for _, x in theirs) if own and theirs else math.nan
        rows = [[[text, _finite(x)] for text, x in side] for side in (own, theirs)]
        columns.append({"kind": kind, "student": rows[0], "teacher": rows[1], "gap": _finite(gap)})

    for g, c in enumerate(alignment):
        spans = [c.student or range(done[0], done[0]), c.teacher or range(done[1], done[1])]
        add("UNALIGNED", range(done[0], spans[0].start), range(done[1], spans[1].start))
        if g == chunk:
            at = len(columns)
        add(c.kind.name, spans[0], spans[1])
        done = [spans[0].stop, spans[1].stop]
    add("UNALIGNED", range(done[0], len(student)), range(done[1], len(teacher)))
    if chunk < 0:
        at = next((i for i, c in enumerate(columns) if c["kind"] == "UNALIGNED" and c["student"]), 0)
    return columns, min(at, max(0, len(columns) - 1))


def _finite(x: float) -> float | None:
    return round(x, 4) if math.isfinite(x) else None

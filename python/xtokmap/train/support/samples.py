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

from xtokmap.alignment import Kind
from xtokmap.columns import UNALIGNED, Column, columns
from xtokmap.files import obstacle, replacing
from xtokmap.train.evaluation import SHOWN, Evaluation, picked
from xtokmap.train.rollouts import Rollouts
from xtokmap.train.sampling import Roller

#: How many are kept of each sort: responses evenly spaced over the run, those with the largest gap of a chunk, the last
#: ones with bytes that the sides spell differently, and held-out prompts.
KEEP = {"sample": 12, "gap": 12, "bytes": 6, "heldout": SHOWN}
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
        index = rollouts.batch.index
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
        self.records["heldout"] = [
            {
                "why": "heldout",
                "prompt": some.prompts[i],
                "before": before and before.shown(i),
                "after": after and after.shown(i),
            }
            for i in picked(len(some.prompts))
        ]

    def write(self, path: Path) -> None:
        """One record a line; the file is replaced as a whole."""
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for rows in self.records.values() for record in rows]
        with replacing(path) as part:
            part.write_text("".join(lines), encoding="utf-8")

    def read(self, path: Path) -> None:
        """Resumes from what `write` left. Damaged lines are left out, and a warning says which."""
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
#: What a record is made of, and one of a held-out prompt.
_PARTS: dict[str, Any] = {
    **{"step": int, "prompt": str, "response": str, "completed": bool, "columns": list, "cut": list, "at": int},
    "gap": _NUMBER,
}
_HELDOUT = {"prompt": str, "before": (str, type(None)), "after": (str, type(None))}


def _whole_record(line: bytes) -> dict[str, Any] | None:
    """A line of the file as a record that a report can show; None where it is none."""

    def made_of(value: dict[str, Any], parts: dict[str, Any]) -> bool:
        return all(isinstance(value[name], kind) for name, kind in parts.items())

    try:
        record = json.loads(line)
        if record["why"] == "heldout":
            return record if made_of(record, _HELDOUT) else None
        whole = record["why"] in KEEP and made_of(record, _PARTS) and len(record["cut"]) == 2
        whole = whole and 0 <= record["at"] < max(1, len(record["columns"]))
        whole = whole and not (record["why"] == "gap" and record["gap"] is None)
        for column in record["columns"]:
            Column.of(column)  # raises where it is none
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return record if whole else None


def _record(
    why: str, step: int, roller: Roller, rollouts: Rollouts, logprobs: Tensor, b: int, chunk: int
) -> dict[str, Any]:
    student_ids, teacher_ids = rollouts.batch.student_ids[b], rollouts.batch.teacher_ids[b]
    alignment = roller.aligner.align(student_ids, teacher_ids)
    own = logprobs[b, : len(student_ids)].tolist()
    theirs = [math.nan] * len(teacher_ids)
    if rollouts.teacher is not None:
        theirs = rollouts.teacher.logprobs[b, : len(teacher_ids)].tolist()
    names = tuple(side.tokenizer.convert_ids_to_tokens for side in (roller, roller.teacher))
    found = columns(alignment, names, (own, theirs))
    if chunk < 0:
        at = next((i for i, c in enumerate(found) if c.kind == UNALIGNED and c.student), 0)
    else:
        at = next((i for i, c in enumerate(found) if c.chunk == chunk), 0)
    first = max(0, at - AROUND)
    shown = [column.record() for column in found[first : at + AROUND + 1]]
    return {
        "why": why,
        "step": step,
        "prompt": rollouts.prompts[b].title,
        "response": roller.tokenizer.decode(student_ids, skip_special_tokens=True),
        "completed": rollouts.completed[b],
        "columns": shown,
        "cut": [first > 0, at + AROUND + 1 < len(found)],
        "at": at - first,
        "gap": shown[at - first]["gap"] if shown else None,
    }

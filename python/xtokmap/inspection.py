"""What two tokenizers are to each other: their vocabularies, a text of yours, and which losses fit; for `inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np

from xtokmap.aligner import Aligner
from xtokmap.alignment import Alignment, Kind
from xtokmap.columns import visible

#: Chunks of a text that are listed.
_LISTED = 12
#: Share of a text's student tokens in MANY_TO_MANY chunks from which `cover` is worth a try beside the default.
_CROSSING = 0.1

#: What the numbers of `VocabMap.summary` count.
_COUNTED = {
    "student": "student tokens that have bytes",
    "teacher": "teacher tokens that have bytes",
    "shared_bytes": "teacher tokens whose bytes are a student token",
    "shared_strings": "tokens that a comparison of vocabulary strings would match",
    "uncovered": "teacher tokens whose bytes are no student token",
    "groups": "groups of these, connected by one beginning with another",
    "unreachable": "teacher tokens that begin with no student token",
}


def inspect(aligner: Aligner, text: str | None = None) -> dict[str, Any]:
    """Figures of a pair, as JSON has them.

    Args:
        aligner: made of two tokenizers that can encode, where there is a text.
        text: which both encode.

    Returns:
        `rule`, the numbers of `VocabMap.summary`, `losses` (a list of `teacher`, `loss` and `why`), and with a text
        `text`: `bytes`, `student` and `teacher` tokens, `kinds` (of every kind how many chunks, and its share of the
        student's tokens), `coverage`, and `costly` (chunks with more than one token on a side, the costliest first).
    """
    counts = aligner.vocab_map.summary()
    found: dict[str, Any] = {"rule": aligner.student_rule, **counts}
    same = counts["student"] == counts["teacher"] == counts["shared_bytes"]
    shares = None
    if text is not None:
        student, teacher = (codec.encode_batch([text])[0] for codec in (aligner._student_codec, aligner._teacher_codec))
        alignment = aligner.align(student, teacher)
        found["text"] = _of_text(alignment, len(text.encode()))
        shares = alignment.coverage_by_kind()
        same = same and shares[Kind.ONE_TO_ONE] in (0.0, 1.0) and alignment.coverage == 1.0
    found["losses"] = [
        {"teacher": has, "loss": loss, "why": why} for has, loss, why in _losses(same=same, shares=shares)
    ]
    return found


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The same to be read."""
    width = max(7, *(len(f"{found[name]:,}") for name in _COUNTED if found[name] is not None))
    for name, what in _COUNTED.items():
        yield f"{'-' if found[name] is None else f'{found[name]:,}':>{width}}  {what}"
    yield f"{'':>{width}}  the student's tokenizer cuts by {found['rule']}"
    if (text := found.get("text")) is not None:
        yield ""
        yield f"The text: {text['bytes']:,} bytes, {text['student']:,} student and {text['teacher']:,} teacher tokens"
        for kind, figures in text["kinds"].items():
            yield f"{figures['share']:>{width}.1%}  of the student's tokens in {figures['chunks']:,} chunks {kind}"
        yield f"{text['coverage']:>{width}.1%}  of them can be given a signal (coverage)"
    if text is not None and text["costly"]:
        yield ""
        yield "The chunks that cost most: one signal for all their tokens (how often, tokens beyond a pair, both sides)"
        for one in text["costly"]:
            sides = " ┆ ".join("|".join(map(visible, one[side])) or "∅" for side in ("student", "teacher"))
            yield f"{one['count']:>{width},}  {one['cost']:>6,}  {sides}  {one['kind']}"
    yield ""
    yield "Which loss fits, by what the teacher gives"
    for loss, group in groupby(found["losses"], lambda one: (one["loss"], one["why"])):
        yield f"  {', or '.join(one['teacher'] for one in group)}: {loss[0]}"
        yield f"    {loss[1]}"


def _of_text(alignment: Alignment, size: int) -> dict[str, Any]:
    chunks = np.bincount(alignment.kind, minlength=len(Kind))
    shares = alignment.coverage_by_kind()
    kinds = {kind.name: {"chunks": int(chunks[kind]), "share": shares[kind]} for kind in Kind if chunks[kind]}
    return {
        "bytes": size,
        "student": len(alignment.student_chunk),
        "teacher": len(alignment.teacher_chunk),
        "kinds": kinds,
        "coverage": alignment.coverage,
        "costly": _costly(alignment),
    }


def _costly(alignment: Alignment) -> list[dict[str, Any]]:
    """Chunks in which a signal is shared, like ones together; what a text often has costs it the most."""
    assert alignment._bytes is not None
    student, teacher = (
        np.bincount(chunk[chunk >= 0], minlength=len(alignment))
        for chunk in (alignment.student_chunk, alignment.teacher_chunk)
    )
    costs: Counter[tuple[str, tuple[int, ...], tuple[int, ...]]] = Counter()
    often: Counter[tuple[str, tuple[int, ...], tuple[int, ...]]] = Counter()
    ids = alignment._bytes.student_ids, alignment._bytes.teacher_ids
    ptrs = alignment.student_ptr, alignment.teacher_ptr
    for g in np.flatnonzero((student + teacher > 2) & ~np.isin(alignment.kind, (Kind.STOP, Kind.MARKER))).tolist():
        own, theirs = (tuple(x[ptr[g] : ptr[g + 1]].tolist()) for x, ptr in zip(ids, ptrs, strict=True))
        key = Kind(alignment.kind[g]).name, own, theirs
        costs[key] += int(student[g] + teacher[g]) - 2
        often[key] += 1
    tables = alignment._bytes.student, alignment._bytes.teacher
    found = []
    for key, cost in costs.most_common(_LISTED):
        student_texts, teacher_texts = (
            [(table[i] or b"").decode(errors="backslashreplace") for i in side]
            for table, side in zip(tables, key[1:], strict=True)
        )
        sides = {"student": student_texts, "teacher": teacher_texts}
        found.append({"kind": key[0], **sides, "count": often[key], "cost": cost})
    return found


def _losses(*, same: bool, shares: dict[Kind, float] | None) -> Iterator[tuple[str, str, str]]:
    """The rules of docs/choosing-a-loss.md: what the teacher gives, a loss, and why."""
    rows, sums = "whole rows (a local model, hidden states of a server)", "sums over sets of tokens (serve-teacher)"
    top, own = "the top k of its rows (prompt_logprobs of a server)", "logprobs of its own tokens alone"
    if same:
        why = "both cut alike: transfer_kl is the exact divergence, every credit plain on-policy distillation"
        yield rows, "transfer_kl", why
        yield from ((has, "prior", why) for has in (sums, top, own))
        return
    crossing = 0.0 if shares is None else shares[Kind.MANY_TO_MANY]
    why = "it points where the exact divergence does, with less noise than a credit"
    if crossing >= _CROSSING:
        why = f"{why}; boundaries cross in {crossing:.1%} of the student's tokens, and there cover is nearer to exact"
    yield rows, "transfer_kl" + ("; compare cover" if crossing >= _CROSSING else ""), why
    yield sums, "cover", "q* of the sampled token: nearly exact, noisier, in a few bytes"
    yield top, "cover", "q* from what was returned, far from exact: watch `missing`, the mass that was not"
    yield own, "prior (or shift)", f"the boundary bias stays: {_bias(shares)}; watch chunk_gap on held-out prompts"


def _bias(shares: dict[Kind, float] | None) -> str:
    if shares is None:
        return "how much it matters depends on which side is finer (give a text)"
    finer, coarser = shares[Kind.MANY_TO_ONE], shares[Kind.ONE_TO_MANY]
    alone = shares[Kind.ONE_TO_ONE]
    if max(finer, coarser) == 0:
        return f"{alone:.1%} ONE_TO_ONE does not say that these are free of it"
    if finer >= coarser:
        return f"the student is finer ({finer:.1%} MANY_TO_ONE, {coarser:.1%} ONE_TO_MANY), where it costs most"
    return f"the teacher is finer ({coarser:.1%} ONE_TO_MANY, {finer:.1%} MANY_TO_ONE), where it costs less"

"""Pair: two tokenizers, and everything that a trainer of any kind needs of them.

    pair = Pair(student_tokenizer, teacher_tokenizer, loss="transfer_kl")
    batch = pair.prepare(conversations, completion_ids, device=device)
    out = pair.loss(student(**batch.student_inputs), teacher(**batch.teacher_inputs), batch)
    out.loss.backward()

`prepare` runs on the CPU, in a DataLoader's worker as well; `loss` asks the device nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.aligner import Aligner
from xtokmap.alignment import Kind
from xtokmap.boundary.cover import CoverQueries
from xtokmap.boundary.vocab_map import once
from xtokmap.chat import PLAIN_TEMPLATE, render, stop_id
from xtokmap.losses.credit import chunk_gap
from xtokmap.losses.table import LossInput, LossRule, LossSettings, rule_of
from xtokmap.markers import Foreign
from xtokmap.teachers.scores import Scores, scores_of
from xtokmap.torch.completions import padded_inputs, padded_places
from xtokmap.torch.index import ChunkIndex, VocabTensors, coverage_counts
from xtokmap.torch.logits import Logits, TopK

__all__ = ["Pair", "PairBatch", "PairLoss"]

Ids = list[list[int]]


@dataclass(frozen=True, eq=False)
class PairBatch:
    """B completions as both sides have them; Ts and Tt are the longest completions of each side.

    Attributes:
        student_prompt_ids: B rows.
        student_ids: B rows, the completions as sampled.
        teacher_prompt_ids: B rows.
        teacher_ids: B rows, the completions as the teacher has them.
        index: of their alignment.
        completion_mask: bool `[B, Ts]`; where there is a student token.
        chosen: which rows of the batch that was prepared these are; None: all.
    """

    student_prompt_ids: Ids
    student_ids: Ids
    teacher_prompt_ids: Ids
    teacher_ids: Ids
    index: ChunkIndex
    completion_mask: Tensor
    chosen: tuple[int, ...] | None = None
    #: Rows of the teacher before each completion in the batch that was prepared.
    teacher_first: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.student_ids)

    @property
    def student_inputs(self) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, int64 `[B, L]`, padded on the right: `student(**batch.student_inputs)`."""
        return _inputs(self.student_prompt_ids, self.student_ids, self.completion_mask.device)

    @property
    def teacher_inputs(self) -> dict[str, Tensor]:
        """The same for the teacher."""
        return _inputs(self.teacher_prompt_ids, self.teacher_ids, self.completion_mask.device)

    def to(self, device: torch.device | str) -> PairBatch:
        """The same on another device."""
        return replace(self, index=self.index.to(device), completion_mask=self.completion_mask.to(device))

    def select(self, rows: Sequence[int]) -> PairBatch:
        """Some rows, as wide as the batch, for a micro-batch; `Scores` of the whole batch go with them."""
        at = torch.tensor(rows, device=self.completion_mask.device)
        sides = (self.student_prompt_ids, self.student_ids, self.teacher_prompt_ids, self.teacher_ids)
        chosen = rows if self.chosen is None else [self.chosen[b] for b in rows]
        return replace(
            self,
            **dict(zip(_SIDES, ([side[b] for b in rows] for side in sides), strict=True)),
            index=self.index.rows(at),
            completion_mask=self.completion_mask[at],
            chosen=tuple(chosen),
            teacher_first=tuple(self.teacher_first[b] for b in rows),
        )


_SIDES = ("student_prompt_ids", "student_ids", "teacher_prompt_ids", "teacher_ids")


class PairLoss(NamedTuple):
    """What `Pair.loss` returns.

    Attributes:
        loss: float32 scalar, with a gradient.
        metrics: scalars by name, without a gradient and not read back from the device: `kl_per_byte` (nats, of the
            student's samples: a sampled reverse KL), `scored` (share of the tokens), `coverage/ONE_TO_ONE` and so on
            (share of the tokens by kind of chunk), and means over the scored tokens: `clamped` and `fallback` of a
            credit, `undetermined`, `rest` and `shared` of transfer_kl (mass left undecided), `nonfinite`.
        logprobs: float32 `[B, Ts]`; the student's own, without a gradient.
        sums: what the means are of, for micro-batches; with `nats` and `bytes`, `[B]`.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logprobs: Tensor
    sums: dict[str, Tensor]


class Pair:
    """Two tokenizers and a loss.

    Args:
        student_tokenizer: a transformers tokenizer.
        teacher_tokenizer: another, of any family.
        loss: a name of `xtokmap.losses.LOSSES`, or a `LossRule` of your own.
        plain_template: how a prompt is put to a model whose tokenizer has no chat template.
        foreign: what becomes of a student's thoughts or tool calls if the teacher's chat template knows none: "omit",
            the teacher is not given them and they are not scored, or "text" (see `Aligner`).
        settings: of the loss, see `LossSettings`: beta, clamp, score_stop, ...

    Raises:
        XTokMapError: an unknown loss or setting, another `foreign`.
        UnsupportedTokenizerError: a tokenizer whose tokens' bytes cannot be known exactly.
    """

    def __init__(
        self,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        loss: str | LossRule = "transfer_kl",
        *,
        plain_template: str = PLAIN_TEMPLATE,
        foreign: Foreign = "omit",
        **settings: Any,
    ) -> None:
        self.tokenizers = (student_tokenizer, teacher_tokenizer)
        self.rule = rule_of(loss)
        try:
            self.settings = LossSettings(**settings)
        except TypeError as error:
            raise XTokMapError(f"settings of the loss: {error}") from None
        self.plain_template = plain_template
        self.aligner = Aligner(student_tokenizer, teacher_tokenizer, markers=True, foreign=foreign)
        self.stop_id = stop_id(teacher_tokenizer)

    def with_loss(self, loss: str | LossRule) -> Pair:
        """The same two tokenizers with another loss."""
        other = copy(self)
        other.rule = rule_of(loss)
        return other

    @once
    def _maps(self) -> dict[torch.device, VocabTensors]:
        return {}

    def maps(self, device: torch.device) -> VocabTensors:
        """The two vocabularies' map on a device; made once."""
        if device not in self._maps:
            self._maps[device] = VocabTensors.from_map(self.aligner.vocab_map, device)
        return self._maps[device]

    def prompt_inputs(self, conversations: Any, *, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """Prompts for the student's `generate`, rendered with its own template: int64 `[B, L]`, padded on the left."""
        rows = render(self.tokenizers[0], conversations, self.plain_template)
        return padded_inputs(rows, device, left=True)

    def prepare(
        self,
        conversations: Any,
        completion_ids: Any,
        completion_mask: Any = None,
        *,
        device: torch.device | str | None = None,
    ) -> PairBatch:
        """Prompts and sampled completions as both models take them, aligned.

        Args:
            conversations: B prompts, strings or conversations as `chat.render` takes them, which each side's own
                template renders; or a tuple (student prompt ids, teacher prompt ids) of B rows each.
            completion_ids: B rows of the student's ids as sampled, ragged, or padded `[B, T]`.
            completion_mask: `[B, T]`, for padded ids. None: of a padded row all up to its first end of turn.
            device: of the tensors.

        Raises:
            XTokMapError: other numbers of rows, an empty prompt, ids that are none.
        """
        completions = self._completions(completion_ids, completion_mask)
        if isinstance(conversations, tuple):
            if len(conversations) != len(self.tokenizers):
                raise XTokMapError(f"a tuple of {len(conversations)}; prompt ids are (student's, teacher's)")
            prompts = [[_list(row) for row in side] for side in conversations]
        else:
            prompts = [render(tokenizer, conversations, self.plain_template) for tokenizer in self.tokenizers]
        thinking = self.aligner.open_thoughts(*prompts)
        given = self.aligner.teacher_ids(completions, stop_id=self.stop_id, thinking=thinking)
        teacher_ids = [row.tolist() for row in given]
        return self.aligned(prompts[0], completions, prompts[1], teacher_ids, device=device)

    def aligned(
        self,
        student_prompt_ids: Ids,
        student_ids: Ids,
        teacher_prompt_ids: Ids,
        teacher_ids: Ids,
        *,
        device: torch.device | str | None = None,
    ) -> PairBatch:
        """As `prepare`, of ids of both sides; the completions may be the teacher's own, retokenized for the student."""
        sides = (student_prompt_ids, student_ids, teacher_prompt_ids, teacher_ids)
        for name, side in zip(_SIDES, sides, strict=True):
            if len(side) != len(student_ids):
                raise XTokMapError(f"{len(side)} {name} for {len(student_ids)} completions; they must go together")
            if "prompt" in name and not all(side):
                row = next(b for b, ids in enumerate(side) if not ids)
                raise XTokMapError(f"{name}[{row}] is empty: the first token of a completion is scored given something")
        alignment = self.aligner.align_batch(student_ids, teacher_ids)
        index = ChunkIndex.from_alignment(alignment, device)
        lengths = torch.tensor([len(row) for row in student_ids], dtype=torch.long)
        mask = torch.arange(max(map(len, student_ids), default=0)) < lengths[:, None]
        first = tuple(accumulate((len(row) + 1 for row in teacher_ids), initial=0))[:-1]
        return PairBatch(*sides, index, mask.to(index.kind.device), None, first)

    def loss(
        self,
        student: Any,
        teacher: Any,
        batch: PairBatch,
        *,
        old_logprobs: Tensor | None = None,
        denominator: Tensor | float | None = None,
    ) -> PairLoss:
        """The loss of a batch.

        Args:
            student: what `student(**batch.student_inputs)` returns, its logits `[B, L, V]`, or `Logits` of hidden
                states `[B, L, H]` and the output head (then no `[L, V]` is ever made); also `Logits` of just the N rows
                that score the completions' tokens, flat.
            teacher: the same of `teacher(**batch.teacher_inputs)`, which needs no gradient; or a teacher's `Scores`;
                None where the loss asks for nothing.
            batch: from `prepare`.
            old_logprobs: `[B, Ts]`, of the policy that sampled, where another one is updated by now.
            denominator: what to divide by, so that micro-batches add up; None: the batch's own tokens, as the setting
                `aggregate` says.

        Raises:
            XTokMapError: rows that are not of this batch; a teacher that does not give what the loss needs.
        """
        device, rule = batch.completion_mask.device, self.rule
        rows = _rows_of(student, batch.student_prompt_ids, batch.student_ids, after=False)
        scores = self.scores(teacher, batch)
        # Whose rows these are among those that were scored: of a micro-batch, some.
        at = None if batch.chosen is None else torch.tensor(batch.chosen, device=device)
        some = _selected(scores, batch, at)
        places = padded_places(batch.student_ids, batch.completion_mask.shape[1]).to(device)
        ids = torch.tensor([i for row in batch.student_ids for i in row], dtype=torch.long).to(device)
        if denominator is None:
            counted = batch.completion_mask
            if self.settings.aggregate == "scored":
                counted = rule.scored(batch.index, counted, self.settings)
            denominator = counted.sum().clamp(min=1)
        found = LossInput(
            rows,
            places,
            ids,
            batch.completion_mask,
            batch.index,
            self.settings,
            denominator,
            old_logprobs,
            interior=self._interior(batch) if rule.interior else None,
            maps=self.maps(device) if rule.keep else None,
            **some,
        )
        computed = rule.compute(found)
        return self._reported(found, computed.loss, dict(computed.sums))

    def scores(self, teacher: Any, batch: PairBatch) -> Scores | None:
        """What the loss needs of a teacher's rows, or of the `Scores` that there are already."""
        if self.rule.teacher == "nothing":
            return None
        if teacher is None:
            raise XTokMapError("this loss needs a teacher: its output, its logits, Logits or Scores")
        if isinstance(teacher, Scores):
            return teacher
        rows = _rows_of(teacher, batch.teacher_prompt_ids, batch.teacher_ids, after=True)
        with torch.no_grad():
            return scores_of(rows.detach(), batch.teacher_ids, self.queries(batch), keep=self.rule.keep)

    def queries(self, batch: PairBatch) -> CoverQueries | None:
        """What the teacher's rows are asked, for a teacher's `score`; None for most losses."""
        if not self.rule.queries:
            return None
        # Aligned again: that costs less than to hand queries from a DataLoader's worker to here.
        return self.aligner.cover_queries(self.aligner.align_batch(batch.student_ids, batch.teacher_ids))

    def _interior(self, batch: PairBatch) -> Any:
        alignment = self.aligner.align_batch(batch.student_ids, batch.teacher_ids)
        return self.aligner.interior_queries(alignment, width=batch.completion_mask.shape[1])

    def _reported(self, found: LossInput, loss: Tensor, sums: dict[str, Tensor]) -> PairLoss:
        own = found.plain_logprobs
        tokens = found.mask.sum()
        scored = sums["scored"].clamp(min=1)
        metrics = {name: value.detach() / scored for name, value in sums.items() if name != "scored"}
        metrics["scored"] = sums["scored"] / tokens.clamp(min=1)
        counts = coverage_counts(found.index)
        metrics |= {f"coverage/{kind.name}": counts[kind] / tokens.clamp(min=1) for kind in Kind}
        if found.teacher_logprobs is not None:
            counted = {"stops": self.settings.score_stop, "markers": self.settings.score_markers}
            gap = chunk_gap(own, found.teacher_logprobs, found.index, **counted)
            sums["nats"], sums["bytes"] = gap
            metrics["kl_per_byte"] = gap[0].sum() / gap[1].sum().clamp(min=1)
        return PairLoss(loss, metrics, own, sums)

    def _completions(self, completion_ids: Any, completion_mask: Any) -> Ids:
        if completion_mask is not None:
            keep = torch.as_tensor(completion_mask).bool().tolist()
            rows = [_list(row) for row in completion_ids]
            if [len(row) for row in rows] != [len(row) for row in keep]:
                raise XTokMapError("completion_mask and completion_ids have other shapes")
            return [[i for i, k in zip(row, flags, strict=True) if k] for row, flags in zip(rows, keep, strict=True)]
        rows = [_list(row) for row in completion_ids]
        if not hasattr(completion_ids, "shape"):
            return rows
        stops = self.aligner.student.stop_ids
        ends = (next((k for k, i in enumerate(row) if i in stops), len(row)) for row in rows)
        return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]


def _list(row: Any) -> list[int]:
    found: list[int] = row.tolist() if hasattr(row, "tolist") else list(row)
    return found


def _inputs(prompts: Ids, completions: Ids, device: torch.device) -> dict[str, Tensor]:
    rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    return padded_inputs(rows, device)


def _rows_of(output: Any, prompts: Ids, completions: Ids, *, after: bool) -> Logits:
    """The flat rows that score the completions' tokens; with `after` also the one behind each last token."""
    logits = getattr(output, "logits", output)
    if isinstance(logits, Tensor):
        logits = Logits(logits)
    if not isinstance(logits, Logits):
        raise XTokMapError(f"expected a model's output, logits, Logits or Scores, got {type(output).__name__}")
    count = sum(len(c) + after for c in completions)
    if tuple(logits.shape) == (count,) and logits.rows.ndim == 2:
        return logits
    length = max((len(p) + len(c) for p, c in zip(prompts, completions, strict=True)), default=0)
    if len(logits.shape) != 2 or logits.shape[0] != len(completions):
        raise XTokMapError(
            f"rows of shape {tuple(logits.shape)}; the batch has {len(completions)} rows of {length} tokens: pass the "
            "output for batch.student_inputs or batch.teacher_inputs"
        )
    width = logits.shape[1]
    skipped = length - width  # logits_to_keep leaves the first ones out
    if not 0 <= skipped <= min(map(len, prompts), default=1) - 1:
        raise XTokMapError(
            f"{width} rows for {length} tokens, the shortest prompt having {min(map(len, prompts), default=0)}: rows "
            "that score completions are missing; pass all of them, or a larger logits_to_keep"
        )
    at: list[int] = []
    for b, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        first = b * width + len(p) - 1 - skipped
        at += range(first, first + len(c) + after)
    return logits.at(torch.tensor(at, dtype=torch.long).to(logits.rows.device))


def _selected(scores: Scores | None, batch: PairBatch, at: Tensor | None) -> dict[str, Any]:
    """The teacher's part of a `LossInput`: the batch's rows among those that were scored."""
    if scores is None:
        return {}
    device = batch.completion_mask.device

    def rows(x: Tensor | None) -> Tensor | None:
        return x if x is None else x.to(device) if at is None else x.to(device)[at]

    target = scores.target
    if target is not None and batch.chosen is not None:
        target = target.select(batch.chosen)
    teacher_rows: Logits | TopK | None = None
    if scores.rows is not None:
        first = torch.tensor(batch.teacher_first, dtype=torch.long, device=device)
        among = torch.arange(batch.index.teacher_chunk.shape[1], device=device)
        lengths = torch.tensor([len(row) for row in batch.teacher_ids], device=device)
        teacher_rows = scores.rows.at(torch.where(among < lengths[:, None], first[:, None] + among, -1))
    elif scores.top is not None:
        top = scores.top.to(device)
        teacher_rows = top if at is None else top.at(_all_places(top.shape, at))
    return {
        "teacher_logprobs": rows(scores.logprobs),
        "transferred": rows(scores.transferred),
        "target": target,
        "teacher_rows": teacher_rows,
    }


def _all_places(shape: torch.Size, at: Tensor) -> Tensor:
    return at[:, None] * shape[1] + torch.arange(shape[1], device=at.device)

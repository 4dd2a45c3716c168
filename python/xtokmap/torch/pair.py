"""Pair: two tokenizers, and everything that a trainer of any kind needs of them.

    pair = Pair(student_tokenizer, teacher_tokenizer, loss="transfer_kl")
    batch = pair.prepare(conversations, completion_ids, device=device)
    out = pair.loss(student(**batch.student_inputs), teacher(**batch.teacher_inputs), batch)
    out.loss.backward()

`prepare` runs on the CPU, in a DataLoader's worker as well; `loss` asks the device nothing.
"""

from __future__ import annotations

from copy import copy
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from xtokmap._core import XTokMapError
from xtokmap.aligner import Aligner
from xtokmap.boundary.cover import CoverQueries
from xtokmap.boundary.vocab_map import once
from xtokmap.chat import PLAIN_TEMPLATE, render, stop_id
from xtokmap.losses.measured import PairLoss, measured
from xtokmap.losses.rule import LossInput, LossRule, LossSettings
from xtokmap.losses.table import rule_of
from xtokmap.markers import Foreign
from xtokmap.teachers.local import LocalTeacher
from xtokmap.teachers.remote import ServerTeacher
from xtokmap.teachers.scores import Scores, scores_of
from xtokmap.torch.batch import SIDES, Ids, PairBatch
from xtokmap.torch.completions import flat_ids, output_rows, padded_inputs, padded_places, ragged, token_mask
from xtokmap.torch.index import ChunkIndex, VocabTensors

__all__ = ["Pair", "PairBatch", "PairLoss"]


class Pair:
    """Two tokenizers and a loss.

    Args:
        student_tokenizer: a transformers tokenizer.
        teacher_tokenizer: another, of any family.
        loss: a name of `xtokmap.losses.LOSSES`, or a `LossRule` of your own.
        plain_template: how a prompt is put to a model whose tokenizer has no chat template.
        foreign: what becomes of thoughts and calls for which the teacher has no format: "omit" or "text" (`Aligner`).
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
        completions = ragged(completion_ids, completion_mask, self.aligner.student.stop_ids)
        if isinstance(conversations, tuple):
            if len(conversations) != len(self.tokenizers):
                raise XTokMapError(f"a tuple of {len(conversations)}; prompt ids are (student's, teacher's)")
            prompts = [ragged(list(side)) for side in conversations]
        else:
            prompts = [render(tokenizer, conversations, self.plain_template) for tokenizer in self.tokenizers]
        teacher_ids = self.aligner._answers(prompts, completions, self.stop_id)
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
        for name, side in zip(SIDES, sides, strict=True):
            if len(side) != len(student_ids):
                raise XTokMapError(f"{len(side)} {name} for {len(student_ids)} completions; they must go together")
            if "prompt" in name and not all(side):
                row = next(b for b, ids in enumerate(side) if not ids)
                raise XTokMapError(f"{name}[{row}] is empty: the first token of a completion is scored given something")
        alignment = self.aligner.align_batch(student_ids, teacher_ids)
        index = ChunkIndex.from_alignment(alignment, device)
        mask = token_mask(student_ids, index.kind.device)
        first = tuple(accumulate((len(row) + 1 for row in teacher_ids), initial=0))[:-1]
        return PairBatch(*sides, index, mask, None, first)

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
            teacher: the same of `teacher(**batch.teacher_inputs)`, which needs no gradient; or a teacher's `Scores`,
                of this batch or of the one that it was selected from; or whatever else `scores` takes; None where the
                loss asks for nothing.
            batch: from `prepare`.
            old_logprobs: `[B, Ts]`, of the policy that sampled, where another one is updated by now.
            denominator: what to divide by, so that micro-batches add up; None: the batch's own tokens, as the setting
                `aggregate` says.

        Raises:
            XTokMapError: rows that are not of this batch; a teacher that does not give what the loss needs.
        """
        device, rule = batch.completion_mask.device, self.rule
        if batch.chosen is not None and teacher is not None and not isinstance(teacher, Scores):
            return self._alone(student, teacher, batch, old_logprobs, denominator)
        rows = output_rows(student, batch.student_prompt_ids, batch.student_ids)
        scores = self.scores(teacher, batch)
        places = padded_places(batch.student_ids, batch.completion_mask.shape[1]).to(device)
        if denominator is None:
            counted = batch.completion_mask
            if self.settings.aggregate == "scored":
                counted = rule.scored(batch.index, counted, self.settings)
            denominator = counted.sum().clamp(min=1)
        found = LossInput(
            rows,
            places,
            flat_ids(batch.student_ids, device),
            batch.completion_mask,
            batch.index,
            self.settings,
            denominator,
            old_logprobs,
            interior=self._interior(batch) if rule.interior else None,
            maps=self.maps(device) if rule.keep else None,
            **({} if scores is None else scores.of(batch)),
        )
        computed = rule.compute(found)
        return measured(found, computed)

    def _alone(
        self, student: Any, teacher: Any, batch: PairBatch, old: Tensor | None, denominator: Tensor | float | None
    ) -> PairLoss:
        """The loss of some rows with a teacher that saw just these: as a batch of their own, which is narrower."""
        own = self.aligned(*batch.sides, device=batch.completion_mask.device)
        width = own.completion_mask.shape[1]
        old = None if old is None else old[:, :width]
        out = self.loss(student, teacher, own, old_logprobs=old, denominator=denominator)
        return out._replace(logprobs=pad(out.logprobs, (0, batch.completion_mask.shape[1] - width)))

    def scores(self, teacher: Any, batch: PairBatch) -> Scores | None:
        """What the loss needs of a teacher.

        Args:
            teacher: a `LocalTeacher` or `ServerTeacher`, which is asked; what a model returned for
                `batch.teacher_inputs`; or the `Scores` that there are already.
            batch: from `prepare`.
        """
        if self.rule.teacher == "nothing":
            return None
        if teacher is None:
            raise XTokMapError("this loss needs a teacher: its output, its logits, Logits or Scores")
        if isinstance(teacher, Scores):
            return teacher
        if isinstance(teacher, LocalTeacher | ServerTeacher):
            ids = batch.teacher_prompt_ids, batch.teacher_ids
            scores = teacher.score(*ids, queries=self.queries(batch), keep=self.rule.keep)
            if self.rule.teacher == "rows" and scores.rows is None:
                raise XTokMapError("this server gives no whole rows: ask for hidden states, or take 'cover'")
            return scores
        rows = output_rows(teacher, batch.teacher_prompt_ids, batch.teacher_ids, after=True)
        with torch.no_grad():
            return scores_of(rows.detach(), batch.teacher_ids, self.queries(batch), keep=self.rule.keep)

    def queries(self, batch: PairBatch) -> CoverQueries | None:
        """What the teacher's rows are asked, for a teacher's `score`; None for most losses."""
        if not self.rule.queries:
            return None
        # Aligned again: that costs less than to hand queries from a DataLoader's worker to here.
        alignment = self.aligner.align_batch(batch.student_ids, batch.teacher_ids)
        return self.aligner.cover_queries(alignment, rows=self.rule.keep)

    def _interior(self, batch: PairBatch) -> Any:
        alignment = self.aligner.align_batch(batch.student_ids, batch.teacher_ids)
        return self.aligner.interior_queries(alignment, width=batch.completion_mask.shape[1])

"""LocalTeacher: a causal language model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch

from xtokmap.boundary.cover import CoverQueries
from xtokmap.chat import PLAIN_TEMPLATE
from xtokmap.losses.queries import transfer
from xtokmap.teachers.remote import ServerTeacher
from xtokmap.teachers.scores import Prompted, Scores, check_queries, padded_found, scores_of
from xtokmap.torch.completions import (
    batched_logprobs,
    by_length,
    check_pairs,
    completion_rows,
    flat_ids,
    row_ends,
    spans,
    token_mask,
)
from xtokmap.torch.logits import Logits


class LocalTeacher(Prompted):
    """A causal language model in this process that scores token ids. It is never trained.

    Args:
        model: a transformers causal language model; moved nowhere, its device is used.
        tokenizer: its tokenizer.
        micro_batch: completions in one forward pass; they are taken in order of length.
        plain_template: the prompt format where the tokenizer has no chat template; must contain `{prompt}`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, micro_batch: int = 8, plain_template: str = PLAIN_TEMPLATE
    ) -> None:
        super().__init__(tokenizer, plain_template)
        self.model = model.eval().requires_grad_(False)
        self.micro_batch = micro_batch

    def score(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        *,
        queries: CoverQueries | None = None,
        transferred: bool | None = None,
        keep: bool = False,
    ) -> Scores:
        """Logprobs of the completions' tokens, each given its prompt and what precedes it.

        Args:
            prompt_ids: B rows, each of at least one id.
            completion_ids: B rows.
            queries: of the batch in which these completions were aligned, from `Aligner.cover_queries`.
            transferred: whether to evaluate them (`transfer`): what the teacher thinks of the student's own tokens. It
                is worked out beside the output head, a slice of rows at a time. None: where there are queries.
            keep: whether to keep the hidden states of the completions (the logits, of a model that is not made of a
                body and a head), from which whole distributions are made.

        Raises:
            XTokMapError: an empty prompt, different numbers of rows, queries of other completions or none.
        """
        check_pairs(prompt_ids, completion_ids)
        device = next(self.model.parameters()).device
        mask = token_mask(completion_ids, device)
        asked = queries is not None if transferred is None else transferred
        if not asked and not keep:
            return Scores(batched_logprobs(self.model, prompt_ids, completion_ids, self.micro_batch), mask)
        check_queries(queries, completion_ids, asked)
        cu = row_ends(completion_ids)
        flat = torch.zeros(int(cu[-1]), device=device)
        found = torch.full((0 if queries is None else len(queries.base),), torch.nan, device=device)
        kept: Logits | None = None
        for rows in by_length(prompt_ids, completion_ids, self.micro_batch):
            own = self.rows([prompt_ids[b] for b in rows], [completion_ids[b] for b in rows])
            if keep:  # in the order of the batch, and worked on below
                if kept is None:
                    kept = replace(own, rows=own.rows.new_zeros(len(flat) + len(completion_ids), own.rows.shape[-1]))
                kept.rows[spans(cu + np.arange(len(cu)), rows).to(device)] = own.rows
            elif queries is not None:
                part = transfer(own, flat_ids([completion_ids[b] for b in rows], device), queries.select(rows))
                flat[spans(cu, rows).to(device)] = part.logprobs.float()
                found[spans(queries.student_cu, rows).to(device)] = part.transferred.float()
        if kept is not None:
            return scores_of(kept, completion_ids, queries, keep=True)
        logprobs = torch.zeros(mask.shape, device=device).masked_scatter(mask, flat)
        return Scores(logprobs, mask, None if queries is None else padded_found(found, queries))

    @torch.no_grad()
    def rows(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> Logits:
        """Next-token logits at every place of the completions, in one forward pass, for `transfer` and the losses.

        Returns:
            Flat rows `[N + B]`: for each completion those that predict its n tokens, and the one after the last. Hidden
            states with their output head where the model is made of just these, so that no `[T, V]` is in memory.
        """
        return completion_rows(self.model, prompt_ids, completion_ids, after=True)


#: Whoever scores.
Teacher: TypeAlias = LocalTeacher | ServerTeacher

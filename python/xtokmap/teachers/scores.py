"""Scores: what a teacher says about completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.boundary.cover import CoverQueries
from xtokmap.chat import PromptLike, render, stop_id
from xtokmap.losses.queries import transfer
from xtokmap.losses.target import TransferTarget
from xtokmap.teachers.client import Client
from xtokmap.torch.batch import PairBatch
from xtokmap.torch.completions import flat_ids, flat_logprobs, row_ends, spans, token_mask
from xtokmap.torch.logits import Logits, TopK


@dataclass(frozen=True, eq=False)
class Scores:
    """What a teacher says about B completions.

    What a target can tell is worked out when it is asked for, which is a pass through the teacher's head: the loss
    goes through its rows once, and comes by all of it.

    Attributes:
        given_logprobs: float32 `[B, Tt]`, `logprobs` where there is no target.
        mask: bool `[B, Tt]`; where there is a token.
        given_transferred: float32 `[B, Ts]`, `transferred` where there is no target.
        rows: where kept; the flat rows `[N + B]` of `LocalTeacher.rows`, for losses of whole distributions.
        target: where kept and with queries; q*(u | s_<i) for `transfer_kl`.
        top: of a served teacher, where asked for; `[B, Tt]` rows of the likeliest tokens and its own, for `strict_kl`.
        missing: where there is `top`; float32 `[B, Tt]`, the mass of each row that it does not show; 0 on padding.
    """

    given_logprobs: Tensor | None
    mask: Tensor
    given_transferred: Tensor | None = None
    rows: Logits | None = None
    target: TransferTarget | None = None
    top: TopK | None = None
    missing: Tensor | None = None

    @property
    def logprobs(self) -> Tensor:
        """float32 `[B, Tt]`; `logprobs[b, i]` scores token i of completion b, in nats; 0 on padding (right)."""
        if self.given_logprobs is not None:
            return self.given_logprobs
        assert self.target is not None
        return self.target.logprobs(self.mask.shape[1])

    @property
    def transferred(self) -> Tensor | None:
        """float32 `[B, Ts]`, where asked for; log q*(s_i | s_<i) of student token i, as the ids lay that were aligned.

        NaN where there is no query and on padding.
        """
        return self.given_transferred if self.target is None else self.target.transferred()

    def of(self, batch: PairBatch) -> dict[str, Any]:
        """What a loss is given of the teacher (`LossInput`): the batch's rows among those that were scored."""
        device = batch.completion_mask.device
        chosen = None if batch.chosen is None else torch.tensor(batch.chosen, dtype=torch.long, device=device)

        def rows(x: Tensor | None) -> Tensor | None:
            return x if x is None else x.to(device) if chosen is None else x.to(device)[chosen]

        target = self.target
        if target is not None and batch.chosen is not None:
            target = target.select(batch.chosen)
        teacher_rows: Logits | TopK | None = None
        if self.rows is not None:
            first = torch.tensor(batch.teacher_first, dtype=torch.long, device=device)
            among = torch.arange(batch.index.teacher_chunk.shape[1], device=device)
            lengths = torch.tensor([len(row) for row in batch.teacher_ids], device=device)
            teacher_rows = self.rows.at(torch.where(among < lengths[:, None], first[:, None] + among, -1))
        elif self.top is not None:
            teacher_rows = self.top.to(device)
            if chosen is not None:
                width = teacher_rows.shape[1]
                teacher_rows = teacher_rows.at(chosen[:, None] * width + torch.arange(width, device=device))
        return {
            "teacher_logprobs": rows(self.given_logprobs),
            "transferred": rows(self.given_transferred),
            "target": target,
            "teacher_rows": teacher_rows,
        }


class Prompted:
    """What every teacher has of its tokenizer, wherever its weights are."""

    def __init__(self, tokenizer: Any, plain_template: str) -> None:
        self.tokenizer = tokenizer
        self.plain_template = plain_template
        self.stop_id = stop_id(tokenizer)

    @property
    def clients(self) -> list[Client]:
        """Of the servers that are asked: of a teacher here none."""
        return []

    def too_long(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> tuple[list[int], str]:
        """Which rows it does not take, and what to do about them: none."""
        return [], ""

    def render(self, prompts: Sequence[PromptLike]) -> list[list[int]]:
        """Every prompt as the ids after which this model would answer."""
        return render(self.tokenizer, prompts, self.plain_template)


def check_queries(queries: CoverQueries | None, completion_ids: Sequence[Sequence[int]], asked: bool) -> None:
    """Raises where queries are wanted and missing, or of other completions."""
    if asked and queries is None:
        raise XTokMapError("transferred=True needs queries=aligner.cover_queries(batch) of these completions")
    if queries is not None and np.diff(queries.teacher_cu).tolist() != [len(row) for row in completion_ids]:
        raise XTokMapError("queries are of other completions: their rows have other numbers of teacher tokens")


def padded_found(found: Tensor, queries: CoverQueries) -> Tensor:
    """What was found of every student token, `[B, Ts]`, NaN on padding."""
    places, shape = queries.places()
    padded = torch.full((shape[0] * shape[1],), torch.nan, device=found.device)
    padded[torch.from_numpy(places).to(found.device)] = found
    return padded.view(shape)


def scores_of(
    rows: Logits, completion_ids: Sequence[Sequence[int]], queries: CoverQueries | None = None, *, keep: bool = False
) -> Scores:
    """Scores from a teacher's rows.

    Args:
        rows: flat `[N + B]`: for each completion those that predict its n tokens, and the one after the last.
        completion_ids: B rows of N tokens together.
        queries: of the batch in which these completions were aligned, to be evaluated.
        keep: whether to keep the rows, and with queries the whole q*.
    """
    device = rows.rows.device
    mask = token_mask(completion_ids, device)
    ids = flat_ids(completion_ids, device)
    if queries is not None and keep:
        return Scores(None, mask, None, rows, TransferTarget(rows, ids, queries))
    if queries is not None:
        part = transfer(rows, ids, queries)
        logprobs = torch.zeros(mask.shape, device=device).masked_scatter(mask, part.logprobs.float())
        return Scores(logprobs, mask, padded_found(part.transferred.float(), queries))
    cu = row_ends(completion_ids)
    own = spans(cu + np.arange(len(cu)), range(len(completion_ids)), but_last=True).to(device)
    flat = flat_logprobs(rows.at(own), ids)
    logprobs = torch.zeros(mask.shape, device=device).masked_scatter(mask, flat)
    return Scores(logprobs, mask, rows=rows if keep else None)

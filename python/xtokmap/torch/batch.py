"""PairBatch: completions as both sides have them, on their way from `Pair.prepare` to `Pair.loss`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtokmap.torch.completions import padded_inputs
from xtokmap.torch.index import ChunkIndex

Ids = list[list[int]]

#: The ids of a batch.
SIDES = ("student_prompt_ids", "student_ids", "teacher_prompt_ids", "teacher_ids")


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
    def sides(self) -> tuple[Ids, Ids, Ids, Ids]:
        """`SIDES` in order."""
        return self.student_prompt_ids, self.student_ids, self.teacher_prompt_ids, self.teacher_ids

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
        at = torch.tensor(rows, dtype=torch.long, device=self.completion_mask.device)
        chosen = rows if self.chosen is None else [self.chosen[b] for b in rows]
        return replace(
            self,
            **dict(zip(SIDES, ([side[b] for b in rows] for side in self.sides), strict=True)),
            index=self.index.rows(at),
            completion_mask=self.completion_mask[at],
            chosen=tuple(chosen),
            teacher_first=tuple(self.teacher_first[b] for b in rows),
        )


def _inputs(prompts: Ids, completions: Ids, device: torch.device) -> dict[str, Tensor]:
    rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    return padded_inputs(rows, device)

"""How chunks travel through verl: in the K columns of `teacher_ids` and `teacher_logprobs`.

verl carries two tensors `[S, K]` beside the S tokens of a prompt and its response, through padding, balancing and
micro-batches; row i belongs to token i + 1. They are meant for the teacher's top k of a common vocabulary. Across
vocabularies every student token gets, in its row, what a credit has to know of its chunk: of the ids the chunk's
number, its kind, how many teacher tokens it has and how many bytes the student token spells; of the logprobs the sum of
the chunk's teacher logprobs, and zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.torch.index import ChunkIndex

#: K.
COLUMNS = 4


def lay(index: ChunkIndex, teacher_logprobs: Tensor, prompt_length: int, length: int) -> tuple[Tensor, Tensor]:
    """One response's chunks as columns.

    Args:
        index: of the one row.
        teacher_logprobs: `[Tt]`; nats.
        prompt_length: tokens of the student's prompt.
        length: tokens of the student's response.

    Returns:
        int32 and float32 `[prompt_length + length, COLUMNS]`; chunk -1 in rows that score no token in a chunk.
    """
    ids = torch.zeros((prompt_length + length, COLUMNS), dtype=torch.int32)
    logprobs = torch.zeros(ids.shape)
    ids[:, 0] = -1
    chunk = index.student_chunk[0, :length]
    rows = prompt_length - 1 + torch.arange(length)
    aligned = chunk >= 0
    # Numbered by those that have student tokens: there are no more of them than tokens.
    ids[rows[aligned], 0] = torch.unique(chunk[aligned], return_inverse=True)[1].int()
    for column, of_chunk in ((1, index.kind), (2, index.teacher_count)):
        ids[rows, column] = index.to_student(of_chunk)[0, :length].int()
    ids[rows, 3] = index.student_len[0, :length].int()
    logprobs[rows, 0] = index.to_student(index.sum_teacher(teacher_logprobs[None]))[0, :length].float()
    return ids, logprobs


def read(ids: Tensor, logprobs: Tensor, mask: Tensor) -> tuple[Tensor, ChunkIndex]:
    """Columns of responses, row i belonging to token i, as what a credit takes.

    Args:
        ids: integers `[B, R, COLUMNS]`.
        logprobs: `[B, R, COLUMNS]`.
        mask: bool `[B, R]`; response tokens, the rest being padding of any content.

    Returns:
        float32 `[B, R]` teacher logprobs, a whole chunk's as one token's, and the index of student tokens and those.
        It has no places of teacher tokens, which no longer are there.

    Raises:
        XTokMapError: another number of columns: the teacher was asked by something else.
    """
    if ids.shape[-1] != COLUMNS or logprobs.shape != ids.shape:
        raise XTokMapError(
            f"teacher_ids {tuple(ids.shape)} and teacher_logprobs {tuple(logprobs.shape)}, not {COLUMNS} columns: the "
            "losses xtokmap_* need the worker of xtokmap.integrations.verl.agent_loop; set agent_loop_manager_class"
        )
    rows, width = mask.shape
    ids = torch.where(mask[..., None], ids.long(), 0)
    chunk = torch.where(mask, ids[..., 0], 0) - (~mask).long()
    slot = torch.where(chunk >= 0, chunk, width)

    def of_chunk(column: Tensor, none: int) -> Tensor:
        """What every token of a chunk says of it."""
        return column.new_full((rows, width + 1), none).scatter(1, slot, column)[:, :width]

    counts = chunk.new_zeros(rows, width + 1).scatter_add(1, slot, torch.ones_like(slot))[:, :width]
    teacher_count = of_chunk(ids[..., 2], 0)
    among = torch.arange(width, device=chunk.device).expand(rows, width)
    nowhere = torch.full_like(chunk, -1)
    index = ChunkIndex(
        student_chunk=chunk,
        teacher_chunk=torch.where(teacher_count > 0, among, -1),
        num_chunks=(counts > 0).sum(1),
        kind=of_chunk(ids[..., 1], -1),
        student_len=ids[..., 3],
        student_count=counts,
        teacher_count=teacher_count,
        teacher_pos=nowhere,
        teacher_off=nowhere,
    )
    return of_chunk(logprobs[..., 0].float(), 0), index

"""`transfer_kl`: the divergence from the teacher's whole distribution as the student's vocabulary sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.losses.target import TransferTarget
from xtokmap.losses.terms import STOP, Loss, check_beta, divergence, reduce_terms
from xtokmap.torch.index import ChunkIndex
from xtokmap.torch.logits import _SLICE, Logits, map_rows


def transfer_kl(
    student: Logits,
    target: TransferTarget,
    index: ChunkIndex,
    *,
    student_ids: Tensor | None = None,
    transferred: Tensor | None = None,
    beta: float = 1.0,
    clamp: float = 10.0,
    stops: bool = True,
    floor: float = 1e-2,
    mask: Tensor | None = None,
    size: int | None = None,
    denominator: Tensor | float | None = None,
) -> Loss:
    """Divergence between the student and the teacher as the student's vocabulary sees it (xtokmap's own).

    The target is q*(u | s_<i), see `TransferTarget`. Mass on a token that the teacher may go on from to a longer
    student token is known of the two together, so the divergence is over such events e; and over the rest, the student
    tokens that get no mass. Which token of the event it is, is learned from the sampled one: its term is

        D(p(e) || q*(e)) - A log p(s_i),   A = log q*(s_i | e) - log p(s_i | e), clipped,

    whose expected gradient for beta = 1 is that of KL(p || q*), by the chain rule of the divergence. Events of one
    token have A = 0: with one tokenizer on both sides it is the exact per-token KL.

    Args:
        student: `[B, Ts]` rows.
        target: of the same batch.
        index: of the same batch.
        student_ids: int64 `[B, Ts]`; the sampled tokens, needed with `transferred`.
        transferred: `[B, Ts]`, from `LocalTeacher.score` or `transfer`; None leaves the second part out.
        beta: 1 is KL(p || q*), 0 is KL(q* || p), between them the generalized Jensen-Shannon divergence.
        clamp: largest absolute A.
        stops: whether the end of a turn counts; False leaves its mass out on both sides.
        floor: least probability of the rest, so that mass which the student has where the teacher has none costs no
            more than -log floor nats.
        mask: bool or 0/1 `[B, Ts]`; the response tokens.
        size: rows of a slice; None takes 64 MiB of float32 for the larger vocabulary.
        denominator: what to divide by instead of the number of scored tokens, so that micro-batches add up.

    Returns:
        The loss; figures `undetermined` (mass known of several tokens together), `rest` (mass known of none), `shared`
        (share of the scored tokens whose event has several). It costs a head pass (two with a gradient) of either side
        beside that of `transfer`.

    Raises:
        XTokMapError: shapes that do not fit, beta outside [0, 1].
    """
    check_beta(beta)
    places, shape = target.places()
    if tuple(student.shape) != shape or tuple(index.student_chunk.shape) != shape:
        raise XTokMapError(
            f"student rows {tuple(student.shape)} and index {tuple(index.student_chunk.shape)}; the queries: {shape}"
        )
    if transferred is not None and student_ids is None:
        raise XTokMapError("transferred= needs student_ids=, the tokens that it is of")
    device = student.rows.device
    ids = torch.zeros(shape, dtype=torch.long, device=device) if student_ids is None else student_ids
    sampled = torch.full(shape, torch.nan, device=device) if transferred is None else transferred.detach().float()
    stop_ids = [] if stops else list(target.queries.vocab_map.student_stops)
    event, members = target._event, target._members

    def on_slice(x: Tensor, part: tuple[Tensor, Tensor, Tensor], ids: Tensor, sampled: Tensor) -> tuple[Tensor, ...]:
        q, rest, undetermined = (t.to(x) for t in part)
        if stop_ids:
            stop = torch.tensor(stop_ids, device=x.device)
            left = (1 - q[:, stop].sum(-1)).clamp(min=floor)
            q, rest = q.index_fill(1, stop, 0) / left[:, None], rest / left
            sampled = sampled - left.log()
            x = x.index_fill(1, stop, -torch.inf)
        log_p = x.log_softmax(-1)
        into = event.expand(len(x), -1)
        p = torch.zeros_like(log_p).scatter_add(1, into, log_p.exp())
        q = torch.zeros_like(log_p).scatter_add(1, into, q)
        there = q > 0
        p_rest = torch.where(there, 0, p).sum(-1, keepdim=True)
        # What the student cannot say at all is no bin: it would make a forward KL infinite, and has no gradient.
        q_rest = torch.where(p_rest > 0, rest.clamp(min=floor)[:, None], 0)
        p_bins, q_bins = _log(torch.cat([torch.where(there, p, 0), p_rest], 1)), _log(torch.cat([q, q_rest], 1))
        value = divergence(p_bins, q_bins, beta)
        own = ids[:, None]
        bin_of = torch.where(there.gather(1, event[own]), event[own], q.shape[1])
        several = (members[ids] > 1) | (bin_of[:, 0] == q.shape[1])
        chosen = log_p.gather(1, own)[:, 0]
        a = (sampled - q_bins.gather(1, bin_of)[:, 0]) - (chosen - p_bins.gather(1, bin_of)[:, 0])
        a = torch.where(several & torch.isfinite(sampled), a, 0).detach().clamp(-clamp, clamp)
        value = value - torch.where(a != 0, a * torch.where(a != 0, chosen, 0), 0)
        return value, undetermined, rest, several.to(x.dtype)

    scored = torch.zeros(shape, dtype=torch.bool, device=device)
    rows = torch.from_numpy(places).to(device)
    scored.view(-1)[rows] = True
    if not stops:
        scored &= index.kind_of_student() != STOP
    size = size or max(1, _SLICE // max(student.vocab_size, target.teacher.vocab_size))
    terms, undetermined, rest, several = map_rows(on_slice, student, target, ids, sampled, size=size, rows=rows)
    return reduce_terms(terms, scored, index, mask, denominator, undetermined=undetermined, rest=rest, shared=several)


def _log(x: Tensor) -> Tensor:
    """log x, -inf at 0 without a NaN in the gradient."""
    return torch.where(x > 0, torch.where(x > 0, x, 1).log(), -torch.inf)

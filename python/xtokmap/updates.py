"""The update of a step: the loss that `Config` names, its gradient in micro-batches, and the optimizer's step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor

from xtokmap.alignment import Kind
from xtokmap.config import WHOLE, Config
from xtokmap.health import ENTROPY_ROWS, entropy_sum
from xtokmap.losses import byte_kl, chunk_credit, chunk_gap, policy_loss, transfer_kl
from xtokmap.processes import add_up_and_clip, is_sharded
from xtokmap.rollouts import Roller, Rollouts
from xtokmap.teacher import by_length, padded_logprobs, padded_places
from xtokmap.torch import ChunkIndex, Logits


def update(roller: Roller, rollouts: Rollouts, optimizer: torch.optim.Optimizer, watch: bool = True) -> dict[str, Any]:
    """One or more optimizer steps on a batch; gradients of micro-batches add up to the whole batch's.

    Of several processes each has its share of the batch's rows, at least one, and the gradients add up as well.

    Returns:
        Per-row sums of nats and bytes of the gap to the teacher (reverse KL on the student's samples, forward KL on the
        teacher's) for this process' rows, with the logprobs `[B, Ts]` and the entropies (their sum and number, with
        `watch`); loss, counts, and the gradient norm of the whole batch; all of the policy before the update.
    """
    processes = roller.processes
    config, student, index, teacher = roller.config, roller.student, rollouts.index, rollouts.teacher
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    width = index.student_chunk.shape[1]
    response = torch.arange(width) < torch.tensor(rollouts.lengths)[:, None]
    response = response.to(roller.device)
    loss_of = _loss_of(config)

    scored = _but_stops(response & (index.to_student((index.teacher_count > 0).long()) > 0), index, config)
    if config.rule == "imitation":
        scored = response
    elif config.rule == "strict":
        scored &= index.strict_teacher_pos() >= 0
    denominator = processes.sum((response if config.aggregate == "response" else scored).sum()).clamp(min=1)

    student.eval()  # no dropout: what is updated is the policy that sampled
    old_logprobs = rollouts.old_logprobs
    if old_logprobs is None and config.updates > 1 and loss_of is _policy_loss:
        old_logprobs = roller.all_logprobs(rollouts)

    nats = torch.zeros(len(rollouts.prompts), device=roller.device)
    nbytes = torch.zeros(len(rollouts.prompts), dtype=torch.long, device=roller.device)
    logprobs = torch.zeros(response.shape, device=roller.device)
    entropy = torch.zeros(2, dtype=torch.float64, device=roller.device)
    every = -(-sum(rollouts.lengths) // ENTROPY_ROWS) or 1
    figures: dict[str, Tensor] = {}
    skipped = 0
    batches = list(by_length(rollouts.prompt_ids, rollouts.completion_ids, config.micro_batch))
    # A layer that is parted is put together by all processes at once: they make as many passes, the last for nothing.
    more = max(processes.gather(len(batches))) - len(batches) if is_sharded(student) else 0
    for turn in range(config.updates):
        loss_sum = torch.zeros((), device=roller.device)
        for rows in batches:
            at = torch.tensor(rows, device=roller.device)
            flat = roller.rows(rollouts, rows)
            old = None if old_logprobs is None else old_logprobs[at]
            part = _MicroBatch(roller, rollouts, rows, at, flat, old, response[at], denominator)
            loss, own, found = loss_of(part)
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum = loss_sum + loss.detach()
            if turn == 0:
                logprobs[at] = own
                if watch:
                    entropy += entropy_sum(flat, every)
                if teacher is not None:
                    theirs = teacher.logprobs.to(roller.device)[at]
                    gap, nbytes[at] = chunk_gap(own, theirs, index.rows(at), stops=config.score_stop)
                    nats[at] = gap if config.method == "opd" else -gap
                for name, value in found.items():
                    figures[name] = figures.get(name, 0) + value
        for _ in range(more):
            (roller.rows(rollouts, batches[0][:1]).rows.sum() * 0).backward()  # type: ignore[no-untyped-call]
        loss_sum = processes.sum(loss_sum)
        norm = add_up_and_clip(parameters, config.grad_clip, processes)
        # The step's only question to the device.
        if bool(torch.isfinite(norm) & torch.isfinite(loss_sum)):
            optimizer.step()
        else:
            skipped += 1
            warnings.warn("the loss or the gradient is not finite: this update was skipped", stacklevel=2)
        optimizer.zero_grad(set_to_none=True)
    for name in sorted(processes.gather(sorted(figures))[0]) if processes.count > 1 else ():
        figures[name] = processes.sum(figures[name])
    counts = {"nats": nats, "bytes": nbytes, "loss": loss_sum, "grad_norm": norm, "skipped": skipped}
    return {**counts, "figures": figures, "logprobs": logprobs, "entropy": entropy}


@dataclass(frozen=True)
class _MicroBatch:
    """Some rows of a batch, and what a loss over them needs.

    Attributes:
        roller: student, teacher and config.
        rollouts: the whole batch.
        rows: which rows these are; `at`: the same, int64 on the device.
        flat: the student's rows that score their tokens, with a gradient.
        old_logprobs: `[b, T]`, of the policy that sampled; None: the one that is updated.
        response: bool `[b, T]`, where there is a token.
        denominator: of the whole batch's loss.
    """

    roller: Roller
    rollouts: Rollouts
    rows: list[int]
    at: Tensor
    flat: Logits
    old_logprobs: Tensor | None
    response: Tensor
    denominator: Tensor

    @property
    def completions(self) -> list[list[int]]:
        """The answers of these rows, as the student's tokens."""
        return [self.rollouts.completion_ids[b] for b in self.rows]

    @property
    def logprobs(self) -> Tensor:
        """`[b, T]`, of the policy that is updated, with a gradient."""
        return padded_logprobs(self.flat, self.completions, self.response.shape[1])


#: A loss over some rows of a batch, the policy's own logprobs of their tokens, and sums over tokens to report.
_Part: TypeAlias = "tuple[Tensor, Tensor, dict[str, Tensor]]"


def _loss_of(config: Config) -> Callable[[_MicroBatch], _Part]:
    if config.rule == "imitation":
        return _imitation_loss
    return _whole_loss if config.rule in WHOLE else _policy_loss


def _imitation_loss(part: _MicroBatch) -> _Part:
    """The negative logprobs of the answers: supervised fine-tuning."""
    logprobs, response = part.logprobs, part.response
    finite = torch.isfinite(logprobs.detach())
    loss = -torch.where(response & finite, logprobs, 0).sum() / part.denominator
    figures = {"scored": (response & finite).sum(), "nonfinite": (response & ~finite).sum()}
    return loss, logprobs.detach(), figures


def _policy_loss(part: _MicroBatch) -> _Part:
    """The policy gradient: the teacher's logprobs of sampled tokens as advantages."""
    config, device, at, response = part.roller.config, part.roller.device, part.at, part.response
    index, teacher = part.rollouts.index.rows(at), part.rollouts.teacher
    assert teacher is not None
    logprobs = part.logprobs
    old = logprobs.detach() if part.old_logprobs is None else part.old_logprobs
    given = chunk_credit(
        old,
        teacher.logprobs.to(device)[at],
        index,
        config.rule,  # type: ignore[arg-type]
        None if teacher.transferred is None else teacher.transferred.to(device)[at],
        config.clamp,
        max_chunk_tokens=config.max_chunk_tokens or None,
    )
    scored = _but_stops(given.scored & response, index, config)
    loss = policy_loss(
        logprobs,
        old,
        given.advantages,
        response,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        clip_dual=config.clip_dual,
        scored=scored,
        denominator=part.denominator,
    )
    names = ("clamped", "fallback", "nonfinite")
    sums = {name: (getattr(given, name) & response).sum() for name in names}
    return loss, old, {"scored": scored.sum(), **sums}


def _whole_loss(part: _MicroBatch) -> _Part:
    """A divergence between the student's and the teacher's whole distributions."""
    roller, rollouts, rows, at, flat = part.roller, part.rollouts, part.rows, part.at, part.flat
    config, device, teacher = roller.config, roller.device, rollouts.teacher
    assert teacher is not None
    completions, response = part.completions, part.response
    width = response.shape[1]
    own = padded_logprobs(flat.detach(), completions, width)
    places = padded_places(completions, width).to(device)
    student = flat.at(_inverse(places, (len(rows), width)))
    common: Any = {"beta": config.beta, "mask": response, "denominator": part.denominator}
    if config.rule == "transfer_kl":
        assert teacher.target is not None
        assert teacher.transferred is not None
        ids = torch.zeros_like(response, dtype=torch.long).view(-1)
        ids[places] = torch.tensor([i for row in completions for i in row], device=device)
        loss = transfer_kl(
            student,
            teacher.target.select(rows),
            rollouts.index.rows(at),
            student_ids=ids.view(len(rows), width),
            transferred=teacher.transferred[at],
            clamp=config.clamp,
            stops=config.score_stop,
            **common,
        )
        names: tuple[str, ...] = ("undetermined", "rest", "shared")
    else:
        assert teacher.rows is not None
        teacher_ids = [rollouts.teacher_ids[b] for b in rows]
        # Aligned again, as wide as the batch: what is cheap need not be kept.
        batch = roller.aligner.align_batch(completions, teacher_ids)
        queries = roller.aligner.interior_queries(batch, width=width)
        index = rollouts.index.rows(at)
        before = list(accumulate((len(row) + 1 for row in rollouts.teacher_ids), initial=0))
        first = torch.tensor([before[b] for b in rows], device=device)
        among = torch.arange(index.teacher_chunk.shape[1], device=device)
        lengths = torch.tensor([len(row) for row in teacher_ids], device=device)
        row_of = torch.where(among < lengths[:, None], first[:, None] + among, -1)
        mask = _but_stops(response, index, config)
        maps = roller.vocab_tensors
        loss = byte_kl(student, teacher.rows.at(row_of), index, maps, queries, **{**common, "mask": mask})
        names = ("residual",)
    tokens = loss.figures["tokens"]
    sums = {name: loss.figures[name] * tokens for name in names}
    return loss.loss, own, {"scored": tokens, "nonfinite": loss.figures["nonfinite"], **sums}


def _but_stops(tokens: Tensor, index: ChunkIndex, config: Config) -> Tensor:
    """Without ends of turns, where these are not scored."""
    return tokens if config.score_stop else tokens & (index.kind_of_student() != int(Kind.STOP))


def _inverse(places: Tensor, shape: tuple[int, int]) -> Tensor:
    """Which flat token lies at each place of `shape`; -1 on padding."""
    of = torch.full((shape[0] * shape[1],), -1, dtype=torch.long, device=places.device)
    of[places] = torch.arange(len(places), device=places.device)
    return of.view(shape)

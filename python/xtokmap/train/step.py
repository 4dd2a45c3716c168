"""One step of on-policy distillation, from top to bottom: sample, pair, score, loss, backward, clip, step.

Different from a textbook PPO step: there is no value function and no reward model. The signal is the teacher's, of the
student's own tokens, by whichever entry of `xtokmap.losses.LOSSES` the run has.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xtokmap.chat import PromptLike
from xtokmap.torch.completions import by_length
from xtokmap.torch.logits import Logits
from xtokmap.torch.mixture import mixed, shares
from xtokmap.train.rollouts import Rollouts
from xtokmap.train.sampling import Roller
from xtokmap.train.support.distributed import Gradients

#: Looks at the student's rows of every micro-batch, of the policy before the update, and at what is known of them.
Watch = Callable[[Logits, Tensor | None], None]


@dataclass(frozen=True, eq=False)
class StepResult:
    """What a step did; tensors of this rank's rows; sums over all ranks where it says so.

    Attributes:
        rollouts: what was sampled and scored.
        loss: float32 scalar, of the whole batch, over all ranks.
        grad_norm: likewise, before it was clipped.
        skipped: updates that were not made, as loss or gradient were not finite.
        nats: float32 `[B]`; the gap to the teacher (reverse KL on the student's samples, forward KL on the teacher's).
        nbytes: int64 `[B]`; the bytes that it is of.
        logprobs: float32 `[B, Ts]`; the student's own, before the update.
        sums: by name, over tokens of all ranks: `PairLoss.sums` but for `nats` and `bytes`.
    """

    rollouts: Rollouts
    loss: Tensor
    grad_norm: Tensor
    skipped: int
    nats: Tensor
    nbytes: Tensor
    logprobs: Tensor
    sums: dict[str, Tensor]


def step(
    roller: Roller, prompts: Sequence[PromptLike], optimizer: torch.optim.Optimizer, watch: Watch | None = None
) -> StepResult:
    """One step on some prompts: this rank's share of them.

    Args:
        roller: student, teacher, their `Pair`, and the config.
        prompts: at least one.
        optimizer: of the student's parameters.
        watch: see `Watch`.
    """
    rollouts = roller.sample(prompts)  # the student answers; its ids are paired with the teacher's
    rollouts = roller.score(rollouts)  # the teacher says what it thinks of them
    return update(roller, rollouts, optimizer, watch)


def update(
    roller: Roller, rollouts: Rollouts, optimizer: torch.optim.Optimizer, watch: Watch | None = None
) -> StepResult:
    """The second half of `step`: one or more optimizer steps on a batch that the teacher has scored.

    Gradients of micro-batches add up to the whole batch's, and so do those of several ranks, each of which has at
    least one row.
    """
    config, pair, batch = roller.config, roller.pair, rollouts.batch
    gradients = Gradients(roller.student, optimizer, config.grad_clip, roller.processes)
    roller.student.eval()  # no dropout: what is updated is the policy that sampled
    mask = batch.completion_mask
    counted = mask if config.aggregate == "response" else pair.rule.scored(batch.index, mask, pair.settings)
    denominator = gradients.total(counted.sum()).clamp(min=1)
    old_logprobs = rollouts.old_logprobs
    if old_logprobs is None and config.updates > 1 and pair.rule.on_policy:
        old_logprobs = roller.all_logprobs(rollouts.batch)

    nats = torch.zeros(len(batch), device=mask.device)
    nbytes = torch.zeros(len(batch), dtype=torch.long, device=mask.device)
    logprobs = torch.zeros(mask.shape, device=mask.device)
    sums: dict[str, Tensor] = {}
    skipped = 0
    micro_batches = list(by_length(batch.student_prompt_ids, batch.student_ids, config.micro_batch))
    missing = gradients.missing(len(micro_batches))
    for turn in range(config.updates):
        total = torch.zeros((), device=mask.device)
        for rows in micro_batches:
            at, some = torch.tensor(rows, device=mask.device), batch.select(rows)
            flat = roller.rows(some)
            old = None if old_logprobs is None else old_logprobs[at]
            if rollouts.views:
                each = shares(rollouts.views, flat, rows, old_logprobs=old, denominator=denominator)
                found = mixed(each, mask.shape[1], len(rows))
            else:
                found = pair.loss(flat, rollouts.teacher, some, old_logprobs=old, denominator=denominator)
            value = found.loss
            if roller.anchor is not None:
                held, found.sums["anchor"] = roller.anchor.loss(flat, some, denominator)
                value = value + held
            value.backward()  # type: ignore[no-untyped-call]
            total = total + value.detach()
            if turn == 0:  # of the policy before the update
                logprobs[at] = found.logprobs
                gap, bytes_ = (found.sums.pop(name, None) for name in ("nats", "bytes"))
                if gap is not None and bytes_ is not None:
                    nats[at], nbytes[at] = gap if config.method == "opd" else -gap, bytes_.long()
                sums = {name: sums.get(name, 0) + value for name, value in found.sums.items()}
                if watch is not None:
                    watch(flat, found.entropy)
        for _ in range(missing):
            (roller.rows(batch.select(micro_batches[0][:1])).rows.sum() * 0).backward()  # type: ignore[no-untyped-call]
        loss = gradients.total(total)
        norm = gradients.clip()
        # The step's only question to the device.
        if bool(torch.isfinite(norm) & torch.isfinite(loss)):
            optimizer.step()
        else:
            skipped += 1
            warnings.warn("the loss or the gradient is not finite: this update was skipped", stacklevel=2)
        optimizer.zero_grad(set_to_none=True)
    return StepResult(rollouts, loss, norm, skipped, nats, nbytes, logprobs, gradients.totals(sums))

"""What `Pair.loss` returns: a loss, and what to watch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from xtokmap.alignment import Kind
from xtokmap.losses.credit import chunk_gap
from xtokmap.losses.rule import Computed, LossInput
from xtokmap.torch.index import coverage_counts


class PairLoss(NamedTuple):
    """What `Pair.loss` returns.

    Attributes:
        loss: float32 scalar, with a gradient.
        metrics: scalars by name, without a gradient and not read back from the device: `kl_per_byte` (nats, of the
            student's samples: a sampled reverse KL), `scored` (share of the tokens), `coverage/ONE_TO_ONE` and so on
            (share of the tokens by kind of chunk), and means over the scored tokens: `clamped` and `fallback` of a
            credit, `undetermined`, `rest` and `shared` of transfer_kl (mass left undecided), `nonfinite`.
        logprobs: float32 `[B, Ts]`; the student's own, without a gradient.
        sums: what `means` makes the metrics of, to be added up over micro-batches first; scalars, and `nats` and
            `bytes`, `[B]`.
        entropy: float32 `[N]` or None; of the student's distributions at its tokens, flat, in nats, without a gradient,
            where the loss came by it; NaN where it did not.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logprobs: Tensor
    sums: dict[str, Tensor]
    entropy: Tensor | None = None


def means(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The metrics of `PairLoss.sums`, of a batch or added up over several; `nats` and `bytes` may be summed up, too."""
    per_token = sums["tokens"].clamp(min=1)
    per_scored = sums["scored"].clamp(min=1)
    found = {
        name: value / (per_token if name == "scored" or name.startswith("coverage/") else per_scored)
        for name, value in sums.items()
        if name not in ("tokens", "nats", "bytes")
    }
    if "nats" in sums:
        found["kl_per_byte"] = sums["nats"].sum() / sums["bytes"].sum().clamp(min=1)
    return found


def measured(found: LossInput, computed: Computed) -> PairLoss:
    """A loss with its metrics, from what it was computed from."""
    own, counts = found.plain_logprobs, coverage_counts(found.index)
    sums = {name: value.detach() for name, value in computed.sums.items()}
    sums |= {"tokens": found.mask.sum(), **{f"coverage/{kind.name}": counts[kind] for kind in Kind}}
    if found.teacher_logprobs is not None:
        counted = {"stops": found.settings.score_stop, "markers": found.settings.score_markers}
        gap = chunk_gap(own, found.teacher_logprobs, found.index, **counted)
        sums["nats"], sums["bytes"] = gap
    return PairLoss(computed.loss, means(sums), own, sums, found.entropy)

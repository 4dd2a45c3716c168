"""The losses by name: what each asks of the teacher and of the alignment, how it is computed, and what it costs.

`Pair`, the training loop, its FLOPs and its checks read this table; nothing else compares names of losses. A loss of
your own is one more entry: `LOSSES["mine"] = LossRule(compute, teacher="logprobs")`.
"""

from __future__ import annotations

from functools import partial

from xtokmap._core import XTokMapError
from xtokmap.losses import bytes as bytewise
from xtokmap.losses import chunks, strict, transfer
from xtokmap.losses.credit import CREDITS, computed_imitation, computed_policy
from xtokmap.losses.rule import LossRule, met, met_alone

#: By name. `imitation` is supervised fine-tuning; the credits are policy gradients, the paper's among them.
LOSSES: dict[str, LossRule] = {
    "transfer_kl": LossRule(transfer.computed, teacher="rows", keep=True, queries=True, head_passes=(3, 1)),
    "byte_kl": LossRule(bytewise.computed, teacher="rows", keep=True, interior=True, head_passes=(3, 1)),
    **{
        credit: LossRule(
            partial(computed_policy, credit),
            teacher="top" if credit == "cover" else "logprobs",
            queries=credit == "cover",
            on_policy=True,
            scored=met_alone if credit == "strict" else met,
        )
        for credit in CREDITS
    },
    "strict_kl": LossRule(strict.computed, teacher="top", keep=True, scored=met_alone, head_passes=(3, 1)),
    "alm": LossRule(chunks.computed_alm),
    "uld_hybrid": LossRule(chunks.computed_uld_hybrid, teacher="rows", keep=True, head_passes=(7, 1)),
    "imitation": LossRule(computed_imitation, teacher="nothing", scored=lambda index, mask, settings: mask),
}


def rule_of(loss: str | LossRule) -> LossRule:
    """A rule by its name in `LOSSES`, or itself.

    Raises:
        XTokMapError: no such name.
    """
    if isinstance(loss, LossRule):
        return loss
    if loss not in LOSSES:
        raise XTokMapError(f"loss={loss!r}: use one of {', '.join(LOSSES)}, or a LossRule of your own")
    return LOSSES[loss]

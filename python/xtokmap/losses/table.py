"""The losses by name: what each asks of the teacher and of the alignment, how it is computed, and what it costs.

`Pair`, the training loop, its FLOPs and its checks read this table; nothing else compares names of losses. A loss of
your own is one more entry: `LOSSES["mine"] = LossRule(compute, teacher="logprobs")`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from xtokmap._core import XTokMapError
from xtokmap.losses.bytes import byte_kl
from xtokmap.losses.chunks import alm, uld_hybrid
from xtokmap.losses.credit import CREDITS, CreditRule, chunk_credit, policy_loss
from xtokmap.losses.rule import Computed, LossInput, LossRule, but_stops, met, met_alone
from xtokmap.losses.strict import strict_kl
from xtokmap.losses.terms import Loss
from xtokmap.losses.transfer import transfer_kl
from xtokmap.torch.logits import Logits, TopK


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


def _imitation(x: LossInput) -> Computed:
    """The negative logprobs of the answers: supervised fine-tuning."""
    finite = torch.isfinite(x.logprobs.detach())
    loss = -torch.where(x.mask & finite, x.logprobs, 0).sum() / x.denominator
    return Computed(loss, {"scored": (x.mask & finite).sum(), "nonfinite": (x.mask & ~finite).sum()})


def _policy(credit: CreditRule, x: LossInput) -> Computed:
    """The policy gradient: the teacher's logprobs of sampled tokens as advantages."""
    settings, teacher = x.settings, _there(x.teacher_logprobs, "teacher_logprobs")
    old = x.logprobs.detach() if x.old_logprobs is None else x.old_logprobs
    limit = settings.max_chunk_tokens or None
    given = chunk_credit(old, teacher, x.index, credit, x.transferred, settings.clamp, max_chunk_tokens=limit)
    scored = but_stops(given.scored & x.mask, x.index, settings)
    loss = policy_loss(
        x.logprobs,
        old,
        given.advantages,
        x.mask,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        clip_dual=settings.clip_dual,
        scored=scored,
        denominator=x.denominator,
    )
    flags = {"clamped": given.clamped, "fallback": given.fallback, "nonfinite": given.nonfinite}
    return Computed(loss, {"scored": scored.sum(), **{name: (flag & x.mask).sum() for name, flag in flags.items()}})


def _transfer_kl(x: LossInput) -> Computed:
    target = _there(x.target, "target")
    loss = transfer_kl(
        x.student,
        target,
        x.index,
        student_ids=x.student_ids,
        transferred=x.transferred,
        beta=x.settings.beta,
        clamp=x.settings.clamp,
        stops=x.settings.score_stop,
        mask=x.mask,
        denominator=x.denominator,
    )
    x.came_by(loss.logprobs, len(target))
    return _sums(loss, "undetermined", "rest", "shared")


def _byte_kl(x: LossInput) -> Computed:
    mask = but_stops(x.mask, x.index, x.settings)
    queries = _there(x.interior, "interior")
    common: Any = {"beta": x.settings.beta, "mask": mask, "denominator": x.denominator}
    return _sums(byte_kl(x.student, _rows(x), x.index, _there(x.maps, "maps"), queries, **common), "residual")


def _strict_kl(x: LossInput) -> Computed:
    common: Any = {
        "beta": x.settings.beta,
        "mask": met_alone(x.index, x.mask, x.settings),
        "denominator": x.denominator,
    }
    teacher = _there(x.teacher_rows, "teacher_rows")
    k = None if isinstance(teacher, TopK) else 16
    return _sums(strict_kl(x.student, teacher, x.index, _there(x.maps, "maps"), k=k, **common))


def _alm(x: LossInput) -> Computed:
    mask = but_stops(x.mask, x.index, x.settings)
    teacher = _there(x.teacher_logprobs, "teacher_logprobs")
    return _sums(alm(x.logprobs, teacher, x.index, mask=mask, denominator=x.denominator))


def _uld_hybrid(x: LossInput) -> Computed:
    loss = uld_hybrid(
        x.student,
        _rows(x),
        x.index,
        _there(x.maps, "maps"),
        student_logprobs=x.logprobs,
        teacher_logprobs=_there(x.teacher_logprobs, "teacher_logprobs"),
        stops=x.settings.score_stop,
        mask=x.mask,
        denominator=x.denominator,
    )
    return _sums(loss)


def _sums(loss: Loss, *means: str) -> Computed:
    """The figures of a `Loss` as sums over its tokens."""
    tokens = loss.figures["tokens"]
    sums = {name: loss.figures[name] * tokens for name in means}
    return Computed(loss.loss, {"scored": tokens, "nonfinite": loss.figures["nonfinite"], **sums})


def _there(value: Any, name: str) -> Any:
    if value is None:
        raise XTokMapError(f"this loss needs {name}, which the teacher or the alignment was not asked for")
    return value


def _rows(x: LossInput) -> Logits:
    if not isinstance(x.teacher_rows, Logits):
        raise XTokMapError("this loss needs whole teacher rows: logits, or hidden states and their head")
    return x.teacher_rows


#: By name. `imitation` is supervised fine-tuning; the credits are policy gradients, the paper's among them.
LOSSES: dict[str, LossRule] = {
    "transfer_kl": LossRule(_transfer_kl, teacher="rows", keep=True, queries=True, head_passes=(3, 1)),
    "byte_kl": LossRule(_byte_kl, teacher="rows", keep=True, interior=True, head_passes=(5, 2)),
    **{
        credit: LossRule(
            partial(_policy, credit),
            teacher="top" if credit == "cover" else "logprobs",
            queries=credit == "cover",
            on_policy=True,
            scored=met_alone if credit == "strict" else met,
        )
        for credit in CREDITS
    },
    "strict_kl": LossRule(_strict_kl, teacher="top", keep=True, scored=met_alone, head_passes=(5, 2)),
    "alm": LossRule(_alm),
    "uld_hybrid": LossRule(_uld_hybrid, teacher="rows", keep=True, head_passes=(7, 2)),
    "imitation": LossRule(_imitation, teacher="nothing", scored=lambda index, mask, settings: mask),
}

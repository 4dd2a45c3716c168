"""The losses by name: what each asks of the teacher and of the alignment, how it is computed, and what it costs.

`Pair`, the training loop, its FLOPs and its checks read this table; nothing else compares names of losses. A loss of
your own is one more entry: `LOSSES["mine"] = LossRule(compute, teacher="logprobs")`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.alignment import InteriorQueries, Kind
from xtokmap.losses.bytes import byte_kl
from xtokmap.losses.chunks import alm, uld_hybrid
from xtokmap.losses.credit import CREDITS, CreditRule, chunk_credit, policy_loss
from xtokmap.losses.strict import strict_kl
from xtokmap.losses.terms import Loss
from xtokmap.losses.transfer import TransferTarget, transfer_kl
from xtokmap.torch.completions import flat_logprobs
from xtokmap.torch.index import ChunkIndex, VocabTensors
from xtokmap.torch.logits import Logits, TopK


@dataclass(frozen=True)
class LossSettings:
    """What the losses take beside their tensors; `Config` has fields of the same names.

    Attributes:
        beta: of whole distributions: 1 reverse KL, 0 forward, between them Jensen-Shannon.
        clamp: largest absolute advantage.
        max_chunk_tokens: chunks with more tokens on a side are unscored by a credit; 0: no limit.
        score_stop: whether ends of turns are scored.
        score_markers: whether markers of thoughts and tool calls are.
        clip_low: PPO's lower clip.
        clip_high: PPO's upper clip.
        clip_dual: PPO's dual clip.
        aggregate: mean over `response` tokens or over `scored` ones.
    """

    beta: float = 1.0
    clamp: float = 10.0
    max_chunk_tokens: int = 6
    score_stop: bool = True
    score_markers: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.28
    clip_dual: float = 10.0
    aggregate: str = "response"


@dataclass(eq=False)
class LossInput:
    """What a loss is computed from: B rows of completions with N student tokens in all.

    Attributes:
        rows: the student's rows that score its tokens, flat `[N]`; with a gradient.
        places: int64 `[N]`; where they lie in `[B, Ts]`, flat.
        ids: int64 `[N]`; the tokens.
        mask: bool `[B, Ts]`; where there is a token.
        index: of the alignment.
        settings: see there.
        denominator: of the loss; the number of tokens that it is a mean over.
        old_logprobs: `[B, Ts]`, of the policy that sampled; None: the one that is updated.
        teacher_logprobs: `[B, Tt]`.
        transferred: `[B, Ts]`, log q*(s_i | s_<i), where the rule has `queries`.
        target: the whole q*, where it has `queries` and `keep`.
        teacher_rows: `[B, Tt]`, where it has `keep`.
        interior: where it has `interior`.
        maps: of the two vocabularies, where it has `keep`.
    """

    rows: Logits
    places: Tensor
    ids: Tensor
    mask: Tensor
    index: ChunkIndex
    settings: LossSettings
    denominator: Tensor | float
    old_logprobs: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    transferred: Tensor | None = None
    target: TransferTarget | None = None
    teacher_rows: Logits | TopK | None = None
    interior: InteriorQueries | None = None
    maps: VocabTensors | None = None
    _logprobs: Tensor | None = None

    def padded(self, flat: Tensor) -> Tensor:
        """Values of the N tokens as `[B, Ts]`, 0 on padding."""
        return flat.new_zeros(self.mask.numel()).index_copy(0, self.places, flat).view(self.mask.shape)

    @cached_property
    def student(self) -> Logits:
        """The student's rows as `[B, Ts]`; some row on padding."""
        of = torch.full((self.mask.numel(),), -1, dtype=torch.long, device=self.places.device)
        of[self.places] = torch.arange(len(self.places), device=self.places.device)
        return self.rows.at(of.view(self.mask.shape))

    @cached_property
    def student_ids(self) -> Tensor:
        """int64 `[B, Ts]`."""
        return self.padded(self.ids)

    @property
    def logprobs(self) -> Tensor:
        """float32 `[B, Ts]`; the student's own, with a gradient. One head pass, made when first asked for."""
        if self._logprobs is None:
            self._logprobs = self.padded(flat_logprobs(self.rows, self.ids))
        return self._logprobs

    @cached_property
    def plain_logprobs(self) -> Tensor:
        """The same without a gradient."""
        if self._logprobs is not None:
            return self._logprobs.detach()
        return self.padded(flat_logprobs(self.rows.detach(), self.ids))


class Computed(NamedTuple):
    """A loss and what to watch.

    Attributes:
        loss: float32 scalar.
        sums: tensors by name, sums over tokens, not read back from the device: `scored`, `nonfinite`, and what the
            loss adds.
    """

    loss: Tensor
    sums: dict[str, Tensor]


#: Which tokens a loss can score, of those that are there: bool `[B, Ts]`.
Scored: TypeAlias = Callable[[ChunkIndex, Tensor, LossSettings], Tensor]


def wanted(tokens: Tensor, index: ChunkIndex, settings: LossSettings) -> Tensor:
    """Without ends of turns and markers, where these are not scored."""
    for kind, scored in ((Kind.STOP, settings.score_stop), (Kind.MARKER, settings.score_markers)):
        if not scored:
            tokens = tokens & (index.kind_of_student() != int(kind))
    return tokens


def met(index: ChunkIndex, mask: Tensor, settings: LossSettings) -> Tensor:
    """Tokens in a chunk that has teacher tokens."""
    return wanted(mask & (index.to_student((index.teacher_count > 0).long()) > 0), index, settings)


def met_alone(index: ChunkIndex, mask: Tensor, settings: LossSettings) -> Tensor:
    """Tokens in ONE_TO_ONE, STOP and MARKER chunks."""
    return met(index, mask, settings) & (index.strict_teacher_pos() >= 0)


@dataclass(frozen=True)
class LossRule:
    """One loss.

    Attributes:
        compute: the loss of some rows.
        teacher: the least that it needs the teacher to give: nothing; the logprobs of its tokens; the top k of its rows
            (whole rows do as well); whole rows (logits, or hidden states and their head).
        keep: whether it looks at the teacher's rows itself.
        queries: whether it needs `Aligner.cover_queries` evaluated.
        interior: whether it needs `Aligner.interior_queries`.
        on_policy: whether it holds for the student's own samples alone: a policy gradient.
        scored: which tokens it can score.
        head_passes: passes through the student's and the teacher's output head in an update, each of 2 operations for a
            weight and student token; for FLOPs.
    """

    compute: Callable[[LossInput], Computed]
    teacher: Literal["nothing", "logprobs", "top", "rows"] = "logprobs"
    keep: bool = False
    queries: bool = False
    interior: bool = False
    on_policy: bool = False
    scored: Scored = met
    head_passes: tuple[int, int] = (4, 0)


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


# ---- how each is computed ----------------------------------------------------------------------------------------


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
    scored = wanted(given.scored & x.mask, x.index, settings)
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
    mask = wanted(x.mask, x.index, replace(x.settings, score_stop=True))  # of stops it takes the mass as well
    loss = transfer_kl(
        x.student,
        _there(x.target, "target"),
        x.index,
        student_ids=x.student_ids,
        transferred=x.transferred,
        beta=x.settings.beta,
        clamp=x.settings.clamp,
        stops=x.settings.score_stop,
        mask=mask,
        denominator=x.denominator,
    )
    return _sums(loss, "undetermined", "rest", "shared")


def _byte_kl(x: LossInput) -> Computed:
    mask = wanted(x.mask, x.index, x.settings)
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
    mask = wanted(x.mask, x.index, x.settings)
    teacher = _there(x.teacher_logprobs, "teacher_logprobs")
    return _sums(alm(x.logprobs, teacher, x.index, mask=mask, denominator=x.denominator))


def _uld_hybrid(x: LossInput) -> Computed:
    mask = wanted(x.mask, x.index, x.settings)
    loss = uld_hybrid(
        x.student,
        _rows(x),
        x.index,
        _there(x.maps, "maps"),
        student_logprobs=x.logprobs,
        teacher_logprobs=_there(x.teacher_logprobs, "teacher_logprobs"),
        stops=x.settings.score_stop,
        mask=mask,
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
    "transfer_kl": LossRule(_transfer_kl, teacher="rows", keep=True, queries=True, head_passes=(5, 2)),
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

"""LossRule: what a loss is given, what it says, and what it asks of the teacher and of the alignment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.alignment import InteriorQueries, Kind
from xtokmap.losses.target import TransferTarget
from xtokmap.losses.terms import Loss
from xtokmap.torch.completions import flat_logprobs
from xtokmap.torch.index import ChunkIndex, VocabTensors
from xtokmap.torch.logits import Logits, TopK


@dataclass(frozen=True)
class LossSettings:
    """What the losses take beside their tensors; `Config` has fields of the same names.

    Attributes:
        beta: of whole distributions: 1 reverse KL, 0 forward, between them Jensen-Shannon.
        stop_bridge: weight of a further KL(q || p) of whether the turn ends here, of `transfer_kl` and `byte_kl`.
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
    stop_bridge: float = 0.0
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
        entropy: `[N]`, of the student's distributions, where a loss came by it; NaN where not.
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
    entropy: Tensor | None = None
    _logprobs: Tensor | None = None
    _plain_logprobs: Tensor | None = None

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

    @property
    def plain_logprobs(self) -> Tensor:
        """The same without a gradient."""
        if self._plain_logprobs is None:
            if self._logprobs is not None:
                return self._logprobs.detach()
            self._plain_logprobs = self.padded(flat_logprobs(self.rows.detach(), self.ids))
        return self._plain_logprobs

    def came_by(self, loss: Loss, tokens: int | None = None) -> None:
        """Takes note of logprobs and entropies that a loss has worked out, which saves head passes.

        Args:
            loss: with those, NaN where there is none.
            tokens: of how many there are some; None: of all, but for those that the CPU was asked to leave out.
        """
        logprobs, some = loss.logprobs, tokens is not None and tokens < len(self.ids)
        if logprobs is None or (some and logprobs.device.type != "cpu"):
            return  # which ones are missing can be asked of the CPU alone
        found = torch.where(self.mask, logprobs, 0)
        if logprobs.device.type == "cpu":
            left = logprobs.view(-1)[self.places].isnan().nonzero()[:, 0]
            others = flat_logprobs(self.rows.detach().at(left), self.ids[left])
            found = found.view(-1).index_copy(0, self.places[left], others.to(found.dtype)).view(found.shape)
        self._plain_logprobs = found
        self.entropy = None if loss.entropy is None else loss.entropy.view(-1)[self.places]


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


def but_markers(tokens: Tensor, index: ChunkIndex, settings: LossSettings) -> Tensor:
    """Without markers, where these are not scored."""
    return tokens if settings.score_markers else tokens & (index.kind_of_student() != int(Kind.MARKER))


def wanted(tokens: Tensor, index: ChunkIndex, settings: LossSettings) -> Tensor:
    """Without markers and ends of turns, where these are not scored."""
    tokens = but_markers(tokens, index, settings)
    return tokens if settings.score_stop else tokens & (index.kind_of_student() != int(Kind.STOP))


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


# ---- what losses say of themselves with --------------------------------------------------------------------------


def sums_of(loss: Loss, *means: str) -> Computed:
    """The figures of a `Loss` as sums over its tokens."""
    tokens = loss.figures["tokens"]
    sums = {name: loss.figures[name] * tokens for name in means}
    return Computed(loss.loss, {"scored": tokens, "nonfinite": loss.figures["nonfinite"], **sums})


def there(value: Any, name: str) -> Any:
    """What a loss cannot do without."""
    if value is None:
        raise XTokMapError(f"this loss needs {name}, which the teacher or the alignment was not asked for")
    return value


def whole_rows(x: LossInput) -> Logits:
    """The teacher's rows, of a loss that needs them whole."""
    if not isinstance(x.teacher_rows, Logits):
        raise XTokMapError("this loss needs whole teacher rows: logits, or hidden states and their head")
    return x.teacher_rows

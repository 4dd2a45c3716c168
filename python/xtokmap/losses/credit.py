"""Losses from the logprobs of sampled tokens alone: credits, the policy gradient, and the gap between the models.

Notation: student tokens s_1..s_m and teacher tokens of the same bytes; L_S and L_T are the sums of a chunk's student
and teacher logprobs, D = L_T - L_S, and A_i is the advantage of student token i.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.alignment import Kind
from xtokmap.losses.rule import Computed, LossInput, there, wanted
from xtokmap.losses.terms import check_shape
from xtokmap.torch.index import ChunkIndex

CreditRule: TypeAlias = Literal["strict", "prior", "shift", "uniform", "bytes", "cover", "full"]
CREDITS: tuple[CreditRule, ...] = get_args(CreditRule)

# Plain integers: torch.compile does not compare a tensor with an enum member.
_ONE_TO_ONE, _REWRITTEN = int(Kind.ONE_TO_ONE), int(Kind.REWRITTEN)
_STOP, _MARKER = int(Kind.STOP), int(Kind.MARKER)


class Credit(NamedTuple):
    """What `chunk_credit` gives to the student tokens; all `[B, Ts]`.

    Attributes:
        advantages: float32; 0 where unscored. No gradient flows through it.
        scored: bool; tokens that received a teacher signal.
        clamped: bool; tokens whose advantage was cut to +-clamp.
        fallback: bool; tokens of a chunk that `prior` could not divide by (L_S is about 0), which `shift` served.
        nonfinite: bool; tokens left unscored because a logprob of their chunk is NaN or infinite.
    """

    advantages: Tensor
    scored: Tensor
    clamped: Tensor
    fallback: Tensor
    nonfinite: Tensor


def chunk_credit(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    index: ChunkIndex,
    credit: CreditRule = "prior",
    transferred: Tensor | None = None,
    clamp: float | None = 10.0,
    *,
    eps: float = 1e-6,
    max_chunk_tokens: int | None = None,
) -> Credit:
    """Hands every chunk's teacher logprob to its student tokens: A_i = log q_i - log p_i.

    | credit | rule | property |
    |---|---|---|
    | `strict` | chunks of one token a side, A = D | as `full`, where it speaks |
    | `prior` | log q_i = (L_T / L_S) log p_i; `shift` where abs(L_S) < eps | the paper's (arXiv 2606.09456) |
    | `shift` | log q_i = log p_i + D / m | `full` / m |
    | `uniform` | log q_i = L_T / m | does not vanish at the optimum |
    | `bytes` | log q_i = L_T bytes_i / bytes | does not vanish at the optimum |
    | `cover` | log q_i = `transferred` | exact for the teacher as the student's vocabulary sees it |
    | `full` | A_i = D for every token | unbiased only where boundaries do not depend on what comes next |

    STOP chunks give the student's end of turn the teacher's logprob of its own, under every rule. REWRITTEN and MARKER
    chunks use `shift` (`strict`: nothing, or markers of one token a side). A chunk without tokens on one side is
    unscored.

    Args:
        student_logprobs: `[B, Ts]`, of the policy that sampled; nats.
        teacher_logprobs: `[B, Tt]`; nats.
        index: of the same rows.
        credit: one of `CREDITS`.
        transferred: `[B, Ts]`, log q*(s_i | s_<i), for `cover`; NaN where unknown.
        clamp: largest absolute advantage (the paper: 10), or None.
        eps: see `prior`.
        max_chunk_tokens: chunks with more tokens on either side are unscored (the paper: 6), or None.

    Raises:
        XTokMapError: an unknown credit, shapes that do not fit the index, `cover` without `transferred`.
    """
    if credit not in CREDITS:
        raise XTokMapError(f"credit={credit!r}: use one of {', '.join(CREDITS)}")
    check_shape("student_logprobs", student_logprobs, index.student_chunk)
    check_shape("teacher_logprobs", teacher_logprobs, index.teacher_chunk)
    s, t = student_logprobs.detach().float(), teacher_logprobs.detach().float()

    chunk_of = index.student_chunk
    bad = index.sum_student((~torch.isfinite(s)).long()) + index.sum_teacher((~torch.isfinite(t)).long()) > 0
    both = (index.student_count > 0) & (index.teacher_count > 0)
    if max_chunk_tokens is not None:
        both &= torch.maximum(index.student_count, index.teacher_count) <= max_chunk_tokens
    stop, marker, rewritten = index.kind == _STOP, index.kind == _MARKER, index.kind == _REWRITTEN
    if credit == "strict":
        alone = (index.student_count == 1) & (index.teacher_count == 1)
        both &= stop | (marker & alone) | (index.kind == _ONE_TO_ONE)
    usable = both & ~bad
    nonfinite = _hand_down(index, both & bad)
    scored = _hand_down(index, usable)
    s = torch.where(scored, s, 0)
    l_s, l_t = index.sum_student(s), torch.where(usable, index.sum_teacher(t), 0)
    d = torch.where(usable, l_t - l_s, 0)
    m = index.student_count.clamp(min=1)

    whole = stop | marker | rewritten  # no bytes to split by
    fallback = torch.zeros_like(scored)
    if credit in ("strict", "full"):
        advantages = index.to_student(d)
    elif credit == "shift":
        advantages = index.to_student(d / m)
    elif credit == "cover":
        if transferred is None:
            raise XTokMapError("credit='cover' needs transferred=, the teacher's log q*(s_i | s_<i) for every token")
        check_shape("transferred", transferred, chunk_of)
        q = transferred.detach().float()
        # Which byte became which is not known in a REWRITTEN chunk, and a MARKER has none.
        by_chunk = _hand_down(index, rewritten | marker)
        scored &= torch.isfinite(q) | by_chunk
        advantages = torch.where(by_chunk, index.to_student(d / m), q - s)
    else:
        if credit == "prior":
            tiny = (l_s.abs() < eps) & ~whole
            fallback = _hand_down(index, tiny & usable)
            whole = whole | tiny
            log_q = index.to_student(l_t / torch.where(tiny | (l_s == 0), 1.0, l_s)) * s
        elif credit == "uniform":
            log_q = index.to_student(l_t / m)
        else:
            nbytes = index.sum_student(index.student_len).clamp(min=1)
            log_q = index.to_student(l_t / nbytes) * index.student_len
        advantages = torch.where(_hand_down(index, whole), index.to_student(d / m), log_q - s)

    advantages = torch.where(scored, advantages, 0)
    clamped = torch.zeros_like(scored)
    if clamp is not None:
        clamped = advantages.abs() > clamp
        advantages = advantages.clamp(-clamp, clamp)
    return Credit(advantages, scored, clamped, fallback, nonfinite)


def compass(
    teacher: Credit,
    weaker: Credit,
    logprobs: Tensor,
    reference_logprobs: Tensor,
    *,
    alpha: float = 0.5,
    clamp: float | None = 10.0,
) -> Credit:
    """What a teacher knows more than a weaker model of its family, instead of what it says (Compass, arXiv 2609.10154).

    A_i = (log q_i - log r_i) - alpha (log p_i - log p_ref_i), where q is the teacher and r the weaker model: the
    difference of two `chunk_credit`s by one rule, on the one alignment that their common tokenizer gives.

    Args:
        teacher: the teacher's credit, with `clamp=None`.
        weaker: the weaker model's, with the same rule and `clamp=None`.
        logprobs: `[B, Ts]`, of the policy that sampled; nats.
        reference_logprobs: `[B, Ts]`, of the model that it must stay near, usually the one it started from.
        alpha: how much of that distance is held against it.
        clamp: largest absolute advantage, or None.

    Returns:
        Advantages for `policy_loss`, where both credits speak and the logprobs are finite.

    Raises:
        XTokMapError: shapes that differ.
    """
    for name, x in (
        ("weaker", weaker.advantages),
        ("logprobs", logprobs),
        ("reference_logprobs", reference_logprobs),
    ):
        check_shape(name, x, teacher.advantages)
    drift = logprobs.detach().float() - reference_logprobs.detach().float()
    both = teacher.scored & weaker.scored
    scored = both & torch.isfinite(drift)
    advantages = torch.where(scored, teacher.advantages - weaker.advantages - alpha * drift, 0)
    clamped = teacher.clamped | weaker.clamped
    if clamp is not None:
        clamped = clamped | (advantages.abs() > clamp)
        advantages = advantages.clamp(-clamp, clamp)
    nonfinite = teacher.nonfinite | weaker.nonfinite | (both & ~scored)
    return Credit(advantages, scored, clamped & scored, (teacher.fallback | weaker.fallback) & scored, nonfinite)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    clip_dual: float | None = 10.0,
    aggregate: Literal["response", "scored"] = "response",
    *,
    scored: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """The clipped policy-gradient loss with dual clip (PPO, arXiv 1707.06347; dual clip, arXiv 1912.09729).

    r = exp(clip(logprobs - old_logprobs, +-20)); l = max(-A r, -A clip(r, 1 - low, 1 + high)); where A < 0,
    l = min(l, -A dual).

    Args:
        logprobs: `[B, T]`, of the policy being updated; the only input with a gradient.
        old_logprobs: `[B, T]`, of the policy that sampled.
        advantages: `[B, T]`.
        mask: bool or 0/1 `[B, T]`; the response tokens.
        clip_low: see above.
        clip_high: see above.
        clip_dual: see above; None leaves it out.
        aggregate: "response": the mean over response tokens (the paper), unscored ones counting as 0; "scored":
            the mean over scored tokens.
        scored: bool `[B, T]`; response tokens with a signal; None: all. The others have gradient exactly 0, and a NaN
            there goes nowhere.
        denominator: what to divide the sum by instead, so that micro-batches add up to the whole batch's loss.

    Returns:
        A float32 scalar.

    Raises:
        XTokMapError: shapes that differ, or an unknown aggregate.
    """
    if aggregate not in ("response", "scored"):
        raise XTokMapError(f"aggregate={aggregate!r}: use 'response' or 'scored'")
    for name, x in (("old_logprobs", old_logprobs), ("advantages", advantages), ("mask", mask)):
        check_shape(name, x, logprobs)
    response = mask.bool()
    active = response if scored is None else response & scored
    a = torch.where(active, advantages.detach().float(), 0)
    # Selected before any arithmetic: 0 * NaN would be NaN.
    now = torch.where(active, logprobs, 0).float()
    old = torch.where(active, old_logprobs.detach(), 0).float()
    ratio = torch.exp((now - old).clamp(-20, 20))
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip_low, 1 + clip_high))
    if clip_dual is not None:
        loss = torch.where(a < 0, torch.minimum(loss, -a * clip_dual), loss)
    total = torch.where(active, loss, 0).sum()
    if denominator is None:
        denominator = (response if aggregate == "response" else active).sum().clamp(min=1)
    return total / denominator


def chunk_gap(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    index: ChunkIndex,
    *,
    stops: bool = True,
    markers: bool = True,
) -> tuple[Tensor, Tensor]:
    """The sampled reverse KL of every row: sums of L_S - L_T over its chunks, and the bytes that they spell.

    On samples of the student, nats / bytes estimates KL(student || teacher) per byte without bias from the way in
    which either side cuts the text into tokens.

    Args:
        student_logprobs: `[B, Ts]`; nats.
        teacher_logprobs: `[B, Tt]`; nats.
        index: of the same rows.
        stops: whether the ends of turns count.
        markers: whether markers of thoughts and tool calls do; with neither, the text alone is measured.

    Returns:
        float32 `[B]` nats and int64 `[B]` bytes, over chunks with finite logprobs and tokens on both sides.
    """
    credit = chunk_credit(student_logprobs, teacher_logprobs, index, "full", clamp=None)
    # Every token of a chunk has the chunk's whole gap.
    share = 1 / index.student_count.clamp(min=1)
    for kind, counts in ((_STOP, stops), (_MARKER, markers)):
        if not counts:
            share = torch.where(index.kind == kind, 0, share)
    nats = -(credit.advantages * index.to_student(share)).sum(1)
    return nats, torch.where(credit.scored, index.student_len, 0).sum(1)


def _hand_down(index: ChunkIndex, flags: Tensor) -> Tensor:
    return index.to_student(flags.long()) > 0


def computed_policy(credit: CreditRule, x: LossInput) -> Computed:
    """The policy gradient: the teacher's logprobs of sampled tokens as advantages."""
    settings, teacher = x.settings, there(x.teacher_logprobs, "teacher_logprobs")
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


def computed_imitation(x: LossInput) -> Computed:
    """The negative logprobs of the answers: supervised fine-tuning."""
    finite = torch.isfinite(x.logprobs.detach())
    loss = -torch.where(x.mask & finite, x.logprobs, 0).sum() / x.denominator
    return Computed(loss, {"scored": (x.mask & finite).sum(), "nonfinite": (x.mask & ~finite).sum()})

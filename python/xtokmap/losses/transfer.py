"""`transfer_kl`: the divergence from the teacher's whole distribution as the student's vocabulary sees it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.losses import terms as of_terms
from xtokmap.losses.events import EventMaps
from xtokmap.losses.rule import Computed, LossInput, but_markers, sums_of, there
from xtokmap.losses.target import Behind, Stream, TransferTarget
from xtokmap.losses.terms import STOP, Loss, check_beta, check_mask, reduce_terms
from xtokmap.torch.index import ChunkIndex
from xtokmap.torch.logits import _SLICE, Logits, _widened, entropy_of, softmax_and_sums
from xtokmap.torch.summed import sum_rows


def transfer_kl(
    student: Logits,
    target: TransferTarget,
    index: ChunkIndex,
    *,
    student_ids: Tensor | None = None,
    beta: float = 1.0,
    clamp: float = 10.0,
    stops: bool = True,
    stop_bridge: float = 0.0,
    floor: float = 1e-2,
    mask: Tensor | None = None,
    size: int | None = None,
    denominator: Tensor | float | None = None,
) -> Loss:
    """Divergence between the student and the teacher as the student's vocabulary sees it (xtokmap's own).

    The target is q*(u | s_<i), see `TransferTarget`. Mass on a token that the teacher may go on from to a longer
    student token is known of the two together, so the divergence is over such events e; and over the rest, the student
    tokens that get no mass. Of the sampled token's event e the row behind its first teacher token knows groups g
    (`Within`), and which token of the group it is, is learned from the sampled one. The term is

        D(p(e) || q*(e)) + K - A log p(s_i),   K = KL(p(g | e) || q*(g | e)),   A = log q*(s_i | g) - log p(s_i | g),

    clipped; K has also the gradient of K log p(e), K held. In the mean over samples that is the gradient of KL(p || q*)
    for beta = 1, by the chain rule. Where the row behind says nothing, the event is the group. Events of one token have
    neither K nor A: with one tokenizer on both sides it is the exact per-token KL.

    Args:
        student: `[B, Ts]` rows.
        target: of the same batch.
        index: of the same batch.
        student_ids: int64 `[B, Ts]`; the sampled tokens; None leaves K and A out.
        beta: 1 is KL(p || q*), 0 is KL(q* || p), between them the generalized Jensen-Shannon divergence.
        clamp: largest absolute A, and log ratio in K.
        stops: whether the end of a turn counts; False leaves its mass out on both sides.
        stop_bridge: weight of a further KL(q* || p) of {stop, no stop}, whatever beta is: a reverse KL hardly teaches a
            student to end its turns that hardly ever does.
        floor: least probability of the rest: what the student has where the teacher has none costs -log floor nats.
        mask: bool or 0/1 `[B, Ts]`; the response tokens.
        size: rows of a slice; None takes 64 MiB of float32 for the larger vocabulary.
        denominator: what to divide by instead of the number of scored tokens, so that micro-batches add up.

    Returns:
        The loss; figures `undetermined` (mass known of several tokens together), `rest` (mass known of none), `shared`
        (share of the scored tokens whose group has several). It costs a head pass of either side beside `transfer`'s.

    Raises:
        XTokMapError: shapes that do not fit, beta outside [0, 1].
    """
    check_beta(beta)
    places, shape = target.places()
    if tuple(student.shape) != shape or tuple(index.student_chunk.shape) != shape:
        raise XTokMapError(
            f"student rows {tuple(student.shape)} and index {tuple(index.student_chunk.shape)}; the queries: {shape}"
        )
    check_mask(mask, index)
    device = student.rows.device
    rows = torch.from_numpy(places).to(device)
    ids = (torch.zeros(shape, dtype=torch.long, device=device) if student_ids is None else student_ids).reshape(-1)
    scored = torch.zeros(shape, dtype=torch.bool, device=device)
    scored.view(-1)[rows] = True
    if not stops:
        scored &= index.kind_of_student() != STOP
    response = index.student_chunk >= 0 if mask is None else mask.bool()
    weights = (scored & response).view(-1)[rows].to(_widened(student.rows[:0]).dtype)
    weights = weights if denominator is None else weights / denominator
    row_loss = partial(
        _row_loss,
        maps=target.maps,
        beta=beta,
        clamp=clamp,
        floor=floor,
        bridge=stop_bridge if stops else None,
        alone=student_ids is None,
    )
    size = size or max(1, _SLICE // max(student.vocab_size, target.teacher.vocab_size))
    total, *found = sum_rows(row_loss, student.at(rows), weights, Stream(target), ids[rows], size=size)
    terms, undetermined, rest, shared, logprobs, entropy = (
        torch.full(shape, fill, dtype=x.dtype, device=device).view(-1).index_copy(0, rows, x).view(shape)
        for x, fill in zip(found, (0, 0, 0, 0, torch.nan, torch.nan), strict=True)
    )
    loss = reduce_terms(terms, scored, index, mask, denominator, undetermined=undetermined, rest=rest, shared=shared)
    if denominator is None:
        total = total / loss.figures["tokens"].clamp(min=1)
    return loss._replace(loss=total, logprobs=None if student_ids is None else logprobs, entropy=entropy)


def _row_loss(
    x: Tensor,
    behind: Behind,
    ids: Tensor,
    *,
    maps: EventMaps,
    beta: float,
    clamp: float,
    floor: float,
    bridge: float | None,
    alone: bool,
) -> tuple[Tensor, ...]:
    """Rows of `transfer_kl`: value, undetermined, rest, whether the token's group has several, its logprob, entropy.

    `bridge` is None where ends of turns do not count. `x` becomes the gradient. With p = softmax(x) and
    G(e) = dD / dp(e) that is p(u) (G(e(u)) - sum of p G): each row of the vocabulary is gone over a few times, and all
    else is worked out by event. Masks are factors: a choice (`where`) takes as long as eight products.
    """
    q, undetermined, sampled = (y.to(x.dtype) for y in behind[:3])
    groups, sampled = (None, sampled + torch.nan) if alone else (behind.groups, sampled)
    rest = q[:, -1].clone()
    own, every = ids[:, None], maps.student_event
    each, log_total = softmax_and_sums(x)
    logprobs = chosen = x.gather(1, own)[:, 0] - log_total
    entropy = entropy_of(each, x, log_total)
    bins, left = maps.stop_events, q.new_ones(len(q))
    if bridge is None:
        left = (1 - q.index_select(1, bins).sum(-1)).clamp(min=floor)
        q.index_fill_(1, bins, 0).div_(left[:, None])
        total = each.index_fill_(1, maps.stops, 0).sum(-1)
        each.div_(total[:, None])
        chosen = chosen - total.log()
    known = each[:, : len(every)]  # more logits than tokens: padding
    p = torch.zeros_like(q).scatter_add_(1, every.expand(len(x), -1), known)
    there = (q > 0).to(q.dtype)
    there[:, -1] = 1
    elsewhere = 1 - there
    # What the teacher gives no mass is the rest.
    lost = (p * elsewhere).sum(-1)
    p.mul_(there)[:, -1] += lost
    # What the student cannot say at all is no bin: it would make a forward KL infinite, and has no gradient.
    q[:, -1] = torch.where(p[:, -1] > 0, q[:, -1].clamp(min=floor), 0)
    value, slope = of_terms.divergence_and_slope(p, q, beta)
    if bridge:
        more, of_ends, of_others = of_terms.event_and_slopes(*(y.index_select(1, bins).sum(-1) for y in (p, q)))
        value = value + bridge * more
        slope.add_(bridge * of_others[:, None]).index_add_(
            1, bins, bridge * (of_ends - of_others)[:, None].expand(-1, len(bins))
        ).mul_(there)
    event = every[own]
    bin_of = torch.where(there.gather(1, event) > 0, event, q.shape[1] - 1)
    several = (maps.members[ids] > 1) | (bin_of[:, 0] == q.shape[1] - 1)
    of_p, of_q = (y.gather(1, bin_of)[:, 0] for y in (p, q))
    k, shared = torch.zeros_like(value), several.to(x.dtype)
    if groups is not None:
        met = there.gather(1, event)[:, 0] * torch.isfinite(sampled)
        to_members = groups.join(known, met, floor, clamp, into=(of_p, of_q, k, shared))
    tiny = torch.finfo(x.dtype).tiny
    a = (sampled - left.log() - of_q.log()) - (chosen - of_p.clamp(min=tiny).log())
    a = torch.where(several & torch.isfinite(sampled) & torch.isfinite(a), a, 0).clamp(-clamp, clamp)
    # The gradient. Elsewhere it is that of the rest.
    mean = value if beta == 1 and not bridge else (p * slope).sum(-1)
    value = value + k - a * chosen
    slope.addcmul_(elsewhere, slope[:, -1:].clone()).sub_((mean - a + k)[:, None])
    torch.mul(known, slope.index_select(1, every), out=x[:, : len(every)])
    x[:, len(every) :] = 0
    x.scatter_add_(1, own, -a[:, None])
    if groups is not None:
        x.index_put_(groups.members[:2], to_members, accumulate=True)
    return value, undetermined, rest, shared, logprobs, entropy


def computed(x: LossInput) -> Computed:
    """The table's `transfer_kl`."""
    target = there(x.target, "target")
    loss = transfer_kl(
        x.student,
        target,
        x.index,
        student_ids=x.student_ids,
        beta=x.settings.beta,
        clamp=x.settings.clamp,
        stops=x.settings.score_stop,
        stop_bridge=x.settings.stop_bridge,
        mask=but_markers(x.mask, x.index, x.settings),
        denominator=x.denominator,
    )
    x.came_by(loss, len(target))
    if x.teacher_logprobs is None:
        x.teacher_logprobs = target.logprobs(x.index.teacher_chunk.shape[1])
    return sums_of(loss, "undetermined", "rest", "shared")

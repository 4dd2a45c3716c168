"""The losses on hand-checked vectors, and the properties that they must have."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xtokmap
from xtokmap.losses.credit import CREDITS, chunk_credit, chunk_gap, policy_loss
from xtokmap.torch.index import ChunkIndex

SPLITS = ("prior", "shift", "uniform", "bytes")


def index_of(student: list[list[bytes | None]], teacher: list[list[bytes | None]], **masks) -> ChunkIndex:
    """The index of rows of tokens; `None` is an end-of-turn token."""

    def ids(rows):
        vocabulary = [None, *sorted({t for row in rows for t in row if t is not None})]
        table = xtokmap.ByteTable.from_bytes(vocabulary, stop_ids=[0])
        return table, [[vocabulary.index(t) for t in row] for row in rows]

    (s, student_ids), (t, teacher_ids) = ids(student), ids(teacher)
    return ChunkIndex.from_alignment(xtokmap.Aligner(s, t).align_batch(student_ids, teacher_ids))


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


# The bluebird vector: MANY_TO_ONE, ONE_TO_ONE, ONE_TO_MANY.
STUDENT = [[b"blue", b"bird", b"!", b" ok"]]
TEACHER = [[b"bluebird", b"!", b" o", b"k"]]
P, Q = tensor(-0.7, -0.9, -0.2, -0.4), tensor(-1.2, -0.5, -0.3, -0.6)


@pytest.mark.parametrize(
    ("credit", "advantages"),
    [
        ("strict", [0, 0, -0.3, 0]),
        ("prior", [0.175, 0.225, -0.3, -0.5]),
        ("shift", [0.2, 0.2, -0.3, -0.5]),
        ("uniform", [0.1, 0.3, -0.3, -0.5]),
        ("bytes", [0.1, 0.3, -0.3, -0.5]),
        ("full", [0.4, 0.4, -0.3, -0.5]),
    ],
)
def test_bluebird(credit, advantages):
    result = chunk_credit(P, Q, index_of(STUDENT, TEACHER), credit)
    torch.testing.assert_close(result.advantages, torch.tensor([advantages]), atol=2e-7, rtol=0)
    scored = [a != 0 for a in advantages]
    assert result.scored.tolist() == [scored]
    assert not result.clamped.any()
    assert not result.fallback.any()


def test_bluebird_cover_takes_what_was_transferred():
    transferred = tensor(-0.508837, -0.691163, -0.5, math.nan)
    result = chunk_credit(P, Q, index_of(STUDENT, TEACHER), "cover", transferred)
    torch.testing.assert_close(result.advantages, torch.tensor([[0.191163, 0.208837, -0.3, 0.0]]), atol=2e-6, rtol=0)
    assert result.scored.tolist() == [[True, True, True, False]]


def test_bluebird_policy_loss():
    a = chunk_credit(P, Q, index_of(STUDENT, TEACHER), "prior").advantages
    new = torch.tensor([[-0.6, -1.3, -0.15, -0.9]], requires_grad=True)
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss = policy_loss(new, P, a, mask)
    # The paper's own code gives 0.0927886.
    assert loss.item() == pytest.approx(0.0927886, abs=5e-8)
    loss.backward()
    torch.testing.assert_close(new.grad, torch.tensor([[-0.0484, -0.0377, 0.0788, 0.0]]), atol=5e-5, rtol=0)
    single = [policy_loss(new[:, i : i + 1], P[:, i : i + 1], a[:, i : i + 1], mask[:, :1]).item() for i in range(4)]
    assert single == pytest.approx([-0.193405, -0.150822, 0.315381, 0.4], abs=1e-6)


def test_unscored_tokens_count_in_the_response_mean_only():
    a = chunk_credit(P, Q, index_of(STUDENT, TEACHER), "prior").advantages
    new, mask = torch.tensor([[-0.6, -1.3, -0.15, -0.9]]), torch.ones(1, 4)
    scored = torch.tensor([[True, True, True, False]])
    # Losses of the first three tokens, over 4 and over 3; below, the third is unscored instead of the last.
    three = -0.193405 - 0.150822 + 0.315381
    assert policy_loss(new, P, a, mask, scored=scored).item() == pytest.approx(three / 4, abs=1e-6)
    assert policy_loss(new, P, a, mask, scored=scored, aggregate="scored").item() == pytest.approx(three / 3, abs=1e-6)
    scored = torch.tensor([[True, True, False, True]])
    assert policy_loss(new, P, a, mask, scored=scored).item() == pytest.approx(0.013943, abs=1e-6)
    assert policy_loss(new, P, a, mask, scored=scored, aggregate="scored").item() == pytest.approx(0.018591, abs=1e-6)


def test_dual_clip_bounds_a_negative_advantage():
    new, old, a = torch.tensor([[5.0]], requires_grad=True), torch.tensor([[0.0]]), torch.tensor([[-2.0]])
    assert policy_loss(new, old, a, torch.ones(1, 1)).item() == pytest.approx(20.0)
    assert policy_loss(new, old, a, torch.ones(1, 1), clip_dual=None).item() == pytest.approx(2 * math.exp(5), rel=1e-6)


@pytest.mark.parametrize("credit", CREDITS)
def test_identical_tokenizers_are_plain_opd(credit):
    row = [b"a", b"bc", b"d", None]
    p, q = tensor(-0.5, -1.0, -2.0, -0.1), tensor(-0.25, -3.0, -0.5, -0.7)
    result = chunk_credit(p, q, index_of([row], [row]), credit, transferred=q)
    torch.testing.assert_close(result.advantages, (q - p).float(), atol=1e-6, rtol=0)
    assert result.scored.all()


@pytest.mark.parametrize("credit", CREDITS)
def test_stop_gets_the_teachers_own_end_of_turn(credit):
    index = index_of([[b"a", b"b", None, None]], [[b"ab", None]])
    p, q = tensor(-0.5, -0.5, -3.0, -9.0), tensor(-0.4, -1.0)
    result = chunk_credit(p, q, index, credit, transferred=tensor(-0.1, -0.3, -1.0, math.nan))
    assert result.advantages[0, 2].item() == pytest.approx(2.0)
    assert result.scored[0, 2:].tolist() == [True, False]
    truncated = index_of([[b"a", b"b"]], [[b"ab", None]])
    assert (truncated.kind == xtokmap.Kind.STOP).sum() == 0


@pytest.mark.parametrize("credit", SPLITS)
def test_a_rewritten_chunk_uses_shift(credit):
    index = index_of([["É".encode(), b"x"]], [["é".encode(), b"x"]])
    result = chunk_credit(tensor(-1.0, -0.5), tensor(-3.0, -0.5), index, credit)
    assert result.advantages[0].tolist() == pytest.approx([-2.0, 0.0])


def test_prior_falls_back_to_shift_where_it_cannot_divide():
    index = index_of([[b"a", b"b"]], [[b"ab"]])
    result = chunk_credit(tensor(0.0, -1e-8), tensor(-0.5), index, "prior")
    assert result.advantages[0].tolist() == pytest.approx([-0.25, -0.25], abs=1e-6)
    assert result.fallback.all()


def test_clamp_and_long_chunks():
    index = index_of([[b"a", b"b", b"c"]], [[b"ab", b"c"]])
    result = chunk_credit(tensor(-30.0, -1.0, -1.0), tensor(-0.5, -1.0), index, "full")
    assert result.advantages[0].tolist() == [10.0, 10.0, 0.0]
    assert result.clamped[0].tolist() == [True, True, False]
    short = chunk_credit(tensor(-30.0, -1.0, -1.0), tensor(-0.5, -1.0), index, "full", max_chunk_tokens=1)
    assert short.scored[0].tolist() == [False, False, True]
    assert short.advantages[0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("credit", CREDITS)
def test_a_bad_logprob_costs_its_chunk_and_leaks_nowhere(credit, bad):
    index = index_of([[b"a", b"b", b"c"], [b"a"]], [[b"ab", b"c"], [b"a"]])
    p = torch.tensor([[-0.5, bad, -1.0], [-0.5, bad, bad]])
    q = torch.tensor([[-0.75, -0.5], [-1.0, bad]])
    result = chunk_credit(p, q, index, credit, transferred=torch.full_like(p, -0.5))
    assert result.scored.tolist() == [[False, False, True], [True, False, False]]
    # `strict` does not speak about the first chunk, so nothing was lost there.
    assert result.nonfinite.any() == (credit != "strict")
    assert torch.isfinite(result.advantages).all()
    new = p.clone().requires_grad_()
    loss = policy_loss(new, p, result.advantages, torch.ones_like(p), scored=result.scored)
    loss.backward()
    assert torch.isfinite(loss)
    assert (new.grad[~result.scored] == 0).all()
    assert torch.isfinite(new.grad).all()


def test_gradients_at_ratio_one_and_at_zero_advantage():
    p = torch.tensor([[-0.5, -1.0, -2.0]], requires_grad=True)
    a = torch.tensor([[0.5, 0.0, -2.0]])
    policy_loss(p, p.detach(), a, torch.ones(1, 3), denominator=1.0).backward()
    assert p.grad.tolist() == [[-0.5, 0.0, 2.0]]


def test_chunk_gap_sums_over_chunks_and_counts_bytes():
    nats, nbytes = chunk_gap(P, Q, index_of(STUDENT, TEACHER))
    assert nats.item() == pytest.approx(-0.4 + 0.3 + 0.5, abs=1e-6)
    assert nbytes.tolist() == [12]
    with_stop = index_of([[b"a", None]], [[b"a", None]])
    p, q = tensor(-1.0, -2.0), tensor(-0.5, -5.0)
    assert chunk_gap(p, q, with_stop)[0].tolist() == [2.5]
    assert chunk_gap(p, q, with_stop, stops=False)[0].tolist() == [-0.5]


WORDS = [b"a", b"b", b"ab", b"ba", b"abc", b"c", "é".encode(), b"\xc3", b"\xa9", b" "]


@st.composite
def batches(draw):
    """Rows of one text in two random tokenizations, with logprobs."""
    rows = []
    for text in draw(st.lists(st.lists(st.sampled_from(WORDS), max_size=8), min_size=1, max_size=4)):
        joined = b"".join(text)

        def cut(joined=joined):
            at = sorted({0, len(joined), *draw(st.lists(st.integers(0, len(joined)), max_size=6))})
            return [joined[i:j] for i, j in pairwise(at)]

        rows.append((cut(), cut()))
    seed = draw(st.integers(0, 2**16))
    return rows, seed


def logprobs(rows, side, width, rng):
    x = np.zeros((len(rows), width), np.float32)
    for b, row in enumerate(rows):
        x[b, : len(row[side])] = -rng.exponential(1.0, len(row[side]))
    return torch.from_numpy(x)


@settings(deadline=None, max_examples=60)
@given(batches())
def test_credit_is_conserved_and_rows_are_independent(batch):
    rows, seed = batch
    rng = np.random.default_rng(seed)
    index = index_of([r[0] for r in rows], [r[1] for r in rows])
    p = logprobs(rows, 0, index.student_chunk.shape[1], rng)
    q = logprobs(rows, 1, index.teacher_chunk.shape[1], rng)
    l_t = index.sum_teacher(q)
    for credit in SPLITS:
        result = chunk_credit(p, q, index, credit, clamp=None)
        log_q = torch.where(result.scored, result.advantages + p, 0)
        torch.testing.assert_close(index.sum_student(log_q), l_t, atol=1e-4, rtol=1e-4)
    order = torch.from_numpy(rng.permutation(len(rows)))
    shuffled = index_of([rows[i][0] for i in order], [rows[i][1] for i in order])
    for credit in CREDITS:
        one = chunk_credit(p, q, index, credit, transferred=p).advantages[order]
        two = chunk_credit(p[order], q[order], shuffled, credit, transferred=p[order]).advantages
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(batches(), st.integers(0, 3))
def test_micro_batches_add_up(batch, extra):
    rows, seed = batch
    rng = np.random.default_rng(seed)
    index = index_of([r[0] for r in rows], [r[1] for r in rows])
    width = index.student_chunk.shape[1]
    p = logprobs(rows, 0, width, rng)
    q = logprobs(rows, 1, index.teacher_chunk.shape[1], rng)
    credit = chunk_credit(p, q, index, "prior")
    mask = index.student_len > 0
    new = (p + 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))).requires_grad_()
    whole = policy_loss(new, p, credit.advantages, mask, scored=credit.scored)
    (gradient,) = torch.autograd.grad(whole, new)
    total = mask.sum().clamp(min=1)
    parts = []
    for b in range(len(rows)):  # one row each, with other padding
        whole_row = (new, p, credit.advantages, mask, credit.scored)
        pad = [torch.nn.functional.pad(x[b : b + 1], (extra, 1)) for x in whole_row]
        parts.append(policy_loss(*pad[:4], scored=pad[4], denominator=total))
    torch.testing.assert_close(sum(parts), whole, atol=1e-6, rtol=1e-5)
    (of_parts,) = torch.autograd.grad(sum(parts), new)
    torch.testing.assert_close(of_parts, gradient, atol=1e-6, rtol=1e-5)


def test_errors_name_the_argument():
    index = index_of(STUDENT, TEACHER)
    with pytest.raises(xtokmap.XTokMapError, match="credit='best': use one of strict, prior"):
        chunk_credit(P, Q, index, "best")
    with pytest.raises(xtokmap.XTokMapError, match=r"teacher_logprobs has shape \(1, 3\), expected \(1, 4\)"):
        chunk_credit(P, Q[:, :3], index)
    with pytest.raises(xtokmap.XTokMapError, match="'cover' needs transferred="):
        chunk_credit(P, Q, index, "cover")
    with pytest.raises(xtokmap.XTokMapError, match="aggregate='token'"):
        policy_loss(P, P, P, P, aggregate="token")
    with pytest.raises(xtokmap.XTokMapError, match=r"mask has shape \(1, 2\)"):
        policy_loss(P, P, P, P[:, :2])

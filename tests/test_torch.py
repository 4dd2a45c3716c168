"""Index tensors and logprobs: values, gradients, memory, other devices, torch.compile."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import xtokmap
from xtokmap.losses.credit import CREDITS, chunk_credit, chunk_gap, policy_loss
from xtokmap.torch.index import ChunkIndex, coverage_counts
from xtokmap.torch.logits import Logits, TopK, map_rows, token_logprobs, token_logprobs_from_hidden

STUDENT = xtokmap.ByteTable.from_bytes([None, b"blue", b"bird", b"!", b" ok", b"x"], stop_ids=[0])
TEACHER = xtokmap.ByteTable.from_bytes([None, b"bluebird", b"!", b" o", b"k", b"x"], stop_ids=[0])
ROWS = ([[1, 2, 3, 4, 0], [5], []], [[1, 2, 3, 4, 0], [5, 5], []])


@pytest.fixture
def index() -> ChunkIndex:
    return ChunkIndex.from_alignment(xtokmap.Aligner(STUDENT, TEACHER).align_batch(*ROWS))


def test_fields(index):
    assert index.student_chunk.tolist() == [[0, 0, 1, 2, 3], [0, -1, -1, -1, -1], [-1] * 5]
    assert index.teacher_chunk.tolist() == [[0, 1, 2, 2, 3], [0, -1, -1, -1, -1], [-1] * 5]
    assert index.num_chunks.tolist() == [4, 1, 0]
    assert index.kind.tolist() == [[2, 0, 1, 5], [0, -1, -1, -1], [-1] * 4]
    assert index.student_len.tolist() == [[4, 4, 1, 3, 0], [1, 0, 0, 0, 0], [0] * 5]
    assert index.student_count.tolist() == [[2, 1, 1, 1], [1, 0, 0, 0], [0] * 4]
    assert index.teacher_count.tolist() == [[1, 1, 2, 1], [1, 0, 0, 0], [0] * 4]
    assert {getattr(index, name).dtype for name in ("student_chunk", "kind", "student_len")} == {torch.int64}
    assert coverage_counts(index).tolist() == [2, 1, 2, 0, 0, 1, 0]
    assert index.teacher_pos.tolist() == [[0, 0, 1, 2, 4], [0, -1, -1, -1, -1], [-1] * 5]
    assert index.teacher_off.tolist() == [[0, 4, 0, 0, 0], [0, -1, -1, -1, -1], [-1] * 5]
    assert index.kind_of_student().tolist() == [[2, 2, 0, 1, 5], [0, -1, -1, -1, -1], [-1] * 5]
    assert index.strict_teacher_pos().tolist() == [[-1, -1, 1, -1, 4], [0, -1, -1, -1, -1], [-1] * 5]
    assert index.teacher_rows(index.teacher_pos)[1].tolist() == [5, -1, -1, -1, -1]


def test_teacher_positions_follow_the_teachers_padding():
    mask = np.array([[0, 1, 1, 0, 1], [0, 0, 0, 1, 1]], bool)
    ids = np.array([[0, 1, 2, 0, 3], [0, 0, 0, 5, 5]])
    batch = xtokmap.Aligner(STUDENT, TEACHER).align_batch([[1, 2, 3], [5, 5]], ids, teacher_mask=mask)
    index = ChunkIndex.from_alignment(batch)
    assert index.teacher_pos.tolist() == [[1, 1, 2], [3, 4, -1]]
    assert index.teacher_off.tolist() == [[0, 4, 0], [0, 0, -1]]
    ragged = xtokmap.Aligner(STUDENT, TEACHER).align_batch([[1, 2, 3], [5, 5]], [[1, 2, 3], [5, 5]])
    assert ChunkIndex.from_alignment(ragged).teacher_pos.tolist() == [[0, 0, 1], [0, 1, -1]]


@pytest.mark.parametrize("left", [False, True])
def test_padding_and_its_side_move_nothing_but_positions(index, left):
    aligner = xtokmap.Aligner(STUDENT, TEACHER)
    width = 8
    ids, mask = np.full((3, width), -100), np.zeros((3, width), bool)
    for b, row in enumerate(ROWS[0]):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[b, at], mask[b, at] = row, True
    padded = ChunkIndex.from_alignment(aligner.align_batch(torch.from_numpy(ids), ROWS[1], student_mask=mask))
    assert padded.student_chunk.shape == (3, width)
    assert padded.kind.equal(index.kind)
    for b, row in enumerate(ROWS[0]):
        assert (
            padded.student_chunk[b][torch.from_numpy(mask[b])].tolist() == index.student_chunk[b, : len(row)].tolist()
        )
        assert (padded.student_chunk[b][torch.from_numpy(~mask[b])] == -1).all()


def test_one_alignment_is_a_batch_of_one():
    a = xtokmap.Aligner(STUDENT, TEACHER).align(ROWS[0][0], ROWS[1][0])
    assert ChunkIndex.from_alignment(a).student_chunk.tolist() == [[0, 0, 1, 2, 3]]


def test_an_empty_batch():
    index = ChunkIndex.from_alignment(xtokmap.Aligner(STUDENT, TEACHER).align_batch([], []))
    assert index.kind.shape == (0, 0)
    assert index.sum_student(torch.zeros(0, 0)).shape == (0, 0)
    none = ChunkIndex.from_alignment(xtokmap.Aligner(STUDENT, TEACHER).align_batch([[]], [[1]]))
    assert none.sum_teacher(torch.ones(1, 1)).shape == (1, 0)


def test_sums_and_their_way_back(index):
    x = torch.arange(15.0).reshape(3, 5).requires_grad_()
    sums = index.sum_student(x)
    assert sums.tolist() == [[1, 2, 3, 4], [5, 0, 0, 0], [0] * 4]
    back = index.to_student(sums)
    assert back.tolist() == [[1, 1, 2, 3, 4], [5, 0, 0, 0, 0], [0] * 5]
    back.sum().backward()
    assert x.grad.tolist() == [[2, 2, 1, 1, 1], [1, 0, 0, 0, 0], [0] * 5]
    assert index.sum_teacher(torch.ones(3, 5, dtype=torch.bfloat16)).dtype == torch.float32


def test_nan_on_an_unaligned_token_goes_nowhere(index):
    x = torch.where(index.student_chunk >= 0, 1.0, math.nan).requires_grad_()
    sums = index.sum_student(x)
    assert sums.tolist() == [[2, 1, 1, 1], [1, 0, 0, 0], [0] * 4]
    sums.sum().backward()
    assert x.grad.equal((index.student_chunk >= 0).float())


def test_shapes_are_checked(index):
    with pytest.raises(xtokmap.XTokMapError, match=r"x has shape \(3, 4\); the index has \(3, 5\) student tokens"):
        index.sum_student(torch.zeros(3, 4))
    with pytest.raises(xtokmap.XTokMapError, match=r"y has shape \(3, 5\); one value a chunk is \(3, 4\)"):
        index.to_student(torch.zeros(3, 5))
    with pytest.raises(xtokmap.XTokMapError, match="needs one row for each id"):
        token_logprobs(torch.zeros(2, 3, 7), torch.zeros(2, 4, dtype=torch.long))


def naive(logits, ids, temperature=1.0, softcap=None):
    x = logits.double()
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    return torch.log_softmax(x / temperature, -1).gather(-1, ids[..., None])[..., 0]


@pytest.mark.parametrize("size", [None, 1, 3])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (1.3, 5.0)])
def test_token_logprobs_against_log_softmax(size, temperature, softcap):
    g = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(2, 7, 13, generator=g)).requires_grad_()
    ids = torch.randint(13, (2, 7), generator=g)
    weights = torch.randn(2, 7, generator=g)
    got = token_logprobs(logits, ids, temperature=temperature, softcap=softcap, chunk_size=size)
    want = naive(logits, ids, temperature, softcap)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    (got_grad,) = torch.autograd.grad((got * weights).sum(), logits)
    (want_grad,) = torch.autograd.grad((want * weights).sum(), logits)
    torch.testing.assert_close(got_grad, want_grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [None, 2])
def test_the_fused_head_against_logits(size):
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 5, 6, generator=g, requires_grad=True)
    weight = torch.randn(11, 6, generator=g, requires_grad=True)
    bias = torch.randn(11, generator=g, requires_grad=True)
    ids = torch.randint(11, (2, 5), generator=g)
    got = token_logprobs_from_hidden(hidden, weight, ids, bias=bias, softcap=8.0, chunk_size=size)
    want = naive(torch.nn.functional.linear(hidden, weight, bias), ids, softcap=8.0)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    scale = torch.linspace(-1, 1, 10).reshape(2, 5)
    for a, b in zip(
        torch.autograd.grad((got * scale).sum(), (hidden, weight, bias)),
        torch.autograd.grad((want * scale).sum(), (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_bf16_logits_give_float32_and_a_bf16_gradient():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()
    ids = torch.tensor([1, 2, 3])
    got = token_logprobs(logits, ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), naive(logits, ids), atol=1e-5, rtol=1e-5)
    got.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_a_row_without_gradient_may_hold_anything():
    logits = torch.zeros(2, 5)
    logits[1] = math.nan
    logits.requires_grad_()
    out = token_logprobs(logits, torch.tensor([0, 1]))
    torch.where(torch.tensor([True, False]), out, 0).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[1] == 0).all()


def entropy_and_best(x, *_):
    log_p = torch.log_softmax(x, -1)
    return -(log_p.exp() * log_p).sum(-1), x.argmax(-1)


def entropy(x):
    log_p = torch.log_softmax(x, -1)
    return -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("size", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_map_rows_is_the_plain_function(size, dtype):
    g = torch.Generator().manual_seed(4)
    hidden = torch.randn(2, 5, 6, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(11, 6, generator=g).to(dtype).requires_grad_()
    bias = torch.randn(11, generator=g).to(dtype).requires_grad_()
    scale = torch.linspace(-1, 1, 10).reshape(2, 5).to(dtype)
    student = Logits(hidden, weight, bias, temperature=1.3, softcap=5.0)
    got, best = map_rows(entropy_and_best, student, size=size)
    raw = torch.nn.functional.linear(hidden, weight, bias)
    x = raw if dtype == torch.float64 else raw.float()
    want = entropy(5.0 * torch.tanh(x / 5.0) / 1.3)
    assert got.shape == (2, 5)
    assert got.dtype == x.dtype
    assert best.equal(raw.argmax(-1))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for a, b in zip(
        torch.autograd.grad((got * scale).sum(), (hidden, weight, bias)),
        torch.autograd.grad((want * scale).sum(), (hidden, weight, bias)),
        strict=True,
    ):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("size", [None, 2])
def test_map_rows_of_some_rows_and_of_rows_in_any_order(size):
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 4, 7, generator=g, dtype=torch.float64).requires_grad_()
    scale = torch.randn(3, 4, generator=g, dtype=torch.float64)
    rows = torch.tensor([1, 2, 7, 10])
    seen = []

    def fn(x, s):
        seen.append(len(x))
        return entropy(x) * s

    (got,) = map_rows(fn, Logits(logits), scale, size=size, rows=rows)
    assert sum(seen) == len(rows)
    keep = torch.zeros(12, dtype=torch.bool)
    keep[rows] = True
    want = torch.where(keep.view(3, 4), entropy(logits) * scale, 0)
    torch.testing.assert_close(got, want)
    (a,) = torch.autograd.grad(got.sum(), logits)
    (b,) = torch.autograd.grad(want.sum(), logits)
    torch.testing.assert_close(a, b)
    assert (a.reshape(12, 7)[~keep] == 0).all()

    # A view may take a row twice, and its views count from it.
    twice = torch.tensor([[3, 3, 0], [5, -1, 11]])
    (got,) = map_rows(entropy_and_best, Logits(logits).at(twice), size=size)[:1]
    weights = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 5.0]])
    (a,) = torch.autograd.grad((got * weights).sum(), logits)
    picked = logits.reshape(12, 7)[twice.clamp(min=0)]
    (b,) = torch.autograd.grad((entropy(picked) * weights).sum(), logits)
    torch.testing.assert_close(a, b)
    again = Logits(logits).at(twice).at(torch.tensor([2, 3]))
    assert again.slice(0, 2).equal(logits.detach().reshape(12, 7)[[0, 5]])


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 3, 4])])
def test_tensors_beside_the_student_get_their_gradient(rows):
    g = torch.Generator().manual_seed(7)
    logits = torch.randn(2, 3, 4, generator=g, dtype=torch.float64).requires_grad_()
    scale = torch.randn(2, 3, generator=g, dtype=torch.float64).requires_grad_()
    shift = torch.randn(2, 3, 2, generator=g, dtype=torch.float64).requires_grad_()

    def fn(x, a, b, c):
        return entropy(x * a[:, None]) + (a * b[:, 0]) ** 2

    def loss(logits, scale, shift):
        (got,) = map_rows(fn, Logits(logits), scale, shift, torch.zeros(2, 3), size=2, rows=rows)
        return got

    assert torch.autograd.gradcheck(loss, (logits, scale, shift))


def test_map_rows_takes_shifted_logits_without_copying_them():
    logits = torch.randn(2, 5, 9, requires_grad=True)
    shifted = Logits(logits[:, :-1])
    assert shifted.slice(3, 6).equal(logits.detach()[:, :-1].reshape(8, 9)[3:6])
    (got,) = map_rows(lambda x: x.logsumexp(-1), shifted, size=3)
    got.sum().backward()
    assert (logits.grad[:, -1] == 0).all()
    torch.testing.assert_close(logits.grad[:, :-1], torch.softmax(logits.detach()[:, :-1], -1))


def test_map_rows_with_a_teacher_of_another_vocabulary_and_top_k():
    g = torch.Generator().manual_seed(6)
    logits, teacher = torch.randn(2, 3, 5, generator=g), torch.randn(2, 4, 8, generator=g, requires_grad=True)
    top = TopK(torch.tensor([[[1, 2], [0, -1], [3, 4], [2, 0]]] * 2), torch.randn(2, 4, 2, generator=g))
    at = torch.tensor([[0, 2, -1], [4, 5, 7]])

    def fn(x, z, listed):
        ids, logprobs = listed
        return x.logsumexp(-1) - z.logsumexp(-1) + logprobs[:, 0], ids[:, 0]

    got, ids = map_rows(fn, Logits(logits.requires_grad_()), Logits(teacher).at(at), top.at(at), size=2)
    flat = teacher.reshape(8, 8)[at.clamp(min=0)].logsumexp(-1)
    torch.testing.assert_close(got, logits.logsumexp(-1) - flat + top.logprobs.reshape(8, 2)[at.clamp(min=0)][..., 0])
    assert ids.tolist() == [[1, 3, 1], [1, 0, 2]]
    got.sum().backward()
    assert teacher.grad is None


def test_map_rows_without_rows_and_without_a_gradient():
    empty = torch.zeros(2, 0, 5, requires_grad=True)
    got, best = map_rows(entropy_and_best, Logits(empty))
    assert got.shape == best.shape == (2, 0)
    got.sum().backward()
    assert empty.grad.shape == (2, 0, 5)
    logits = torch.zeros(2, 3, 5, requires_grad=True)
    (got,) = map_rows(lambda x: x.detach()[:, 0], Logits(logits))
    got.sum().backward()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_stands_in_an_unwanted_row_reaches_no_gradient(bad):
    hidden, weight = torch.ones(3, 2), torch.randn(5, 2, requires_grad=True)
    hidden[1] = bad
    hidden.requires_grad_()
    (got,) = map_rows(entropy_and_best, Logits(hidden[None], weight))[:1]
    torch.where(torch.tensor([[True, False, True]]), got, 0).sum().backward()
    assert torch.isfinite(weight.grad).all()
    assert (hidden.grad[1] == 0).all()
    assert torch.isfinite(hidden.grad).all()


def test_rows_are_checked():
    rows, weight = torch.zeros(2, 3, 4), torch.zeros(5, 4)
    for match, make in [
        (r"rows: expected floats \[..., V\]", lambda: Logits(rows.long())),
        ("bias goes with weight", lambda: Logits(rows, bias=torch.zeros(4))),
        (r"weight has shape \(4, 5\); hidden states \(2, 3, 4\) need \[V, 4\]", lambda: Logits(rows, weight.T)),
        (r"bias has shape \(4,\), expected \(5,\)", lambda: Logits(rows, weight, torch.zeros(4))),
        ("weight is torch.float64 on cpu, rows are torch.float32", lambda: Logits(rows, weight.double())),
        ("temperature=0 must be positive", lambda: Logits(rows, temperature=0)),
        ("softcap=-1 must be positive", lambda: Logits(rows, softcap=-1)),
        ("both are", lambda: TopK(torch.zeros(1, 2, 3, dtype=torch.long), torch.zeros(1, 2))),
        ("ids are torch.float32", lambda: TopK(torch.zeros(1, 2), torch.zeros(1, 2))),
        (
            r"others\[0\] has leading shape \(2, 4\), the student's rows \(2, 3\)",
            lambda: map_rows(entropy_and_best, Logits(rows), Logits(torch.zeros(2, 4, 4))),
        ),
    ]:
        with pytest.raises(xtokmap.XTokMapError, match=match):
            make()


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.nbytes = max(self.nbytes, x.nbytes)
        return out


def test_no_float32_copy_of_the_logits():
    t, v = 64, 2000
    logits = torch.randn(t, v).bfloat16().requires_grad_()
    with LargestTensor() as largest:
        token_logprobs(logits, torch.zeros(t, dtype=torch.long), chunk_size=4).sum().backward()
    assert 0 < largest.nbytes <= 4 * v * 4
    hidden, weight = torch.randn(t, 8).bfloat16().requires_grad_(), torch.randn(v, 8).bfloat16()
    with LargestTensor() as largest:
        token_logprobs_from_hidden(hidden, weight, torch.zeros(t, dtype=torch.long), chunk_size=4).sum().backward()
    assert 0 < largest.nbytes <= 4 * v * 4
    for student in (Logits(logits), Logits(hidden, weight)):
        with LargestTensor() as largest:
            map_rows(entropy_and_best, student, size=4)[0].sum().backward()
        assert 0 < largest.nbytes <= 4 * v * 4


def step(logits, ids, teacher_logprobs, index, mask, credit):
    """What an update does between the model's logits and the loss."""
    logprobs = token_logprobs(logits, ids, chunk_size=8)
    given = chunk_credit(logprobs, teacher_logprobs, index, credit, transferred=logprobs.detach())
    nats, nbytes = chunk_gap(logprobs, teacher_logprobs, index)
    loss = policy_loss(logprobs, logprobs.detach(), given.advantages, mask, scored=given.scored)
    return loss, nats, nbytes, coverage_counts(index)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("credit", CREDITS)
def test_a_step_on_fake_tensors_mixes_no_devices_and_never_syncs(index, credit, device):
    # A fake tensor has no data: .item(), nonzero or a boolean mask would raise; so would a CPU tensor among CUDA ones.
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fields = [mode.from_tensor(getattr(index, f)).to(device) for f in ChunkIndex.__dataclass_fields__]
        logits = torch.empty(3, 5, 11, device=device, dtype=torch.bfloat16, requires_grad=True)
        ids = torch.zeros(3, 5, device=device, dtype=torch.long)
        mask = torch.ones(3, 5, device=device, dtype=torch.bool)
        out = step(logits, ids, torch.empty(3, 5, device=device), ChunkIndex(*fields), mask, credit)
        assert out[0].shape == ()
        assert {x.device.type for x in out} == {device}
        if device == "cpu":  # autograd's engine asks a CUDA driver for its streams, also for fake tensors
            out[0].backward()
            assert logits.grad.dtype == torch.bfloat16


def test_a_step_compiles_whole(index):
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 5, 11, generator=g, requires_grad=True)
    ids, mask = torch.randint(11, (3, 5), generator=g), index.student_chunk >= 0
    teacher = -torch.rand(3, 5, generator=g)
    want = step(logits, ids, teacher, index, mask, "prior")
    (want_grad,) = torch.autograd.grad(want[0], logits)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(logits, ids, teacher, index, mask, "prior")
    (got_grad,) = torch.autograd.grad(got[0], logits)
    for a, b in zip((*got, got_grad), (*want, want_grad), strict=True):
        torch.testing.assert_close(a, b)

"""Index tensors and logprobs: values, gradients, memory, other devices, torch.compile."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import xtokmap
from xtokmap.losses import CREDITS, chunk_credit, chunk_gap, policy_loss
from xtokmap.torch import ChunkIndex, coverage_counts, token_logprobs, token_logprobs_from_hidden

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
    assert coverage_counts(index).tolist() == [2, 1, 2, 0, 0, 1]


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

"""A student that is held to what it was, and the learning rate over a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import tiny
import xtokmap
from xtokmap.models import with_adapter
from xtokmap.teachers import LocalTeacher
from xtokmap.torch import Logits
from xtokmap.train import Config
from xtokmap.train.run import Run
from xtokmap.train.sampling import Roller
from xtokmap.train.support.anchor import Anchor

pytestmark = pytest.mark.filterwarnings("ignore:fastokens gives other ids")

PROMPTS = ["the dog", "the sky", "a fox", "thirteen"]


def roller_of(**changes: Any) -> Roller:
    student, tokenizer, teacher, teacher_tokenizer = tiny.pair()
    if changes.get("lora_rank"):
        student = with_adapter(student, changes["lora_rank"])
    settings = {"steps": 8, "batch_size": 4, "max_new_tokens": 12, "learning_rate": 1e-2, "warmup_steps": 0}
    config = Config(**{**settings, **changes})
    return Roller(student, tokenizer, LocalTeacher(teacher, teacher_tokenizer), config)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_it_is_the_kl_to_the_start_and_its_gradient(lora_rank):
    torch.manual_seed(0)
    roller = roller_of(anchor=0.5, lora_rank=lora_rank)
    batch = roller.sample(PROMPTS).batch
    with torch.no_grad():
        start = roller.rows(batch).slice(0, sum(map(len, batch.student_ids))).log_softmax(-1)
    loss, kl = roller.anchor.loss(roller.rows(batch), batch, 7)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for parameter in roller.student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    loss, kl = roller.anchor.loss(roller.rows(batch), batch, 7)
    loss.backward()
    found = {name: p.grad.clone() for name, p in roller.student.named_parameters() if p.grad is not None}
    roller.student.zero_grad()
    now = roller.rows(batch)
    log_p = torch.nn.functional.linear(now.rows, now.weight, now.bias).log_softmax(-1)
    want = (log_p.exp() * (log_p - start)).sum()
    assert kl.item() == pytest.approx(want.item(), rel=1e-4)
    assert loss.item() == pytest.approx(0.5 * want.item() / 7, rel=1e-4)
    (0.5 * want / 7).backward()
    assert found
    for name, parameter in roller.student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3)


def drift(roller: Roller) -> float:
    """How far a student is from where it began after a few steps."""
    probe = Anchor(roller.student, 1.0) if roller.anchor is None else roller.anchor
    torch.manual_seed(1)
    run = Run(roller, PROMPTS, watch=False)
    for _ in range(8):
        line = run.step()
    assert ("anchor" in line) == (roller.anchor is not None)
    batch = roller.sample(PROMPTS).batch
    return probe.loss(roller.rows(batch), batch, 1)[1].item()


def test_it_keeps_the_student_near():
    assert drift(roller_of(anchor=30.0)) < drift(roller_of()) / 2


def test_a_row_without_a_finite_value_counts_for_nothing():
    roller = roller_of(anchor=1.0)
    batch = roller.sample(PROMPTS).batch
    rows = roller.rows(batch)
    broken = rows.rows.detach().clone()
    broken[0] = math.nan
    leaf = broken.requires_grad_()
    loss, _ = roller.anchor.loss(Logits(leaf, rows.weight.detach()), batch, 1)
    loss.backward()
    assert math.isfinite(loss.item())
    assert (leaf.grad[0] == 0).all()
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize(
    ("decay", "want"),
    [
        ("none", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_the_rate_rises_and_falls(decay, want):
    roller = roller_of(decay=decay, steps=6, warmup_steps=2, learning_rate=1e-3)
    assert [roller.config.rate(k) for k in range(6)] == pytest.approx(want)
    run = Run(roller, PROMPTS, watch=False)
    rates = []
    for _ in range(6):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.step()
    assert rates == pytest.approx([1e-3 * share for share in want])


def test_what_cannot_be_is_named():
    with pytest.raises(xtokmap.XTokMapError, match="decay='slow': use one of none, linear, cosine"):
        Config(decay="slow")
    with pytest.raises(xtokmap.XTokMapError, match="anchor with shard"):
        Config(anchor=0.1, shard=True)
    with pytest.raises(xtokmap.XTokMapError, match="anchor=-1"):
        Config(anchor=-1)

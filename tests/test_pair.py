"""Pair: every loss by name, whatever a model returns, in a plain loop, a DataLoader, and beside the project's own."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import tiny
from xtokmap import XTokMapError
from xtokmap.losses.rule import Computed, LossRule
from xtokmap.losses.table import LOSSES
from xtokmap.models import with_adapter
from xtokmap.teachers import LocalTeacher
from xtokmap.torch import Logits, Pair
from xtokmap.train.config import Config
from xtokmap.train.sampling import Roller
from xtokmap.train.step import update

pytestmark = pytest.mark.filterwarnings("ignore:fastokens gives other ids")

PROMPTS = ["the dog", "a fox?", "what is the colour of the sky?"]
ANSWERS = ["the dog and runs away", "the sky is blue", "over"]


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any, Any, Any]:
    student, tokenizer, teacher, teacher_tokenizer = tiny.pair()
    return student.eval(), tokenizer, teacher.eval(), teacher_tokenizer


def completions(tokenizer: Any) -> list[list[int]]:
    return [[*tokenizer(answer).input_ids, tokenizer.eos_token_id] for answer in ANSWERS]


def hidden(model: Any, inputs: dict[str, torch.Tensor], softcap: float | None = None) -> Logits:
    rows = model.model(**inputs).last_hidden_state
    return Logits(rows, model.lm_head.weight, softcap=softcap)


def gradient(model: Any, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_whatever_a_model_returns(models: Any, name: str) -> None:
    student, tokenizer, teacher, teacher_tokenizer = models
    pair = Pair(tokenizer, teacher_tokenizer, loss=name)
    batch = pair.prepare(PROMPTS, completions(tokenizer))
    with torch.no_grad():
        theirs = teacher(**batch.teacher_inputs)
    out = pair.loss(student(**batch.student_inputs), theirs, batch)
    assert torch.isfinite(out.loss)
    want = gradient(student, out.loss)
    assert want.abs().max() > 0
    assert all(math.isfinite(float(value)) for value in out.metrics.values())
    coverage = sum(float(value) for key, value in out.metrics.items() if key.startswith("coverage/"))
    assert 0 < coverage <= 1 + 1e-6
    forms = [
        (student(**batch.student_inputs).logits, theirs.logits),
        (hidden(student, batch.student_inputs), hidden(teacher, batch.teacher_inputs, softcap=3.0)),
        (student(**batch.student_inputs), pair.scores(theirs, batch)),
        (student(**batch.student_inputs, logits_to_keep=batch.student_inputs["input_ids"].shape[1] - 1), theirs),
    ]
    for own, other in forms:
        again = pair.loss(own, other, batch)
        torch.testing.assert_close(again.loss, out.loss, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(gradient(student, again.loss), want, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up(models: Any, name: str) -> None:
    student, tokenizer, teacher, teacher_tokenizer = models
    pair = Pair(tokenizer, teacher_tokenizer, loss=name)
    batch = pair.prepare(PROMPTS, completions(tokenizer))
    scores = pair.scores(teacher(**batch.teacher_inputs), batch)
    tokens = batch.completion_mask.sum()
    whole = pair.loss(student(**batch.student_inputs), scores, batch, denominator=tokens)
    parts = [batch.select([2, 0]), batch.select([1])]
    found = [pair.loss(student(**part.student_inputs), scores, part, denominator=tokens) for part in parts]
    torch.testing.assert_close(sum(part.loss for part in found), whole.loss, rtol=1e-4, atol=1e-6)
    for key, value in whole.sums.items():
        torch.testing.assert_close(
            torch.cat([part.sums[key].reshape(-1) for part in found]).sum(), value.sum(), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ["transfer_kl", "strict_kl", "cover", "prior"])
def test_a_micro_batch_takes_what_the_teacher_returns_for_it(models: Any, name: str) -> None:
    student, tokenizer, teacher, teacher_tokenizer = models
    pair = Pair(tokenizer, teacher_tokenizer, loss=name)
    batch = pair.prepare(PROMPTS, completions(tokenizer))
    scores = pair.scores(teacher(**batch.teacher_inputs), batch)
    old = torch.full(batch.completion_mask.shape, -2.0)
    for rows in ([1, 0], [2], [2, 0]):
        part = batch.select(rows)
        own = student(**part.student_inputs)
        want = pair.loss(own, scores, part, old_logprobs=old[rows])
        for given in (teacher(**part.teacher_inputs), LocalTeacher(teacher, teacher_tokenizer)):
            found = pair.loss(own, given, part, old_logprobs=old[rows])
            torch.testing.assert_close(found.loss, want.loss, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(found.logprobs, want.logprobs)


@pytest.mark.parametrize("loss", ["transfer_kl", "byte_kl", "cover", "prior"])
def test_it_is_the_loops_loss(models: Any, loss: str) -> None:
    student, tokenizer, teacher, teacher_tokenizer = models
    config = Config(loss=loss, max_new_tokens=12, micro_batch=2, device="cpu")
    roller = Roller(student, tokenizer, LocalTeacher(teacher, teacher_tokenizer), config)
    torch.manual_seed(0)
    rollouts = roller.roll(PROMPTS)
    result = update(roller, rollouts, torch.optim.SGD(student.parameters(), lr=0.0))
    pair = Pair(tokenizer, teacher_tokenizer, loss=loss)
    batch = pair.prepare(PROMPTS, rollouts.batch.student_ids)
    assert batch.teacher_ids == rollouts.batch.teacher_ids
    out = pair.loss(student(**batch.student_inputs), teacher(**batch.teacher_inputs), batch)
    torch.testing.assert_close(out.loss.detach(), result.loss, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(out.sums["nats"], result.nats, rtol=1e-3, atol=1e-3)
    assert torch.equal(out.sums["bytes"], result.nbytes)


def test_one_tokenizer_on_both_sides_is_the_exact_kl(models: Any) -> None:
    """The same-tokenizer step that people have: with Pair nothing changes."""
    student, tokenizer, *_ = models
    teacher = tiny.student_model(seed=5).eval()
    pair = Pair(tokenizer, tokenizer, loss="transfer_kl")
    batch = pair.prepare(PROMPTS, completions(tokenizer))
    own, theirs = student(**batch.student_inputs).logits, teacher(**batch.teacher_inputs).logits
    out = pair.loss(own, theirs, batch)
    p, q = own.log_softmax(-1), theirs.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    spans = [
        (len(ask), len(ask) + len(answer))
        for ask, answer in zip(batch.student_prompt_ids, batch.student_ids, strict=True)
    ]
    terms = [kl[b, start - 1 : stop - 1] for b, (start, stop) in enumerate(spans)]
    torch.testing.assert_close(out.loss, torch.cat(terms).mean(), rtol=1e-4, atol=1e-6)


def test_prompts_and_completions_in_every_form(models: Any) -> None:
    _, tokenizer, _, teacher_tokenizer = models
    pair = Pair(tokenizer, teacher_tokenizer, loss="prior")
    rows = completions(tokenizer)
    batch = pair.prepare(PROMPTS, rows)
    ready = pair.prepare((batch.student_prompt_ids, batch.teacher_prompt_ids), [torch.tensor(row) for row in rows])
    width = max(map(len, rows)) + 2
    padded = torch.tensor([row + [tokenizer.eos_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    for other in (ready, pair.prepare(PROMPTS, padded), pair.prepare(PROMPTS, padded, mask)):
        assert other.student_ids == rows
        assert other.teacher_ids == batch.teacher_ids
        assert other.student_prompt_ids == batch.student_prompt_ids
        assert torch.equal(other.completion_mask, batch.completion_mask)
    asked = pair.prompt_inputs(PROMPTS)
    for row, flags, ids in zip(
        asked["input_ids"], asked["attention_mask"].bool(), batch.student_prompt_ids, strict=True
    ):
        assert row[flags].tolist() == ids


def test_in_the_workers_of_a_data_loader(models: Any) -> None:
    student, tokenizer, teacher, teacher_tokenizer = models
    pair = Pair(tokenizer, teacher_tokenizer, loss="cover")
    rows = list(zip(PROMPTS, completions(tokenizer), strict=True)) * 2
    whole = pair.prepare([p for p, _ in rows], [c for _, c in rows])
    loader = DataLoader(
        rows,
        batch_size=3,
        num_workers=2,
        collate_fn=lambda some: pair.prepare([p for p, _ in some], [c for _, c in some]),
    )
    found = list(loader)
    assert [ids for batch in found for ids in batch.teacher_ids] == whole.teacher_ids
    for batch in found:
        out = pair.loss(student(**batch.student_inputs), teacher(**batch.teacher_inputs), batch)
        assert torch.isfinite(out.loss)


def test_with_an_adapter(models: Any) -> None:
    pytest.importorskip("peft")
    _, tokenizer, teacher, teacher_tokenizer = models
    student = with_adapter(tiny.student_model(), 2, 4.0, "all-linear")
    pair = Pair(tokenizer, teacher_tokenizer)
    batch = pair.prepare(PROMPTS, completions(tokenizer))
    pair.loss(student(**batch.student_inputs), teacher(**batch.teacher_inputs), batch).loss.backward()
    trained = [p for p in student.parameters() if p.requires_grad]
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained)


def test_with_a_compiled_student(models: Any) -> None:
    student, tokenizer, teacher, teacher_tokenizer = models
    pair = Pair(tokenizer, teacher_tokenizer)
    batch = pair.prepare(PROMPTS, completions(tokenizer))
    theirs = teacher(**batch.teacher_inputs)
    want = pair.loss(student(**batch.student_inputs), theirs, batch).loss
    compiled = torch.compile(student, backend="aot_eager")
    torch.testing.assert_close(pair.loss(compiled(**batch.student_inputs), theirs, batch).loss, want)


def test_with_accelerate(models: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    _, tokenizer, teacher, teacher_tokenizer = models
    accelerator = accelerate.Accelerator(cpu=True)
    student = tiny.student_model()
    prepared, optimizer = accelerator.prepare(student, torch.optim.SGD(student.parameters(), lr=0.1))
    pair = Pair(tokenizer, teacher_tokenizer)
    batch = pair.prepare(PROMPTS, completions(tokenizer), device=accelerator.device)
    before = [p.detach().clone() for p in student.parameters()]
    out = pair.loss(prepared(**batch.student_inputs), teacher(**batch.teacher_inputs), batch)
    accelerator.backward(out.loss)
    optimizer.step()
    assert any(not torch.equal(p, old) for p, old in zip(student.parameters(), before, strict=True))


def test_the_example_runs(models: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[1] / "examples" / "own_loop.py"
    spec = importlib.util.spec_from_file_location("own_loop", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    student, tokenizer, teacher, teacher_tokenizer = tiny.pair()
    before = [p.detach().clone() for p in student.parameters()]
    torch.manual_seed(0)
    module.distill(student, tokenizer, teacher, teacher_tokenizer, steps=2)
    assert any(not torch.equal(p, old) for p, old in zip(student.parameters(), before, strict=True))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "kl_per_byte" in lines[0]


def test_a_loss_of_ones_own(models: Any) -> None:
    student, tokenizer, teacher, teacher_tokenizer = models

    def squares(x: Any) -> Computed:
        gap = x.index.sum_student(x.logprobs) - x.index.sum_teacher(x.teacher_logprobs)
        both = (x.index.student_count > 0) & (x.index.teacher_count > 0)
        loss = torch.where(both, gap**2, 0).sum() / x.denominator
        return Computed(loss, {"scored": both.sum(), "nonfinite": both.sum() * 0})

    pair = Pair(tokenizer, teacher_tokenizer, LossRule(squares))
    batch = pair.prepare(PROMPTS, completions(tokenizer))
    out = pair.loss(student(**batch.student_inputs), teacher(**batch.teacher_inputs), batch)
    assert gradient(student, out.loss).abs().max() > 0


def test_what_cannot_be_is_refused(models: Any) -> None:
    student, tokenizer, teacher, teacher_tokenizer = models
    with pytest.raises(XTokMapError, match=r"loss='kl': use one of transfer_kl, byte_kl"):
        Pair(tokenizer, teacher_tokenizer, loss="kl")
    with pytest.raises(XTokMapError, match=r"settings of the loss: .*'gamma'"):
        Pair(tokenizer, teacher_tokenizer, gamma=1)
    pair = Pair(tokenizer, teacher_tokenizer)
    rows = completions(tokenizer)
    with pytest.raises(XTokMapError, match="2 student_prompt_ids for 3 completions"):
        pair.prepare(PROMPTS[:2], rows)
    with pytest.raises(XTokMapError, match=r"student_prompt_ids\[1\] is empty"):
        pair.prepare(([[4], [], [4]], [[4], [4], [4]]), rows)
    batch = pair.prepare(PROMPTS, rows)
    own, theirs = student(**batch.student_inputs), teacher(**batch.teacher_inputs)
    with pytest.raises(XTokMapError, match="needs a teacher"):
        pair.loss(own, None, batch)
    with pytest.raises(XTokMapError, match="expected a model's output"):
        pair.loss("rows", theirs, batch)
    with pytest.raises(XTokMapError, match="the batch has 3 rows"):
        pair.loss(own.logits[:2], theirs, batch)
    with pytest.raises(XTokMapError, match="larger logits_to_keep"):
        pair.loss(own.logits[:, -2:], theirs, batch)
    scores = replace(pair.scores(theirs, batch), target=None)
    with pytest.raises(XTokMapError, match="this loss needs target"):
        pair.loss(own, scores, batch)

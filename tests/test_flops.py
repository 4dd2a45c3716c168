"""FLOPs worked out from shapes, against PyTorch's own count of what ran."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import tiny
import xtokmap
from xtokmap.teachers.local import LocalTeacher
from xtokmap.train.config import Config
from xtokmap.train.loop import Run
from xtokmap.train.sampling import Roller
from xtokmap.train.step import update
from xtokmap.train.support.flops import ModelFlops, StepFlops

pytestmark = pytest.mark.filterwarnings("ignore:fastokens gives other ids")


def gpt2():
    config = GPT2Config(vocab_size=90, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def neox():
    config = GPTNeoXConfig(
        vocab_size=90, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


def _addmm(_, a, b, out_shape=None, **__) -> int:
    return 2 * a[0] * a[1] * b[1]


def counted(work) -> int:
    # In place: the counter does not know it by itself.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm}) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("make", [gpt2, neox, tiny.student_model, tiny.teacher_model])
def test_a_forward_and_a_backward_pass(make):
    model = make().eval()
    model.set_attn_implementation("eager")  # the fused backward works the scores out twice
    ids = torch.randint(0, 90, (3, 17))
    model(input_ids=ids, use_cache=False)
    kept = {}
    forward = counted(lambda: kept.update(out=model(input_ids=ids, use_cache=False).logits))
    found = ModelFlops.of(model).forward([17] * 3, 3 * 17)
    # Rotary positions are a matrix product in some models: a thousandth.
    assert found == pytest.approx(forward, rel=5e-3)
    backward = counted(lambda: kept["out"].sum().backward())
    assert 2 * found == pytest.approx(backward, rel=5e-3)


@pytest.mark.parametrize("make", [gpt2, neox])
def test_sampling_with_a_cache(make):
    model = make().eval()
    ids = torch.randint(1, 90, (2, 9))
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    want = counted(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **how))
    assert ModelFlops.of(model).generate([9, 9], [12, 12]) == pytest.approx(want, rel=5e-3)
    assert ModelFlops.of(model).generate([9], [1]) == ModelFlops.of(model).forward([9], 1)


@pytest.mark.parametrize(
    ("method", "loss", "anchor", "slack"),
    [
        ("opd", "prior", 0.0, 0.01),
        ("opd", "prior", 0.1, 0.01),
        ("opd", "cover", 0.0, 0.01),
        ("sft", "auto", 0.0, 0.01),
        # Rows without a signal are not worked out.
        ("opd", "transfer_kl", 0.0, 0.2),
        ("opd", "byte_kl", 0.0, 0.2),
        # An untrained teacher's samples are half U+FFFD, which is aligned and has no signal.
        ("kd", "transfer_kl", 0.0, 0.4),
    ],
)
def test_a_step(method, loss, anchor, slack):
    student, tokenizer, teacher, teacher_tokenizer = tiny.pair()
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    settings = Config(
        method=method, loss=loss, anchor=anchor, micro_batch=1, max_new_tokens=20, max_chunk_tokens=0, batch_size=1
    )
    roller = Roller(student, tokenizer, LocalTeacher(teacher, teacher_tokenizer, micro_batch=1), settings)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    torch.manual_seed(0)
    update(roller, roller.roll(["the dog"]), optimizer)  # what is asked of a model once
    kept = {}
    rolled = counted(lambda: kept.update(rollouts=roller.roll(["the dog"])))
    updated = counted(lambda: update(roller, kept["rollouts"], optimizer))
    rollouts = kept["rollouts"]
    lengths = [[len(row) for row in side] for side in rollouts.batch.sides]
    flops = StepFlops(ModelFlops.of(student), ModelFlops.of(teacher))
    found = flops.step(settings.loss_rule, *lengths, on_policy=method == "opd", anchored=anchor > 0)
    assert found["sample"] + found["teacher"] == pytest.approx(rolled, rel=0.01)
    assert 0.99 * updated < found["update"] < (1 + slack) * updated
    assert (found["teacher"] == 0) == (method == "sft")


def test_a_run_accounts_for_every_step():
    student, tokenizer, teacher, teacher_tokenizer = tiny.pair()
    settings = Config(loss="prior", max_new_tokens=8, max_chunk_tokens=0, batch_size=2)
    run = Run(Roller(student, tokenizer, LocalTeacher(teacher, teacher_tokenizer), settings), ["the dog", "the sky"])
    spent = run.step()["flops"]
    assert set(spent) == {"sample", "teacher", "update"}
    assert all(value > 0 for value in spent.values())
    twice = Config(loss="prior", max_new_tokens=8, max_chunk_tokens=0, batch_size=2, updates=2)
    run = Run(Roller(student, tokenizer, LocalTeacher(teacher, teacher_tokenizer), twice), ["the dog", "the sky"])
    assert run.step()["flops"]["update"] > 1.5 * spent["update"]


def test_a_mixture_of_experts_is_refused_and_still_trains():
    config = MixtralConfig(vocab_size=len(tiny.student_tokenizer()), num_local_experts=4, **tiny.SIZE)
    student = MixtralForCausalLM(config)
    with pytest.raises(xtokmap.XTokMapError, match="num_local_experts=4: only dense models"):
        ModelFlops.of(student)
    teacher = LocalTeacher(tiny.teacher_model(), tiny.teacher_tokenizer())
    settings = Config(loss="prior", max_new_tokens=4, max_chunk_tokens=0, batch_size=1)
    run = Run(Roller(student, tiny.student_tokenizer(), teacher, settings), ["the dog"])
    assert "flops" not in run.step()

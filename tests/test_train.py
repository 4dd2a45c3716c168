"""The loop: it learns, repeats itself, saves, and says what is wrong."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
import xtokmap
from xtokmap.chat import render
from xtokmap.losses.credit import chunk_gap
from xtokmap.models import float32_parameters, pick_device, write_back
from xtokmap.teachers.local import LocalTeacher
from xtokmap.train.config import Config
from xtokmap.train.evaluation import evaluate, ratio_with_error
from xtokmap.train.generation import sample
from xtokmap.train.loop import train
from xtokmap.train.sampling import Roller
from xtokmap.train.step import update

# It reads "<eos>" in a text as the special token, for the tiny teacher: found by the check, and `tokenizers` is used.
pytestmark = pytest.mark.filterwarnings("ignore:fastokens gives other ids")


def config(prompts, **changes) -> Config:
    values = {
        "prompts": str(prompts),
        "output": str(prompts.parent / "out"),
        "steps": 3,
        "batch_size": 4,
        "max_new_tokens": 12,
        "learning_rate": 3e-3,
        "warmup_steps": 1,
        "micro_batch": 3,
        "max_chunk_tokens": 0,
        "device": "cpu",
    }
    return Config(**{**values, **changes})


def test_a_run_leaves_everything_that_it_promises(prompts, capsys):
    result = train(config(prompts), models=tiny.pair())
    out = result.output
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines == result.metrics
    for line in lines:
        assert set(line["time"]) == {"sample", "retokenize", "teacher", "align", "update", "health"}
        assert sum(line["coverage"].values()) == pytest.approx(1)
        assert 0 < line["scored"] <= 1
        assert 0 <= line["undetermined"] <= 1
        assert 0 <= line["shared"] <= 1
        assert 0 <= line["completed"] <= 1
        assert 0 < line["response_length"] <= 12
        assert line["grad_norm"] > 0
        assert line["tokens_per_second"] > 0
        assert math.isfinite(line["kl_per_byte"])
        assert line["kl_error"] > 0
        assert line["skipped_updates"] == 0
    assert json.loads((out / "config.json").read_text())["max_new_tokens"] == 12
    assert (out / "student" / "model.safetensors").exists()
    saved = AutoModelForCausalLM.from_pretrained(out / "student")
    assert AutoTokenizer.from_pretrained(out / "student").eos_token == "<|im_end|>"
    untrained = tiny.student_model()
    assert not all(torch.equal(a, b) for a, b in zip(saved.parameters(), untrained.parameters(), strict=True))
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["before"]["kl_per_byte"] == pytest.approx(result.before.kl_per_byte[0])
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step ") for line in printed) == 3


@pytest.mark.parametrize("credit", ["prior", "full", "cover", "transfer_kl", "byte_kl"])
def test_the_student_moves_towards_the_teacher(prompts, credit):
    changes = {"steps": 40, "batch_size": 16, "micro_batch": 16, "loss": credit, "eval_samples": 40}
    result = train(config(prompts, learning_rate=1e-2, **changes), models=tiny.pair())
    fall, error = result.after.fall_since(result.before)
    assert fall > 3 * error > 0


@pytest.mark.parametrize(("method", "beta"), [("kd", 0.0), ("sft", 1.0)])
def test_the_student_learns_from_the_teachers_samples(prompts, method, beta):
    changes = {"steps": 60, "batch_size": 16, "micro_batch": 16, "method": method, "beta": beta, "eval_samples": 0}
    models = tiny.pair()
    with torch.no_grad():
        for p in models[2].parameters():
            p.mul_(2)  # a teacher that prefers something
    start = {name: value.clone() for name, value in models[0].state_dict().items()}
    judge = Roller(*models[:2], LocalTeacher(*models[2:]), config(prompts, method="kd", max_new_tokens=12))
    torch.manual_seed(5)
    answers = judge.roll(["the sky", "the dog", "a fox?", "1 + 2"] * 8)

    def forward_kl():
        nats, nbytes = chunk_gap(judge.all_logprobs(answers.batch), answers.teacher.logprobs, answers.batch.index)
        return float(-nats.sum() / nbytes.sum())

    result = train(config(prompts, learning_rate=1e-2, **changes), models=models)
    after = forward_kl()
    models[0].load_state_dict(start)
    assert after < forward_kl() - 0.05
    assert math.isnan(result.metrics[0]["kl_per_byte"]) == (method == "sft")
    assert ("teacher" in result.metrics[0]["time"]) == (method == "kd")


def test_fine_tuning_is_the_mean_negative_logprob_of_the_teachers_answers(prompts):
    student, tokenizer, teacher, teacher_tokenizer = tiny.pair()
    roller = Roller(student, tokenizer, LocalTeacher(teacher, teacher_tokenizer), config(prompts, method="sft"))
    torch.manual_seed(0)
    rollouts = roller.roll(["the sky", "the dog", "a fox?"])
    assert rollouts.teacher is None
    for own, theirs in zip(rollouts.batch.student_ids, rollouts.batch.teacher_ids, strict=True):
        text = teacher_tokenizer.decode(theirs, skip_special_tokens=True)
        spelled = roller.aligner.student.decode(own).decode(errors="replace")
        assert spelled == text
    found = update(roller, rollouts, torch.optim.SGD(student.parameters(), lr=0.0))
    logprobs = []
    for p, c in zip(rollouts.batch.student_prompt_ids, rollouts.batch.student_ids, strict=True):
        logits = student(torch.tensor([p + c])).logits[0, len(p) - 1 : -1].detach()
        logprobs.append(torch.log_softmax(logits, -1).gather(1, torch.tensor([c]).T))
    assert float(found.loss) == pytest.approx(-float(torch.cat(logprobs).mean()), rel=1e-5)


def test_prompts_may_be_conversations(tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "the sky?"},
        {"role": "assistant", "content": "is blue"},
        {"role": "user", "content": "a fox?"},
    ]
    rows = [{"messages": turns}, {"prompt": "the dog"}, {"messages": turns[:2], "split": "heldout"}]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    values = {"steps": 2, "batch_size": 2, "save_every": 1, "output": str(tmp_path / "out")}
    result = train(config(prompts, **values), models=tiny.pair())
    assert result.before is not None
    assert result.before.prompts == ["the sky?"]
    records = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert {record["prompt"] for record in records} <= {"a fox?", "the dog", "the sky?"}
    again = train(config(prompts, **values | {"steps": 3, "resume": True}), models=tiny.pair())
    assert len(again.metrics) == 3
    rows[0]["messages"] = [{**turns[0], "content": "Be long."}, *turns[1:]]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(xtokmap.XTokMapError, match="other prompts"):
        train(config(prompts, **values | {"steps": 4, "resume": True}), models=tiny.pair())


def test_the_same_seed_gives_the_same_run(prompts):
    def run(name, **changes):
        changes = {"output": str(prompts.parent / name), "save_every": 0, **changes}
        result = train(config(prompts, **changes), models=tiny.pair())
        return [(m["kl_per_byte"], m["loss"], m["grad_norm"], m["response_length"]) for m in result.metrics]

    assert run("a") == run("b")
    assert run("a") != run("c", seed=1)


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 1.3}, {"min_p": 0.5}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": [9, 10, 11]}],
)
def test_samples_are_the_policys_own_whatever_the_model_would_like(prompts, settings):
    def samples(**own):
        student, tokenizer, teacher, teacher_tokenizer = tiny.pair()
        with torch.no_grad():
            for p in student.parameters():
                p.mul_(4)  # far enough from uniform for every setting to show
        for name, value in own.items():
            setattr(student.generation_config, name, value)
        kept = student.generation_config
        roller = Roller(
            student, tokenizer, LocalTeacher(teacher, teacher_tokenizer), config(prompts, max_new_tokens=30)
        )
        torch.manual_seed(0)
        prompt_ids = render(tokenizer, ["the sky"] * 8)
        rows = sample(student, prompt_ids, roller.aligner.student.stop_ids, roller.config)[0]
        assert student.generation_config is kept
        return rows

    assert samples(**settings) == samples()


def test_half_precision_students_learn_at_any_learning_rate(prompts):
    models = tiny.pair()
    student = models[0].bfloat16()
    parameters = float32_parameters(student)
    start = [p.detach().clone() for p in parameters]
    roller = Roller(student, models[1], LocalTeacher(*models[2:]), config(prompts, micro_batch=2))
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0)
    optimizer.register_step_post_hook(write_back)
    torch.manual_seed(0)
    for _ in range(3):
        found = update(roller, roller.roll(["the sky", "the dog", "a fox?"]), optimizer)
        assert found.skipped == 0
    moved = sum(int((a != b).sum()) for a, b in zip(start, parameters, strict=True))
    assert moved > 0.9 * sum(p.numel() for p in parameters)
    for own, copy in zip(student.parameters(), parameters, strict=True):
        assert own.dtype == torch.bfloat16
        assert own.grad is None
        assert torch.equal(own, copy.bfloat16())


def test_float32_and_frozen_parameters_are_not_copied():
    student = tiny.student_model()
    next(student.parameters()).requires_grad_(False)
    wanted = [p for p in student.parameters() if p.requires_grad]
    assert [id(p) for p in float32_parameters(student)] == [id(p) for p in wanted]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_run_in_half_precision_stays_finite(prompts, dtype):
    models = tiny.pair()
    models[0].to(getattr(torch, dtype))
    result = train(config(prompts, steps=8, eval_samples=0, dtype=dtype), models=models)
    assert sum(m["skipped_updates"] for m in result.metrics) == 0
    assert all(torch.isfinite(p).all() for p in models[0].parameters())


def test_dropout_does_not_part_the_policy_from_its_samples(prompts):
    student, tokenizer, teacher, teacher_tokenizer = tiny.pair()
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = 0.5
    roller = Roller(student, tokenizer, LocalTeacher(teacher, teacher_tokenizer), config(prompts))
    rollouts = roller.roll(["the sky", "the dog"])
    with torch.no_grad():
        want = chunk_gap(roller.all_logprobs(rollouts.batch), rollouts.teacher.logprobs, rollouts.batch.index)[0]
    found = update(roller, rollouts, torch.optim.SGD(student.parameters(), lr=0.0))
    torch.testing.assert_close(found.nats, want)


def gradients(prompts, **changes):
    student, tokenizer, teacher, teacher_tokenizer = tiny.pair()
    settings = config(prompts, **changes)
    roller = Roller(student, tokenizer, LocalTeacher(teacher, teacher_tokenizer), settings)
    torch.manual_seed(0)
    rollouts = roller.roll(["the sky", "the dog", "a fox?", "1 + 2", "hello"])

    class Keep(torch.optim.SGD):
        def step(self, closure=None):
            self.kept = [p.grad.clone() for p in student.parameters()]

    optimizer = Keep(student.parameters(), lr=0.0)
    found = update(roller, rollouts, optimizer)
    return optimizer.kept, float(found.loss), found.nats


@pytest.mark.parametrize("aggregate", ["response", "scored"])
@pytest.mark.parametrize("updates", [1, 2])
def test_micro_batches_give_the_whole_batchs_gradient(prompts, aggregate, updates):
    changes = {"aggregate": aggregate, "updates": updates, "grad_clip": 1e9}
    whole, loss, nats = gradients(prompts, micro_batch=5, **changes)
    parts, loss_of_parts, nats_of_parts = gradients(prompts, micro_batch=2, **changes)
    assert loss == pytest.approx(loss_of_parts, abs=1e-5)
    torch.testing.assert_close(nats, nats_of_parts, atol=1e-4, rtol=1e-4)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_an_unscored_stop_has_no_gradient_of_its_own(prompts):
    scored, *_ = gradients(prompts, micro_batch=5, max_new_tokens=60)
    unscored, *_ = gradients(prompts, micro_batch=5, max_new_tokens=60, score_stop=False)
    assert any(not torch.equal(a, b) for a, b in zip(scored, unscored, strict=True))


def test_a_gradient_that_is_not_finite_is_skipped_and_said(prompts):
    student, tokenizer, teacher, teacher_tokenizer = tiny.pair()
    roller = Roller(student, tokenizer, LocalTeacher(teacher, teacher_tokenizer), config(prompts))
    rollouts = roller.roll(["the sky"])
    before = [p.detach().clone() for p in student.parameters()]
    handle = next(student.parameters()).register_hook(lambda grad: grad * math.nan)
    with pytest.warns(UserWarning, match="not finite: this update was skipped"):
        found = update(roller, rollouts, torch.optim.SGD(student.parameters(), lr=1.0))
    handle.remove()
    assert found.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


def test_ctrl_c_saves_what_there_is(prompts, monkeypatch, capsys):
    calls = 0
    real = update

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr("xtokmap.train.run.update", interrupted)
    result = train(config(prompts, eval_samples=0), models=tiny.pair())
    assert result.interrupted
    assert len(result.metrics) == 1
    assert (result.output / "student" / "model.safetensors").exists()
    assert len((result.output / "metrics.jsonl").read_text().splitlines()) == 1
    assert "interrupted after 1 steps" in capsys.readouterr().err


def test_evaluation_repeats_itself_and_leaves_the_generator_alone(prompts):
    student, tokenizer, teacher, teacher_tokenizer = tiny.pair()
    roller = Roller(student, tokenizer, LocalTeacher(teacher, teacher_tokenizer), config(prompts))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one, two = evaluate(roller, ["the sky", "a"], 2), evaluate(roller, ["the sky", "a"], 2)
    assert one == two
    assert torch.equal(torch.get_rng_state(), state)
    assert one.fall_since(two)[0] == 0


def test_the_ratio_estimator_covers_the_truth():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        nbytes = rng.integers(5, 50, 60)
        nats = 0.3 * nbytes + rng.normal(0, 3, 60)
        ratio, error = ratio_with_error(nats.tolist(), nbytes.tolist())
        inside += abs(ratio - 0.3) < 2 * error
    assert 0.92 < inside / 300 < 0.98
    assert math.isnan(ratio_with_error([], [])[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "best"}, "loss='best': use one of auto, transfer_kl"),
        ({"method": "rl"}, "method='rl': use one of opd, kd, sft"),
        ({"method": "kd", "loss": "prior"}, "loss='prior' with method='kd': a policy gradient needs the student's own"),
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0: must be positive"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0: must be finite and not negative"),
        ({"clip_low": math.nan}, "clip_low=nan: must be finite"),
        ({"clip_dual": 0.5}, "clip_dual=0.5: must be more than 1"),
        ({"eval_samples": -1}, "eval_samples=-1: must be finite and not negative"),
        ({"seed": 2**70}, "must fit into 64 bits"),
        ({"aggregate": "tokens"}, "aggregate='tokens'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"plain_template": "x"}, r"must contain \{prompt\}"),
    ],
)
def test_settings_that_no_run_can_use(changes, message):
    with pytest.raises(xtokmap.XTokMapError, match=message):
        Config(**changes)


def test_long_prompts_are_left_out_and_said(prompts):
    with pytest.warns(UserWarning, match="1 prompts longer than 21 tokens are left out"):
        train(config(prompts, steps=1, max_prompt_tokens=21, eval_samples=0, save_every=0), models=tiny.pair())
    with pytest.raises(xtokmap.XTokMapError, match="every prompt is longer than max_prompt_tokens=1"):
        train(config(prompts, max_prompt_tokens=1), models=tiny.pair())


def test_a_missing_model_is_named(prompts):
    with pytest.raises(xtokmap.XTokMapError, match=r"/no/such/model: no such model"):
        train(config(prompts, student="/no/such/model", teacher="/no/such/model"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_model_is_one_line(prompts, tmp_path, name):
    folder = tmp_path / "damaged"
    tiny.student_model().save_pretrained(folder)
    tiny.student_tokenizer().save_pretrained(folder)
    (folder / name).write_text("{" if name == "config.json" else "{}")
    with pytest.raises(xtokmap.XTokMapError, match="damaged: transformers cannot load it") as caught:
        train(config(prompts, student=str(folder), teacher=str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("side", "changes"), [(0, {}), (0, {"method": "sft"}), (2, {}), (2, {"method": "kd"})])
def test_weights_that_are_not_finite_are_named(prompts, side, changes, value):
    models = tiny.pair()
    with torch.no_grad():
        models[side].model.layers[1].mlp.up_proj.weight[3, 5] = value
    whose = ("student", "", "teacher")[side]
    message = f"^the {whose} .*: 1 values of model.layers.1.mlp.up_proj.weight are not finite"
    with pytest.raises(xtokmap.XTokMapError, match=message):
        train(config(prompts, **changes), models=models)


def test_probabilities_that_are_not_finite_are_an_error_by_name(prompts):
    with pytest.raises(xtokmap.XTokMapError, match=r"nothing can be sampled: .*temperature=1e-320"):
        train(config(prompts, temperature=1e-320), models=tiny.pair())


def test_a_device_on_which_nothing_is_computed_is_refused():
    with pytest.raises(xtokmap.XTokMapError, match="device='meta': nothing is computed there"):
        pick_device("meta")


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(xtokmap.XTokMapError, match="device='abacus'"):
        pick_device("abacus")

"""Health: the figures are right, every warning comes from its cause, and a healthy run raises none."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import tiny
from xtokmap import Aligner
from xtokmap.chat import render
from xtokmap.losses.queries import boundary_leak
from xtokmap.teachers.local import LocalTeacher
from xtokmap.torch.logits import Logits
from xtokmap.train import sampling as rolling
from xtokmap.train.config import Config
from xtokmap.train.loop import Run, train
from xtokmap.train.sampling import Roller
from xtokmap.train.step import StepResult, update
from xtokmap.train.support.health import Entropy, Monitor, entropy_sum, measure, together

pytestmark = pytest.mark.filterwarnings("ignore:fastokens gives other ids", "ignore:the loss or the gradient is not")

#: Prompts, and the words of which their answers are made.
ANSWERS = {
    "the sky": ["the", "quick", "brown", "fox"],
    "the dog": ["lazy", "dog", "runs", "away"],
    "a fox?": ["what", "is", "the", "colour"],
    "1 + 2": ["grass", "green", "sky", "blue"],
    "the grass": ["jumps", "over", "and", "quick"],
}


def fitted(model, tokenizer, steps):
    """Fine-tuned on random answers: sure of what is inside a word, and not of which word is next."""
    prompts = render(tokenizer, list(ANSWERS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = random.Random(0)
    for _ in range(steps):
        rows, labels = [], []
        for prompt, words in [*zip(prompts, ANSWERS.values(), strict=True)] * 2:
            text = "".join(f" {word}" for word in draw.choices(words, k=draw.randint(3, 8)))
            ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            rows.append(torch.tensor([*prompt, *ids]))
            labels.append(torch.tensor([-100] * len(prompt) + ids))
        ids, labels = (
            torch.nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=v)
            for x, v in ((rows, 0), (labels, -100))
        )
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def tiny_pair():
    models = tiny.pair()
    models[2].config.final_logit_softcapping = 30.0  # sure of something
    return models


@functools.cache
def states():
    with torch.random.fork_rng():
        student, tokenizer, teacher, teacher_tokenizer = tiny_pair()
        return fitted(student, tokenizer, 80), fitted(teacher, teacher_tokenizer, 200)


def pair():
    """A pair that agrees about something."""
    models = tiny_pair()
    for model, state in zip(models[::2], states(), strict=True):
        model.load_state_dict(state)
    return models


class BrokenTeacher(LocalTeacher):
    """Changes what it is asked, or its answer."""

    def __init__(self, *args, prompts=None, logprobs=None, shift=0, **kwargs):
        super().__init__(*args, **kwargs)
        self.change_prompts, self.change, self.shift = prompts, logprobs, shift

    def score(self, prompt_ids, completion_ids, **kwargs):
        if self.change_prompts is not None:
            prompt_ids = self.change_prompts(prompt_ids)
        scores = super().score(prompt_ids, completion_ids, **kwargs)
        if self.change is None:
            return scores
        return dataclasses.replace(scores, given_logprobs=torch.where(scores.mask, self.change(scores.logprobs), 0))

    def rows(self, prompt_ids, completion_ids):
        rows = super().rows(prompt_ids, completion_ids)
        return dataclasses.replace(rows, rows=rows.rows.roll(self.shift, 0))


def run(steps=7, *, models=None, teacher=None, before_step=None, **changes):
    """Names of the warnings of every step, and the run's lines."""
    models = models or pair()
    values = {"batch_size": 10, "max_new_tokens": 40, "learning_rate": 1e-5, "warmup_steps": 0, "device": "cpu"}
    config = Config(**{**values, "max_chunk_tokens": 0, "loss": "prior", **changes})
    student, tokenizer, teacher_model, teacher_tokenizer = models
    teacher = (teacher or LocalTeacher)(teacher_model, teacher_tokenizer)
    going = Run(Roller(student, tokenizer, teacher, config), list(ANSWERS))
    torch.manual_seed(0)
    for step in range(steps):
        if before_step is not None:
            before_step(step, going)
        going.step()
    lines = going.monitor.lines
    json.dumps(lines, allow_nan=True)
    return [[w["name"] for w in line["warnings"]] for line in lines], lines


def test_entropy_is_that_of_every_row_or_of_evenly_spaced_ones():
    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 6), torch.randn(50, 6)
    p = torch.softmax((hidden @ weight.T).double() / 0.7, -1)
    want = -(p * p.log()).sum(-1)
    for every in (1, 3, 20):
        total, n = entropy_sum(Logits(hidden, weight, temperature=0.7), every).tolist()
        assert n == len(want[::every])
        assert total == pytest.approx(float(want[::every].sum()), rel=1e-5)
    hidden[4] = math.nan
    total, n = entropy_sum(Logits(hidden, weight, temperature=0.7), 1).tolist()
    assert n == 10
    assert total == pytest.approx(float(want.sum() - want[4]), rel=1e-5)
    # What a loss has come by is not worked out again, and the rest is.
    known = want.float() + 1
    known[[3, 6]] = math.nan
    total, n = entropy_sum(Logits(hidden, weight, temperature=0.7), 3, known).tolist()
    assert n == 4
    assert total == pytest.approx(float(want[::3].sum()) + 2, rel=1e-5)


def test_the_loss_comes_by_the_entropy_that_a_pass_over_the_rows_gives():
    student, tokenizer, teacher, teacher_tokenizer = pair()
    config = Config(max_new_tokens=20, device="cpu", loss="transfer_kl", micro_batch=3, temperature=0.7)
    roller = Roller(student, tokenizer, LocalTeacher(teacher, teacher_tokenizer), config)
    torch.manual_seed(0)
    rollouts = roller.roll(list(ANSWERS))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    seen = []
    update(roller, rollouts, optimizer, lambda rows, known: seen.append((rows, known)))
    assert len(seen) > 1
    for rows, known in seen:
        assert known.isfinite().float().mean() > 0.5
        for every in (1, 2):
            torch.testing.assert_close(entropy_sum(rows, every, known), entropy_sum(rows, every), rtol=1e-5, atol=1e-4)


def test_figures_are_those_of_the_definition():
    student, tokenizer, teacher, teacher_tokenizer = pair()
    config = Config(max_new_tokens=20, device="cpu", loss="transfer_kl")
    roller = Roller(student, tokenizer, LocalTeacher(teacher, teacher_tokenizer), config)
    torch.manual_seed(0)
    rollouts = roller.roll(list(ANSWERS))
    own = roller.all_logprobs(rollouts.batch)
    entropy = Entropy(1)
    entropy.total = torch.tensor([6.0, 4.0])
    nothing = torch.zeros(())
    result = StepResult(rollouts, nothing, nothing, 0, nothing, nothing, own, {})
    seen = together([measure(roller, result, entropy, probe=True)])
    assert seen["entropy"] == 1.5
    batch = roller.aligner.align_batch(rollouts.batch.student_ids, rollouts.batch.teacher_ids)
    s, t, ended = [], [], 0
    for b, alignment in enumerate(batch):
        for chunk in alignment:
            if chunk.kind.name == "ONE_TO_ONE":
                s.append(float(own[b, chunk.student.start]))
                t.append(float(rollouts.teacher.logprobs[b, chunk.teacher.start]))
            ended += chunk.kind.name == "STOP"
    health = seen["health"]
    assert health["pairs"] == len(s)
    assert health["student_nats"] == pytest.approx(-sum(s) / len(s), rel=1e-4)
    assert health["teacher_nats"] == pytest.approx(-sum(t) / len(t), rel=1e-4)
    assert health["lag"][1] == pytest.approx(float(torch.corrcoef(torch.tensor([s, t]))[0, 1]), abs=1e-3)
    assert seen["stops_scored"] == ended / sum(rollouts.completed) == 1

    # Another's prompt, row by row.
    def nats(model, prompts, rows):
        score = LocalTeacher(model, teacher_tokenizer).score(prompts, rows)
        return score.logprobs.sum(1)

    prompts, answers = rollouts.batch.student_prompt_ids, rollouts.batch.student_ids
    shifted = [*prompts[1:], prompts[0]]  # they are all different
    gain = nats(student, prompts, answers) - nats(student, shifted, answers)
    assert health["prompt_gain"][0] == pytest.approx(float(gain.mean()), rel=1e-3)
    # All teacher tokens but each response's first, if there are few enough.
    rows, ids, first = [], [], 0
    for row in rollouts.batch.teacher_ids:
        rows += range(first + 1, first + len(row))
        ids += row[1:]
        first += len(row) + 1
    kept = rollouts.teacher.rows
    step = math.ceil(len(rows) / 64)
    part = dataclasses.replace(kept, rows=kept.rows[rows[::step]])
    leak = boundary_leak(part, torch.tensor(ids[::step]), roller.aligner.vocab_map)
    assert seen["boundary_leak"] == pytest.approx(float(leak.mean()), rel=1e-4)
    assert health["row_fit"][1] > max(health["row_fit"][::2]) + 1


def test_figures_of_several_processes_are_weighted():
    one = {"entropy": (1.0, 2), "student_nats": (2.0, 4), "lag": ([0.5, 0.25, 0.0], 3), "row_fit_error": (0.3, 1)}
    two = {"entropy": (4.0, 1), "student_nats": (5.0, 2), "lag": ([0.0, 0.0, 0.0], 0), "row_fit_error": (0.4, 1)}
    two["boundary_leak"] = (0.0, 0)
    health = {"pairs": 6, "student_nats": 3.0, "lag_pairs": 3, "lag": [0.5, 0.25, 0.0], "row_fit_error": 0.25}
    assert together([one, two]) == {
        "entropy": pytest.approx(2.0),
        "stops_scored": None,
        "boundary_leak": None,
        "health": {name: pytest.approx(value) for name, value in health.items()},
    }
    assert together([one])["health"]["row_fit_error"] == 0.3


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("how", ["transfer_kl", "byte_kl", "prior", "cover", "full", "kd", "sft"])
def test_a_healthy_run_raises_no_warning(tmp_path, how, fits):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(ANSWERS))
    changes = {"method": how, "beta": 0.0} if how in ("kd", "sft") else {"loss": how}
    values = {"prompts": str(path), "output": str(tmp_path / "out"), "steps": 10, "batch_size": 8, "device": "cpu"}
    values |= {"max_new_tokens": 12, "warmup_steps": 1, "max_chunk_tokens": 0}
    models = pair() if fits else tiny.pair()
    result = train(Config(**values, **changes, learning_rate=1e-3 if fits else 1e-2), models=models)
    assert [m["warnings"] for m in result.metrics] == [[]] * 10


@pytest.mark.parametrize("to", [1, -1])
def test_shifted_logprobs_are_seen(to):
    shifted = functools.partial(BrokenTeacher, logprobs=lambda x: x.roll(to, 1))
    _, lines = run(10, teacher=shifted, batch_size=60)
    said = [w["text"] for line in lines for w in line["warnings"] if w["name"] == "teacher_shifted"]
    assert len(said) == 1
    assert f"one chunk {'later' if to > 0 else 'earlier'} at 0." in said[0]
    assert "logprobs[i] must score ids[i]" in said[0]
    assert not any("teacher_shifted" in step for step in run(10, batch_size=60)[0])


@pytest.mark.parametrize(("shift", "where"), [(1, "after"), (-1, "before")])
def test_shifted_rows_are_seen_at_once(shift, where):
    names, lines = run(1, teacher=functools.partial(BrokenTeacher, shift=shift), loss="transfer_kl")
    assert "teacher_shifted" in names[0]
    text = next(w["text"] for w in lines[0]["warnings"] if w["name"] == "teacher_shifted")
    assert f"in the row {where}; row i must score token i" in text


@pytest.mark.parametrize("prompts", [lambda rows: [[5]] * len(rows), lambda rows: [row[-3:] for row in rows]])
def test_a_teacher_that_sees_another_prompt_is_seen(prompts):
    names, lines = run(1, teacher=functools.partial(BrokenTeacher, prompts=prompts))
    assert "teacher_prompt" in names[0]
    assert "another prompt" in next(w["text"] for w in lines[0]["warnings"] if w["name"] == "teacher_prompt")
    assert "teacher_prompt" not in run(1)[0][0]


def test_a_teacher_without_its_weights_is_seen():
    models = pair()
    names, lines = run(3, models=(*models[:2], *tiny_pair()[2:]))
    assert "teacher_lost" in [name for step in names for name in step]
    assert any("near uniform" in w["text"] for line in lines for w in line["warnings"])


@pytest.mark.parametrize(("score_stop", "cause"), [(True, "is it a base model"), (False, "score_stop=False")])
def test_a_student_that_no_longer_stops_is_seen(score_stop, cause):
    models = pair()
    student, tokenizer = models[:2]
    bias = torch.zeros(len(tokenizer))
    bias[tokenizer.eos_token_id] = 2.0
    student.lm_head.bias = torch.nn.Parameter(bias)

    def unlearn(step, going):
        if step == 6:
            with torch.no_grad():
                student.lm_head.bias[tokenizer.eos_token_id] = -30.0

    names, lines = run(11, models=models, before_step=unlearn, score_stop=score_stop)
    assert names[:6] == [[]] * 6
    said = [w["text"] for line in lines for w in line["warnings"] if w["name"] == "length"]
    assert len(said) == 1
    assert "of max_new_tokens=40" in said[0]
    assert cause in said[0]


def test_a_collapse_of_entropy_is_seen():
    models = pair()

    def sharpen(step, going):
        if step == 6:
            with torch.no_grad():
                models[0].model.norm.weight.mul_(30)

    names, _ = run(10, models=models, before_step=sharpen)
    assert not any("entropy" in step for step in names[:6])
    assert sum("entropy" in step for step in names) == 1


def lowering():
    """The teacher's tokenizer, which also makes everything lower case."""
    own = tiny.teacher_tokenizer()
    state = json.loads(own.backend_tokenizer.to_str())
    state["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, state["normalizer"]]}
    from tokenizers import Tokenizer

    changed = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=changed, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


@pytest.mark.parametrize(("since", "message"), [(0, "of the tokens are REWRITTEN"), (6, "coverage drops")])
def test_a_tokenizer_that_changes_the_text_is_seen(monkeypatch, since, message):
    models = pair()
    tokenizer = models[1]
    calls = 0

    def sample(model, prompt_ids, stops, config, **_):
        nonlocal calls
        calls += 1
        texts = ["THE DOG AND THE FOX" if calls > since else "the dog and the fox"] * len(prompt_ids)
        return [[*tokenizer(text).input_ids, stops[0]] for text in texts], [True] * len(texts)

    monkeypatch.setattr(rolling, "sample", sample)
    names, lines = run(10, models=(*models[:3], lowering()))
    said = [w["text"] for line in lines for w in line["warnings"] if w["name"] == "coverage"]
    assert len(said) == 1
    assert message in said[0]
    assert not any("coverage" in step for step in names[:since])


def test_clamped_advantages_are_seen():
    names, lines = run(4, teacher=functools.partial(BrokenTeacher, logprobs=lambda x: x - 60))
    assert "clamped" in [name for step in names for name in step]
    assert lines[-1]["clamped"] > 0.5


def test_logprobs_that_are_not_finite_are_seen():
    def some(x):
        return torch.where(torch.arange(x.shape[1]) == 3, math.nan, x)

    names, lines = run(2, teacher=functools.partial(BrokenTeacher, logprobs=some))
    assert names == [["nonfinite"], []]
    assert (
        f"step 1: {lines[0]['nonfinite_tokens']} tokens have a logprob that is NaN" in lines[0]["warnings"][0]["text"]
    )
    names, lines = run(2, teacher=functools.partial(BrokenTeacher, logprobs=lambda x: x * math.nan))
    assert names[0][0] == "nothing_scored"
    assert "the teacher's logprobs are not finite" in lines[0]["warnings"][0]["text"]


def test_chunks_that_are_too_long_leave_nothing_to_score(monkeypatch):
    monkeypatch.setattr(
        rolling, "sample", lambda model, ids, stops, config: ([[300, 301]] * len(ids), [False] * len(ids))
    )
    real = Aligner.teacher_ids
    monkeypatch.setattr(Aligner, "teacher_ids", lambda self, rows, **k: [r[:0] for r in real(self, rows, **k)])
    names, lines = run(1)
    assert names[0] == ["nothing_scored"]
    assert "no chunk can be scored (UNALIGNED 100%" in lines[0]["warnings"][0]["text"]


@pytest.mark.parametrize(("factor", "message"), [(1e4, "explodes"), (math.nan, "not finite, the update was skipped")])
def test_gradients_that_explode_are_seen(factor, message):
    models = pair()

    def explode(step, going):
        if step == 6:
            next(models[0].parameters()).register_hook(lambda grad: grad * factor)

    _, lines = run(8, models=models, before_step=explode)
    said = [(line["step"], w["text"]) for line in lines for w in line["warnings"] if w["name"] == "gradient"]
    assert len(said) == 1
    assert message in said[0][1]
    assert said[0][0] == (7 if math.isnan(factor) else 8)  # a single one is clipped, and nothing to warn of


def test_a_run_that_moves_away_is_seen():
    models = pair()

    def spoil(step, going):
        if step == 6:
            with torch.no_grad():
                for p in models[2].parameters():
                    p.mul_(4)

    names, _ = run(10, models=models, before_step=spoil, batch_size=30)
    assert sum("kl" in step for step in names) == 1


def test_a_warning_is_said_once_until_it_clears():
    monitor = Monitor(Config(), (300, 400))
    ok = {"scored": 1.0, "nonfinite_tokens": 0, "skipped_updates": 0, "grad_norm": 1.0, "response_length": 9.0}
    ok |= {"completed": 1.0, "kl_per_byte": 0.1, "kl_error": 0.01, "coverage": {"REWRITTEN": 0.0, "UNALIGNED": 0.0}}

    def said(**changes):
        step = {"step": len(monitor.lines) + 1}
        return [w["text"] for w in monitor.check({**ok, **step, **changes})]

    first = said(nonfinite_tokens=4)
    assert first[0].startswith("step 1: 4 tokens have a logprob")
    assert said(nonfinite_tokens=2) == said() == said(nonfinite_tokens=1) == said() == said() == []
    assert monitor.active
    assert said() == []
    assert not monitor.active
    assert said(nonfinite_tokens=7)[0].startswith("step 8: 7 tokens")

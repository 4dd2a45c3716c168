"""A served teacher that is gone for a while, comes back as another one, or does not take every row."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace

import pytest
import torch

import faults
import killable
import several
import tiny
from xtokmap import Aligner
from xtokmap.losses.table import LOSSES
from xtokmap.teachers import client as served
from xtokmap.teachers.client import Client, OtherTeacherError, RowRefusedError, TeacherError
from xtokmap.teachers.head import Head
from xtokmap.teachers.local import LocalTeacher
from xtokmap.teachers.remote import ServerTeacher
from xtokmap.teachers.scorer import Limits
from xtokmap.train.config import Config
from xtokmap.train.loop import train
from xtokmap.train.run import Run
from xtokmap.train.sampling import Roller
from xtokmap.train.step import update
from xtokmap.train.support.checkpoint import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:fastokens gives other ids")

FAST = {"pause": 0.001, "timeout": 20.0}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
COMPLETIONS = [[300, 301], [302], [20, 21, 22, 23]]


@pytest.fixture(scope="module")
def model():
    return tiny.teacher_model()


def config(prompts, **changes) -> Config:
    values = {"prompts": str(prompts), "output": str(prompts.parent / "out"), "steps": 3, "batch_size": 4}
    values |= {"max_new_tokens": 12, "learning_rate": 3e-3, "warmup_steps": 1, "micro_batch": 3, "device": "cpu"}
    return Config(**{**values, "save_every": 0, "eval_samples": 0, "teacher_patience": 0.0, **changes})


def teacher_of(server, model, rows, **options):
    """A teacher of which these rows are had, after its self-test."""
    own = model.get_output_embeddings().weight.detach()
    head = Head(own, softcap=model.config.final_logit_softcapping)
    teacher = ServerTeacher(server.url, tiny.teacher_tokenizer(), rows=rows, head=head, **FAST, **options)
    teacher.self_test()
    assert teacher.rows == rows
    return teacher


class Away:
    """A server of which nobody takes the connection a few times; `then` is called before it is back."""

    def __init__(self, monkeypatch, times, then=lambda: None):
        self.times, self.then, self.lock = times, then, threading.Lock()
        opened = served.http1.Connections._opened

        def refusing(connections, deadline):
            with self.lock:
                if self.times > 0:
                    self.times -= 1
                    if not self.times:
                        self.then()
                    raise ConnectionRefusedError("Connection refused")
            return opened(connections, deadline)

        monkeypatch.setattr(served.http1.Connections, "_opened", refusing)


# ---- gone ------------------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_waited_for_whatever_the_retries(model, monkeypatch):
    monkeypatch.setattr(served, "_LONGEST_LOOK", 0.001)
    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        client = Client(server.url, protocol="vllm", model="teacher", retries=0, patience=1000.0, **FAST)
        said = []
        client.say = said.append
        Away(monkeypatch, 50)
        assert len(client.score([[1, 2, 3]])) == 1
    assert client.figures["connection"] == 50
    assert len(said) == 2
    assert "is not there (the connection failed: Connection refused): waiting; 1000 s at most" in said[0]
    assert said[1].startswith(f"{server.url} answers, after ")


@pytest.mark.parametrize("status", ["502 Bad Gateway", "503 No", "504 Late"])
def test_a_proxy_without_its_server_is_waited_for(model, status):
    plan = faults.Plan()
    with faults.serving(model, tiny.teacher_tokenizer(), plan) as server:
        teacher = ServerTeacher(server.url, tiny.teacher_tokenizer(), protocol="vllm", retries=0, patience=9e9, **FAST)
        plan.lists = [faults.plain(b"{}", status=status)] * 4
        teacher.client.connect([1, 2])
    assert teacher.client.figures[f"status {status[:3]}"] == 4


def test_patience_is_of_the_server_and_not_of_each_batch(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(served.time, "monotonic", lambda: now[0])

    def wait(event, seconds=None):
        now[0] += max(seconds or 0.0, 0.0)
        return event.is_set()

    monkeypatch.setattr(threading.Event, "wait", wait)
    Away(monkeypatch, 10**6)
    client = Client("http://127.0.0.1:9", protocol="vllm", model="m", patience=300.0, retries=5, pause=0.5)
    ends = []
    for _ in range(4):
        with client._connections() as http, pytest.raises(TeacherError, match="gave up after"):
            client._answer(http, client.question([1, 2]), threading.Event())
        ends.append(now[0])
    assert 300 <= ends[0] <= 330
    assert ends[3] - ends[0] <= 3 * 16


def test_a_run_waits_says_so_and_names_how_to_go_on(prompts, model, monkeypatch, capsys):
    monkeypatch.setattr(served, "_LONGEST_LOOK", 0.001)
    monkeypatch.setattr(served, "_LONGEST_PAUSE", 0.001)
    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        settings = config(prompts, teacher_url=server.url, teacher_retries=0, save_every=50)
        away = Away(monkeypatch, 0)
        trained = []

        def go(*args):
            away.times = 30 if not trained else 0
            trained.append(1)
            return step(*args)

        from xtokmap.train import run as running

        step = running.update
        monkeypatch.setattr(running, "update", go)
        train(replace(settings, teacher_patience=1000.0), models=tiny.pair())
        said = capsys.readouterr().out
        assert "is not there (the connection failed: Connection refused): waiting" in said
        assert "answers, after" in said
        trained.clear()
        monkeypatch.setattr(running, "update", lambda *args: (setattr(away, "times", 10**9), step(*args))[1])
        with pytest.raises(
            TeacherError, match=r"ended after 1 steps, which are saved in .*; --resume goes on from there"
        ):
            train(replace(settings, output=settings.output + "-2"), models=tiny.pair())
    said = capsys.readouterr().out
    # Every lost batch, though the words are the same.
    assert [f"({n} in a row)" in said for n in (1, 2, 3, 4)] == [True, True, True, False]
    assert "no checkpoint is kept" not in said


# ---- another one -----------------------------------------------------------------------------------------------------


def swapped(server, model):
    """Another model of the same vocabulary, from now on."""
    server.scorer.model = model


def test_another_model_behind_the_url_is_noticed_before_its_scores_are_used(model, monkeypatch):
    other = tiny.teacher_model(seed=2)
    for back in (model, other):
        with monkeypatch.context() as patch, faults.serving(model, tiny.teacher_tokenizer()) as server:
            teacher = ServerTeacher(server.url, tiny.teacher_tokenizer(), patience=1000.0, **FAST)
            assert teacher.self_test() is None
            asked = teacher.client.figures["requests"]
            Away(patch, 3, lambda back=back, server=server: swapped(server, back))
            if back is other:
                with pytest.raises(
                    OtherTeacherError, match=r"has another model than at the start: .* nats from what they"
                ):
                    teacher.score(PROMPTS, COMPLETIONS)
                with pytest.raises(OtherTeacherError):  # and not the second time, either
                    teacher.score(PROMPTS, COMPLETIONS)
                continue
            got = teacher.score(PROMPTS, COMPLETIONS).logprobs
            want = LocalTeacher(model, tiny.teacher_tokenizer()).score(PROMPTS, COMPLETIONS).logprobs
            torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
            # Asked once what it says of the known text, which is none of the answers.
            figures = teacher.client.figures
            assert figures["requests"] == asked + 3 + len(PROMPTS) + 2  # and for its models
            assert figures["answers"] == 1 + 2 + 4 + len(PROMPTS)


def test_a_server_that_nobody_heard_of_for_a_while_is_asked_again(model, monkeypatch):
    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        teacher = ServerTeacher(server.url, tiny.teacher_tokenizer(), **FAST)
        teacher.self_test()
        teacher.client._heard -= 2 * served._UNHEARD  # an update that took a while
        teacher.score(PROMPTS, COMPLETIONS)
        swapped(server, tiny.teacher_model(seed=2))
        teacher.client._heard -= 2 * served._UNHEARD
        with pytest.raises(OtherTeacherError):
            teacher.score(PROMPTS, COMPLETIONS)


def test_a_model_that_is_replaced_without_a_pause_is_noticed_after_a_while(model):
    """A proxy that lets one server take the place of another."""
    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        teacher = ServerTeacher(server.url, tiny.teacher_tokenizer(), **FAST)
        teacher.self_test()
        swapped(server, tiny.teacher_model(seed=2))
        teacher.client._looked -= 2 * served._LOOKED
        with pytest.raises(OtherTeacherError):
            teacher.score(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize("two", [False, True])
def test_another_model_behind_the_url_of_the_states_is_noticed(model, monkeypatch, two):
    with (
        faults.serving(tiny.teacher_model(), tiny.teacher_tokenizer()) as server,
        faults.serving(tiny.teacher_model(), tiny.teacher_tokenizer()) as other,
    ):
        states = other if two else server
        teacher = teacher_of(server, model, "hidden", patience=1000.0, states_url=other.url if two else "")
        want = LocalTeacher(model, tiny.teacher_tokenizer()).score(PROMPTS, COMPLETIONS).logprobs
        asked = states.answered
        Away(monkeypatch, 3)
        torch.testing.assert_close(teacher.score(PROMPTS, COMPLETIONS).logprobs, want, atol=2e-5, rtol=0)
        assert states.answered == asked + len(PROMPTS) + 2  # asked once for the known text, and for its models
        Away(monkeypatch, 3, lambda: swapped(states, tiny.teacher_model(seed=2)))
        with pytest.raises(OtherTeacherError, match="has another model than at the start"):
            teacher.score(PROMPTS, COMPLETIONS)


def test_a_known_text_whose_answer_is_late_is_not_looked_at_for_ever(model, monkeypatch):
    monkeypatch.setattr(served, "_UNHEARD", -1.0)  # every answer is late
    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        teacher = ServerTeacher(server.url, tiny.teacher_tokenizer(), **FAST)
        teacher.self_test()
        asked = server.answered
        found = []
        thread = threading.Thread(target=lambda: found.append(teacher.score(PROMPTS, COMPLETIONS)), daemon=True)
        thread.start()
        thread.join(60)
        assert len(found) == 1
        assert asked + 3 <= server.answered <= asked + 3 * len(PROMPTS)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_look_that_takes_long_is_enough(model, monkeypatch, concurrency):
    """Every answer comes late enough to be in doubt, that of the look itself as well."""
    monkeypatch.setattr(served, "_UNHEARD", -1.0)
    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        teacher = ServerTeacher(server.url, tiny.teacher_tokenizer(), concurrency=concurrency, **FAST)
        teacher.self_test()
        before = teacher.client.figures["requests"]
        teacher.score(PROMPTS, COMPLETIONS)
        assert len(PROMPTS) < teacher.client.figures["requests"] - before <= 3 * len(PROMPTS)
        assert teacher.client.figures["answers"] == 1 + 2 + 4 + len(PROMPTS)


def test_a_run_ends_at_once_when_its_teacher_is_another(prompts, model, monkeypatch):
    from xtokmap.train import run as running

    step = running.update
    with faults.serving(tiny.teacher_model(), tiny.teacher_tokenizer()) as server:

        def update(*args):
            Away(monkeypatch, 1, lambda: swapped(server, tiny.teacher_model(seed=2)))
            return step(*args)

        monkeypatch.setattr(running, "update", update)
        settings = config(prompts, teacher_url=server.url, save_every=50, teacher_retries=3)
        with pytest.raises(TeacherError, match=r"ended after 1 steps.*another model than at the start"):
            train(settings, models=tiny.pair())


@pytest.mark.parametrize(("loss", "which"), [("prior", "teacher"), ("cover", "teacher"), ("prior", "more")])
def test_a_run_that_resumes_with_another_teacher_is_refused(prompts, tmp_path, loss, which):
    """The run before has ended as the teacher was another, and said that --resume goes on from there."""
    model = tiny.teacher_model()
    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        tiny.teacher_tokenizer().save_pretrained(tmp_path / "more")
        where = {"teacher_url": server.url} if which == "teacher" else {}
        where |= {"more_teachers": f"more={tmp_path / 'more'}@{server.url}"} if which == "more" else {}
        settings = config(prompts, loss=loss, save_every=1, steps=2, **where)
        train(settings, models=tiny.pair())
        again = replace(settings, resume=True, steps=3)
        swapped(server, tiny.teacher_model(seed=2))
        with pytest.raises(
            CheckpointError, match=rf"of a run with another {which}: .* nats from those of then, .*; serve the one that"
        ):
            train(again, models=tiny.pair())
        # In another precision it is the same.
        swapped(server, tiny.teacher_model().bfloat16())
        assert len(train(again, models=tiny.pair()).metrics) == 3


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_that_are_too_long_are_known_before_they_are_asked(model):
    limits = Limits(max_length=8)
    with faults.serving(model, tiny.teacher_tokenizer(), limits=limits) as server:
        for topk in (0, 3):
            teacher = ServerTeacher(server.url, tiny.teacher_tokenizer(), protocol="vllm", topk=topk, **FAST)
            assert teacher.too_long(PROMPTS, COMPLETIONS) == ([], "")  # nobody knows yet
            teacher.client.connect([1, 2])
            assert teacher.client.max_length == 8
            rows, why = teacher.too_long([[1] * 3] * 4, [[2] * 3, [2] * 4, [2] * 5, []])
            assert rows == ([2] if topk == 0 else [1, 2])
            assert "max_model_len is 8); start it with a larger --max-model-len" in why
            kept = [[2] * n for n in (3, 4) if not (topk and n == 4)]
            teacher.score([[1] * 3] * len(kept), kept, keep=topk > 0)  # the longest that fit are taken


@pytest.mark.parametrize("rows", ["hidden", "sums"])
def test_hidden_states_and_sums_take_the_longest_rows(model, rows):
    with faults.serving(model, tiny.teacher_tokenizer(), limits=Limits(max_length=40)) as server:
        teacher = teacher_of(server, model, rows)
        longer, why = teacher.too_long([[1] * 3] * 4, [[2] * 36, [2] * 37, [2] * 38, []])
        assert longer == [2]
        assert "more than 40 of the teacher's tokens" in why
        aligner = Aligner(tiny.teacher_tokenizer(), tiny.teacher_tokenizer())
        ids, aligned = aligner.retokenize([[20] * 37])
        scores = teacher.score([[1] * 3], [ids[0].tolist()], queries=aligner.cover_queries(aligned))
        assert len(ids[0]) == 37
        assert torch.isfinite(scores.transferred).all()


def test_a_states_server_may_take_shorter_rows_than_the_other(model):
    with (
        faults.serving(model, tiny.teacher_tokenizer()) as server,
        faults.serving(model, tiny.teacher_tokenizer(), limits=Limits(max_length=20)) as other,
    ):
        teacher = teacher_of(server, model, "hidden", states_url=other.url)
        assert teacher.too_long([[1] * 3] * 2, [[2] * 17, [2] * 18])[0] == [1]


def test_a_server_that_is_started_again_for_longer_rows_is_asked_how_long(model, monkeypatch):
    """That is what the message about rows too long says to do."""
    with faults.serving(model, tiny.teacher_tokenizer(), limits=Limits(max_length=40)) as server:
        teacher = teacher_of(server, model, "none", patience=1000.0)
        rows = [[1] * 3] * 2, [[2] * 36, [2] * 46]
        assert teacher.too_long(*rows)[0] == [1]
        Away(monkeypatch, 3, lambda: setattr(server.scorer, "max_length", 50))
        teacher.score(PROMPTS, COMPLETIONS)
        assert teacher.too_long(*rows)[0] == []
        assert teacher.score(*rows).mask.sum() == 36 + 46


@pytest.mark.parametrize("overlap", [False, True])
def test_a_batch_goes_on_without_the_rows_that_are_too_long(prompts, model, capsys, overlap):
    with faults.serving(model, tiny.teacher_tokenizer(), limits=Limits(max_length=LONGEST)) as server:
        settings = config(prompts, teacher_url=server.url, overlap=overlap, eval_samples=2)
        result = train(settings, models=tiny.pair())
    said = capsys.readouterr().out
    skipped = [line["skipped_rows"] for line in result.metrics]
    assert 0 < sum(skipped) < 3 * 4
    assert [line["skipped_batches"] for line in result.metrics] == [0, 0, 0]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in result.metrics)
    # What was sampled has the length that it had, whatever becomes of it.
    assert all(line["response_length"] > 10 for line in result.metrics)
    assert said.count(" of 4 answers are left out of step ") == 1
    assert f"(the server's max_model_len is {LONGEST}); start it with a larger --max-model-len" in said
    assert result.before.skipped > 0
    assert f"; {result.before.skipped} answers that the server does not take are left out" in said


def test_all_rows_too_long_is_said(prompts, model, capsys):
    with faults.serving(model, tiny.teacher_tokenizer(), limits=Limits(max_length=24)) as server:
        settings = config(prompts, teacher_url=server.url)
        with pytest.raises(TeacherError, match=r"4 batches in a row.*takes none of its 4 answers"):
            train(settings, models=tiny.pair())
    assert capsys.readouterr().out.count("the server takes none of its 4 answers: with their prompts they have") == 3


#: Some of the tiny student's answers fit, with their prompts, and some do not.
LONGEST = 60


def roller_of(prompts, teacher, **changes):
    roller = Roller(*tiny.pair()[:2], teacher, config(prompts, **changes))
    torch.manual_seed(3)
    return roller


def updated(roller, rollouts):
    run = Run(roller, ["the sky"], watch=False)
    result = update(roller, rollouts, run.optimizer)
    return result, [p.detach().clone() for p in roller.student.parameters()]


ASKED = ["the sky", "the dog", "a fox?", "1 + 2", "hello"]


@pytest.mark.parametrize("loss", [name for name, rule in LOSSES.items() if rule.teacher != "nothing"])
def test_empty_rows_change_nothing(prompts, loss):
    """An update on a batch with answers that are empty, some of them alone in a micro-batch, is that without them."""
    local = LocalTeacher(tiny.teacher_model(), tiny.teacher_tokenizer())
    made = []
    for empty in (True, False):
        roller = roller_of(prompts, local, loss=loss, micro_batch=1)
        answers = roller.sample(ASKED).batch.student_ids
        rows = [0, 2, 3]
        if empty:
            answers = [row if b in rows else [] for b, row in enumerate(answers)]
            rows = range(5)
        rollouts = roller.take([ASKED[b] for b in rows], [answers[b] for b in rows], [False] * len(rows))
        made.append(updated(roller, roller.score(rollouts)))
    (a, weights), (b, others) = made
    assert a.loss.item() == pytest.approx(b.loss.item(), abs=1e-6)
    assert a.grad_norm.item() == pytest.approx(b.grad_norm.item(), rel=1e-4)
    assert a.loss.item() != 0
    for x, y in zip(weights, others, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("loss", "rows", "more"),
    [("prior", "none", 1), ("cover", "top", 2), ("cover", "sums", 0), ("transfer_kl", "hidden", 0)],
)
def test_a_row_that_is_refused_is_left_out_as_a_row(prompts, model, loss, rows, more):
    """The server has not said how long rows may be."""
    with faults.serving(model, tiny.teacher_tokenizer(), limits=Limits(max_length=LONGEST)) as server:
        teacher = teacher_of(server, model, rows)
        teacher.client.max_length = 0
        roller = roller_of(prompts, teacher, loss=loss)
        sampled = roller.sample(ASKED)
        sampled.old_logprobs = roller.all_logprobs(sampled.batch)
        before = [list(row) for row in sampled.batch.student_ids]
        scored = roller.score(sampled)
    assert sampled.batch.student_ids == before  # a checkpoint may be written meanwhile
    assert sampled.teacher is None
    lengths = [len(sampled.batch.teacher_prompt_ids[b] + sampled.batch.teacher_ids[b]) for b in range(5)]
    longer = [b for b in range(5) if lengths[b] + more > LONGEST]
    assert 0 < len(longer) < 5
    assert sorted(scored.skipped) == longer
    assert scored.sampled == sampled.lengths
    assert [b for b, row in enumerate(scored.batch.student_ids) if not row] == longer
    assert "rows are not taken, the first: " in scored.refusal
    assert f"the model takes {LONGEST} together" in scored.refusal
    assert scored.old_logprobs.shape == scored.batch.completion_mask.shape
    assert scored.teacher.mask.sum(1).tolist() == [len(row) for row in scored.batch.teacher_ids]


def test_rows_that_are_refused_are_named_when_all_others_are_answered(model):
    with faults.serving(model, tiny.teacher_tokenizer(), limits=Limits(max_length=8)) as server:
        client = Client(server.url, protocol="vllm", model="teacher", **FAST)
        with pytest.raises(RowRefusedError, match=r"2 of 4 rows are not taken.*the model takes 8") as caught:
            client.score([[1, 2], [1] * 9, [3, 4], [1] * 8])
        assert caught.value.rows == [1, 3]
        assert client.figures["answers"] == 2
        with pytest.raises(TeacherError, match="the model takes 8") as caught:
            client.score([[1] * 9, [1] * 8])
        assert not isinstance(caught.value, RowRefusedError)


def test_what_was_skipped_ahead_is_known_after_a_resume(prompts, model, monkeypatch):
    with faults.serving(model, tiny.teacher_tokenizer(), limits=Limits(max_length=LONGEST)) as server:
        settings = config(prompts, teacher_url=server.url, overlap=True, save_every=50, steps=4)
        whole = train(replace(settings, output=settings.output + "-whole"), models=tiny.pair())
        with monkeypatch.context() as patch:
            killable.stop_in_step(patch, 2)
            assert train(settings, models=tiny.pair()).interrupted
        result = train(replace(settings, resume=True), models=tiny.pair())
    assert sum(line["skipped_rows"] for line in result.metrics) > 0
    assert killable.left(result.output) == killable.left(whole.output)


def test_each_of_two_processes_leaves_out_its_own_rows(tmp_path, model):
    with faults.serving(model, tiny.teacher_tokenizer(), limits=Limits(max_length=52)) as server:
        values = killable.settings(tmp_path, teacher_url=server.url, steps=4, batch_size=3, teacher_patience=0.0)
        ends = several.launch(several.loop_of, tmp_path, values, None, "float32")
    assert [end[:2] for end in ends] == [[4, False]] * 2
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["skipped_rows"] < 3 for line in lines)
    assert sum(line["skipped_rows"] for line in lines) > 1
    assert (tmp_path / "0.log").read_text().count(" of 3 answers are left out of step ") == 1
    assert "left out" not in (tmp_path / "1.log").read_text()

"""The student's samples from a server that has its weights are those of the student, and counted where they are not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import faults
import killable
import several
import tiny
import xtokmap
from fake_sampler import SamplingServer
from xtokmap.teachers.client import TeacherError
from xtokmap.teachers.local import LocalTeacher
from xtokmap.torch.completions import batched_logprobs
from xtokmap.train import run as running
from xtokmap.train.config import Config
from xtokmap.train.loop import train
from xtokmap.train.run import Run
from xtokmap.train.sampler import ServerSampler
from xtokmap.train.sampling import Roller
from xtokmap.train.step import update

pytestmark = pytest.mark.filterwarnings("ignore:fastokens gives other ids")

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
SETTINGS = Config(max_new_tokens=12, device="cpu")
#: Of the tiny student: its end of turn, and one that comes often enough to be seen.
STOPS = [1, 70]


@pytest.fixture
def server():
    with SamplingServer(tiny.student_model(seed=5)) as server:
        yield server


def sampler_of(server, folder, **options):
    return ServerSampler(server.url, folder, "run", **{"pause": 0.001, "timeout": 20.0, "patience": 0.0, **options})


def test_answers_are_of_the_weights_that_were_given(server, tmp_path):
    student = tiny.student_model()
    sampler = sampler_of(server, tmp_path)
    sampler.load(student, 0)
    server.vary = 1
    found = sampler.sample(PROMPTS * 8, STOPS, SETTINGS)
    assert [len(found.ids), len(found.logprobs), found.version] == [24, 24, 0]
    own = batched_logprobs(student, PROMPTS * 8, found.ids, 8)
    for row, ids, theirs, done in zip(own.tolist(), found.ids, found.logprobs, found.completed, strict=True):
        assert theirs == pytest.approx(row[: len(ids)], abs=1e-4)
        assert 1 <= len(ids) <= 12
        assert done == (ids[-1] in STOPS)
        assert not set(ids[:-1]) & set(STOPS)
    assert 0 < sum(found.completed) < 24
    # A server that was started again has other weights, and is given these before anything of its is used.
    server.restart(tiny.student_model(seed=6))
    again = sampler.sample(PROMPTS, STOPS, SETTINGS)
    assert sampler.self_test(student, PROMPTS, STOPS, SETTINGS) < 1e-4
    own = batched_logprobs(student, PROMPTS, again.ids, 8)
    assert again.logprobs[0] == pytest.approx(own[0, : len(again.ids[0])].tolist(), abs=1e-4)
    # And one that is, in the middle of a batch.
    asked = len(server.log)

    def restarted(choice):
        server.restart(tiny.student_model(seed=6))
        return choice

    server.faults = [restarted]
    sampler.sample(PROMPTS, STOPS, SETTINGS)
    assert server.log[asked:].count("/v1/completions") == 2 * len(PROMPTS)
    assert server.log[asked:].count("/collective_rpc") == 1


def test_the_next_weights_take_the_place_of_those_before(server, tmp_path):
    sampler = sampler_of(server, tmp_path)
    for version in range(3):
        student = tiny.student_model(seed=version)
        sampler.load(student, version)
        assert [path.name for path in tmp_path.iterdir()] == [f"weights-{version:08d}"]
        assert sampler.self_test(student, PROMPTS, STOPS, SETTINGS) < 1e-4
        assert server.version == f"run-{version}"
    assert server.log.count("/reset_prefix_cache") == 3
    # The tied head is there again, for a server that does not tie.
    head = load_file(tmp_path / "weights-00000002" / "head.safetensors")
    torch.testing.assert_close(head["lm_head.weight"], student.lm_head.weight)


def test_a_server_that_has_something_else_is_refused(server, tmp_path):
    sampler = sampler_of(server, tmp_path)
    sampler.load(tiny.student_model(), 0)
    with pytest.raises(TeacherError, match=r"its logprobs of its own samples are .* nats from the student's"):
        sampler.self_test(sharp(9), PROMPTS, STOPS, SETTINGS)
    warm = replace(SETTINGS, temperature=0.3)
    student = sharp(0)
    sampler.load(student, 1)
    assert sampler.self_test(student, PROMPTS, STOPS, warm) < 1e-4
    server.raw = True
    with pytest.raises(
        TeacherError, match=r"logprobs of temperature 1 with samples of temperature 0\.3; .*processed_lo"
    ):
        sampler.self_test(student, PROMPTS, STOPS, warm)


def sharp(seed):
    model = tiny.student_model(seed=seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model


def test_what_cannot_be_loaded_is_named(server, tmp_path):
    sampler = sampler_of(server, tmp_path, retries=0)
    server.busy = True
    with pytest.raises(TeacherError, match="keeps what it has cached of other weights"):
        sampler.load(tiny.student_model(), 0)
    server.busy, server.dev = False, False
    with pytest.raises(TeacherError, match=r"does not load .*weights-00000001: .*VLLM_SERVER_DEV_MODE=1"):
        sampler.load(tiny.student_model(), 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(xtokmap.XTokMapError, match="cannot be written"):
        sampler_of(server, tmp_path / "file").load(tiny.student_model(), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {**c, "token_ids": c["token_ids"][:-1]}, "of other lengths"),
        (lambda c: {**c, "token_ids": None}, "are not there"),
        (lambda c: {**c, "logprobs": None}, "not one choice with logprobs"),
        (lambda c: with_ids(c, [*c["token_ids"], 5] * 9), "at most 12 were asked for"),
        (lambda c: with_ids(c, []), "0 token_ids"),
        (lambda c: with_ids(c, [-1]), "some that are none"),
        (lambda c: with_ids(c, [1, 5]), "ends elsewhere than at the first end of turn"),
        (lambda c: with_ids(c, [5, 6]), "ends elsewhere"),
        (lambda c: with_ids(c, [5, 1], 0.5), "no sampled token can have"),
    ],
)
def test_answers_that_cannot_be(server, tmp_path, change, message):
    sampler = sampler_of(server, tmp_path, retries=0)
    sampler.load(tiny.student_model(), 0)
    server.faults = [change]
    with pytest.raises(TeacherError, match=message):
        sampler.sample(PROMPTS[:1], STOPS, SETTINGS)
    assert len(sampler.sample(PROMPTS, STOPS, SETTINGS).ids) == 3


def with_ids(choice, ids, logprob=-1.0):
    return {**choice, "token_ids": ids, "logprobs": {"token_logprobs": [logprob] * len(ids)}}


# ---- runs ------------------------------------------------------------------------------------------------------------


def config(prompts, server, **changes) -> Config:
    values = {"prompts": str(prompts), "output": str(prompts.parent / "out"), "steps": 4, "batch_size": 4}
    values |= {"max_new_tokens": 8, "learning_rate": 0.01, "warmup_steps": 1, "micro_batch": 3, "device": "cpu"}
    values |= {"sampler_url": server.url, "save_every": 0, "eval_samples": 1, "loss": "prior"}
    return Config(**{**values, **changes})


@pytest.mark.parametrize(("every", "staleness"), [(1, [0, 0, 0, 0]), (3, [0, 1, 2, 0])])
def test_a_run_samples_there_and_counts_what_is_old(prompts, server, every, staleness):
    result = train(config(prompts, server, sampler_every=every), models=tiny.pair())
    seen = [line["sampler"] for line in result.metrics]
    assert [line["staleness"] for line in seen] == staleness
    for line, old in zip(seen, staleness, strict=True):
        assert (line["gap"] > 1e-3) == (old > 0)
        assert line["largest"] >= line["gap"]
        assert (line["clipped"] > 0) == (old > 0)
    assert all(line["time"]["weights"] > 0 for line in result.metrics[::every])
    # What is measured at the end is the student at its end.
    assert server.version.endswith("-4")
    theirs = dict(server.model.named_parameters())
    trained = type(server.model).from_pretrained(result.output / "student")
    for name, p in trained.named_parameters():
        torch.testing.assert_close(p, theirs[name], atol=1e-6, rtol=0)


def test_weights_that_a_server_keeps_are_noticed(prompts, server, capsys):
    with torch.no_grad():
        server.model.load_state_dict(tiny.student_model().state_dict())
    server.kept = ("model.embed_tokens.weight", "lm_head.weight")
    train(config(prompts, server), models=tiny.pair())
    assert "with weights that it was just given: does it keep some of the old ones?" in capsys.readouterr().out


def test_old_samples_are_corrected_by_the_servers_logprobs(prompts, server):
    """Against the same update, whose old logprobs are worked out by the model that sampled."""
    settings = config(prompts, server)
    made = []
    for elsewhere in (True, False):
        torch.manual_seed(4)
        student, tokenizer = tiny.student_model(), tiny.student_tokenizer()
        local = LocalTeacher(tiny.teacher_model(), tiny.teacher_tokenizer())
        sampler = sampler_of(server, prompts.parent / "weights")
        sampler.load(tiny.student_model(seed=3), 0)  # an older policy
        roller = Roller(student, tokenizer, local, settings, sampler=sampler)
        rollouts = roller.sample(["the sky", "the dog", "a fox?"])
        if not elsewhere:
            ids = rollouts.batch.student_prompt_ids, rollouts.batch.student_ids
            rollouts.old_logprobs = batched_logprobs(tiny.student_model(seed=3), *ids, 8)
        run = Run(roller, ["the sky"], watch=False)
        made.append(update(roller, roller.score(rollouts), run.optimizer))
    assert made[0].loss.item() == pytest.approx(made[1].loss.item(), abs=1e-5)
    assert made[0].grad_norm.item() == pytest.approx(made[1].grad_norm.item(), rel=1e-3)
    gap = (made[0].logprobs - made[0].rollouts.old_logprobs).abs().max()
    assert gap > 0.1


def test_both_sides_elsewhere_overlapped_and_gone_on_with(prompts, server, monkeypatch):
    with faults.serving(tiny.teacher_model(), tiny.teacher_tokenizer()) as teacher:
        settings = config(prompts, server, teacher_url=teacher.url, overlap=True, save_every=50, eval_samples=0)
        whole = train(replace(settings, output=settings.output + "-whole"), models=tiny.pair())
        assert [line["sampler"]["staleness"] for line in whole.metrics] == [0, 1, 1, 1]
        with monkeypatch.context() as patch:
            killable.stop_in_step(patch, 2)
            assert train(settings, models=tiny.pair()).interrupted
        result = train(replace(settings, resume=True), models=tiny.pair())
    assert killable.left(result.output) == killable.left(whole.output)


def test_a_sampler_that_is_gone_ends_the_run_with_what_there_is(prompts, server, monkeypatch):
    step = running.update

    def gone(*args):
        server.dev = False
        return step(*args)

    monkeypatch.setattr(running, "update", gone)
    with pytest.raises(TeacherError, match=r"ended after 1 steps.*--resume.*the sampler does not load"):
        train(config(prompts, server, save_every=50, eval_samples=0, teacher_retries=0), models=tiny.pair())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "kd", "loss": "alm"}, "method='kd' with sampler_url: only the student samples there"),
        ({"lora_rank": 4}, "lora_rank with sampler_url"),
        ({"sampler_url": "localhost"}, "sampler_url='localhost': expected http://host:port"),
        ({"sampler_url": "http://user:secret@a:1"}, "a key goes into the variable XTOKMAP_SAMPLER_KEY"),
        ({"sampler_every": 0}, "sampler_every=0: must be at least 1"),
        ({"sampler_timeout": 0.0}, r"sampler_timeout=0\.0: must be positive"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(xtokmap.XTokMapError, match=message):
        Config(**{"sampler_url": "http://127.0.0.1:8000", **changes})


def test_two_processes_sample_there_and_one_of_them_hands_over(tmp_path, server):
    values = killable.settings(tmp_path, sampler_url=server.url, steps=3, batch_size=3, loss="prior")
    ends = several.launch(several.loop_of, tmp_path, values, None, "float32")
    assert [end[:2] for end in ends] == [[3, False]] * 2
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["sampler"]["staleness"] for line in lines] == [0, 0, 0]
    assert all(line["sampler"]["gap"] < 1e-3 for line in lines)
    assert server.log.count("/collective_rpc") == 3
    assert server.version.endswith("-2")  # nothing is evaluated at the end

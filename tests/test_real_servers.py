"""The served teacher against a real vLLM: `make test-servers`.

Figures are printed, with what they are of; the tests hold what must not change.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from real_server import LONGEST, TEXTS, VENV, VLLM, folder, local_teacher, untied
from xtokmap import Aligner, demo
from xtokmap.chat import render
from xtokmap.models import load, load_tokenizer
from xtokmap.teachers import http1
from xtokmap.teachers.client import OtherTeacherError, RowRefusedError, TeacherError
from xtokmap.teachers.remote import ServerTeacher
from xtokmap.train.config import Config
from xtokmap.train.loop import train
from xtokmap.train.sampler import ServerSampler
from xtokmap.train.sampling import sample

pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(VENV is None, reason="make test-servers says where vLLM is (XTOKMAP_VLLM)"),
    pytest.mark.filterwarnings("ignore"),  # of transformers and torch, about models of this size
]


@pytest.fixture(scope="module")
def figure(request):
    """Shows a figure, whatever is captured."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def show(text):
        with capture.global_and_fixture_disabled():
            print(f"\n  {text}", end="", flush=True)

    return show


@pytest.fixture(scope="module")
def server(tmp_path_factory, figure):
    log = tmp_path_factory.mktemp("vllm") / "log"
    with VLLM(folder(demo.GEMMA), log, "--max-model-len", str(LONGEST)) as server:
        figure(f"vLLM is up: {log}")
        yield server


@pytest.fixture(scope="module")
def local():
    return local_teacher()


def teacher_of(server, tokenizer, **options):
    return ServerTeacher(server.url, tokenizer, protocol="vllm", timeout=300.0, **options)


def rows_of(tokenizer, texts=TEXTS):
    prompts = render(tokenizer, ["Go on."] * len(texts))
    return prompts, [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


@pytest.fixture
def settings(tmp_path):
    """Of a short run."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(["Why is the sky blue?", "Name three colors.", "What is 2 + 2?", "Say hello."]))
    return Config(
        student=str(folder(demo.SMOLLM2)),
        teacher=str(folder(demo.GEMMA)),
        teacher_timeout=300.0,
        teacher_patience=1200.0,  # the machine may be busy
        prompts=str(prompts),
        output=str(tmp_path / "out"),
        steps=4,
        batch_size=4,
        max_new_tokens=24,
        learning_rate=1e-5,
        warmup_steps=1,
        score_stop=False,
        save_every=0,
        eval_samples=0,
        device="cpu",
    )


@pytest.fixture
def run(settings, server):
    """The same with the served teacher."""
    return replace(settings, teacher_url=server.url)


# The servers of both are never there at once: each takes gigabytes.


# ---- the student's samples -------------------------------------------------------------------------------------------


def test_the_student_samples_there(settings, tmp_path, figure):
    """Every weight is renewed, its logprobs are the student's, and a run goes on with it."""
    arguments = ("--max-model-len", str(LONGEST))
    student, tokenizer = load(str(folder(demo.SMOLLM2)), torch.device("cpu"), "float32")
    prompts = render(tokenizer, Path(settings.prompts).read_text().splitlines() * 4)
    stops = [tokenizer.eos_token_id]
    with VLLM(untied(demo.SMOLLM2), tmp_path / "log", *arguments, settings={"VLLM_SERVER_DEV_MODE": "1"}) as server:
        sampler = ServerSampler(server.url, tmp_path / "weights", "test", timeout=300.0)
        for version in range(2):
            start = time.perf_counter()
            sampler.load(student, version)
            seconds = time.perf_counter() - start
            gap = sampler.self_test(student, prompts[:4], stops, settings)
            figure(f"weights {version}: {seconds:.1f} s to load, {gap:.1g} nats from the student's own logprobs")
            assert gap < 1e-3
            with torch.no_grad():  # all of them change
                for p in student.parameters():
                    p.add_(torch.randn_like(p) * 0.02 * p.std())
        figures = {}
        for name, ask in (
            ("vLLM", lambda: sampler.sample(prompts, stops, settings).ids),
            ("generate", lambda: sample(student, prompts, stops, settings)[0]),
        ):
            start = time.perf_counter()
            figures[name] = sum(map(len, ask())) / (time.perf_counter() - start)
        figure(
            ", ".join(f"{name} {value:.0f} tokens/s" for name, value in figures.items()) + f", {len(prompts)} answers"
        )
        result = train(replace(settings, steps=2, sampler_url=server.url))
    assert [line["sampler"]["staleness"] for line in result.metrics] == [0, 0]
    assert all(line["sampler"]["gap"] < 1e-3 for line in result.metrics)
    assert not any(warning["name"] == "sampler" for line in result.metrics for warning in line["warnings"])


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_self_test_and_what_it_refuses(server, local):
    teacher = teacher_of(server, local.tokenizer)
    assert teacher.self_test() is None
    assert teacher.client.model == "teacher"
    assert teacher.client.max_length == LONGEST
    assert ServerTeacher(server.url, local.tokenizer).self_test() is None  # auto
    with pytest.raises(TeacherError, match=r"two vocabularies|the vocabulary has 5"):
        teacher_of(server, load_tokenizer(str(folder(demo.SMOLLM2)))).self_test()
    with pytest.raises(TeacherError, match="greater than max allowed: 20"):
        teacher_of(server, local.tokenizer, topk=21).self_test()


def test_logprobs_are_the_local_teachers(server, local, figure):
    prompts, completions = rows_of(local.tokenizer)
    want = local.score(prompts, completions)
    got = teacher_of(server, local.tokenizer).score(prompts, completions, keep=True)
    gap = (got.logprobs - want.logprobs)[want.mask].abs()
    figure(f"logprobs against LocalTeacher, float32, {len(gap)} tokens: largest {gap.max():.2g}, mean {gap.mean():.2g}")
    assert gap.max() < 2e-3
    same, total = 0, 0
    for b, row in enumerate(completions):
        rows = local.rows([prompts[b]], [row]).slice(0, len(row))
        best = rows.topk(20).indices
        for i in range(len(row)):
            shown = {int(token) for token in got.top.ids[b, i] if token >= 0}
            same += len({*best[i].tolist()} & shown)
            total += 20
            assert row[i] in shown
    figure(f"of the 20 likeliest tokens of {total // 20} rows, {same / total:.2%} are the same")
    assert same / total > 0.999


def test_cover_from_the_top_k(server, local, figure):
    student = load_tokenizer(str(folder(demo.SMOLLM2)))
    aligner = Aligner(student, local.tokenizer)
    prompts, _ = rows_of(local.tokenizer)
    ids = [student(text, add_special_tokens=False).input_ids for text in TEXTS]
    teacher_ids, aligned = aligner.retokenize(ids)
    rows, queries = [row.tolist() for row in teacher_ids], aligner.cover_queries(aligned)
    want = local.score(prompts, rows, queries=queries).transferred
    got = teacher_of(server, local.tokenizer).score(prompts, rows, queries=queries)
    assert (torch.isnan(got.transferred) == torch.isnan(want)).all()
    known = torch.isfinite(want) & torch.isfinite(got.transferred)
    gap = (want - got.transferred)[known].abs()
    assert gap.mean() < 1
    figure(
        f"cover from the top 20: {got.missing[got.mask].mean():.1%} of the mass is not shown; {gap.mean():.3f} nats "
        f"from the exact one in the mean, {gap.max():.1f} at most"
    )


def test_bytes_and_requests_a_second(server, local, figure, monkeypatch):
    read, ask = [0], http1.Connections.ask

    def counting(connections, *args, **kwargs):
        answer = ask(connections, *args, **kwargs)
        read[0] += len(answer.content)
        return answer

    monkeypatch.setattr(http1.Connections, "ask", counting)
    prompts, completions = rows_of(local.tokenizer, TEXTS * 4)
    tokens = sum(map(len, prompts)) + sum(map(len, completions)) + len(prompts)
    for concurrency in (1, 4, 16):
        teacher = teacher_of(server, local.tokenizer, concurrency=concurrency)
        teacher.client.connect(prompts[0])
        for k in (0, 20):
            read[0], start = 0, time.perf_counter()
            got = teacher.score(prompts, completions, keep=k > 0)
            seconds = time.perf_counter() - start
            assert torch.isfinite(got.logprobs).all()
            figure(
                f"{concurrency} at a time, top {k}: {len(prompts) / seconds:.1f} requests/s, "
                f"{tokens / seconds:.0f} tokens/s, {read[0] / tokens:.0f} bytes a token"
            )


# ---- what it does not take -------------------------------------------------------------------------------------------


def test_rows_at_the_limit(server, local):
    teacher = teacher_of(server, local.tokenizer, topk=20)
    teacher.client.connect([2, 5])
    token = local.tokenizer("a", add_special_tokens=False).input_ids[0]
    lengths = [LONGEST - 4, LONGEST - 3, LONGEST - 2, LONGEST - 1]
    rows = [[token] * n for n in lengths]
    longer, _ = teacher.too_long([[2]] * 4, rows)
    assert longer == [2, 3]
    scores = teacher.score([[2]] * 2, rows[:2], keep=True)
    assert scores.mask.sum(1).tolist() == lengths[:2]
    # One that it is asked all the same is named, and the others have their answers: also one of exactly its length.
    for n in (LONGEST, LONGEST + 50):
        with pytest.raises(RowRefusedError, match="1 of 3 rows are not taken") as caught:
            teacher.client.score([[2, 5], [token] * n, [2, 6]])
        assert caught.value.rows == [1]


# ---- runs ------------------------------------------------------------------------------------------------------------


def lines_of(run):
    path = Path(run.output) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def after(run, steps, what):
    """Does something in another thread, as soon as a run has made some steps."""

    def wait():
        while len(lines_of(run)) < steps:
            time.sleep(0.05)
        what()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("overlap", [False, True])
def test_the_command_line_trains_with_it(run, overlap, figure):
    names = ("student", "teacher", "teacher_url", "prompts", "output", "steps", "batch_size", "max_new_tokens")
    flags = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(run, name)))]
    flags += ["--overlap"] if overlap else []
    command = [sys.executable, "-m", "xtokmap", "train", *flags, "--device", "cpu", "--save-every", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = lines_of(run)
    assert [line["skipped_batches"] + line["skipped_rows"] for line in lines] == [0] * run.steps
    assert all(np.isfinite([line["loss"], line["kl_per_byte"]]).all() for line in lines)
    assert (Path(run.output) / "student" / "model.safetensors").exists()
    waited = sum(line["time"]["teacher"] for line in lines)
    figure(f"overlap={overlap}: {run.steps} steps, {sum(line['seconds'] for line in lines):.1f} s, {waited:.1f} waited")


def test_rows_too_long_cost_rows(server, run, capsys):
    lengths = [len(ids) for ids in render(load_tokenizer(run.teacher), Path(run.prompts).read_text().splitlines())]
    server.restart("--max-model-len", str(max(lengths) + 30))
    result = train(replace(run, steps=2, max_new_tokens=40))
    said = capsys.readouterr().out
    assert [line["skipped_batches"] for line in result.metrics] == [0, 0]
    assert all(0 < line["skipped_rows"] < 4 for line in result.metrics)
    assert said.count("answers are left out of step") == 1


def test_a_server_that_is_killed_and_started_again(server, run, capsys, figure):
    killed: list[float] = []

    def restart():
        killed.append(time.monotonic())
        server.restart("--max-model-len", str(LONGEST))
        killed.append(time.monotonic())

    thread = after(run, 1, restart)
    result = train(run)
    thread.join()
    said = capsys.readouterr().out
    assert len(result.metrics) == run.steps
    assert [line["skipped_batches"] for line in result.metrics] == [0] * run.steps
    assert "is not there" in said
    assert "answers, after" in said
    figure(f"killed and started again in {killed[1] - killed[0]:.0f} s: {run.steps} steps, no batch lost")


def test_another_model_of_the_same_vocabulary(server, local, run, tmp_path, capsys, figure):
    """A copy with noise in its weights, behind the same URL and name; the last test, as the server has it then."""
    other = tmp_path / "other"
    torch.manual_seed(0)
    with torch.no_grad():
        for p in local.model.parameters():
            p.add_(torch.randn_like(p) * 0.1 * p.std().nan_to_num(0))
    local.model.save_pretrained(other)
    local.tokenizer.save_pretrained(other)

    def replaced():
        server.model = other
        server.restart("--max-model-len", str(LONGEST))

    thread = after(run, 1, replaced)
    with pytest.raises(TeacherError, match="has another model than at the start") as caught:
        train(replace(run, steps=50))
    thread.join()
    assert isinstance(caught.value.__cause__, OtherTeacherError)
    made = len(lines_of(run))
    assert made < 50
    figure(f"another model: ended after {made} steps: {caught.value.__cause__}")

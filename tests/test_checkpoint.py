"""Checkpoints: a run resumes to the bit, whatever happened to it and to them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import killable
import tiny
import xtokmap
from xtokmap.train import run as running
from xtokmap.train.config import Config
from xtokmap.train.loop import train
from xtokmap.train.run import Order
from xtokmap.train.support import checkpoint
from xtokmap.train.support.checkpoint import CheckpointError, found

pytestmark = pytest.mark.filterwarnings("ignore:fastokens gives other ids")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    train(Config(**killable.settings(folder)), models=killable.models())
    return folder / "out"


def stop_after(monkeypatch, step, number=signal.SIGTERM):
    """A signal in the middle of a step."""
    real = running.update

    def update(roller, *args):
        calls.append(0)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return real(roller, *args)

    calls = []
    monkeypatch.setattr(running, "update", update)


@pytest.mark.parametrize(
    ("dtype", "changes", "number"),
    [
        ("float32", {}, signal.SIGTERM),
        ("bfloat16", {"updates": 2, "loss": "prior"}, signal.SIGINT),
        ("float16", {}, signal.SIGTERM),
        ("float32", {"method": "sft", "updates": 2}, signal.SIGTERM),
        ("bfloat16", {"method": "kd", "beta": 0.0}, signal.SIGTERM),
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_bit(tmp_path, monkeypatch, dtype, changes, number, capsys):
    values = killable.settings(tmp_path, steps=5, save_every=50, dtype=dtype, **changes)
    want = {**values, "output": str(tmp_path / "whole")}
    train(Config(**want), models=killable.models(dtype))
    with monkeypatch.context() as patch:
        stop_after(patch, 3, number)
        stopped = train(Config(**values), models=killable.models(dtype))
    assert stopped.interrupted
    assert len(stopped.metrics) == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    torch.manual_seed(99)  # whatever state there is
    result = train(Config(**values, resume=True), models=killable.models(dtype))
    assert "resuming at step 3 of 5" in capsys.readouterr().out
    assert not result.interrupted
    assert killable.left(result.output) == killable.left(tmp_path / "whole")


def test_evaluations_and_more_steps(tmp_path):
    prompts = tmp_path / "p.jsonl"
    rows = [{"prompt": t, "split": s} for s in ("train", "heldout") for t in ("the sky", "a fox?", "1 + 2")]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    values = killable.settings(tmp_path, prompts=str(prompts), steps=6)
    want = train(Config(**{**values, "output": str(tmp_path / "whole")}), models=tiny.pair())
    first = train(Config(**{**values, "steps": 3}), models=tiny.pair())
    result = train(Config(**values, resume=True), models=tiny.pair())
    assert first.before == want.before == result.before
    assert result.after == want.after
    assert killable.left(result.output) == killable.left(want.output)
    # At the end already: nothing more is done, and everything is left as it was.
    again = train(Config(**values, resume=True), models=tiny.pair())
    assert again.after == want.after
    assert killable.left(again.output) == killable.left(want.output)
    with pytest.raises(CheckpointError, match="is at step 6 already, and steps=3"):
        train(Config(**{**values, "steps": 3}, resume=True), models=tiny.pair())


def test_what_a_checkpoint_is_made_of(whole):
    paths = found(whole / "checkpoints")
    assert [path.name for path in paths] == ["step-00000006", "step-00000008"]
    for path in paths:
        assert {file.name for file in path.iterdir()} == {
            "manifest.json",
            "metrics.jsonl",
            "state.json",
            "state.safetensors",
        }
        assert path.joinpath("metrics.jsonl").read_text().count("\n") == int(path.name[-1])
    tensors = load_file(paths[-1] / "state.safetensors")
    weights = load_file(whole / "student/model.safetensors")
    assert {f"weight.{name}" for name in weights} == {name for name in tensors if name.startswith("weight.")}
    for name, value in weights.items():
        assert torch.equal(tensors[f"weight.{name}"], value)
        assert tensors[f"exp_avg.{name}"].shape == tensors[f"exp_avg_sq.{name}"].shape == value.shape
        assert int(tensors[f"step.{name}"]) == 8
    assert tensors["random.cpu.0"].dtype == torch.uint8


def test_an_earlier_run_is_not_overwritten(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "out")
    values = killable.settings(tmp_path)
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="step-00000008 is of an earlier run: --resume"):
        train(Config(**values), models=tiny.pair())
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-3}, r"is of a run with learning_rate=0\.003, not 0\.001"),
        ({"batch_size": 3}, "batch_size=4, not 3"),
        ({"seed": 1}, "seed=0, not 1"),
        ({"method": "sft"}, "method='opd', not 'sft'"),
        ({"loss": "prior"}, "loss='auto', not 'prior'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_field(tmp_path, whole, changes, message):
    shutil.copytree(whole, tmp_path / "out")
    with pytest.raises(CheckpointError, match=message):
        train(Config(**killable.settings(tmp_path, resume=True, **changes)), models=tiny.pair())


def test_other_prompts_and_another_student_are_refused(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "out")
    values = killable.settings(tmp_path, resume=True)
    Path(values["prompts"]).write_text("something else\n")
    with pytest.raises(CheckpointError, match="other prompts than those of"):
        train(Config(**values), models=tiny.pair())
    values = killable.settings(tmp_path, resume=True)
    student, *rest = tiny.pair()
    next(student.parameters()).requires_grad_(False)
    with pytest.raises(CheckpointError, match="of another student"):
        train(Config(**values), models=(student, *rest))


class Weights:
    """A teacher, or a student that is trained in part, whose path has other weights by now."""

    @staticmethod
    def trained_on(teacher):
        for p in teacher.parameters():
            p.add_(p.abs().mean() * 1e-2)

    @staticmethod
    def one_layer(teacher):
        teacher.model.layers[1].mlp.up_proj.weight.mul_(1.01)

    @staticmethod
    def another_seed(teacher):
        teacher.load_state_dict(tiny.teacher_model(seed=5).state_dict())


@pytest.mark.parametrize("change", [Weights.trained_on, Weights.one_layer, Weights.another_seed])
def test_a_teacher_of_other_weights_is_refused(tmp_path, whole, change):
    shutil.copytree(whole, tmp_path / "out")
    values = killable.settings(tmp_path, resume=True, teacher="some/path")
    for path in found(tmp_path / "out/checkpoints"):
        state = json.loads(path.joinpath("state.json").read_text())
        rewrite(path, "state.json", json.dumps({**state, "config": {**state["config"], "teacher": "some/path"}}))
    models = tiny.pair()
    with torch.no_grad():
        change(models[2])
    message = "is of a run with another teacher: what teacher='some/path' has now are other weights; put those back"
    with pytest.raises(CheckpointError, match=message):
        train(Config(**values), models=models)


def test_the_weights_that_an_adapter_leaves_alone_are_looked_at_too(tmp_path):
    pytest.importorskip("peft")
    values = killable.settings(tmp_path, steps=2, lora_rank=2)
    train(Config(**values), models=tiny.pair())
    values |= {"resume": True, "steps": 3}
    with pytest.raises(CheckpointError, match="is of another student: what student='' has now are other weights"):
        train(Config(**values), models=(tiny.student_model(seed=3), *tiny.pair()[1:]))
    assert len(train(Config(**values), models=tiny.pair()).metrics) == 3


def test_the_same_teacher_in_another_dtype_is_the_same(tmp_path, whole):
    """As with dtype=auto on another device."""
    shutil.copytree(whole, tmp_path / "out")
    models = tiny.pair()
    models[2].bfloat16()
    result = train(Config(**killable.settings(tmp_path, resume=True)), models=models)
    assert len(result.metrics) == 8
    with torch.no_grad():
        models[2].model.embed_tokens.weight.mul_(-1)
    with pytest.raises(CheckpointError, match="another teacher"):
        train(Config(**killable.settings(tmp_path, resume=True)), models=models)


def test_a_checkpoint_that_knows_of_no_teacher_is_gone_on_from(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "out")
    for path in found(tmp_path / "out/checkpoints"):
        state = json.loads(path.joinpath("state.json").read_text())
        assert set(state.pop("untrained")) == {"student", "teacher"}
        rewrite(path, "state.json", json.dumps(state))
    assert len(train(Config(**killable.settings(tmp_path, resume=True)), models=tiny.pair()).metrics) == 8


def rewrite(path, name, text):
    """Another content for a checkpoint's file, that its manifest knows of."""
    manifest = json.loads(path.joinpath("manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    path.joinpath(name).write_text(text)
    path.joinpath("manifest.json").write_text(json.dumps(manifest))


def records(folder):
    return [line for line in (folder / "samples.jsonl").read_bytes().split(b"\n") if line]


@pytest.mark.parametrize(
    ("harm", "number"),
    [
        (lambda data: data[: data.rindex(b"columns")], -1),
        (lambda data: data + b"\xff\xfe\x00\x80", None),
        (lambda data: b"\x00" * 5000 + b"\n" + data, 1),
        (lambda data: b"[" * 100_000 + b"\n" + data, 1),
        (lambda data: b'5\n{"why": "gap"}\n{"why": []}\n' + data, 1),
        (lambda data: data.replace(b'"kind"', b'"kin"', 1), 1),
        (lambda data: data.replace(b'"cut": [', b'"cut": [[],', 1), 1),
    ],
)
def test_damaged_samples_are_named_and_what_is_good_is_kept(tmp_path, whole, harm, number):
    shutil.copytree(whole, tmp_path / "out")
    path, good = tmp_path / "out/samples.jsonl", records(whole)
    path.write_bytes(harm(path.read_bytes()))
    number = {None: len(good) + 1, -1: len(good)}.get(number, number)
    with pytest.warns(UserWarning, match="damaged, and left out") as said:
        result = train(Config(**killable.settings(tmp_path, resume=True)), models=tiny.pair())
    (text,) = (str(w.message) for w in said if "samples.jsonl" in str(w.message))
    assert re.fullmatch(re.escape(f"{path}, line {number}") + r"( and \d+ more lines)?: damaged, and left out", text)
    kept = records(result.output)
    assert set(kept) < set(good) or kept == good
    assert len(kept) >= len(good) - 1
    assert (result.output / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "nothing"])
def test_something_else_in_the_place_of_the_samples(tmp_path, whole, kind):
    shutil.copytree(whole, tmp_path / "out")
    path = tmp_path / "out/samples.jsonl"
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(Config(**killable.settings(tmp_path, resume=True)), models=tiny.pair())
    about = [str(w.message) for w in said if "samples.jsonl" in str(w.message)]
    assert [text.startswith(str(path)) and "left out" in text for text in about] == [True] * (kind != "nothing")
    assert path.is_file()


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("name", ["manifest.json", "metrics.jsonl", "state.json", "state.safetensors"])
@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink, lambda file: file.write_bytes(b"")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, whole, name, harm):
    shutil.copytree(whole, tmp_path / "out")
    harm(tmp_path / "out/checkpoints/step-00000008" / name)
    values = killable.settings(tmp_path, resume=True)
    with pytest.warns(UserWarning, match=f"step-00000008 is left out: {re.escape(name)}"):
        result = train(Config(**values), models=tiny.pair())
    assert killable.left(result.output) == killable.left(whole)
    assert [path.name for path in found(result.output / "checkpoints")] == ["step-00000006", "step-00000008"]


def test_where_none_is_whole_nothing_is_started(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "out")
    for path in found(tmp_path / "out/checkpoints"):
        flip(path / "state.safetensors")
    values = killable.settings(tmp_path, resume=True)
    with (
        pytest.warns(UserWarning, match="is left out"),
        pytest.raises(CheckpointError, match="none of the 2 checkpoints is whole"),
    ):
        train(Config(**values), models=tiny.pair())


def test_left_over_files_are_named_and_removed(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "out")
    folder = tmp_path / "out/checkpoints"
    shutil.copytree(folder / "step-00000008", folder / ".writing-step-00000010")
    shutil.rmtree(folder / "step-00000008")
    with pytest.warns(UserWarning, match=r"\.writing-step-00000010 is left out: the run ended while"):
        result = train(Config(**killable.settings(tmp_path, resume=True)), models=tiny.pair())
    assert killable.left(result.output) == killable.left(whole)
    assert not list(folder.glob(".writing-*"))


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path, whole):
    values = killable.settings(tmp_path, resume=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/metrics.jsonl").write_text('{"step": 1}\n{"st')
    assert killable.left(train(Config(**values), models=tiny.pair()).output) == killable.left(whole)


def test_save_every_0_leaves_no_checkpoint(tmp_path):
    values = killable.settings(tmp_path, steps=1, save_every=0)
    assert not (train(Config(**values), models=tiny.pair()).output / "checkpoints").exists()


@pytest.mark.parametrize("call", range(8))
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch, call, whole):
    """Every write and flush of the second checkpoint fails in turn."""
    calls = [0]

    def failing(real):
        def function(*args):
            calls[0] += (tmp_path / "out/checkpoints/.writing-step-00000004").exists()
            if calls[0] == call + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)

        return function

    values = killable.settings(tmp_path, steps=4)
    message = "step-00000004: cannot be written: No space left on device; .*step-00000002 is the last whole one"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint._Hashing, "write", failing(checkpoint._Hashing.write))
        patch.setattr(checkpoint.os, "fsync", failing(os.fsync))
        with pytest.raises(CheckpointError, match=message):
            train(Config(**values), models=tiny.pair())
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["step-00000002"]
    assert checkpoint._problem(tmp_path / "out/checkpoints/step-00000002") is None
    result = train(Config(**{**values, "steps": 8}, resume=True), models=tiny.pair())
    assert killable.left(result.output) == killable.left(whole)


def test_the_systems_own_limit_is_a_full_disk_too(tmp_path):
    """Writes are cut short by the kernel, half-way through a file."""
    values = killable.settings(tmp_path, steps=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="step-00000002: cannot be written: File too large; make room"):
            train(Config(**values), models=tiny.pair())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "out/checkpoints").iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_metrics_that_cannot_be_written_are_named(tmp_path):
    values = killable.settings(tmp_path, steps=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: cannot be written: No space left on device"):
        train(Config(**values), models=tiny.pair())


@pytest.mark.parametrize("at", [1, 24, *(pytest.param(at, marks=pytest.mark.slow) for at in (3, 9, 15, 18, 21, 31))])
def test_a_process_that_dies_while_it_saves(tmp_path, whole, at):
    """At several of the moments around every write, flush, rename and removal; the others are marked slow."""
    values = killable.settings(tmp_path)
    process = killable.start(values, die_at=at)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    killable.finish(values)
    assert killable.left(tmp_path / "out") == killable.left(whole)


@pytest.mark.slow
def test_a_process_that_dies_at_any_moment_while_it_saves(tmp_path, whole):
    at, lost = 0, []
    while True:
        at += 1
        values = killable.settings(tmp_path / str(at))
        process = killable.start(values, die_at=at)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        made = (tmp_path / str(at) / "out/metrics.jsonl").read_text().count("\n")
        lost.append(made - sum(killable.finish(values)))
        assert killable.left(tmp_path / str(at) / "out") == killable.left(whole)
    assert at > 80
    assert max(lost) <= 2


@pytest.mark.parametrize("seed", [0, pytest.param(range(1, 60), marks=pytest.mark.slow)])
def test_a_process_that_is_killed_at_a_random_moment(tmp_path, whole, seed):
    for one in seed if isinstance(seed, range) else (seed,):
        values = killable.settings(tmp_path / str(one), save_every=1)
        killable.kill_at_random(values, one, 1.0)
        killable.finish(values)
        lines, student, _ = killable.left(tmp_path / str(one) / "out")
        want = killable.left(whole)
        assert (lines, student) == want[:2]


def test_orders_are_every_prompt_once_in_every_round():
    order = Order(5, seed=3)
    drawn = [next(order) for _ in range(17)]
    assert [sorted(drawn[k : k + 5]) for k in (0, 5, 10)] == [list(range(5))] * 3
    again = Order(5, seed=3)
    again.skip(9)
    assert [next(again) for _ in range(8)] == drawn[9:]


def test_a_thread_cannot_take_signals_and_trains_all_the_same(tmp_path):
    values = killable.settings(tmp_path, steps=1)
    results = []
    thread = threading.Thread(target=lambda: results.append(train(Config(**values), models=tiny.pair())))
    thread.start()
    thread.join()
    assert len(results[0].metrics) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"save_every": -1}, "save_every=-1: must be finite and not negative"),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0: must be at least 1"),
    ],
)
def test_settings_that_no_run_can_use(changes, message):
    with pytest.raises(xtokmap.XTokMapError, match=message):
        Config(**changes)

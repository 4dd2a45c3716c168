"""A run in a process of its own that can be killed at any moment, and what it has left, to compare."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file

import tiny
from xtokmap.train import run as running
from xtokmap.train.config import Config
from xtokmap.train.loop import train
from xtokmap.train.support import checkpoint

TIMINGS = ("time", "seconds", "hidden_seconds", "tokens_per_second")

#: Forks of a process that has imported everything and run nothing: a new one is there at once, with no threads.
processes: Any = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["killable"])


def stop_in_step(patch: pytest.MonkeyPatch, number: int) -> None:
    """SIGTERM comes in the middle of this step of a run, counted from 1."""
    update, calls = running.update, []

    def stopping(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args)

    patch.setattr(running, "update", stopping)


def serve() -> None:
    """Starts the server, which looks for modules where Python itself does; never when it imports this module itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        patch.setenv("MPLBACKEND", "agg")
        forkserver.ensure_running()


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    prompts = folder / "prompts.txt"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("the sky\nthe dog\na fox?\n1 + 2\nhello\nnaïve\n")
    values = {
        "prompts": str(prompts),
        "output": str(folder / "out"),
        "steps": 8,
        "batch_size": 4,
        "max_new_tokens": 8,
        "learning_rate": 3e-3,
        "warmup_steps": 5,
        "micro_batch": 3,
        "save_every": 2,
        "device": "cpu",
    }
    return {**values, **changes}


def models(dtype: str = "float32") -> tuple[Any, Any, Any, Any]:
    pair = tiny.pair()
    return pair[0].to(getattr(torch, dtype)), *pair[1:]


def run(values: dict[str, Any], *, die_at: int | None = None, dtype: str = "float32") -> int:
    """Trains, without a word; dies at the nth time that a checkpoint touches the disk. Returns how often it did."""
    count = [0]
    if die_at is not None:
        _count(lambda: _die(count, die_at))
    train(Config(**values), models=models(dtype))
    return count[0]


def _die(count: list[int], at: int) -> None:
    count[0] += 1
    if count[0] == at:
        os.kill(os.getpid(), signal.SIGKILL)


def _count(touched: Callable[[], None]) -> None:
    """Calls `touched` before and after everything that a checkpoint does to the disk."""

    def around(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            touched()
            result = function(*args, **kwargs)
            touched()
            return result

        return call

    class Disk:
        """`os` and `shutil` as `checkpoint` sees them."""

        def __init__(self, real: Any, names: tuple[str, ...]) -> None:
            self.__dict__.update(vars(real))
            self.__dict__.update((name, around(getattr(real, name))) for name in names)

    checkpoint.os = Disk(os, ("rename", "fsync"))
    checkpoint.shutil = Disk(checkpoint.shutil, ("rmtree",))
    checkpoint._Hashing.write = around(checkpoint._Hashing.write)


def start(values: dict[str, Any], **kwargs: Any) -> Any:
    serve()
    process = processes.Process(target=_quietly, args=(values, kwargs))
    process.start()
    return process


def _quietly(values: dict[str, Any], kwargs: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    log = Path(values["output"]).with_suffix(".log")
    with open(log, "a") as file:
        sys.stdout = sys.stderr = file
        warnings.simplefilter("always")
        run(values, **kwargs)


def finish(values: dict[str, Any], **kwargs: Any) -> list[int]:
    """Resumes a run to its end; returns the steps at which it resumed."""
    process = start({**values, "resume": True}, **kwargs)
    process.join()
    log = Path(values["output"]).with_suffix(".log").read_text()
    assert process.exitcode == 0, log
    return [int(n) for n in re.findall(r"resuming at step (\d+)", log)]


def left(output: Path) -> tuple[list[dict[str, Any]], bytes, dict[str, bytes]]:
    """What a run leaves: its metrics without timings, its student, and its last checkpoint with every random state."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]
    last = checkpoint.found(output / "checkpoints")[-1]
    tensors = {name: value.numpy().tobytes() for name, value in load_file(last / "state.safetensors").items()}
    return metrics, (output / "student/model.safetensors").read_bytes(), tensors


def kill_at_random(values: dict[str, Any], seed: int, longest: float) -> tuple[int, str]:
    """Starts a run and kills it after a random time: the steps that it had made, and what it was at."""
    output = Path(values["output"])
    process = start(values)
    while process.is_alive() and not (output / "metrics.jsonl").exists():
        time.sleep(0.005)
    process.join(random.Random(seed).uniform(0, longest))
    process.kill()
    process.join()
    if process.exitcode == 0:
        return values["steps"], "ended"
    lines = (output / "metrics.jsonl").read_text() if output.exists() else ""
    saving = any((output / "checkpoints").glob(".writing-*"))
    return lines.count("\n"), "saving" if saving else "between"

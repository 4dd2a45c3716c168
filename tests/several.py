"""Several processes on this machine, forked as in `killable`, and what they find."""

from __future__ import annotations

import copy
import importlib
import json
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import killable
import tiny
from xtokmap.chat import render
from xtokmap.teachers.local import LocalTeacher
from xtokmap.torch import Logits, Pair
from xtokmap.train import run as running
from xtokmap.train import sampling as rolling
from xtokmap.train.config import Config
from xtokmap.train.loop import Run, train
from xtokmap.train.sampling import Roller
from xtokmap.train.support.distributed import Processes, is_shard, launched, shard

PROMPTS = ["the sky", "the dog", "a fox?", "1 + 2", "hello"]


def launch(function: Callable[..., Any], folder: Path, *args: Any, count: int = 2) -> list[Any]:
    """Calls a function of a module in `count` processes; returns what each gave, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    killable.serve()
    running = [
        killable.processes.Process(
            target=_start, args=(function.__module__, function.__name__, rank, count, port, str(folder), args)
        )
        for rank in range(count)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join()
    logs = "\n".join((folder / f"{rank}.log").read_text() for rank in range(count))
    assert [process.exitcode for process in running] == [0] * count, logs
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def _start(module: str, name: str, rank: int, count: int, port: int, folder: str, args: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with open(Path(folder) / f"{rank}.log", "a") as log:
        sys.stdout = sys.stderr = log
        warnings.simplefilter("always")
        found = getattr(importlib.import_module(module), name)(rank, *args)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


def answers(empty: int) -> dict[tuple[int, ...], list[int]]:
    """To every prompt an answer of other length; from number `empty` on just the end of turn, which is not scored."""
    generator = torch.Generator().manual_seed(4)
    stop = tiny.student_tokenizer().eos_token_id
    given = {}
    for k, prompt in enumerate(render(tiny.student_tokenizer(), PROMPTS)):
        ids = torch.randint(3, 300, (3 + 2 * k,), generator=generator).tolist()
        given[tuple(prompt)] = [stop] if k >= empty else [*ids, stop]
    return given


def compare(rank: int, values: dict[str, Any], empty: int, dtype: str) -> dict[str, Any]:
    """Two steps on given answers, here alone and with the others: the largest differences."""
    given = answers(empty)
    rolling.sample = lambda model, prompts, stops, config: (
        [given[tuple(p)] for p in prompts],
        [True] * len(prompts),
    )
    config = Config(**values)

    def steps(processes: Processes) -> tuple[Run, list[torch.Tensor], list[torch.Tensor]]:
        student, tokenizer, teacher, teacher_tokenizer = killable.models(dtype)
        if processes.count > 1 and config.shard:
            shard(student, processes, torch.device("cpu"))
        teacher = LocalTeacher(teacher, teacher_tokenizer)
        run = Run(Roller(student, tokenizer, teacher, config, processes), PROMPTS, watch=False)
        gradients = []

        def keep(optimizer: Any, *_: Any) -> None:
            if not gradients:
                gradients.extend(_by_name(run, lambda p: p.grad))

        run.optimizer.register_step_pre_hook(keep)
        for _ in range(2):
            run.step()
        return run, gradients, _by_name(run, lambda p: p.detach())

    alone, gradients, weights = steps(Processes())
    with launched("cpu") as (processes, _):
        together, their_gradients, their_weights = steps(processes)
    shards = sum(is_shard(p) for group in together.optimizer.param_groups for p in group["params"])
    lines = [run.history for run in (alone, together)]
    assert [line.pop("flops") for line in lines[0]] == [line.pop("flops") for line in lines[1]]
    for line in (*lines[0], *lines[1]):
        for name in (*killable.TIMINGS, "coverage"):
            line.pop(name, None)
    return {
        "gradients": _difference(gradients, their_gradients),
        "gradient": float(max(g.abs().max() for g in gradients)),
        "weights": _difference(weights, their_weights),
        "metrics": max(abs(a[k] - b[k]) for a, b in zip(*lines, strict=True) for k in a if a[k] == a[k]),
        "loss": max(abs(a["loss"] - b["loss"]) for a, b in zip(*lines, strict=True)),
        "shards": shards,
        "scored": alone.history[0]["scored"],
        "digest": [float(w.double().sum()) for w in their_weights],
    }


def _by_name(run: Run, of: Callable[[Any], Any]) -> list[torch.Tensor]:
    from xtokmap.train.support.checkpoint import _parameters

    found = []
    for _, p in sorted(_parameters(run), key=lambda pair: pair[0]):
        found.append(_whole(of(p)))
    return found


def _difference(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))


def own_loop(rank: int, how: str, form: str) -> dict[str, Any]:
    """Two steps of a plain loop, alone on all rows and in a wrapper of PyTorch's on some: the largest differences.

    And whether the student samples the same: one process more tokens than the other.
    """
    student, tokenizer, teacher, teacher_tokenizer = tiny.pair()
    pair = Pair(tokenizer, teacher_tokenizer)
    rows = list(zip(PROMPTS, answers(9).values(), strict=True))
    texts: dict[int, list[Any]] = {1: [], 2: []}

    def steps(model: Any, rows: list[Any], count: int) -> list[list[torch.Tensor]]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        found = []
        for _ in range(2):
            asked = pair.prompt_inputs(PROMPTS[:2])
            inner, options = getattr(model, "module", model), {"do_sample": False, "max_new_tokens": 2 + 3 * rank}
            texts[count].append(inner.generate(**asked, **options, synced_gpus=how == "fsdp" and count > 1).tolist())
            batch = pair.prepare(*(list(column) for column in zip(*rows, strict=True)))
            tokens = batch.completion_mask.sum()
            if count > 1:
                dist.all_reduce(tokens)
            with torch.no_grad():
                scored = teacher(**batch.teacher_inputs)
            out = pair.loss(FORMS[form](model, batch), scored, batch, denominator=tokens / count)
            out.loss.backward()
            found.append([_whole(p.grad) for p in model.parameters()])
            optimizer.step()
            optimizer.zero_grad()
        return [*found, [_whole(p.detach()) for p in model.parameters()]]

    alone = steps(copy.deepcopy(student), rows, 1)
    dist.init_process_group("gloo")
    if how == "ddp":
        model: Any = DistributedDataParallel(student)
    else:
        for layer in student.model.layers:
            fully_shard(layer)
        model = fully_shard(student)
    together = steps(model, rows[rank::2], 2)
    dist.destroy_process_group()
    names = ("first", "second", "weights")
    found = {name: _difference(a, b) for name, a, b in zip(names, alone, together, strict=True)}
    return {**found, "sampled": texts[1] == texts[2], "gradient": float(max(g.abs().max() for g in alone[0]))}


def _hidden(model: Any, batch: Any) -> Logits:
    """The pass goes through the wrapper, which has to learn of it; the loss applies the head, a slice at a time."""
    out = model(**batch.student_inputs, output_hidden_states=True, logits_to_keep=1)
    head = getattr(model, "module", model).lm_head
    return Logits(out.hidden_states[-1], head.weight)


#: What the student gives to the loss.
FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "output": lambda model, batch: model(**batch.student_inputs),
    "hidden": _hidden,
}


def _whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if is_shard(value) else value).clone()


def loop_of(rank: int, values: dict[str, Any], stop_at: int | None, dtype: str) -> Any:
    """`train`; process 1 alone is asked to stop in step `stop_at`."""
    real, calls = running.update, []

    def update(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == stop_at and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    running.update = update
    result = train(Config(**values), models=killable.models(dtype))
    evaluation = result.after and [result.after.nats, result.after.nbytes, result.after.responses, result.after.length]
    return [len(result.metrics), result.interrupted, evaluation]


def refuse(rank: int, values: dict[str, Any]) -> str:
    """The error of a run that cannot be."""
    try:
        train(Config(**values), models=killable.models())
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return ""

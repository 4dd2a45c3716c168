"""Where a run is, on disk: whole whatever happens while it is written, and read back to the bit.

A checkpoint is a folder `step-00000050` of four files:

- `state.safetensors`: the weights as the optimizer has them (float32, also where the model computes in less), buffers,
  the optimizer's moments, every rank's random generators, and its share of the batch that is sampled already
  (`Config.overlap`);
- `state.json`: the step, the position in the prompts, the learning rate's schedule, the config, the evaluation before,
  digests of a sample of the weights that are not trained, and what a served teacher says of a known text;
- `metrics.jsonl`: every step's line so far;
- `manifest.json`: sizes and SHA-256 of the others.

It is written under another name, the manifest last, every file and then the folder flushed to the disk, and only then
given its name. What is not whole is never taken for a checkpoint, and what was there before is deleted afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.models import one_line, own_parameter, write_back
from xtokmap.teachers.client import SAME, nats_apart
from xtokmap.teachers.local import LocalTeacher
from xtokmap.teachers.remote import ServerTeacher
from xtokmap.train.config import Config
from xtokmap.train.evaluation import Evaluation
from xtokmap.train.support.distributed import is_shard

if TYPE_CHECKING:
    from xtokmap.train.run import Run

#: Fields of `Config` that a run may change when it resumes. Of `prompts` the content counts, not the file's name.
FREE = (
    *("steps", "output", "prompts", "micro_batch", "device", "save_every", "keep_checkpoints", "resume"),
    *("report_every", "track", "teacher_timeout", "teacher_concurrency", "teacher_retries", "teacher_failures"),
    *("teacher_patience", "sampler_url", "sampler_folder", "sampler_concurrency", "sampler_timeout"),
    "teacher_states_url",
)

_FORMAT = 1
_FILES = ("state.safetensors", "state.json", "metrics.jsonl")
_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".writing-"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(XTokMapError):
    """A checkpoint, or another file of a run, that cannot be written; or one that cannot be used."""


@contextmanager
def writing(path: Path, advice: str = "") -> Iterator[None]:
    """Names the file, and what to do, where the disk is full or something else keeps it from being written.

    Raises:
        CheckpointError: in place of an OSError, and of a SafetensorError.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or one_line(error)
        raise CheckpointError(f"{path}: cannot be written: {why}{advice and '; '}{advice}") from error


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by step; not whether they can be used."""
    if not folder.is_dir():
        return []
    named = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


# ---- writing ---------------------------------------------------------------------------------------------------------


def save(run: Run, folder: Path, *, keep: int = 2) -> Path:
    """Writes where a run is, and deletes all but the last `keep` checkpoints. Every rank has to call it.

    Args:
        run: between two steps.
        folder: of its checkpoints, on a disk with room for `keep + 1`.
        keep: at least 1.

    Returns:
        The checkpoint. One that this run has just written or read is not written again.

    Raises:
        CheckpointError: a full disk, or another reason why it cannot be written; those before it are as they were.
    """
    path = folder / f"step-{run.done:08d}"
    if run.saved == run.done:
        return path
    own = [(f"random.{name}", state) for name, state in _generators(run.roller.device).items()]
    own += [(f"ahead.{name}", value) for name, value in _ahead(run).items()]
    tensors = _tensors(run)
    for rank, parts in enumerate(run.processes.gather(own)):
        tensors.update((f"{name}.{rank}", value) for name, value in parts)
    untrained = _digests(run)
    problem = None
    try:
        if run.processes.first:
            _write(run, path, tensors, untrained, keep)
        else:
            for _ in _whole(tensors):  # the first process asks for every tensor's parts
                pass
    except CheckpointError as error:
        problem = str(error)
    problems = [text for text in run.processes.gather(problem) if text is not None]
    if problems:
        raise CheckpointError(problems[0])
    run.saved = run.done
    return path


def _write(run: Run, path: Path, tensors: Mapping[str, Tensor], untrained: _Digests, keep: int) -> None:
    folder, temporary = path.parent, path.parent / f"{_TEMPORARY}{path.name}"
    before = [other for other in found(folder) if other != path]
    advice = f"{before[-1]} is the last whole one, make room and pass resume" if before else "make room"
    parts = _whole(tensors)
    with writing(path, advice):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(left)
            temporary.mkdir()
            state = {
                "step": run.done,
                "drawn": run.order.drawn,
                "processes": run.processes.count,
                "prompts": _digest_of_prompts(run),
                "untrained": untrained,
                "served": _served(run),
                "schedule": {"last_epoch": run.schedule.last_epoch, "rates": run.schedule.get_last_lr()},
                "config": asdict(run.config),
                "before": run.before and asdict(run.before),
            }
            lines = "".join(json.dumps(line) + "\n" for line in run.history)
            files = {
                "state.safetensors": _write_tensors(temporary / "state.safetensors", tensors, parts),
                "state.json": _write_text(temporary / "state.json", json.dumps(state, indent=1) + "\n"),
                "metrics.jsonl": _write_text(temporary / "metrics.jsonl", lines),
            }
            manifest = {"format": _FORMAT, "files": files}
            _write_text(temporary / "manifest.json", json.dumps(manifest, indent=1) + "\n")
            _flush_folder(temporary)
            if path.exists():  # one that could not be used, or the run would have resumed from it
                shutil.rmtree(path)
            os.rename(temporary, path)
            _flush_folder(folder)
        except OSError:
            for _ in parts:  # the other processes take part in every tensor
                pass
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        older = [other for other in found(folder) if other.name < path.name]
        newer = [other for other in found(folder) if other.name > path.name]  # passed over when this run resumed
        for other in [*older[: max(0, len(older) + 1 - keep)], *newer]:
            # Away from its name first, so that half of it is never taken for a damaged checkpoint.
            gone = folder / f"{_TEMPORARY}{other.name}"
            os.rename(other, gone)
            shutil.rmtree(gone)


def _tensors(run: Run) -> dict[str, Tensor]:
    """Everything that is a tensor: weights and moments under the weights' names, and buffers."""
    tensors: dict[str, Tensor] = {}
    for name, p in _parameters(run):
        tensors[f"weight.{name}"] = p.detach()
        for key, value in run.optimizer.state.get(p, {}).items():
            tensors[f"{key}.{name}"] = value
    tensors.update((f"buffer.{name}", value) for name, value in _buffers(run))
    return tensors


def _parameters(run: Run) -> list[tuple[str, Any]]:
    """What is optimized, by its name in the student."""
    names = {id(p): name for name, p in run.roller.student.named_parameters()}
    optimized = [p for group in run.optimizer.param_groups for p in group["params"]]
    return [(names[id(own_parameter(p))], p) for p in optimized]


def _buffers(run: Run) -> list[tuple[str, Tensor]]:
    student = run.roller.student
    kept = student.state_dict(keep_vars=True)
    return [(name, value) for name, value in student.named_buffers() if name in kept]


def _generators(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def _ahead(run: Run) -> dict[str, Tensor]:
    """What was sampled of the next batch: it cannot be sampled again, as the policy has changed."""
    if run.ahead is None:
        return {}
    rollouts = run.ahead.rollouts
    assert rollouts.old_logprobs is not None
    return {
        "ids": torch.tensor([i for row in rollouts.batch.student_ids for i in row], dtype=torch.long),
        "lengths": torch.tensor(rollouts.lengths),
        "sampled": torch.tensor(rollouts.sampled),
        "completed": torch.tensor(rollouts.completed),
        "version": torch.tensor(rollouts.version),
        "logprobs": rollouts.old_logprobs.cpu(),
    }


def _whole(tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Each tensor on the CPU, one at a time, its shards gathered where it is sharded."""
    for tensor in tensors.values():
        whole = tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]
        yield whole.detach().cpu().contiguous()


class _Hashing:
    """A file that is hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "xb")  # noqa: SIM115
        self.sha256, self.size = hashlib.sha256(), 0

    def write(self, data: Any) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)

    def finish(self) -> dict[str, Any]:
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"bytes": self.size, "sha256": self.sha256.hexdigest()}


@contextmanager
def _hashing(path: Path) -> Iterator[_Hashing]:
    out = _Hashing(path)
    try:
        yield out
    finally:
        out.file.close()


def _write_text(path: Path, text: str) -> dict[str, Any]:
    with _hashing(path) as out:
        out.write(text.encode())
        return out.finish()


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], parts: Iterator[Tensor]) -> dict[str, Any]:
    """A safetensors file, tensor after tensor, so that no second copy of the model is in memory."""
    header, at = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with _hashing(path) as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for part in parts:
            out.write(part.reshape(-1).view(torch.uint8).numpy().data)
        return out.finish()


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest_of_prompts(run: Run) -> str:
    return hashlib.sha256(json.dumps([prompt.as_json() for prompt in run.prompts]).encode()).hexdigest()


#: Of weights that no checkpoint has: whose they are -> dtype of the values that were hashed -> SHA-256.
_Digests: TypeAlias = "dict[str, dict[str, str]]"

#: Values of every parameter that are looked at: enough to tell a training step, few enough to cost nothing.
_LOOKED_AT = 1024


def _digests(run: Run) -> _Digests:
    """Of a sample of the weights that are not trained: a path may have others by the time that a run resumes.

    Every process has to call it.
    """
    if run.untrained is None:
        teacher = run.roller.teacher
        frozen = {name: p for name, p in run.roller.student.named_parameters() if not p.requires_grad}
        run.untrained = {"student": _digest_of_sample(frozen)}
        if isinstance(teacher, LocalTeacher):  # of a served one there are no weights to look at: `_served`
            run.untrained["teacher"] = _digest_of_sample(dict(teacher.model.named_parameters()))
    return run.untrained


@torch.no_grad()
def _digest_of_sample(parameters: Mapping[str, Any]) -> dict[str, str]:
    """By the parameters' own dtype, and rounded to bfloat16: which a run on another device may have them in."""
    own, rounded = hashlib.sha256(), hashlib.sha256()
    kinds = sorted({str(p.dtype) for p in parameters.values()})
    for name, p in sorted(parameters.items()):
        flat = (p.full_tensor() if is_shard(p) else p).detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // _LOOKED_AT)].cpu().contiguous()
        for digest, part in ((own, values), (rounded, values.to(torch.bfloat16))):
            digest.update(f"{name} {list(p.shape)}\n".encode())
            digest.update(part.view(torch.uint8).numpy().tobytes())
    return {"torch.bfloat16": rounded.hexdigest(), " ".join(kinds): own.hexdigest()}


def _served(run: Run) -> dict[str, list[float]]:
    """What each served teacher says of a known text."""
    others = run.roller.others.teachers if run.roller.others else {}
    teachers = {"teacher": run.roller.teacher, **{name: one for name, (one, _) in others.items()}}
    return {name: one.known for name, one in teachers.items() if isinstance(one, ServerTeacher) and one.known}


# ---- reading ---------------------------------------------------------------------------------------------------------


def restore(run: Run, folder: Path) -> bool:
    """Puts a run where the newest whole checkpoint of a folder was written; every rank has to call it.

    A checkpoint that is damaged or was never finished is named in a warning, and the one before it is taken.

    Args:
        run: new, of the same config; fields in `FREE` may differ.
        folder: of its checkpoints.

    Returns:
        Whether there was one.

    Raises:
        CheckpointError: none can be used where there are some, or it is of another run: what differs, by name.
    """
    chosen: Path | None = None
    problem = None
    if run.processes.first:
        try:
            chosen = _newest(folder)
        except CheckpointError as error:
            problem = str(error)
    chosen, problem = run.processes.gather((chosen, problem))[0]
    if problem is not None:
        raise CheckpointError(problem)
    if chosen is None:
        return False
    state = json.loads((chosen / "state.json").read_text(encoding="utf-8"))
    _check_same(chosen, state, run)
    ahead = _load_tensors(run, chosen)
    run.done = run.saved = state["step"]
    run.order.skip(state["drawn"] - (run.config.batch_size if ahead else 0))
    if ahead:
        rows = torch.split(ahead["ids"], ahead["lengths"].tolist())
        answers, flags, sampled = [row.tolist() for row in rows], ahead["completed"].tolist(), ahead["sampled"].tolist()
        run.take_up(answers, flags, ahead["logprobs"], sampled, int(ahead["version"]))
    run.schedule.last_epoch = state["schedule"]["last_epoch"]
    run.schedule._last_lr = state["schedule"]["rates"]
    for group, rate in zip(run.optimizer.param_groups, state["schedule"]["rates"], strict=True):
        group["lr"] = rate
    lines = (chosen / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    run.history = [json.loads(line) for line in lines]
    run.before = state["before"] and Evaluation(**state["before"])
    return True


def _newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; None where there is none at all."""
    paths = found(folder)
    for left in sorted(folder.glob(f"{_TEMPORARY}*")):
        warnings.warn(f"{left} is left out: the run ended while it was written or deleted", stacklevel=5)
    for path in reversed(paths):
        problem = _problem(path)
        if problem is None:
            return path
        warnings.warn(f"{path} is left out: {problem}", stacklevel=5)
    if paths:
        raise CheckpointError(
            f"{folder}: none of the {len(paths)} checkpoints is whole; delete the folder to start from the beginning"
        )
    return None


def _problem(path: Path) -> str | None:
    """Why a checkpoint cannot be used; None where it can."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            return f"format {manifest['format']!r} is not {_FORMAT}, this version's"
        files = {name: (manifest["files"][name]["bytes"], manifest["files"][name]["sha256"]) for name in _FILES}
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        return f"manifest.json is damaged: {one_line(error)}"
    for name, (size, sha256) in files.items():
        try:
            found_size = (path / name).stat().st_size
            if found_size != size:
                return f"{name} has {found_size} bytes instead of {size}"
            with open(path / name, "rb") as f:
                digest = hashlib.sha256()
                while block := f.read(2**20):
                    digest.update(block)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
        if digest.hexdigest() != sha256:
            return f"{name} is damaged: its SHA-256 is another"
    return None


def _check_same(path: Path, state: dict[str, Any], run: Run) -> None:
    now, then = asdict(run.config), state["config"]
    defaults = {f.name: f.default for f in fields(Config)}
    for name in dict.fromkeys([*now, *then]):
        here = now.get(name, defaults.get(name))
        there = then.get(name, defaults.get(name))
        moved = name == "teacher_url" and bool(here) == bool(there)  # a server may be somewhere else by now
        if name not in FREE and not moved and here != there:
            raise CheckpointError(
                f"{path} is of a run with {name}={there!r}, not {here!r}: resume with that, or use another output"
            )
    if state["prompts"] != _digest_of_prompts(run):
        raise CheckpointError(f"{path} is of a run with other prompts than those of {run.config.prompts}")
    then_untrained = state.get("untrained", {})  # older versions looked at none
    for side, digests in _digests(run).items():
        there = then_untrained.get(side, {})
        if any(there[kind] != digest for kind, digest in digests.items() if kind in there):
            what = "a run with another teacher" if side == "teacher" else "another student"
            raise CheckpointError(
                f"{path} is of {what}: what {side}={getattr(run.config, side)!r} has now are other weights; put those "
                "back that the run began with, or use another output"
            )
    then_served = state.get("served", {})
    for name, here in run.processes.gather(_served(run))[0].items():
        if name in then_served and not (apart := nats_apart(then_served[name], here)) <= SAME:
            raise CheckpointError(
                f"{path} is of a run with another {name}: what is served as it now has logprobs of a known text that "
                f"are {apart:.2g} nats from those of then, in the mean; serve the one that the run began with, or use "
                "another output"
            )
    if state["processes"] != run.processes.count:
        raise CheckpointError(
            f"{path} is of a run with {state['processes']} processes, not {run.processes.count}: start as many"
        )
    if state["step"] > run.config.steps:
        raise CheckpointError(f"{path} is at step {state['step']} already, and steps={run.config.steps}")


@torch.no_grad()
def _load_tensors(run: Run, path: Path) -> dict[str, Tensor]:
    """Puts everything where it belongs, but what this rank had sampled of the next batch, which is returned."""
    from safetensors import safe_open

    ahead = {}

    device = run.roller.device
    with safe_open(path / "state.safetensors", framework="pt") as file:
        names = set(file.keys())
        parameters, buffers = _parameters(run), _buffers(run)
        wanted = {f"weight.{name}": p for name, p in parameters} | {f"buffer.{name}": b for name, b in buffers}
        there = {name for name in names if name.startswith(("weight.", "buffer."))}
        for name in sorted(there ^ set(wanted)):
            raise CheckpointError(f"{path}: {name} is {'in' if name in there else 'not in'} it: of another student")
        for name, tensor in wanted.items():
            value = file.get_tensor(name)
            if value.shape != tensor.shape:
                raise CheckpointError(f"{path}: {name} is {list(value.shape)}, not {list(tensor.shape)}")
            tensor.copy_(_like(tensor, value))
        by_name = dict(parameters)
        for full in sorted(names - there):
            kind, name = full.split(".", 1)
            if kind in ("random", "ahead"):
                what, rank = name.split(".")
                if int(rank) == run.processes.rank and kind == "random":
                    _set_generator(what, device, file.get_tensor(full))
                elif int(rank) == run.processes.rank:
                    ahead[what] = file.get_tensor(full)
                continue
            value, p = file.get_tensor(full), by_name[name]
            run.optimizer.state[p][kind] = _like(p, value) if value.shape == p.shape and value.ndim else value
    write_back(run.optimizer)
    return ahead


def _like(tensor: Any, value: Tensor) -> Tensor:
    """A whole tensor on another's device, sharded where the other is."""
    value = value.to(tensor.device)
    if not is_shard(tensor):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def _set_generator(where: str, device: torch.device, state: Tensor) -> None:
    if where == "cpu":
        torch.set_rng_state(state)
    elif where == "cuda" and device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif where == "mps" and device.type == "mps":
        torch.mps.set_rng_state(state)

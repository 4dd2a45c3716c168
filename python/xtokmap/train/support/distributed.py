"""The processes of a run, as `accelerate launch` or `torchrun` start them: who does what, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.models import one_line

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """One of `count` processes with the same weights. Every method but `share` has to be called by all of them.

    Attributes:
        rank: this one's number, from 0; rank 0 writes what a run leaves.
        count: the world size.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """This rank's share of a batch: consecutive rows, as even as possible; the first ranks take one more."""
        size, more = divmod(len(rows), self.count)
        start = self.rank * size + min(self.rank, more)
        return rows[start : start + size + (self.rank < more)]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, everywhere; in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """What each rank has, everywhere, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def any(self, value: bool) -> bool:
        """Whether it is so on any rank."""
        return any(self.gather(value))

    def seed(self, seed: int) -> int:
        """A seed for each rank, rank 0's as it is; 64 bits."""
        mixed = (seed + self.rank * 0x9E3779B97F4A7C15) % 2**64
        return mixed - 2**64 if mixed >= 2**63 else mixed


@contextmanager
def launched(device: str = "auto") -> Iterator[tuple[Processes, str]]:
    """This process among those that a launcher started, by its environment (`WORLD_SIZE`, `RANK`), and its device.

    Raises:
        XTokMapError: variables that contradict each other, or processes that cannot connect to each other.
    """
    values = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    count = values["WORLD_SIZE"] or "1"
    if count == "1":
        yield Processes(), device
        return
    try:
        processes = Processes(int(values["RANK"]), int(count))
        local = int(values["LOCAL_RANK"] or 0)
    except ValueError:
        raise XTokMapError(
            f"the environment says {values}: start several processes with accelerate launch or torchrun"
        ) from None
    gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if gpu:
        if local >= torch.cuda.device_count():
            gpus = torch.cuda.device_count()
            raise XTokMapError(f"local rank {local} has no GPU of its own: this machine has {gpus}")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    started = not dist.is_initialized()
    if started:
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
        except (RuntimeError, ValueError) as error:
            raise XTokMapError(f"the {count} processes cannot connect to each other: {one_line(error)}") from error
    try:
        yield processes, device if gpu else ("cpu" if device == "auto" else device)
    finally:
        if started:
            dist.destroy_process_group()


def shard(student: Any, processes: Processes, device: torch.device) -> None:
    """Shards the layers of a transformers model over the processes (FSDP2), in place.

    Each process has 1/count of every layer and of its gradients and optimizer state in float32; a layer is put together
    while it computes, in the model's own dtype. What is not a layer (embedding, last norm, output head) is whole in
    every process.

    Args:
        student: on the CPU or on the device; the layers are moved one by one.
        processes: two or more.
        device: of this process.

    Raises:
        XTokMapError: a single process, a model without a list of layers, or a PyTorch that is too old.
    """
    if processes.count == 1:
        raise XTokMapError("shard=True needs several processes: start them with accelerate launch or torchrun")
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        FSDPModule.set_force_sum_reduction_for_comms  # noqa: B018
    except (ImportError, AttributeError):
        raise XTokMapError(
            f"shard=True: torch {torch.__version__} cannot shard layers as needed here (FSDP2 with sums); install a "
            "newer one, or leave shard out"
        ) from None
    layers = _layers(student)
    mesh = init_device_mesh(device.type, (processes.count,))
    policy = MixedPrecisionPolicy(param_dtype=student.dtype, reduce_dtype=torch.float32)
    for layer in layers:
        layer.float()
        module = fully_shard(layer, mesh=mesh, mp_policy=policy)
        # Sums, as the losses are divided by the tokens of all processes.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    student.to(device)
    # Over all layers one whose own parameters are left alone, so that a layer is fetched while the one before computes.
    body = student.base_model
    fully_shard(body, mesh=mesh, ignored_params={p for p in body.parameters() if not is_shard(p)})


def _layers(student: Any) -> list[torch.nn.Module]:
    """The decoder's blocks: the longest list of modules, as transformers has it in every family."""
    lists = [module for module in student.modules() if isinstance(module, torch.nn.ModuleList)]
    longest = max(lists, key=len, default=None)
    if longest is None or len(longest) == 0:
        raise XTokMapError(f"shard=True: {type(student).__name__} has no list of layers to shard")
    return list(longest)


def _sharded_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "set_gradient_divide_factor")]


def is_shard(parameter: Tensor) -> bool:
    """Whether this process holds only a shard of it."""
    return hasattr(parameter, "placements")


def whole_weights(model: Any) -> dict[str, Tensor] | None:
    """A sharded model's weights as it was loaded, whole, on the CPU of the first process; None for another model."""
    if not is_sharded(model):
        return None
    dtype, first = model.get_input_embeddings().weight.dtype, dist.get_rank() == 0
    weights = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor().to(dtype) if is_shard(value) else value
        if first:
            weights[name] = whole.cpu()
    return weights


def is_sharded(model: Any) -> bool:
    """Whether `shard` was applied to it."""
    return bool(_sharded_layers(model))


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Every layer whole, for as many forward passes as each process likes; nothing to do where no layer is sharded."""
    layers = _sharded_layers(model)
    for layer in layers:
        layer.set_reshard_after_forward(False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.reshard()
            layer.set_reshard_after_forward(True)


@torch.no_grad()
def add_up_and_clip(parameters: Iterable[torch.nn.Parameter], largest: float, processes: Processes) -> Tensor:
    """Sums gradients over the processes and shortens the whole where it is longer than `largest`; returns its norm.

    Gradients of sharded layers are summed already, by their backward pass.
    """
    parameters = list(parameters)
    if processes.count == 1:
        return torch.nn.utils.clip_grad_norm_(parameters, largest)
    whole, shards = [], []
    for p in parameters:
        if is_shard(p):
            shards += [] if p.grad is None else [p.grad.to_local()]  # type: ignore[attr-defined]
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        processes.sum(p.grad)
        whole.append(p.grad)
    device = parameters[0].device
    squares = [torch.zeros((), device=device)] * 2
    for k, gradients in enumerate((whole, shards)):
        if gradients:
            squares[k] = torch.nn.utils.get_total_norm(gradients).to(device) ** 2
    norm = (squares[0] + processes.sum(squares[1].clone())).sqrt()
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    for gradient in (*whole, *shards):
        gradient.mul_(factor)
    return norm


class Gradients:
    """The gradients of a step, which add up over processes.

    Args:
        student: the model.
        optimizer: of its parameters.
        largest: the norm to which they are shortened.
        processes: of the run.
    """

    def __init__(self, student: Any, optimizer: torch.optim.Optimizer, largest: float, processes: Processes) -> None:
        self.student, self.largest, self.processes = student, largest, processes
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def total(self, value: Tensor) -> Tensor:
        """The sum over processes, everywhere."""
        return self.processes.sum(value)

    def totals(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same of each; all processes have the same names."""
        return {name: self.total(sums[name]) for name in sorted(sums)} if self.processes.count > 1 else sums

    def missing(self, passes: int) -> int:
        """How many passes fewer than another process this one will make.

        A sharded layer is put together by all processes at once, so that these have to be made for nothing. To be
        asked before the first pass: while passes are made the processes meet in nothing else.
        """
        return max(self.processes.gather(passes)) - passes if is_sharded(self.student) else 0

    def clip(self) -> Tensor:
        """Adds the gradients up, shortens the whole, and returns its norm before."""
        return add_up_and_clip(self.parameters, self.largest, self.processes)

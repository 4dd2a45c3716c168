"""The processes of a run, as `accelerate launch` or `torchrun` start them: who does what, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
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
        rank: this one's number, from 0; the first writes what a run leaves.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """This process' part of a batch: neighbours, as even as they go, the first ones take one more."""
        size, more = divmod(len(rows), self.count)
        start = self.rank * size + min(self.rank, more)
        return rows[start : start + size + (self.rank < more)]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, everywhere; in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """What each process has, everywhere, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def seed(self, seed: int) -> int:
        """A seed for each process, the first one's as it is; 64 bits."""
        mixed = (seed + self.rank * 0x9E3779B97F4A7C15) % 2**64
        return mixed - 2**64 if mixed >= 2**63 else mixed


@contextmanager
def launched(device: str = "auto") -> Iterator[tuple[Processes, str]]:
    """This process among those that a launcher started, by its environment (`WORLD_SIZE`, `RANK`), and its device.

    Raises:
        XTokMapError: variables that contradict each other, or processes that do not find each other.
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
            raise XTokMapError(f"process {local} of this machine has no GPU of its own: there are {gpus}")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    started = not dist.is_initialized()
    if started:
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
        except (RuntimeError, ValueError) as error:
            raise XTokMapError(f"the {count} processes do not find each other: {one_line(error)}") from error
    try:
        yield processes, device if gpu else ("cpu" if device == "auto" else device)
    finally:
        if started:
            dist.destroy_process_group()

"""What a served teacher knows: a transformers causal language model, and the one thread that asks it.

Nothing here knows of requests (`xtokmap.teachers.answers`) or sockets (`xtokmap.teachers.server`).
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.models import one_line
from xtokmap.torch.completions import completion_rows
from xtokmap.torch.logits import Logits

#: Float32 values of one slice of logits, as everywhere: 64 MiB.
_SLICE = 2**24


@dataclass(frozen=True)
class Limits:
    """What the server takes.

    Attributes:
        max_batch: rows in one forward pass.
        max_queue: rows that wait; more are refused with 429, a request that alone has more with 413.
        max_length: tokens of a row, the new one included; 0: as many as the model's configuration says.
        max_logprobs: likeliest tokens of a row; 0: no limit.
        max_body: bytes of a request's body; 0: what `max_queue` rows of `max_length` ids take, and 4 MiB at most.
        max_seconds: that a request may take to arrive, headers and body together, and its answer to be read.
        max_connections: at a time; one more closes the one that has kept the server waiting longest.

    Raises:
        XTokMapError: a value that cannot be.
    """

    max_batch: int = 8
    max_queue: int = 1024
    max_length: int = 0
    max_logprobs: int = 0
    max_body: int = 0
    max_seconds: float = 60.0
    max_connections: int = 256

    def __post_init__(self) -> None:
        least = {"max_batch": 1, "max_queue": 1, "max_length": 0, "max_logprobs": 0, "max_body": 0}
        for name, low in {**least, "max_connections": 1}.items():
            if getattr(self, name) < low:
                raise XTokMapError(f"{name}={getattr(self, name)}: must be at least {low}")
        if not 0 < self.max_seconds < math.inf:
            raise XTokMapError(f"max_seconds={self.max_seconds}: must be above 0 and finite")


#: What a request wants of its row's logits `[n]`, of which row i predicts token i + 1, and of its n ids.
Reading: TypeAlias = Callable[[Logits, list[int]], Any]


@dataclass(frozen=True, eq=False)
class _Job:
    ids: list[int]
    read: Reading
    done: Future[Any] = field(default_factory=Future)


class RefusedError(Exception):
    """A request that the server does not take, with the HTTP status that says so."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}


class Scorer:
    """The model, and the one thread that asks it; rows that wait are taken together.

    Args:
        model: a transformers causal language model.
        limits: what is taken.
    """

    def __init__(self, model: Any, limits: Limits | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.limits = limits or Limits()
        config = model.config.get_text_config()
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        longest = getattr(config, "max_position_embeddings", None)
        self.max_length: int = self.limits.max_length or longest or 2**31
        self.batches = 0
        self._waiting: deque[_Job] = deque()
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[list[int]], read: Reading) -> list[Future[Any]]:
        """Puts rows, already checked, among those that wait: all of them or none.

        Raises:
            RefusedError: more rows than may ever wait (413) or than may wait now (429), or the end has come (503).
        """
        jobs, most = [_Job(ids, read) for ids in rows], self.limits.max_queue
        if len(jobs) > most:
            raise RefusedError(413, f"{len(jobs)} rows; this server takes {most} of a request")
        with self._changed:
            if self._closing:
                raise RefusedError(503, "this server is about to stop")
            if len(self._waiting) + len(jobs) > most:
                said = f"{len(self._waiting)} rows wait already; with these {len(jobs)} there would be more than {most}"
                raise RefusedError(429, said, {"Retry-After": "1"})
            self._waiting += jobs
            self._changed.notify()
        return [job.done for job in jobs]

    def drop(self, rows: Iterable[Future[Any]]) -> None:
        """Forgets rows that nobody waits for any more, unless the model has them or is done with them."""
        if not sum(row.cancel() for row in rows):
            return
        with self._changed:
            self._waiting = deque(job for job in self._waiting if not job.done.cancelled())

    def close(self, patience: float | None = None) -> None:
        """Ends the thread after the rows that wait, and waits for that: `patience` seconds, or as long as it takes."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(patience)

    def _work(self) -> None:
        while jobs := self._take():
            self._run(jobs)

    def _take(self) -> list[_Job]:
        """The next rows for the model, as soon as there are some; none at the end."""
        with self._changed:
            jobs: list[_Job] = []
            while not jobs and (self._waiting or not self._closing):
                self._changed.wait_for(lambda: self._waiting or self._closing)
                while self._waiting and len(jobs) < self.limits.max_batch:
                    job = self._waiting.popleft()
                    if job.done.set_running_or_notify_cancel():
                        jobs.append(job)
            return jobs

    def _run(self, jobs: Sequence[_Job]) -> None:
        self.batches += 1
        try:
            rows = self._pass([job.ids for job in jobs])
        except Exception as error:  # out of memory, a model's own check: these requests fail, the server goes on
            if len(jobs) == 1:
                jobs[0].done.set_exception(RefusedError(500, f"the model failed: {one_line(error)}"))
                return
            for job in jobs:  # one of them may be to blame
                self._run([job])
            return
        first = 0
        for job in jobs:
            own = replace(rows, rows=rows.rows[first : first + len(job.ids)])
            first += len(job.ids)
            try:
                job.done.set_result(job.read(own, job.ids))
            except RefusedError as error:
                job.done.set_exception(error)
            except Exception as error:
                job.done.set_exception(RefusedError(500, f"the model failed: {one_line(error)}"))

    @torch.no_grad()
    def _pass(self, rows: list[list[int]]) -> Logits:
        """One forward pass: flat, as many rows of logits as there are ids, of which row i predicts token i + 1."""
        # All but the first token are a completion of the first.
        return completion_rows(self.model, [row[:1] for row in rows], [row[1:] for row in rows], after=True)


@dataclass(frozen=True, eq=False)
class Scored:
    """What the model says of a row of n ids.

    Attributes:
        logprobs: of tokens 1 to n - 1 and of the new one: n values.
        ranks: of the same tokens: 1 is the likeliest.
        top_ids: the k likeliest tokens of the same places, likeliest first.
        top_logprobs: of these.
        new: the likeliest token after the row.
    """

    logprobs: list[float]
    ranks: list[int]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]
    new: int


@torch.no_grad()
def score_row(rows: Logits, ids: list[int], *, topk: int) -> Scored:
    """The logprobs of a row, a slice of its logits at a time.

    Raises:
        RefusedError: the model's logits are not numbers.
    """
    k, size = min(topk, rows.vocab_size), max(1, _SLICE // rows.vocab_size)
    targets = torch.tensor([*ids[1:], -1]).to(rows.rows.device)
    parts: list[tuple[Tensor, ...]] = []
    for a in range(0, len(ids), size):
        x = rows.slice(a, min(a + size, len(ids))).float().log_softmax(-1)
        best = x.argmax(-1)
        at = torch.where(targets[a : a + size] < 0, best, targets[a : a + size])
        own = x.gather(1, at[:, None])
        values, likeliest = x.topk(k) if k else (x[:, :0], best[:, None][:, :0])
        parts.append((own[:, 0], (x > own).sum(-1) + 1, likeliest, values, best))
    logprobs, ranks, top_ids, top_logprobs, bests = (torch.cat(column).tolist() for column in zip(*parts, strict=True))
    check_numbers(map(math.isnan, logprobs), len(ids))
    return Scored(logprobs, ranks, top_ids, top_logprobs, bests[-1])


def check_numbers(broken: Iterable[bool], n: int) -> None:
    """Raises where one of a row's places has no numbers."""
    if (at := next((i for i, bad in enumerate(broken) if bad), None)) is not None:
        raise RefusedError(500, f"the model failed: its logprobs after token {at} of {n} are NaN")

"""One aligner in many threads and processes at once, each answer compared: a program for processes that may hang.

`python -m together threads 8 1.0` prints how often each call was made, or fails.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from xtokmap import Aligner

#: Seconds after which a process that should be done hangs.
HANGS = 60
TEXTS = [
    "the quick brown fox jumps over the lazy dog and runs away, the end",
    "def add(a, b):\n    return a + b  # 1234567890 + 42 = ?\n",
    "naïve café, schöne Grüße, 你好 世界 and 💡💡 more",
]


@cache
def tokenizer(size: int) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def aligner() -> Aligner:
    return Aligner(tokenizer(310), tokenizer(290))


@cache
def rows() -> tuple[list[list[int]], list[list[int]]]:
    """Enough for several threads, with some rows that differ."""
    texts = [" ".join(TEXTS[(k + j) % 3] for j in range(4)) for k in range(96)]
    student = [tokenizer(310).encode(text).ids for text in texts]
    teacher = [
        tokenizer(290).encode(text.replace("dog", "god") if k % 5 == 0 else text).ids for k, text in enumerate(texts)
    ]
    return student, teacher


def arrays(made: Any, names: str) -> list[list[int]]:
    return [getattr(made, name).tolist() for name in names.split()]


def align(al: Aligner) -> Any:
    student, teacher = rows()
    return [arrays(al.align(student[k], teacher[k]), "student_ptr teacher_chunk teacher_pos kind") for k in range(6)]


def align_batch(al: Aligner, threads: int | None = None) -> Any:
    batch = al.align_batch(*rows(), threads=threads)
    return arrays(batch, "student_ptr teacher_ptr kind student_chunk teacher_chunk teacher_end teacher_pos teacher_off")


def retokenize(al: Aligner) -> Any:
    ids, batch = al.retokenize(rows()[0])
    return [row.tolist() for row in ids], arrays(batch, "student_chunk teacher_chunk chunk_cu")


def cover_queries(al: Aligner) -> Any:
    queries = al.cover_queries(al.align_batch(*rows()))
    sets = queries.sets
    return arrays(queries, "indptr row set base flags"), [part.tolist() for part in sets]


def map_spans(al: Aligner) -> Any:
    one = al.align(rows()[0][1], rows()[1][1])
    at = np.arange(len(one.student_chunk) - 3)
    return one.map_spans(np.stack([at, at + 3], 1)).tolist()


CALLS: dict[str, Callable[[Aligner], Any]] = {
    "align": align,
    "align_batch": align_batch,
    "two threads": lambda al: align_batch(al, 2),
    "retokenize": retokenize,
    "cover_queries": cover_queries,
    "map_spans": map_spans,
}


@cache
def answers() -> dict[str, Any]:
    """What every call gives in one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork that finds it used says so
    al = aligner()
    got = {name: call(al) for name, call in CALLS.items() if name != "two threads"}
    return {**got, "two threads": align_batch(al, 1)}


def check(al: Aligner, names: Any = tuple(CALLS)) -> None:
    for name in names:
        assert CALLS[name](al) == answers()[name], name


class Hammer:
    """Threads that call without end."""

    def __init__(self, al: Aligner, threads: int, *, seed: int = 0) -> None:
        answers()
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(al, seed + k)) for k in range(threads)]

    def _work(self, al: Aligner, seed: int) -> None:
        rng = random.Random(seed)
        try:
            while not self._stop.is_set():
                name = rng.choice(list(CALLS))
                check(al, [name])
                self.counts[name] += 1
        except BaseException as error:
            self.failures.append(repr(error))
            raise

    def __enter__(self) -> Hammer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def forked(work: Callable[[], None]) -> int:
    """Runs `work` in a fork, and gives the process; see `joined`."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            faulthandler.register(signal.SIGALRM, chain=True)  # where it hangs, and then its end
            signal.alarm(HANGS)
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def joined(pids: list[int]) -> None:
    for pid in pids:
        status = os.waitpid(pid, 0)[1]
        assert status == 0, f"a fork ended with {status}" + (", it hung" if status == signal.SIGALRM else "")


def threads(count: str, seconds: str) -> Counter[str]:
    al = aligner()
    with Hammer(al, int(count)) as hammer:
        time.sleep(float(seconds))
    assert not hammer.failures, hammer.failures
    return hammer.counts


def fork_after_use() -> int:
    al = aligner()
    check(al)
    joined([forked(lambda: check(al)), forked(lambda: check(al))])
    check(al)
    return 2


def fork_of_forks() -> int:
    """More generations than there are places for their locks."""
    al = aligner()

    def generation(left: int) -> None:
        with Hammer(al, 2):
            check(al)
            if left:
                joined([forked(lambda: generation(left - 1))])

    generation(5)
    return 6


def fork_during_use(forks: str) -> int:
    al = aligner()
    with Hammer(al, 4) as hammer:
        for k in range(int(forks)):
            if k % 10 == 0:
                check(aligner(), ["align"])  # with an aligner that is just being used for the first time
            joined([forked(lambda: check(al))])
    assert not hammer.failures, hammer.failures
    return int(forks)


def fork_during_first_use(forks: str) -> int:
    """While other threads are at what is worked out only once.

    Imports are made before: a fork in the middle of one, by another thread, is Python's own to lose.
    """
    aligner().retokenize([[1, 2]])
    for _ in range(int(forks)):
        al = aligner()
        workers = [threading.Thread(target=check, args=(al, ["cover_queries"])) for _ in range(3)]
        for worker in workers:
            worker.start()
        time.sleep(random.random() * 0.02)
        joined([forked(lambda al=al: check(al, ["cover_queries", "retokenize"]))])  # type: ignore[misc]
        for worker in workers:
            worker.join()
    return int(forks)


_OF_ALL: list[Aligner] = []


def work_of_a_pool(_: int) -> bool:
    """In a worker of multiprocessing: the aligner of the parent, where there is one."""
    if not _OF_ALL:
        _OF_ALL.append(aligner())
    check(_OF_ALL[0])
    return True


def pools(method: str) -> int:
    answers()
    _OF_ALL.append(aligner())
    check(_OF_ALL[0])
    with multiprocessing.get_context(method).Pool(3) as pool:
        return sum(pool.map(work_of_a_pool, range(6), chunksize=1))


class Collate:
    def __init__(self) -> None:
        self.al = aligner()
        answers()

    def __call__(self, _: list[int]) -> Any:
        import torch

        check(self.al)
        return torch.tensor(self.al.align_batch(*rows()).student_chunk)


def data_loader() -> int:
    import torch

    collate = Collate()
    check(collate.al)
    loader = torch.utils.data.DataLoader(list(range(16)), 2, num_workers=4, collate_fn=collate, timeout=HANGS)
    batches = [batch.tolist() for batch in loader]
    assert batches == [answers()["align_batch"][3]] * 8
    return len(batches)


def threads_of_a_fork() -> int:
    """As many threads as the parent was told, and no more."""
    al = aligner()
    align_batch(al)
    before = len(os.listdir("/proc/self/task"))

    def work() -> None:
        align_batch(al)
        align_batch(al)
        assert len(os.listdir("/proc/self/task")) == 1 + int(os.environ["RAYON_NUM_THREADS"])

    joined([forked(work)])
    assert len(os.listdir("/proc/self/task")) == before
    return before


def interrupted() -> int:
    """An interrupt in the middle of a batch, and the next batch."""
    al = aligner()
    answers()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started this in the background
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        while True:
            align_batch(al)
    except KeyboardInterrupt:
        check(al)
    return 1


def main() -> None:
    name, *arguments = sys.argv[1:]
    found = globals()[name](*arguments)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

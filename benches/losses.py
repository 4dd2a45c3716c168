"""CPU time and peak memory of every loss of whole distributions, sliced and all rows at once: python benches/losses.py

Every measurement runs in a process of its own: one forward and backward pass of a loss with the output heads of both
sides inside, on one text. "At once" is the same with one slice of all rows, worked on as a whole. The maps between the
vocabularies and the queries are random: how much work there is depends on their sizes only. Memory is the growth of the
process's peak over its size before the loss, inputs and the gradients' parameters being there already.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

import xtokmap
from xtokmap import losses
from xtokmap.alignment import InteriorQueries
from xtokmap.losses import bytes as prefixes
from xtokmap.losses import terms
from xtokmap.torch import logits
from xtokmap.torch.index import ChunkIndex, VocabTensors
from xtokmap.torch.logits import Logits, TopK, token_logprobs_from_hidden

RESULTS = Path(__file__).parent / "results"
#: (student, teacher) vocabularies: SmolLM2 and Qwen 3, Qwen 3 and Gemma 3.
PAIRS = ((49_152, 151_936), (151_936, 262_144))
HIDDEN = 256
LOSSES = ("strict_kl", "strict_kl, all", "strict_kl, top-k teacher", "byte_kl", "completion", "uld_hybrid", "alm")


def random_map(student: int, teacher: int, rng: np.random.Generator) -> VocabTensors:
    """Two thirds of the student's tokens are the teacher's as well; ranges are a few tokens long."""
    shared = 2 * student // 3
    ours, theirs = rng.permutation(student)[:shared], rng.permutation(teacher)[:shared]
    to_teacher, to_student = np.full(student, -1), np.full(teacher, -1)
    to_teacher[ours], to_student[theirs] = theirs, ours
    prefix = np.where(to_student >= 0, to_student, rng.integers(0, student, teacher))

    def ranges(size: int) -> np.ndarray:
        lo = rng.integers(0, size, size)
        return np.stack([lo, np.minimum(size, lo + rng.geometric(0.1, size))], 1)

    return VocabTensors.from_map(
        SimpleNamespace(
            teacher_to_student=to_student,
            student_to_teacher=to_teacher,
            prefix=prefix,
            canonical=prefix,
            student_order=rng.permutation(student),
            teacher_order=rng.permutation(teacher),
            student_range=ranges(student),
            teacher_range=ranges(teacher),
            group=np.where(to_student >= 0, -1, rng.integers(0, teacher // 8, teacher)),
            student_stops=(student - 1,),
            teacher_stops=(teacher - 1,),
        )
    )


def random_text(tokens: int, rng: np.random.Generator) -> tuple[ChunkIndex, Tensor, Tensor]:
    """Half of the student's tokens the teacher's as well, a third inside one of the teacher's, a sixth across two."""
    student, teacher = [b"x", b"y", b"z", b"ab"], [b"x", b"yz", b"a", b"b"]
    pieces = [([0], [0]), ([1, 2], [1]), ([3], [2, 3])]
    ours: list[int] = []
    theirs: list[int] = []
    while len(ours) < tokens:
        s, t = pieces[rng.choice(3, p=[0.6, 0.2, 0.2])]
        ours, theirs = ours + s, theirs + t
    tables = [xtokmap.ByteTable.from_bytes(v) for v in (student, teacher)]
    index = ChunkIndex.from_alignment(xtokmap.Aligner(*tables).align_batch([ours], [theirs]))
    return index, torch.tensor([ours]), torch.tensor([theirs])


def measure(loss: str, student: int, teacher: int, tokens: int, sliced: bool) -> dict[str, float]:
    """Seconds and MiB of one pass."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    index, student_ids, teacher_ids = random_text(tokens, rng)
    maps = random_map(student, teacher, rng)
    heads = [(0.1 * torch.randn(v, HIDDEN)).requires_grad_(v == student) for v in (student, teacher)]
    hidden = [torch.randn(*ids.shape, HIDDEN) for ids in (student_ids, teacher_ids)]
    ours, theirs = Logits(hidden[0].requires_grad_(), heads[0]), Logits(hidden[1], heads[1])
    for parameter in (ours.rows, heads[0]):
        parameter.grad = torch.zeros_like(parameter)  # the gradients are not the loss's memory
    with torch.no_grad():
        teacher_logprobs = token_logprobs_from_hidden(hidden[1], heads[1], teacher_ids)

    inside = (index.teacher_off > 0).reshape(-1).nonzero()[:, 0].numpy()
    behind = inside + 1
    behind = behind[behind < index.student_chunk.numel()]
    rows = index.teacher_rows(index.teacher_pos).reshape(-1).numpy()
    each = 500
    queries = InteriorQueries(
        inside,
        rows[inside],
        np.arange(len(inside) + 1) * each,
        rng.integers(0, teacher, len(inside) * each).astype(np.int32),
        rng.integers(0, student, len(inside) * each).astype(np.int32),
        np.stack([np.zeros_like(inside), np.full_like(inside, each)], 1),
    )
    lo = rng.integers(0, student - 10, len(behind) * 10)
    completions = prefixes.CompletionQueries(
        behind,
        rows[behind - 1],
        np.arange(len(behind) + 1) * 10,
        rng.integers(0, maps.num_groups, len(behind) * 10),
        np.stack([lo, lo + 10], 1),
    )
    top = TopK(torch.randint(teacher, (*teacher_ids.shape, 64)), torch.full((*teacher_ids.shape, 64), -5.0))

    def own() -> Tensor:
        return token_logprobs_from_hidden(ours.rows, heads[0], student_ids)

    spelling = losses.Spelling(student_ids, teacher_ids, teacher_logprobs)
    work = {
        "strict_kl": lambda: losses.strict_kl(ours, theirs, index, maps),
        "strict_kl, all": lambda: losses.strict_kl(ours, theirs, index, maps, k=None),
        "strict_kl, top-k teacher": lambda: losses.strict_kl(ours, top, index, maps),
        "byte_kl": lambda: losses.byte_kl(ours, theirs, index, maps, queries, spelling=spelling),
        "completion": lambda: losses.completion(ours, theirs, index, maps, completions),
        "uld_hybrid": lambda: losses.uld_hybrid(
            ours, theirs, index, maps, student_logprobs=own(), teacher_logprobs=teacher_logprobs
        ),
        "alm": lambda: losses.alm(own(), teacher_logprobs, index),
    }[loss]
    if not sliced:
        logits._SLICE = terms._SLICE = logits._BLOCK = 2**60
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    start = time.process_time()
    result = work()
    result.loss.backward()
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "mib": (peak - before) / 2**20, "tokens": float(result.figures["tokens"])}


def in_a_process(loss: str, student: int, teacher: int, tokens: int, sliced: bool) -> dict[str, float]:
    arguments = [loss, str(student), str(teacher), str(tokens), str(int(sliced))]
    done = subprocess.run(
        [sys.executable, __file__, "--one", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def table(tokens: int, few: int) -> str:
    lines = [
        f"| loss | student x teacher vocabulary | scored | {tokens} tokens | {few} tokens | {few} tokens at once |",
        "|---|---|---|---|---|---|",
    ]
    for student, teacher in PAIRS:
        for loss in LOSSES:
            runs = [in_a_process(loss, student, teacher, n, sliced) for n, sliced in ((tokens, True), (few, True))]
            if loss != "alm":  # it never sees a row
                runs.append(in_a_process(loss, student, teacher, few, False))
            cells = [f"{run['seconds']:.1f} s, {run['mib']:,.0f} MiB" for run in runs] + ["-"] * (3 - len(runs))
            row = [f"`{loss}`", f"{student:,} x {teacher:,}", f"{runs[0]['tokens']:.0f}", *cells]
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--few", type=int, default=512)
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        loss, *numbers = options.one
        print(json.dumps(measure(loss, *map(int, numbers[:3]), sliced=numbers[3] == "1")))
        return
    found = table(options.tokens, options.few)
    text = f"""# Losses of whole distributions

`python benches/losses.py --tokens {options.tokens} --few {options.few}`; xtokmap {xtokmap.__version__}, torch
{torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread, float32, hidden size
{HIDDEN}.

Forward and backward pass of one text, with both output heads inside: CPU seconds, and memory above the inputs and
the gradients. Slices are 64 MiB of logits, of which a block that the cache holds is worked on at a time. The last
column gives the same function all rows' logits at once, which is why it has fewer tokens: its memory grows with them.
That of slices should not: compare the first two columns. `alm` sees sampled logprobs only.

{found}
"""
    (RESULTS / "losses.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

"""Memory and time of a distillation loss on the CPU: python benches/memory.py [--limit SECONDS]

One row of logits of both models, bfloat16, forward and backward: xtokmap's policy gradient (`token_logprobs`,
`chunk_credit`, `policy_loss`), what `log_softmax` makes of the same, and TRL GOLD's `ULDLoss` on the same tensors, each
in a process of its own. Memory is the peak resident set, less what was resident with the inputs in place. Then the
index and the chunk losses of a whole batch, without logits. Writes benches/results/memory.md.

`ULDLoss` writes its groups into a tensor one by one, and the backward pass copies all of it for each: minutes for 512
tokens, more than half an hour for 2,048. What is not done after the limit is ended, and what it had taken by then is
a lower bound.
"""

from __future__ import annotations

import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import xtokmap
from compare import best, machine
from xtokmap.losses.credit import chunk_credit, policy_loss
from xtokmap.torch.index import ChunkIndex
from xtokmap.torch.logits import token_logprobs

RESULTS = Path(__file__).parent / "results"
#: Bytes for each logit of one model that the largest of the losses is known to take, with a margin.
NEED = 40


def offsets(tokens: int, seed: int) -> tuple[Any, Any]:
    """Byte spans of the tokens of two tokenizers, as many on either side; five chunks in six are one to one."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 8, tokens) * 2
    sides = []
    for side in range(2):
        joined = np.zeros(tokens, dtype=np.bool_)
        joined[6 * np.arange(tokens // 6) + 3 * side] = True  # these tokens end where the next one does
        ends = np.cumsum(sizes)
        ends[joined] -= 1
        sides.append(np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1))
    return sides[0], sides[1]


# ---- losses on logits --------------------------------------------------------------------------------------------


def inputs(tokens: int, vocab: int) -> dict[str, Any]:
    torch.manual_seed(0)
    logits = {side: torch.empty(1, tokens, vocab, dtype=torch.bfloat16) for side in ("student", "teacher")}
    for x in logits.values():
        for part in x[0].split(64):
            part.normal_(std=3)
    ids = {side: torch.randint(vocab, (1, tokens)) for side in logits}
    spans = dict(zip(logits, offsets(tokens, 0), strict=True))
    logits["student"].requires_grad_()
    return {"logits": logits, "ids": ids, "spans": spans}


def of_logprobs(given: dict[str, Any], logprobs: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    logits, ids = given["logits"], given["ids"]
    index = ChunkIndex.from_alignment(xtokmap.align_offsets(given["spans"]["student"], given["spans"]["teacher"]))
    with torch.no_grad():
        teacher = logprobs(logits["teacher"], ids["teacher"])
    student = logprobs(logits["student"], ids["student"])
    credit = chunk_credit(student, teacher, index)
    mask = torch.ones_like(ids["student"])
    return policy_loss(student, student.detach(), credit.advantages, mask, scored=credit.scored)


def whole_softmax(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, ids[..., None])[..., 0]


def of_trl(given: dict[str, Any]) -> Tensor:
    from trl.experimental.gold.gold_config import GOLDConfig
    from trl.experimental.gold.gold_trainer import ULDLoss

    config = SimpleNamespace(**{f.name: f.default for f in fields(GOLDConfig) if f.default is not MISSING})
    ids, spans = given["ids"], {side: torch.from_numpy(x)[None] for side, x in given["spans"].items()}
    labels = {side: x.clone() for side, x in ids.items()}
    return ULDLoss(config)(
        *(given["logits"][side] for side in labels),
        *(labels[side] for side in labels),
        *(ids[side] for side in labels),
        *(spans[side] for side in labels),
    )


LOSSES: dict[str, Callable[[dict[str, Any]], Tensor]] = {
    "xtokmap: token_logprobs, chunk_credit, policy_loss": lambda given: of_logprobs(given, token_logprobs),
    "the same, from log_softmax of float32 logits": lambda given: of_logprobs(given, whole_softmax),
    "TRL GOLD: ULDLoss": of_trl,
}


def resident(key: str, process: int | str = "self") -> int:
    """VmRSS or VmHWM of a process, in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def measure(name: str, tokens: int, vocab: int) -> dict[str, float]:
    """One forward and backward pass, after a small one that starts threads and imports."""
    LOSSES[name](inputs(64, 1000)).backward()
    given = inputs(tokens, vocab)
    before = resident("VmRSS")
    if resident("VmHWM") > before + 2**24:
        raise SystemExit("the inputs took more memory to make than they have; peaks would say nothing")
    print(json.dumps({"before": before}), flush=True)
    start = time.perf_counter()
    LOSSES[name](given).backward()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": resident("VmHWM") - before}


def in_a_process(name: str, tokens: int, vocab: int, limit: float) -> tuple[dict[str, float], bool] | str:
    """What a loss takes, and whether it was done before the limit."""
    command = [sys.executable, __file__, "--only", name, "--tokens", str(tokens), "--vocab", str(vocab)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        said = process.stdout.readline()
        start = time.perf_counter()
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            peak = resident("VmHWM", process.pid) - json.loads(said)["before"]
            seconds = time.perf_counter() - start
            process.kill()
            return {"seconds": seconds, "peak": peak}, False
        rest = process.stdout.read()
        if process.returncode:
            errors.seek(0)
            lines = errors.read().strip().splitlines() or [f"exit status {process.returncode}"]
            print("\n".join(lines), file=sys.stderr)
            return f"{lines[-1]}; `make bench` installs what is needed"
    return json.loads(rest.splitlines()[-1]), True


# ---- the chunks of a batch ---------------------------------------------------------------------------------------


def batch_of(rows: int, tokens: int) -> xtokmap.AlignmentBatch:
    """Alignments of rows of tokens of one to three bytes."""
    rng = np.random.default_rng(0)
    words = [bytes([97 + k % 3]) * (1 + k // 3 % 3) for k in range(9)]
    table = xtokmap.ByteTable.from_bytes(words)
    teacher = xtokmap.ByteTable.from_bytes([b"a", b"b", b"c", b"aa", b"bb", b"cc"])
    aligner = xtokmap.Aligner(table, teacher)
    # Words that are the teacher's too, or two of its tokens.
    ids = rng.integers(0, 9, (rows, tokens))
    split = {k: [k] if k < 6 else [k - 3, k - 6] for k in range(9)}
    return aligner.align_batch(ids, [[t for k in row for t in split[k]] for row in ids.tolist()])


def chunk_losses(index: ChunkIndex, student: Tensor, teacher: Tensor) -> None:
    credit = chunk_credit(student, teacher, index)
    mask = index.student_chunk >= 0
    policy_loss(student, student.detach(), credit.advantages, mask, scored=credit.scored).backward()


def calls(work: Callable[[], object]) -> int:
    """Calls of functions, Python's and C's."""
    count = 0

    def seen(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def chunks(rows: int, tokens: int) -> list[str]:
    lines = ["| work | milliseconds | ns a student token | calls | calls for 2 rows of 64 |", "|---|--:|--:|--:|--:|"]
    works: list[dict[str, Callable[[], object]]] = []
    for size in ((rows, tokens), (2, 64)):
        batch = batch_of(*size)
        index = ChunkIndex.from_alignment(batch)
        student = -torch.rand(index.student_chunk.shape) - 0.1
        teacher = -torch.rand(index.teacher_chunk.shape)
        student.requires_grad_()
        works.append(
            {
                "`ChunkIndex.from_alignment`": lambda batch=batch: ChunkIndex.from_alignment(batch),
                "`chunk_credit` and `policy_loss`, forward and backward": (
                    lambda index=index, s=student, t=teacher: chunk_losses(index, s, t)
                ),
            }
        )
    for name, work in works[0].items():
        small = works[1][name]
        small()
        seconds = best(work, 2.0)
        each = seconds / (rows * tokens) * 1e9
        lines.append(f"| {name} | {seconds * 1e3:.1f} | {each:.1f} | {calls(work)} | {calls(small)} |")
    return lines


def available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024


def logits_table(sizes: list[int], vocab: int, limit: float) -> list[str]:
    lines = [
        "| tokens | loss | peak, GiB | seconds | memory against xtokmap | time against xtokmap |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for tokens in sizes:
        first: dict[str, float] = {}
        for name in LOSSES:
            if NEED * tokens * vocab > available():
                lines.append(f"| {tokens:,} | {name} | left out: {available() / 2**30:.1f} GiB are free | | | |")
                continue
            found = in_a_process(name, tokens, vocab, limit)
            if isinstance(found, str):
                lines.append(f"| {tokens:,} | {name} | left out: {found} | | | |")
                continue
            result, done = found
            first = first or result
            ratios = (result[key] / first[key] for key in ("peak", "seconds"))
            cells = [f"{result['peak'] / 2**30:.2f}", f"{result['seconds']:.2f}", *(f"{x:.1f}" for x in ratios)]
            least = "" if done else "≥ "
            lines.append(f"| {tokens:,} | {name} | " + " | ".join(least + cell for cell in cells) + " |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a loss is ended")
    parser.add_argument("--only", choices=LOSSES, help="one loss in this process; prints JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.tokens, args.vocab)))
        return
    rows, width = 128, 2048
    lines = [
        "# Memory and time of a distillation loss",
        "",
        f"Command: `{' '.join(['python', 'benches/memory.py', *sys.argv[1:]])}`. torch {torch.__version__};",
        f"{machine()}; {torch.get_num_threads()} threads.",
        "",
        f"One row of tokens, vocabulary {args.vocab:,}, bfloat16 logits of both models, forward and backward. Logits",
        f"({4 * args.tokens * args.vocab / 2**30:.2f} GiB for {args.tokens:,} tokens) are not counted; the gradient of",
        f"the student's, half of that, is. ≥: not done after {args.limit:g} s, and ended.",
        "",
        *logits_table([args.tokens // 4, args.tokens], args.vocab, args.limit),
        "",
        f"The chunks of {rows} rows of {width:,} student tokens, without logits. A loop over rows or chunks would show",
        "in the number of calls.",
        "",
        *chunks(rows, width),
    ]
    text = "\n".join(lines) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

"""What a served teacher's faults cost: python benches/faults.py [requests | --memory]

A real server with a small model over HTTP on this machine; faults are put into its answers as they go out
(tests/faults.py). First many requests with 5 % faults, each answer compared with the local model's for its own row;
then, for each fault, a training run in which it comes and goes, and one in which it lasts. Prints the tables and writes
them to benches/results/faults.md.

With `--memory`: the client's peak memory and its time under lies, each in a process of its own.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import faults  # noqa: E402
import tiny  # noqa: E402
from xtokmap.teachers.client import PROTOCOLS, Client, TeacherError  # noqa: E402
from xtokmap.teachers.local import LocalTeacher  # noqa: E402
from xtokmap.train.config import Config  # noqa: E402
from xtokmap.train.loop import train  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "faults.md"
RATE = 0.05
STEPS, BATCH = 8, 8
TIMEOUT = 5.0  # seconds: more than a busy machine needs
SELF_TEST = 7  # requests

MEANING = {
    "429": "status 429",
    "429 in 0.05 s": "status 429 with Retry-After",
    "500": "status 500",
    "503": "status 503",
    "no answer": "connection closed before an answer",
    "cut body": "connection closed in the middle of an answer",
    "slow": "an answer after the time-out",
    "broken JSON": "half of the JSON, as if whole",
    "NaN": "a logprob is NaN",
    "positive": "a logprob is 0.5",
    "one row short": "one row is missing",
    "shifted": "every row is the next one's",
    "other ids": "the rows of other tokens",
    "sum above 1": "a row's probabilities add up to more than 1",
}
assert set(MEANING) == set(faults.FAULTS)


def many(protocol: str, requests: int) -> dict[str, Any]:
    """Rows, all different, through a server with faults; every answer is compared with its own row's."""
    rng = np.random.default_rng(0)
    rows = [[4 + b // 350, 4 + b % 350, *rng.integers(4, 350, 14).tolist()] for b in range(requests)]
    model = tiny.teacher_model()
    want = LocalTeacher(model, tiny.teacher_tokenizer(), micro_batch=256)
    wanted = want.score([row[:1] for row in rows], [row[1:] for row in rows]).logprobs
    plan = faults.Plan(rate=RATE, slow=TIMEOUT + 1)
    with faults.serving(model, tiny.teacher_tokenizer(), plan) as server:
        client = Client(server.url, protocol=protocol, model="teacher", retries=8, timeout=TIMEOUT, pause=0.01)
        start = time.perf_counter()
        answers = client.score(rows, topk=4)
        seconds = time.perf_counter() - start
        answered = server.answered
    got = torch.from_numpy(np.stack([answer.logprobs[1:] for answer in answers]))
    gap = (got - wanted).abs().amax(1)
    # An answer of another row would be a row handed out twice.
    others = sum(int(((got[b] - wanted).abs().amax(1) < 1e-4).sum()) != 1 for b in range(0, requests, 10))
    return {
        "requests": requests,
        "attempts": client.figures["requests"],
        "faults": Counter(plan.log),
        "noticed": sum(n for kind, n in client.figures.items() if kind not in ("requests", "answers")),
        "lost": requests - len(answers),
        "wrong": int((gap > 1e-4).sum()),
        "doubled": others,
        "answered": answered,
        "seconds": seconds,
    }


def run(folder: Path, plan: faults.Plan | None, **changes: Any) -> tuple[list[dict[str, Any]], str]:
    """A training run; its metrics and, where it ended early, why."""
    (folder / "prompts.txt").write_text("the sky\nthe dog\na fox?\n1 + 2\nhello\n")
    models = tiny.pair()
    with faults.serving(models[2], models[3], plan) as server:
        settings = {"prompts": str(folder / "prompts.txt"), "output": str(folder / "out"), "steps": STEPS}
        settings |= {"batch_size": BATCH, "max_new_tokens": 16, "learning_rate": 1e-3, "device": "cpu", "loss": "prior"}
        settings |= {"teacher_url": server.url, "teacher_topk": 0, "teacher_timeout": TIMEOUT, "save_every": 0}
        settings["teacher_patience"] = 0.0  # what is survived is so by asking again
        said, shown = [], io.StringIO()
        with (
            warnings.catch_warnings(),
            open(os.devnull, "w") as nowhere,
            redirect_stdout(shown),
            redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            try:
                train(Config(**{**settings, **changes}), models=models)
            except TeacherError as error:
                said.append(str(error))
        said += [line for line in shown.getvalue().splitlines() if "is left out" in line]
        cause = said[0].rpartition("the last: ")[2] if said else ""
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], cause


def largest_gap(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> float:
    return max(abs(x["loss"] - y["loss"]) for x, y in zip(a, b, strict=True))


#: A row of 500 ids with the 20 likeliest of each, 8 such rows at a time: a true answer has about a megabyte.
LENGTH, TOPK, AT_ONCE, LIE_TIMEOUT = 500, 20, 8, 10.0


def true_answer() -> bytes:
    row = {str(k): {"logprob": -8.0 - k / 7, "rank": k + 1, "decoded_token": f"token {k}"} for k in range(TOPK + 1)}
    rows = [None, *({str(5): row["5"], **row} for _ in range(LENGTH - 1))]
    return json.dumps({"choices": [{"index": 0, "text": "x", "prompt_logprobs": rows}]}).encode()


def whole(body: bytes, *headers: bytes) -> Callable[[Any], Iterable[bytes]]:
    return lambda found: [faults.plain(body, *headers)]


def memory_lies() -> dict[str, Callable[[Any], Iterable[bytes]]]:
    return {
        "the true answer": whole(true_answer()),
        "64 MiB of `[],`": whole(b"[" + b"[]," * (2**26 // 3) + b"[]]"),
        "2 MiB of `[],`": whole(b"[" + b"[]," * (2**21 // 3) + b"[]]"),
        "180,000 small objects, which are read": whole(b"[" + b'{"a":1},' * 180_000 + b"1]"),
        "64 MiB of spaces": whole(b" " * 2**26),
        "256 KiB that unpack to 256 MiB": whole(faults.BOMB, b"Content-Encoding: gzip"),
        "a true answer with 2 million tokens in a row": whole(
            true_answer().replace(
                b'{"5"', b"{" + b"".join(b'"%d":{"logprob":-99},' % k for k in range(10**5, 21 * 10**5)) + b'"5"', 1
            )
        ),
        **{name: faults.LIES[name] for name in ("nested", "endless headers", "endless 100", "an endless body")},
        **{name: faults.LIES[name] for name in ("a body without an end", "an endless error", "trickling headers")},
    }


def high_water(process: int | None) -> int:
    """MiB that a process has had at most; unlike `ru_maxrss`, of what it is now and not of what it was forked from."""
    return int(Path(f"/proc/{process}/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024


def under_a_lie(pipe: Any) -> None:
    """In a process of its own: what one batch costs."""

    def peak() -> int:
        return high_water(os.getpid())

    def work(url: str) -> None:
        client = Client(
            url, protocol="vllm", model="m", retries=0, timeout=LIE_TIMEOUT, concurrency=AT_ONCE, patience=0.0
        )
        Path("/proc/self/clear_refs").write_text("5")  # the peak is of now on
        before, start = peak(), time.perf_counter()
        try:
            client.score([[5] * LENGTH] * AT_ONCE, TOPK)
            said = "answered"
        except Exception as error:
            said = f"{type(error).__name__}: {str(error).rpartition('the last: ')[2][:70]!r}"
        pipe.send((peak() - before, time.perf_counter() - start, said))

    work(pipe.recv())


def memory() -> None:
    """Prints the table of peak memory."""
    print("| the server sends | MiB | seconds | what comes of it |\n|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for name, lie in memory_lies().items():

        def speak(sock: Any, head: bytes, lie: Any = lie) -> None:
            head, _, body = head.partition(b"\r\n\r\n")
            left = int(head.lower().partition(b"content-length: ")[2].split()[0]) - len(body)
            while left > 0 and (part := sock.recv(2**16)):
                left -= len(part)
            for part in lie({}):
                sock.sendall(part)

        ours, theirs = context.Pipe()
        process = context.Process(target=under_a_lie, args=(theirs,))
        with faults.talking(speak) as url:
            process.start()
            ours.send(url)
            # A client without a deadline is not waited for.
            if ours.poll(6 * LIE_TIMEOUT):
                grown, seconds, said = ours.recv()
                print(f"| {name} | {grown} | {seconds:.1f} | {said} |", flush=True)
            else:
                print(
                    f"| {name} | {high_water(process.pid)} in all | | no end within {6 * LIE_TIMEOUT:.0f} s |",
                    flush=True,
                )
            process.kill()
            process.join()


def main() -> None:
    if sys.argv[1:] == ["--memory"]:
        memory()
        return
    requests = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    out = [
        "# Faults of a served teacher",
        "",
        f"`python benches/faults.py`, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}. A small "
        "model behind `TeacherServer`, over HTTP on this machine; the faults are put into its answers.",
        "",
        f"## {requests:,} requests, {RATE:.0%} of the answers faulty",
        "",
        "Every row is different, and every answer is compared with what the model says of that row. Doubled: answers "
        "that are another row's (every tenth is compared with all rows). More may be asked again than was faulty: on a "
        "busy machine, some sound answers are late, too.",
        "",
        "| protocol | rows | attempts | faults | asked again | lost | wrong | doubled | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    totals: Counter[str] = Counter()
    for protocol in PROTOCOLS:
        found = many(protocol, requests)
        totals += found["faults"]
        out.append(
            f"| {protocol} | {found['requests']:,} | {found['attempts']:,} | {sum(found['faults'].values())} | "
            f"{found['noticed']} | {found['lost']} | {found['wrong']} | {found['doubled']} | {found['seconds']:.0f} |"
        )
        print(out[-1], flush=True)
    out += [
        "",
        "## Fault by fault",
        "",
        f"Injected: in the table above. Then two training runs of {STEPS} steps of {BATCH} samples, over vLLM's "
        "protocol: in one, a fifth of the answers have the fault, and each request may be made 8 times more; in the "
        "other, the first request of the third batch has it as often as it is made (twice). Steps lost are batches "
        "left out; the run draws new ones for them. Loss: the largest difference of a step's loss from the run without "
        "faults.",
        "",
        "| fault | injected | passing: asked again | steps lost | loss | lasting: steps lost | what is said |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        want, _ = run(folder, None)
        for fault in faults.FAULTS:
            plan = faults.Plan([None] * SELF_TEST, rate=0.2, names=[fault], slow=TIMEOUT + 1)
            passing, said = run(folder, plan, teacher_retries=8)
            assert not said
            lasting_plan = faults.Plan([None] * (SELF_TEST + 2 * BATCH) + [fault] * 2, slow=TIMEOUT + 1)
            lasting, cause = run(folder, lasting_plan, teacher_retries=1, teacher_concurrency=1)
            assert len(lasting) == STEPS
            # The steps before the lost batch are those of the run without faults.
            assert largest_gap(lasting[:2], want[:2]) < 1e-4
            out.append(
                f"| {MEANING[fault]} | {totals[fault]} | {len(plan.log)} | "
                f"{sum(m['skipped_batches'] for m in passing)} | {largest_gap(passing, want):.0e} | "
                f"{sum(m['skipped_batches'] for m in lasting)} of {STEPS + 1} | {cause} |"
            )
            print(out[-1], flush=True)
            RESULTS.write_text("\n".join(out) + "\n")
        want, _ = run(folder, None, overlap=True)
        names = [name for name in faults.FAULTS if name != "slow"]
        plan = faults.Plan([None] * SELF_TEST, rate=0.2, names=names)
        passing, said = run(folder, plan, teacher_retries=8, overlap=True)
        assert not said
        out += [
            "",
            f"With `overlap`, a fifth of the answers faulty, all but slow ones: {len(plan.log)} asked again, "
            f"{sum(m['skipped_batches'] for m in passing)} steps lost, loss {largest_gap(passing, want):.0e} from the "
            "overlapped run without faults.",
        ]
        print(out[-1], flush=True)
        RESULTS.write_text("\n".join(out) + "\n")


if __name__ == "__main__":
    main()

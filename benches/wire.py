"""What a served teacher's rows cost over the wire, and what they are worth.

    python benches/wire.py [--teacher DIR] [--student DIR] [--vllm URL] [--pooling URL] [--train]

Gemma 3 270M scores samples of SmolLM2 135M, over HTTP on this machine, by every way that a server may have: bytes a
teacher token, seconds, and how far logprobs and `cover` advantages are from those of the same model in this process.
`xtokmap serve-teacher` is started here; with --vllm and --pooling, servers of vLLM that have the same model are
measured too (`vllm serve DIR --max-logprobs 200`, and with `--runner pooling --convert embed --pooler-config
'{"task":"token_embed"}'`). With --train five steps with transfer_kl are made instead, the teacher here and over hidden
states. Prints the tables and writes them to benches/results/wire.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from xtokmap import Aligner, demo
from xtokmap.chat import render
from xtokmap.losses.credit import chunk_credit
from xtokmap.models import load
from xtokmap.teachers import http1
from xtokmap.teachers.head import read_head
from xtokmap.teachers.local import LocalTeacher
from xtokmap.teachers.remote import ServerTeacher
from xtokmap.teachers.scorer import Limits
from xtokmap.teachers.server import TeacherServer
from xtokmap.torch.completions import batched_logprobs
from xtokmap.torch.index import ChunkIndex
from xtokmap.train.config import Config
from xtokmap.train.generation import sample
from xtokmap.train.loop import train

RESULTS = Path(__file__).parent / "results" / "wire.md"
CPU = torch.device("cpu")
LENGTH = 120  # student tokens of a sample
PROMPTS = [
    "What is a rainbow?",
    "Write a function that adds two numbers.",
    "Who was Ada Lovelace?",
    "Why is ice slippery?",
]
#: Tokens of a row for which whole rows are asked as JSON: each is 24 MB.
WHOLE = 3
#: Hidden size and rows of the output head, from the models' configurations.
MODELS = {"Gemma 3 270M": (640, 262144), "Qwen3-32B": (5120, 151936), "Llama 3.3 70B": (8192, 128256)}


class Counted:
    """Bytes of bodies and the number of requests, over all connections."""

    up = down = requests = 0
    lock = threading.Lock()

    @classmethod
    def clear(cls) -> None:
        cls.up = cls.down = cls.requests = 0


def count() -> None:
    own = http1.Connections.ask

    def ask(self: Any, method: str, path: str, body: bytes | None = None, **options: Any) -> http1.Answer:
        answer = own(self, method, path, body, **options)
        with Counted.lock:
            Counted.up += len(body or b"")
            Counted.down += len(answer.content)
            Counted.requests += 1
        return answer

    http1.Connections.ask = ask  # type: ignore[method-assign]


@contextmanager
def serving(model: Any, tokenizer: Any) -> Iterator[str]:
    server = TeacherServer(model, tokenizer, limits=Limits(max_batch=8, max_body=2**26))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.url
    finally:
        server.close(patience=5.0)
        thread.join()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


class Case:
    """Samples as both sides have them, and what the teacher here says of them."""

    def __init__(self, student: Any, student_tokenizer: Any, model: Any, tokenizer: Any) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.aligner = Aligner(student_tokenizer, tokenizer)
        asked = render(student_tokenizer, PROMPTS)
        torch.manual_seed(0)
        ids, _ = sample(student, asked, self.aligner.student.stop_ids, Config(max_new_tokens=LENGTH))
        self.own = batched_logprobs(student, asked, ids, 4)
        teacher_ids, batch = self.aligner.retokenize(ids)
        self.rows, self.prompts = [row.tolist() for row in teacher_ids], render(tokenizer, PROMPTS)
        self.index, self.queries = ChunkIndex.from_alignment(batch), self.aligner.cover_queries(batch)
        self.tokens = sum(map(len, self.rows))
        teacher = LocalTeacher(model, tokenizer)
        start = time.perf_counter()
        teacher.score(self.prompts, self.rows)
        self.plain_seconds = time.perf_counter() - start
        start = time.perf_counter()
        self.want = teacher.score(self.prompts, self.rows, queries=self.queries)
        self.seconds = time.perf_counter() - start
        print(f"{self.tokens} tokens; here {self.plain_seconds:.1f} s, {self.seconds:.1f} s with cover", flush=True)
        self.advantages = self.cover(self.want)

    def cover(self, scores: Any) -> torch.Tensor:
        given = chunk_credit(self.own, scores.logprobs, self.index, "cover", scores.transferred, 10.0)
        return torch.where(given.scored, given.advantages, 0)

    def measured(self, name: str, teacher: ServerTeacher) -> dict[str, Any]:
        """One batch, after the self-test, as a run would score it."""
        teacher.self_test()
        queries = None if teacher.rows == "none" else self.queries
        Counted.clear()
        start = time.perf_counter()
        scores = teacher.score(self.prompts, self.rows, queries=queries)
        seconds = time.perf_counter() - start
        gap = (scores.logprobs - self.want.logprobs).abs()[scores.mask]
        found: dict[str, Any] = {"name": name, "up": Counted.up / self.tokens, "down": Counted.down / self.tokens}
        found |= {"seconds": seconds, "requests": Counted.requests / seconds}
        found |= {"largest": float(gap.max()), "mean": float(gap.mean()), "cosine": None, "missing": None}
        if queries is not None:
            found["cosine"] = cosine(self.cover(scores), self.advantages)
        if scores.missing is not None:
            found["missing"] = float(scores.missing[scores.mask].mean())
        print(json.dumps(found), flush=True)
        return found


def whole_rows(url: str, case: Case) -> tuple[float, float]:
    """Bytes and seconds of a token whose whole row comes as JSON."""
    teacher = ServerTeacher(url, case.tokenizer, topk=case.model.config.vocab_size, timeout=600.0)
    teacher.client.connect(case.rows[0][:4])
    Counted.clear()
    start = time.perf_counter()
    teacher.score([[*case.prompts[0], *case.rows[0]][:1]], [case.rows[0][:WHOLE]], keep=True)
    return Counted.down / (WHOLE + 1), (time.perf_counter() - start) / (WHOLE + 1)


def chosen(case: Case) -> float:
    """Tokens a teacher token of which chosen logprobs would be needed."""
    sets = case.queries.sets
    used = case.queries.set[case.queries.set >= 0]
    listed = sets.indptr[1:] - sets.indptr[:-1]
    return float(listed[used].sum() / case.tokens)


def computed(top: float, sets: float) -> list[str]:
    """Bytes a token of other models, up and down."""
    lines = [
        "| model | top 20, JSON | sums | hidden states, bf16 | whole rows, bf16 | the head, once |",
        "|" + "---|" * 6,
    ]
    for name, (width, size) in MODELS.items():
        head = f"{2 * width * size / 1e9:.2f} GB"
        lines.append(f"| {name} | {top:,.0f} | {sets:,.0f} | {2 * width:,} | {2 * size:,} | {head} |")
    return lines


def steps_of(folder: Path, args: argparse.Namespace, **changes: Any) -> str:
    """Losses of five steps with transfer_kl, as a row of a table."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"What is {a} plus {50 - a}?" for a in range(3, 43)))
    config = Config(
        student=args.student or str(demo.fetch(demo.SMOLLM2)), teacher=args.teacher, prompts=str(prompts),
        output=str(folder / "out"), steps=5, batch_size=2, max_new_tokens=12, learning_rate=1e-5, warmup_steps=0,
        device="cpu", save_every=0, report_every=0, loss="transfer_kl", **changes,
    )  # fmt: skip
    metrics = train(config).metrics
    seconds = sum(line["time"]["teacher"] for line in metrics)
    return f"{', '.join(format(line['loss'], '.7f') for line in metrics)} | {seconds:.0f} |"


def five_steps(scratch: str, args: argparse.Namespace) -> list[str]:
    """The same run with the teacher here and over hidden states."""
    lines = ["## Five steps with transfer_kl", "", "| teacher | losses | its seconds |", "|---|---|---|"]
    runs: dict[str, dict[str, Any]] = {"in this process": {}}
    if args.pooling:
        runs["vLLM's pooling runner"] = {"teacher_url": args.vllm or args.pooling, "teacher_timeout": 600.0}
        runs["vLLM's pooling runner"] |= {"teacher_states_url": args.pooling} if args.vllm else {}
    for name, changes in runs.items():
        lines.append(f"| {name} | {steps_of(Path(tempfile.mkdtemp(dir=scratch)), args, **changes)}")
        print(lines[-1], flush=True)
    return lines


def written(text: str, part: int) -> None:
    """One of the two parts of the results, the other as it is."""
    parts = RESULTS.read_text().partition("\n## Five steps") if RESULTS.exists() else ("", "", "")
    print(text)
    RESULTS.write_text(f"{text}{parts[1]}{parts[2]}" if part == 0 else f"{parts[0].rstrip()}\n\n{text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="", help="Gemma 3 270M as safetensors; else made of the demo's file")
    parser.add_argument("--student", default="", help="SmolLM2 135M Instruct; else the demo's file")
    parser.add_argument("--vllm", default="", help="URL of a vLLM server that has it")
    parser.add_argument("--pooling", default="", help="URL of vLLM's pooling runner that has it")
    parser.add_argument("--train", action="store_true", help="make five steps instead")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    count()
    with tempfile.TemporaryDirectory() as scratch:
        if args.train:
            written("\n".join(five_steps(scratch, args)) + "\n", 1)
            return
        folder = args.teacher or f"{scratch}/teacher"
        model, tokenizer = load(args.teacher or str(demo.fetch(demo.GEMMA)), CPU)
        if not args.teacher:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        case = Case(*load(args.student or str(demo.fetch(demo.SMOLLM2)), CPU), model, tokenizer)
        head = read_head(folder, CPU)
        found = []
        with serving(model, tokenizer) as url:
            for name, options in {
                "logprobs alone": {"rows": "none"},
                "top 20": {"rows": "top", "topk": 20},
                "top 200": {"rows": "top", "topk": 200},
                "sums": {"rows": "sums"},
                "hidden states": {"rows": "hidden", "head": head},
            }.items():
                teacher = ServerTeacher(url, tokenizer, timeout=600.0, **options)  # type: ignore[arg-type]
                found.append(case.measured(f"serve-teacher, {name}", teacher))
            row_bytes, row_seconds = whole_rows(url, case)
            print(f"whole rows: {row_bytes:,.0f} bytes, {row_seconds:.1f} s a token", flush=True)
        if args.vllm:
            for topk in (20, 200):
                teacher = ServerTeacher(args.vllm, tokenizer, rows="top", topk=topk, timeout=600.0)
                found.append(case.measured(f"vLLM, top {topk}", teacher))
        if args.pooling:
            options = {"rows": "hidden", "head": head, "timeout": 600.0}
            options |= {"states_url": args.pooling} if args.vllm else {}
            teacher = ServerTeacher(args.vllm or args.pooling, tokenizer, **options)  # type: ignore[arg-type]
            found.append(case.measured("vLLM's pooling runner, hidden states", teacher))
        by_name = {one["name"].partition(", ")[2]: one["up"] + one["down"] for one in found[:5]}
        given = {"--teacher DIR": args.teacher, "--student DIR": args.student, "--vllm URL": args.vllm}
        given |= {"--pooling URL": args.pooling}
        command = " ".join(["python benches/wire.py", *(flag for flag, value in given.items() if value)])
        lines = [
            "# A served teacher's rows over the wire",
            "",
            f"`{command}`, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, transformers "
            f"{transformers.__version__}. Gemma 3 270M in float32 scores {len(case.rows)} samples of SmolLM2 135M, "
            f"{case.tokens} tokens together, over HTTP on this machine. In this process that takes "
            f"{case.plain_seconds:.1f} s for logprobs and {case.seconds:.1f} s with `cover`. Bytes are of bodies, a "
            "teacher token.",
            "",
            "| what is asked | bytes up | down | seconds | logprobs: largest gap | mean | `cover`: cosine | missing |",
            "|" + "---|" * 8,
        ]
        for one in found:
            missing = "-" if one["missing"] is None else f"{one['missing']:.3f}"
            angle = "-" if one["cosine"] is None else f"{one['cosine']:.4f}"
            sizes = f"{one['up']:,.0f} | {one['down']:,.0f} | {one['seconds']:.1f}"
            lines.append(
                f"| {one['name']} | {sizes} | {one['largest']:.1e} | {one['mean']:.1e} | {angle} | {missing} |"
            )
        lines += [
            "",
            f"Whole rows as JSON: {row_bytes / 1e6:.1f} MB and {row_seconds:.1f} s a token ({WHOLE + 1} asked for). "
            f"Chosen tokens: the sets of `cover` have {chosen(case):,.0f} ids a token here, "
            f"{8 * chosen(case) / 1e3:,.0f} kB as two binary numbers each (computed).",
            "",
            "## Other models, computed",
            "",
            "Bytes a token: hidden states and rows from the configurations; top 20 and sums as measured above, as they "
            "depend on vocabularies and texts, and not on the model's size.",
            "",
            *computed(by_name["top 20"], by_name["sums"]),
        ]
        written("\n".join(lines) + "\n", 0)


if __name__ == "__main__":
    main()

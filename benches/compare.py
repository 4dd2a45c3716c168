"""xtokmap beside what else there is, in one run: python benches/compare.py

Five pairs of real tokenizers, rows of three lengths, one thread; then whole batches on all cores. Every aligner gets
the same ids, and what it needs beside them (byte offsets, token strings) is made before its clock starts, unless a line
says otherwise. Times are the best of several runs; the claim is the ratio of lines of one table, not the nanoseconds.
Writes benches/results/compare.md and compare.png. What is not installed is left out and named.
"""

from __future__ import annotations

import os
import sys

# Before anything starts a pool of threads. The second part of the run is a process of its own, with all cores.
if "--all-cores" not in sys.argv:
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", OMP_NUM_THREADS="1")
os.environ.update(TRL_EXPERIMENTAL_SILENCE="1", XTOKMAP_CACHE="off")

import argparse
import gzip
import importlib
import importlib.metadata
import platform
import shutil
import subprocess
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

# Behind this directory, whose pairs.py is another.
sys.path.insert(1, str(Path(__file__).parents[1] / "tests"))

import pytest

import real_tokenizers as real
import xtokmap
from xtokmap.tokenizers import text_codec

RESULTS = Path(__file__).parent / "results"
PAIRS = [
    ("smollm2", "deepseek"),
    ("qwen", "deepseek"),
    ("deepseek", "qwen3.6"),
    ("o200k", "anthropic"),
    ("mistral-v3", "qwen"),
]
LENGTHS = [512, 4096, 16384]
#: Tokens of a bulk call.
BULK = 128 * 2048
#: Bulk calls, to measure encoding.
BATCHES = 4
NAMES = {
    "smollm2": "SmolLM2",
    "deepseek": "DeepSeek V3",
    "qwen": "Qwen",
    "qwen3.6": "Qwen 3.6",
    "o200k": "o200k",
    "anthropic": "Anthropic",
    "mistral-v3": "Mistral v3",
}


def optional(module: str, package: str) -> Any:
    """A module, or None with a line that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        MISSING[package] = f"Left out: {package} ({error}); `make bench` installs it, or pip install {package}."
        return None


MISSING: dict[str, str] = {}


# ---- what is compared --------------------------------------------------------------------------------------------


def decoding_aligner(student: Any, teacher: Any, credit: bool = False) -> Callable[[list[int], list[int]], int]:
    """Chunks as the paper finds them (arXiv 2606.09456), written from its description and its published code.

    Two pointers: both spans are decoded, and the one with the shorter text grows by a token until both texts are the
    same under NFC and no character is open at the end. `credit` adds what is done with every chunk there: the sum of
    the teacher's logprobs is shared out among its student tokens, a chunk at a time, in torch.
    """
    if credit:
        import torch

    def text(tokenizer: Any, ids: list[int]) -> str:
        return unicodedata.normalize("NFC", tokenizer.decode(ids, skip_special_tokens=False))

    def align(a: list[int], b: list[int]) -> int:
        if credit:
            logprobs, aligned, chunk_of = torch.zeros(len(b)), torch.zeros(len(a)), torch.zeros(len(a))
        chunks = i = j = 0
        while i < len(a) and j < len(b):
            i_end, j_end = i + 1, j + 1
            while True:
                left, right = text(student, a[i:i_end]), text(teacher, b[j:j_end])
                is_open = left.endswith("\ufffd"), right.endswith("\ufffd")
                if left == right and not is_open[0]:
                    break
                both = len(left) == len(right) and is_open[0] == is_open[1]
                grow_left = both or len(left) < len(right) or (len(left) == len(right) and is_open[0])
                grow_right = both or not grow_left
                if not (grow_left and i_end < len(a)) and not (grow_right and j_end < len(b)):
                    return chunks
                i_end += grow_left and i_end < len(a)
                j_end += grow_right and j_end < len(b)
            if credit:
                aligned[i:i_end] = logprobs[j:j_end].sum() / (i_end - i)
                chunk_of[i:i_end] = chunks
            chunks += 1
            i, j = i_end, j_end
        return chunks

    return align


class Side:
    """One tokenizer as xtokmap, tokenizers and transformers know it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fast = _transformers(name)
        self.backend = self.fast.backend_tokenizer if self.fast is not None else None
        self.source = _sentencepiece(name) if self.fast is None else self.backend
        self.table = xtokmap.byte_table(self.source)

    @property
    def encode(self) -> Callable[[Sequence[str]], list[Any]]:
        if self.backend is None:
            return lambda texts: [np.asarray(ids) for ids in self.source.encode(list(texts), out_type=int)]
        return lambda texts: [
            np.asarray(row.ids) for row in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def texts(self, ids: list[int]) -> list[str]:
        """Every token as text, as word aligners want it."""
        return [(self.table[i] or b"").decode(errors="replace") for i in ids]


def _transformers(name: str) -> Any:
    """A fast transformers tokenizer; None for SentencePiece."""
    import tokenizers
    import transformers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    if name.startswith("mistral"):
        return None
    file = real.path(name)
    if file.suffix == ".gguf":
        return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if file.suffix == ".json":
        backend = tokenizers.Tokenizer.from_file(str(file))
    else:
        pattern, special = real.ENCODINGS[name]
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as plain:
            data = file.read_bytes()
            Path(plain.name).write_bytes(gzip.decompress(data) if file.suffix == ".gz" else data)
            made = TikTokenConverter(vocab_file=plain.name, pattern=pattern, extra_special_tokens=list(special))
            backend = made.converted()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


def _sentencepiece(name: str) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(real.path(name)))


@cache
def side(name: str) -> Side:
    return Side(name)


def trl_offsets(student: Side, teacher: Side, ids: list[int], text: str) -> Callable[[], object] | None:
    """TRL's way to the byte offsets of both sides, which encodes the teacher's; None where it refuses a tokenizer."""
    gold = optional("trl.experimental.gold.gold_trainer", "trl")
    if gold is None or student.backend is None or teacher.backend is None:
        return None
    import torch
    from trl.experimental.utils import encode_with_byte_offsets

    trainer = SimpleNamespace(
        use_uld_loss=True,
        teacher_tokenizer=teacher.fast,
        uld_loss_fn=SimpleNamespace(use_extended_uld=True),
        _tokenizer=student.fast,
    )
    tokens = torch.tensor([ids])

    def work() -> object:
        batch = {"input_ids": tokens, "labels": tokens}
        gold.GOLDTrainer._maybe_add_completion_byte_offsets(trainer, batch)
        return batch, encode_with_byte_offsets(teacher.backend, [text])

    try:
        work()
    except (NotImplementedError, ValueError) as error:
        print(f"TRL refuses {student.name} -> {teacher.name}: {str(error)[:80]}", file=sys.stderr)
        return None
    return work


def spans(ends: Any) -> list[list[int]]:
    stops = ends.tolist()
    return [[start, stop] for start, stop in zip([0, *stops], stops, strict=False)]


# ---- clock -------------------------------------------------------------------------------------------------------


def best(work: Callable[[], object], seconds: float = 0.25) -> float:
    times = []
    until = time.perf_counter() + seconds
    while len(times) < 2 or (time.perf_counter() < until and len(times) < 200):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


@cache
def source_text(characters: int) -> str:
    """The source of the standard library."""
    parts, size = [], 0
    for file in sorted(Path(os.__file__).parent.rglob("*.py")):
        if "site-packages" not in file.parts:
            parts.append(file.read_text(encoding="utf-8", errors="ignore"))
            size += len(parts[-1])
            if size >= characters:
                break
    return "".join(parts)[:characters]


@cache
def student_ids(name: str, count: int) -> Any:
    (ids,) = side(name).encode([source_text(6 * count)])
    if len(ids) < count:
        raise SystemExit(f"{name}: {len(ids)} tokens of text, {count} are needed")
    return ids[:count]


KERNEL, ONE_ROW = "xtokmap, rows in one call", "xtokmap, a call for each row"
ENCODE = "encoding the teacher's ids alone (tokenizers)"
WALK, OFFSETS = "TRL 1.16: walk over given offsets", "TRL 1.16: making the offsets"
SPACY, PYTOKENIZATIONS = "spacy-alignments", "pytokenizations"
SAME_STRINGS = "xtokmap.get_alignments on the same strings"
DECODE, PUBLISHED = "the paper's pointers, transformers' decode", "the same with the paper's credit for each chunk"
DECODE_FAST = "the paper's pointers, tokenizers' decode"
LINES = [
    *(KERNEL, ONE_ROW, ENCODE, WALK, OFFSETS, SPACY, PYTOKENIZATIONS, SAME_STRINGS),
    *(DECODE_FAST, DECODE, PUBLISHED),
]


def measure(student: Side, teacher: Side, n: int) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds for each student token by line, and how many chunks of one row were found."""
    aligner = xtokmap.Aligner(student.table, teacher.table)
    students = student_ids(student.name, BULK)[: BULK // n * n].reshape(-1, n)
    texts = [student.table.decode(row).decode(errors="replace") for row in students]
    teachers = teacher.encode(texts)
    a, b, text = students[0], teachers[0], texts[0]
    a_list, b_list = a.tolist(), b.tolist()
    alignment = aligner.align(a, b)
    found = {KERNEL: len(alignment)}
    few = range(max(1, min(len(students), 8192 // n)))
    flat = students.reshape(-1), np.concatenate(teachers)
    cu = {"student_cu": np.arange(len(students) + 1) * n, "teacher_cu": np.cumsum([0, *map(len, teachers)])}
    work: dict[str, tuple[Callable[[], object], int]] = {
        KERNEL: (lambda: aligner.align_batch(*flat, **cu, threads=1), students.size),
        ONE_ROW: (lambda: [aligner.align(students[k], teachers[k]) for k in few], n * len(few)),
        ENCODE: (lambda: teacher.encode([text]), n),
    }
    gold = optional("trl.experimental.gold.gold_trainer", "trl")
    if gold is not None:
        walk = gold.ULDLoss._align_by_byte_offsets
        given = spans(alignment.student_end), spans(alignment.teacher_end)
        found[WALK] = len(walk(*given)[0])
        work[WALK] = lambda: walk(*given), n
        offsets = trl_offsets(student, teacher, a_list, text)
        if offsets is not None:
            work[OFFSETS] = offsets, n
    strings = student.texts(a_list), teacher.texts(b_list)
    for name, module in ((SPACY, "spacy_alignments"), (PYTOKENIZATIONS, "tokenizations")):
        words = optional(module, name)
        if words is not None:
            work[name] = (lambda words=words: words.get_alignments(*strings)), n
    work[SAME_STRINGS] = lambda: xtokmap.get_alignments(*strings), n
    if student.fast is not None and teacher.fast is not None:
        fast = decoding_aligner(student.backend, teacher.backend)
        slow = decoding_aligner(student.fast, teacher.fast)
        published = decoding_aligner(student.fast, teacher.fast, credit=True)
        found[DECODE] = slow(a_list, b_list)
        work[DECODE_FAST] = lambda: fast(a_list, b_list), n
        work[DECODE] = lambda: slow(a_list, b_list), n
        work[PUBLISHED] = lambda: published(a_list, b_list), n
    return {name: best(call) / tokens for name, (call, tokens) in work.items()}, found


def retokenize(student: Side, teacher: Side, fast: bool) -> tuple[str, float, float] | None:
    """Engine, and seconds to encode a batch of 128 rows of 2,048 tokens and to retokenize it, on all cores.

    Codecs of their own, and texts that neither has seen, as engines remember words and texts; all batches with one and
    then with the other, as threads of fastokens forget the words of one tokenizer when they turn to another.
    """
    if not fast:
        sys.modules["fastokens"] = None  # type: ignore[assignment]
    aligner = xtokmap.Aligner(student.table, teacher.source)
    alone = text_codec(teacher.source)
    batches = student_ids(student.name, BATCHES * BULK).reshape(BATCHES, 128, 2048)
    aligner.retokenize([batches[0, 0, :100]])
    sys.modules.pop("fastokens", None)
    engine = "fastokens" if type(alone).__name__ == "_Fastokens" else type(teacher.source).__module__.partition(".")[0]
    if fast and engine != "fastokens":
        return None
    texts = [[student.table.decode(row).decode(errors="replace") for row in batch] for batch in batches]
    times = []
    for work, inputs in ((alone.encode_batch, texts), (aligner.retokenize, batches)):
        times.append([])
        for given in inputs:
            start = time.perf_counter()
            work(given)
            times[-1].append(time.perf_counter() - start)
    encoding, whole = np.median(np.asarray(times)[:, 1:], axis=1)  # the first warms up
    return engine, float(encoding), float(whole)


def building(student: str, teacher: str) -> tuple[float, float]:
    """Seconds for an Aligner of two files: the first, and with the tables on disk."""
    first, again = [], []
    files = real.path(student), real.path(teacher)
    for _ in range(3):
        os.environ["XTOKMAP_CACHE"] = where = tempfile.mkdtemp()
        for times in (first, again):
            start = time.perf_counter()
            xtokmap.Aligner(*files)
            times.append(time.perf_counter() - start)
        shutil.rmtree(where)
    os.environ["XTOKMAP_CACHE"] = "off"
    return min(first), min(again)


def worst_cases(n: int = 16384) -> list[str]:
    """What resynchronization costs where nothing agrees."""
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, k).astype(np.uint8)) for k in rng.integers(1, 8, 50_000)]
    others = [bytes(rng.integers(97, 123, k).astype(np.uint8)) for k in rng.integers(1, 8, 50_000)]
    ids = rng.integers(0, len(words), n)
    tables = {
        "clean": words,
        "another case (a REWRITTEN chunk each)": [word.upper() for word in words],
        "digits for letters": [word.translate(bytes.maketrans(bytes(range(97, 107)), b"0123456789")) for word in words],
        "other letters at random": others,
        "no byte in common": [bytes([b - 64 for b in word]) for word in words],
    }
    student = xtokmap.ByteTable.from_bytes(words)
    times = {}
    for name, teacher in tables.items():
        aligner = xtokmap.Aligner(student, xtokmap.ByteTable.from_bytes(teacher))
        times[name] = best(lambda aligner=aligner: aligner.align(ids, ids))
    rows = [f"| {name} | {t * 1e6:.0f} | {t / times['clean']:.1f} |" for name, t in times.items()]
    return ["| teacher | microseconds | against clean |", "|---|--:|--:|", *rows]


# ---- report ------------------------------------------------------------------------------------------------------


def machine() -> str:
    name, memory = platform.processor() or platform.machine(), ""
    for file, key in (("/proc/cpuinfo", "model name"), ("/proc/meminfo", "MemTotal")):
        lines = Path(file).read_text().splitlines() if Path(file).exists() else []
        value = next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
        if key == "model name":
            name = value or name
        elif value:
            memory = f", {int(value.split()[0]) / 2**20:.0f} GiB of memory"
    return f"{os.cpu_count()} cores of {name}{memory}; {platform.system()}; Python {platform.python_version()}"


def versions() -> str:
    packages = ("xtokmap", "numpy", "tokenizers", "transformers", "fastokens", "trl", "spacy-alignments")
    found = []
    for package in (*packages, "pytokenizations"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:  # noqa: PERF203
            continue
    return ", ".join(found)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def report(lengths: Sequence[int], pairs: Sequence[tuple[str, str]], plot: Path) -> Iterator[str]:
    start = time.perf_counter()
    loaded = [(side(s), side(t)) for s, t in pairs]
    headings = [f"{NAMES[s]} → {NAMES[t]}" for s, t in pairs]
    yield "# xtokmap beside what else there is"
    yield ""
    yield f"Command: `python benches/compare.py`. {versions()}."
    yield f"{machine()}. Text: the source of Python's standard library; nanoseconds for a student token, on one thread."
    yield ""
    yield f"*{KERNEL}*: {BULK:,} tokens in one `align_batch`. *{WALK}* gets exact byte offsets; *{OFFSETS}*"
    yield "makes them as TRL does, the encoding of the teacher's text included. The paper's pointers (arXiv 2606.09456)"
    yield "are written from its description and its published code. `-`: does not know such tokenizers (TRL: ByteLevel"
    yield "ones only)."
    curves: dict[str, list[float]] = {}
    for n in lengths:
        results = [measure(s, t, n) for s, t in loaded]
        times = [times for times, _ in results]
        yield ""
        yield f"## Rows of {n:,} student tokens"
        yield ""
        yield "| ns a student token | " + " | ".join(headings) + " |"
        yield "|---|" + "--:|" * len(headings)
        for line in LINES:
            if any(line in found for found in times):
                cells = [number(found[line] * 1e9) if line in found else "-" for found in times]
                yield f"| {line} | " + " | ".join(cells) + " |"
                curves.setdefault(line, []).append(float(np.median([f[line] for f in times if line in f])) * 1e9)
        ratios = {
            "TRL, walk": [WALK],
            "TRL, offsets and walk": [OFFSETS, WALK],
            "the paper's pointers": [DECODE],
            "the same with its credit": [PUBLISHED],
        }
        for name, lines in ratios.items():
            sums = [sum(f[x] for x in lines) / f[KERNEL] if all(x in f for x in lines) else None for f in times]
            if any(sums):
                yield f"| {name} / xtokmap | " + " | ".join(f"**{x:,.0f}**" if x else "-" for x in sums) + " |"
        counts = [found for _, found in results]
        for line in (KERNEL, WALK, DECODE):
            if any(line in found for found in counts):
                cells = [f"{found[line]:,}" if line in found else "-" for found in counts]
                yield f"| chunks in a row: {line} | " + " | ".join(cells) + " |"
    yield ""
    command = [sys.executable, __file__, "--all-cores"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM")}
    yield from subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.split(
        "\n"
    )
    yield "## Rows of 16,384 tokens in which every byte differs, against a clean row of that length"
    yield ""
    yield from worst_cases()
    for line in MISSING.values():
        yield ""
        yield line
    draw(curves, lengths, plot)
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)


def on_all_cores(pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield f"## Encoding, and `retokenize`, of {BULK // 2048} rows of 2,048 student tokens, on all cores"
    yield ""
    yield "Decoding, encoding and alignment against encoding alone, milliseconds; every text is new to the engine."
    yield ""
    yield "| pair | engine | encoding alone | retokenize | ratio |"
    yield "|---|---|--:|--:|--:|"
    for s, t in pairs:
        for fast in (False, True):
            done = retokenize(side(s), side(t), fast)
            if done is not None:
                engine, encoding, whole = done
                cells = f"{engine} | {encoding * 1e3:.1f} | {whole * 1e3:.1f} | {whole / encoding:.2f}"
                yield f"| {NAMES[s]} → {NAMES[t]} | {cells} |"
    yield ""
    yield "## Building an `Aligner` from two files"
    yield ""
    yield "| pair | ids | first, ms | from the disk cache, ms |"
    yield "|---|--:|--:|--:|"
    for s, t in pairs:
        first, again = building(s, t)
        sizes = f"{len(side(s).table):,} + {len(side(t).table):,}"
        yield f"| {NAMES[s]} → {NAMES[t]} | {sizes} | {first * 1e3:.0f} | {again * 1e3:.0f} |"


def draw(curves: dict[str, list[float]], lengths: Sequence[int], target: Path) -> None:
    matplotlib = optional("matplotlib", "matplotlib")
    if matplotlib is None:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    axes.set_prop_cycle(color=[*pyplot.colormaps["tab10"].colors, "black"])
    for line, values in curves.items():
        own = line.startswith("xtokmap")
        axes.plot(lengths[: len(values)], values, "o-" if own else "s--", lw=2 if own else 1, ms=4, label=line)
    axes.set(xscale="log", yscale="log", xlabel="student tokens in a row", ylabel="nanoseconds a student token")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.set_title("Median of five pairs of tokenizers, one thread", fontsize=10)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(target, dpi=120, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=LENGTHS, help="lengths of rows")
    parser.add_argument("--all-cores", action="store_true", help="only the part that runs on all cores; prints it")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    pairs = []
    for pair in PAIRS:
        try:
            if all(real.path(name) for name in pair):
                pairs.append(pair)
        except pytest.skip.Exception as reason:  # noqa: PERF203
            MISSING[str(pair)] = f"Left out: {' → '.join(pair)}: {reason}."
    if args.all_cores:
        print(*on_all_cores(pairs), sep="\n")
        return
    lines = [line.rstrip() for line in report(args.tokens, pairs, RESULTS / "compare.png")]
    text = "\n".join(lines) + "\n"
    (RESULTS / "compare.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

"""Rows per second through datasets and Ray Data: python benches/arrow.py [rows]

A million rows of ids on both sides, Qwen's and DeepSeek's, aligned by a plain call, by `AlignColumns` on tables, and by
`AlignColumns` in the engines; each engine also with a function that hands its table back, for what it costs by itself.
Prints the table and writes it to benches/results/arrow.md. An engine that is not installed is left out and named.
"""

from __future__ import annotations

import os

os.environ.update(RAY_USAGE_STATS_ENABLED="0", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import importlib.metadata
import logging
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).parents[1]
sys.path.insert(1, str(ROOT / "tests"))

import real_tokenizers as real  # noqa: E402
import xtokmap  # noqa: E402
from xtokmap.integrations.arrow import AlignColumns  # noqa: E402
from xtokmap.tokenizers import text_codec  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "arrow.md"
#: Rows that differ; the others repeat them.
DISTINCT = 10_000
#: Rows of a batch.
BATCH = 10_000
WORKERS = 2


def hand_back(table: Any) -> Any:
    return table


def texts() -> list[str]:
    """Rows of 20 to 400 characters, of the source of Python's standard library."""
    rng = np.random.default_rng(0)
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    whole = "".join(file.read_text(encoding="utf-8") for file in files)
    sizes = rng.integers(20, 400, DISTINCT)
    starts = rng.integers(0, len(whole) - 400, DISTINCT)
    return [whole[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def column(flat: Any, cu: Any) -> Any:
    return pa.ListArray.from_arrays(pa.array(cu.astype(np.int32)), pa.array(flat.astype(np.int32)))


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def best_of(times: int, work: Callable[[], Any]) -> float:
    return min(seconds(work) for _ in range(times))


def plain(aligner: xtokmap.Aligner, table: Any) -> Iterator[tuple[str, int, float]]:
    """What runs in this process."""
    rows = len(table)
    part = table.slice(0, BATCH)
    sides = [part[name].to_pylist() for name in ("student", "teacher")]

    def one_by_one() -> None:
        for student, teacher in zip(*sides, strict=True):
            aligner.align(student, teacher)

    yield "`Aligner.align` for each row, of lists", len(part), seconds(one_by_one)
    lists = partial(aligner.align_batch, *sides, threads=1)
    yield "`align_batch` of lists of lists, 1 thread", len(part), seconds(lists)
    chunks = [(batch["student"], batch["teacher"]) for batch in table.to_batches(BATCH)]
    flat = [[(ids.flatten().to_numpy(), ids.offsets.to_numpy()) for ids in pair] for pair in chunks]

    def batches(threads: int | None) -> None:
        for (student, student_cu), (teacher, teacher_cu) in flat:
            first, second = student_cu - student_cu[0], teacher_cu - teacher_cu[0]
            aligner.align_batch(student, teacher, student_cu=first, teacher_cu=second, threads=threads)

    def columns(threads: int | None) -> None:
        align = AlignColumns(aligner, student_ids="student", teacher_ids="teacher", threads=threads)
        for batch in table.to_batches(BATCH):
            align(batch)

    for threads, said in ((1, "1 thread"), (None, "all threads")):
        yield f"`align_batch` of flat ids and `cu`, {said}", rows, best_of(3, partial(batches, threads))
        yield f"`AlignColumns` of record batches, {said}", rows, best_of(3, partial(columns, threads))


def with_datasets(functions: dict[str, Any], table: Any) -> Iterator[tuple[str, int, float]]:
    import datasets

    datasets.disable_progress_bars()
    folder = Path(tempfile.mkdtemp())
    try:
        datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(folder / "in")
        dataset = datasets.load_from_disk(folder / "in").with_format("arrow")

        def run(function: Any, processes: int | None) -> None:
            kept: Any = {"cache_file_name": str(folder / "out.arrow"), "load_from_cache_file": False}
            mapped = dataset.map(function, batched=True, batch_size=BATCH, num_proc=processes, **kept)
            assert len(mapped) == len(table)

        for processes in (None, WORKERS):
            for name, function in functions.items():
                took = seconds(partial(run, function, processes))
                yield f"datasets, `num_proc={processes}`: {name}", len(table), took
    finally:
        shutil.rmtree(folder)


def with_ray(functions: dict[str, Any], table: Any) -> Iterator[tuple[str, int, float]]:
    import ray
    import ray.data

    ray.init(num_cpus=WORKERS, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    folder = Path(tempfile.mkdtemp())
    try:
        import pyarrow.parquet as pq

        for k in range(0, len(table), 100_000):
            pq.write_table(table.slice(k, 100_000), folder / f"{k:09}.parquet", compression="none")
        engine: Any = {"batch_format": "pyarrow", "zero_copy_batch": True, "batch_size": BATCH}

        def run(function: Any) -> None:
            mapped = ray.data.read_parquet(str(folder)).map_batches(function, **engine)
            rows = sum(len(batch) for batch in mapped.iter_batches(batch_format="pyarrow", batch_size=None))
            assert rows == len(table)

        run(hand_back)  # the workers start, and import
        for name, function in functions.items():
            yield f"Ray Data, {WORKERS} workers: {name}", len(table), best_of(2, partial(run, function))
    finally:
        ray.shutdown()
        shutil.rmtree(folder)


def report(rows: int) -> Iterator[str]:
    student, teacher = real.encoding("qwen"), __import__("tokenizers").Tokenizer.from_file(str(real.path("deepseek")))
    aligner = xtokmap.Aligner(student, teacher)
    given = texts()
    ids = [text_codec(tokenizer).encode_batch(given) for tokenizer in (student, teacher)]
    part = pa.table({name: column(*side) for name, side in zip(("student", "teacher"), ids, strict=True)})
    table = pa.concat_tables([part] * (rows // DISTINCT))
    written = pa.table({"text": given * (rows // DISTINCT // 10)})
    packages = ("xtokmap", "numpy", "pyarrow", "datasets", "ray")
    installed = {dist.metadata["Name"] for dist in importlib.metadata.distributions()}
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages if name in installed]
    yield "# Rows per second through datasets and Ray Data"
    yield ""
    yield (
        f"Command: `python benches/arrow.py {rows}`. Python {platform.python_version()}, {', '.join(versions)}; "
        f"{os.cpu_count()} cores, on which {os.getloadavg()[0]:.0f} other processes wanted to run at the start."
    )
    yield ""
    yield (
        f"Rows of {len(ids[0][0]) / DISTINCT:.0f} student and {len(ids[1][0]) / DISTINCT:.0f} teacher tokens, Qwen and "
        f"DeepSeek V3, in batches of {BATCH:,}. datasets reads and writes Arrow files; Ray reads parquet, and its "
        "results are counted as they come. *nothing* hands the table back as it is. A line with texts has a tenth of "
        "the rows, and loads both tokenizers in every worker."
    )
    yield ""
    yield "| | rows | seconds | rows a second |"
    yield "|---|--:|--:|--:|"

    def line(name: str, rows: int, took: float) -> str:
        return f"| {name} | {rows:,} | {took:.2f} | {rows / took:,.0f} |"

    align = AlignColumns(aligner, student_ids="student", teacher_ids="teacher")
    functions = {"nothing": hand_back, "`AlignColumns`, two columns of ids": align}
    encoded = {"`AlignColumns`, texts": AlignColumns(aligner, text="text")}
    yield from (line(*measured) for measured in plain(aligner, table))
    for name, engine in (("datasets", with_datasets), ("ray", with_ray)):
        if name not in installed:
            print(f"{name} is left out: not installed", file=sys.stderr)
            continue
        yield from (line(*measured) for measured in engine(functions, table))
        yield from (line(*measured) for measured in engine(encoded, written))


def main() -> None:
    lines = []
    for line in report(int(sys.argv[1]) if sys.argv[1:] else 1_000_000):
        print(line, flush=True)
        lines.append(line)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

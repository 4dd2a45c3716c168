"""A corpus aligned in parallel: `python examples/align_columns.py STUDENT TEACHER texts.jsonl out [datasets|ray]`.

STUDENT and TEACHER are paths of tokenizers; each line of the file is an object with "text". The parquet files in `out`
have both sides' ids, the chunks, their spans and the coverage of every row.
"""

import sys
from pathlib import Path

import xtokmap
from xtokmap.integrations.arrow import AlignColumns


def with_datasets(align, file, out, processes=2):
    import datasets

    Path(out).mkdir(exist_ok=True)
    rows = datasets.load_dataset("json", data_files=file, split="train").with_format("arrow")
    rows.map(align, batched=True, batch_size=1000, num_proc=processes).to_parquet(f"{out}/part.parquet")


def with_ray(align, file, out):
    import ray.data

    rows = ray.data.read_json(file)
    rows.map_batches(align, batch_format="pyarrow", zero_copy_batch=True).write_parquet(out)


if __name__ == "__main__":
    student, teacher, file, out, engine = [*sys.argv[1:], "datasets"][:5]
    align = AlignColumns(xtokmap.Aligner(student, teacher), text="text")
    {"datasets": with_datasets, "ray": with_ray}[engine](align, file, out)

"""Files of prompts: what a run asks, and what it keeps for its evaluations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xtokmap._core import XTokMapError
from xtokmap.chat import Prompt
from xtokmap.files import check_name, decoded, obstacle

#: What a data set's splits are for.
_SPLITS = {"train": "train", "heldout": "heldout", "test": "heldout", "validation": "heldout"}

#: The same by the words that files are named with, which are those that `datasets` knows.
_WORDS = (
    _SPLITS | {"training": "train"} | dict.fromkeys(("testing", "eval", "evaluation", "valid", "val", "dev"), "heldout")
)

#: Fields of a row that are read.
_FIELDS = ("prompt", "messages", "tools", "chat_template_kwargs", "domain", "split")

#: Where a row stands, the row, and what it is for if it does not say so itself.
_Row = tuple[str, Any, str]


def read_prompts(path: str | Path) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts of a file or a data set.

    - `.jsonl`: an object a line, with `prompt` or `messages` and perhaps `tools`, `chat_template_kwargs` (`Prompt.of`)
      and `split`, train or heldout;
    - `.parquet`: such rows. Fields that are null there count as left out, since every row has the fields of all;
    - a folder that `datasets` has saved (`save_to_disk`): such rows, with splits train and heldout, test or validation;
    - any other folder: its .jsonl and .parquet files, also in folders inside; what they are for is told by a word of
      their names or their folders' such as train, heldout, test, validation, eval or dev;
    - any other file: text, a prompt a line.

    Raises:
        XTokMapError: nothing there, no training prompt in it, a row that cannot be used, by file, line or row, and
            field; or `datasets` is not installed and needed.
    """
    path = Path(path)
    check_name(str(path), repr(str(path)))
    if (problem := obstacle(path, inside=True)) is not None:
        raise XTokMapError(problem)
    if path.is_dir():
        rows = _folder(path)
    elif path.is_file():
        rows = _file(path)
    else:
        raise XTokMapError(f"{path}: no such prompt file; give a .jsonl, .parquet or .txt file, or a data set's folder")
    prompts: dict[str, list[Prompt]] = {"train": [], "heldout": []}
    for where, row, split in rows:
        if isinstance(row, Mapping) and "split" in row:
            split = row["split"]  # noqa: PLW2901
            if split not in ("train", "heldout"):
                raise XTokMapError(f"{where}: expected split train or heldout, got {split!r:.80}")
        prompts[split].append(Prompt.of(row, where))
    if not prompts["train"]:
        raise XTokMapError(f"{path}: no training prompt in it")
    return prompts["train"], prompts["heldout"]


def _file(path: Path, split: str = "train") -> Iterator[_Row]:
    if path.suffix == ".parquet":
        return _table(path, split)
    return _lines(path, split)


def _lines(path: Path, split: str) -> Iterator[_Row]:
    text = (
        decoded(path.read_bytes(), path, "; save it as UTF-8")
        .removeprefix("\ufeff")
        .replace("\r\n", "\n")
        .replace("\r", "\n")
    )
    # Not splitlines(), which also parts at U+2028 and its like: they may stand inside a prompt.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row: Any = line
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise XTokMapError(f'{where}: expected an object with "prompt" or "messages", got {line[:80]!r}')
        yield where, row, split


def _table(path: Path, split: str) -> Iterator[_Row]:
    datasets = _datasets(path)
    import pyarrow.parquet

    try:
        # Not Dataset.from_parquet, which makes a copy in the user's cache.
        data = datasets.Dataset(pyarrow.parquet.read_table(path))
        yield from _rows(data, str(path), split)
    except XTokMapError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        raise XTokMapError(f"{path}: cannot be read as parquet: {_one_line(error)}") from error


def _folder(path: Path) -> Iterator[_Row]:
    marks = ("dataset_dict.json",), ("dataset_info.json", "state.json")
    if any(all((path / name).is_file() for name in names) for names in marks):
        yield from _saved(path)
        return
    inside = sorted(f for f in path.rglob("*") if f.suffix in (".jsonl", ".parquet") and not f.is_dir())
    files = [f for f in inside if not any(part.startswith((".", "__")) for part in f.relative_to(path).parts)]
    if not files:
        raise XTokMapError(
            f"{path}: no prompts in it; a folder has .jsonl or .parquet files, or what datasets' save_to_disk writes"
        )
    for file in files:
        if (problem := obstacle(file)) is not None:
            raise XTokMapError(problem)
        if not file.is_file():
            raise XTokMapError(f"{file}: a link to nothing; take it out of the folder")
        yield from _file(file, _split_of(file.relative_to(path)))


def _saved(path: Path) -> Iterator[_Row]:
    datasets = _datasets(path)
    try:
        data = datasets.load_from_disk(str(path))
        parts = data if isinstance(data, Mapping) else {"train": data}
        for name, part in parts.items():
            if name not in _SPLITS:
                raise XTokMapError(f"{path}: split {name!r}: use one of {', '.join(_SPLITS)}")
            yield from _rows(part, f"{path}, split {name}", _SPLITS[name])
    except XTokMapError:
        raise
    except Exception as error:  # as in `_table`
        raise XTokMapError(f"{path}: datasets cannot read it: {_one_line(error)}") from error


def _rows(data: Any, source: str, split: str) -> Iterator[_Row]:
    names = [name for name in _FIELDS if name in data.column_names]
    if not {"prompt", "messages"} & set(names):
        found = ", ".join(map(repr, data.column_names)) or "none"
        raise XTokMapError(f'{source}: no column "prompt" or "messages"; there is {found}')
    for number, row in enumerate(data.select_columns(names)):  # the others may be pictures, which take long
        yield f"{source}, row {number}", _given(row), split


def _given(value: Any) -> Any:
    """A value without the fields that are null: a column's objects all have the fields of any of them."""
    if isinstance(value, Mapping):
        return {name: _given(part) for name, part in value.items() if part is not None}
    return [_given(part) for part in value] if isinstance(value, list) else value


def _split_of(file: Path) -> str:
    """What a file is for by its name (`data/test-00000-of-00001.parquet`), or by its folders'; else train."""
    for name in reversed(file.parts):
        for word in re.split("[^a-z]+", name.lower()):
            if word in _WORDS:
                return _WORDS[word]
    return "train"


def _datasets(path: Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise XTokMapError(f"{path}: reading it needs datasets: pip install datasets (or xtokmap[data])") from None
    return datasets


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

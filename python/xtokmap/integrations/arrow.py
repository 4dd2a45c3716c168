"""Alignment over columns: one callable for everything that maps Arrow tables (datasets, Ray Data, pyarrow itself)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from xtokmap import _core
from xtokmap._core import XTokMapError
from xtokmap.aligner import Aligner
from xtokmap.alignment import AlignmentBatch
from xtokmap.ids import Int64, _integers, _Rows

__all__ = ["AlignColumns"]

#: Columns that alignment adds, and those among them that are added where nothing else is said.
_COLUMNS = (*_core.ARRAYS, "coverage")
_USUAL = ("student_ptr", "teacher_ptr", "kind", "student_chunk", "teacher_chunk", "coverage")


class AlignColumns:
    """Arrow table -> the same table with its rows aligned; picklable, for `map` and `map_batches`.

        ds.with_format("arrow").map(AlignColumns(al, student_ids="s", teacher_ids="t"), batched=True, num_proc=4)
        ray_ds.map_batches(AlignColumns(al, student_ids="s"), batch_format="pyarrow", zero_copy_batch=True)
        AlignColumns(al, text="text")(table)

    A list column of Arrow is flat values and offsets, which is how the core takes a batch: nothing is done row by row
    in Python, and int32, int64 and uint32 ids are read where they lie (the chunks of a column that has several are
    first laid end to end).

    What is added, a row each, with the names and meanings of `Alignment`'s fields: lists of int32 `student_ptr` and
    `teacher_ptr` (the spans of the chunks), `student_chunk` and `teacher_chunk` (the chunk of every token, -1 where
    unaligned), of uint8 `kind`, and the float64 `coverage`. `columns` adds others of the fields. Ids that were made
    here are added as lists of int32, `student_ids` and `teacher_ids`.

    Args:
        aligner: pickled with what the columns need: for two columns of ids its byte tables, a megabyte or two each;
            to encode, also the tokenizer as the aligner got it (give it a path where all workers see the same disk).
        student_ids: name of the column with the student's ids, lists of integers of any Arrow kind.
        teacher_ids: name of the column with the teacher's. None: what `Aligner.retokenize` makes of the student's.
        text: name of a column of strings, in the place of both: both sides encode it, without special tokens.
        columns: what to add: fields of `Alignment`, and "coverage".
        strict: raise where the bytes differ.
        threads: as for `align_batch`; 1 where the engine has a process for each core, None for every core.

    Raises:
        XTokMapError: none or too many of the three input columns, or an unknown name in `columns`.
        UnsupportedTokenizerError: from a call that must encode with something that cannot (a `ByteTable`).
    """

    def __init__(
        self,
        aligner: Aligner,
        *,
        student_ids: str | None = None,
        teacher_ids: str | None = None,
        text: str | None = None,
        columns: Sequence[str] = _USUAL,
        strict: bool = False,
        threads: int | None = 1,
    ) -> None:
        if (text is None) == (student_ids is None) or (text is not None and teacher_ids is not None):
            raise XTokMapError(
                "AlignColumns: name the columns that are aligned: student_ids and teacher_ids, student_ids alone, or "
                f"text alone; got student_ids={student_ids!r}, teacher_ids={teacher_ids!r}, text={text!r}"
            )
        if isinstance(columns, str) or (unknown := [name for name in columns if name not in _COLUMNS]):
            wrong = columns if isinstance(columns, str) else unknown
            raise XTokMapError(f"columns: {wrong!r}; give a sequence of some of {', '.join(_COLUMNS)}")
        self.student_ids, self.teacher_ids, self.text = student_ids, teacher_ids, text
        self.columns, self.strict, self.threads = tuple(columns), strict, threads
        self._aligner = copy.copy(aligner)
        # Tokenizers that encode nothing here stay at home when this is pickled.
        if text is None:
            self._aligner._student_source = aligner.student
        if teacher_ids is not None:
            self._aligner._teacher_source = aligner.teacher
        if text is not None or teacher_ids is not None:
            self._aligner._voices = None  # no side is written as the other one has it

    def __repr__(self) -> str:
        names = {"student_ids": self.student_ids, "teacher_ids": self.teacher_ids, "text": self.text}
        return f"AlignColumns({', '.join(f'{key}={name!r}' for key, name in names.items() if name is not None)})"

    def __call__(self, table: Any) -> Any:
        """Align the rows of a `pyarrow.Table` or `RecordBatch`; what comes back is of the same type.

        Raises:
            TokenIdError, ByteMismatchError: as `Aligner.align_batch`; rows are counted within the table.
            XTokMapError: a column that is not there or not of such a type, or that is to be added and there already; a
                null in place of a row, an id or a text, with its row; more than 2^31 tokens in one table.
        """
        if isinstance(table, pa.RecordBatch):
            whole = self(pa.Table.from_batches([table]))
            return pa.RecordBatch.from_arrays([_one(column) for column in whole.columns], schema=whole.schema)
        if not isinstance(table, pa.Table):
            raise XTokMapError(
                f"AlignColumns: expected a pyarrow.Table, got {type(table).__name__}; use with_format('arrow') and "
                "batched=True in datasets, batch_format='pyarrow' in Ray Data"
            )
        student, teacher, made = self._sides(table)
        batch = self._aligner._align(student, teacher, strict=self.strict, threads=self.threads)
        for name in self.columns:
            made[name] = pa.array(_coverage(batch)) if name == "coverage" else _lists(*_field(batch, name))
        for name, column in made.items():
            if name in table.column_names:
                raise XTokMapError(f"column {name!r} is to be added and there already; rename or drop it first")
            table = table.append_column(name, column)
        return table

    def _sides(self, table: pa.Table) -> tuple[_Rows, _Rows, dict[str, Any]]:
        """Both sides' ids, and those that were not there as columns to add."""
        if self.text is not None:
            texts = _texts(_column(table, self.text), self.text)
            student = _Rows(*self._aligner._student_codec.encode_batch(texts))
            teacher = _Rows(*self._aligner._teacher_codec.encode_batch(texts))
            return student, teacher, {"student_ids": _id_lists(student), "teacher_ids": _id_lists(teacher)}
        assert self.student_ids is not None
        student = _ids(_column(table, self.student_ids), self.student_ids)
        if self.teacher_ids is None:
            teacher = self._aligner._encode(student, None, None, self.threads)
            return student, teacher, {"teacher_ids": _id_lists(teacher)}
        return student, _ids(_column(table, self.teacher_ids), self.teacher_ids), {}


# ---- in ------------------------------------------------------------------------------------------------------------


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if (found := table.column_names.count(name)) != 1:
        raise XTokMapError(f"column {name!r}: the table has {found} of that name; its columns are {table.column_names}")
    return table.column(name)


def _ids(column: pa.ChunkedArray, name: str) -> _Rows:
    """A column of lists as the core takes ids. One chunk is not copied, but for offsets that are not 64 bits from 0."""
    rows, parts = 0, []
    for chunk in column.chunks:
        parts.append(_chunk_ids(chunk, name, rows))
        rows += len(chunk)
    if len(parts) == 1:
        return parts[0]
    flat = np.concatenate([part.ids for part in parts]) if parts else np.zeros(0, np.int64)
    ends = np.cumsum([0, *(len(part.ids) for part in parts)], dtype=np.int64)
    cu = [part.layout[1:] + end for part, end in zip(parts, ends, strict=False)]
    return _Rows(_integers(flat, name), np.concatenate([ends[:1], *cu]))


def _chunk_ids(array: pa.Array, name: str, row: int) -> _Rows:
    """One chunk; `row` is its first one."""
    kind = array.type
    if max(getattr(kind, "ndim", 1), len(getattr(kind, "shape", ()))) > 1:
        _refused(kind, name)
    _no_null(array, name, row)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_struct(array.type) and array.type.get_field_index("data") >= 0:  # Ray's arrays of different lengths
        array = array.field("data")
        _no_null(array, name, row)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        cu = array.offsets.to_numpy()
    elif _is_other_list(array.type):
        cu = np.zeros(len(array) + 1, np.int64)
        np.cumsum(pc.list_value_length(array).to_numpy(), out=cu[1:])
    else:
        _refused(kind, name)
    if cu[0] or cu.dtype != np.int64:
        cu = cu.astype(np.int64) - cu[0]
    flat = array.flatten()
    if flat.null_count:
        position = pc.index(flat.is_null(), True).as_py()
        b = int(np.searchsorted(cu, position, side="right")) - 1
        raise XTokMapError(
            f"column {name!r}, row {row + b}: null in place of id {position - cu[b]}; drop such rows or fill them first"
        )
    if len(flat) and not pa.types.is_integer(flat.type):
        _refused(kind, name)
    ids = flat.to_numpy() if len(flat) else np.zeros(0, np.int64)  # also where nothing said of what type nothing is
    return _Rows(_integers(ids, f"column {name!r}"), cu)


def _is_other_list(kind: pa.DataType) -> bool:
    return any(getattr(pa.types, f"is_{name}")(kind) for name in ("fixed_size_list", "list_view", "large_list_view"))


def _texts(column: pa.ChunkedArray, name: str) -> list[str]:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not any(getattr(pa.types, f"is_{text}")(kind) for text in ("string", "large_string", "string_view", "null")):
        raise XTokMapError(f"column {name!r}: expected strings, got {column.type}; cast it first")
    _no_null(column, name, 0)
    try:
        texts: list[str] = column.to_pylist()
    except UnicodeDecodeError as error:
        raise XTokMapError(f"column {name!r}: a text that is not UTF-8 ({error.reason}); decode it first") from None
    return texts


def _no_null(array: Any, name: str, row: int) -> None:
    if array.null_count:
        row += pc.index(array.is_null(), True).as_py()
        raise XTokMapError(f"column {name!r}, row {row}: null; drop such rows or fill them first")


def _refused(kind: pa.DataType, name: str) -> NoReturn:
    raise XTokMapError(f"column {name!r}: expected lists of integers, a row of ids each, got {kind}")


# ---- out -----------------------------------------------------------------------------------------------------------


def _field(batch: AlignmentBatch, name: str) -> tuple[npt.NDArray[Any], Int64]:
    """A field of the batch, flat, and where its rows lie."""
    if name.endswith("_ptr"):
        cu = batch.chunk_cu + np.arange(len(batch) + 1)
    elif name == "kind":
        cu = batch.chunk_cu
    else:
        cu = batch.teacher_cu if name in ("teacher_chunk", "teacher_end") else batch.student_cu
    return getattr(batch, name), cu


def _coverage(batch: AlignmentBatch) -> npt.NDArray[np.float64]:
    """Coverage of every row."""
    scored = np.concatenate([np.zeros(1, np.int64), np.cumsum(batch.scored, dtype=np.int64)])
    tokens = np.diff(batch.student_cu)
    return np.where(tokens > 0, np.diff(scored[batch.student_cu]) / np.maximum(tokens, 1), 1.0)


def _id_lists(rows: _Rows) -> pa.Array:
    return _lists(rows.ids.astype(np.int32), rows.layout)


def _lists(flat: npt.NDArray[Any], cu: Int64) -> pa.Array:
    if cu[-1] > np.iinfo(np.int32).max:
        raise XTokMapError(f"{cu[-1]} tokens in one table, more than Arrow's lists hold; map smaller batches")
    return pa.ListArray.from_arrays(pa.array(cu.astype(np.int32)), pa.array(flat))


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

"""AlignColumns: whatever a table is made of, its rows are aligned as `Aligner` aligns them."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xtokmap
from xtokmap import Aligner, ByteTable, XTokMapError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

from xtokmap.integrations.arrow import AlignColumns  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:fastokens gives other ids")

FIELDS = ["student_ptr", "teacher_ptr", "kind", "student_chunk", "teacher_chunk", "student_end", "teacher_end"]
FIELDS += ["teacher_pos", "teacher_off"]
#: Letters of different lengths on both sides, a special token each, and on the student's a byte that is no UTF-8.
STUDENT = ByteTable.from_bytes([b"a", b"b", b"ab", b"ba", b"aab", None, b"\xff"], stop_ids=[5])
TEACHER = ByteTable.from_bytes([b"b", b"a", b"bb", b"aa", b"abab", None], stop_ids=[5])


@pytest.fixture(scope="module")
def aligner() -> Aligner:
    return Aligner(STUDENT, TEACHER)


def check(out: Any, aligner: Aligner, student: list[list[int]], teacher: list[list[int]]) -> None:
    """Every row of a table's columns is what `align` says of it."""
    assert out.num_rows == len(student) == len(teacher)
    columns = {name: out[name].to_pylist() for name in [*FIELDS, "coverage"]}
    batch = aligner.align_batch(student, teacher)
    for b in range(len(student)):
        a = batch[b]
        for name in FIELDS:
            assert columns[name][b] == getattr(a, name).tolist(), (b, name)
        assert columns["coverage"][b] == a.coverage


# ---- layouts ---------------------------------------------------------------------------------------------------------

VALUES = {"int32": pa.int32(), "int64": pa.int64(), "uint32": pa.uint32(), "int8": pa.int8(), "uint16": pa.uint16()}
VALUES["uint64"] = pa.uint64()


@st.composite
def columns(draw: st.DrawFn, rows: list[list[int]]) -> Any:
    """A column that holds `rows`, in one of the ways in which Arrow can hold them."""
    value = draw(st.sampled_from(list(VALUES.values())))
    fixed = [["fixed"]] * (len({len(row) for row in rows}) == 1)
    kinds = draw(st.sampled_from([["list", "raw offsets"], ["large"], ["view", "shuffled"], ["large view"], *fixed]))
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    chunks = []
    for start, stop in zip([0, *cuts], [*cuts, len(rows)], strict=True):
        size = st.integers(0, 3) if kinds != ["fixed"] else st.just(len(rows[0]))
        around = st.lists(size.flatmap(lambda n: st.lists(st.integers(0, 4), min_size=n, max_size=n)), max_size=2)
        before, behind = draw(around), draw(around)
        whole = [*before, *rows[start:stop], *behind]
        array = _array(whole, value, draw(st.sampled_from(kinds)), len(rows[0]) if rows else 0, draw)
        chunks.append(array[len(before) : len(before) + stop - start])
    return pa.chunked_array(chunks)


def _array(rows: list[list[int]], value: Any, kind: str, width: int, draw: st.DrawFn) -> Any:
    if kind == "fixed":
        return pa.array(rows, pa.list_(value, width))
    if kind == "shuffled":  # a list view whose rows lie in another order than they come
        order = draw(st.permutations(range(len(rows)))) if rows else []
        starts, flat = [0] * len(rows), []
        for b in order:
            starts[b] = len(flat)
            flat += rows[b]
        sizes = pa.array(list(map(len, rows)), pa.int32())
        return pa.ListViewArray.from_arrays(pa.array(starts, pa.int32()), sizes, pa.array(flat, value))
    if kind == "raw offsets":  # that do not start at 0, with values behind the last
        ends = np.cumsum([2, *map(len, rows)], dtype=np.int32)
        flat = [3, 3, *(i for row in rows for i in row), 4]
        return pa.ListArray.from_arrays(pa.array(ends), pa.array(flat, value))
    make = {"list": pa.list_, "large": pa.large_list, "view": pa.list_view, "large view": pa.large_list_view}[kind]
    return pa.array(rows, make(value))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_the_layout(data: st.DataObject) -> None:
    aligner = Aligner(STUDENT, TEACHER)
    size = data.draw(st.integers(0, 6))

    def ids(limit: int) -> list[list[int]]:
        width = data.draw(st.none() | st.integers(0, 3))
        row = st.lists(st.integers(0, limit), min_size=width or 0, max_size=6 if width is None else width)
        return data.draw(st.lists(row, min_size=size, max_size=size))

    student, teacher = ids(6), ids(5)
    table = pa.table({"s": data.draw(columns(student)), "t": data.draw(columns(teacher)), "k": list(range(size))})
    align = AlignColumns(aligner, student_ids="s", teacher_ids="t", columns=[*FIELDS, "coverage"])
    assert (table["s"].to_pylist(), table["t"].to_pylist()) == (student, teacher)
    out = align(table)
    check(out, aligner, student, teacher)
    assert out.select(["s", "t", "k"]).equals(table)
    out.validate(full=True)


def test_ids_are_read_where_they_lie(aligner: Aligner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The core gets the memory of the column, of a slice the memory of its part, and 64-bit offsets as they are."""
    given: list[Any] = []
    align = Aligner._align

    def watched(self: Aligner, student: Any, teacher: Any, **kwargs: Any) -> Any:
        given.append((student, teacher))
        return align(self, student, teacher, **kwargs)

    monkeypatch.setattr(Aligner, "_align", watched)
    rows = [[0, 1], [2], [], [0, 1, 4]]
    for value in (pa.int32(), pa.int64(), pa.uint32()):
        for make in (pa.list_, pa.large_list):
            table = pa.table({"s": pa.array(rows, make(value)), "t": pa.array(rows, make(value))})
            for part, skipped in ((table, 0), (table[1:], 2)):
                AlignColumns(aligner, student_ids="s", teacher_ids="t")(part)
                for name, side in zip("st", given.pop(), strict=True):
                    whole = part[name].chunk(0)
                    assert side.ids.dtype == value.to_pandas_dtype()
                    assert side.ids.ctypes.data == whole.values.buffers()[1].address + skipped * side.ids.itemsize
                    shared = np.shares_memory(side.layout, whole.offsets.to_numpy())
                    assert shared == (make is pa.large_list and not skipped)


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.list_(pa.null()), pa.list_view(pa.int64())])
def test_no_rows(aligner: Aligner, kind: Any) -> None:
    align = AlignColumns(aligner, student_ids="s", teacher_ids="t", columns=[*FIELDS, "coverage"])
    for column in (pa.chunked_array([], kind), pa.chunked_array([[], []], kind), pa.array([], kind)):
        check(align(pa.table({"s": column, "t": column})), aligner, [], [])
    check(align(pa.table({"s": pa.array([[], []], kind), "t": [[], [1]]})), aligner, [[], []], [[], [1]])


def test_a_batch_of_records_stays_one(aligner: Aligner) -> None:
    student, teacher = [[0, 1], [2]], [[1, 0], [1, 0]]
    align = AlignColumns(aligner, student_ids="s", teacher_ids="t", columns=[*FIELDS, "coverage"])
    table = pa.table({"s": student, "t": teacher})
    for rows in (2, 0):
        out = align(pa.RecordBatch.from_pydict({"s": student, "t": teacher}).slice(0, rows))
        assert isinstance(out, pa.RecordBatch)
        assert out.schema.equals(align(table).schema) or not rows
        check(pa.Table.from_batches([out]), aligner, student[:rows], teacher[:rows])


def test_what_is_added_by_default(aligner: Aligner) -> None:
    table = pa.table({"s": [[2, 0]], "t": [[1, 0, 1]]}, metadata={"of": "the user"})
    out = AlignColumns(aligner, student_ids="s", teacher_ids="t")(table)
    assert out.schema.metadata == {b"of": b"the user"}
    assert out.drop_columns(["s", "t"]).to_pylist() == [
        {
            "student_ptr": [0, 1, 2],
            "teacher_ptr": [0, 2, 3],
            "kind": [xtokmap.Kind.ONE_TO_MANY, xtokmap.Kind.ONE_TO_ONE],
            "student_chunk": [0, 1],
            "teacher_chunk": [0, 0, 1],
            "coverage": 1.0,
        }
    ]
    types = [pa.list_(pa.int32())] * 2 + [pa.list_(pa.uint8())] + [pa.list_(pa.int32())] * 2 + [pa.float64()]
    assert out.schema.types[2:] == types


def test_results_outlive_the_batches_after_them(aligner: Aligner) -> None:
    """The aligner uses the memory of a batch again, but not while a table looks at it."""
    align = AlignColumns(aligner, student_ids="s", teacher_ids="t", columns=[*FIELDS, "coverage"])
    rng = random.Random(1)
    made = []
    for _ in range(8):
        student = [[rng.randrange(5) for _ in range(50)] for _ in range(40)]
        teacher = [[rng.randrange(5) for _ in range(50)] for _ in range(40)]
        made.append((align(pa.table({"s": student, "t": teacher})), student, teacher))
    for out, student, teacher in made:
        check(out, aligner, student, teacher)


def test_tensors_of_extension_types(aligner: Aligner) -> None:
    rows = np.asarray([[0, 1], [2, 4], [4, 4]], np.int32)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(rows)
    align = AlignColumns(aligner, student_ids="s", teacher_ids="t", columns=[*FIELDS, "coverage"])
    out = align(pa.table({"s": tensors[1:], "t": tensors[:2]}))
    check(out, aligner, rows[1:].tolist(), rows[:2].tolist())
    square = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((2, 2, 2), np.int32))
    with pytest.raises(XTokMapError, match=r"column 's': expected lists of integers, a row of ids each, got extension"):
        align(pa.table({"s": square, "t": tensors[:2]}))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([[0], None, [1]]), r"column 's', row 1: null; drop such rows or fill them first"),
        (pa.array([[9], [0], None, [1]])[1:], r"column 's', row 1: null"),
        (pa.chunked_array([[[0], [1]], [None]], pa.list_(pa.int64())), r"column 's', row 2: null"),
        (pa.array([[0, 0], None, [1, 1]], pa.list_(pa.int32(), 2)), r"column 's', row 1: null"),
        (pa.array([[], [0, 1, None], [1]]), r"column 's', row 1: null in place of id 2"),
        (pa.array([[0, None], [0, 1], [None]])[1:], r"column 's', row 1: null in place of id 0"),
        (
            pa.chunked_array([[[0], [1]], [[1, None]]], pa.list_(pa.int64())),
            r"column 's', row 2: null in place of id 1",
        ),
        (pa.array([[], [None], []]), r"column 's', row 1: null in place of id 0"),
        (pa.array([None, None, None]), r"column 's', row 0: null"),
        (pa.array([[0.5], [], []]), r"column 's': expected lists of integers, a row of ids each, got list<.*: double>"),
        (pa.array([[[0]], [], []]), r"column 's': expected lists of integers, a row of ids each, got list<.*list<"),
        (pa.array([[True], [], []]), r"column 's': expected lists of integers, a row of ids each, got list<.*: bool>"),
        (pa.array([0, 1, 2]), r"column 's': expected lists of integers, a row of ids each, got int64"),
        (pa.array(["a", "b", "c"]), r"column 's': expected lists of integers, a row of ids each, got string"),
        (pa.array([{"a": 1}] * 3), r"column 's': expected lists of integers, a row of ids each, got struct<a: int64>"),
        (pa.array([[0], [2**63], []], pa.list_(pa.uint64())), r"column 's': id 9223372036854775808 is larger than any"),
    ],
)
def test_what_are_no_rows_of_ids_is_named(aligner: Aligner, column: Any, message: str) -> None:
    rows = pa.array([[0]] * len(column))
    with pytest.raises(XTokMapError, match=message):
        AlignColumns(aligner, student_ids="s", teacher_ids="t")(pa.table({"s": column, "t": rows}))


def test_errors_of_the_aligner_name_the_row(aligner: Aligner) -> None:
    table = pa.table({"s": [[0], [0, 99]], "t": [[1], [1, 1]]})
    with pytest.raises(xtokmap.TokenIdError) as raised:
        AlignColumns(aligner, student_ids="s", teacher_ids="t")(table)
    assert (raised.value.row, raised.value.position, raised.value.id) == (1, 1, 99)
    table = pa.table({"s": [[0], [0, 0]], "t": [[1], [1, 0]]})
    with pytest.raises(xtokmap.ByteMismatchError) as mismatch:
        AlignColumns(aligner, student_ids="s", teacher_ids="t", strict=True)(table)
    assert mismatch.value.row == 1


def test_what_does_not_fit_the_table_is_named(aligner: Aligner) -> None:
    align = AlignColumns(aligner, student_ids="s", teacher_ids="t")
    table = pa.table({"s": [[0]], "t": [[1]]})
    with pytest.raises(XTokMapError, match=r"column 't': the table has 0 of that name; .* \['s', 'kind'\]"):
        align(pa.table({"s": [[0]], "kind": [1]}))
    with pytest.raises(XTokMapError, match="column 's': the table has 2 of that name"):
        align(table.append_column("s", table["s"]))
    with pytest.raises(XTokMapError, match="column 'student_ptr' is to be added and there already; rename or drop it"):
        align(align(table))
    with pytest.raises(XTokMapError, match=r"expected a pyarrow.Table, got dict; use with_format\('arrow'\)"):
        align({"s": [[0]], "t": [[1]]})


def test_what_the_callable_is_asked_must_be_one_thing(aligner: Aligner) -> None:
    for names in ({}, {"teacher_ids": "t"}, {"text": "x", "student_ids": "s"}, {"text": "x", "teacher_ids": "t"}):
        with pytest.raises(XTokMapError, match="name the columns that are aligned"):
            AlignColumns(aligner, **names)  # type: ignore[arg-type]
    with pytest.raises(XTokMapError, match=r"columns: \['chunks'\]; give a sequence of some of student_ptr, "):
        AlignColumns(aligner, student_ids="s", columns=["kind", "chunks"])
    with pytest.raises(XTokMapError, match="columns: 'kind'; give a sequence"):
        AlignColumns(aligner, student_ids="s", columns="kind")
    assert repr(AlignColumns(aligner, student_ids="s")) == "AlignColumns(student_ids='s')"


# ---- texts and retokenizing ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoding() -> Aligner:
    pytest.importorskip("torch")  # tiny's models; its tokenizers are what is wanted
    tiny = pytest.importorskip("tiny")
    return Aligner(tiny.student_tokenizer(), tiny.teacher_tokenizer())


TEXTS = ["the quick brown fox", "", "naïve café, 你好", "x = 42\n", "🙂 the sky"]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_texts_are_encoded_for_both_sides(encoding: Aligner, kind: Any) -> None:
    align = AlignColumns(encoding, text="text", columns=[*FIELDS, "coverage"])
    column = pa.chunked_array([pa.array(["left out", *TEXTS[:2]]).cast(kind)[1:], pa.array(TEXTS[2:]).cast(kind)])
    out = align(pa.table({"text": column}))
    student, teacher = out["student_ids"].to_pylist(), out["teacher_ids"].to_pylist()
    sides = ((encoding._student_source, student), (encoding._teacher_source, teacher))
    for source, ids in sides:
        assert ids == [source.encode(text, add_special_tokens=False) for text in TEXTS]
    assert out.schema.field("student_ids").type == out.schema.field("teacher_ids").type == pa.list_(pa.int32())
    check(out, encoding, student, teacher)
    again = pickle.loads(pickle.dumps(align))(pa.table({"text": column}))
    assert again.equals(out)


@pytest.mark.parametrize("rows", [[], [""], ["", ""]])
def test_no_text_at_all(encoding: Aligner, rows: list[str]) -> None:
    out = AlignColumns(encoding, text="text")(pa.table({"text": pa.array(rows, pa.string())}))
    assert out["teacher_ids"].to_pylist() == [[]] * len(rows)
    assert out["coverage"].to_pylist() == [1.0] * len(rows)


def test_texts_that_are_none_are_named(encoding: Aligner) -> None:
    align = AlignColumns(encoding, text="text")
    with pytest.raises(XTokMapError, match=r"column 'text', row 2: null"):
        align(pa.table({"text": pa.chunked_array([["a"], ["b", None]])}))
    with pytest.raises(XTokMapError, match=r"column 'text': expected strings, got list<"):
        align(pa.table({"text": [["a"]]}))
    damaged = pa.Array.from_buffers(pa.string(), 1, pa.array([b"a\xff"]).buffers())
    with pytest.raises(XTokMapError, match=r"column 'text': a text that is not UTF-8"):
        align(pa.table({"text": damaged}))


def test_the_students_ids_are_retokenized(encoding: Aligner) -> None:
    tokenizer = encoding._student_source
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    rows[0].append(tokenizer.eos_token_id)
    align = AlignColumns(encoding, student_ids="s", columns=[*FIELDS, "coverage"])
    expected, _ = encoding.retokenize(rows)
    for copied in (align, pickle.loads(pickle.dumps(align))):
        out = copied(pa.table({"s": rows}))
        assert out["teacher_ids"].to_pylist() == [ids.tolist() for ids in expected]
        check(out, encoding, rows, out["teacher_ids"].to_pylist())


def test_a_table_of_bytes_cannot_encode(aligner: Aligner) -> None:
    with pytest.raises(xtokmap.UnsupportedTokenizerError, match="a ByteTable cannot encode"):
        AlignColumns(aligner, student_ids="s")(pa.table({"s": [[0]]}))
    with pytest.raises(xtokmap.UnsupportedTokenizerError, match="a ByteTable cannot encode"):
        AlignColumns(aligner, text="x")(pa.table({"x": ["a"]}))


# ---- pickles ---------------------------------------------------------------------------------------------------------


def test_an_aligner_pickles_with_all_that_it_can_do(encoding: Aligner) -> None:
    rows = [encoding._student_source.encode(text, add_special_tokens=False) for text in TEXTS]
    expected, batch = encoding.retokenize(rows)
    for other in (pickle.loads(pickle.dumps(encoding)), copy.copy(encoding), copy.deepcopy(encoding)):
        ids, again = other.retokenize(rows)
        assert [row.tolist() for row in ids] == [row.tolist() for row in expected]
        np.testing.assert_array_equal(again.student_chunk, batch.student_chunk)
        assert other.student_rule == encoding.student_rule
        queries, original = other.cover_queries(again), encoding.cover_queries(batch)
        np.testing.assert_array_equal(queries.indptr, original.indptr)
    assert copy.copy(encoding).student is encoding.student


def test_a_pickle_holds_what_is_needed(encoding: Aligner) -> None:
    """For ids on both sides their bytes; what encodes one side, for that; both for texts."""
    tables = len(pickle.dumps((encoding.student, encoding.teacher)))
    sources = [len(pickle.dumps(source)) for source in (encoding._student_source, encoding._teacher_source)]
    ids = len(pickle.dumps(AlignColumns(encoding, student_ids="s", teacher_ids="t")))
    student = len(pickle.dumps(AlignColumns(encoding, student_ids="s")))
    both = len(pickle.dumps(AlignColumns(encoding, text="x")))
    assert ids < tables + 1000
    assert tables + sources[1] < student < tables + sources[1] + 1000
    assert tables + sum(sources) - 2000 < both < tables + sum(sources) + 1000


def test_a_byte_table_pickles_by_its_bytes() -> None:
    tokens = [f"token {i}".encode() for i in range(50_000)]
    assert len(pickle.dumps(ByteTable.from_bytes(tokens))) < sum(map(len, tokens)) + 5 * len(tokens) + 1000


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_processes(aligner: Aligner, method: str) -> None:
    align = AlignColumns(aligner, student_ids="s", teacher_ids="t")
    table = pa.table({"s": [[0, 1], [2]], "t": [[1, 0], [1, 0]]})
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert all(out.equals(align(table)) for out in pool.map(align, [table] * 4))


# ---- datasets --------------------------------------------------------------------------------------------------------


def _rows(count: int, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Rows that spell the same on both sides, mostly."""
    rng = random.Random(seed)
    student, teacher = [], []
    for _ in range(count):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(12)))
        student.append([b"ab".index(c) for c in text.encode()] + [5] * rng.randrange(2))
        teacher.append([b"ba".index(c) for c in text.encode()] + [5] * rng.randrange(2))
    return student, teacher


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("processes", [None, 2])
def test_datasets(aligner: Aligner, processes: int | None, tmp_path: Any) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    student, teacher = _rows(500)
    table = pa.table({"s": student, "t": teacher})
    dataset = datasets.Dataset(datasets.table.InMemoryTable(table)).with_format("arrow")
    align = AlignColumns(aligner, student_ids="s", teacher_ids="t", columns=[*FIELDS, "coverage"])
    kept: Any = {"cache_file_name": str(tmp_path / "mapped.arrow")} if processes else {}
    out = dataset.map(align, batched=True, batch_size=64, num_proc=processes, **kept)
    check(out.with_format("arrow")[:], aligner, student, teacher)
    assert out.features["student_chunk"] == datasets.List(datasets.Value("int32"))


def test_datasets_knows_the_callable_again(aligner: Aligner) -> None:
    """A second run finds its results: the hash is that of what the callable does."""
    fingerprint = pytest.importorskip("datasets.fingerprint")

    def hashed(aligner: Aligner, **kwargs: Any) -> str:
        return fingerprint.Hasher.hash(AlignColumns(aligner, student_ids="s", **kwargs))

    first = hashed(aligner, teacher_ids="t")
    assert hashed(Aligner(STUDENT, TEACHER), teacher_ids="t") == first
    assert first not in (
        hashed(aligner),
        hashed(aligner, teacher_ids="u"),
        hashed(aligner, teacher_ids="t", strict=True),
    )
    assert hashed(Aligner(TEACHER, STUDENT), teacher_ids="t") != first


# ---- Ray -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_data() -> Any:
    ray = pytest.importorskip("ray", reason="ray is not installed here: make test-ray has an environment")
    data = pytest.importorskip("ray.data")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    data.DataContext.get_current().enable_progress_bars = False
    yield data
    ray.shutdown()


def _in_order(dataset: Any, name: str = "k") -> Any:
    return pa.concat_tables(list(dataset.iter_batches(batch_format="pyarrow", batch_size=None))).sort_by(name)


@pytest.mark.filterwarnings("ignore")
def test_ray(aligner: Aligner, ray_data: Any) -> None:
    student, teacher = _rows(500)
    table = pa.table({"s": student, "t": teacher, "k": list(range(500))})
    dataset = ray_data.from_arrow([table[:200], table[200:]])
    asked: Any = {"student_ids": "s", "teacher_ids": "t", "columns": [*FIELDS, "coverage"]}
    engine: Any = {"batch_format": "pyarrow", "zero_copy_batch": True, "batch_size": 64}
    check(_in_order(dataset.map_batches(AlignColumns(aligner, **asked), **engine)), aligner, student, teacher)
    # As a class, which each of two actors makes once.
    actors = dataset.map_batches(
        AlignColumns, fn_constructor_args=(aligner,), fn_constructor_kwargs=asked, concurrency=2, **engine
    )
    check(_in_order(actors), aligner, student, teacher)


@pytest.mark.filterwarnings("ignore")
def test_rays_tensors(aligner: Aligner, ray_data: Any) -> None:
    """What comes out of a `map_batches` over numpy: arrays of one length, and of several."""
    student, teacher = _rows(40)
    fixed = [[0, 1]] * 40
    rows = zip(student, teacher, fixed, strict=True)
    items = [
        {"k": k, "s": np.asarray(s, np.int64), "t": np.asarray(t, np.int64), "f": np.asarray(f)}
        for k, (s, t, f) in enumerate(rows)
    ]
    dataset = ray_data.from_items(items, override_num_blocks=1)
    for name, other in (("t", teacher), ("f", fixed)):
        align = AlignColumns(aligner, student_ids="s", teacher_ids=name, columns=[*FIELDS, "coverage"])
        out = _in_order(dataset.map_batches(align, batch_format="pyarrow", zero_copy_batch=True))
        check(out, aligner, student, other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_million_rows_over_two_workers(aligner: Aligner, ray_data: Any) -> None:
    student, teacher = _rows(100_000)
    part = pa.table({"s": student, "t": teacher})
    blocks = [part.append_column("k", pa.array(range(k * 100_000, (k + 1) * 100_000))) for k in range(10)]
    align = AlignColumns(aligner, student_ids="s", teacher_ids="t")
    mapped = ray_data.from_arrow(blocks).map_batches(align, batch_format="pyarrow", zero_copy_batch=True)
    out = _in_order(mapped)
    expected = align(pa.concat_tables(blocks))
    assert out.num_rows == 1_000_000
    assert out.select(expected.column_names).combine_chunks().equals(expected.combine_chunks())


# ---- the example -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["datasets", "ray"])
def test_the_example_runs(encoding: Aligner, engine: str, tmp_path: Path) -> None:
    pytest.importorskip(engine, reason="make test-ray has an environment with it")
    paths = []
    for name, tokenizer in (("student", encoding._student_source), ("teacher", encoding._teacher_source)):
        tokenizer.save_pretrained(tmp_path / name)
        paths.append(str(tmp_path / name))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 20))
    example = Path(__file__).parents[1] / "examples" / "align_columns.py"
    assert len(example.read_text(encoding="utf-8").splitlines()) < 40
    command = [sys.executable, str(example), *paths, str(tmp_path / "texts.jsonl"), str(tmp_path / "out"), engine]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    out = pa.concat_tables([parquet.read_table(file) for file in sorted((tmp_path / "out").glob("*.parquet"))])
    assert sorted(out["text"].to_pylist()) == sorted(TEXTS * 20)
    ids = [out[name].to_pylist() for name in ("student_ids", "teacher_ids")]
    assert ids[0] == [
        encoding._student_source.encode(text, add_special_tokens=False) for text in out["text"].to_pylist()
    ]
    batch = encoding.align_batch(*ids)
    assert out["coverage"].to_pylist() == [row.coverage for row in batch]
    assert out["kind"].to_pylist() == [row.kind.tolist() for row in batch]

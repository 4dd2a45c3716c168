"""Markers in the core: laws against the oracle, tables that carry them, what stands aside."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from oracle import SPECIAL, STOP, Mark, Tokens
from test_alignment import law, same
from xtokmap import Aligner, ByteTable, Kind, XTokMapError
from xtokmap.tokenizers import cache

#: Markers of two families, of one token, of several, of plain text. Numbers are special tokens; no text has a + in it.
STUDENT = {
    "think_open": [[0]],
    "think_close": [[1, b"+"]],
    "call_open": [[2], [2, b"+"]],
    "call_close": [[b"<", b"+"]],
    "answer_open": [[3, b"+"]],
}
TEACHER = {
    "think_open": [[0, b"+", 1]],
    "think_close": [[2, 3], [2]],
    "call_open": [[0, b"++"]],
    "call_close": [[4]],
}
#: Of these the first tokens say the same on both sides: a teacher's 0 opens either of two, `<` is text.
PAIRS = ("think_close",)


def table(marks: dict, row: list) -> tuple[ByteTable, list[int]]:
    """A table with these markers, and a row's ids."""
    vocabulary: list = [SPECIAL, STOP, *range(5), b"<", b"+", b"++"]
    vocabulary += dict.fromkeys(token for token in row if token not in vocabulary)
    tokens = [token if isinstance(token, bytes) else None for token in vocabulary]
    ids = {name: [[vocabulary.index(t) for t in ids] for ids in all_] for name, all_ in marks.items()}
    markers = [(name, each) for name, all_ in ids.items() for each in all_]
    return ByteTable.from_bytes(tokens, stop_ids=[1], markers=markers), [vocabulary.index(token) for token in row]


def spoken(texts: list[Tokens], events: list[str], marks: dict, which: int) -> tuple[Tokens, list]:
    """Texts with markers and stops between them: in the oracle's tokens, and in the table's."""
    plain, row = list(texts[0]), list(texts[0])
    for event, text in zip(events, texts[1:], strict=True):
        ids = [STOP] if event == STOP else marks[event][which % len(marks[event])]
        plain += [*ids] if event == STOP else [Mark(event, k == 0) for k in range(len(ids))]
        row += ids
        plain, row = plain + text, row + text
    return plain, row


places = st.lists(st.tuples(st.integers(0, 2**16), st.sampled_from([0, *range(2, 9)])), max_size=8)


@st.composite
def conversations(draw: st.DrawFn, *, equal: bool | None = None) -> list[tuple[Tokens, list]]:
    """The same texts on both sides between the same events, or texts of one byte between whatever there is."""
    equal = draw(st.booleans()) if equal is None else equal
    events = [draw(st.lists(st.sampled_from([*TEACHER, STOP]), max_size=6)) for _ in range(2)]
    if equal:
        events[1] = events[0]
    text = oracle.byte_texts.filter(bool) if equal else st.just(b"aaa")
    texts = draw(st.lists(text, min_size=7, max_size=7))
    sides = []
    for own, marks in zip(events, (STUDENT, TEACHER), strict=True):
        cut = [oracle.cut(part, draw(places)) for part in texts[: len(own) + 1]]
        sides.append(spoken(cut, own, marks, draw(st.integers(0, 1))))
    return sides


def made(student: list, teacher: list) -> tuple[Aligner, list[int], list[int]]:
    (s, one), (t, two) = table(STUDENT, student), table(TEACHER, teacher)
    return Aligner(s, t), one, two


@law
@given(conversations())
def test_markers_correspond_by_role(sides: list) -> None:
    (student, own), (teacher, other) = sides
    al, s, t = made(own, other)
    found = al.align(s, t)
    assert oracle.fields(found) == oracle.expected(student, teacher, pairs=PAIRS)
    # Sides swapped, rows of a batch, spans.
    back = Aligner(al.teacher, al.student).align(t, s)
    for name in ("ptr", "chunk", "end"):
        for one, two in (("student", "teacher"), ("teacher", "student")):
            np.testing.assert_array_equal(getattr(found, f"{one}_{name}"), getattr(back, f"{two}_{name}"))
    batch = al.align_batch([s, s[::-1], s], [t, t, t], threads=2)
    same(batch[0], found)
    same(batch[2], found)
    chunks, shared = oracle.chunks(student, teacher), found.overlaps()
    of_token = np.repeat(np.arange(len(s)), np.diff(shared.indptr)).tolist()
    entries = set(zip(of_token, shared.indices.tolist(), strict=True))
    assert entries == set(oracle.shared_bytes(student, teacher, chunks))
    spans = [(i, j) for i in range(len(s)) for j in (i + 1, len(s))]
    for mode in ("cover", "inside"):
        want = [oracle.mapped_span(student, teacher, chunks, span, mode) for span in spans]
        assert found.map_spans(np.asarray(spans, np.int64).reshape(-1, 2), mode=mode).tolist() == [[*x] for x in want]


@law
@given(conversations(equal=True), st.integers(0, 40), st.booleans())
def test_cutting_the_end_changes_only_the_last_chunk(sides: list, keep: int, left: bool) -> None:
    rows = [row for _, row in sides]
    al, s, t = made(*rows)
    whole = list(al.align(s, t))
    part = list(al.align(s[:keep], t) if left else al.align(s, t[:keep]))
    # A marker that is cut may leave text.
    assert part[:-2] == whole[: max(len(part) - 2, 0)]


@law
@given(conversations())
def test_a_side_aligned_to_itself_is_one_to_one_but_for_roles(sides: list) -> None:
    for plain, row, marks in ((*sides[0], STUDENT), (*sides[1], TEACHER)):
        bt, ids = table(marks, row)
        found = Aligner(bt, bt).align(ids, ids)
        firsts = sum(isinstance(token, Mark) and token.first for token in plain)
        assert Counter(found.kind.tolist()) == Counter(
            {
                int(Kind.MARKER): firsts,
                int(Kind.STOP): len(oracle.turn_ends(plain)),
                int(Kind.ONE_TO_ONE): sum(isinstance(token, bytes) for token in plain),
            }
        )
        np.testing.assert_array_equal(found.student_chunk, found.teacher_chunk)


def test_many_markers_take_linear_time_and_correspond_as_far_as_they_agree() -> None:
    (s, one), (t, two) = table(STUDENT, [0, 2] * 20000), table(TEACHER, [0, b"+", 1, 0, b"++"] * 20000)
    assert (Aligner(s, t).align(one, two).kind == Kind.MARKER).sum() == 40000
    assert (Aligner(s, t).align(one[2:5000], two).kind == Kind.MARKER).sum() == 4998
    assert (Aligner(s, t).align(one[1:], two).kind == Kind.MARKER).sum() == 0


# ---- aside -------------------------------------------------------------------------------------------------------

ASIDE = ByteTable.from_bytes(
    [b"(", b")", b"a", b"b", b"\n", b"\n\n", None],
    stop_ids=[6],
    markers=[("aside_open", [0]), ("aside_close", [1])],
)
PLAIN = ByteTable.from_bytes([b"a", b"b", b"\n", None], stop_ids=[3])


@pytest.mark.parametrize(
    ("student", "teacher", "chunk", "text"),
    [
        ([2, 0, 3, 1, 2], [0, 0], [0, -1, -1, -1, 1], "aa"),
        ([2, 4, 0, 3, 1, 5, 2, 6], [0, 0, 3], [0, -1, -1, -1, -1, -1, 1, 2], "aa|"),  # new lines beside it too
        ([3, 1, 2, 6], [0, 3], [-1, -1, 0, 1], "a|"),  # opened before this row
        ([2, 6, 3, 1, 2], [0, 3, 0], [0, 1, -1, -1, 2], "a|a"),  # before this turn
        ([2, 0, 3, 6, 3], [0, 3, 1], [0, -1, -1, 1, 2], "a|b"),  # a turn's end ends it
        ([2, 0, 3, 0, 3], [0], [0, -1, -1, -1, -1], "a"),
    ],
)
def test_what_stands_aside_is_not_aligned(student: list, teacher: list, chunk: list, text: str) -> None:
    al = Aligner(ASIDE, PLAIN)
    assert al.align(student, teacher, strict=True).student_chunk.tolist() == chunk
    texts, _, cuts = al._core.student_texts(np.asarray(student), np.asarray([0, len(student)]), 1)
    assert ("|".join(texts), cuts) == (text, [None] * text.count("|"))


# ---- tables ------------------------------------------------------------------------------------------------------

MARKERS = (("think_open", (1,)), ("think_open", (2, 0)), ("call_close", (2, 2)))


def test_tables_carry_their_markers(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XTOKMAP_CACHE", str(tmp_path / "cache"))
    plain = ByteTable.from_bytes([b"a", None, None], stop_ids=[1], byte_pieces=[0], invalid="run")
    bt = plain.with_markers(MARKERS)
    assert (plain.markers, bt.markers) == ((), MARKERS)
    cache.store("name", bt)
    for again in (pickle.loads(pickle.dumps(bt)), ByteTable.from_arrays(*bt.to_arrays()), cache.load("name")):
        assert (again.markers, again.stop_ids, again.invalid, again.byte_pieces) == (MARKERS, (1,), "run", (0,))


@pytest.mark.parametrize(
    ("markers", "message"),
    [
        ([("thought", [1])], 'role "thought" is none of think_open, think_close, call_open'),
        ([("think_open", [1]), ("think_close", [])], r"markers\[1\]: a marker needs ids"),
        ([("think_open", [3])], r"markers\[0\]: id 3 is outside the byte table of 3 ids"),
        ([("think_open", [1, 2]), ("call_open", [1, 2])], r"markers\[1\]: \[1, 2\] is there twice"),
    ],
)
def test_markers_that_cannot_be(markers: list, message: str) -> None:
    with pytest.raises(XTokMapError, match=message):
        ByteTable.from_bytes([b"a", None, None], markers=markers)

"""Spans: overlaps, spans of one side on the other, alignment from offsets, and alignment of texts."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracle
from oracle import SPECIAL, STOP, Pieces, Tokens, align, cut, spelled
from xtokmap import Kind, Overlaps, XTokMapError, align_offsets, get_alignments

law = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def sides(draw: st.DrawFn) -> tuple[Tokens, Tokens, Pieces | None]:
    """Two sides of one text, of one that changed in some characters, or of one of which the end is missing."""
    if draw(st.booleans()):
        pieces = draw(oracle.changed_texts)
        tokens = [cut(oracle.side(pieces, k), draw(oracle.places)) for k in (0, 1)]
        return *map(oracle.without_stops, tokens), pieces
    text = draw(oracle.byte_texts)
    student, teacher = cut(text, draw(oracle.places)), cut(text, draw(oracle.places))
    return *oracle.uneven(student[: draw(st.integers(0, 60))], teacher), None


def pairs(overlaps: Overlaps) -> dict[tuple[int, int], int]:
    rows = np.repeat(np.arange(len(overlaps.indptr) - 1), np.diff(overlaps.indptr))
    found = dict(zip(zip(rows.tolist(), overlaps.indices.tolist(), strict=True), overlaps.nbytes.tolist(), strict=True))
    assert len(found) == len(overlaps.indices)
    assert list(found) == sorted(found)
    return found


# ---- overlaps ----------------------------------------------------------------------------------------------------


@law
@given(sides())
def test_overlaps_are_the_bytes_that_two_tokens_share(case: tuple[Tokens, Tokens, Pieces | None]) -> None:
    student, teacher, pieces = case
    found = oracle.chunks(student, teacher, pieces)
    overlaps = align(student, teacher).overlaps()
    assert isinstance(overlaps, Overlaps)
    assert [a.dtype for a in overlaps] == [np.int64, np.int32, np.int32]
    assert len(overlaps.indptr) == len(student) + 1
    assert overlaps.indptr[0] == 0
    assert overlaps.indptr[-1] == len(overlaps.indices) == len(overlaps.nbytes)
    shared = oracle.shared_bytes(student, teacher, found)
    assert pairs(overlaps) == dict(shared)

    # The other way round the same pairs share the same bytes.
    back = pairs(align(teacher, student).overlaps())
    assert {(i, j): n for (j, i), n in back.items()} == dict(shared)

    # All bytes of a token in a chunk whose bytes are equal are shared with somebody.
    for side, tokens in ((0, student), (1, teacher)):
        for chunk in found:
            if chunk.kind not in (Kind.REWRITTEN, Kind.STOP):
                for k in (chunk.student, chunk.teacher)[side]:
                    assert sum(n for pair, n in shared.items() if pair[side] == k) == len(spelled(tokens[k]))


def test_overlaps_by_hand() -> None:
    student: Tokens = [b"ab", SPECIAL, b"cde", b"f", STOP]
    overlaps = align(student, [b"a", b"bc", b"d", SPECIAL, b"ef", STOP]).overlaps()
    assert overlaps.indptr.tolist() == [0, 2, 2, 5, 6, 7]
    assert overlaps.indices.tolist() == [0, 1, 1, 2, 4, 4, 5]
    assert overlaps.nbytes.tolist() == [1, 1, 1, 1, 1, 1, 0]
    # Which byte became which is not known where the bytes were changed.
    assert pairs(align([b"x", "É".encode(), b"y"], [b"x", "é".encode(), b"y"]).overlaps()) == {(0, 0): 1, (2, 2): 1}
    assert align([], []).overlaps().indptr.tolist() == [0]


# ---- map_spans ---------------------------------------------------------------------------------------------------


@law
@given(sides(), st.sampled_from(["teacher", "student"]), st.sampled_from(["cover", "inside"]))
def test_spans_are_mapped_by_their_bytes(case: tuple[Tokens, Tokens, Pieces | None], to: str, mode: str) -> None:
    student, teacher, pieces = case
    found = oracle.chunks(student, teacher, pieces)
    sides = (student, teacher) if to == "teacher" else (teacher, student)
    if to == "student":
        found = oracle.swapped(found)
    count = len(sides[0])
    spans = [(start, stop) for start in range(count + 1) for stop in range(start, count + 1)]
    mapped = align(student, teacher).map_spans(spans, to=to, mode=mode)
    assert mapped.dtype == np.int64
    assert mapped.shape == (len(spans), 2)
    for span, got in zip(spans, mapped.tolist(), strict=True):
        assert tuple(got) == oracle.mapped_span(*sides, found, span, mode), span


def test_spans_by_hand() -> None:
    a = align([b"ab", SPECIAL, b"cde", b"f"], [b"a", b"bc", b"d", b"e", b"f"])
    assert a.map_spans([(0, 1), (2, 3), (0, 4), (1, 2), (2, 2)]).tolist() == [
        [0, 2],
        [1, 4],
        [0, 5],
        [-1, -1],
        [-1, -1],
    ]
    assert a.map_spans([(0, 1), (2, 3), (0, 3)], mode="inside").tolist() == [[0, 1], [2, 4], [0, 4]]
    assert a.map_spans([(1, 2), (2, 4)], to="student").tolist() == [[0, 3], [2, 3]]
    assert a.map_spans([(1, 2), (2, 4), (4, 5)], "student", "inside").tolist() == [[-1, -1], [-1, -1], [3, 4]]
    # A chunk whose bytes were changed is taken whole, or not at all.
    changed = align([b"x", b"e", "\u0301".encode(), b"y"], [b"x", "é".encode(), b"y"])
    assert changed.map_spans([(0, 2), (1, 3)]).tolist() == [[0, 2], [1, 2]]
    assert changed.map_spans([(0, 2), (1, 3)], mode="inside").tolist() == [[0, 1], [1, 2]]
    for none in ([], np.zeros((0, 2), np.int32)):
        assert a.map_spans(none).shape == (0, 2)
        assert a.map_spans(none).dtype == np.int64
    rows = np.asarray([[0, 1], [2, 3]], ">i4")[::-1]
    assert a.map_spans(rows).tolist() == [[1, 4], [0, 2]]


@pytest.mark.parametrize(
    ("spans", "options", "message"),
    [
        ([(0, 3)], {}, "spans[0] is (0, 3); a span must satisfy 0 <= start <= stop <= 2, the number of student tokens"),
        ([(0, 1), (0, 2)], {"to": "student"}, "spans[1] is (0, 2); a span must satisfy 0 <= start <= stop <= 1"),
        ([(-1, 1)], {}, "spans[0] is (-1, 1)"),
        ([(2, 1)], {}, "spans[0] is (2, 1)"),
        ([0, 1], {}, "spans: expected [k, 2] (start, stop) pairs, got shape (2,)"),
        ([(0, 1, 2)], {}, "spans: expected [k, 2] (start, stop) pairs, got shape (1, 3)"),
        ([(0, 1), (2,)], {}, "spans: lists of different lengths"),
        ([(0.0, 1.0)], {}, "spans: spans must be integers, got float64 [0.0]"),
        ([(0, 1)], {"to": "both"}, "to='both': use 'teacher' or 'student'"),
        ([(0, 1)], {"mode": "near"}, "mode='near': use 'cover' or 'inside'"),
    ],
)
def test_spans_that_cannot_be(spans: list, options: dict, message: str) -> None:
    with pytest.raises(XTokMapError, match=re.escape(message)):
        align([b"a", b"b"], [b"ab"]).map_spans(spans, **options)


# ---- align_offsets -----------------------------------------------------------------------------------------------


def offsets(tokens: Tokens) -> list[tuple[int, int]]:
    ends = oracle.byte_ends(tokens)
    return list(zip([0, *ends], ends, strict=False))


@law
@given(oracle.byte_texts, oracle.places, oracle.places)
def test_offsets_without_gaps_give_the_byte_alignment(text: bytes, a: list, b: list) -> None:
    student, teacher = (oracle.without_stops(cut(text, at)) for at in (a, b))
    alignment = align_offsets(offsets(student), offsets(teacher))
    assert oracle.fields(alignment) == oracle.expected(student, teacher)
    assert [chunk.text for chunk in alignment] == [None] * alignment.num_chunks
    by_bytes = align(student, teacher)
    for got, want in zip(alignment.overlaps(), by_bytes.overlaps(), strict=True):
        np.testing.assert_array_equal(got, want)
    spans = [(start, stop) for stop in range(len(student) + 1) for start in range(stop)]
    for mode in ("cover", "inside"):
        np.testing.assert_array_equal(alignment.map_spans(spans, mode=mode), by_bytes.map_spans(spans, mode=mode))


spans_with_gaps = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=12).map(
    lambda steps: [
        (sum(map(sum, steps[:k])) + gap, sum(map(sum, steps[:k])) + gap + size) for k, (gap, size) in enumerate(steps)
    ]
)


#: Tokens that are bytes of one character have its span each.
spans_with_repeats = st.tuples(spans_with_gaps, st.lists(st.integers(1, 3), min_size=12, max_size=12)).map(
    lambda drawn: [span for span, count in zip(*drawn, strict=False) for _ in range(count)]
)


def connected(student: list, teacher: list) -> list[tuple[list[int], list[int]]]:
    """The smallest groups in which spans overlap only each other and that have both sides, in order."""
    places = [(0, i, span) for i, span in enumerate(student)] + [(1, j, span) for j, span in enumerate(teacher)]
    groups: list[tuple[set[int], set[tuple[int, int]]]] = []
    for side, index, (start, stop) in places:
        units, members = set(range(start, stop)), {(side, index)}
        if not units:
            continue
        for group in [group for group in groups if group[0] & units]:
            units, members = units | group[0], members | group[1]
            groups.remove(group)
        groups.append((units, members))
    groups.sort(key=lambda group: min(group[0]))
    both = [[sorted(k for side, k in group[1] if side == want) for want in (0, 1)] for group in groups]
    return [(s, t) for s, t in both if s and t]


@law
@given(*(st.one_of(spans_with_gaps, spans_with_repeats) for _ in range(2)))
def test_offsets_are_grouped_by_what_they_overlap(student: list, teacher: list) -> None:
    alignment = align_offsets(student, teacher)
    groups = connected(student, teacher)
    got = [
        tuple(np.flatnonzero(chunk == g).tolist() for chunk in (alignment.student_chunk, alignment.teacher_chunk))
        for g in range(alignment.num_chunks)
    ]
    assert got == groups
    assert alignment.kind.tolist() == [oracle.kind_of(len(s), len(t)) for s, t in groups]
    assert alignment.student_end.tolist() == [stop for _, stop in student]
    assert alignment.teacher_end.tolist() == [stop for _, stop in teacher]
    for i, (pos, off) in enumerate(zip(alignment.teacher_pos, alignment.teacher_off, strict=True)):
        g, (start, stop) = alignment.student_chunk[i], student[i]
        holds = [j for j, (p, q) in enumerate(teacher) if p <= start < q and start < stop and g >= 0]
        assert (pos, off) == ((holds[0], start - teacher[holds[0]][0]) if holds else (-1, -1))


def test_offsets_by_hand() -> None:
    # Gaps on both sides, a span that overlaps nothing and one that is empty.
    a = align_offsets([(0, 2), (3, 5), (5, 5), (7, 8)], np.asarray([(0, 1), (1, 2), (3, 5), (10, 12)], np.int32))
    assert a.student_chunk.tolist() == [0, 1, -1, -1]
    assert a.teacher_chunk.tolist() == [0, 0, 1, -1]
    assert a.kind.tolist() == [Kind.ONE_TO_MANY, Kind.ONE_TO_ONE]
    assert [chunk.text for chunk in a] == [None, None]
    # Three tokens that are bytes of one character have its span each.
    b = align_offsets([(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)])
    assert b.student_chunk.tolist() == [0, 1, 1, 1, 2]
    assert b.kind.tolist() == [Kind.ONE_TO_ONE, Kind.MANY_TO_ONE, Kind.ONE_TO_ONE]
    assert b.teacher_pos.tolist() == [0, 1, 1, 1, 2]
    assert b.coverage == 1
    assert len(align_offsets([], [])) == len(align_offsets([], [(0, 1)])) == 0


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ([(0, 2), (1, 1)], "student_offsets[1] is (1, 1) after (0, 2); spans must be sorted, with 0 <= start <= stop"),
        ([(2, 3), (1, 3)], "student_offsets[1] is (1, 3) after (2, 3); spans must be sorted"),
        ([(-1, 1)], "student_offsets[0] is (-1, 1) after (0, 0); spans must be sorted, with 0 <= start"),
        ([(2, 1)], "student_offsets[0] is (2, 1)"),
        ([(0, 2**31)], "student_offsets[0] is (0, 2147483648)"),
        ([(0, 2**63 - 1)], "student_offsets[0] is (0, 9223372036854775807)"),
        ([(0, 2**64)], "student_offsets: spans beyond 64 bits"),
        ([0, 1, 2], "student_offsets: expected [k, 2] (start, stop) pairs, got shape (3,)"),
        ([(0.0, 1.5)], "student_offsets: spans must be integers, got float64 [0.0]"),
    ],
)
def test_offsets_that_cannot_be(student: list, message: str) -> None:
    with pytest.raises(XTokMapError, match=re.escape(message)):
        align_offsets(student, [(0, 1)])
    with pytest.raises(XTokMapError, match=re.escape(message.replace("student", "teacher"))):
        align_offsets([(0, 1)], student)


# ---- get_alignments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens_a", "tokens_b", "a2b", "b2a"),
    [
        # The examples in the documentation of tokenizations and spacy-alignments.
        (["å", "BC"], ["abc"], [[0], [0]], [[0, 1]]),
        (["げん", "ご"], ["けんこ"], [[0], [0]], [[0, 1]]),
        (["f", "o", "o"], ["fo", "o"], [[0], [0], [1]], [[0, 1], [2]]),
        (["New York"], ["New", "York"], [[0, 1]], [[0], [0]]),
        (["à", "la", "gorge"], ["a", "la", "gorge"], [[0], [1], [2]], [[0], [1], [2]]),
        # Text that one side lacks, and nothing at all.
        (["foo", "123", "baz"], ["foo", "baz"], [[0], [], [1]], [[0], [2]]),
        (["a", "", "b"], ["ab"], [[0], [], [0]], [[0, 2]]),
        ([], ["a"], [], [[]]),
        ([], [], [], []),
        (["ﬁ", "½"], ["f", "i1\u20442"], [[0, 1], [1]], [[0], [0, 1]]),
    ],
)
def test_documented_text_alignments(tokens_a: list, tokens_b: list, a2b: list, b2a: list) -> None:
    assert get_alignments(tokens_a, tokens_b) == (a2b, b2a)
    assert get_alignments(tuple(tokens_b), tuple(tokens_a)) == (b2a, a2b)


def split(text: str, places: list[tuple[int, int]]) -> list[str]:
    at = sorted({0, len(text), *(place % (len(text) + 1) for place, _ in places)})
    return [text[start:stop] for start, stop in pairwise(at)]


texts = st.text("abcABC éÅ漢字가ßİﬁ😀\u0301", max_size=30)


@law
@given(texts, oracle.places, oracle.places)
def test_equal_texts_align_by_shared_characters(text: str, a: list, b: list) -> None:
    tokens_a, tokens_b = split(text, a), split(text, b)
    want = oracle.characters_shared(tokens_a, tokens_b), oracle.characters_shared(tokens_b, tokens_a)
    assert get_alignments(tokens_a, tokens_b) == want


@law
@given(st.lists(texts, max_size=6), st.lists(texts, max_size=6))
def test_other_texts_align_in_order_and_both_ways(tokens_a: list[str], tokens_b: list[str]) -> None:
    a2b, b2a = get_alignments(tokens_a, tokens_b)
    assert (len(a2b), len(b2a)) == (len(tokens_a), len(tokens_b))
    forth = [(i, j) for i, row in enumerate(a2b) for j in row]
    assert sorted((i, j) for j, row in enumerate(b2a) for i in row) == forth
    # Correspondence never crosses.
    assert forth == sorted(set(forth))
    assert [j for _, j in forth] == sorted(j for _, j in forth)


def test_equal_texts_align_as_spacy_alignments_does() -> None:
    spacy_alignments = pytest.importorskip("spacy_alignments")

    @law
    @given(texts, st.sampled_from([str, str.lower, str.upper]), oracle.places, oracle.places)
    def compare(text: str, change, a: list, b: list) -> None:  # type: ignore[no-untyped-def]
        tokens_a, tokens_b = split(text, a), split(text, b)
        assert get_alignments(tokens_a, tokens_b) == spacy_alignments.get_alignments(tokens_a, tokens_b)
        text = change(text)
        if text.upper().lower() == text.lower():
            tokens_b = split(text, b)
            assert get_alignments(tokens_a, tokens_b) == spacy_alignments.get_alignments(tokens_a, tokens_b)

    compare()


# ---- what does not hold yet --------------------------------------------------------------------------------------


def test_overlaps_and_spans_of_offsets_with_gaps() -> None:
    a = align_offsets([(0, 2), (3, 5)], [(0, 2), (3, 4), (4, 5)])
    assert pairs(a.overlaps()) == {(0, 0): 2, (1, 1): 1, (1, 2): 1}


def test_spans_that_overlap_on_their_own_side_stay_together() -> None:
    assert align_offsets([(0, 2)], [(1, 3), (2, 4)]).teacher_chunk.tolist() == [0, 0]
    assert align_offsets([(2, 4)], [(0, 2), (1, 3)]).teacher_chunk.tolist() == [0, 0]


def test_overlaps_and_spans_of_equal_offsets() -> None:
    a = align_offsets([(0, 1), (0, 1)], [(0, 1)])
    assert pairs(a.overlaps()) == {(0, 0): 1, (1, 0): 1}
    assert a.map_spans([(0, 1), (1, 2)]).tolist() == [[0, 1], [0, 1]]

"""Columns: every token once and in its chunk, with what a viewer shows of it."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings

import oracle
from oracle import SPECIAL, STOP, Pieces, Tokens, align, cut
from xtokmap import XTokMapError, align_offsets
from xtokmap.columns import UNALIGNED, Column, Token, columns


def with_specials(tokens: Tokens) -> Tokens:
    """A token without bytes before every third one: also inside chunks."""
    return [t for k, token in enumerate(tokens) for t in ([SPECIAL, token] if k % 3 == 1 else [token])]


@settings(deadline=None)
@given(oracle.changed_texts, oracle.places, oracle.places)
def test_every_token_is_in_one_column_and_says_whether_in_its_chunk(pieces: Pieces, a: list, b: list) -> None:
    student, teacher = (
        with_specials(oracle.without_stops(cut(oracle.side(pieces, k), at))) for k, at in ((0, a), (1, b))
    )
    alignment = align([*student, STOP], [*teacher, STOP])
    found = columns(alignment)
    for k, (tokens, chunks) in enumerate(((student, alignment.student_chunk), (teacher, alignment.teacher_chunk))):
        shown = [(token, column) for column in found for token in column.sides[k]]
        assert [token.spelled for token, _ in shown] == [t or None for t in tokens] + [None]
        assert [c.chunk if t.aligned else -1 for t, c in shown] == chunks.tolist()
        assert all(token.text for token, _ in shown)
    assert [c.kind for c in found if c.chunk is not None] == [chunk.kind.name for chunk in alignment]
    assert all(c.kind == UNALIGNED for c in found if c.chunk is None)


def test_what_a_token_is_called() -> None:
    alignment = align([b"a \n", "é".encode()[:1], "é".encode()[1:], SPECIAL, STOP], ["a \né".encode(), STOP])
    one, special, stop = columns(alignment)
    assert one.texts == (r"a·⏎|\xc3|\xa9", "a·⏎é")
    ids = alignment._bytes.student_ids.tolist()
    assert (special.kind, special.texts) == (UNALIGNED, (f"[{ids[3]}]", ""))
    assert stop.kind == "STOP"
    assert columns(alignment, (lambda i: f"<{i}>", str))[1].texts == (f"<{ids[3]}>", "")


def test_offsets_alone_have_positions_for_names() -> None:
    first, rest = columns(align_offsets([[0, 2], [2, 4], [5, 6]], [[0, 4], [7, 8]]))
    assert (first.kind, first.texts) == ("MANY_TO_ONE", ("#0|#1", "#0"))
    assert (rest.kind, rest.texts) == (UNALIGNED, ("#2", "#1"))


def test_a_gap_is_of_the_tokens_of_the_chunk() -> None:
    alignment = align([b"a", SPECIAL, b"b", b"c"], [b"ab", b"c", SPECIAL])
    one, two, rest = columns(alignment, logprobs=([-1.0, -50.0, -2.0, math.nan], [-0.5, -0.25, -7.0]))
    assert one.gap == -2.5
    assert [token.logprob for token in one.student] == [-1.0, -50.0, -2.0]
    assert (two.gap, rest.gap) == (None, None)
    assert [column.gap for column in columns(alignment)] == [None] * 3


def test_a_record_is_the_column_without_what_json_does_not_keep() -> None:
    alignment = align([b"a", b"b", b"<&>"], [b"ab", b"<&>"])
    found = columns(alignment, logprobs=([-1.00004, -2.0, math.nan], [-0.5, -0.25]))
    records = json.loads(json.dumps([column.record() for column in found], allow_nan=False))
    assert records[0] == {
        "kind": "MANY_TO_ONE",
        "student": [["a", -1.0], ["b", -2.0]],
        "teacher": [["ab", -0.5]],
        "gap": -2.5,
    }
    again = [Column.of(record) for record in records]
    assert [column.record() for column in again] == records


@pytest.mark.parametrize(
    "change",
    [{"kind": 3}, {"student": "ab"}, {"student": [["a"]]}, {"teacher": [["a", "b"]]}, {"gap": "much"}, {"gap": ...}],
)
def test_what_is_no_record_is_refused(change: dict) -> None:
    record = {**Column(UNALIGNED, [Token("a", logprob=-1.0)], []).record(), **change}
    with pytest.raises(XTokMapError, match="not a column of tokens"):
        Column.of({name: value for name, value in record.items() if value is not ...})


def test_the_first_chunks_alone() -> None:
    alignment = align([b"a", SPECIAL, b"b", b"c", SPECIAL], [b"ab", b"c", SPECIAL])
    whole = columns(alignment)
    assert columns(alignment, first=len(alignment)) == whole
    assert columns(alignment, first=1) == whole[:1]
    assert columns(alignment, first=0) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"logprobs": ([-1.0], [-1.0])}, "student logprobs: 1 for 2 tokens; give one for each"),
        ({"logprobs": ([-1.0] * 2, [])}, "teacher logprobs: 0 for 1 tokens"),
        ({"advantages": [0.0] * 3}, "student advantages: 3 for 2 tokens"),
    ],
)
def test_figures_are_one_for_each_token(given: dict, said: str) -> None:
    with pytest.raises(XTokMapError, match=said):
        columns(align([b"a", b"b"], [b"ab"]), **given)

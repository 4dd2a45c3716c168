"""An edit costs its neighborhood, wherever it is: texts whose edits are known, and a brute-force edit distance."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import corpus
import pairs
from edits import BYTES, Distances, cost_in_bytes, cost_in_tokens, edited, texts
from xtokmap import Aligner, ByteTable, Kind, get_alignments

law = settings(max_examples=200, deadline=None)

TEXT = "".join(text for text in (corpus.KINDS["prose"], corpus.KINDS["code"]) if text).replace("\n", " ")
ENGLISH = TEXT.encode("ascii", "ignore").decode()


def in_bytes(student: str, teacher: str) -> list[tuple[str, str, Kind]]:
    """The texts of all chunks, in a vocabulary of bytes."""
    a = Aligner(BYTES, BYTES).align(list(student.encode()), list(teacher.encode()))
    return [(student[c.student.start : c.student.stop], teacher[c.teacher.start : c.teacher.stop], c.kind) for c in a]


@pytest.mark.parametrize(
    ("student", "teacher", "changed"),
    [
        ("I like the red car a lot", "I hike the rod car a loz", [("l", "h"), ("e", "o")]),
        ("I like tea.", "I hike tea!", [("l", "h")]),
        ("the", "<|eot_id|>the", [("", "<|eot_id|>")]),
        ("in bulk, and builds", "in kbulk,and builds", [("", "k"), (" ", "")]),
        ("he pieces between such cuts", "he pieces betweenssuch cuts", [(" ", "s")]),
        ("cores all of it took ten", "cores all of i took ten", [("t", "")]),
        ("able to make the process", "able to mare the sroueos", [("k", "r"), ("p", "s"), ("c", "u"), ("s", "o")]),
    ],
)
def test_an_edit_costs_itself(student: str, teacher: str, changed: list) -> None:
    """Also at the end, where nothing equal follows; an end that differs is unaligned."""
    for x, y, swap in ((student, teacher, False), (teacher, student, True)):
        chunks = in_bytes(x, y)
        rewritten = [(a, b) for a, b, kind in chunks if kind == Kind.REWRITTEN]
        assert rewritten == [(b, a) if swap else (a, b) for a, b in changed]
        assert all(a == b for a, b, kind in chunks if kind != Kind.REWRITTEN)
        lost = len(x) - sum(len(a) for a, _, _ in chunks)
        assert lost == (x[-1] != y[-1])


@pytest.mark.parametrize("edits", [1, 2, 3, 10])
@pytest.mark.parametrize(("length", "kinds"), [(30, "r"), (60, "r"), (200, "rid")])
def test_characters_keep_their_partners(length: int, kinds: str, edits: int) -> None:
    rng = random.Random(f"{length} {kinds} {edits}")
    cost = cost_in_bytes([edited(rng, text, edits, kinds) for text in texts(rng, ENGLISH, length, 150)])
    assert cost.share >= 0.99
    assert cost.wrong <= cost.kept / 5000
    assert edits > 3 or cost.wrong == 0


@pytest.mark.parametrize(
    ("student", "teacher"), [("cl100k", "qwen"), ("mistral-v3", "deepseek"), ("tekken-240911", "o200k")]
)
def test_tails_of_real_tokenizers_are_kept(student: str, teacher: str) -> None:
    """Rows of 30 characters with two or three edits."""
    rng = random.Random(f"{student} {teacher}")
    rows = [edited(rng, text, rng.choice((2, 3))) for text in texts(rng, ENGLISH, 30, 150)]
    codecs = [pairs.tokenizer(name).codec for name in (student, teacher)]
    encode = [lambda text, codec=codec: codec.encode_batch([text])[0].tolist() for codec in codecs]
    cost = cost_in_tokens(rows, *encode, pairs.aligner(student, teacher))
    assert cost.share >= 0.98
    assert cost.lost_tails <= 0.02 * cost.rows
    assert cost.wrong == 0


def test_the_hundredth_edit_costs_no_more_than_the_first() -> None:
    """One byte in 28, behind a long stretch that is another text."""
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz      ", np.uint8)
    x = rng.choice(letters, 60_000)
    y = x.copy()
    y[:30_000] = rng.integers(ord("0"), ord("9") + 1, 30_000)
    y[30_014::28] = ord("#")
    a = Aligner(BYTES, BYTES).align(x.astype(np.int32), y.astype(np.int32))
    same = np.zeros(len(x), np.bool_)
    aligned = a.student_chunk >= 0
    same[aligned] = a.kind[a.student_chunk[aligned]] == Kind.ONE_TO_ONE
    assert np.array_equal(np.flatnonzero(same), np.flatnonzero(x == y))
    assert np.array_equal(a.teacher_pos[same], np.flatnonzero(same))


@law
@given(st.text("ab c", max_size=40), st.text("ab c", max_size=40))
def test_what_is_claimed_equal_is_a_way_to_edit(x: str, y: str) -> None:
    """Any texts: pairs rise on both sides, equal bytes only, and the sides may be swapped."""
    pairs_of = [(a, b) for a, b, kind in in_bytes(x, y) if kind != Kind.REWRITTEN]
    assert all(a == b for a, b in pairs_of)
    assert [(b, a, kind) for a, b, kind in in_bytes(y, x)] == in_bytes(x, y)


def test_the_oracle_sees_what_is_wrong() -> None:
    row = edited(random.Random(3), "abcdefgh", 2, "d")
    distances = Distances(row.before, row.after)
    assert distances.shortest == 2
    kept = [(i, j) for i, j in enumerate(row.place) if j >= 0]
    assert all(distances.keeps(i, j) for i, j in kept)
    assert not any(distances.keeps(i, j + 1) for i, j in kept if j + 1 < len(row.after))
    assert distances.passes(0, 0)
    assert not distances.passes(0, len(row.after))


def test_no_sides_are_preferred_where_characters_are_broken() -> None:
    """The smallest rows that once had a chunk in one order of the sides, and none in the other."""
    student, teacher = [b"\xe2\x80\xc3", b"\x9f"], [b" \xe2\x80", b"\x8d"]
    s, t = (ByteTable.from_bytes(tokens) for tokens in (student, teacher))
    forth, back = Aligner(s, t).align([0, 1], [0, 1]), Aligner(t, s).align([0, 1], [0, 1])
    assert forth.student_chunk.tolist() == back.teacher_chunk.tolist()
    assert forth.teacher_chunk.tolist() == back.student_chunk.tolist()


def test_get_alignments_of_long_texts() -> None:
    """Where the texts are long, what is far from any difference is found as in short ones."""
    rng = random.Random(1)
    a = [rng.choice("abcdefghijklm ") for _ in range(20_000)]
    b = [char if rng.random() > 0.01 else "#" for char in a]
    forth, back = get_alignments(a, b)
    right = sum(found == [k] for k, found in enumerate(forth))
    assert right >= sum(x == y for x, y in zip(a, b, strict=True)) - 5
    assert [k for k, found in enumerate(back) if not found] == [k for k, char in enumerate(b) if char == "#"]
    unlike = [rng.choice("nopqrstuvwxyz") for _ in range(20_000)]
    assert not any(get_alignments(a, unlike)[0])

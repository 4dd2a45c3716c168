"""Every ordered pair of the real tokenizers on every kind of text, against an oracle; see `pairs.py`."""

import pytest

import corpus
import oracle
import pairs
from xtokmap import Aligner, Kind

GOLDEN_CASES = [(*pair, text) for pair in pairs.GOLDEN_PAIRS for text in pairs.GOLDEN_TEXTS]


@pytest.mark.parametrize(("student", "teacher"), pairs.PAIRS)
def test_chunks_are_those_of_the_oracle(student, teacher):
    rows = pairs.measure(student, teacher)
    assert {row.kind for row in rows} == set(pairs.KINDS)
    same, changed = ([row for row in rows if row.agrees == agrees] for agrees in (True, False))
    told = "\n".join(line for row in rows for line in pairs.described(row))
    assert pairs.total(same).exact == pairs.total(same).tokens, told
    assert pairs.total(changed).share >= 0.999, told
    assert pairs.total(rows).wrong == 0, told
    assert pairs.total(rows).misplaced == 0, told


@pytest.mark.parametrize(("student", "teacher"), [pair for pair in pairs.PAIRS if pair[1] not in pairs.TEACHER_CHANGES])
def test_only_broken_characters_change_for_a_teacher_that_changes_nothing(student, teacher):
    changed = {row.kind for row in pairs.measure(student, teacher) if not row.agrees}
    assert changed <= {pairs.RANDOM, pairs.BROKEN}
    assert pairs.BROKEN in changed
    for row in pairs.measure(student, teacher):
        if row.agrees:
            assert row.score.in_kind[Kind.REWRITTEN] == 0
            assert row.score.scored == row.score.tokens


@pytest.mark.parametrize("text", corpus.EDGES, ids=ascii)
@pytest.mark.parametrize("student", ["deepseek", "cl100k"])
def test_prefix_space_before_what_looks_like_one(student, text):
    row = pairs.measure_edges(student, "mistral-v3")[corpus.EDGES.index(text)]
    assert row.score.share == 1, "\n".join(pairs.described(row))


@pytest.mark.parametrize(("student", "teacher", "text"), GOLDEN_CASES)
def test_golden(student, teacher, text):
    path = pairs.GOLDEN / pairs.golden_name(student, teacher, text)
    assert pairs.golden(student, teacher, text) == path.read_text(encoding="utf-8"), (
        "if the new alignment is right: python tests/pairs.py --write-golden"
    )


def test_golden_files_are_those_of_the_cases():
    assert {path.name for path in pairs.GOLDEN.glob("*.txt")} == {pairs.golden_name(*case) for case in GOLDEN_CASES}


# ---- the oracle and the measure themselves -----------------------------------------------------------------------


def test_every_kind_of_text_is_some_hundred_characters():
    assert len(corpus.KINDS) >= 12
    for kind, text in corpus.KINDS.items():
        assert len(text) >= 150, kind
        assert len(text.encode()) >= 300, kind


@pytest.mark.parametrize(("student", "teacher"), [("qwen", "mistral-v1"), ("mistral-v3", "anthropic")])
def test_oracle_is_the_brute_force_one(student, teacher):
    """The chunks that pairs are held to, found by `oracle.py` from the same pieces."""
    table = pairs.tokenizer(student).table
    for row in pairs.measure(student, teacher)[::3]:
        own = pairs.tokens_of(table, row.student_ids)
        other = pairs.tokens_of(pairs.tokenizer(teacher).table, row.teacher_ids)
        pieces = pairs.pieces_of(pairs.spell(own), table.invalid, teacher)
        wanted = oracle.chunks(*([token or oracle.STOP for token in side] for side in (own, other)), pieces)
        expected = [(tuple(chunk.student), tuple(chunk.teacher), chunk.kind) for chunk in wanted]
        assert pairs.chunks(own, other, pieces) == expected, row.kind


@pytest.mark.parametrize(
    "data", [b"\xf0\x9f\x92a\xf0\x9f\x92", b"\xe4\xbd\xff\xe4", b"\xc0\x80\xed\xa0\x80", b"\xf4\x90"]
)
def test_broken_characters_are_spelled_as_python_does(data):
    parts = pairs.decoded(data, "maximal")
    assert b"".join(part for part, _ in parts) == data
    assert "".join(char for _, char in parts) == data.decode(errors="replace")
    each = pairs.decoded(data, "each")
    assert all(len(part) == 1 for part, char in each if char == "\ufffd")


def test_normal_form_is_cut_where_its_parts_concatenate():
    assert pairs.TEACHER_CHANGES["anthropic"]("ae\u0301\ufb01q\u0307\u0323!") == [
        ("a", "a"),
        ("e\u0301", "\u00e9"),
        ("\ufb01", "fi"),
        ("q", "q"),
        ("\u0307\u0323", "\u0323\u0307"),
        ("!", "!"),
    ]


def test_measure_sees_what_is_wrong():
    """The alignment of another row of the same ids, and one that is larger than it needs to be."""
    student, teacher = "deepseek", "mistral-v3"
    (kind, ids), *_ = pairs.student_rows(student)
    al = pairs.aligner(student, teacher)
    (teacher_ids,), right = al.retokenize([ids])
    longer = pairs.tokenizer(teacher).codec.encode_batch(["and then"])[0].tolist()
    shifted = al.align([*ids[1:], ids[0]], teacher_ids)
    score = pairs.measure_row(student, teacher, kind, ids, teacher_ids.tolist(), shifted).score
    assert score.share < 0.5
    assert score.wrong + score.misplaced > 0
    with pytest.raises(AssertionError):
        pairs.measure_row(student, teacher, kind, ids, [*longer, *teacher_ids.tolist()], right[0])


def test_shared_tables_and_codecs_change_nothing():
    """`pairs.aligner` leaves the work of `Aligner(tokenizer, tokenizer)` out that it need not do twice."""
    student, teacher = "mistral-v1", "cl100k"
    rows = [ids for _, ids in pairs.student_rows(student)]
    plain = Aligner(pairs.LOADERS[student](), pairs.LOADERS[teacher]())
    ids, batch = plain.retokenize(rows)
    other_ids, other = pairs.aligner(student, teacher).retokenize(rows)
    assert [row.tolist() for row in ids] == [row.tolist() for row in other_ids]
    for a, b in zip(batch, other, strict=True):
        assert oracle.fields(a) == oracle.fields(b)

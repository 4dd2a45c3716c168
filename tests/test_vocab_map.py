"""Vocabulary maps and cover queries: real pairs against Python, tiny ones against the definition."""

from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import real_tokenizers as real
import xtokmap
from xtokmap import Aligner, ByteTable, XTokMapError
from xtokmap.boundary.cover import FORCED, NOT_CANONICAL
from xtokmap.torch.index import VocabTensors

law = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


# ---- real pairs --------------------------------------------------------------------------------------------------


@cache
def source(name):
    if name in real.ENCODINGS:
        return real.encoding(name)
    if name == "mistral-v3":
        package = pytest.importorskip("sentencepiece")
        return package.SentencePieceProcessor(model_file=str(real.path(name)))
    if name == "smollm2":
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("gguf")
        path = real.path(name)
        return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return pytest.importorskip("tokenizers").Tokenizer.from_file(str(real.path(name)))


@cache
def aligner_of(student, teacher):
    return Aligner(source(student), source(teacher))


@pytest.fixture(params=[("smollm2", "qwen"), ("qwen", "deepseek"), ("deepseek", "mistral-v3"), ("mistral-v3", "o200k")])
def pair(request):
    return aligner_of(*request.param)


def tokens_of(table):
    return [table[i] or b"" for i in range(len(table))]


def test_real_maps_are_what_python_finds(pair):
    vm = pair.vocab_map
    student, teacher = tokens_of(pair.student), tokens_of(pair.teacher)
    students, longest = {token: i for i, token in enumerate(student) if token}, max(map(len, student))
    teachers = {token: i for i, token in enumerate(teacher) if token}
    # Of tokens with equal bytes another may be chosen.
    for numbers, of, there, back in [
        (vm.teacher_to_student, teacher, students, student),
        (vm.student_to_teacher, student, teachers, teacher),
    ]:
        for i in range(len(of)):
            assert (numbers[i] >= 0) == (of[i] in there)
            assert numbers[i] < 0 or back[numbers[i]] == of[i]
    rng = np.random.default_rng(0)
    encode = pair._transfer.rule.core.encode
    for v in rng.choice(vm.teacher_order, 3000, replace=False).tolist():
        token = teacher[v]
        fitting = [token[:n] for n in range(min(len(token), longest), 0, -1) if token[:n] in students]
        assert (student[vm.prefix[v]] if vm.prefix[v] >= 0 else None) == (fitting[0] if fitting else None)
        # A token that the student's pre-tokenizer would cut is encoded by pieces.
        pieces = pair._transfer.rule._cuts(text) if pair._transfer.rule._cuts and (text := _text(token)) else set()
        piece = token if not pieces else text[: min(pieces)].encode()
        assert vm.canonical[v] == next(iter(encode(piece)), -1), token
        lo, hi = vm.teacher_range[v]
        assert all(teacher[w].startswith(token) for w in vm.teacher_order[lo:hi])
        around = [vm.teacher_order[k] for k in (lo - 1, hi) if 0 <= k < len(vm.teacher_order)]
        assert not any(teacher[w].startswith(token) for w in around)
    for side, order in ((student, vm.student_order), (teacher, vm.teacher_order)):
        spelled = [side[i] for i in order]
        assert spelled == sorted(token for token in side if token)


def _text(token):
    try:
        return token.decode()
    except UnicodeDecodeError:
        return ""


def test_real_summaries(pair):
    vm = pair.vocab_map
    student, teacher = tokens_of(pair.student), tokens_of(pair.teacher)
    summary = vm.summary()
    shared = len(set(student) & set(teacher) - {b""})
    copies = sum(map(bool, teacher)) - len(set(teacher) - {b""})
    assert shared <= summary["shared_bytes"] <= shared + copies
    assert summary["student"] == sum(map(bool, student))
    assert summary["uncovered"] == sum(map(bool, teacher)) - summary["shared_bytes"]
    assert 0 < summary["groups"] <= summary["uncovered"]
    assert str(vm).startswith(f"VocabMap(student={summary['student']}, teacher={summary['teacher']}, ")


def test_shared_bytes_of_a_vocabulary_without_strings(tmp_path):
    """Gemma 3 and Qwen share more than a third of their tokens. Qwen's file here has ranks and no strings."""
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    gemma = real.gemma_header(tmp_path)
    summary = Aligner(source("qwen"), gemma).vocab_map.summary()
    assert summary["shared_strings"] is None
    assert summary["shared_bytes"] == 96_078


def test_shared_strings_of_two_tokenizers_that_have_them():
    a, b = source("deepseek"), source("anthropic")
    summary = Aligner(a, b).vocab_map.summary()
    assert summary["shared_strings"] == len(set(a.get_vocab()) & set(b.get_vocab()))


# ---- tiny pairs --------------------------------------------------------------------------------------------------

LETTERS = [b"a", b"b", b"c"]
words = st.lists(st.sampled_from(LETTERS), max_size=14).map(b"".join)


@st.composite
def vocabularies(draw):
    """Distinct tokens, among them every letter and a special one; no tokenizer: the longest match is the rule."""
    tokens = draw(st.lists(st.lists(st.sampled_from(LETTERS), min_size=1, max_size=4).map(b"".join), max_size=12))
    return list(dict.fromkeys([None, *tokens, *LETTERS]))


def longest(vocabulary, text):
    return max((token for token in vocabulary if token and text.startswith(token)), key=len)


def encode(vocabulary, text):
    ids, at = [], 0
    while at < len(text):
        token = longest(vocabulary, text[at:])
        ids.append(vocabulary.index(token))
        at += len(token)
    return ids


def pieces(draw, vocabulary, text):
    """Tokens that spell a text, drawn one by one: what a student may sample."""
    ids, at = [], 0
    while at < len(text):
        token = draw(st.sampled_from([t for t in vocabulary if t and text[at:].startswith(t)]))
        ids.append(vocabulary.index(token))
        at += len(token)
    return ids


@st.composite
def batches(draw):
    student, teacher = draw(vocabularies()), draw(vocabularies())
    # One vocabulary on both sides needs no queries.
    student = [*student, b"\x00"]
    texts = draw(st.lists(words, max_size=4))
    return student, teacher, texts, [pieces(draw, student, text) for text in texts], [encode(teacher, x) for x in texts]


def aligner(student, teacher):
    return Aligner(ByteTable.from_bytes(student), ByteTable.from_bytes(teacher))


def expected_terms(student, teacher, text, students, teachers):
    """Section "cover" of the method: for every student token (teacher place, its tokens), specials apart."""
    starts = np.cumsum([0, *(len(teacher[v]) for v in teachers)]).tolist()
    tokens = [v for v in range(len(teacher)) if teacher[v]]
    end, all_terms = 0, []
    for i, s in enumerate(students):
        end += len(student[s])

        def merges(z, s=s):
            return longest(student, student[s] + z) != student[s]

        never = i + 1 < len(students) and merges(student[students[i + 1]])
        j = next(k for k in range(len(teachers)) if starts[k + 1] >= end)
        exact = starts[j + 1] == end
        terms = {}
        for k in range(j + 1):
            c = text[starts[k] : end]
            mass = {v for v in tokens if teacher[v].startswith(c) and teacher[v] != c}
            mass = {v for v in mass if never or not merges(teacher[v][len(c) :])}
            if k == j and not exact:
                mass |= {v for v in tokens if teacher[v] == c} | {teachers[j]}
            terms[k] = mass
        if exact:
            terms[j + 1] = {v for v in tokens if never or not merges(teacher[v])} | set(teachers[j + 1 : j + 2])
        all_terms.append(({k: mass for k, mass in terms.items() if mass}, never, exact))
    return all_terms


@law
@given(batches())
def test_terms_are_what_the_definition_says(batch):
    student, teacher, texts, students, teachers = batch
    al = aligner(student, teacher)
    queries = al.cover_queries(al.align_batch(students, teachers))
    order, i = queries.vocab_map.teacher_order, 0
    for text, row, other in zip(texts, students, teachers, strict=True):
        for k, (expected, never, exact) in enumerate(expected_terms(student, teacher, text, row, other)):
            found = {}
            for term in queries.terms(i):
                flat = term.ranges.reshape(-1)
                assert (np.diff(flat) > 0).all()  # disjoint, rising, none that could be one with the next
                ids = {int(v) for lo, hi in term.ranges for v in order[lo:hi]}
                assert not ids & found.get(term.row, set())
                found.setdefault(term.row, set()).update(ids)
                assert not term.special or exact
            assert {row: ids for row, ids in found.items() if ids} == expected
            assert bool(queries.flags[i] & NOT_CANONICAL) == never
            assert queries.base[i] == (-1 if k else 0)
            i += 1
    assert i == len(queries.base)
    assert queries.figures()["queries"] == i
    assert queries.figures()["forced"] == (queries.flags & FORCED > 0).sum()


def same_terms(a, i, b, k):
    assert a.base[i] == b.base[k]
    assert a.flags[i] == b.flags[k]
    for one, other in zip(a.terms(i), b.terms(k), strict=True):
        assert (one.row, one.special) == (other.row, other.special)
        np.testing.assert_array_equal(one.ranges, other.ranges)


@law
@given(batches(), st.randoms(use_true_random=False))
def test_a_batch_is_its_rows_padded_selected_and_asked_again(batch, chosen):
    student, teacher, texts, students, teachers = batch
    al = aligner(student, teacher)
    ragged = al.cover_queries(al.align_batch(students, teachers))
    assert len(ragged) == len(texts)

    again = al.cover_queries(al.align_batch(students, teachers), threads=2)
    for name in ("indptr", "row", "set", "base", "flags", "student_ids", "student_cu", "teacher_cu"):
        np.testing.assert_array_equal(getattr(again, name), getattr(ragged, name), err_msg=name)
    for one, other in zip(again.sets, ragged.sets, strict=True):
        np.testing.assert_array_equal(one, other)

    # On the left, one place more than is needed.
    width = max(map(len, students), default=0) + 1
    ids, mask = np.full((len(students), width), -100), np.zeros((len(students), width), bool)
    for b, row in enumerate(students):
        ids[b, width - len(row) :], mask[b, width - len(row) :] = row, True
    padded = al.cover_queries(al.align_batch(ids, teachers, student_mask=mask))
    np.testing.assert_array_equal(padded.places()[0], np.flatnonzero(mask))
    assert padded.places()[1] == mask.shape

    for b, (row, other) in enumerate(zip(students, teachers, strict=True)):
        single = al.cover_queries(al.align(row, other))
        start = int(ragged.student_cu[b])
        for i in range(len(row)):
            same_terms(single, i, ragged, start + i)
            same_terms(single, i, padded, start + i)

    rows = chosen.sample(range(len(students)), chosen.randint(0, len(students)))
    part, at = ragged.select(rows), 0
    assert len(part) == len(rows)
    np.testing.assert_array_equal(np.diff(part.teacher_cu), [len(teachers[b]) for b in rows])
    for b in rows:
        np.testing.assert_array_equal(part.student_ids[at : at + len(students[b])], students[b])
        for i in range(len(students[b])):
            same_terms(part, at, ragged, int(ragged.student_cu[b]) + i)
            at += 1


def test_one_tokenizer_on_both_sides_has_plain_queries():
    table = [None, b"a", b"b", b"ab"]
    al = aligner(table, table)
    queries = al.cover_queries(al.align([3, 2, 1], [3, 2, 1]))
    assert queries.identical
    # All of the next row: Phi is the sum of the teacher's own logprobs.
    for i in range(3):
        [term] = queries.terms(i)
        assert (term.row, term.ranges.tolist(), term.special) == (i + 1, [[0, 3]], True)


def test_stops_and_rewritten_chunks():
    student = ByteTable.from_bytes([b"a", b"b", b"x", None], stop_ids=[3])
    teacher = ByteTable.from_bytes([b"a", b"b", b"y", b"ab", None], stop_ids=[4])
    al = Aligner(student, teacher)
    queries = al.cover_queries(al.align([0, 1, 2, 0, 3], [3, 2, 0, 4], strict=False))
    assert queries.base.tolist() == [0, -1, -2, 2, -1]
    # The end of the turn is one teacher token: its own end of turn.
    assert queries.set[queries.indptr[4] : queries.indptr[5]].tolist() == [-1 - 4]
    assert queries.figures() == {"tokens": 5, "queries": 4, "stretches": 2, "not_canonical": 0, "forced": 0}
    assert repr(queries).startswith("CoverQueries(tokens=5, queries=4, ")


def test_queries_of_what_another_aligner_made_are_refused():
    one, other = aligner([b"a", b"b", None], [b"a", b"b"]), aligner([b"a", b"b", None], [b"b", b"a"])
    batch, single = one.align_batch([[0, 1]], [[0, 1]]), one.align([0, 1], [0, 1])
    offsets = xtokmap.align_offsets(np.asarray([[0, 1], [1, 2]]), np.asarray([[0, 2]]))
    for foreign in (batch, single, offsets):
        with pytest.raises(XTokMapError, match="cover_queries needs a batch that this aligner made"):
            other.cover_queries(foreign)
    with pytest.raises(XTokMapError, match="interior_queries needs a batch that this aligner made"):
        other.interior_queries(batch)
    for threads in (0, -1, 10**6):
        with pytest.raises(XTokMapError, match=f"threads={threads}"):
            one.cover_queries(batch, threads=threads)
    with pytest.raises(XTokMapError, match="was not aligned from these ids"):
        one._transfer.core.queries(*batch._core_arguments(), np.zeros(1, np.uint32), np.zeros(2, np.uint32), False)


def test_empty_batches_have_no_queries():
    al = aligner([b"a", None], [b"a", b"b"])
    for rows in ([], [[]], [[], []]):
        queries = al.cover_queries(al.align_batch(rows, rows))
        assert (len(queries), len(queries.row), len(queries.sets.ids)) == (len(rows), 0, 0)
        assert len(queries.select(list(range(len(rows))))) == len(rows)


def test_tensors_of_a_map_hold_the_same():
    torch = pytest.importorskip("torch")
    aligner = xtokmap.Aligner(
        xtokmap.ByteTable.from_bytes([b"a", b"b", b"ab", None], stop_ids=[3]),
        xtokmap.ByteTable.from_bytes([b"a", b"ba", b"b", None], stop_ids=[3]),
    )
    vm = aligner.vocab_map
    tensors = VocabTensors.from_map(vm, "cpu")
    for name in ("teacher_to_student", "prefix", "canonical", "teacher_range", "group"):
        assert getattr(tensors, name).dtype == torch.int64
        assert getattr(tensors, name).tolist() == getattr(vm, name).tolist()
    assert tensors.shared.tolist() == [[0, 0], [1, 2]]

"""The teacher's view of the student's own encoding: vectors worked out by hand, sums over all texts, and any batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import oracle
import xtokmap
from enumeration import Model, Pair, cosine
from oracle import SPECIAL, STOP, Side, Tokens, mass_of_start, prefix_closed, spelled
from xtokmap.losses.credit import CREDITS, chunk_credit
from xtokmap.losses.queries import Transferred, boundary_leak, transfer
from xtokmap.losses.target import Stream, TransferTarget
from xtokmap.losses.transfer import transfer_kl
from xtokmap.torch.index import ChunkIndex
from xtokmap.torch.logits import Logits, TopK

# ---- vectors -----------------------------------------------------------------------------------------------------


class Case:
    """Vocabularies of both sides, and rows of tokens of the same texts."""

    def __init__(
        self, student: Tokens, teacher: Tokens, student_rows: list[Tokens], teacher_rows: list[Tokens]
    ) -> None:
        self.vocabularies = student, teacher
        sides = ((student, student_rows), (teacher, teacher_rows))
        self.ids = [[[vocabulary.index(t) for t in row] for row in rows] for vocabulary, rows in sides]
        tables = []
        for vocabulary in (student, teacher):
            stops = [i for i, t in enumerate(vocabulary) if t == STOP]
            tables.append(xtokmap.ByteTable.from_bytes([spelled(t) or None for t in vocabulary], stop_ids=stops))
        self.aligner = xtokmap.Aligner(*tables)
        self.batch = self.aligner.align_batch(*self.ids)
        self.index = ChunkIndex.from_alignment(self.batch)
        self.queries = self.aligner.cover_queries(self.batch)
        self.flat_ids = torch.tensor([i for row in self.ids[1] for i in row], dtype=torch.long)
        #: Of `transfer`: a row more than tokens for each text.
        self.num_rows = len(self.flat_ids) + len(teacher_rows)

    def student_ids(self) -> torch.Tensor:
        return self.padded(torch.tensor([i for row in self.ids[0] for i in row], dtype=torch.long), 0)

    def padded(self, flat: torch.Tensor, fill: float = math.nan) -> torch.Tensor:
        """Values of the flat student tokens as `[B, Ts]`."""
        places, shape = self.queries.places()
        out = torch.full((shape[0] * shape[1],), fill, dtype=flat.dtype)
        out[torch.from_numpy(places)] = flat
        return out.view(shape)

    def random_rows(self, seed: int, dtype: torch.dtype = torch.float64) -> Logits:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.num_rows, len(self.vocabularies[1]), generator=generator, dtype=torch.float64)
        return Logits((2 * x).to(dtype))

    def student_logits(self, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (*self.queries.places()[1], len(self.vocabularies[0]))
        return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


def evaluated(case: Case, teacher: Logits) -> tuple[Transferred, TransferTarget]:
    values = transfer(teacher, case.flat_ids, case.queries)
    return values, TransferTarget(teacher, case.flat_ids, case.queries)


def rows_of(vocabulary: Tokens, *rows: dict[str, float]) -> Logits:
    """Log probabilities by token; the row after the last one says nothing."""
    p = torch.zeros(len(rows) + 1, len(vocabulary), dtype=torch.float64)
    for k, row in enumerate(rows):
        for token, mass in row.items():
            p[k, vocabulary.index(token.encode())] = mass
    p[-1] = 1 / len(vocabulary)
    assert torch.allclose(p.sum(1), torch.ones(len(p), dtype=torch.float64))
    return Logits(p.log())


def tokens(text: str) -> Tokens:
    return [token.encode() for token in text.split("|")]


SINGLE = tokens("1|2|+|x|y")
V8 = Case(SINGLE, tokens("1|12|121|x|+|y"), [tokens("1|+")], [tokens("1|+")])
V8_ROWS = rows_of(V8.vocabularies[1], {"1": 0.01, "12": 0.29, "121": 0.68, "x": 0.02}, {"+": 0.98, "y": 0.02})
V9 = Case([*SINGLE, b"12"], SINGLE, [tokens("1|+")], [tokens("1|+")])
V9_ROWS = rows_of(V9.vocabularies[1], {"1": 0.9, "x": 0.1}, {"2": 0.7, "+": 0.3})


@pytest.mark.parametrize(
    ("case", "rows", "p", "phi", "log_q", "cover", "chunk"),
    [
        (
            V8,
            V8_ROWS,
            (0.9, 0.02),
            (0.98, 0.0098),
            (-0.020203, -4.605170),
            (0.085158, -0.693147),
            (-4.499810, 3.891820),
        ),
        (V9, V9_ROWS, (0.27, 0.95), (0.27, 0.27), (-1.309333, 0), (0, 0.051293), (1.203973, -1.152680)),
    ],
    ids=["student finer", "teacher finer"],
)
def test_a_boundary_says_what_did_not_come_next(case, rows, p, phi, log_q, cover, chunk):
    found = transfer(rows, case.flat_ids, case.queries)
    assert found.phi.tolist() == pytest.approx([math.log(x) for x in phi], abs=1e-12)
    assert found.transferred.tolist() == pytest.approx(log_q, abs=5e-7)
    log_p = torch.tensor([p], dtype=torch.float64).log()
    for credit in CREDITS:
        credited = chunk_credit(log_p, found.logprobs[None], case.index, credit, case.padded(found.transferred))
        want = cover if credit == "cover" else chunk
        assert credited.advantages[0].tolist() == pytest.approx(want, abs=1e-6)
        assert credited.scored.all()


def test_bluebird():
    teacher = tokens("bluebird|blue|blues|!| o|k|~")
    case = Case(tokens("blue|bird|!| ok|s|~| o|k"), teacher, [tokens("blue|bird|!| ok")], [tokens("bluebird|!| o|k")])
    log_q = (-1.2, -0.5, -0.3, -0.6)
    q = [math.exp(x) for x in log_q]
    first = {"bluebird": q[0], "blue": 0.25, "blues": 0.05}
    rest = [{token: x, "~": 1 - x} for token, x in zip(("!", " o", "k"), q[1:], strict=True)]
    rows = rows_of(teacher, {**first, "~": 1 - sum(first.values())}, *rest)
    found = transfer(rows, case.flat_ids, case.queries)
    assert found.logprobs.tolist() == pytest.approx(log_q)
    assert math.exp(found.phi[0]) == pytest.approx(0.601194, abs=5e-7)
    assert found.transferred.tolist() == pytest.approx([-0.508837, -0.691163, -0.5, -0.9], abs=5e-7)
    log_p = torch.tensor([[-0.7, -0.9, -0.2, -0.4]])
    credited = chunk_credit(log_p, found.logprobs[None], case.index, "cover", case.padded(found.transferred))
    assert credited.advantages[0].tolist() == pytest.approx([0.191163, 0.208837, -0.3, -0.5], abs=1e-6)


def test_the_whole_distribution_in_the_vectors():
    _, target = evaluated(V8, V8_ROWS)
    found, rest, undetermined = target.slice(0, 2)
    place = V8.vocabularies[0].index
    assert found[0, place(b"1")].item() == pytest.approx(0.98)
    assert found[0, place(b"x")].item() == pytest.approx(0.02)
    # Behind "1": 12 and 121 go on with 2, and a lone 1 is worth .01.
    assert found[1, place(b"2")].item() == pytest.approx(0.97 / 0.98)
    assert found[1, place(b"+")].item() == pytest.approx(0.0098 / 0.98)
    assert rest.tolist() == pytest.approx([0, 0], abs=1e-12)
    _, target = evaluated(V9, V9_ROWS)
    found, rest, undetermined = target.slice(0, 2)
    # The teacher's 1 may become the student's 12: what is known of both is .9.
    assert found[0, place(b"1")].item() == pytest.approx(0.9)
    assert undetermined.tolist() == pytest.approx([0.9, 0])
    assert found[1, place(b"+")].item() == pytest.approx(1)
    assert rest.tolist() == pytest.approx([0, 0], abs=1e-12)


# ---- all texts ---------------------------------------------------------------------------------------------------


def longest(text: str) -> Side:
    return Side(tuple(token.encode() for token in text.split()))


BYTES = longest("a b")
COARSE = longest("a b aa ab ba aab")
STUDENT_FINER, TEACHER_FINER = Pair(BYTES, COARSE), Pair(COARSE, BYTES)
NESTED = Pair(longest("a b ab"), longest("a b ab aba abab"))
SAME = Pair(longest("a b aa ab aab"), longest("a b aa ab aab"))
SAME_BPE = Pair(Side.bpe("a b", "a a", "ab a"), Side.bpe("a b", "a a", "ab a"))
OVERLAPPING = Pair(longest("a b ab bb"), longest("a b aa ab"))
FROM_BPE, TO_BPE = Pair(Side.bpe("a b", "ab a"), Side.bpe()), Pair(Side.bpe(), Side.bpe("a b", "ab a"))
HOSTILE = Pair(Side.bpe("a b", "b b", "bb a"), Side.bpe("b a", "a a", "aa b"))
EXACT = {
    "student finer": STUDENT_FINER,
    "teacher finer": TEACHER_FINER,
    "nested": NESTED,
    "same": SAME,
    "same BPE": SAME_BPE,
}
ALL = {**EXACT, "overlapping": OVERLAPPING, "from BPE": FROM_BPE, "to BPE": TO_BPE, "hostile": HOSTILE}

exact_pairs = pytest.mark.parametrize("pair", EXACT.values(), ids=EXACT)
all_pairs = pytest.mark.parametrize("pair", ALL.values(), ids=ALL)

words = st.lists(st.text("ab", min_size=1, max_size=3).map(str.encode), max_size=3)
vocabularies = words.map(lambda drawn: Side(prefix_closed([b"a", b"b", *drawn])))
seeds = st.integers(0, 2**32 - 1)


@st.composite
def merge_lists(draw: st.DrawFn) -> Side:
    pieces, merges = ["a", "b"], []
    for _ in range(draw(st.integers(0, 3))):
        left, right = draw(st.sampled_from(pieces)), draw(st.sampled_from(pieces))
        if left + right not in pieces:
            pieces.append(left + right)
            merges.append(f"{left} {right}")
    return Side.bpe(*merges)


def ends(side: Side, ids: tuple[int, ...]) -> set[int]:
    return set(np.cumsum([len(side.tokens[i]) for i in ids[:-1]]).tolist())


def is_finer(pair: Pair) -> bool:
    """Whether one side has all token ends of the other, in every text."""
    both = [
        (ends(pair.student.side, s), ends(pair.teacher.side, t))
        for s, t in zip(pair.student.ids, pair.teacher.ids, strict=True)
    ]
    return all(s >= t for s, t in both) or all(s <= t for s, t in both)


def assert_exact(model: Model) -> None:
    is_token = model.pair.is_token
    torch.testing.assert_close(model.transferred[is_token].exp(), model.log_q_star[is_token].exp(), atol=1e-9, rtol=0)


def models(pair: Pair, count: int = 5, **options: float) -> list[Model]:
    rng = np.random.default_rng(0)
    return [pair.model(rng, **options) for _ in range(count)]


@exact_pairs
def test_it_is_the_sum_over_all_texts(pair):
    for model in models(pair):
        assert_exact(model)


@settings(max_examples=25, deadline=None)
@given(vocabularies, vocabularies, seeds)
def test_it_is_the_sum_over_all_texts_wherever_one_side_is_finer(student, teacher, seed):
    for other in (teacher, BYTES, student):
        for pair in (Pair(student, other, 4), Pair(other, student, 4)):
            if is_finer(pair):
                assert_exact(pair.model(np.random.default_rng(seed)))


any_sides = st.one_of(st.tuples(vocabularies, vocabularies), st.tuples(merge_lists(), merge_lists()))


def drawn(sides: tuple[Side, Side], seed: int) -> tuple[Pair, Model]:
    """Two tokenizers, and models of them."""
    pair = Pair(*sides, length=4)
    assume(not pair.queries.identical)
    return pair, pair.model(np.random.default_rng(seed))


@settings(max_examples=40, deadline=None)
@given(any_sides, seeds)
def test_it_is_what_the_rows_of_one_text_show(sides, seed):
    pair, model = drawn(sides, seed)
    phi = model.values.phi
    for k, text in enumerate(pair.student.texts):
        rows = model.q[pair.teacher.nodes[k]]
        first = int(pair.queries.student_cu[k])
        found = phi[first : first + len(pair.student.ids[k]) - 1].exp().tolist()
        assert found == pytest.approx(mass_of_start((pair.student, pair.teacher), (k, k), rows), abs=1e-12), text


@all_pairs
def test_steps_add_up_to_the_probability_of_the_text(pair):
    (model,) = models(pair, 1)
    sums = torch.nan_to_num(model.transferred).sum(1)
    torch.testing.assert_close(sums, torch.from_numpy(np.log(model.text_probabilities)))


@pytest.mark.parametrize("pair", [OVERLAPPING, FROM_BPE, TO_BPE], ids=["overlapping", "from BPE", "to BPE"])
def test_elsewhere_it_points_the_right_way(pair):
    found = [cosine(model.expected(model.score_gradients("cover")), model.exact) for model in models(pair, 10)]
    assert np.mean(found) > 0.98
    chunks = [cosine(model.expected(model.score_gradients("full")), model.exact) for model in models(pair, 10)]
    assert np.mean(chunks) < np.mean(found)


@exact_pairs
def test_the_expected_advantage_is_the_gradient_of_the_divergence(pair):
    for model in models(pair):
        # Advantages are float32.
        np.testing.assert_allclose(model.expected(model.score_gradients("cover")), model.exact, atol=1e-6)


@exact_pairs
def test_a_student_that_agrees_has_no_advantage(pair):
    for model in models(pair, 3):
        agreed = Model(pair, model.q_star, model.q)
        assert np.abs(agreed.score_gradients("cover")).max() < 1e-6
        # A chunk's advantage is none only where nothing depends on the boundaries.
        if pair not in (SAME, SAME_BPE):
            assert np.abs(agreed.score_gradients("full")).max() > 1e-2


# ---- the whole distribution --------------------------------------------------------------------------------------


def whole(model: Model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Target, rest and undetermined mass at every token of every text, and what q* really is there."""
    found = model.target.slice(0, len(model.target))
    nodes = model.pair.student_nodes[model.pair.is_token]
    assert len(nodes) == len(model.target)
    return *found, torch.from_numpy(model.q_star)[nodes]


@all_pairs
def test_the_target_is_a_distribution(pair):
    for model in models(pair, 2):
        target, rest, undetermined, _ = whole(model)
        torch.testing.assert_close(target.sum(1) + rest, torch.ones_like(rest))
        assert (target >= 0).all()
        assert (rest >= 0).all()
        assert (undetermined <= 1 + 1e-9).all()


@exact_pairs
def test_the_target_is_q_star_but_for_what_it_calls_undetermined(pair):
    for model in models(pair):
        target, rest, undetermined, q_star = whole(model)
        too_much, too_little = (target - q_star).clamp(min=0).sum(1), (q_star - target).clamp(min=0).sum(1)
        assert (too_much <= undetermined + 1e-9).all()
        assert (too_little <= undetermined + 1e-9).all()
        assert (rest <= undetermined + 1e-9).all()
        known = undetermined < 1e-12
        assert known.any()
        torch.testing.assert_close(target[known], q_star[known])


INEXACT = [pair for pair in ALL.values() if pair not in EXACT.values()]


@pytest.mark.parametrize("pair", INEXACT, ids=[name for name in ALL if name not in EXACT])
def test_elsewhere_the_target_is_off_by_little_more(pair):
    """In the mean over what the student writes: the mass in the wrong place, beyond what is undetermined."""
    excess = []
    for model in models(pair, 5):
        target, rest, undetermined, q_star = whole(model)
        off = ((target - q_star).abs().sum(1) + rest) / 2
        times = torch.from_numpy(model.drawn).repeat_interleave(pair.is_token.sum(1))
        excess.append(((times * (off - undetermined).clamp(min=0)).sum() / times.sum()).item())
    assert np.mean(excess) < 0.03


def gradient(model: Model, **options) -> np.ndarray:
    return model.expected(model.loss_gradients("transfer_kl", **options))


@pytest.mark.parametrize("pair", [TEACHER_FINER, SAME, SAME_BPE], ids=["teacher finer", "same", "same BPE"])
def test_its_expected_gradient_is_that_of_the_divergence(pair):
    for model in models(pair):
        found = gradient(model, **model.sampled(), clamp=1e9, floor=1e-30)
        np.testing.assert_allclose(found, model.exact, atol=1e-6)


@pytest.mark.parametrize("pair", [STUDENT_FINER, NESTED], ids=["student finer", "nested"])
def test_where_the_student_is_finer_it_is_nearly_so(pair):
    """What of the rest is known there depends on the sampled token, so that it is not exact."""
    found = [cosine(gradient(model, **model.sampled()), model.exact) for model in models(pair, 10)]
    assert min(found) > 0.9
    assert np.mean(found) > 0.98


@pytest.mark.parametrize("pair", [TEACHER_FINER, SAME, SAME_BPE], ids=["teacher finer", "same", "same BPE"])
def test_a_student_that_agrees_gets_no_gradient(pair):
    for model in models(pair, 3):
        agreed = Model(pair, model.q_star, model.q)
        assert np.abs(agreed.loss_gradients("transfer_kl", **agreed.sampled())).max() < 1e-6


def test_it_has_less_variance_than_one_sample_of_it():
    for pair in ALL.values():
        for model in models(pair, 2):
            one = model.variance(model.score_gradients("cover"))
            assert model.variance(model.loss_gradients("transfer_kl", **model.sampled())) < one


def test_the_published_target_is_biased_where_this_one_is_not():
    for pair in (STUDENT_FINER, TEACHER_FINER, NESTED):
        ours, published = [], []
        for model in models(pair, 10, leak=1e-4):
            ours.append(cosine(gradient(model, **model.sampled()), model.exact))
            published.append(cosine(model.expected(model.loss_gradients("byte_kl", 1.0)), model.exact))
        assert np.mean(published) < 0.95 < np.mean(ours)


# ---- any batch ---------------------------------------------------------------------------------------------------

VOCABULARY = [b"a", b"b", b"c", b" ", b"ab", b"bc", b"abc", b"C", SPECIAL, STOP]
TEACHER_VOCABULARY = [STOP, SPECIAL, b"a", b"b", b"c", b" ", b"ab", b"ca", b"abca", b"bc", b"C"]
MIXED = Case(
    VOCABULARY,
    TEACHER_VOCABULARY,
    [
        [b"ab", b"c", b"a", STOP],
        [b"a", b"b", b"C", b" ", b"a", b"bc", STOP, SPECIAL],
        [],
        [b"ab", SPECIAL, b"c", b"b"],
        [b"abc", b" "],
    ],
    [
        [b"abca", STOP],
        [b"ab", b"c", b" ", b"ab", b"c", STOP],
        [],
        [b"ab", b"ca"],
        [b"a", b"bc", SPECIAL, b" "],
    ],
)
"""A stop, a REWRITTEN chunk and an unscored special, nothing, other bytes at the end, a special in the middle."""


def test_every_kind_of_token_has_a_value_or_none():
    values, target = evaluated(MIXED, MIXED.random_rows(0))
    found = MIXED.padded(values.transferred)
    finite = torch.isfinite(found)
    kind = MIXED.index.kind_of_student()
    assert not finite[kind == int(xtokmap.Kind.REWRITTEN)].any()
    assert finite[kind == int(xtokmap.Kind.STOP)].all()
    assert not finite[MIXED.index.student_chunk < 0].any()
    assert finite[0].sum() == 4
    assert not finite[2].any()
    # Those with a value are those with a target, and both sides say the same of the sampled token.
    assert len(target) == finite.sum()
    mass, rest, _ = target.slice(0, len(target))
    torch.testing.assert_close(mass.sum(1) + rest, torch.ones_like(rest))


def test_the_end_of_a_turn_is_the_teachers_own():
    rows = MIXED.random_rows(0)
    values, target = evaluated(MIXED, rows)
    # The first row's stop comes after a stretch that it belongs to.
    logprobs = rows.rows.log_softmax(-1)
    assert values.transferred[:4].sum().item() == pytest.approx(values.logprobs[:2].sum().item())
    stop = logprobs[1, TEACHER_VOCABULARY.index(STOP)]
    assert values.logprobs[1].item() == pytest.approx(stop.item())
    mass, _, _ = target.slice(3, 4)
    assert mass[0, VOCABULARY.index(STOP)].item() == pytest.approx(math.exp(values.transferred[3]))


def test_a_stretch_starts_anew_behind_a_rewritten_chunk():
    values, _ = evaluated(MIXED, MIXED.random_rows(0))
    found = MIXED.padded(values.transferred)[1]
    chunk = MIXED.index.kind_of_student()[1].tolist()
    behind = chunk.index(int(xtokmap.Kind.REWRITTEN)) + 1
    # " " | a bc STOP of the student, " " | ab c STOP of the teacher: all of it telescopes.
    assert found[behind : behind + 4].sum().item() == pytest.approx(values.logprobs[4:8].sum().item())


def test_a_special_token_in_a_teachers_row_restarts_the_stretch():
    values, _ = evaluated(MIXED, MIXED.random_rows(0))
    found = MIXED.padded(values.transferred)[4]
    rows = MIXED.random_rows(0).rows.log_softmax(-1)
    assert torch.isfinite(found[:2]).all()
    place = TEACHER_VOCABULARY.index
    # Behind it, " " is one token on both sides: its own row counts.
    assert found[1].item() == pytest.approx(rows[-2, place(b" ")].item())


def test_an_empty_batch():
    case = Case(VOCABULARY, TEACHER_VOCABULARY, [], [])
    rows = Logits(torch.zeros(0, len(TEACHER_VOCABULARY)))
    values, target = evaluated(case, rows)
    assert values.transferred.shape == (0,)
    assert len(target) == 0
    student = torch.zeros(*case.queries.places()[1], len(VOCABULARY), requires_grad=True)
    loss = transfer_kl(Logits(student), target, case.index)
    assert loss.loss.item() == 0
    assert loss.figures["tokens"] == 0


def test_rows_that_do_not_fit_are_refused():
    rows = MIXED.random_rows(0)
    with pytest.raises(xtokmap.XTokMapError, match="one more than tokens"):
        transfer(Logits(rows.rows[1:]), MIXED.flat_ids, MIXED.queries)
    _, target = evaluated(MIXED, rows)
    x = MIXED.student_logits(0)
    with pytest.raises(xtokmap.XTokMapError, match="the queries"):
        transfer_kl(Logits(x[:, 1:]), target, MIXED.index)
    with pytest.raises(xtokmap.XTokMapError, match="beta"):
        transfer_kl(Logits(x), target, MIXED.index, beta=2)


def loss_of(case: Case, x: torch.Tensor, teacher: Logits, **options):
    _, target = evaluated(case, teacher)
    sampled = {"student_ids": case.student_ids()}
    return transfer_kl(Logits(x), target, case.index, **{**sampled, **options})


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("stops", [True, False])
def test_unscored_tokens_reach_nothing(beta, stops):
    x = MIXED.student_logits(1)
    teacher = MIXED.random_rows(0)
    loss = loss_of(MIXED, x, teacher, beta=beta, stops=stops)
    (want,) = torch.autograd.grad(loss.loss, x)
    scored = loss.terms != 0
    expected = torch.isfinite(MIXED.padded(transfer(teacher, MIXED.flat_ids, MIXED.queries).transferred))
    if not stops:
        expected &= MIXED.index.kind_of_student() != int(xtokmap.Kind.STOP)
    assert torch.equal(scored, expected)
    assert loss.figures["tokens"] == expected.sum()
    assert (want[~scored] == 0).all()
    planted = x.detach().masked_fill(~scored[..., None], math.nan).requires_grad_()
    again = loss_of(MIXED, planted, teacher, beta=beta, stops=stops)
    assert again.loss.item() == loss.loss.item()
    (found,) = torch.autograd.grad(again.loss, planted)
    assert torch.equal(found, want)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_slices_change_nothing(size):
    teacher = MIXED.random_rows(0)
    whole_batch, slices = (transfer(teacher, MIXED.flat_ids, MIXED.queries, size=n) for n in (None, size))
    for name, a, b in zip(Transferred._fields, whole_batch, slices, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, msg=name)
    x = MIXED.student_logits(1)
    torch.testing.assert_close(loss_of(MIXED, x, teacher).terms, loss_of(MIXED, x, teacher, size=size).terms)
    target = evaluated(MIXED, teacher)[1]
    parts = [target.slice(a, min(a + size, len(target))) for a in range(0, len(target), size)]
    for a, b in zip(target.slice(0, len(target)), zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(a, torch.cat(b))


@pytest.mark.parametrize("block", [1, 40])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_blocks_of_a_slice_change_nothing(block, temperature, monkeypatch):
    teacher, g = MIXED.random_rows(0), torch.Generator().manual_seed(0)
    shape = MIXED.student_logits(1).shape
    inputs = [torch.randn(*n, generator=g, dtype=torch.float64) for n in ((*shape[:2], 5), (shape[2], 5), shape[2:])]
    inputs = [x.requires_grad_() for x in inputs]
    found = []
    for size in (2**20, block):
        monkeypatch.setattr(xtokmap.torch.logits, "_BLOCK", size)
        values, target = evaluated(MIXED, teacher)
        sampled = {"student_ids": MIXED.student_ids()}
        loss = transfer_kl(Logits(*inputs, temperature=temperature), target, MIXED.index, **sampled, size=7)
        found.append((*values, loss.terms, loss.entropy, *torch.autograd.grad(loss.loss, inputs)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("read", [1, 2, 3, 100])
def test_rows_that_are_read_as_they_come_are_those_that_were_read_before(read, bias, dtype, monkeypatch):
    """With a head, however few rows are made at a time, and though not every row stands behind a position."""
    g = torch.Generator().manual_seed(0)
    size = len(MIXED.vocabularies[1])
    parts = [
        torch.randn(*n, generator=g, dtype=torch.float64).to(dtype) for n in ((MIXED.num_rows, 5), (size, 5), (size,))
    ]
    teacher = Logits(*(parts if bias else parts[:2]), temperature=1.5)
    rows = [teacher.slice(k, k + 1) for k in range(MIXED.num_rows)]
    x = MIXED.student_logits(1)
    want = loss_of(MIXED, x, Logits(torch.cat(rows)), denominator=1)
    (slope,) = torch.autograd.grad(want.loss, x)
    monkeypatch.setattr(xtokmap.losses.queries, "_SLICE", read * size)
    for student in (1, 4, 100):
        found = loss_of(MIXED, x, teacher, denominator=1, size=student)
        exact = {} if dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-4}
        torch.testing.assert_close(found.terms, want.terms, **exact)
        torch.testing.assert_close(torch.autograd.grad(found.loss, x)[0], slope, **exact)


def test_a_graph_that_is_kept_goes_through_the_rows_again():
    x = MIXED.student_logits(1)
    loss = loss_of(MIXED, x, MIXED.random_rows(0), size=2).loss
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_what_parts_come_by_the_batch_knows(monkeypatch):
    teacher, x = MIXED.random_rows(0), MIXED.student_logits(1)
    values, target = evaluated(MIXED, teacher)
    for rows in ([2], [4, 0], [1, 3]):
        transfer_kl(Logits(x[rows]), target.select(rows), MIXED.index.rows(torch.tensor(rows)))

    def never(*_: object) -> None:
        raise AssertionError("the rows were gone through")

    monkeypatch.setattr(xtokmap.losses.target, "transfer", never)
    torch.testing.assert_close(target.transferred(), MIXED.padded(values.transferred.float()), equal_nan=True)
    found = target.logprobs()
    assert found.shape == (5, max(map(len, MIXED.ids[1])))
    assert found[0, : len(MIXED.ids[1][0])].tolist() == pytest.approx(values.logprobs[: len(MIXED.ids[1][0])].tolist())
    other = TransferTarget(teacher, MIXED.flat_ids, MIXED.queries)
    transfer_kl(Logits(x[:1]), other.select([0]), MIXED.index.rows(torch.tensor([0])))
    with pytest.raises(AssertionError, match="gone through"):  # of the others nothing is known yet
        other.logprobs()


@pytest.mark.parametrize("parts", [[[0], [1], [2], [3], [4]], [[0, 1], [2, 3, 4]], [[4, 2, 0], [3, 1]]])
def test_micro_batches_add_up(parts):
    teacher, x = MIXED.random_rows(0), MIXED.student_logits(1)
    values, target = evaluated(MIXED, teacher)
    ids = MIXED.student_ids()
    want = transfer_kl(Logits(x), target, MIXED.index, student_ids=ids, denominator=7)
    (gradient_of_all,) = torch.autograd.grad(want.loss, x)
    cu, student_cu = MIXED.queries.teacher_cu, MIXED.queries.student_cu
    total, sums = torch.zeros_like(x), 0.0
    for rows in parts:
        # Rows and ids of a part, evaluated by themselves.
        at = torch.cat([torch.arange(cu[b] + b, cu[b + 1] + b + 1) for b in rows])
        own = torch.cat([MIXED.flat_ids[cu[b] : cu[b + 1]] for b in rows])
        part = transfer(Logits(teacher.rows[at]), own, MIXED.queries.select(rows))
        spans = torch.cat([values.transferred[student_cu[b] : student_cu[b + 1]] for b in rows])
        torch.testing.assert_close(part.transferred, spans, equal_nan=True)
        # The loss of a part, from the target of the whole batch.
        y = x.detach()[rows].requires_grad_()
        loss = transfer_kl(
            Logits(y),
            target.select(rows),
            MIXED.index.rows(torch.tensor(rows)),
            student_ids=ids[rows],
            denominator=7,
        )
        torch.testing.assert_close(loss.terms, want.terms[rows])
        (total[rows],) = torch.autograd.grad(loss.loss, y)
        sums += loss.loss.item()
    assert sums == pytest.approx(want.loss.item(), abs=1e-9)
    torch.testing.assert_close(total, gradient_of_all)


def top(teacher: Logits, k: int, ids: torch.Tensor | None = None) -> TopK:
    """The k likeliest tokens of every row, and the one that is really there."""
    logprobs = teacher.rows.log_softmax(-1)
    chosen = logprobs.topk(k, -1).indices
    if ids is not None:
        extra = ids[:, None].masked_fill((chosen == ids[:, None]).any(1, keepdim=True), -1)
        chosen = torch.cat([chosen, extra], 1)
    return TopK(chosen, logprobs.gather(1, chosen.clamp(min=0)))


def test_all_tokens_listed_are_whole_rows():
    teacher = MIXED.random_rows(0)
    whole_rows = transfer(teacher, MIXED.flat_ids, MIXED.queries)
    listed = transfer(top(teacher, len(TEACHER_VOCABULARY)), MIXED.flat_ids, MIXED.queries)
    torch.testing.assert_close(listed.transferred, whole_rows.transferred, equal_nan=True)
    torch.testing.assert_close(listed.logprobs, whole_rows.logprobs)
    assert listed.missing.max() < 1e-12
    with pytest.raises(xtokmap.XTokMapError, match="not top-k"):
        TransferTarget(top(teacher, 3), MIXED.flat_ids, MIXED.queries)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_what_top_k_does_not_list_is_reported(k):
    teacher = MIXED.random_rows(0)
    cu = MIXED.queries.teacher_cu
    really = torch.full((MIXED.num_rows,), -1)
    for b in range(len(MIXED.queries)):
        really[cu[b] + b : cu[b + 1] + b] = MIXED.flat_ids[cu[b] : cu[b + 1]]
    listed = top(teacher, k, really)
    found = transfer(listed, MIXED.flat_ids, MIXED.queries)
    shown = torch.where(listed.ids >= 0, listed.logprobs.exp(), 0).sum(1)
    torch.testing.assert_close(found.missing, 1 - shown)
    # The tokens that are really there count, so that nothing becomes impossible; a stretch still adds up.
    whole_rows = transfer(teacher, MIXED.flat_ids, MIXED.queries)
    torch.testing.assert_close(found.logprobs, whole_rows.logprobs)
    assert torch.equal(torch.isfinite(found.transferred), torch.isfinite(whole_rows.transferred))
    assert found.transferred[:4].sum().item() == pytest.approx(whole_rows.logprobs[:2].sum().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_summed_in_float32(dtype):
    teacher, x = MIXED.random_rows(0, dtype), MIXED.student_logits(1, dtype)
    values, _ = evaluated(MIXED, teacher)
    assert values.transferred.dtype == torch.float32
    assert values.phi.dtype == torch.float64
    exact = Logits(teacher.rows.double())
    wanted, _ = evaluated(MIXED, exact)
    torch.testing.assert_close(values.transferred.double(), wanted.transferred, atol=2e-6, rtol=0, equal_nan=True)
    loss = loss_of(MIXED, x, teacher)
    assert loss.loss.dtype == torch.float32
    want = loss_of(MIXED, x.detach().double().requires_grad_(), exact)
    assert loss.loss.item() == pytest.approx(want.loss.item(), abs=1e-5)
    (found,) = torch.autograd.grad(loss.loss, x)
    assert found.dtype == dtype
    assert torch.isfinite(found).all()


def test_long_rows_do_not_cancel():
    text = [b"ab", b"c"] * 3000
    case = Case(VOCABULARY, TEACHER_VOCABULARY, [text], [[b"ab", b"ca", b"bc"] + [b"a", b"bc"] * 2998])
    teacher = Logits(case.random_rows(0).rows.float())
    exact = transfer(Logits(teacher.rows.double()), case.flat_ids, case.queries)
    found = transfer(teacher, case.flat_ids, case.queries)
    torch.testing.assert_close(found.transferred.double(), exact.transferred, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("beta", "stops", "bridge"),
    [(0.0, True, 0.0), (0.5, True, 0.0), (1.0, True, 0.0), (1.0, False, 0.0), (1.0, True, 0.7), (0.0, True, 0.7)],
)
def test_gradcheck(beta, stops, bridge):
    """Without A, which is held: what depends on the student in it is no part of the gradient."""
    rows = [[b"ab", b"c", b"a", STOP], [b"abc", b" "]]
    case = Case(VOCABULARY, TEACHER_VOCABULARY, rows, [[b"abca", STOP], [b"a", b"bc", b" "]])
    _, target = evaluated(case, case.random_rows(0))
    x = case.student_logits(1)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return transfer_kl(Logits(x), target, case.index, beta=beta, stops=stops, stop_bridge=bridge).loss

    assert torch.autograd.gradcheck(loss, x)


def test_the_bridge_is_a_forward_kl_of_whether_the_turn_ends():
    rows = [[b"ab", b"c", b"a", STOP], [b"abc", b" "]]
    case = Case(VOCABULARY, TEACHER_VOCABULARY, rows, [[b"abca", STOP], [b"a", b"bc", b" "]])
    teacher, x = case.random_rows(0), case.student_logits(1)
    _, target = evaluated(case, teacher)
    plain, bridged = (
        transfer_kl(Logits(x), target, case.index, stop_bridge=weight, denominator=1) for weight in (0.0, 0.5)
    )
    stop = list(case.queries.vocab_map.student_stops)
    p = x.detach()[0, 3].softmax(-1)[stop].sum()
    q = target.slice(3, 4)[0][0, stop].sum()
    assert 0.01 < q < 0.99
    want = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    torch.testing.assert_close((bridged.terms - plain.terms)[0, 3], 0.5 * want)
    without = [
        transfer_kl(Logits(x), target, case.index, stops=False, stop_bridge=weight, denominator=1)
        for weight in (0.0, 0.5)
    ]
    torch.testing.assert_close(without[0].terms, without[1].terms)


def test_a_student_that_never_stops_is_pulled_by_the_bridge_alone():
    case = Case(VOCABULARY, TEACHER_VOCABULARY, [[b"ab", STOP]], [[b"ab", STOP]])
    teacher = Logits(torch.zeros(case.num_rows, len(TEACHER_VOCABULARY)))
    teacher.rows[1, list(case.queries.vocab_map.teacher_stops)] = 20
    _, target = evaluated(case, teacher)
    x = torch.zeros(1, 2, len(VOCABULARY), requires_grad=True)
    stop = list(case.queries.vocab_map.student_stops)
    with torch.no_grad():
        x[0, 1, stop] = -20
    slow, pulled = (
        torch.autograd.grad(transfer_kl(Logits(x), target, case.index, stop_bridge=weight, denominator=1).loss, x)[0][
            0, 1, stop
        ].sum()
        for weight in (0.0, 1.0)
    )
    assert abs(slow) < 1e-6
    assert pulled == pytest.approx(-1, abs=1e-3)


def without_rows_behind(teacher: Logits, case: Case | Pair) -> TransferTarget:
    """What there is where the row behind a teacher token is not asked."""
    return TransferTarget(teacher, case.flat_ids, case.aligner.cover_queries(case.batch, rows=False))


def test_the_sampled_part_is_held():
    values = transfer(V9_ROWS, V9.flat_ids, V9.queries)
    target = without_rows_behind(V9_ROWS, V9)
    x = V9.student_logits(0)
    sampled = {"student_ids": V9.student_ids()}
    with_it = transfer_kl(Logits(x), target, V9.index, **sampled, denominator=1)
    without = transfer_kl(Logits(x), target, V9.index, denominator=1)
    (a,), (b,) = (torch.autograd.grad(loss.loss, x) for loss in (with_it, without))
    # "1" and "12" are one event: which of them it is, is learned from the sampled one.
    log_p = x.detach()[0, 0].log_softmax(-1)
    one, twelve = (V9.vocabularies[0].index(t) for t in (b"1", b"12"))
    log_p_event = torch.logaddexp(log_p[one], log_p[twelve])
    advantage = (values.transferred[0] - math.log(0.9)) - (log_p[one] - log_p_event)
    one_hot = torch.nn.functional.one_hot(torch.tensor(one), len(log_p))
    torch.testing.assert_close((a - b)[0, 0], advantage * (log_p.exp() - one_hot), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(a[0, 1], b[0, 1])
    assert with_it.figures["shared"].item() == pytest.approx(0.5)
    held = transfer_kl(Logits(x), target, V9.index, **sampled, clamp=0.01, denominator=1)
    (c,) = torch.autograd.grad(held.loss, x)
    signed = 0.01 * advantage.sign()
    torch.testing.assert_close((c - b)[0, 0], signed * (log_p.exp() - one_hot), atol=1e-6, rtol=1e-5)


# ---- which token of an event it is ---------------------------------------------------------------------------------


def test_the_row_behind_says_which_token_of_an_event_it_is():
    """V9: of .9 on "1" and "12" together, .7 goes on with "2"."""
    _, target = evaluated(V9, V9_ROWS)
    x = V9.student_logits(0)
    sampled = {"student_ids": V9.student_ids()}
    loss = transfer_kl(Logits(x), target, V9.index, **sampled, denominator=1)
    (found,) = torch.autograd.grad(loss.loss, x)
    vocabulary = V9.vocabularies[0]
    p = x.detach()[0, 0].softmax(-1)
    q = torch.full_like(p, torch.nan)
    q[[vocabulary.index(t) for t in (b"1", b"12", b"x")]] = torch.tensor([0.27, 0.63, 0.1], dtype=q.dtype)
    rest = torch.isnan(q)  # together, at least .01
    log_q = torch.where(rest, p / p[rest].sum() * 0.01, q).log()
    divergence = (p * (p.log() - log_q)).sum()
    event = [vocabulary.index(t) for t in (b"1", b"12")]
    share = p[event] / p[event].sum()
    inside = (share * (share / torch.tensor([0.3, 0.7])).log()).sum()
    # The gradient of the divergence, but for that inside the event: of one sample the whole of it, not p(event) of it.
    outside = divergence - p[event].sum() * inside
    one = torch.zeros_like(p)
    one[event] = share * (share / torch.tensor([0.3, 0.7], dtype=p.dtype)).log()
    of_events = p.log() - log_q
    of_events[event] = (p[event].sum() / 0.9).log()
    torch.testing.assert_close(found[0, 0], p * (of_events - outside - inside) + one, atol=1e-6, rtol=1e-5)
    assert loss.terms[0, 0].item() == pytest.approx((outside + inside).item(), abs=1e-6)
    assert loss.figures["shared"] == 0


FINER = {name: pair for name, pair in EXACT.items() if name.startswith("teacher")}


@pytest.mark.parametrize("pair", FINER.values(), ids=FINER)
def test_groups_have_the_mass_of_the_texts(pair):
    checked = 0
    for model in models(pair, 3):
        target = model.target
        groups = Stream(target).made(0, len(target)).slice(0, len(target)).groups
        (at, own, several, known), (row, mass), (of, ids, group) = groups.rows, groups.groups, groups.members
        node = pair.student_nodes[pair.is_token][at]
        assert (known == 1).all()
        real = pair.student_ids[pair.is_token]
        for k in range(len(at)):
            members = (of == at[k]).nonzero()[:, 0]
            names = group[members].unique()
            assert torch.equal(names, (row == k).nonzero()[:, 0])
            for name in names:
                q = sum(model.q_star[node[k], ids[m]] for m in members if group[m] == name)
                assert mass[name].item() == pytest.approx(q, abs=1e-9)
            (mine,) = (group[m] for m in members if ids[m] == real[at[k]])
            assert own[k] == mine
            assert several[k] == ((group[members] == mine).sum() > 1)
            checked += len(members) > 1
    assert checked > 10


@exact_pairs
def test_a_row_behind_changes_no_mean_and_makes_samples_agree(pair):
    for model in models(pair, 2):
        with_it = model.loss_gradients("transfer_kl", **model.sampled())
        model.target = without_rows_behind(model.flat_teacher, pair)
        without = model.loss_gradients("transfer_kl", **model.sampled())
        np.testing.assert_allclose(model.expected(with_it), model.expected(without), atol=1e-6)
        ratio = model.variance(with_it) / model.variance(without)
        assert ratio < 0.8 if pair in FINER.values() else ratio < 1.001


@settings(max_examples=40, deadline=None)
@given(any_sides, seeds)
def test_groups_are_used_where_their_masses_are_known(sides, seed):
    """At every place they add up to what the teacher's row gives the event, less what leaves it."""
    pair, model = drawn(sides, seed)
    target = model.target
    bins, _, _, groups = Stream(target).made(0, len(target)).slice(0, len(target))
    assume(groups is not None)
    (at, _, _, known), (row, mass), (of, ids, group) = groups.rows, groups.groups, groups.members
    assert ((known == 0) | (known == 1)).all()
    total = torch.zeros(len(at), dtype=mass.dtype).index_add(0, row, mass)
    event = target.maps.student_event[pair.student_ids[pair.is_token][at]]
    given = bins[at, event]
    assert (total <= given + 1e-9).all()
    assert (total >= given * 0.95 - 1e-9)[known == 1].all()
    assert (mass >= 0).all()
    # Each member of each event once, in a group of its own place.
    assert torch.equal(target.maps.student_event[ids], event[torch.searchsorted(at, of)])
    assert torch.equal(at[row[group]], of)
    for k in range(len(at)):
        assert sorted(ids[of == at[k]].tolist()) == (target.maps.student_event == event[k]).nonzero()[:, 0].tolist()


def test_groups_of_no_mass_cost_the_floor():
    """What the teacher never makes, in an event, is one group, of the least probability."""
    case = Case([*SINGLE, b"12", b"1x", b"1y"], SINGLE, [tokens("1|+")], [tokens("1|+")])
    rows = rows_of(SINGLE, {"1": 1.0}, {"2": 0.5, "+": 0.5})
    _, target = evaluated(case, rows)
    x = torch.zeros(1, 2, len(case.vocabularies[0]), dtype=torch.float64, requires_grad=True)
    sampled = {"student_ids": case.student_ids()}
    loss = transfer_kl(Logits(x), target, case.index, **sampled, floor=0.01, denominator=1)
    (gradient,) = torch.autograd.grad(loss.loss, x)
    inside = 0.5 * math.log(0.25 / 0.5) + 0.5 * math.log(0.5 / 0.01)
    outside = 0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 0.01)
    assert loss.terms[0, 0].item() == pytest.approx(inside + outside)
    never = [case.vocabularies[0].index(t) for t in (b"1x", b"1y")]
    assert (gradient[0, 0, never] > 0.3).all()
    assert torch.isfinite(gradient).all()


def test_queries_of_tokens_alone_ask_no_row_behind():
    queries = V9.aligner.cover_queries(V9.batch, rows=False)
    assert queries.within is None
    values = transfer(V9_ROWS, V9.flat_ids, queries)
    assert values.within is None
    assert values.transferred.tolist() == evaluated(V9, V9_ROWS)[0].transferred.tolist()
    assert Stream(TransferTarget(V9_ROWS, V9.flat_ids, queries)).made(0, 2).slice(0, 2).groups is None


def test_what_no_tokenizer_would_have_put_side_by_side_is_no_log_0():
    case = Case(V9.vocabularies[0], V9.vocabularies[1], [tokens("1|2")], [tokens("1|2")])
    assert case.queries.figures()["not_canonical"] == 1
    found = transfer(V9_ROWS, case.flat_ids, case.queries)
    # Nothing is taken to merge at that boundary.
    assert found.transferred.tolist() == pytest.approx([math.log(0.9), math.log(0.7)])


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_tokens_that_a_side_rules_out(beta):
    teacher = MIXED.random_rows(0)
    # Of the teacher's: what is neither there nor needed by a boundary; of the student's: a token that is not sampled.
    place = TEACHER_VOCABULARY.index
    rows = teacher.rows.clone()
    rows[:, place(SPECIAL)] = -math.inf
    rows[0, place(b"C")] = -math.inf
    x = MIXED.student_logits(1).detach().clone()
    x[..., VOCABULARY.index(SPECIAL)] = -math.inf
    x.requires_grad_()
    # The special that the fifth row really has keeps its mass.
    rows[:, place(SPECIAL)] = torch.where(torch.arange(len(rows)) == len(rows) - 3, 0.0, rows[:, place(SPECIAL)])
    loss = loss_of(MIXED, x, Logits(rows), beta=beta)
    assert torch.isfinite(loss.loss)
    assert loss.figures["nonfinite"] == 0
    (found,) = torch.autograd.grad(loss.loss, x)
    assert torch.isfinite(found).all()
    assert (found[..., VOCABULARY.index(SPECIAL)] == 0).all()


def test_one_tokenizer_on_both_sides_is_the_exact_divergence():
    rows = [[b"ab", b"c", b" ", STOP], [b"a", b"b", SPECIAL, b"abc"], [b"C"]]
    case = Case(VOCABULARY, VOCABULARY, rows, rows)
    assert case.queries.identical
    teacher, x = case.random_rows(0), case.student_logits(1)
    values = transfer(teacher, case.flat_ids, case.queries)
    scored = torch.isfinite(case.padded(values.transferred))
    assert torch.equal(scored, case.index.student_chunk >= 0)
    known = torch.isfinite(values.transferred)
    torch.testing.assert_close(values.transferred[known], values.logprobs[known])
    # Ids that lie alike on both sides: the teacher's rows are those of the student's places.
    cu = case.queries.teacher_cu
    for beta in (0.0, 1.0):
        loss = loss_of(case, x, teacher, beta=beta)
        (found,) = torch.autograd.grad(loss.loss, x)
        y = x.detach().clone().requires_grad_()
        terms = []
        for b, row in enumerate(rows):
            log_q = teacher.rows[cu[b] + b : cu[b + 1] + b].log_softmax(-1)
            log_p = y[b, : len(row)].log_softmax(-1)
            one = log_p.exp() * (log_p - log_q) if beta else log_q.exp() * (log_q - log_p)
            terms.append(one.sum(-1)[scored[b, : len(row)]])
        want = torch.cat(terms).mean()
        assert loss.loss.item() == pytest.approx(want.item(), abs=1e-6)
        torch.testing.assert_close(found, torch.autograd.grad(want, y)[0], atol=1e-6, rtol=0)


@settings(max_examples=50, deadline=None)
@given(st.data(), seeds)
def test_whatever_the_tokens(data, seed):
    """Random tokens that no tokenizer would have produced: values where they must be, and distributions."""
    student, teacher = data.draw(oracle.vocabularies())
    vocabularies = [[*sorted({*side, b"a", b"b"} - {SPECIAL, STOP}), SPECIAL, STOP] for side in (student, teacher)]
    case = Case(*vocabularies, [student], [teacher])
    values, target = evaluated(case, case.random_rows(seed))
    found = values.transferred
    assert torch.equal(torch.isfinite(found), torch.from_numpy(case.queries.base > -2))
    mass, rest, undetermined = target.slice(0, len(target))
    torch.testing.assert_close(mass.sum(1) + rest, torch.ones_like(rest))
    assert (undetermined > -1e-9).all()
    loss = loss_of(case, case.student_logits(seed), case.random_rows(seed))
    assert torch.isfinite(loss.loss)
    # Over every unbroken stretch the steps add up to what the terms of its last token say.
    base = case.queries.base
    for i in np.flatnonzero(base >= 0):
        end = i + 1
        while end < len(base) and base[end] == -1:
            end += 1
        steps = found[i:end].sum().item()
        assert steps == pytest.approx((values.phi[end - 1] - values.before[int(base[i])]).item(), abs=1e-9)


def test_the_leak_is_the_mass_of_what_begins_with_a_token_over_its_own():
    student = xtokmap.ByteTable.from_bytes([b"1", b"2", b"x"])
    teacher = xtokmap.ByteTable.from_bytes([b"1", b"12", b"121", b"x", None])
    row = torch.tensor([0.01, 0.29, 0.68, 0.01, 0.01])
    found = boundary_leak(
        Logits(row.log().expand(3, -1)), torch.tensor([0, 1, 4]), xtokmap.Aligner(student, teacher).vocab_map
    )
    assert found.tolist() == pytest.approx([math.log(0.98 / 0.01), math.log(0.97 / 0.29), 0], abs=1e-5)

"""Runs of spaces, which tokenizers cut each in their own way: what losses say of them, by enumeration."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
import tokenizers
import torch

import whitespace
from enumeration import Model, Pair, cosine
from oracle import Side
from whitespace import EXPECTED, SIDES, TASK, TEXTS, Real, World

#: Where each token of the student's says of one space more whether it goes on, or a word takes the last.
DECIDED = [
    ("single", "doubling"),
    ("pairs", "doubling"),
    ("pairs", "every run"),
    ("every run", "single"),
    ("joined", "doubling"),
    ("joined", "new line"),
]


@pytest.fixture(scope="module", params=DECIDED, ids=" <- ".join)
def world(request):
    student, teacher = request.param
    return World(SIDES[student], SIDES[teacher])


def test_cover_says_of_white_space_what_the_teacher_thinks_and_prior_does_not(world):
    assert world.space.sum() > len(TEXTS)
    for where in (world.space, world.pair.is_token & ~world.space):
        given, exact = world.advantages("cover")
        assert world.mean(given, where) == pytest.approx(world.mean(exact, where), abs=0.01)
        assert world.mean(abs(given - exact), where) < 0.03
        given, exact = world.advantages("prior")
        assert world.mean(abs(given - exact), where) > 0.2


def test_the_same_of_real_tokenizers():
    world = World(Real.named("cl100k"), Real.named("anthropic"), leak=1e-9)
    for where in (world.space, world.pair.is_token & ~world.space):
        given, exact = world.advantages("cover")
        assert world.mean(abs(given - exact), where) < 0.01
        given, exact = world.advantages("prior")
        assert world.mean(abs(given - exact), where) > 0.5


SIDES_OF_ENDS = {
    "of a pre-tokenizer": lambda: (Real(whitespace.tokenizer("joined")), Real(whitespace.tokenizer("runs"))),
    "of merges": lambda: (SIDES["joined"], SIDES["every run"]),
    "cl100k": lambda: (Real.named("cl100k"), Real.named("anthropic")),
    "qwen": lambda: (Real.named("qwen"), Real.named("anthropic")),
}


@pytest.mark.parametrize("sides", SIDES_OF_ENDS)
def test_a_run_whose_cut_depends_on_what_comes_behind_it(sides):
    """The last space of a run joins a word, and stays where a new line follows; the teacher merges all of it."""
    student, teacher = SIDES_OF_ENDS[sides]()
    word = b"x" if sides == "of merges" else b"c"
    texts = [b"\n" + b" " * n + end for n in range(1, 9) for end in (word, b"\n")]
    pair = Pair(student, teacher, texts=texts)
    lines = np.array([0.12375 if text.endswith(word) else 0.00125 for text in texts])
    start = pair.student.conditionals(np.full(len(texts), 1 / len(texts)))
    model = Model(pair, start, pair.teacher.conditionals(lines), leak=1e-7)
    off = (model.transferred - model.log_q_star).abs()[pair.is_token]
    assert off.max() < 0.05, off
    # Only where the last space is told from the word does the row not say what comes next.
    target = model.target
    positions = torch.from_numpy(target.places()[0])
    rows, rest, undetermined = target.slice(0, len(target))
    exact = torch.from_numpy(model.q_star)[pair.student_nodes].flatten(0, 1)[positions]
    known = undetermined < 0.05
    assert known.double().mean() > 0.35
    # A line's end behind spaces that are not the text's own is taken for a word's beginning.
    assert (rows[:, : exact.shape[1]] - exact).abs().sum(1)[known].max() < 0.1, sides
    assert rest[known].max() < 0.05


@pytest.mark.parametrize("side", ["left", "right"])
def test_numbers_that_are_grouped_from_the_right_are_warned_of(side):
    """Of a number's first digits the student's cut is known only when the number has ended."""
    pattern = {"left": r"[0-9]{1,2}|[^0-9]", "right": r"[0-9](?=(?:[0-9]{2})+(?![0-9]))|[0-9]{1,2}|[^0-9]"}[side]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=dict(zip("12+", range(3), strict=True)), merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=8, special_tokens=["</s>"], show_progress=False)
    made.train_from_iterator(["1+2", "11", "12", "21", "22"] * 9, trainer)
    made.decoder = tokenizers.decoders.Fuse()
    texts = ["".join(x).encode() for n in range(5) for x in product("12+", repeat=n)]
    teacher = Side.bpe(alphabet="12+")

    def look():
        pair = Pair(Real(made), teacher, texts=texts)
        model = pair.model(np.random.default_rng(0), leak=1e-9)
        return (model.transferred - model.log_q_star).abs()[pair.is_token].max()

    if side == "left":
        assert look() < 1e-4
    else:
        with pytest.warns(UserWarning, match="groups digits from the right"):
            assert look() > 0.5


def test_a_student_that_follows_cover_or_transfer_kl_learns_to_indent(world):
    before, _ = world.follow(EXPECTED["exact"], steps=0)
    spaces = world.lines @ np.arange(len(TEXTS))
    assert before > 0.6
    for loss in ("exact", "`cover`", "`transfer_kl`"):
        off, written = world.follow(EXPECTED[loss], steps=60)
        assert off < 0.05, loss
        assert written == pytest.approx(spaces, abs=0.2), loss
    assert world.follow(EXPECTED["`prior`"], steps=60)[0] > 0.25


def test_byte_kl_asks_for_what_the_student_did_inside_a_run():
    """Whether a run goes on is read off from whether it did: the teacher's own tokens part the two cases."""
    world = World(SIDES["single"], SIDES["doubling"])
    model, paths = world.model, world.pair.student
    found = model.loss_gradients("byte_kl", 0.0)
    node = paths.node[tuple(paths.side.encode(b"\n"))]  # behind which the teacher has 1, 2, 4 or 8 spaces, or a word
    after = paths.node[tuple(paths.side.encode(b"\n "))]
    space, word = (paths.side.tokens.index(token) for token in (b" ", b"x"))
    asked = {}
    for n, text in ((1, b"\n x"), (8, b"\n        x")):
        ids = paths.side.encode(text)
        row = found[TEXTS.index(text)]
        # The gradient of a forward KL is p - target.
        asked[n] = model.p[after, space] - row[2, space]
        assert ids[2] == (word if n == 1 else space)
    assert asked[1] < 0.01
    assert asked[8] > 0.99
    assert 0.9 < model.q_star[after, space] < 1
    first = np.array([row[1, space] for row in found])
    np.testing.assert_allclose(first, first[0], atol=1e-9)  # the same row for all: nothing is given away yet
    assert model.p[node, space] - first[0] == pytest.approx(model.q_star[node, space], abs=1e-3)


@pytest.mark.parametrize("loss", ["`byte_kl`, reverse", "`byte_kl`, forward", "the same, white space masked"])
def test_byte_kl_unlearns_to_indent(loss):
    world = World(SIDES["single"], SIDES["doubling"])
    off, written = world.follow(EXPECTED[loss], steps=60)
    assert off > 0.6
    assert abs(written - world.lines @ np.arange(len(TEXTS))) > 2


def test_the_same_tokenizer_on_both_sides_needs_no_mask():
    world = World(SIDES["doubling"], SIDES["doubling"])
    for loss in ("`prior`", "`cover`", "`transfer_kl`", "`byte_kl`, reverse"):
        gradient = EXPECTED[loss](world.model, world.space)
        assert cosine(gradient, world.model.exact) > 1 - 1e-4, loss


def test_the_task_is_judged_space_by_space():
    problem = (2, 6, 5, 1)
    right = "\n            c       6\n\n  f                 1"
    assert TASK.write(problem, random.Random(0)).text == right
    assert TASK.is_right(problem, right)
    assert not TASK.is_right(problem, right.replace("c ", "c  "))
    wrong = TASK.write(problem, random.Random(0), mistakes=1.0)
    assert len(wrong.wrong) == 4
    assert wrong.text != right


@pytest.mark.parametrize("cut", whitespace.CUTS)
def test_the_tokenizers_cut_runs_as_they_are_called(cut):
    made = whitespace.tokenizer(cut)
    text = TASK.write((2, 6, 5, 1), random.Random(0)).text
    tokens = [made.decode([i]) for i in made(text).input_ids]
    assert "".join(tokens) == text
    assert max(len(t) for t in tokens if t.isspace()) == (2 if cut == "pairs" else max(map(len, tokens)))
    assert (" 6" in tokens) == (cut == "joined")
    assert ("\n" + " " * 12 in tokens) == (cut == "runs and new lines")

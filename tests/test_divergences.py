"""The losses of whole distributions: hand-checked vectors, their plain forms, and the properties that they must have."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import SPECIAL, STOP, Tokens, VocabMap, interior_queries, spelled

import xtokmap
from xtokmap.losses import (
    Completions,
    Spelling,
    alm,
    byte_kl,
    chunk_credit,
    compass,
    completion,
    strict_kl,
    uld_hybrid,
)
from xtokmap.torch import ChunkIndex, Logits, TopK

BETAS = (0.0, 0.5, 1.0)


class Case:
    """Vocabularies of both sides, and rows of tokens of the same texts, padded on the right with the first id."""

    def __init__(
        self, student: Tokens, teacher: Tokens, student_rows: list[Tokens], teacher_rows: list[Tokens]
    ) -> None:
        self.vm = VocabMap(student, teacher)
        self.tables = [self._table(v) for v in (student, teacher)]
        sides = ((student, student_rows), (teacher, teacher_rows))
        ids = [[[vocabulary.index(t) for t in row] for row in rows] for vocabulary, rows in sides]
        self.index = ChunkIndex.from_alignment(xtokmap.Aligner(*self.tables).align_batch(*ids))
        widths = [max(map(len, rows), default=0) for rows in ids]
        padded = [[row + [0] * (w - len(row)) for row in rows] for w, rows in zip(widths, ids, strict=True)]
        self.student_ids, self.teacher_ids = (
            torch.tensor(rows, dtype=torch.long).reshape(len(rows), w) for rows, w in zip(padded, widths, strict=True)
        )
        self.queries = interior_queries(self.vm, self.index, self.teacher_ids)
        self.completions = Completions(*self.tables, self.vm).queries(self.index, self.student_ids)

    @staticmethod
    def _table(vocabulary: Tokens) -> xtokmap.ByteTable:
        tokens = [spelled(t) or None for t in vocabulary]
        return xtokmap.ByteTable.from_bytes(tokens, stop_ids=[i for i, t in enumerate(vocabulary) if t == STOP])


def log(*rows: list[float]) -> torch.Tensor:
    """One row of texts whose logits are the logs of these probabilities."""
    return torch.tensor([rows], dtype=torch.float64).log()


def gradient(loss, of: torch.Tensor) -> list[float]:
    (found,) = torch.autograd.grad(loss.loss, of)
    return found.reshape(-1).tolist()


# ---- V2: strict_kl -----------------------------------------------------------------------------------------------

P2, Q2 = [0.5, 0.2, 0.15, 0.1, 0.05], [0.3, 0.4, 0.05, 0.2, 0.05]
V2 = Case([b"a", b"b", b"c", b"d", b"e"], [b"a", b"b", b"c", b"d", b"f"], [[b"a"]], [[b"a"]])


def strict2(k, beta, support="rest", p=P2, q=Q2, case=V2):
    x = log(p).requires_grad_()
    return strict_kl(Logits(x), Logits(log(q)), case.index, case.vm, k=k, beta=beta, support=support), x


@pytest.mark.parametrize(
    ("k", "reverse", "forward", "jsd", "renorm"),
    [
        (1, 0.087177, 0.082283, 0.021006, 0.0),
        (2, 0.116783, 0.124011, 0.029623, 0.166833),
        (3, 0.204951, 0.196787, 0.049021, 0.206102),
        (4, 0.212261, 0.207710, 0.051200, 0.223432),
        (None, 0.212261, 0.207710, 0.051200, 0.223432),
    ],
)
def test_strict_kl_vector(k, reverse, forward, jsd, renorm):
    for beta, want in ((1.0, reverse), (0.0, forward), (0.5, jsd)):
        assert strict2(k, beta)[0].loss.item() == pytest.approx(want, abs=6e-7)
    assert strict2(k, 1.0, "renorm")[0].loss.item() == pytest.approx(renorm, abs=6e-7)


def test_strict_kl_gradients_of_the_vector():
    want = [0.197021, -0.161986, -0.017518, -0.011678, -0.005839]
    assert gradient(*strict2(2, 1.0)) == pytest.approx(want, abs=6e-7)
    assert gradient(*strict2(2, 0.0)) == pytest.approx([0.2, -0.2, 0, 0, 0], abs=1e-12)


def test_the_rest_sees_what_renormalising_is_blind_to():
    case = Case([b"a", b"b", b"c"], [b"a", b"b", b"d"], [[b"a"]], [[b"a"]])
    p, q = [0.3, 0.175, 0.525], [0.6, 0.35, 0.05]
    assert strict2(None, 1.0, "renorm", p, q, case)[0].loss.item() == pytest.approx(0, abs=1e-12)
    rest = strict2(None, 1.0, "rest", p, q, case)[0]
    assert rest.loss.item() == pytest.approx(0.905227, abs=6e-7)
    raw = 0.3 * math.log(0.3 / 0.6) + 0.175 * math.log(0.175 / 0.35)
    assert raw == pytest.approx(-0.329245, abs=6e-7)  # a truncated sum can be negative
    assert rest.figures["student_rest"].item() == pytest.approx(0.525)
    assert rest.figures["teacher_rest"].item() == pytest.approx(0.05)


def test_a_served_teacher_lists_its_own_tokens():
    x = log(P2).requires_grad_()
    # b, a and f, padded; f is unknown to the student, so U is {a, b}.
    top = TopK(torch.tensor([[[1, 0, 4, -1]]]), torch.tensor([[[0.4, 0.3, 0.05, 9.0]]], dtype=torch.float64).log())
    loss = strict_kl(Logits(x), top, V2.index, V2.vm)
    assert loss.loss.item() == pytest.approx(0.116783, abs=6e-7)
    want = [0.197021, -0.161986, -0.017518, -0.011678, -0.005839]
    assert gradient(loss, x) == pytest.approx(want, abs=6e-7)


# ---- V3: byte_kl, V4: completion ---------------------------------------------------------------------------------

V3 = Case(
    [b"B", b"Br", b"e", b"ead", b"eads", b"Bu", b"x", SPECIAL],
    [b"Bread", b"Breads", b"Br", b"Bun", b"zz", b"x"],
    [[b"Br", b"ead"]],
    [[b"Bread"]],
)
Q3 = [0.40, 0.10, 0.05, 0.20, 0.05, 0.20]
ROOT3 = [0.1, 0.45, 0.02, 0.05, 0.03, 0.15, 0.15, 0.05]
INSIDE3 = [0.05, 0.05, 0.25, 0.40, 0.10, 0.05, 0.10, 0.0]


def byte3(**options):
    x = log(ROOT3, INSIDE3).requires_grad_()
    return byte_kl(Logits(x), Logits(log(Q3)), V3.index, V3.vm, V3.queries, **options), x


def test_byte_kl_vector():
    compact, x = byte3()
    assert compact.terms[0].tolist() == pytest.approx([0.144970, 0.693147], abs=6e-7)
    want = [0.08, -0.1, 0.016, 0.04, 0.024, -0.05, -0.05, 0.04]
    assert (2 * torch.autograd.grad(compact.loss, x)[0][0, 0]).tolist() == pytest.approx(want, abs=1e-12)
    assert compact.figures["residual"].item() == pytest.approx(0.05 / 2)
    assert compact.figures["inside"].item() == 0.5
    column, _ = byte3(residual="column")
    assert column.terms[0].tolist() == pytest.approx([0.225442, 0.693147], abs=6e-7)


def test_a_student_token_that_spans_teacher_tokens():
    case = Case([b"abc", b"a", b"d", b"x"], [b"a", b"b", b"cd", b"ce", b"x"], [[b"abc", b"d"]], [[b"a", b"b", b"cd"]])
    q = [[0.5, 0.1, 0.05, 0.05, 0.3], [0.02, 0.9, 0.03, 0.03, 0.02], [0.1, 0.05, 0.5, 0.3, 0.05]]
    p = [[0.25, 0.35, 0.2, 0.2], [0.1, 0.1, 0.7, 0.1]]
    realised = torch.tensor([[math.log(0.5), math.log(0.9), math.log(0.5)]])
    spelling = Spelling(case.student_ids, case.teacher_ids, realised)
    x = log(*p).requires_grad_()
    loss = byte_kl(Logits(x), Logits(log(*q)), case.index, case.vm, case.queries, spelling=spelling)
    # .5 x .9 x .8 of "a" belong to "abc"; 0.2 is spelled by no student token.
    known = 0.36
    parts = [(known, 0.25), (0.5 - known, 0.35), (0.3, 0.2), (0.2, 0.2)]
    want = sum(t * math.log(t / s) for t, s in parts)
    # Behind "c", "cd" is continued by "d", "ce" by nothing: 5/8 and 3/8.
    inside = 0.625 * math.log(0.625 / 0.7) + 0.375 * math.log(0.375 / 0.3)
    assert loss.terms[0].tolist() == pytest.approx([want, inside], abs=1e-6)
    assert loss.figures["spanning"].item() == 0.5
    plain = byte_kl(Logits(x), Logits(log(*q)), case.index, case.vm, case.queries)
    parts = [(0.5, 0.35), (0.3, 0.2), (0.2, 0.45)]
    assert plain.terms[0, 0].item() == pytest.approx(sum(t * math.log(t / s) for t, s in parts), abs=1e-9)


def test_completion_vector():
    x = log(ROOT3, INSIDE3).requires_grad_()
    loss = completion(Logits(x), Logits(log(Q3)), V3.index, V3.vm, V3.completions)
    # Behind Br: the group {Bread, Breads}. Nothing begins with Br or with what it leaves of Bun or zz.
    assert loss.terms[0].tolist() == pytest.approx([0, 0.346574], abs=6e-7)
    assert loss.figures["begun"].item() == pytest.approx(0.5)
    inside = torch.autograd.grad(loss.loss, x)[0][0, 1].tolist()
    assert inside[:7] == pytest.approx([0.025, 0.025, 0.125, -0.2, -0.05, 0.025, 0.05], abs=1e-9)


# ---- V5: alm, V6: uld_hybrid, V7: compass ------------------------------------------------------------------------


def one_to_one(n):
    row = [b"abcdefgh"[i : i + 1] for i in range(n)]
    return Case(row, row, [row], [row]).index


@pytest.mark.parametrize(
    ("tau", "values", "mean"),
    [
        (1.0, [0.027631, 0.122987, 0.145532], 0.098717),
        (10.0, None, 0.014183),
        (math.inf, [0.054782, 0.158145, 0.229837], 0.147588),
    ],
)
def test_alm_vector(tau, values, mean):
    y = torch.tensor([[-1.6, -0.2, -0.4]], dtype=torch.float64).requires_grad_()
    x = torch.tensor([[-1.2, -0.5, -0.9]], dtype=torch.float64)
    loss = alm(y, x, one_to_one(3), tau=tau)
    assert loss.loss.item() == pytest.approx(mean, abs=6e-7)
    if values:
        assert loss.terms[0].tolist() == pytest.approx(values, abs=6e-7)
    if tau == 1:
        assert gradient(loss, y) == pytest.approx([-0.041472, 0.390212, 0.266673], abs=6e-7)
    assert 100 * alm(y, x, one_to_one(3), tau=100.0).loss.item() == pytest.approx(0.147003, abs=6e-7)


def test_uld_vector():
    case = Case([b"a", b"b", b"c", b"d", b"e"], [b"a", b"b", b"c", b"u", b"v", b"w"], [[b"a"]], [[b"a"]])
    given = {"student_logprobs": torch.zeros(1, 1), "teacher_logprobs": torch.zeros(1, 1)}
    s, t = log([0.5, 0.2, 0.15, 0.1, 0.05]), log([0.3, 0.4, 0.05, 0.2, 0.05, 0])
    uld = uld_hybrid(Logits(s), Logits(t), case.index, case.vm, hybrid=False, **given)
    assert uld.loss.item() == pytest.approx(0.3)
    hybrid = uld_hybrid(Logits(s), Logits(t), case.index, case.vm, **given)
    assert hybrid.loss.item() == pytest.approx(0.0713523, abs=6e-8)
    assert hybrid.figures["matched"].item() == pytest.approx(0.042705, abs=6e-7)
    assert hybrid.figures["unmatched"].item() == pytest.approx(0.1)


def test_compass_vector():
    index, p, ref = one_to_one(1), torch.tensor([[-0.9]]), torch.tensor([[-1.0]])
    credits = [chunk_credit(p, torch.tensor([[q]]), index, "shift", clamp=None) for q in (-1.2, -1.8)]
    given = compass(*credits, p, ref, alpha=0.5)
    assert given.advantages.item() == pytest.approx(0.55)
    assert given.scored.item()
    assert compass(*credits, p, ref, alpha=0.5, clamp=0.5).advantages.item() == 0.5
    assert not compass(*credits, p * math.nan, ref).scored.item()

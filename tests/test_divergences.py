"""The losses of whole distributions: hand-checked vectors, plain forms of them, and what must hold of any text."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from itertools import chain, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import oracle
import xtokmap
from oracle import SPECIAL, STOP, Tokens, VocabMap, interior_queries, spelled
from xtokmap.losses.bytes import Completions, Spelling, byte_kl, completion, whitespace_tokens
from xtokmap.losses.chunks import alm, uld_hybrid
from xtokmap.losses.credit import chunk_credit, compass
from xtokmap.losses.strict import strict_kl
from xtokmap.losses.terms import weighted_sum
from xtokmap.torch.index import ChunkIndex, VocabTensors
from xtokmap.torch.logits import Logits, TopK, token_logprobs

BETAS = (0.0, 0.5, 1.0)


class Case:
    """Vocabularies of both sides, and rows of tokens of the same texts, padded on both sides with the first id."""

    def __init__(
        self,
        student: Tokens,
        teacher: Tokens,
        student_rows: list[Tokens],
        teacher_rows: list[Tokens],
        left: int = 0,
        right: int = 0,
    ) -> None:
        self.vm, self.rows = VocabMap(student, teacher), (student_rows, teacher_rows)
        self.tables = [self._table(v) for v in (student, teacher)]
        sides = []
        for vocabulary, rows in ((student, student_rows), (teacher, teacher_rows)):
            width = max(map(len, rows), default=0) + left + right
            ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), bool)
            for b, row in enumerate(rows):
                ids[b, left : left + len(row)] = [vocabulary.index(t) for t in row]
                mask[b, left : left + len(row)] = True
            sides.append((ids, mask))
        (s, s_mask), (t, t_mask) = sides
        self.index = ChunkIndex.from_alignment(xtokmap.Aligner(*self.tables).align_batch(s, t, s_mask, t_mask))
        self.student_ids, self.teacher_ids = torch.from_numpy(s), torch.from_numpy(t)
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
    realized = torch.tensor([[math.log(0.5), math.log(0.9), math.log(0.5)]])
    spelling = Spelling(case.student_ids, case.teacher_ids, realized)
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


# ---- plain forms -------------------------------------------------------------------------------------------------


def random_case(seed: int, *, same: bool = False, stops: bool = True, specials: bool = True) -> Case:
    """Texts over a, b, c in any tokens that spell them, as a sampler would cut them and no tokenizer."""
    rng = np.random.default_rng(seed)

    def word(longest):
        return bytes(rng.choice(list(b"abc"), rng.integers(2, longest + 1)).tolist())

    def vocabulary():
        tokens = [b"a", b"b", b"c", *sorted({word(4) for _ in range(rng.integers(0, 9))})]
        if specials:
            tokens.append(SPECIAL)
        if stops:
            tokens += [STOP] * int(rng.integers(1, 3))
        order = rng.permutation(len(tokens))
        return [tokens[i] for i in order]

    def cut(text, tokens):
        row = []
        while text:
            fitting = [t for t in tokens if isinstance(t, bytes) and text.startswith(t)]
            row.append(fitting[rng.integers(len(fitting))])
            text = text[len(row[-1]) :]
            if specials and rng.random() < 0.05:
                row.append(SPECIAL)
        return row

    student = vocabulary()
    teacher = student if same else vocabulary()
    texts = [bytes(rng.choice(list(b"abc"), rng.integers(0, 10)).tolist()) for _ in range(rng.integers(1, 4))]
    student_rows, teacher_rows = [], []
    for text in texts:
        row = cut(text, student)
        other = list(row) if same else cut(text, teacher)
        if stops and rng.random() < 0.5:
            row.append(STOP)
            other.append(STOP)
        elif rng.random() < 0.3:
            row = row[: rng.integers(0, len(row) + 1)]
            other = list(row) if same else other
        student_rows.append(row)
        teacher_rows.append(other)
    return Case(student, teacher, student_rows, teacher_rows)


def random_logits(case: Case, seed: int, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 logits of both sides; the student's with a gradient."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(*i.shape, len(v)) for i, v in ((case.student_ids, case.vm.student), (case.teacher_ids, case.vm.teacher))]
    x, z = (scale * torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    return x.requires_grad_(), z


def realized(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]


def of_bins(p: list[torch.Tensor], q: list[float], beta: float, floor: float = 0.0) -> torch.Tensor:
    """JSD_beta of two lists of probabilities, by its definition."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(p, q, strict=True):
        t = torch.as_tensor(b, dtype=torch.float64)
        m = beta * t + (1 - beta) * a if 0 < beta < 1 else (a if beta == 0 else t)
        forward, reverse = (beta, 1 - beta) if 0 < beta < 1 else (1 - beta, beta)
        if t > 0 and forward:
            total = total + forward * t * (t / m).log()
        if a > 0 and reverse:
            total = total + reverse * a * (a / m).log()
    return total


def plain_strict(case: Case, x, z, k, beta):
    """Terms of `strict_kl` with rest, token by token."""
    vm, index = case.vm, case.index
    terms = torch.zeros(x.shape[:2], dtype=torch.float64)
    shared = {s: t for s, t in enumerate(vm.student_to_teacher) if t >= 0 and vm.teacher_to_student[t] == s}
    for b, i in torch.nonzero(index.strict_teacher_pos() >= 0).tolist():
        p = torch.softmax(x[b, i], -1)
        q = torch.softmax(z[b, int(index.teacher_pos[b, i])], -1)
        top = p.topk(min(k or len(p), len(p))).indices.tolist()
        bins = [([s], [shared[s]]) for s in top if s in shared]
        if vm.student_stops and vm.teacher_stops:
            bins.append((vm.student_stops, vm.teacher_stops))
        ps, qs = ([q_[list(side[n])].sum() for side in bins] for n, q_ in enumerate((p, q)))
        ps.append(p[[u for u in range(len(p)) if not any(u in side[0] for side in bins)]].sum())
        qs.append(q[[v for v in range(len(q)) if not any(v in side[1] for side in bins)]].sum())
        # Without anything left on one side the loss takes 1e-13 for it.
        ps[-1], qs[-1] = ps[-1].clamp(min=math.exp(-30)), qs[-1].clamp(min=math.exp(-30))
        terms[b, i] = of_bins(ps, qs, beta)
    return terms


def plain_target(case: Case, z, b: int, i: int, *, spans: bool):
    """Mass of student ids, "stop" and -1 (no student token) at one student token, by a look at every teacher token."""
    vm, index = case.vm, case.index
    j, off = int(index.teacher_pos[b, i]), int(index.teacher_off[b, i])
    row = [vm.teacher[t] for t in case.teacher_ids[b].tolist()]
    q = torch.softmax(z[b], -1)
    c, here = spelled(row[j])[:off], q[j]
    target: dict[int | str, float] = {}
    pi = (
        sum(float(here[v]) for v, t in enumerate(vm.teacher) if spelled(t).startswith(c) and spelled(t) != c)
        if off
        else 1.0
    )
    for v, token in enumerate(vm.teacher):
        if off and not (spelled(token).startswith(c) and spelled(token) != c):
            continue
        first: int | str = oracle.longest_prefix(vm.student, spelled(token)[off:])
        if token == STOP and vm.student_stops:
            first = "stop"
        target[first] = target.get(first, 0.0) + float(here[v]) / pi
    s = spelled(vm.student[int(case.student_ids[b, i])])
    left = s[len(spelled(row[j])) - off :]
    if spans and left:
        known, at = float(here[vm.teacher.index(row[j])]) / pi, j + 1
        while len(left) > len(spelled(row[at])):
            if spelled(row[at]):
                known *= float(q[at][vm.teacher.index(row[at])])
                left = left[len(spelled(row[at])) :]
            at += 1
        known *= sum(float(q[at][v]) for v, t in enumerate(vm.teacher) if spelled(t).startswith(left))
        u = int(case.student_ids[b, i])
        target[oracle.longest_prefix(vm.student, spelled(row[j])[off:])] -= known
        target[u] = target.get(u, 0.0) + known
    return target, off == 0


def plain_byte(case: Case, x, z, beta, *, residual="compact", spans=True, floor=1e-6):
    """Terms of `byte_kl`, token by token."""
    vm, index = case.vm, case.index
    terms = torch.zeros(x.shape[:2], dtype=torch.float64)
    kind = index.kind_of_student()
    for b, i in torch.nonzero((index.teacher_pos >= 0) & (kind != xtokmap.Kind.REWRITTEN)).tolist():
        target, at_root = plain_target(case, z, b, i, spans=spans and kind[b, i] != xtokmap.Kind.STOP)
        p = torch.softmax(x[b, i], -1)
        explicit = [u for u in target if isinstance(u, int) and u >= 0]
        ps, qs = [p[u] for u in explicit], [target[u] for u in explicit]
        used = set(explicit)
        if at_root and vm.student_stops and vm.teacher_stops:
            ps.append(p[list(vm.student_stops)].sum())
            qs.append(target.get("stop", 0.0))
            used |= set(vm.student_stops)
        lost = target.get(-1, 0.0)
        if residual == "column":
            column = [u for u, t in enumerate(vm.student) if t is SPECIAL]
            ps.append(p[column].sum())
            qs.append(max(lost, floor) if beta > 0 else lost)
            used |= set(column)
            lost = 0.0
        ps.append(p[[u for u in range(len(p)) if u not in used]].sum().clamp(min=math.exp(-30)))
        qs.append(max(lost, floor) if beta > 0 else lost)
        terms[b, i] = of_bins(ps, qs, beta)
    return terms


def plain_completion(case: Case, x, z):
    vm, index = case.vm, case.index
    terms = torch.zeros(x.shape[:2], dtype=torch.float64)
    kind = index.kind_of_student()
    groups: dict[int, list[int]] = {}
    for v, g in enumerate(vm.group):
        groups.setdefault(g, []).append(v)
    for b, i in torch.nonzero((index.teacher_off == 0) & (kind < xtokmap.Kind.REWRITTEN)).tolist():
        if i + 1 == x.shape[1] or kind[b, i + 1] < 0:
            continue
        a = spelled(vm.student[int(case.student_ids[b, i])])
        q = torch.softmax(z[b, int(index.teacher_pos[b, i])], -1)
        p = torch.softmax(x[b, i + 1], -1)
        for g, members in groups.items():
            y = min((spelled(vm.teacher[v]) for v in members), key=len)
            if g >= 0 and y.startswith(a) and y != a:
                able = [u for u, t in enumerate(vm.student) if spelled(t).startswith(y[len(a) :])]
                if able:
                    terms[b, i + 1] = terms[b, i + 1] - q[members].sum() * p[able].sum().log()
    return terms


def plain_uld(case: Case, x, z, beta, hybrid):
    """Terms of `uld_hybrid`, chunk by chunk, with a gradient through every token of a chunk."""
    vm, index = case.vm, case.index
    terms = torch.zeros(x.shape[:2], dtype=torch.float64)
    p, q = torch.softmax(x, -1), torch.softmax(z, -1)
    shared = [(s, t) for s, t in enumerate(vm.student_to_teacher) if t >= 0 and vm.teacher_to_student[t] == s]
    shared = shared if hybrid else []
    for b in range(len(x)):
        for g in range(int(index.num_chunks[b])):
            s, t = ((c[b] == g).nonzero()[:, 0].tolist() for c in (index.student_chunk, index.teacher_chunk))
            if not s or not t or index.kind[b, g] == xtokmap.Kind.REWRITTEN:
                continue
            one, two = p[b, s[-1]], q[b, t[-1]]
            for i in s[:-1]:
                one = one * p[b, i, case.student_ids[b, i]].clamp(min=1e-8)
            for j in t[:-1]:
                two = two * q[b, j, case.teacher_ids[b, j]].clamp(min=1e-8)
            own_s = one[[u for u in range(len(one)) if u not in dict(shared)]].sort(descending=True).values
            own_t = two[[v for v in range(len(two)) if v not in [t for _, t in shared]]].sort(descending=True).values
            n = max(len(own_s), len(own_t)) if len(own_s) and len(own_t) else 0
            own_s, own_t = (torch.nn.functional.pad(y, (0, n))[:n] for y in (own_s, own_t))
            l1 = (own_s - own_t).abs().sum()
            jsd = of_bins(
                [one[u].clamp(min=1e-8) for u, _ in shared], [two[v].clamp(min=1e-8) for _, v in shared], beta
            )
            w = len(shared) / len(two)
            terms[b, s[-1]] = w * jsd + (1 - w) * l1
    return terms


def check(got, terms, x, tolerance=1e-9, denominator=None):
    """The same terms, mean and gradient."""
    torch.testing.assert_close(got.terms.double(), terms.detach(), atol=tolerance, rtol=tolerance)
    total = terms.sum() / (got.figures["tokens"].clamp(min=1) if denominator is None else denominator)
    torch.testing.assert_close(got.loss.double(), total.detach(), atol=tolerance, rtol=tolerance)
    (want,) = torch.autograd.grad(total, x) if total.requires_grad else (torch.zeros_like(x),)
    (grad,) = torch.autograd.grad(got.loss, x)
    torch.testing.assert_close(grad, want, atol=tolerance, rtol=tolerance)


seeds = st.integers(0, 2**20)
some = settings(deadline=None, max_examples=40)


@some
@given(seeds, st.sampled_from(BETAS), st.sampled_from([1, 3, None]), st.sampled_from([None, 2]))
def test_strict_kl_is_its_plain_form(seed, beta, k, size):
    case = random_case(seed)
    x, z = random_logits(case, seed)
    got = strict_kl(Logits(x), Logits(z), case.index, case.vm, k=k, beta=beta, size=size)
    check(got, plain_strict(case, x, z, k, beta), x)


@some
@given(seeds, st.sampled_from(BETAS), st.booleans(), st.sampled_from(["compact", "column"]), st.sampled_from([None, 2]))
def test_byte_kl_is_its_plain_form(seed, beta, spans, residual, size):
    case = random_case(seed)
    x, z = random_logits(case, seed)
    spelling = Spelling(case.student_ids, case.teacher_ids, realized(z, case.teacher_ids)) if spans else None
    got = byte_kl(
        Logits(x),
        Logits(z),
        case.index,
        case.vm,
        case.queries,
        spelling=spelling,
        beta=beta,
        residual=residual,
        size=size,
    )
    check(got, plain_byte(case, x, z, beta, residual=residual, spans=spans), x, 1e-7)


@some
@given(seeds, st.sampled_from([None, 2]))
def test_completion_is_its_plain_form(seed, size):
    case = random_case(seed)
    x, z = random_logits(case, seed)
    got = completion(Logits(x), Logits(z), case.index, case.vm, case.completions, size=size)
    terms = plain_completion(case, x, z)
    assert (terms >= 0).all()
    check(got, terms, x)


@some
@given(seeds, st.sampled_from(BETAS), st.booleans(), st.sampled_from([None, 2]))
def test_uld_is_its_plain_form(seed, beta, hybrid, size):
    case = random_case(seed)
    x, z = random_logits(case, seed)
    given_ = {
        "student_logprobs": realized(x, case.student_ids),
        "teacher_logprobs": realized(z, case.teacher_ids),
    }
    got = uld_hybrid(Logits(x), Logits(z), case.index, case.vm, hybrid=hybrid, beta=beta, size=size, **given_)
    check(got, plain_uld(case, x, z, beta, hybrid), x, 1e-8)


# ---- every loss --------------------------------------------------------------------------------------------------


def spelling_of(case: Case, z: torch.Tensor) -> Spelling:
    return Spelling(case.student_ids, case.teacher_ids, realized(z, case.teacher_ids))


def sampled(student: Logits, ids: torch.Tensor) -> torch.Tensor:
    """Logprobs of the student's tokens, with a gradient."""
    x = student.rows if student.weight is None else torch.nn.functional.linear(student.rows, student.weight)
    return token_logprobs(x, ids, temperature=student.temperature, softcap=student.softcap)


def all_of_it(case: Case, z: torch.Tensor) -> TopK:
    """A served teacher that lists every token."""
    ids = torch.arange(z.shape[-1], device=z.device).expand(z.shape)
    return TopK(ids, torch.log_softmax(z, -1))


#: name -> loss of a case, student rows and teacher logits. Between them they use every option that changes a value.
LOSSES = {
    "strict": lambda c, s, z, **o: strict_kl(s, Logits(z), c.index, c.vm, k=3, **o),
    "strict forward, all": lambda c, s, z, **o: strict_kl(s, Logits(z), c.index, c.vm, k=None, beta=0.0, **o),
    "strict, renormalized": lambda c, s, z, **o: strict_kl(s, Logits(z), c.index, c.vm, support="renorm", **o),
    "strict, served": lambda c, s, z, **o: strict_kl(s, all_of_it(c, z), c.index, c.vm, **o),
    "byte": lambda c, s, z, **o: byte_kl(s, Logits(z), c.index, c.vm, c.queries, spelling=spelling_of(c, z), **o),
    "byte, column, bridge": lambda c, s, z, **o: byte_kl(
        s, Logits(z), c.index, c.vm, c.queries, residual="column", stop_bridge=0.5, phi="canonical", **o
    ),
    "byte, reverse": lambda c, s, z, **o: byte_kl(s, Logits(z), c.index, c.vm, c.queries, beta=1.0, **o),
    "byte, between": lambda c, s, z, **o: byte_kl(s, Logits(z), c.index, c.vm, c.queries, beta=0.3, **o),
    "completion": lambda c, s, z, **o: completion(s, Logits(z), c.index, c.vm, c.completions, **o),
    "uld": lambda c, s, z, **o: uld_hybrid(
        s,
        Logits(z),
        c.index,
        c.vm,
        hybrid=False,
        student_logprobs=sampled(s, c.student_ids),
        teacher_logprobs=realized(z, c.teacher_ids),
        **o,
    ),
    "hybrid": lambda c, s, z, **o: uld_hybrid(
        s,
        Logits(z),
        c.index,
        c.vm,
        student_logprobs=sampled(s, c.student_ids),
        teacher_logprobs=realized(z, c.teacher_ids),
        **o,
    ),
}
ALM = {
    "alm": lambda c, s, z, size=None, rows=None, **o: alm(
        sampled(s, c.student_ids), realized(z, c.teacher_ids), c.index, **o
    ),
    "alm, tau": lambda c, s, z, size=None, rows=None, **o: alm(
        sampled(s, c.student_ids), realized(z, c.teacher_ids), c.index, tau=3.0, **o
    ),
}
every_loss = pytest.mark.parametrize("name", [*LOSSES, *ALM])
a_few = settings(deadline=None, max_examples=12)
TOLERANCE = {"atol": 1e-9, "rtol": 1e-9}


def loss_of(name: str, case: Case, student: Logits, z: torch.Tensor, **options):
    return {**LOSSES, **ALM}[name](case, student, z, **options)


@every_loss
def test_gradients_are_those_of_the_values(name):
    for seed in (1, 2, 5):
        case = random_case(seed)
        x, z = random_logits(case, seed, 1.0)
        assert torch.autograd.gradcheck(lambda x, c=case, z=z: loss_of(name, c, Logits(x), z, size=3).loss, x)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_head_inside_is_the_head_outside(name, dtype):
    case = random_case(7)
    g = torch.Generator().manual_seed(0)
    shape, v = case.student_ids.shape, len(case.vm.student)
    hidden = torch.randn(*shape, 5, generator=g).to(dtype).requires_grad_()
    weight = (2 * torch.randn(v, 5, generator=g)).to(dtype).requires_grad_()
    z = random_logits(case, 0)[1].to(dtype)
    scaling = {"temperature": 0.8, "softcap": 6.0}
    inside = loss_of(name, case, Logits(hidden, weight, **scaling), z, size=3)
    outside = loss_of(name, case, Logits(torch.nn.functional.linear(hidden, weight), **scaling), z)
    assert inside.terms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(inside.terms, outside.terms, atol=1e-5, rtol=1e-5)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(
        torch.autograd.grad(inside.loss, (hidden, weight)),
        torch.autograd.grad(outside.loss, (hidden, weight)),
        strict=True,
    ):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("block", [1, 40])
def test_blocks_of_a_slice_change_nothing(name, block, monkeypatch):
    scored = 0
    for seed in range(5):
        case, g = random_case(seed), torch.Generator().manual_seed(seed)
        shape, v = case.student_ids.shape, len(case.vm.student)
        inputs = [torch.randn(*n, generator=g, dtype=torch.float64) for n in ((*shape, 5), (v, 5), (v,))]
        inputs = [x.requires_grad_() for x in inputs]
        z = random_logits(case, 0)[1]
        found = []
        for size in (2**20, block):
            monkeypatch.setattr(xtokmap.torch.logits, "_BLOCK", size)
            loss = loss_of(name, case, Logits(*inputs, temperature=0.8), z, size=7)
            found.append((loss.loss, loss.terms, *torch.autograd.grad(loss.loss, inputs)))
        scored += int((found[0][1] != 0).sum())
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE)
    assert scored > 3


@every_loss
@a_few
@given(seeds)
def test_rows_that_are_given_change_nothing(name, seed):
    case = random_case(seed)
    x, z = random_logits(case, seed)
    whole = loss_of(name, case, Logits(x), z)
    (want,) = torch.autograd.grad(whole.loss, x)
    everything = torch.arange(case.student_ids.numel())
    every_row = loss_of(name, case, Logits(x), z, rows=everything, size=2)
    torch.testing.assert_close(every_row.terms, whole.terms, **TOLERANCE)
    backwards = loss_of(name, case, Logits(x), z, rows=everything.flip(0), size=3)
    torch.testing.assert_close(backwards.terms, whole.terms, **TOLERANCE)
    (got,) = torch.autograd.grad(backwards.loss, x)
    torch.testing.assert_close(got, want, **TOLERANCE)


@every_loss
@a_few
@given(seeds, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_not_scored_reaches_nothing(name, seed, bad):
    case = random_case(seed)
    x, z = random_logits(case, seed)
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(rng.random(case.student_ids.shape) < 0.6)
    clean = loss_of(name, case, Logits(x), z, mask=mask)
    (want,) = torch.autograd.grad(clean.loss, x)
    # Rows whose logits nothing depends on; alm and the hybrid need every token of a chunk.
    used = want.abs().sum(-1) > 0
    if name in ALM or name in ("uld", "hybrid"):
        chunk = case.index.to_student((case.index.sum_student(used.long()) > 0).long()) > 0
        used |= chunk
    used |= clean.terms != 0
    poisoned = torch.where(used[..., None], x.detach(), bad).requires_grad_()
    got = loss_of(name, case, Logits(poisoned), z, mask=mask)
    torch.testing.assert_close(got.terms, clean.terms, **TOLERANCE)
    torch.testing.assert_close(got.loss, clean.loss, **TOLERANCE)
    (found,) = torch.autograd.grad(got.loss, poisoned)
    torch.testing.assert_close(found, want, **TOLERANCE)
    assert (found[~used] == 0).all()


@every_loss
@a_few
@given(seeds, st.sampled_from([math.nan, math.inf]))
def test_what_the_teacher_says_elsewhere_reaches_nothing(name, seed, bad):
    case = random_case(seed)
    x, z = random_logits(case, seed)
    clean = loss_of(name, case, Logits(x), z)
    (want,) = torch.autograd.grad(clean.loss, x)
    got = loss_of(name, case, Logits(x), torch.where((case.index.teacher_chunk >= 0)[..., None], z, bad))
    torch.testing.assert_close(got.loss, clean.loss, **TOLERANCE)
    (found,) = torch.autograd.grad(got.loss, x)
    torch.testing.assert_close(found, want, **TOLERANCE)


def test_a_bad_teacher_logprob_costs_what_spans_it():
    student, teacher = [b"ab", b"a", b"b"], [b"a", b"b"]
    case = Case(student, teacher, [[b"ab", b"a", b"ab"]], [[b"a", b"b", b"a", b"a", b"b"]])
    x, z = random_logits(case, 0)
    spelling = spelling_of(case, z)
    clean = byte_kl(Logits(x), Logits(z), case.index, case.vm, case.queries, spelling=spelling)
    for bad in (math.nan, -math.inf):
        logprobs = spelling.teacher_logprobs.clone()
        logprobs[0, 0] = bad
        given_ = spelling._replace(teacher_logprobs=logprobs)
        loss = byte_kl(Logits(x), Logits(z), case.index, case.vm, case.queries, spelling=given_)
        assert loss.figures["nonfinite"] == 1
        assert loss.terms[0, 0] == 0
        torch.testing.assert_close(loss.terms[0, 1:], clean.terms[0, 1:])


@every_loss
def test_a_bad_row_costs_itself(name):
    case = random_case(1)
    x, z = random_logits(case, 1)
    clean = loss_of(name, case, Logits(x), z)
    b, i = torch.nonzero(clean.terms)[0].tolist()
    x = x.detach().clone()
    x[b, i] = math.nan
    x.requires_grad_()
    got = loss_of(name, case, Logits(x), z)
    assert got.figures["nonfinite"] > 0
    assert got.terms[b, i] == 0
    (found,) = torch.autograd.grad(got.loss, x)
    assert torch.isfinite(found).all()
    assert (found[b, i] == 0).all()


def moved(case: Case, order: list[int], left: int, right: int) -> Case:
    """The same rows in another order, with other padding."""
    student_rows, teacher_rows = ([rows[b] for b in order] for rows in case.rows)
    return Case(case.vm.student, case.vm.teacher, student_rows, teacher_rows, left, right)


def moved_logits(x: torch.Tensor, order: list[int], left: int, width: int) -> torch.Tensor:
    out = torch.full((len(order), width, x.shape[-1]), 3.0, dtype=x.dtype)
    kept = min(x.shape[1], width - left)
    out[:, left : left + kept] = x.detach()[order, :kept]
    return out.requires_grad_()


@every_loss
@a_few
@given(seeds, st.integers(0, 3), st.integers(0, 2))
def test_order_padding_and_micro_batches_change_nothing(name, seed, left, right):
    case = random_case(seed)
    x, z = random_logits(case, seed)
    order = np.random.default_rng(seed).permutation(len(x)).tolist()
    whole = loss_of(name, case, Logits(x), z)
    (want,) = torch.autograd.grad(whole.loss, x)
    other = moved(case, order, left, right)
    y = moved_logits(x, order, left, other.student_ids.shape[1])
    w = moved_logits(z, order, left, other.teacher_ids.shape[1]).detach()
    got = loss_of(name, other, Logits(y), w)
    torch.testing.assert_close(got.loss, whole.loss, **TOLERANCE)
    for key in whole.figures:
        torch.testing.assert_close(got.figures[key], whole.figures[key], **TOLERANCE)
    (found,) = torch.autograd.grad(got.loss, y)
    kept = min(x.shape[1], y.shape[1] - left)
    torch.testing.assert_close(found[:, left : left + kept], want[order, :kept], **TOLERANCE)

    # One row at a time, over what the whole batch was divided by.
    total = whole.terms.sum() / whole.loss if whole.loss > 0 else torch.ones(())
    parts = []
    for b in range(len(x)):
        one = moved(case, [b], 0, 1)
        y = moved_logits(x, [b], 0, one.student_ids.shape[1])
        w = moved_logits(z, [b], 0, one.teacher_ids.shape[1]).detach()
        parts.append(loss_of(name, one, Logits(y), w, denominator=total).loss)
    torch.testing.assert_close(torch.stack(parts).sum(), whole.loss, **TOLERANCE)


@every_loss
@a_few
@given(seeds)
def test_texts_in_one_row_are_texts_in_many(name, seed):
    case = random_case(seed)
    # Each must have a text and its end, or its end would be one with another's.
    kept = [b for b, (s, t) in enumerate(zip(*case.rows, strict=True)) if oracle.spell(s) and s[-1] == t[-1] == STOP]
    student_rows, teacher_rows = ([rows[b] for b in kept] for rows in case.rows)
    many = Case(case.vm.student, case.vm.teacher, student_rows, teacher_rows)
    one = Case(case.vm.student, case.vm.teacher, *([list(chain(*rows))] for rows in (student_rows, teacher_rows)))
    x, z = random_logits(many, seed)

    def joined(logits, rows, width):
        if not rows:
            return torch.zeros(1, 0, width, dtype=logits.dtype)
        return torch.cat([logits.detach()[b, : len(row)] for b, row in enumerate(rows)])[None]

    y = joined(x, student_rows, x.shape[-1]).requires_grad_()
    got = loss_of(name, one, Logits(y), joined(z, teacher_rows, z.shape[-1]))
    want = loss_of(name, many, Logits(x), z)
    torch.testing.assert_close(got.loss, want.loss, **TOLERANCE)
    torch.testing.assert_close(got.terms, joined(want.terms[..., None], student_rows, 1)[..., 0], **TOLERANCE)
    (found,) = torch.autograd.grad(got.loss, y)
    torch.testing.assert_close(
        found, joined(torch.autograd.grad(want.loss, x)[0], student_rows, x.shape[-1]), **TOLERANCE
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_teachers_head_inside_is_the_head_outside(dtype):
    case = random_case(7)
    x, _ = random_logits(case, 7)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(*case.teacher_ids.shape, 5, generator=g).to(dtype)
    weight, bias = (torch.randn(len(case.vm.teacher), *w, generator=g).to(dtype) for w in ((5,), ()))
    teachers = [
        Logits(hidden, weight.requires_grad_(), bias, 1.5, 4.0),
        Logits(torch.nn.functional.linear(hidden, weight, bias), None, None, 1.5, 4.0),
    ]
    own = {
        "student_logprobs": realized(x, case.student_ids),
        "teacher_logprobs": torch.zeros(case.teacher_ids.shape, dtype=x.dtype),
    }
    for loss in (
        lambda t: strict_kl(Logits(x), t, case.index, case.vm, size=2),
        lambda t: byte_kl(Logits(x), t, case.index, case.vm, case.queries, size=2),
        lambda t: completion(Logits(x), t, case.index, case.vm, case.completions, size=2),
        lambda t: uld_hybrid(Logits(x), t, case.index, case.vm, size=2, **own),
    ):
        one, two = (loss(t) for t in teachers)
        torch.testing.assert_close(one.terms, two.terms, atol=1e-5, rtol=1e-5)
        one.loss.backward()
        assert weight.grad is None


@every_loss
def test_nothing_to_score_is_zero(name):
    for rows in ([], [[]], [[b"a"], []]):
        case = Case([b"a", SPECIAL, STOP], [b"a", b"ab", STOP], rows, [[] for _ in rows])
        x, z = random_logits(case, 0)
        loss = loss_of(name, case, Logits(x), z)
        assert loss.loss == 0
        assert loss.figures["tokens"] == 0
        loss.loss.backward()
        assert x.grad is None or (x.grad == 0).all()


# ---- properties --------------------------------------------------------------------------------------------------


def whole_kl(case: Case, x, z, beta):
    """Divergence of the two whole distributions wherever the tokenizers' tokens correspond one to one."""
    at = case.index.teacher_rows(case.index.strict_teacher_pos()).clamp(min=0)
    p, q = torch.softmax(x, -1), torch.softmax(z, -1).reshape(-1, z.shape[-1])[at]
    terms = torch.zeros(x.shape[:2], dtype=torch.float64)
    for b, i in torch.nonzero(case.index.strict_teacher_pos() >= 0).tolist():
        terms[b, i] = of_bins(list(p[b, i]), q[b, i].tolist(), beta)
    return terms


@some
@given(seeds, st.sampled_from(BETAS))
def test_identical_tokenizers_are_the_same_tokenizers_losses(seed, beta):
    case = random_case(seed, same=True, stops=False, specials=False)
    x, z = random_logits(case, seed)
    assert (case.index.kind_of_student()[case.index.student_chunk >= 0] == xtokmap.Kind.ONE_TO_ONE).all()
    student, teacher = Logits(x), Logits(z)
    check(strict_kl(student, teacher, case.index, case.vm, k=None, beta=beta), whole_kl(case, x, z, beta), x, 1e-6)
    got = byte_kl(student, teacher, case.index, case.vm, case.queries, beta=beta, spelling=spelling_of(case, z))
    check(got, whole_kl(case, x, z, beta), x, 1e-6)
    assert got.figures["residual"] == 0
    given_ = {"student_logprobs": realized(x, case.student_ids), "teacher_logprobs": realized(z, case.teacher_ids)}
    hybrid = uld_hybrid(student, teacher, case.index, case.vm, beta=beta, **given_)
    torch.testing.assert_close(hybrid.terms, whole_kl(case, x, z, beta), atol=1e-5, rtol=1e-5)
    assert completion(student, teacher, case.index, case.vm, case.completions).loss == 0


@some
@given(seeds)
def test_identical_models_lose_nothing(seed):
    case = random_case(seed, same=True)
    x, _ = random_logits(case, seed)
    for name in {**LOSSES, **ALM}:
        loss = loss_of(name, case, Logits(x), x.detach())
        torch.testing.assert_close(loss.terms, torch.zeros_like(loss.terms), atol=2e-6, rtol=0)


@some
@given(seeds, st.sampled_from([0.0, 1.0]))
def test_the_rest_only_hides_and_more_tokens_hide_less(seed, beta):
    case = random_case(seed, same=True, stops=False, specials=False)
    x, z = random_logits(case, seed)
    bounds = [
        strict_kl(Logits(x), Logits(z), case.index, case.vm, k=k, beta=beta).terms.detach()
        for k in range(1, len(case.vm.student) + 1)
    ]
    bounds = [torch.zeros_like(bounds[0]), *bounds, whole_kl(case, x, z, beta).detach()]
    for smaller, larger in pairwise(bounds):
        assert (smaller <= larger + 1e-12).all()
    torch.testing.assert_close(bounds[-1], bounds[-2], **TOLERANCE)


@some
@given(seeds)
def test_teacher_ids_are_only_names(seed):
    case = random_case(seed, stops=False, specials=False)
    x, z = random_logits(case, seed)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(case.vm.teacher)).tolist()
    teacher = [case.vm.teacher[v] for v in order]
    other = Case(case.vm.student, teacher, *case.rows)
    for name in LOSSES.keys() - {"byte, column, bridge"}:  # the student has no ids without bytes
        one = loss_of(name, case, Logits(x), z)
        two = loss_of(name, other, Logits(x), z[..., order])
        torch.testing.assert_close(one.terms, two.terms, **TOLERANCE)
    # One token's mass on two ids of equal bytes.
    v = int(rng.integers(len(teacher)))
    both = [*case.vm.teacher, case.vm.teacher[v]]
    share = float(rng.uniform(0.1, 0.9))
    split = torch.cat([z, z[..., v : v + 1] + math.log(1 - share)], -1)
    split[..., v] += math.log(share)
    twice = Case(case.vm.student, both, *case.rows)
    for name in ("byte, reverse", "byte, between", "completion"):
        one, two = loss_of(name, case, Logits(x), z), loss_of(name, twice, Logits(x), split)
        torch.testing.assert_close(one.terms, two.terms, **TOLERANCE)


@some
@given(st.lists(st.tuples(*[st.floats(-8, -1e-3)] * 2), min_size=1, max_size=8), st.sampled_from([0.5, 3.0, math.inf]))
def test_alm_is_zero_only_where_the_chunks_are_equally_likely(pairs, tau):
    x, y = (torch.tensor([side], dtype=torch.float64) for side in zip(*pairs, strict=True))
    terms = alm(y, x, one_to_one(len(pairs)), tau=tau).terms if len(pairs) < 9 else None
    assert (terms >= -1e-12).all()
    assert (terms[(x - y).abs() > 1e-2] > 0).all()
    same = alm(x, x, one_to_one(len(pairs)), tau=tau)
    torch.testing.assert_close(same.terms, torch.zeros_like(terms), atol=1e-12, rtol=0)


def test_completing_for_certain_costs_nothing():
    x = log(ROOT3, [0, 0, 0, 0.7, 0.3, 0, 0, 0])
    loss = completion(Logits(x), Logits(log(Q3)), V3.index, V3.vm, V3.completions)
    assert loss.loss.item() == pytest.approx(0, abs=1e-12)


def test_the_stop_bridge_asks_to_end_what_the_teacher_would_end():
    case = Case([b"a", STOP], [b"a", STOP], [[b"a"]], [[b"a"]])
    x, z = log([0.999, 0.001]).requires_grad_(), log([0.3, 0.7])
    given_ = (Logits(x), Logits(z), case.index, case.vm, case.queries)
    forward, reverse = (gradient(byte_kl(*given_, beta=beta), x)[1] for beta in (0.0, 1.0))
    assert forward == pytest.approx(-0.699, abs=1e-9)
    assert reverse == pytest.approx(-0.008, abs=5e-4)
    bridged = gradient(byte_kl(*given_, beta=1.0, stop_bridge=1.0), x)[1]
    assert bridged == pytest.approx(reverse - 0.699, abs=1e-6)


def test_white_space_can_be_left_out():
    case = Case([b" ", b"\n", b"a", STOP], [b" ", b"\n", b"a", STOP], [[b" ", b"a", b"\n"]], [[b" ", b"a", b"\n"]])
    x, z = random_logits(case, 0)
    flags = whitespace_tokens(case.tables[0])
    assert flags.tolist() == [True, True, False, False]
    given_ = (Logits(x), Logits(z), case.index, case.vm, case.queries)
    loss = byte_kl(*given_, whitespace=flags[case.student_ids])
    assert (loss.terms != 0).tolist() == [[False, True, False]]
    assert loss.figures["whitespace"] == 2
    assert loss.figures["tokens"] == 1
    torch.testing.assert_close(loss.terms[0, 1], byte_kl(*given_).terms[0, 1])


def test_two_teachers_with_their_own_alignments():
    g = torch.Generator().manual_seed(0)
    student = [b"a", b"b", b"ab", b"abc", b"c", STOP]
    rows = [[b"ab", b"c", STOP], [b"a", b"b"]]
    one = Case(student, [b"a", b"b", b"c", STOP], rows, [[b"a", b"b", b"c", STOP], [b"a", b"b"]])
    two = Case(student, [b"abc", b"ab", STOP, b"x"], rows, [[b"abc", STOP], [b"ab"]])
    x = torch.randn(*one.student_ids.shape, 6, generator=g, dtype=torch.float64).requires_grad_()
    z = [random_logits(case, 3)[1] for case in (one, two)]
    losses = [strict_kl(Logits(x), Logits(z[0]), one.index, one.vm), loss_of("byte", two, Logits(x), z[1])]
    both = weighted_sum(losses, [0.25, 2.0])
    torch.testing.assert_close(both.loss, 0.25 * losses[0].loss + 2 * losses[1].loss)
    torch.testing.assert_close(both.terms, 0.25 * losses[0].terms + 2 * losses[1].terms)
    assert both.figures["0/tokens"] == losses[0].figures["tokens"]
    assert "1/residual" in both.figures
    (got,) = torch.autograd.grad(both.loss, x, retain_graph=True)
    parts = [torch.autograd.grad(loss.loss, x, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(got, 0.25 * parts[0] + 2 * parts[1])
    with pytest.raises(xtokmap.XTokMapError, match="2 losses and 1 weights"):
        weighted_sum(losses, [1.0])
    with pytest.raises(xtokmap.XTokMapError, match=r"losses\[1\] has terms \(1, 1\)"):
        weighted_sum([losses[0], strict2(1, 1.0)[0]], [1.0, 1.0])


def test_figures_say_what_was_scored():
    case = Case([b"a", b"b", b"c", STOP], [b"ab", b"c", STOP], [[b"a", b"b", b"c", STOP]], [[b"ab", b"c", STOP]])
    x, z = random_logits(case, 0)
    strict = strict_kl(Logits(x), Logits(z), case.index, case.vm)
    assert strict.figures["scored"].item() == 0.5
    kinds = dict(zip(xtokmap.Kind, strict.figures["kinds"].tolist(), strict=True))
    assert {kind.name: n for kind, n in kinds.items() if n} == {"ONE_TO_ONE": 1, "STOP": 1}
    mask = torch.tensor([[True, True, True, False]])
    byte = byte_kl(Logits(x), Logits(z), case.index, case.vm, case.queries, mask=mask)
    assert byte.figures["scored"].item() == 1
    assert byte.figures["kinds"].tolist() == [1, 0, 2, 0, 0, 0, 0]
    assert not any(figure.requires_grad for figure in byte.figures.values())


def test_more_logits_than_tokens_are_padding():
    case = random_case(3)
    x, z = random_logits(case, 3)
    low = torch.full((*x.shape[:2], 2), -40.0, dtype=x.dtype)
    wide = torch.cat([x, low], -1)
    wide_z = torch.cat([z, torch.full((*z.shape[:2], 5), -40.0, dtype=z.dtype)], -1)
    for name in LOSSES:
        if name == "hybrid":  # its weight is a share of the teacher's logits
            continue
        one, two = loss_of(name, case, Logits(x), z), loss_of(name, case, Logits(wide), wide_z)
        torch.testing.assert_close(one.terms, two.terms, atol=1e-7, rtol=1e-7)


def test_errors_say_what_to_give():
    given_ = {"student_logprobs": torch.zeros(1, 2), "teacher_logprobs": torch.zeros(1, 1)}
    x, z = Logits(log(ROOT3, INSIDE3)), Logits(log(Q3))
    top = TopK(torch.zeros(1, 1, 2, dtype=torch.long), torch.zeros(1, 1, 2))
    index, vm, queries = V3.index, V3.vm, V3.queries
    for match, make in [
        ("byte_kl: a teacher given as TopK; it takes Logits", lambda: byte_kl(x, top, index, vm, queries)),
        ("completion: a teacher given as TopK", lambda: completion(x, top, index, vm, V3.completions)),
        ("uld_hybrid: a teacher given as TopK", lambda: uld_hybrid(x, top, index, vm, **given_)),
        ("strict_kl: a teacher given as Tensor; it takes Logits or TopK", lambda: strict_kl(x, z.rows, index, vm)),
        (
            "made on the CPU, before the index goes to meta",
            lambda: Completions(*V3.tables, V3.vm).queries(index.to("meta"), V3.student_ids),
        ),
        ("support='all'", lambda: strict_kl(x, z, index, vm, support="all")),
        ("k=0: at least 1", lambda: strict_kl(x, z, index, vm, k=0)),
        (r"beta=1.5 is outside \[0, 1\]", lambda: strict_kl(x, z, index, vm, beta=1.5)),
        ("phi='short': use 'longest' or 'canonical'", lambda: byte_kl(x, z, index, vm, queries, phi="short")),
        ("residual='lost': use", lambda: byte_kl(x, z, index, vm, queries, residual="lost")),
        ("floor=0 with beta=1", lambda: byte_kl(x, z, index, vm, queries, beta=1, floor=0)),
        ("tau=0 must be positive", lambda: alm(torch.zeros(1, 2), torch.zeros(1, 1), index, tau=0)),
        (
            r"student has rows \(1, 1\), the index has \(1, 2\) student tokens",
            lambda: strict_kl(z, z, index, vm),
        ),
        (
            "student has 6 logits a row and its vocabulary 8 tokens",
            lambda: strict_kl(Logits(x.rows[..., :6]), z, index, vm),
        ),
        (r"mask has shape \(1, 1\)", lambda: strict_kl(x, z, index, vm, mask=torch.ones(1, 1))),
        (
            "spelling needs queries with prefix_range",
            lambda: byte_kl(x, z, index, vm, replace(queries, prefix_range=None), spelling=spelling_of(V3, z.rows)),
        ),
        (
            "residual='column' needs student ids without bytes",
            lambda: byte_kl(
                Logits(log([0.5, 0.5])),
                Logits(log([0.5, 0.5])),
                (c := Case([b"a", STOP], [b"a", STOP], [[b"a"]], [[b"a"]])).index,
                c.vm,
                c.queries,
                residual="column",
            ),
        ),
    ]:
        with pytest.raises(xtokmap.XTokMapError, match=match):
            make()


def test_maps_move_with_the_index():
    maps = VocabTensors.from_map(V3.vm)
    assert maps.to("meta").prefix.device.type == "meta"
    assert maps.shared.tolist() == [[1, 2], [6, 5]]
    assert maps.num_groups == 3
    x = log(ROOT3, INSIDE3)
    one = strict_kl(Logits(x), Logits(log(Q3)), V3.index, maps)
    assert one.loss == strict_kl(Logits(x), Logits(log(Q3)), V3.index, V3.vm).loss


def test_renormalising_nothing_compares_nothing():
    case = Case([b"a", b"b"], [b"a", b"c"], [[b"a"]], [[b"a"]])
    x = log([0.1, 0.9]).requires_grad_()
    loss = strict_kl(Logits(x), Logits(log([0.5, 0.5])), case.index, case.vm, k=1, support="renorm")
    assert loss.loss == 0
    assert loss.figures["nonfinite"] == 0
    assert gradient(loss, x) == [0, 0]


@pytest.mark.parametrize("name", LOSSES)
def test_a_device_is_never_asked(name):
    # A fake tensor has no data: .item(), nonzero or a boolean mask would raise; so would a CPU tensor among CUDA ones.
    case = random_case(1)
    shapes = [random_logits(case, 1)[side].shape for side in (0, 1)]
    every_row = torch.arange(case.student_ids.numel())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = object.__new__(Case)
        fake.__dict__.update(case.__dict__)
        fields = [mode.from_tensor(getattr(case.index, f)).to("cuda") for f in ChunkIndex.__dataclass_fields__]
        fake.index, fake.vm = ChunkIndex(*fields), VocabTensors.from_map(case.vm, "cuda")
        fake.student_ids, fake.teacher_ids = (
            mode.from_tensor(ids).to("cuda") for ids in (case.student_ids, case.teacher_ids)
        )
        x, z = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
        # Queries look at rows with numpy, which fake tensors keep from it, real or not.
        for rows in (None,) if name.startswith(("byte", "completion")) else (None, every_row):
            loss = loss_of(name, fake, Logits(x), z, rows=rows)
            assert loss.loss.shape == ()
            assert {t.device.type for t in (loss.loss, loss.terms, *loss.figures.values())} == {"cuda"}


# ---- TRL ---------------------------------------------------------------------------------------------------------


def trl_loss(case: Case, x, z, *, strategy: str, beta: float = 0.5, hybrid: bool = True) -> torch.Tensor:
    """TRL's own loss of the case's texts: behind a prompt of one token, and logits whose row i predicts token i + 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gold = pytest.importorskip("trl.experimental.gold.gold_trainer", exc_type=ImportError)
    # Byte-level names that differ only where the bytes do.
    tokenizers = [
        SimpleNamespace(get_vocab=lambda v=v: {spelled(t).decode(): i for i, t in enumerate(v)})
        for v in (case.vm.student, case.vm.teacher)
    ]
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=True,
        uld_token_merge_strategy=strategy,
        uld_use_hybrid_loss=hybrid,
        uld_hybrid_matched_weight=None,
        uld_hybrid_unmatched_weight=None,
        beta=beta,
    )
    given_ = []
    for logits, tokens, vocabulary in (
        (x, case.student_ids, case.vm.student),
        (z, case.teacher_ids, case.vm.teacher),
    ):
        behind = torch.nn.functional.pad(logits, (0, 0, 0, 1))  # one more row, which predicts nothing
        ids = torch.nn.functional.pad(tokens, (1, 0))
        labels = ids.clone()
        labels[:, 0] = -100
        ends = torch.tensor([oracle.byte_ends([vocabulary[i] for i in row]) for row in ids[:, 1:].tolist()])
        ends = torch.nn.functional.pad(ends, (1, 0))
        given_.append((behind, labels, ids, torch.stack([ends, ends], -1)))
    (s, s_labels, s_ids, s_ends), (t, t_labels, t_ids, t_ends) = given_
    loss = gold.ULDLoss(config, student_tokenizer=tokenizers[0], teacher_tokenizer=tokenizers[1])
    return loss(s, t, s_labels, t_labels, s_ids, t_ids, s_ends, t_ends)


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("beta", BETAS)
def test_trls_loss_where_it_is_right(beta, hybrid):
    for seed in range(12):
        case = random_case(seed, stops=False, specials=False)
        rows = [(s, t) for s, t in zip(*case.rows, strict=True) if s and oracle.spell(s) == oracle.spell(t)]
        if not rows:
            continue
        case = Case(case.vm.student, case.vm.teacher, *([row] for row in rows[0]))
        x, z = random_logits(case, seed)
        logprobs = {
            "student_logprobs": realized(x, case.student_ids),
            "teacher_logprobs": realized(z, case.teacher_ids),
        }
        ours = uld_hybrid(Logits(x), Logits(z), case.index, case.vm, beta=beta, hybrid=hybrid, **logprobs)
        theirs = trl_loss(case, x, z, strategy="bayesian", beta=beta, hybrid=hybrid)
        torch.testing.assert_close(ours.loss, theirs, atol=1e-9, rtol=1e-7)
        for a, b in zip(torch.autograd.grad(ours.loss, x), torch.autograd.grad(theirs, x), strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def test_trls_default_merge_makes_a_perfect_student_pay():
    """One chunk "ab", split by the student, which gives every text what the teacher gives it."""
    case = Case([b"a", b"b", b"x"], [b"ab", b"x"], [[b"a", b"b"]], [[b"ab"]])
    x, z = log([0.7, 0.0, 0.3], [0.0, 1.0, 0.0]), log([0.7, 0.3])
    own, others = realized(x, case.student_ids), realized(z, case.teacher_ids)
    logprobs = {"student_logprobs": own, "teacher_logprobs": others}
    assert byte_kl(Logits(x), Logits(z), case.index, case.vm, case.queries).loss.abs() < 1e-9
    ours = uld_hybrid(Logits(x), Logits(z), case.index, case.vm, hybrid=False, **logprobs)
    # ULD's own flaw: .3 of "x" is in the first row only, and a chunk has the last row's distribution.
    assert ours.loss.item() == pytest.approx(0.3)
    # TRL's default does not even look at the row that predicts "a".
    moved = x.clone()
    moved[0, 0] = torch.tensor([0.1, 0.1, 0.8]).log()
    observed = [trl_loss(case, y, z, strategy="observed", hybrid=False).item() for y in (x, moved)]
    assert observed[0] == observed[1]
    assert observed[0] > 0.3

"""The losses of whole distributions: hand-checked vectors, plain forms of them, and what must hold of any text."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
import xtokmap
from oracle import SPECIAL, STOP, Tokens, VocabMap, interior_queries, spelled
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
from xtokmap.torch import ChunkIndex, Logits, TopK, token_logprobs

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


def realised(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
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
    spelling = Spelling(case.student_ids, case.teacher_ids, realised(z, case.teacher_ids)) if spans else None
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
        "student_logprobs": realised(x, case.student_ids),
        "teacher_logprobs": realised(z, case.teacher_ids),
    }
    got = uld_hybrid(Logits(x), Logits(z), case.index, case.vm, hybrid=hybrid, beta=beta, size=size, **given_)
    check(got, plain_uld(case, x, z, beta, hybrid), x, 1e-8)


# ---- every loss --------------------------------------------------------------------------------------------------


def spelling_of(case: Case, z: torch.Tensor) -> Spelling:
    return Spelling(case.student_ids, case.teacher_ids, realised(z, case.teacher_ids))


def sampled(student: Logits, ids: torch.Tensor) -> torch.Tensor:
    """Logprobs of the student's tokens, with a gradient."""
    x = student.rows if student.weight is None else torch.nn.functional.linear(student.rows, student.weight)
    return token_logprobs(x, ids, temperature=student.temperature, softcap=student.softcap)


def all_of_it(case: Case, z: torch.Tensor) -> TopK:
    """A served teacher that lists every token."""
    ids = torch.arange(z.shape[-1]).expand(z.shape)
    return TopK(ids, torch.log_softmax(z, -1))


#: name -> loss of a case, student rows and teacher logits. Between them they use every option that changes a value.
LOSSES = {
    "strict": lambda c, s, z, **o: strict_kl(s, Logits(z), c.index, c.vm, k=3, **o),
    "strict forward, all": lambda c, s, z, **o: strict_kl(s, Logits(z), c.index, c.vm, k=None, beta=0.0, **o),
    "strict, renormalised": lambda c, s, z, **o: strict_kl(s, Logits(z), c.index, c.vm, support="renorm", **o),
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
        teacher_logprobs=realised(z, c.teacher_ids),
        **o,
    ),
    "hybrid": lambda c, s, z, **o: uld_hybrid(
        s,
        Logits(z),
        c.index,
        c.vm,
        student_logprobs=sampled(s, c.student_ids),
        teacher_logprobs=realised(z, c.teacher_ids),
        **o,
    ),
}
ALM = {
    "alm": lambda c, s, z, size=None, rows=None, **o: alm(
        sampled(s, c.student_ids), realised(z, c.teacher_ids), c.index, **o
    ),
    "alm, tau": lambda c, s, z, size=None, rows=None, **o: alm(
        sampled(s, c.student_ids), realised(z, c.teacher_ids), c.index, tau=3.0, **o
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
def test_nothing_to_score_is_zero(name):
    for rows in ([], [[]], [[b"a"], []]):
        case = Case([b"a", SPECIAL, STOP], [b"a", b"ab", STOP], rows, [[] for _ in rows])
        x, z = random_logits(case, 0)
        loss = loss_of(name, case, Logits(x), z)
        assert loss.loss == 0
        assert loss.figures["tokens"] == 0
        loss.loss.backward()
        assert x.grad is None or (x.grad == 0).all()

"""Two tokenizers on every text up to a length: all of a random teacher and a random student, and expected gradients.

Shared by the tests of `transfer` and by `benches/bias.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

import xtokmap
from oracle import Floats, Paths, Side
from xtokmap.losses.bytes import Spelling, byte_kl
from xtokmap.losses.credit import chunk_credit
from xtokmap.losses.queries import Transferred, transfer
from xtokmap.losses.target import TransferTarget
from xtokmap.losses.transfer import transfer_kl
from xtokmap.torch.index import ChunkIndex, VocabTensors
from xtokmap.torch.logits import Logits

#: In the place of log 0 in a student's rows: a forward KL to something that the student cannot say stays finite.
IMPOSSIBLE = -30.0


def padded(rows: list, fill: int = 0) -> Tensor:
    width = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.long).view(-1, width)


class Pair:
    """A student's and a teacher's tokenizer, and every text (of a list, if given) in the tokens of both, aligned."""

    def __init__(
        self,
        student: Side,
        teacher: Side,
        length: int = 5,
        alphabet: bytes = b"ab",
        texts: Sequence[bytes] | None = None,
    ) -> None:
        self.student, self.teacher = (Paths(side, length, alphabet, texts) for side in (student, teacher))
        self.aligner = xtokmap.Aligner(student.tokenizer(), teacher.tokenizer())
        self.batch = self.aligner.align_batch(
            [list(ids) for ids in self.student.ids], [list(ids) for ids in self.teacher.ids], threads=1
        )
        self.index = ChunkIndex.from_alignment(self.batch)
        self.queries = self.aligner.cover_queries(self.batch, threads=1)
        self.student_ids, self.teacher_ids = padded(self.student.ids), padded(self.teacher.ids)
        self.student_nodes, self.teacher_nodes = padded(self.student.nodes), padded(self.teacher.nodes)
        #: True on the tokens of the texts, False on padding.
        self.is_token = padded([[1] * len(ids) for ids in self.student.ids]).bool()
        #: For `transfer`: teacher ids, and the node before each and after the last (where no row counts: -1).
        self.flat_ids = torch.tensor([i for ids in self.teacher.ids for i in ids])
        self.flat_nodes = torch.tensor([k for nodes in self.teacher.nodes for k in [*nodes, -1]])

    @cached_property
    def maps(self) -> VocabTensors:
        return VocabTensors.from_map(self.aligner.vocab_map)

    @cached_property
    def interior(self) -> xtokmap.alignment.InteriorQueries:
        return self.aligner.interior_queries(self.batch)

    def model(self, rng: np.random.Generator, concentration: float = 1.0, leak: float = 0.0) -> Model:
        """A random teacher and student; `leak`: what the teacher's rows give to each token that cannot stand there."""
        teacher = self.teacher.random_rows(rng, concentration)
        return Model(self, self.student.random_rows(rng, concentration), teacher, leak)


class Model:
    """A teacher's rows and a student's, at every node of their side.

    Attributes:
        p: float64 `[nodes, V]`, the student's.
        q: the teacher's, at the nodes of its own encoding, as the losses see them.
        q_star: the teacher's probabilities in the student's encoding, summed up text by text.
        drawn: float64 `[texts]`; how likely the student is to write each text.
        reach: float64 `[nodes]`; how likely it is to come to each node.
    """

    def __init__(self, pair: Pair, p: Floats, q: Floats, leak: float = 0.0) -> None:
        self.pair = pair
        shown = np.where(pair.teacher.allowed, q, leak)
        self.q = shown / shown.sum(1, keepdims=True)
        #: Of every text, under a teacher that keeps to its own encoding.
        self.text_probabilities = pair.teacher.probabilities(q)
        self.q_star = pair.student.conditionals(self.text_probabilities)
        self.become(p)

    def become(self, p: Floats) -> None:
        """Another student, with the same teacher."""
        self.p = p
        self.drawn = self.pair.student.probabilities(p)
        self.reach = self.pair.student.visited(self.drawn)

    @cached_property
    def teacher_table(self) -> Tensor:
        """Logits at every node, and a row that says nothing."""
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(np.concatenate([self.q, np.ones((1, self.q.shape[1]))])))

    @cached_property
    def flat_teacher(self) -> Logits:
        return Logits(self.teacher_table[self.pair.flat_nodes])

    @cached_property
    def values(self) -> Transferred:
        return transfer(self.flat_teacher, self.pair.flat_ids, self.pair.queries)

    @cached_property
    def transferred(self) -> Tensor:
        """log q*(s_i | s_<i) as the library finds it: `[texts, Ts]`, NaN on padding."""
        out = torch.full(self.pair.is_token.shape, torch.nan, dtype=torch.float64)
        return out.masked_scatter(self.pair.is_token, self.values.transferred)

    @cached_property
    def target(self) -> TransferTarget:
        return TransferTarget(self.flat_teacher, self.pair.flat_ids, self.pair.queries)

    @property
    def student_rows(self) -> Tensor:
        """Logits `[texts, Ts, V]`, with a gradient."""
        table = torch.from_numpy(np.where(self.p > 0, np.log(np.maximum(self.p, 1e-300)), IMPOSSIBLE))
        return table[self.pair.student_nodes].requires_grad_()

    @cached_property
    def log_q_star(self) -> Tensor:
        """What `transferred` should be."""
        with np.errstate(divide="ignore"):  # on padding
            found = torch.from_numpy(np.log(self.q_star[self.pair.student_nodes, self.pair.student_ids]))
        return torch.where(self.pair.is_token, found, torch.nan)

    @cached_property
    def teacher_logprobs(self) -> Tensor:
        """Of its own tokens: `[texts, Tt]`, 0 on padding."""
        rows = self.teacher_table[self.pair.teacher_nodes]
        found = rows.gather(2, self.pair.teacher_ids[..., None])[..., 0]
        return torch.where(padded([[1] * len(ids) for ids in self.pair.teacher.ids]).bool(), found, 0)

    @property
    def exact(self) -> Floats:
        """Gradient of sum over nodes of reach KL(p || q*), reach held, by the logits of every node: `[nodes, V]`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            gap = np.where(self.p > 0, np.log(self.p) - np.log(self.q_star), 0)
        return self.reach[:, None] * self.p * (gap - (self.p * gap).sum(1, keepdims=True))

    @property
    def exact_forward(self) -> Floats:
        """The same of KL(q* || p)."""
        return self.reach[:, None] * (self.p - self.q_star)

    def score_gradients(self, credit: str) -> Floats:
        """A_i grad log p(s_i | s_<i) at every token of every text, turned to a descent: `[texts, Ts, V]`."""
        pair = self.pair
        p = torch.from_numpy(self.p)[pair.student_nodes]
        chosen = p.gather(2, pair.student_ids[..., None])[..., 0].log()
        found = chunk_credit(chosen, self.teacher_logprobs, pair.index, credit, self.transferred, clamp=None)
        one_hot = torch.nn.functional.one_hot(pair.student_ids, p.shape[2])
        return (found.advantages.double()[..., None] * (p - one_hot)).numpy()

    def loss_gradients(self, loss: str, beta: float = 1.0, **options: object) -> Floats:
        """Gradient of the term of every token of every text: `[texts, Ts, V]`."""
        pair, x = self.pair, self.student_rows
        if loss == "byte_kl":
            teacher = Logits(self.teacher_table[pair.teacher_nodes])
            spelling = Spelling(pair.student_ids, pair.teacher_ids, self.teacher_logprobs)
            found = byte_kl(
                Logits(x),
                teacher,
                pair.index,
                pair.maps,
                pair.interior,
                spelling=spelling,
                beta=beta,
                denominator=1,
                **options,
            )
        else:
            found = transfer_kl(Logits(x), self.target, pair.index, beta=beta, denominator=1, **options)
        assert found.figures["nonfinite"] == 0
        (gradient,) = torch.autograd.grad(found.loss, x)
        return gradient.numpy()

    def sampled(self) -> dict[str, Tensor]:
        """What `transfer_kl` is told of the sampled tokens."""
        return {"student_ids": self.pair.student_ids}

    def expected(self, gradients: Floats) -> Floats:
        """The mean over the student's own samples, by the logits of every node: `[nodes, V]`."""
        mean = np.zeros(self.p.shape)
        weighted = gradients * self.drawn[:, None, None]
        np.add.at(mean, self.pair.student_nodes.numpy(), np.where(self.pair.is_token[..., None], weighted, 0))
        return mean

    def variance(self, gradients: Floats) -> float:
        """Mean squared distance of one sample's gradient from that mean; a text comes to no node twice."""
        square = np.where(self.pair.is_token[..., None], gradients, 0) ** 2
        return float((self.drawn * square.sum((1, 2))).sum() - (self.expected(gradients) ** 2).sum())


def cosine(a: Floats, b: Floats) -> float:
    return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))

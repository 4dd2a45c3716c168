"""Whether losses across tokenizers collapse on runs of spaces: python benches/whitespace.py

arXiv 2607.22334 leaves rows of white space out of its byte-prefix loss, without which its student unlearns to write
code. Two looks at that. By enumeration: lines of n spaces and a word, where everything can be summed up; what a loss
says of white space, and where a student ends that follows its expected gradient. And by training (`--train`): a small
pair of models, made here, whose task is nested code. Prints tables; with `--train` they are written to
benches/results/whitespace.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import tokenizers
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import real_tokenizers
import xtokmap
from enumeration import Model, Pair, cosine
from oracle import Floats, Side
from reproduce import families
from reproduce.tasks import TASKS, Chain, Problem, problem_of
from xtokmap.chat import render
from xtokmap.losses.bytes import whitespace_tokens
from xtokmap.losses.credit import chunk_credit
from xtokmap.losses.rule import Computed, LossInput
from xtokmap.losses.table import LOSSES
from xtokmap.teachers.local import LocalTeacher
from xtokmap.tokenizers import text_codec
from xtokmap.torch.logits import Logits
from xtokmap.train.config import Config
from xtokmap.train.generation import sample
from xtokmap.train.run import Run
from xtokmap.train.sampling import Roller

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "whitespace.md"

# ---- by enumeration: a line of n spaces and a word ----------------------------------------------------------------

#: Longest run of spaces.
LONGEST = 16
TEXTS = [b"\n" + b" " * n + b"x" for n in range(LONGEST + 1)]
ALPHABET = "\n x"

_DOUBLING = ("Ġ Ġ", "ĠĠ ĠĠ", "ĠĠĠĠ ĠĠĠĠ")
SIDES = {
    "single": Side.bpe(alphabet=ALPHABET),
    "pairs": Side.bpe("Ġ Ġ", alphabet=ALPHABET),
    "doubling": Side.bpe(*_DOUBLING, alphabet=ALPHABET),
    "every run": Side((b"\n", b"x", *(b" " * n for n in range(1, LONGEST + 1)))),
    "joined": Side.bpe("Ġ x", "Ġ Ġ", alphabet=ALPHABET),
    "new line": Side.bpe(*_DOUBLING[:2], "Ċ ĠĠĠĠ", alphabet=ALPHABET),
}
#: The student's tokenizer and the teacher's.
WORLDS = (
    ("single", "doubling"),
    ("pairs", "doubling"),
    ("pairs", "every run"),
    ("every run", "single"),
    ("doubling", "every run"),
    ("doubling", "single"),
    ("joined", "new line"),
    ("joined", "doubling"),
)

#: The same of real tokenizers.
REAL = (("cl100k", "anthropic"), ("anthropic", "cl100k"))


class Real:
    """A tokenizer of somebody else's as a side.

    Attributes:
        tokens: their bytes by id, none for special ones.
        end: the first of its stop ids.
    """

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded
        table = xtokmap.byte_table(loaded)
        self._codec = text_codec(loaded)
        self.tokens = tuple(table[i] or b"" for i in range(len(table)))
        self.end = table.stop_ids[0]

    @classmethod
    def named(cls, name: str) -> Real:
        """One of `real_tokenizers`; pytest's Skipped where its package is not installed."""
        if name in real_tokenizers.ENCODINGS:
            return cls(real_tokenizers.encoding(name))
        return cls(tokenizers.Tokenizer.from_file(str(real_tokenizers.path(name))))

    def encode(self, text: bytes) -> tuple[int, ...]:
        """Ids of a text."""
        return tuple(self._codec.encode_batch([text.decode()])[0].tolist())

    def tokenizer(self) -> Any:
        """What `Aligner` takes."""
        return self._loaded


Step = Callable[[Model, torch.Tensor], Floats]


def _credit(name: str) -> Step:
    return lambda m, _: m.expected(m.score_gradients(name))


def _bytes(beta: float, masked: bool) -> Step:
    return lambda m, space: m.expected(m.loss_gradients("byte_kl", beta, **({"whitespace": space} if masked else {})))


#: The expected gradient of each, given a model and which tokens are white space.
EXPECTED: dict[str, Step] = {
    "exact": lambda m, _: m.exact,
    "`prior`": _credit("prior"),
    "`full`": _credit("full"),
    "`cover`": _credit("cover"),
    "`transfer_kl`": lambda m, _: m.expected(m.loss_gradients("transfer_kl", **m.sampled())),
    "`byte_kl`, reverse": _bytes(1.0, False),
    "the same, white space masked": _bytes(1.0, True),
    "`byte_kl`, forward": _bytes(0.0, False),
    "the same, white space masked ": _bytes(0.0, True),
}


class World:
    """Lines of 0 to 16 spaces and a word; a teacher that indents by 2, 4 or 8, and a student that does not know.

    Attributes:
        pair: the two tokenizers on every line.
        lines: the teacher's probability of each.
        model: the teacher, and the student at its start: every further space a little less likely.
        space: bool `[texts, Ts]`; which of the student's tokens are white space.
    """

    def __init__(self, student: Side | Real, teacher: Side | Real, leak: float = 1e-4) -> None:
        self.pair = Pair(student, teacher, texts=TEXTS)
        lines = np.full(len(TEXTS), 0.005)
        lines[[2, 4, 8]] += 0.2, 0.4, 0.3
        self.lines = lines / lines.sum()
        self.start = self.pair.student.conditionals(0.86 ** np.arange(len(TEXTS)))
        #: `leak`: a model's softmax leaves something to everything.
        self.model = Model(self.pair, self.start, self.pair.teacher.conditionals(self.lines), leak)
        blank = np.array([token.isspace() for token in student.tokens] + [False])
        self.space = torch.from_numpy(blank)[self.pair.student_ids] & self.pair.is_token

    def advantages(self, credit: str) -> tuple[Floats, Floats]:
        """What a credit and the exact one hold for every token of every line: `[texts, Ts]`, 0 on padding."""
        model, pair = self.model, self.pair
        chosen = torch.from_numpy(model.p)[pair.student_nodes].gather(2, pair.student_ids[..., None])[..., 0].log()
        found = chunk_credit(chosen, model.teacher_logprobs, pair.index, credit, model.transferred, clamp=None)
        sides = (found.advantages.double(), model.log_q_star - chosen)
        given, exact = (torch.where(pair.is_token, x, 0).numpy() for x in sides)
        return given, exact

    def mean(self, x: Floats, where: torch.Tensor) -> float:
        """Over the student's own samples, of some tokens."""
        weight = self.model.drawn[:, None] * where.numpy()
        return float((weight * x).sum() / weight.sum())

    def follow(self, step: Step, steps: int = 100, rate: float = 2.0) -> tuple[float, float]:
        """Where the student ends on a loss's expected gradient: total variation from the teacher, and spaces a line."""
        allowed, drawn = self.pair.student.allowed, self.model.drawn
        x = np.where(allowed, np.log(np.where(allowed, self.start, 1)), -np.inf)
        for _ in range(steps):
            x = x - rate * np.where(allowed, step(self.model, self.space), 0)
            p = np.exp(x - x.max(1, keepdims=True))
            self.model.become(p / p.sum(1, keepdims=True))
        drawn = self.model.drawn
        self.model.become(self.start)
        return float(abs(drawn - self.lines).sum() / 2), float(drawn @ np.arange(len(TEXTS)))


def enumerated() -> Iterator[str]:
    worlds = {f"{s} ← {t}": World(SIDES[s], SIDES[t]) for s, t in WORLDS}
    yield "## What a credit says of white space"
    yield ""
    yield "Mean advantage over the student's samples, nats, and the mean distance from the exact one; the student at"
    yield "its start. `rest`: the word and the end of the line."
    yield ""
    credits_ = ["`prior`", "`full`", "`cover`"]
    yield "| " + " | ".join(["student ← teacher", "exact, space", *credits_, "exact, rest", *credits_]) + " |"
    yield "|---|" + "--:|" * 8
    for name, world in worlds.items():
        yield _advantages(name, world, ("prior", "full", "cover"))
    yield ""
    yield "The same of real tokenizers: Anthropic's makes one token of a new line and the spaces behind it, cl100k two."
    yield ""
    credits_ = ["`prior`", "`cover`"]
    yield "| " + " | ".join(["student ← teacher", "exact, space", *credits_, "exact, rest", *credits_]) + " |"
    yield "|---|" + "--:|" * 6
    for student, teacher in REAL:
        world = _real_world(student, teacher)
        if world is not None:
            yield _advantages(f"{student} ← {teacher}", world, ("prior", "cover"))
    yield ""
    yield "## Which way a loss's expected gradient points"
    yield ""
    yield "Cosine to the exact gradient of the same divergence, at the student's start, over the states behind a space."
    yield ""
    yield "| loss | " + " | ".join(worlds) + " |"
    yield "|---|" + "--:|" * len(worlds)
    for loss, step in EXPECTED.items():
        if loss == "exact":
            continue
        row = []
        for world in worlds.values():
            paths = world.pair.student
            behind = [k for k, h in enumerate(paths.prefixes) if h and paths.side.tokens[h[-1]].isspace()]
            right = world.model.exact_forward if step in _FORWARD else world.model.exact
            row.append(f"{cosine(step(world.model, world.space)[behind], right[behind]):.3f}")
        yield f"| {loss.strip()} | " + " | ".join(row) + " |"
    yield ""
    yield "## Where a student ends that follows it"
    yield ""
    first = next(iter(worlds.values()))
    spaces = first.lines @ np.arange(len(TEXTS))
    start = first.follow(EXPECTED["exact"], steps=0)
    yield "Total variation between the student's lines and the teacher's, and spaces a line, after 100 steps of the"
    yield f"expected gradient. The teacher writes {spaces:.2f} spaces a line; before: {_end(start)}."
    yield ""
    yield "| loss | " + " | ".join(worlds) + " |"
    yield "|---|" + "--:|" * len(worlds)
    for loss, step in EXPECTED.items():
        yield f"| {loss.strip()} | " + " | ".join(_end(world.follow(step)) for world in worlds.values()) + " |"


def _real_world(student: str, teacher: str) -> World | None:
    try:
        return World(Real.named(student), Real.named(teacher), leak=1e-9)
    except BaseException as error:  # pytest's Skipped, which is no Exception
        if type(error).__name__ != "Skipped":
            raise
        print(f"{student} ← {teacher}: {error}", file=sys.stderr)
        return None


def _advantages(name: str, world: World, credits_: Sequence[str]) -> str:
    cells = [name]
    for where in (world.space, world.pair.is_token & ~world.space):
        for k, credit in enumerate(credits_):
            given, exact = world.advantages(credit)
            if not k:
                cells.append(f"{world.mean(exact, where):+.3f}")
            cells.append(f"{world.mean(given, where):+.3f} ({world.mean(abs(given - exact), where):.3f})")
    return "| " + " | ".join(cells) + " |"


def _end(found: tuple[float, float]) -> str:
    return f"{found[0]:.2f} ({found[1]:.1f})"


_FORWARD = tuple(step for loss, step in list(EXPECTED.items())[-2:])


# ---- by training: nested code ------------------------------------------------------------------------------------

#: Spaces from the start of a line to its second column.
COLUMN = 20
LETTERS = "abcdefgh"


class Nested:
    """Names and depths, written as code: a line each, indented by two spaces a depth, with the depth in a column.

    A line that is less deep than the one before has a blank line in front. The prompt for two lines is `c6f1`.
    """

    name = "nested"
    ways = ()

    def draw(self, rng: random.Random) -> Problem:
        """Letter and depth of two lines."""
        return tuple(x for _ in range(2) for x in (rng.randrange(len(LETTERS)), rng.randint(1, 8)))

    def prompt(self, problem: Problem) -> str:
        """As described above."""
        return "".join(f"{LETTERS[a]}{depth}" for a, depth in _lines(problem))

    def is_right(self, problem: Problem, answer: str) -> bool:
        """Whether every space is in its place."""
        return answer == self.write(problem, random.Random(0)).text

    def write(self, problem: Problem, rng: random.Random, mistakes: float = 0.0) -> Chain:
        """The answer. Of a wrong run of spaces nothing is learned, but what follows is consistent with it."""
        chain, before = Chain(rng, mistakes), 0
        for letter, depth in _lines(problem):
            chain.say("\n\n" if depth < before else "\n")
            indent = self._run(chain, 2 * depth, 2, 2 * 8)
            chain.say(LETTERS[letter])
            self._run(chain, COLUMN - indent - 1, 1, COLUMN)
            chain.say(str(depth))
            before = depth
        return chain

    def _run(self, chain: Chain, right: int, low: int, high: int) -> int:
        length = right
        if chain.rng.random() < chain.mistakes:
            length = chain.rng.choice([n for n in range(low, high + 1) if n != right])
        chain.pieces.append((" " * length, length != right))
        return length


def _lines(problem: Problem) -> Iterator[tuple[int, int]]:
    return zip(problem[::2], problem[1::2], strict=True)


TASK = Nested()

#: What a pre-tokenizer keeps together; the vocabulary is learned from answers.
CUTS = {
    "pairs": r" {2}|[^ ]",
    "runs": r" +|[^ ]",
    "runs and new lines": r"\n+ *| +|[^ ]",
    "joined": r" +(?= [a-z0-9])| ?[a-z0-9]|[^ ]| +",
}
ARRANGEMENTS = {"pairs ← runs": ("pairs", "runs"), "joined ← new lines": ("joined", "runs and new lines")}
TEMPLATE = "{prompt}>"

BATCH, MAX_NEW_TOKENS, JUDGED = 32, 48, 128
STEPS = 30


@cache
def tokenizer(cut: str) -> Any:
    """A byte-level BPE tokenizer for the task; the end of a turn is `<end>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random("tokenizer")
    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(CUTS[cut]), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    made.decoder = decoders.ByteLevel()
    problems = [TASK.draw(rng) for _ in range(2000)]
    # Wrong answers, so that runs of every length are seen.
    texts = [TEMPLATE.replace("{prompt}", TASK.prompt(p)) + TASK.write(p, rng, 0.3).text for p in problems]
    trainer = trainers.BpeTrainer(vocab_size=64, special_tokens=["<end>"], show_progress=False)
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


def _drawn(made: Any, mistakes: float, size: int) -> Callable[[random.Random], tuple[torch.Tensor, torch.Tensor]]:
    def draw(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        problems = [problem_of(TASK, rng) for _ in range(size)]
        examples = [(p, 1, TASK.write(p, rng, mistakes)) for p in problems]
        with patch.dict(TASKS, {TASK.name: TASK}):  # where `encode` looks
            return families.encode(made, TASK.name, examples, lambda _: TEMPLATE)

    return draw


def teacher_of(cut: str, say: Callable[[str], None] | None = None) -> Any:
    """A teacher that has seen wrong runs of spaces, and goes on from them."""
    made, steps = tokenizer(cut), 200
    torch.manual_seed(0)
    model = families.teacher_model(len(made))
    rate = lambda step: 3e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)  # noqa: E731
    families.fit(model, _drawn(made, 0.2, 48), steps=steps, rate=rate, seed=f"teacher {cut}", muon=True, say=say)
    return model


def student_of(cut: str, seed: int, target: float = 0.35, say: Callable[[str], None] | None = None) -> Any:
    """A student whose training ends early, with a decay, so that no training at a small rate makes it better."""
    made = tokenizer(cut)
    torch.manual_seed(seed)
    model = families.student_model(len(made))
    annealed: Any = None

    def enough(step: int) -> bool:
        nonlocal annealed
        if step % 50 or judged(model, made, greedy=True)["right"] < target / 3:
            return False
        annealed = copy.deepcopy(model)
        fall = lambda k: families.STUDENT_RATE * (1 - k / 30)  # noqa: E731
        families.fit(annealed, _drawn(made, 0.0, 32), steps=30, rate=fall, seed=f"{cut} {seed} {step}")
        return judged(annealed, made, greedy=True)["right"] >= target

    rate = lambda step: families.STUDENT_RATE * min(1.0, (step + 1) / 30)  # noqa: E731
    families.fit(
        model,
        _drawn(made, 0.0, 32),
        steps=3000,
        rate=rate,
        seed=f"student {cut} {seed}",
        muon=True,
        until=enough,
        say=say,
    )
    return annealed


@cache
def heldout() -> tuple[list[Problem], list[str]]:
    rng = random.Random("heldout")
    problems = [problem_of(TASK, rng, heldout=True) for _ in range(JUDGED)]
    return problems, [TASK.prompt(p) for p in problems]


def judged(model: Any, made: Any, *, greedy: bool) -> dict[str, float]:
    """Of answers to held-out problems: share right, share ended, share of bytes that are white space, bytes."""
    problems, prompts = heldout()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = render(made, prompts, TEMPLATE)
        answers, ended = sample(model, ids, [made.eos_token_id], Config(max_new_tokens=MAX_NEW_TOKENS), greedy=greedy)
    texts = made.batch_decode(answers, skip_special_tokens=True)
    written = "".join(texts)
    return {
        "right": sum(map(TASK.is_right, problems, texts)) / len(texts),
        "ended": sum(ended) / len(texts),
        "space": sum(map(str.isspace, written)) / max(1, len(written)),
        "bytes": len(written) / len(texts),
    }


def _without_space(x: LossInput) -> Computed:
    """`byte_kl` as arXiv 2607.22334 has it: rows whose sampled token is white space are left out."""
    assert x.maps is not None
    return LOSSES["byte_kl"].compute(replace(x, mask=x.mask & ~_BLANK[0][x.student_ids]))


#: Of the student's vocabulary at work, for `_without_space`.
_BLANK: list[torch.Tensor] = []

#: Name, fields of `Config`, and whether rows of white space are masked.
METHODS: dict[str, tuple[dict[str, Any], bool]] = {
    **{f"`{name}`": ({"loss": name}, False) for name in ("prior", "full", "cover", "transfer_kl")},
    "`byte_kl`, reverse": ({"loss": "byte_kl"}, False),
    "`byte_kl`, reverse, white space masked": ({"loss": "byte_kl"}, True),
    "`byte_kl`, forward": ({"loss": "byte_kl", "beta": 0.0}, False),
    "`byte_kl`, forward, white space masked": ({"loss": "byte_kl", "beta": 0.0}, True),
}
RATES = (3e-4, 1e-3)


def roller_of(student: Any, teacher: Any, cuts: tuple[str, str], method: str, rate: float, seed: int) -> Roller:
    fields, masked = METHODS[method]
    config = Config(
        steps=STEPS,
        batch_size=BATCH,
        micro_batch=BATCH,
        max_new_tokens=MAX_NEW_TOKENS,
        learning_rate=rate,
        warmup_steps=3,
        decay="linear",
        max_chunk_tokens=0,
        plain_template=TEMPLATE,
        seed=seed,
        device="cpu",
        **fields,
    )
    sides = [tokenizer(cut) for cut in cuts]
    other = LocalTeacher(teacher, sides[1], micro_batch=BATCH, plain_template=TEMPLATE)
    roller = Roller(student, sides[0], other, config)
    _BLANK[:] = [whitespace_tokens(roller.aligner.student)]
    if masked:
        roller.pair = roller.pair.with_loss(replace(LOSSES["byte_kl"], compute=_without_space))
    return roller


def signals(student: Any, teacher: Any, cuts: tuple[str, str], seed: int = 0) -> dict[str, tuple[float, ...]]:
    """What each loss does to the logit of the sampled token: its mean, on white space and on the rest, by method."""
    prompts = heldout()[1]
    found = {}
    for method in METHODS:
        roller = roller_of(student, teacher, cuts, method, 1e-3, seed)
        torch.manual_seed(seed)
        rollouts = roller.roll(prompts)
        rows = roller.rows(rollouts.batch).detach()
        x = rows.slice(0, rows.shape[0]).requires_grad_()
        loss = roller.pair.loss(Logits(x), rollouts.teacher, rollouts.batch, denominator=1.0).loss
        (gradient,) = torch.autograd.grad(loss, x)
        ids = torch.tensor([i for row in rollouts.batch.student_ids for i in row])
        blank = _BLANK[0][ids]
        push = -gradient.gather(1, ids[:, None])[:, 0]
        found[method] = (float(push[blank].mean()), float(push[~blank].mean()), float(blank.float().mean()))
    return found


def run(student: Any, teacher: Any, cuts: tuple[str, str], method: str, rate: float, seed: int) -> dict[str, Any]:
    """One run: what the student writes before and after."""
    own = copy.deepcopy(student)
    roller = roller_of(own, teacher, cuts, method, rate, seed)
    rng = random.Random("train")
    prompts = [TASK.prompt(problem_of(TASK, rng)) for _ in range(4096)]
    torch.manual_seed(seed)
    began = time.process_time()
    running = Run(roller, prompts, watch=False)
    for _ in range(STEPS):
        running.step()
    seconds = time.process_time() - began
    made = roller.tokenizer
    return {
        "method": method, "rate": rate, "seed": seed, "seconds": round(seconds, 1),
        "greedy": judged(own, made, greedy=True), "sampled": judged(own, made, greedy=False),
    }  # fmt: skip


# ---- the command -------------------------------------------------------------------------------------------------


def kept(path: Path, make: Callable[[], Any], empty: Any) -> Any:
    """A trained model: made now, or read into `empty`, if it was made before."""
    if path.exists():
        empty.load_state_dict(torch.load(path, weights_only=True))
        return empty.eval()
    model = make()
    torch.save(model.state_dict(), path)
    return model


def trained(work: Path, rates: Sequence[float]) -> Iterator[str]:
    """Runs what is missing in `work`, then tells of all."""
    work.mkdir(parents=True, exist_ok=True)
    log = work / "runs.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    models = {}
    for name, cuts in ARRANGEMENTS.items():
        sizes = [len(tokenizer(cut)) for cut in cuts]
        student = kept(work / f"{cuts[0]}.pt", partial(student_of, cuts[0], 0), families.student_model(sizes[0]))
        teacher = kept(work / f"{cuts[1]}.pt", partial(teacher_of, cuts[1]), families.teacher_model(sizes[1]))
        models[name] = (student, teacher)
    for rate in rates:
        for name, cuts in ARRANGEMENTS.items():
            for method in METHODS:
                what = {"arrangement": name, "method": method, "rate": rate}
                if any(what.items() <= row.items() for row in done):
                    continue
                done.append({"arrangement": name, **run(*models[name], cuts, method, rate, 0)})
                print(json.dumps(done[-1], ensure_ascii=False), file=sys.stderr, flush=True)
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    yield "## Training"
    yield ""
    yield TRAINING
    for name, cuts in ARRANGEMENTS.items():
        student, teacher = models[name]
        yield ""
        yield f"### {name}"
        yield ""
        for who, model, cut in (("Teacher", teacher, cuts[1]), ("Student before", student, cuts[0])):
            both = [judged(model, tokenizer(cut), greedy=greedy) for greedy in (True, False)]
            yield f"{who}: {both[0]['right']:.2f} right greedily, {both[1]['right']:.2f} at temperature 1, " + (
                f"{both[1]['space']:.3f} white space, {both[1]['bytes']:.1f} bytes, {both[1]['ended']:.2f} ended."
            )
        yield ""
        yield "`signal`: what the loss does to the logit of a sampled token before the first step, mean over white"
        yield "space and over the rest; above 0 is more of the same."
        yield ""
        yield "| loss | rate | right, greedy | right, T = 1 | space | bytes | ended | signal, space | signal, rest |"
        yield "|---|" + "--:|" * 8
        pushes = signals(student, teacher, cuts)
        for method in METHODS:
            for row in sorted((r for r in done if r["arrangement"] == name and r["method"] == method), key=_rate):
                after = row["sampled"]
                blank, rest, _ = pushes[method]
                yield f"| {method} | {row['rate']:g} | {row['greedy']['right']:.2f} | {after['right']:.2f} | " + (
                    f"{after['space']:.3f} | {after['bytes']:.1f} | {after['ended']:.2f} | {blank:+.4f} | {rest:+.4f} |"
                )


def _rate(row: dict[str, Any]) -> float:
    return float(row["rate"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", action="store_true", help="train the small pairs, too")
    parser.add_argument(
        "--work", type=Path, default=HERE / ".data" / "whitespace", help="folder of models and finished runs"
    )
    parser.add_argument(
        "--rates", type=float, nargs="*", default=list(RATES), help="learning rates; none: tell of finished runs"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    lines = list(trained(args.work, args.rates)) if args.train else []
    lines = [*enumerated(), "", *lines]
    seconds = time.process_time() - start
    versions = {m.__name__: m.__version__ for m in (np, torch, tokenizers, transformers)}
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    head = [
        "# Runs of white space",
        "",
        f"Command: `{shlex.join(['python', 'benches/whitespace.py', *sys.argv[1:]])}`; {seconds:.0f} s on one thread;",
        f"Python {platform.python_version()}, {named}, xtokmap {xtokmap.__version__}.",
        "",
    ]
    text = "\n".join([*head, LEGEND, "", *lines]).rstrip() + "\n"
    print(text)
    if args.train:
        RESULTS.write_text(text, encoding="utf-8")


TRAINING = f"""\
Two lines of nested code to a prompt such as `c6f1` (names c and f, depths 6 and 1): two spaces a depth, the depth again
in column {COLUMN}, a blank line before a line that is less deep. Right: every space in its place. GPT-2 student
(2 layers, width 64), GPT-NeoX teacher (3 layers, width 128), both made here; the teacher has seen wrong runs, and goes
on from them. {STEPS} steps of {BATCH} samples, the rate falling to nothing, one seed, {JUDGED} held-out prompts (a
share's error is up to .04). `space`: the share of the bytes that is white space."""

LEGEND = """\
By enumeration first. Texts are lines: a new line, 0 to 16 spaces, a word. The teacher writes 2, 4 or 8 spaces with
probability .21, .41 and .31, every other number with .005; with the student every further space is 14 % less likely.
Tokenizers: `single` spaces; `pairs`; `doubling`, BPE with runs of 2, 4 and 8; `every run`, a token for each number of
spaces, longest match, as most large vocabularies have them; `joined`, pairs and the last space with the word; `new
line`, runs of 2 and 4, and a new line with 4 spaces. `exact`: KL(p || q*), q* what the teacher thinks of the student's
own tokens. White space masked: the rows whose sampled token is white space are left out, as arXiv 2607.22334 does."""


if __name__ == "__main__":
    main()

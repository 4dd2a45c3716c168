"""Tasks whose answers a program can check, and the ways in which a solution can be written.

A task has problems, and eight ways of writing a solution as a chain of steps that ends in `#answer`. Chains can have
wrong numbers in them, the steps behind consistent with these: a teacher must be at home on a student's mistakes.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass
class Chain:
    """A solution being written: pieces of text, and which of them are wrong.

    Args:
        rng: of the mistakes.
        mistakes: the probability that a computed number is wrong.
    """

    rng: random.Random
    mistakes: float = 0.0
    pieces: list[tuple[str, bool]] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Text that is copied or decided, not computed."""
        self.pieces.append((text, False))

    def compute(self, value: int, write: Callable[[int], str] = str) -> int:
        """A number that is computed here: it may come out wrong, and is what the next steps go on with."""
        wrong = self.rng.random() < self.mistakes
        if wrong:
            right = value
            while value == right:
                value = right + self.rng.choice((-1, 1)) * self.rng.choice((1, 2, 10, 10, 20, 90, 100))
                value = abs(value) if right >= 0 else value
        self.pieces.append((write(value), wrong))
        return value

    @property
    def text(self) -> str:
        """The whole solution."""
        return "".join(text for text, _ in self.pieces)

    @property
    def wrong(self) -> list[tuple[int, int]]:
        """Character spans of the numbers that are wrong."""
        spans, at = [], 0
        for text, bad in self.pieces:
            if bad:
                spans.append((at, at + len(text)))
            at += len(text)
        return spans


Problem = tuple[int, ...]
Way = Callable[[Chain, Problem], None]


class Task(Protocol):
    """Problems, their prompts, the ways to solve them, and the judge."""

    @property
    def name(self) -> str:
        """As it is called on the command line and in results."""
        ...

    @property
    def ways(self) -> Sequence[Way]:
        """The student's own first."""
        ...

    def draw(self, rng: random.Random) -> Problem:
        """A problem."""
        ...

    def prompt(self, problem: Problem) -> str:
        """What a model is asked."""
        ...

    def is_right(self, problem: Problem, answer: str) -> bool:
        """Whether a model's text ends in the right answer."""
        ...


def solve(task: Task, problem: Problem, way: int, rng: random.Random, mistakes: float = 0.0) -> Chain:
    """A solution of the problem in one way, by number."""
    chain = Chain(rng, mistakes)
    task.ways[way](chain, problem)
    return chain


def problem_of(task: Task, rng: random.Random, *, heldout: bool = False) -> Problem:
    """A problem to learn from, or one of the sixteenth of all that is only ever used to judge."""
    while True:
        problem = task.draw(rng)
        if (zlib.crc32(task.prompt(problem).encode()) % 16 == 0) == heldout:
            return problem


def final(answer: str) -> str | None:
    """What stands behind the only `#`; None where there is none, or another."""
    parts = answer.split("#")
    return parts[1].strip() if len(parts) == 2 else None


def _signed(x: int, first: bool = False) -> str:
    return str(x) if first else f"{x:+d}"


def _sum(chain: Chain, terms: Sequence[int], write: Callable[[int], str] = str) -> None:
    """From left to right, one addition or subtraction a step."""
    total = terms[0]
    for k, x in enumerate(terms[1:]):
        chain.say(("" if k == 0 else ";") + write(total) + ("+" if x >= 0 else "-") + write(abs(x)) + "=")
        total = chain.compute(total + x, write)
    chain.say(f"#{total}")


def _plain(chain: Chain, terms: Problem) -> None:
    _sum(chain, terms)


def _last_first(chain: Chain, terms: Problem) -> None:
    """The terms behind the first one, and then that."""
    a, b, c = terms
    if b < 0:
        _sum(chain, (c, b, a) if c >= 0 else (a, c, b))
    else:
        _sum(chain, (b, c, a))


def _outer_first(chain: Chain, terms: Problem) -> None:
    a, b, c = terms
    _sum(chain, (a, c, b))


def _in_words(chain: Chain, terms: Problem) -> None:
    total = terms[0]
    for k, x in enumerate(terms[1:]):
        chain.say(("" if k == 0 else ", ") + f"{total} {'and' if x >= 0 else 'less'} {abs(x)} makes ")
        total = chain.compute(total + x)
    chain.say(f"#{total}")


def _mirror(x: int) -> str:
    return ("-" if x < 0 else "") + str(abs(x))[::-1]


def _mirrored(chain: Chain, terms: Problem) -> None:
    """Numbers with their ones in front, where a sum begins."""
    _sum(chain, terms, _mirror)


def _spell(x: int) -> str:
    return ("minus " if x < 0 else "") + " ".join(_DIGITS[int(d)] for d in str(abs(x)))


def _spelled(chain: Chain, terms: Problem) -> None:
    _sum(chain, terms, _spell)


def _tens_and_ones(chain: Chain, terms: Problem) -> None:
    tens = [int(x / 10) * 10 for x in terms]
    ones = [x - t for x, t in zip(terms, tens, strict=True)]
    chain.say("".join(_signed(x, k == 0) for k, x in enumerate(tens)) + "=")
    t = chain.compute(sum(tens))
    chain.say(";" + "".join(_signed(x, k == 0) for k, x in enumerate(ones)) + "=")
    o = chain.compute(sum(ones))
    chain.say(f";{t}{_signed(o)}=")
    chain.say(f"#{chain.compute(t + o)}")


def _rounded(chain: Chain, terms: Problem) -> None:
    """Each further term as the next ten, and what that was too much."""
    total = terms[0]
    for k, x in enumerate(terms[1:]):
        sign = 1 if x >= 0 else -1
        up = -(-abs(x) // 10) * 10
        chain.say(("" if k == 0 else ";") + f"{total}{_signed(sign * up)}=")
        total = chain.compute(total + sign * up)
        over = sign * (abs(x) - up)
        chain.say(f"{_signed(over)}=")
        total = chain.compute(total + over)
    chain.say(f"#{total}")


_WAYS: tuple[Way, ...] = (
    _plain,
    _last_first,
    _in_words,
    _mirrored,
    _outer_first,
    _tens_and_ones,
    _rounded,
    _spelled,
)


def is_plain(answer: str, problem: Problem) -> bool:
    """Whether an answer is written in the student's own way, whatever was computed in it."""
    a, b, c = problem
    return re.fullmatch(rf"{a}{re.escape(_signed(b))}=(-?\d+);\1{re.escape(_signed(c))}=(-?\d+)#\2", answer) is not None


class Addition:
    """a + b + c with two digits each."""

    name = "addition"
    ways = _WAYS

    def draw(self, rng: random.Random) -> Problem:
        """Three numbers from 10 to 99."""
        return tuple(rng.randrange(10, 100) for _ in range(3))

    def prompt(self, problem: Problem) -> str:
        """The sum as it is written."""
        return "+".join(map(str, problem))

    def is_right(self, problem: Problem, answer: str) -> bool:
        """Whether the number behind `#` is the sum."""
        return final(answer) == str(sum(problem))


class ChainSum:
    """Sums and differences of three numbers, posed and judged by reasoning-gym's `chain_sum`."""

    name = "chain_sum"
    ways = _WAYS

    @cached_property
    def _judge(self) -> Any:
        import reasoning_gym

        return reasoning_gym.create_dataset(
            "chain_sum", min_terms=3, max_terms=3, min_digits=1, max_digits=2, size=20_000, seed=20260611
        )

    def draw(self, rng: random.Random) -> Problem:
        """One of 20,000 problems of the set."""
        expression: str = self._judge[rng.randrange(len(self._judge))]["metadata"]["expression"]
        words = expression.split()
        return (int(words[0]), *(int(sign + x) for sign, x in zip(words[1::2], words[2::2], strict=True)))

    def prompt(self, problem: Problem) -> str:
        """The expression, without spaces."""
        return "".join(_signed(x, k == 0) for k, x in enumerate(problem))

    def is_right(self, problem: Problem, answer: str) -> bool:
        """Whether the set's own judge gives full marks to what stands behind `#`."""
        found = final(answer)
        entry = {"answer": str(sum(problem)), "metadata": {}}
        return found is not None and float(self._judge.score_answer(found, entry)) == 1.0


TASKS: dict[str, Task] = {task.name: task for task in (Addition(), ChainSum())}

"""An alignment as columns: the one form in which chunks are shown, on a terminal, in a run's samples and on a page.

`view` makes HTML of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from xtokmap._core import XTokMapError

if TYPE_CHECKING:
    from xtokmap.alignment import Alignment

#: The kind of a column of tokens that are in no chunk.
UNALIGNED = "UNALIGNED"
SIDES = ("student", "teacher")


@dataclass(frozen=True)
class Token:
    r"""A token as it is shown.

    Attributes:
        text: its bytes as text, what is not UTF-8 as `\xNN`. A token without bytes has its name; else its id in
            brackets, or its position where there is no id.
        id: None where only offsets or a record are known.
        spelled: its bytes; None where it has none, or where they are not known.
        aligned: whether it belongs to a chunk. A token without bytes may lie between the tokens of one.
        logprob: nats; NaN where the model gave none, None where nobody asked.
        advantage: of a student's token, likewise.
    """

    text: str
    id: int | None = None
    spelled: bytes | None = None
    aligned: bool = True
    logprob: float | None = None
    advantage: float | None = None


@dataclass(frozen=True)
class Column:
    """A chunk, or the tokens that are in none between two chunks; a side may be empty.

    Attributes:
        kind: the name of a `Kind`, or `UNALIGNED`.
        student: the student's tokens, in order.
        teacher: the teacher's.
        chunk: the number of the chunk; None for `UNALIGNED`, and from a record.
        gap: L_S - L_T in nats; None where a side has no tokens or no logprobs.
    """

    kind: str
    student: list[Token]
    teacher: list[Token]
    chunk: int | None = None
    gap: float | None = None

    def record(self) -> dict[str, Any]:
        """What JSON keeps of it: kind, gap, and text and logprob of every token."""
        sides = ([[token.text, _rounded(token.logprob)] for token in side] for side in self.sides)
        return {"kind": self.kind, **dict(zip(SIDES, sides, strict=True)), "gap": _rounded(self.gap)}

    @classmethod
    def of(cls, record: Any) -> Column:
        """The column of a `record`.

        Raises:
            XTokMapError: it is none.
        """
        try:
            student, teacher = (
                [Token(_checked(text, str), logprob=_missing(x)) for text, x in _checked(record[side], list)]
                for side in SIDES
            )
            kind, gap = _checked(record["kind"], str), _rounded(_checked(record["gap"], int | float | None))
            return cls(kind, student, teacher, gap=gap)
        except (ValueError, TypeError, LookupError) as error:
            raise XTokMapError(f"not a column of tokens: {error!r}") from None

    @property
    def sides(self) -> tuple[list[Token], list[Token]]:
        """Student and teacher."""
        return self.student, self.teacher

    @property
    def texts(self) -> tuple[str, str]:
        """Each side as a line of text, `|` between its tokens."""
        student, teacher = ("|".join(visible(token.text) for token in side) for side in self.sides)
        return student, teacher


#: What a tokenizer calls an id.
Name = Callable[[int], str]


def columns(
    alignment: Alignment,
    names: tuple[Name, Name] | None = None,
    logprobs: tuple[Sequence[float], Sequence[float]] | None = None,
    advantages: Sequence[float] | None = None,
    *,
    first: int | None = None,
) -> list[Column]:
    """All tokens of both sides, in order: a column for each chunk, and one for what lies unaligned between two.

    Args:
        alignment: of one row.
        names: of the student's and of the teacher's tokens without bytes.
        logprobs: of the student's and of the teacher's tokens.
        advantages: of the student's tokens.
        first: how many chunks are looked at; None: all.

    Raises:
        XTokMapError: logprobs or advantages that are not one for each token.
    """
    own, theirs = logprobs or (None, None)
    cut = first is not None and first < len(alignment)
    ends = [int(ptr[first]) if cut else None for ptr in (alignment.student_ptr, alignment.teacher_ptr)]
    sides = [
        _tokens(alignment, k, ends[k], names and names[k], logprob, advantage)
        for k, (logprob, advantage) in enumerate(((own, advantages), (theirs, None)))
    ]
    found: list[Column] = []
    done = [0, 0]

    def add(kind: str, starts: Sequence[int], stops: Sequence[int], chunk: int | None = None) -> None:
        student, teacher = (side[a:b] for side, a, b in zip(sides, starts, stops, strict=True))
        if student or teacher:
            gap = None if chunk is None else _gap(student, teacher)
            found.append(Column(kind, student, teacher, chunk, gap))

    for g, chunk in enumerate(islice(alignment, first)):
        # An empty side of a chunk stands where the one before it ended.
        spans = [span or range(at, at) for span, at in zip((chunk.student, chunk.teacher), done, strict=True)]
        starts, stops = [span.start for span in spans], [span.stop for span in spans]
        add(UNALIGNED, done, starts)
        add(chunk.kind.name, starts, stops, g)
        done = stops
    add(UNALIGNED, done, [len(side) for side in sides])
    return found


def visible(text: str) -> str:
    """One line of text in which spaces and line ends can be seen."""
    shown = {" ": "·", "\n": "⏎", "\t": "→"}
    return "".join(shown.get(c, c if c.isprintable() else f"\\u{{{ord(c):x}}}") for c in text)


def _tokens(
    alignment: Alignment,
    side: int,
    end: int | None,
    name: Name | None,
    logprobs: Sequence[float] | None,
    advantages: Sequence[float] | None,
) -> list[Token]:
    chunks = (alignment.student_chunk, alignment.teacher_chunk)[side]
    given = [
        [None] * len(chunks) if figures is None else _figures(figures, len(chunks), f"{SIDES[side]} {what}")
        for what, figures in (("logprobs", logprobs), ("advantages", advantages))
    ]
    known = alignment._bytes
    rows = list(zip((chunks[:end] >= 0).tolist(), *given, strict=False))  # as many as are looked at
    if known is None:
        return [Token(f"#{at}", None, None, *row) for at, row in enumerate(rows)]
    table, ids = ((known.student, known.student_ids), (known.teacher, known.teacher_ids))[side]
    found = []
    for i, row in zip(ids[:end].tolist(), rows, strict=True):
        spelled = table[i]
        if spelled is not None:
            text = spelled.decode(errors="backslashreplace")
        else:
            text = f"[{i}]" if name is None else str(name(i))
        found.append(Token(text, i, spelled, *row))
    return found


def _figures(figures: Sequence[float], tokens: int, what: str) -> list[float]:
    found = [float(x) for x in figures]
    if len(found) != tokens:
        raise XTokMapError(f"{what}: {len(found)} for {tokens} tokens; give one for each")
    return found


def _gap(student: list[Token], teacher: list[Token]) -> float | None:
    own, theirs = (
        [math.nan if t.logprob is None else t.logprob for t in side if t.aligned] for side in (student, teacher)
    )
    gap = sum(own) - sum(theirs) if own and theirs else math.nan
    return gap if math.isfinite(gap) else None


def _rounded(x: float | None) -> float | None:
    return round(x, 4) if x is not None and math.isfinite(x) else None


def _missing(x: Any) -> float:
    """A logprob of a record: JSON has null for NaN."""
    return math.nan if x is None else float(_checked(x, int | float))


def _checked(x: Any, kind: Any) -> Any:
    if not isinstance(x, kind):
        raise TypeError(f"unexpected {x!r}")
    return x

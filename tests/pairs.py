"""Alignments of real tokenizers, measured token by token against an oracle that knows which byte became which.

    python tests/pairs.py                    prints what is not exact, pair by pair
    python tests/pairs.py --write-golden     rewrites tests/golden/*.txt

The oracle is told how each teacher changes a text (`TEACHER_CHANGES`), and how each student's decoder spells bytes that
are not UTF-8. From that it makes pieces of both sides' bytes that correspond, checks that they lay end to end are both
sides' bytes, and cuts wherever tokens end on both sides at the same place.
"""

from __future__ import annotations

import argparse
import random
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise, permutations
from operator import eq
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pytest

import corpus
import real_tokenizers as real
import xtokmap
from xtokmap import Kind
from xtokmap.tokenizers import text_codec
from xtokmap.tokenizers.base import TextCodec

GOLDEN = Path(__file__).parent / "golden"

#: Parts of a text that correspond, as (student bytes, teacher bytes).
Pieces: TypeAlias = list[tuple[bytes, bytes]]

# ---- tokenizers --------------------------------------------------------------------------------------------------


def _tokenizers_file(name: str) -> Any:
    return pytest.importorskip("tokenizers").Tokenizer.from_file(str(real.path(name)))


def _sentencepiece(name: str) -> Any:
    return pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(real.path(name)))


def _tekken(file: str) -> Any:
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    return tekken.Tekkenizer.from_file(real.path("tekken").with_name(file))


LOADERS: dict[str, Callable[[], Any]] = {
    "deepseek": lambda: _tokenizers_file("deepseek"),
    "anthropic": lambda: _tokenizers_file("anthropic"),
    "mistral-v1": lambda: _sentencepiece("mistral-v1"),
    "mistral-v3": lambda: _sentencepiece("mistral-v3"),
    "tekken-240718": lambda: _tekken("tekken_240718.json"),
    "tekken-240911": lambda: _tekken("tekken_240911.json"),
    "qwen": lambda: real.encoding("qwen"),
    "qwen3.6": lambda: real.encoding("qwen3.6"),
    "cl100k": lambda: real.encoding("cl100k"),
    "o200k": lambda: real.encoding("o200k"),
}
PAIRS = list(permutations(LOADERS, 2))


class Tokenizer(NamedTuple):
    table: xtokmap.ByteTable
    codec: TextCodec


@cache
def tokenizer(name: str) -> Tokenizer:
    """Table and codec; skips where the package is not installed."""
    loaded = LOADERS[name]()
    return Tokenizer(xtokmap.byte_table(loaded), text_codec(loaded))


@cache
def aligner(student: str, teacher: str) -> xtokmap.Aligner:
    """As `Aligner(student tokenizer, teacher tokenizer)`, with tables and codecs that are made once."""
    al = xtokmap.Aligner(tokenizer(student).table, tokenizer(teacher).table)
    al._teacher_codec = tokenizer(teacher).codec
    return al


# ---- student ids -------------------------------------------------------------------------------------------------

#: No tokenizer would make these of a text: drawn from all ordinary tokens, and from those that are no whole characters.
RANDOM, BROKEN = "random ids", "broken characters"
KINDS = [*corpus.KINDS, RANDOM, BROKEN]
RANDOM_ROWS, RANDOM_TOKENS = 4, 100


@cache
def student_rows(name: str) -> list[tuple[str, list[int]]]:
    """(kind of text, ids) of one tokenizer, all ended by its own end of turn."""
    table, codec = tokenizer(name)
    rows = []
    for kind, text in corpus.KINDS.items():
        ids, _ = codec.encode_batch([text])
        rows.append((kind, ids.tolist()))
    rng = random.Random(f"xtokmap {name}")
    ordinary = [i for i, special in enumerate(table.is_special.tolist()) if not special]
    broken = [i for i in ordinary if not is_text(table[i])]
    for kind, among in ((RANDOM, ordinary), (BROKEN, broken)):
        rows += [(kind, rng.choices(among, k=RANDOM_TOKENS)) for _ in range(RANDOM_ROWS)]
    return [(kind, [*ids, *table.stop_ids[:1]]) for kind, ids in rows]


def is_text(token: bytes | None) -> bool:
    """Whether a token's bytes are whole characters."""
    try:
        (token or b"").decode()
    except UnicodeDecodeError:
        return False
    return True


# ---- what becomes of the bytes -----------------------------------------------------------------------------------


def decoded(data: bytes, invalid: str) -> list[tuple[bytes, str]]:
    """The student's bytes and what its decoder spells for them, character by character."""
    parts: list[tuple[bytes, str]] = []
    while data:
        size, char = 1, "\ufffd"
        for length in range(1, 5):
            try:
                size, char = length, data[:length].decode()
                break
            except UnicodeDecodeError:
                continue
        else:
            if invalid == "maximal":
                # One U+FFFD for as many bytes as could have begun a character.
                size = next(n for n in (3, 2, 1) if n == 1 or (len(data) >= n and _begins_character(data[:n])))
        parts.append((data[:size], char))
        data = data[size:]
    return parts


def _begins_character(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


@cache
def _unchanged(text: str) -> list[tuple[str, str]]:
    return [(char, char) for char in text]


#: Younger than the Unicode of the normalizer in `tokenizers`, which leaves it alone.
_YOUNGER = "\u32ff"


def _normal_form(text: str) -> str:
    return _YOUNGER.join(unicodedata.normalize("NFKC", part) for part in text.split(_YOUNGER))


@cache
def _nfkc(text: str) -> list[tuple[str, str]]:
    """The text in the smallest segments whose normal forms, laid end to end, are that of the text."""
    whole = _normal_form(text)
    if whole == text:
        return _unchanged(text)
    cuts = [k for k in range(len(text) + 1) if _normal_form(text[:k]) + _normal_form(text[k:]) == whole]
    segments = [text[start:stop] for start, stop in pairwise(cuts)]
    return [(segment, _normal_form(segment)) for segment in segments]


@cache
def _sentencepiece_space(text: str) -> list[tuple[str, str]]:
    """A space before the text; its own character for a space is one in a text, too."""
    return [("", " ")] * bool(text) + [(char, char.replace("\u2581", " ")) for char in text]


#: What a teacher makes of a text, in parts that correspond.
TEACHER_CHANGES: dict[str, Callable[[str], list[tuple[str, str]]]] = {
    "anthropic": _nfkc,
    "mistral-v1": _sentencepiece_space,
    "mistral-v3": _sentencepiece_space,
}


def pieces_of(student_bytes: bytes, invalid: str, teacher: str) -> Pieces:
    """Student bytes -> characters -> what the teacher spells: the smallest parts that correspond through both."""
    characters = decoded(student_bytes, invalid)
    text = "".join(char for _, char in characters)
    pieces, at = [], 0
    for before, after in TEACHER_CHANGES.get(teacher, _unchanged)(text):
        own = b"".join(data for data, _ in characters[at : at + len(before)])
        pieces.append((own, after.encode()))
        at += len(before)
    return pieces


def alternatives(pieces: Pieces) -> Iterator[Pieces]:
    """Other pieces that are as right: an inserted space may be any one of a run of spaces."""
    if pieces[:1] != [(b"", b" ")]:
        return
    for k, (_, after) in enumerate(pieces[1:], 1):
        if after != b" ":
            return
        yield [*pieces[1 : k + 1], pieces[0], *pieces[k + 1 :]]


# ---- chunks of the oracle ----------------------------------------------------------------------------------------

#: Positions of the student's tokens, of the teacher's tokens, and what is known of the kind.
OracleChunk: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], Kind]
Place: TypeAlias = tuple[int, int]


def places_of(pieces: Pieces) -> dict[Place, bool]:
    """The places of the text, as (student byte, teacher byte) -> whether a piece that differs ends there."""
    places: dict[Place, bool] = {(0, 0): False}
    x = y = 0
    for own, other in pieces:
        if own == other:
            places.update(((x + k, y + k), False) for k in range(1, len(own) + 1))
        x, y = x + len(own), y + len(other)
        if own != other:
            places[x, y] = True
    return places


def chunks(student: Sequence[bytes | None], teacher: Sequence[bytes | None], pieces: Pieces) -> list[OracleChunk]:
    """Cut at the places where tokens end on both sides. A token without bytes is the end of the row."""
    places = places_of(pieces)
    ends, other_ends = _ends(student), _ends(teacher)
    found: list[OracleChunk] = []
    i = j = 0
    differs = False
    for (x, y), changed in places.items():
        differs |= changed
        # (0, 0) has no tokens before it; a token that ends at x may be followed by an insertion on the other side.
        if x not in {0, *ends} or y not in {0, *other_ends} or (x, y) == (0, 0):
            continue
        s = tuple(k for k in range(i, len(student)) if student[k] and ends[k] <= x)
        t = tuple(k for k in range(j, len(teacher)) if teacher[k] and other_ends[k] <= y)
        kind = Kind.REWRITTEN if differs else _kind(len(s), len(t))
        found.append((s, t, kind))
        i, j, differs = i + len(s), j + len(t), False
    if None in student and None in teacher:
        found.append(((student.index(None),), (teacher.index(None),), Kind.STOP))
    return found


def _ends(tokens: Sequence[bytes | None]) -> list[int]:
    ends, at = [], 0
    for token in tokens:
        at += len(token or b"")
        ends.append(at)
    return ends


def _kind(students: int, teachers: int) -> Kind:
    if students == 1:
        return Kind.ONE_TO_ONE if teachers == 1 else Kind.ONE_TO_MANY
    return Kind.MANY_TO_ONE if teachers == 1 else Kind.MANY_TO_MANY


def chunk_of_each(found: Sequence[OracleChunk], tokens: int) -> list[OracleChunk | None]:
    """For every student token its chunk, None where it has none."""
    of: list[OracleChunk | None] = [None] * tokens
    for chunk in found:
        for k in chunk[0]:
            of[k] = chunk
    return of


# ---- measuring ---------------------------------------------------------------------------------------------------


@dataclass
class Score:
    """Counts of student tokens.

    A token is exact if its chunk has the kind and all the tokens of the oracle's chunk, right if that is so for an
    equally right alternative, wrong if a chunk says it spells the teacher's bytes at another place, misplaced if a
    REWRITTEN chunk begins or ends where no place of the text is. What is left is coarse: the chunk is right, and larger
    than it needs to be.
    """

    tokens: int = 0
    exact: int = 0
    right: int = 0
    wrong: int = 0
    misplaced: int = 0
    in_kind: Counter[Kind] = field(default_factory=Counter)
    scored: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def share(self) -> float:
        """Share that is exact or equally right; 1 for no tokens."""
        return (self.exact + self.right) / self.tokens if self.tokens else 1.0


@dataclass
class Row:
    """One text of one pair, measured."""

    student: str
    teacher: str
    kind: str
    student_ids: list[int]
    teacher_ids: list[int]
    agrees: bool
    score: Score
    #: Tokens that are not exact and not equally right, with what was found and what was expected.
    off: list[tuple[int, OracleChunk | None, OracleChunk | None]]


def tokens_of(table: xtokmap.ByteTable, ids: Sequence[int]) -> list[bytes | None]:
    return [table[i] for i in ids]


def spell(tokens: Sequence[bytes | None]) -> bytes:
    return b"".join(token or b"" for token in tokens)


def found_chunks(alignment: xtokmap.Alignment) -> list[OracleChunk]:
    """The chunks of an alignment, from what it says of every token."""
    sides: list[list[list[int]]] = [[[] for _ in alignment.kind] for _ in range(2)]
    for side, chunk in zip(sides, (alignment.student_chunk, alignment.teacher_chunk), strict=True):
        for k, g in enumerate(chunk.tolist()):
            if g >= 0:
                side[g].append(k)
    return [(tuple(s), tuple(t), Kind(kind)) for s, t, kind in zip(*sides, alignment.kind.tolist(), strict=True)]


@cache
def measure(student: str, teacher: str) -> list[Row]:
    """Every kind of text of one ordered pair."""
    return measure_rows(student, teacher, student_rows(student))


def measure_rows(student: str, teacher: str, rows: list[tuple[str, list[int]]]) -> list[Row]:
    """(kind of text, student ids) as the teacher reads them."""
    teacher_ids, batch = aligner(student, teacher).retokenize([ids for _, ids in rows])
    return [
        measure_row(student, teacher, kind, ids, other.tolist(), alignment)
        for (kind, ids), other, alignment in zip(rows, teacher_ids, batch, strict=True)
    ]


@cache
def measure_edges(student: str, teacher: str) -> list[Row]:
    """One row for each of `corpus.EDGES`."""
    codec = tokenizer(student).codec
    rows = [(ascii(text), codec.encode_batch([text])[0].tolist()) for text in corpus.EDGES]
    return measure_rows(student, teacher, rows)


def measure_row(
    student: str, teacher: str, kind: str, ids: list[int], teacher_ids: list[int], alignment: xtokmap.Alignment
) -> Row:
    table = tokenizer(student).table
    own, other = tokens_of(table, ids), tokens_of(tokenizer(teacher).table, teacher_ids)
    pieces = pieces_of(spell(own), table.invalid, teacher)
    assert b"".join(piece for piece, _ in pieces) == spell(own), (student, kind)
    assert b"".join(piece for _, piece in pieces) == spell(other), (student, teacher, kind)

    found = found_chunks(alignment)
    of = chunk_of_each(found, len(own))
    expected = chunk_of_each(chunks(own, other, pieces), len(own))
    best, best_pieces = expected, pieces
    for others in alternatives(pieces):
        candidate = chunk_of_each(chunks(own, other, others), len(own))
        if sum(map(eq, of, candidate)) > sum(map(eq, of, best)):
            best, best_pieces = candidate, others

    score = Score(tokens=len(own), scored=int(alignment.scored.sum()), exact=sum(map(eq, of, expected)))
    off = [(k, of[k], best[k]) for k in range(len(own)) if of[k] not in (expected[k], best[k])]
    score.right = len(own) - score.exact - len(off)
    _judge(score, found, own, other, places_of(best_pieces))
    return Row(student, teacher, kind, ids, teacher_ids, spell(own) == spell(other), score, off)


def _judge(
    score: Score,
    found: list[OracleChunk],
    own: list[bytes | None],
    other: list[bytes | None],
    places: dict[Place, bool],
) -> None:
    x = y = 0
    for s, t, kind in found:
        score.in_kind[kind] += len(s)
        if kind == Kind.STOP:
            continue
        bytes_s, bytes_t = spell([own[k] for k in s]), spell([other[k] for k in t])
        borders = (x, y) in places and (x + len(bytes_s), y + len(bytes_t)) in places
        if kind == Kind.REWRITTEN:
            score.misplaced += len(s) * (not borders)
        else:
            score.wrong += len(s) * (not borders or bytes_s != bytes_t)
        x, y = x + len(bytes_s), y + len(bytes_t)


def total(rows: Sequence[Row]) -> Score:
    return sum((row.score for row in rows), Score())


# ---- golden files ------------------------------------------------------------------------------------------------

GOLDEN_PAIRS = [
    ("deepseek", "mistral-v3"),
    ("mistral-v1", "cl100k"),
    ("qwen", "anthropic"),
    ("tekken-240911", "o200k"),
]
GOLDEN_TEXTS = {
    "small": "The keeper didn't underline it: 12345 waves, 3.5 knots.",
    "mixed": 'def größe(x):\n    return x ** 2  # 東京→🗼 ½ ﬁ\n<|im_end|> "naïve" e\u0301 \u00a0 </s>\n',
    "utf8": "ꙮ 🫎𓀀 龘𠮷 ሰላም 🧑🏾‍🤝‍🧑🏼 ᚠᛇᚻ plain ꧁༒꧂ Ἀθῆναι",
}


def golden_name(student: str, teacher: str, text: str) -> str:
    return f"{student}--{teacher}--{text}.txt"


def golden(student: str, teacher: str, text: str) -> str:
    """An alignment as text: one chunk a line, with its kind and the tokens of both sides.

    Of the tokens of `utf8` that are no whole characters every second one is left out, as a model may sample.
    """
    table, codec = tokenizer(student)
    ids = codec.encode_batch([GOLDEN_TEXTS[text]])[0].tolist()
    if text == "utf8":
        broken = [k for k, token in enumerate(tokens_of(table, ids)) if not is_text(token)]
        ids = [i for k, i in enumerate(ids) if k not in broken[1::2]]
    ids += table.stop_ids[:1]
    (teacher_ids,), batch = aligner(student, teacher).retokenize([ids])
    own, other = tokens_of(table, ids), tokens_of(tokenizer(teacher).table, teacher_ids.tolist())
    lines = [f"# student {student}, teacher {teacher}: kind, student tokens | teacher tokens"]
    found = found_chunks(batch[0])
    aligned = {k for s, _, _ in found for k in s}, {k for _, t, _ in found for k in t}
    for s, t, kind in found:
        lines.append(f"{kind.name:<12} {_shown(own, s)} | {_shown(other, t)}".rstrip())
    for side, tokens, seen in zip(("student", "teacher"), (own, other), aligned, strict=True):
        lines += [f"unaligned {side} token {k}: {escaped(token)}" for k, token in enumerate(tokens) if k not in seen]
    return "\n".join(lines) + "\n"


def _shown(tokens: Sequence[bytes | None], positions: Sequence[int]) -> str:
    return " ".join(escaped(tokens[k]) for k in positions)


def escaped(token: bytes | None) -> str:
    """A token in quotes; what is invisible, combines or is not UTF-8 is escaped."""
    if token is None:
        return "<no bytes>"
    shown = ""
    for part, char in decoded(token, "each"):
        if char == "\ufffd" and part != char.encode():
            shown += f"\\x{part[0]:02x}"
        elif char in "\\'" or not char.isprintable() or unicodedata.category(char)[0] in "MC":
            shown += char.encode("unicode_escape").decode() if char not in "\\'" else f"\\{char}"
        else:
            shown += char
    return f"'{shown}'"


def write_golden() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.glob("*--*--*.txt"):
        old.unlink()
    for student, teacher in GOLDEN_PAIRS:
        for text in GOLDEN_TEXTS:
            (GOLDEN / golden_name(student, teacher, text)).write_text(golden(student, teacher, text), encoding="utf-8")


# ---- command line ------------------------------------------------------------------------------------------------


def described(row: Row) -> Iterator[str]:
    """What is not exact in a row, with the tokens concerned."""
    own = tokens_of(tokenizer(row.student).table, row.student_ids)
    other = tokens_of(tokenizer(row.teacher).table, row.teacher_ids)
    told = set()
    for k, found, wanted in row.off:
        if (found, wanted) in told:
            continue
        told.add((found, wanted))
        yield f"{row.student} -> {row.teacher}, {row.kind}, student token {k}:"
        for name, chunk in (("found", found), ("expected", wanted)):
            says = f"{chunk[2].name} {_shown(own, chunk[0])} | {_shown(other, chunk[1])}" if chunk else "unaligned"
            yield f"    {name:<9}{says}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-golden", action="store_true", help="rewrite tests/golden/*.txt")
    parser.add_argument("--student", choices=LOADERS, help="only this student")
    parser.add_argument("--teacher", choices=LOADERS, help="only this teacher")
    args = parser.parse_args()
    if args.write_golden:
        write_golden()
        return
    for student, teacher in PAIRS:
        if args.student in (None, student) and args.teacher in (None, teacher):
            rows = measure(student, teacher)
            score = total(rows)
            print(
                f"{student} -> {teacher}: {score.tokens} tokens, {score.share:.4%} exact, {score.right} of them "
                f"equally right, {score.wrong} wrong, {score.misplaced} misplaced",
                flush=True,
            )
            for row in rows:
                print(*described(row), sep="\n", end="\n" if row.off else "")


if __name__ == "__main__":
    sys.exit(main())

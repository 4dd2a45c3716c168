"""Brute-force oracles, and the random tokens and texts that they are asked about.

Tokens are written as bytes, `SPECIAL` (no bytes), `STOP` (no bytes, ends a turn) or `Mark` (no bytes, of a marker).
Everything is found by looking at every byte: slow, and plain enough to be believed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise, product
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import tokenizers
from hypothesis import strategies as st

import xtokmap
from xtokmap import Kind

SPECIAL = None
STOP = "stop"


class Mark(NamedTuple):
    """A token of a marker: its role (a name of `_core.ROLES`), and whether it is the first."""

    role: str
    first: bool


Token: TypeAlias = bytes | str | Mark | None
Tokens: TypeAlias = list[Token]
Floats: TypeAlias = npt.NDArray[np.float64]
#: A text on both sides, in pieces that correspond: equal ones, and ones that are spelled differently.
Pieces: TypeAlias = list[tuple[bytes, bytes]]

FIELDS = {
    "student_ptr": np.int32,
    "teacher_ptr": np.int32,
    "kind": np.uint8,
    "student_chunk": np.int32,
    "teacher_chunk": np.int32,
    "student_end": np.int32,
    "teacher_end": np.int32,
    "teacher_pos": np.int32,
    "teacher_off": np.int32,
}


def spelled(token: Token) -> bytes:
    return token if isinstance(token, bytes) else b""


def spell(tokens: Iterable[Token]) -> bytes:
    return b"".join(map(spelled, tokens))


def byte_ends(tokens: Tokens) -> list[int]:
    return [len(spell(tokens[: i + 1])) for i in range(len(tokens))]


# ---- chunks ------------------------------------------------------------------------------------------------------


@dataclass
class Chunk:
    """Token positions of both sides."""

    student: list[int]
    teacher: list[int]
    kind: Kind
    #: Where each side stands before the chunk: the first token, at or after that byte, that has bytes.
    start: tuple[int, int]


def turn_ends(tokens: Tokens) -> list[range]:
    """The runs of tokens without bytes, markers apart, in which there is a stop."""
    runs: list[range] = []
    for i, token in enumerate(tokens):
        if not spelled(token) and not isinstance(token, Mark):
            joins = bool(runs) and runs[-1].stop == i
            runs[-1:] = [range(runs[-1].start, i + 1)] if joins else [*runs[-1:], range(i, i + 1)]
    return [run for run in runs if STOP in tokens[run.start : run.stop]]


def markers(tokens: Tokens, start: int, stop: int) -> list[tuple[str, range]]:
    """The markers among some of the tokens."""
    found: list[tuple[str, range]] = []
    for i in range(start, stop):
        token = tokens[i]
        if isinstance(token, Mark):
            first = i if token.first else found.pop()[1].start
            found.append((token.role, range(first, i + 1)))
    return found


def common(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int]]:
    """A longest common subsequence, as early as can be; where either side could wait, the role of more number does."""
    roles = xtokmap._core.ROLES

    @cache
    def length(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        return 1 + length(i + 1, j + 1) if a[i] == b[j] else max(length(i + 1, j), length(i, j + 1))

    i, j, found = 0, 0, []
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            found.append((i, j))
            i, j = i + 1, j + 1
        elif (length(i + 1, j), roles.index(a[i])) > (length(i, j + 1), roles.index(b[j])):
            i += 1
        else:
            j += 1
    return found


def cuts(student: Tokens, teacher: Tokens) -> list[tuple[Kind, range, range, range, range]]:
    """What corresponds by its role: its kind, its tokens, and the tokens that lie between what is before and after."""
    ends, others = turn_ends(student), turn_ends(teacher)
    if len(ends) != len(others):
        ends = others = []
    found = []
    x = y = 0
    for end, other in zip([*ends, None], [*others, None], strict=True):
        to_x, to_y = (end.start, other.start) if end and other else (len(student), len(teacher))
        own, its = markers(student, x, to_x), markers(teacher, y, to_y)
        for i, j in common([role for role, _ in own], [role for role, _ in its]):
            found.append((Kind.MARKER, *[own[i][1], its[j][1]] * 2))
        if end and other:
            stops = student.index(STOP, to_x), teacher.index(STOP, to_y)
            found.append((Kind.STOP, *(range(stop, stop + 1) for stop in stops), end, other))
            x, y = end.stop, other.stop
    return found


def chunks(student: Tokens, teacher: Tokens, pieces: Pieces | None = None) -> list[Chunk]:
    """Both sides turn by turn where they have as many, and between markers that correspond; else as one text.

    `pieces` say which parts of the whole texts correspond; then turns must end at the same places. Without them, in
    every stretch, one side's bytes must be the beginning of the other's.
    """
    if pieces is not None:
        return chunks_of_stretch(student, teacher, pieces)
    found: list[Chunk] = []
    x = y = 0
    for cut in [*cuts(student, teacher), None]:
        to_x, to_y = (cut[3].start, cut[4].start) if cut else (len(student), len(teacher))
        for chunk in chunks_of_stretch(student[x:to_x], teacher[y:to_y]):
            s, t = [x + i for i in chunk.student], [y + j for j in chunk.teacher]
            found.append(Chunk(s, t, chunk.kind, (x + chunk.start[0], y + chunk.start[1])))
        if cut:
            # What is left before it corresponds, whatever it is.
            seen_x = [i + 1 for chunk in found for i in chunk.student]
            seen_y = [j + 1 for chunk in found for j in chunk.teacher]
            s = [i for i in range(max([x, *seen_x]), to_x) if spelled(student[i])]
            t = [j for j in range(max([y, *seen_y]), to_y) if spelled(teacher[j])]
            if s or t:
                found.append(Chunk(s, t, Kind.REWRITTEN, ([*s, to_x][0], [*t, to_y][0])))
            found.append(Chunk(list(cut[1]), list(cut[2]), cut[0], (cut[1].start, cut[2].start)))
            x, y = cut[3].stop, cut[4].stop
    return found


def chunks_of_stretch(student: Tokens, teacher: Tokens, pieces: Pieces | None = None) -> list[Chunk]:
    """Cut wherever a token ends on both sides at the same place of the text.

    Inside a piece that differs there is no such place; inside an equal one every byte is.
    """
    if pieces is None:
        common = min(spell(student), spell(teacher), key=len)
        assert spell(student).startswith(common)
        assert spell(teacher).startswith(common)
        pieces = [(common, common)]
    places, changed = [(0, 0)], []
    for s, t in pieces:
        x, y = places[-1]
        if s == t:
            places += [(x + k, y + k) for k in range(1, len(s) + 1)]
        else:
            places.append((x + len(s), y + len(t)))
            changed.append(places[-1])
    student_ends, teacher_ends = byte_ends(student), byte_ends(teacher)
    cuts = [(x, y) for x, y in places if x in [0, *student_ends] and y in [0, *teacher_ends]]

    def tokens_between(tokens: Tokens, ends: list[int], start: int, stop: int) -> list[int]:
        return [i for i, token in enumerate(tokens) if spelled(token) and start < ends[i] <= stop]

    def stops_at(tokens: Tokens, ends: list[int], place: int) -> list[int]:
        return [i for i, token in enumerate(tokens) if token == STOP and ends[i] == place]

    def first_from(tokens: Tokens, ends: list[int], place: int) -> int:
        return next(i for i, token in enumerate(tokens) if spelled(token) and ends[i] > place)

    found = []
    for before, at in zip([None, *cuts], cuts, strict=False):
        if before is not None:
            s = tokens_between(student, student_ends, before[0], at[0])
            t = tokens_between(teacher, teacher_ends, before[1], at[1])
            start = (first_from(student, student_ends, before[0]), first_from(teacher, teacher_ends, before[1]))
            rewritten = any(before < place <= at for place in changed)
            found.append(Chunk(s, t, Kind.REWRITTEN if rewritten else kind_of(len(s), len(t)), start))
        s, t = stops_at(student, student_ends, at[0]), stops_at(teacher, teacher_ends, at[1])
        if s and t:
            found.append(Chunk(s[:1], t[:1], Kind.STOP, (s[0], t[0])))
    return found


def kind_of(students: int, teachers: int) -> Kind:
    return {
        (True, True): Kind.ONE_TO_ONE,
        (True, False): Kind.ONE_TO_MANY,
        (False, True): Kind.MANY_TO_ONE,
        (False, False): Kind.MANY_TO_MANY,
    }[students == 1, teachers == 1]


def expected(
    student: Tokens, teacher: Tokens, pieces: Pieces | None = None, pairs: Iterable[str] = ()
) -> dict[str, list[int]]:
    """Every field of the `Alignment`; of the roles in `pairs` the first tokens of two markers are the same event."""
    found = chunks(student, teacher, pieces)
    student_chunk, teacher_chunk = [-1] * len(student), [-1] * len(teacher)
    teacher_pos, teacher_off = [-1] * len(student), [-1] * len(student)
    student_ends, teacher_ends = byte_ends(student), byte_ends(teacher)
    for g, chunk in enumerate(found):
        for i in chunk.student:
            student_chunk[i] = g
        for j in chunk.teacher:
            teacher_chunk[j] = g
        if chunk.kind in (Kind.STOP, Kind.MARKER, Kind.REWRITTEN):
            first = student[chunk.student[0]] if chunk.student else None
            known = chunk.kind != Kind.MARKER or (isinstance(first, Mark) and first.role in pairs)
            if chunk.student and chunk.teacher and known:
                teacher_pos[chunk.student[0]], teacher_off[chunk.student[0]] = chunk.teacher[0], 0
            continue
        # Byte k of the chunk lies in these tokens, at these bytes of them.
        in_student = [(i, b) for i in chunk.student for b in range(len(spelled(student[i])))]
        in_teacher = [(j, b) for j in chunk.teacher for b in range(len(spelled(teacher[j])))]
        for (i, b), (j, c) in zip(in_student, in_teacher, strict=True):
            if b == 0:
                teacher_pos[i], teacher_off[i] = j, c

    def ptr(side: int) -> list[int]:
        stop = 0
        for chunk in found:
            tokens = (chunk.student, chunk.teacher)[side]
            stop = tokens[-1] + 1 if tokens else chunk.start[side]
        return [*(chunk.start[side] for chunk in found), stop]

    return {
        "student_ptr": ptr(0),
        "teacher_ptr": ptr(1),
        "kind": [int(chunk.kind) for chunk in found],
        "student_chunk": student_chunk,
        "teacher_chunk": teacher_chunk,
        "student_end": student_ends,
        "teacher_end": teacher_ends,
        "teacher_pos": teacher_pos,
        "teacher_off": teacher_off,
    }


def fields(alignment: xtokmap.Alignment) -> dict[str, list[int]]:
    """The fields of an alignment in the oracle's form; their dtypes are checked."""
    for name, dtype in FIELDS.items():
        assert getattr(alignment, name).dtype == dtype, name
        assert getattr(alignment, name).ndim == 1, name
    return {name: getattr(alignment, name).tolist() for name in FIELDS}


def byte_runs(tokens: Iterable[tuple[bytes, bool]]) -> Pieces:
    """What Hugging Face's ByteFallback makes of tokens (bytes, whether it is a byte piece), in pieces that correspond.

    A run of byte pieces that is not UTF-8 as a whole becomes one U+FFFD for each byte, whatever a part of it would be.
    """
    pieces: Pieces = []
    for of_bytes, run in groupby(tokens, key=lambda token: token[1]):
        data = b"".join(spelled for spelled, _ in run)
        try:
            pieces += [(char.encode(), char.encode()) for char in data.decode()]
        except UnicodeDecodeError:
            assert of_bytes, "an ordinary token is text"
            pieces += [(data[k : k + 1], "\ufffd".encode()) for k in range(len(data))]
    return pieces


# ---- spans -------------------------------------------------------------------------------------------------------


def shared_bytes(student: Tokens, teacher: Tokens, found: list[Chunk]) -> Counter[tuple[int, int]]:
    """(student token, teacher token) -> bytes that lie in both; the two of a STOP chunk share 0."""
    shared: Counter[tuple[int, int]] = Counter()
    for chunk in found:
        if chunk.kind in (Kind.STOP, Kind.MARKER):
            shared.update(dict.fromkeys(product(chunk.student, chunk.teacher), 0))
        elif chunk.kind != Kind.REWRITTEN:
            in_student = [i for i in chunk.student for _ in spelled(student[i])]
            in_teacher = [j for j in chunk.teacher for _ in spelled(teacher[j])]
            shared.update(zip(in_student, in_teacher, strict=True))
    return shared


def mapped_span(
    student: Tokens, teacher: Tokens, found: list[Chunk], span: tuple[int, int], mode: str
) -> tuple[int, int]:
    """Student tokens `span` -> teacher tokens, by the bytes of every teacher token."""
    own = set(range(*span))
    touched = [g for g, chunk in enumerate(found) if own & set(chunk.student)]
    if not touched:
        return -1, -1
    shared = shared_bytes(student, teacher, found)
    taken = []
    for chunk in found[touched[0] : touched[-1] + 1]:
        whole = own >= set(chunk.student)
        for j in chunk.teacher:
            in_span = sum(shared[i, j] for i in chunk.student if i in own)
            if chunk.kind in (Kind.REWRITTEN, Kind.STOP, Kind.MARKER):
                take = whole or mode == "cover"
            elif mode == "cover":
                take = in_span > 0
            else:
                take = in_span == len(spelled(teacher[j]))
            if take:
                taken.append(j)
    return (min(taken), max(taken) + 1) if taken else (-1, -1)


def swapped(found: list[Chunk]) -> list[Chunk]:
    """The same chunks with the teacher as the student."""
    swap = {Kind.ONE_TO_MANY: Kind.MANY_TO_ONE, Kind.MANY_TO_ONE: Kind.ONE_TO_MANY}
    return [Chunk(c.teacher, c.student, swap.get(c.kind, c.kind), c.start[::-1]) for c in found]


def characters_shared(tokens_a: Sequence[str], tokens_b: Sequence[str]) -> list[list[int]]:
    """For every token of `tokens_a` those of `tokens_b` with a character of the (same) text in both."""
    of_a = [i for i, token in enumerate(tokens_a) for _ in token]
    of_b = [j for j, token in enumerate(tokens_b) for _ in token]
    pairs = set(zip(of_a, of_b, strict=True))
    return [sorted(j for i, j in pairs if i == k) for k in range(len(tokens_a))]


# ---- maps between vocabularies -----------------------------------------------------------------------------------


def byte_sorted(vocabulary: Tokens) -> list[int]:
    return sorted(
        (i for i, token in enumerate(vocabulary) if spelled(token)), key=lambda i: (spelled(vocabulary[i]), i)
    )


def begin_with(vocabulary: Tokens, prefix: bytes) -> list[int]:
    return [i for i in byte_sorted(vocabulary) if spelled(vocabulary[i]).startswith(prefix)]


def range_of(vocabulary: Tokens, prefix: bytes) -> tuple[int, int]:
    """Where in the byte-sorted ids the tokens are that begin with `prefix`."""
    found = begin_with(vocabulary, prefix)
    lo = byte_sorted(vocabulary).index(found[0]) if found else 0
    return lo, lo + len(found)


def longest_prefix(vocabulary: Tokens, text: bytes) -> int:
    fitting = [i for i, token in enumerate(vocabulary) if spelled(token) and text.startswith(spelled(token))]
    return max(fitting, key=lambda i: (len(spelled(vocabulary[i])), -i), default=-1)


@dataclass
class VocabMap:
    """What the tokens of two vocabularies are to each other; the student's own encoding is the longest match."""

    student: Tokens
    teacher: Tokens

    @staticmethod
    def _equal(one: Tokens, other: Tokens) -> list[int]:
        return [next((i for i, y in enumerate(other) if spelled(x) and x == y), -1) for x in one]

    @property
    def teacher_to_student(self) -> list[int]:
        return self._equal(self.teacher, self.student)

    @property
    def student_to_teacher(self) -> list[int]:
        return self._equal(self.student, self.teacher)

    @property
    def prefix(self) -> list[int]:
        return [longest_prefix(self.student, spelled(v)) if spelled(v) else -1 for v in self.teacher]

    canonical = prefix

    @property
    def student_order(self) -> list[int]:
        return byte_sorted(self.student)

    @property
    def teacher_order(self) -> list[int]:
        return byte_sorted(self.teacher)

    @property
    def student_range(self) -> list[tuple[int, int]]:
        return [range_of(self.student, spelled(u)) if spelled(u) else (0, 0) for u in self.student]

    @property
    def teacher_range(self) -> list[tuple[int, int]]:
        return [range_of(self.teacher, spelled(v)) if spelled(v) else (0, 0) for v in self.teacher]

    @property
    def group(self) -> list[int]:
        own = [spelled(v) for v in self.teacher if spelled(v) and v not in self.student]
        roots = sorted({min((y for y in own if v.startswith(y)), key=len) for v in own})
        return [
            next(g for g, root in enumerate(roots) if spelled(v).startswith(root)) if spelled(v) in own else -1
            for v in self.teacher
        ]

    @property
    def student_stops(self) -> tuple[int, ...]:
        return tuple(i for i, token in enumerate(self.student) if token == STOP)

    @property
    def teacher_stops(self) -> tuple[int, ...]:
        return tuple(i for i, token in enumerate(self.teacher) if token == STOP)


def interior_queries(vm: VocabMap, index: Any, teacher_ids: Any) -> xtokmap.alignment.InteriorQueries:
    """The queries of all student tokens that start inside a teacher token, from a look at the whole vocabulary."""
    width, others = index.student_chunk.shape[1], index.teacher_chunk.shape[1]
    position, teacher_row, indptr, ids, firsts, ranges = [], [], [0], [], [], []
    for b, row in enumerate(index.teacher_off.tolist()):
        for i, off in enumerate(row):
            if off > 0:
                j = int(index.teacher_pos[b, i])
                c = spelled(vm.teacher[int(teacher_ids[b, j])])[:off]
                behind = [v for v in begin_with(vm.teacher, c) if spelled(vm.teacher[v]) != c]
                position.append(b * width + i)
                teacher_row.append(b * others + j)
                ids += behind
                firsts += [longest_prefix(vm.student, spelled(vm.teacher[v])[off:]) for v in behind]
                indptr.append(len(ids))
                ranges.append(range_of(vm.teacher, c))
    return xtokmap.alignment.InteriorQueries(
        np.asarray(position, np.int64),
        np.asarray(teacher_row, np.int64),
        np.asarray(indptr, np.int64),
        np.asarray(ids, np.int32),
        np.asarray(firsts, np.int32),
        np.asarray(ranges, np.int64).reshape(-1, 2),
    )


# ---- every text up to a length -----------------------------------------------------------------------------------

_FROM_BYTE_LEVEL = {ord("Ġ"): " ", ord("Ċ"): "\n"}


def _byte_level(token: bytes) -> str:
    return token.decode().replace(" ", "Ġ").replace("\n", "Ċ")


@dataclass(frozen=True)
class Side:
    """A tokenizer of few tokens, followed to the letter. The end of a text is one more id, behind those of the tokens.

    Attributes:
        tokens: their bytes; an id is the place in this list.
        merges: pairs in order of rank (BPE), or None: the longest token that fits, from the left.
    """

    tokens: tuple[bytes, ...]
    merges: tuple[tuple[bytes, bytes], ...] | None = None

    @classmethod
    def bpe(cls, *merges: str, alphabet: str = "ab") -> Side:
        """The tokenizer of merges such as "a b"; without any, one token for each byte of the alphabet.

        A space is written Ġ and a new line Ċ, as byte-level tokenizers do.
        """
        pairs = [tuple(part.translate(_FROM_BYTE_LEVEL).encode() for part in merge.split()) for merge in merges]
        single = [bytes([byte]) for byte in alphabet.encode()]
        return cls(tuple(dict.fromkeys([*single, *map(b"".join, pairs)])), tuple(pairs))

    @property
    def end(self) -> int:
        return len(self.tokens)

    def encode(self, text: bytes) -> tuple[int, ...]:
        return tuple(map(self.tokens.index, self._cut(text)))

    def _cut(self, text: bytes) -> list[bytes]:
        if self.merges is None:
            parts: list[bytes] = []
            while text:
                parts.append(max((t for t in self.tokens if text.startswith(t)), key=len))
                text = text[len(parts[-1]) :]
            return parts
        parts = [text[k : k + 1] for k in range(len(text))]
        while True:
            found = [(self.merges.index(pair), k) for k, pair in enumerate(pairwise(parts)) if pair in self.merges]
            if not found:
                return parts
            k = min(found)[1]
            parts[k : k + 2] = [parts[k] + parts[k + 1]]

    def tokenizer(self) -> Any:
        """What `Aligner` takes, so that it follows the same rule."""
        if self.merges is None:  # of a bare table longest match is assumed
            return xtokmap.ByteTable.from_bytes([*self.tokens, None], stop_ids=[self.end])
        vocabulary = {_byte_level(token): i for i, token in enumerate(self.tokens)}
        merges = [(_byte_level(left), _byte_level(right)) for left, right in self.merges]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        tokenizer.add_special_tokens(["</s>"])
        return tokenizer


class Paths:
    """Every text up to a length (or those of a list) as one side's tokens, closed by the end of a text.

    Attributes:
        texts: shortest first; the empty one is one of them.
        ids: the tokens of every text.
        prefixes: all starts of these, the end of a text left out; the place in this list is called a node.
        nodes: the node before every token of every text.
        allowed: bool `[nodes, V]`; whether a token goes on from a node to another start of a text, or ends one.
    """

    def __init__(self, side: Side, length: int, alphabet: bytes = b"ab", texts: Iterable[bytes] | None = None) -> None:
        self.side = side
        every = (bytes(text) for n in range(length + 1) for text in product(alphabet, repeat=n))
        self.texts = list(every if texts is None else texts)
        self.ids = [(*side.encode(text), side.end) for text in self.texts]
        self.prefixes = sorted({ids[:k] for ids in self.ids for k in range(len(ids))}, key=lambda h: (len(h), h))
        self.node = {prefix: k for k, prefix in enumerate(self.prefixes)}
        self.nodes = [[self.node[ids[:k]] for k in range(len(ids))] for ids in self.ids]
        self.allowed = np.zeros((len(self.prefixes), max(side.end + 1, len(side.tokens))), np.bool_)
        for nodes, ids in zip(self.nodes, self.ids, strict=True):
            self.allowed[nodes, ids] = True

    def random_rows(self, rng: np.random.Generator, concentration: float = 0.5) -> Floats:
        """Next-token probabilities at every node: float64 `[nodes, V]`."""
        rows = np.where(self.allowed, rng.gamma(concentration, size=self.allowed.shape) + 1e-6, 0)
        return rows / rows.sum(1, keepdims=True)

    def probabilities(self, rows: Floats) -> Floats:
        """Of every text: `[texts]`."""
        return np.array([rows[nodes, ids].prod() for nodes, ids in zip(self.nodes, self.ids, strict=True)])

    def visited(self, probabilities: Floats) -> Floats:
        """How likely every node is to be come to: the mass of all texts whose encoding starts with it."""
        mass = np.zeros(len(self.prefixes))
        for nodes, p in zip(self.nodes, probabilities, strict=True):
            mass[nodes] += p
        return mass

    def conditionals(self, probabilities: Floats) -> Floats:
        """Next-token probabilities that these texts have in this side's encoding: `[nodes, V]`; q* for a teacher's."""
        mass = np.zeros(self.allowed.shape)
        for nodes, ids, p in zip(self.nodes, self.ids, probabilities, strict=True):
            mass[nodes, ids] += p
        return mass / mass.sum(1, keepdims=True)


def mass_of_start(paths: tuple[Paths, Paths], texts: tuple[int, int], rows: Floats) -> list[float]:
    """Phi as the rows of one text show it: for every student token but the end the mass of what could stand there.

    These are the teacher tokens at each of the text's places that go on past the student's boundary and leave the
    student its token; for the token in which the boundary lies also the one that ends there, if there is one.

    Args:
        paths: the student's and the teacher's.
        texts: the place of the text in each.
        rows: teacher probabilities before each of its tokens.
    """
    (student, teacher), (at, own) = paths, texts
    text, ids, teacher_ids = student.texts[at], student.ids[at][:-1], teacher.ids[own]
    spelled_teacher = [*teacher.side.tokens, b""]  # the end of a text spells nothing
    starts = [len(b"".join(spelled_teacher[t] for t in teacher_ids[:k])) for k in range(len(teacher_ids))]
    masses, end = [], 0
    for i, token in enumerate(ids):
        own_bytes = student.side.tokens[token]
        end += len(own_bytes)
        inside = max(k for k, start in enumerate(starts) if start < end)
        mass = 0.0
        for k in range(len(starts)):
            if starts[k] > end:
                break
            before = float(np.prod([rows[n][teacher_ids[n]] for n in range(k)]))
            consumed = text[starts[k] : end]
            for v, candidate in enumerate(spelled_teacher):
                if not candidate.startswith(consumed):
                    continue
                rest = candidate[len(consumed) :]
                goes_on = bool(rest) or not consumed
                leaves_it = student.side.encode(own_bytes + rest)[0] == token
                # The token that really stands there counts, whatever two neighbors alone would do.
                really = v == teacher_ids[k] and (k == inside or (not consumed and i + 1 < len(ids)))
                ends_here = k == inside and end < starts[k + 1]
                if (leaves_it or really) if goes_on else ends_here:
                    mass += before * rows[k][v]
        masses.append(mass)
    return masses


def prefix_closed(tokens: Iterable[bytes]) -> tuple[bytes, ...]:
    """With all starts of tokens, so that one byte more decides whether a longest match goes on."""
    return tuple(sorted({token[:n] for token in tokens for n in range(1, len(token) + 1)}, key=lambda t: (len(t), t)))


# ---- vocabularies ------------------------------------------------------------------------------------------------


def table(*rows: Tokens, **options: str) -> tuple[xtokmap.ByteTable, list[list[int]]]:
    """A byte table that holds exactly the tokens of these rows, and the rows' ids. Id 1 is the stop token."""
    vocabulary: Tokens = [SPECIAL, STOP]
    for token in (token for row in rows for token in row):
        if token not in vocabulary:
            vocabulary.append(token)
    ids = [[vocabulary.index(token) for token in row] for row in rows]
    tokens = [token if isinstance(token, bytes) else None for token in vocabulary]
    return xtokmap.ByteTable.from_bytes(tokens, stop_ids=[1], **options), ids


def aligner(student: Tokens, teacher: Tokens) -> tuple[xtokmap.Aligner, list[int], list[int]]:
    (s, [student_ids]), (t, [teacher_ids]) = table(student), table(teacher)
    return xtokmap.Aligner(s, t), student_ids, teacher_ids


def align(student: Tokens, teacher: Tokens, **options: bool) -> xtokmap.Alignment:
    al, student_ids, teacher_ids = aligner(student, teacher)
    return al.align(student_ids, teacher_ids, **options)


# ---- strategies --------------------------------------------------------------------------------------------------


def cut(text: bytes, places: list[tuple[int, int]]) -> Tokens:
    """Cuts bytes into tokens at these places (modulo the length), with special and stop tokens thrown in."""
    tokens: Tokens = []
    start = 0
    for place, what in sorted((place % (len(text) + 1), what) for place, what in places):
        if place > start:
            tokens.append(text[start:place])
            start = place
        tokens += {0: [SPECIAL], 1: [STOP]}.get(what, [])
    return [*tokens, text[start:]] if start < len(text) else tokens


def without_stops(tokens: Tokens) -> Tokens:
    return [token for token in tokens if token != STOP]


def uneven(student: Tokens, teacher: Tokens) -> tuple[Tokens, Tokens]:
    """The same with different numbers of turns, so that only their places in the text can tell which correspond."""
    if len(turn_ends(student)) == len(turn_ends(teacher)):
        return student, without_stops(teacher)
    return student, teacher


def cut_turns(
    turns: list[tuple[bytes, bytes]], at: list[tuple[list, list]], ends: list[Tokens]
) -> tuple[Tokens, Tokens]:
    """Turns of both sides in tokens, each closed by one of the `ends`."""
    student: Tokens = []
    teacher: Tokens = []
    for k, ((x, y), (a, b)) in enumerate(zip(turns, at, strict=False)):
        student += [*without_stops(cut(x, a)), *ends[k % len(ends)]]
        teacher += [*without_stops(cut(y, b)), *ends[(k + 1) % len(ends)]]
    return student, teacher


#: Where to cut, and what to throw in: see `cut`.
places = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 12)), max_size=24)

#: Bytes in which whole and broken characters are common.
byte_texts = st.lists(
    st.sampled_from([b"a", b"b", b" ", b"\xc3", b"\xa9", b"\xe4", b"\xbd", b"\xa0", b"\xf0\x9f", b"\x92", b"\xff"]),
    max_size=40,
).map(b"".join)

#: What normalizers and lossy decodes make of characters, and characters that they leave alone.
_CHANGED = [
    ("É", "é"),
    ("e\u0301", "é"),
    ("\u0958", "क\u093c"),
    ("\u1112\u1161\u11ab", "한"),
    ("\ufb1d", "\u05d9\u05b4"),
    ("ﬁ", "fi"),
    ("Ａ", "A"),
    ("½", "1\u20442"),
    ("Q", "q"),
    ("▁", " "),
    (b"\xe4\xbd", "\ufffd"),
    (b"\xff", "\ufffd"),
    (b"\xf0\x9f\x92", "\ufffd"),
]


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


_same = st.sampled_from("xyz-é漢字💡ж0").map(lambda char: (char.encode(), char.encode()))
_changed = st.sampled_from(_CHANGED).map(lambda pair: (_bytes(pair[0]), _bytes(pair[1])))
changed_texts = st.lists(st.one_of(_same, _same, _same, _same, _changed), max_size=24)


def side(pieces: Pieces, index: int) -> bytes:
    return b"".join(piece[index] for piece in pieces)


@st.composite
def vocabularies(draw: st.DrawFn) -> tuple[Tokens, Tokens]:
    """Two random vocabularies over few bytes, and one text in tokens of each.

    The student's tokens are drawn one by one, so that no tokenizer would have produced them; the teacher's follow its
    bytes, with whatever token fits.
    """
    vocabulary = st.lists(
        st.lists(st.sampled_from([b"a", b"b", b"\xc3", b"\xa9"]), min_size=1, max_size=4).map(b"".join)
    )
    student = draw(st.lists(st.sampled_from([*draw(vocabulary), b"a", SPECIAL, STOP]), max_size=24))
    fitting = [*draw(vocabulary), b"a", b"b", b"\xc3", b"\xa9"]
    teacher: Tokens = []
    rest = spell(student)
    while rest:
        teacher.append(draw(st.sampled_from([token for token in fitting if rest.startswith(token)])))
        rest = rest[len(spelled(teacher[-1])) :]
        teacher += draw(st.sampled_from([[], [], [], [SPECIAL], [STOP], [STOP, SPECIAL]]))
    return uneven(student, teacher)

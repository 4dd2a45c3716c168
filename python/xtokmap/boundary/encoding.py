"""EncodingRule: the rule by which a tokenizer cuts bytes into tokens, for the core to follow on short strings.

Whether the student's tokenizer would have put two tokens side by side is asked of every token that a teacher might have
said next; the rule itself answers in well under a microsecond.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from xtokmap._core import ByteTable, Encoding
from xtokmap.tokenizers import encoding_rule
from xtokmap.tokenizers.base import UInt32


class EncodingRule:
    """How a tokenizer cuts bytes into tokens.

    BPE (merges, or the ranks of tiktoken, tekken and SentencePiece), Unigram's best path and longest match (WordPiece)
    are followed on the bytes of two neighbors; what the pre-tokenizer does between them is found by asking it, once
    for each pair of classes of tokens (kinds of characters at their edges) that occurs. A bare vocabulary
    (`*.tiktoken`, GGUF) has no pre-tokenizer here, and a `ByteTable` no rule: longest match is taken.

    Args:
        tokenizer: as `byte_table` takes it.
        table: its bytes.
        classes: False leaves out what `learn` needs.

    Attributes:
        name: "bpe", "unigram" or "longest match".
        core: the rule, as the core follows it.
    """

    def __init__(self, tokenizer: Any, table: ByteTable, *, classes: bool = True) -> None:
        rule = encoding_rule(tokenizer)
        self.name, self._cuts, self._table = rule.name, rule.cuts, table
        splits = None
        if self._cuts is not None and classes:
            self._before, after, self._examples = _classes(table)
            splits = (self._before, after, len(self._examples[0]), len(self._examples[1]))
            self._known = np.zeros(len(self._examples[0]), np.bool_)
        self.core = Encoding(table, self.name, splits=splits, **rule.arguments)

    def learn(self, ids: npt.NDArray[Any]) -> None:
        """Asks the pre-tokenizer what it does after these tokens."""
        if self._cuts is None:
            return
        before, after = self._examples
        classes = self._before[ids]
        for c in np.unique(classes[~self._known[classes]]).tolist():
            # With nothing behind the second token, and with a word, which may take the last space of one that is white.
            row = np.full((2, len(after)), _ALL, np.uint8)
            for k, text in enumerate(after):
                if before[c] and text:
                    row[:, k] = _reach(self._cuts(before[c] + text), len(before[c]), len(text))
                    if text.isspace():
                        row[1, k] = _reach(self._cuts(before[c] + text + "a"), len(before[c]), len(text))
                        if row[1, k] == len(text) - 1 > 0:
                            row[1, k] = _ALL_BUT_LAST
            self.core.learn(c, row.reshape(-1))
            self._known[c] = True

    def takes_a_space(self, letter: str) -> bool:
        """Whether a word takes the last space of the run before it."""
        text = f"{letter}   {letter}"
        cut = max(self._cuts(text), default=0) if self._cuts is not None else 0
        last = self._table[self.core.encode(text[cut:].encode())[-1]] or b""
        return last[:1].isspace()

    def counts_from_the_right(self) -> bool:
        """Whether the pre-tokenizer groups digits from the last one on, so that a further digit moves all cuts."""
        if self._cuts is None:
            return False
        first = [min(self._cuts("1" * n), default=n) for n in range(2, 8)]
        return any(longer < shorter for shorter, longer in pairwise(first))

    def pieces(self, table: ByteTable, letter: str = "") -> UInt32 | None:
        """For every token of a table how many of its bytes the pre-tokenizer puts in its first piece.

        Args:
            table: the tokens.
            letter: what stands behind those that are white space.
        """
        if self._cuts is None:
            return None
        ends = np.asarray(table.lengths, np.uint32)
        for i in np.flatnonzero(ends > 1).tolist():
            text = _text(table[i])
            if not text.strip(" ").isalpha():
                cut = min(self._cuts(text + letter if text.isspace() else text), default=0)
                if cut:
                    ends[i] = len(text[:cut].encode())
        return ends


_INSIDE, _ALL, _ALL_BUT_LAST = 255, 254, 253
#: Kinds of characters whose number a pattern may count.
_COUNTED = frozenset(("Nd", " ", "\n", "\r", "\t", "space"))


@cache
def _kind(character: str) -> str:
    """What a pattern may tell characters apart by."""
    if character in " \n\r\t'/_":
        return character
    if character.isspace() and not "\x1c" <= character <= "\x1f":  # which no pattern calls a space
        return "space"
    category = unicodedata.category(character)
    if character.isascii():
        return category
    if category == "Lo" and unicodedata.name(character, "").startswith(("CJK", "HIRAGANA", "KATAKANA")):
        return "CJK"
    return f"{category} wide"


def _runs(text: str) -> Iterator[tuple[str, int]]:
    """Runs of one kind of character, and their length up to 4 where it may count."""
    for kind, run in groupby(text, _kind):
        yield kind, min(len(list(run)), 4 if kind in _COUNTED else 1 if kind[0] == "L" else 2)


def _class_before(text: str) -> tuple[Any, ...]:
    runs = list(_runs(text))
    return runs[0], tuple(runs[-2:]), min(len(runs), 4)


def _class_after(text: str) -> tuple[Any, ...]:
    # What follows an apostrophe may be a contraction.
    start = text.lower().lstrip("'")[:2]
    contracted = start[:1] if start[:1] in "sdmt" else start if start in ("ll", "ve", "re") else ""
    return *list(_runs(text[:8]))[:2], contracted


def _text(token: bytes | None) -> str:
    """A token as text; nothing where it is none by itself."""
    try:
        return token.decode() if token else ""
    except UnicodeDecodeError:
        return ""


def _classes(table: ByteTable) -> tuple[UInt32, UInt32, tuple[list[str], list[str]]]:
    """Class of every token before and after a boundary, and an example of each class. Class 0: nothing is known."""
    numbers: tuple[dict[Any, int], dict[Any, int]] = {}, {}
    examples: tuple[list[str], list[str]] = [""], [""]
    of = np.zeros((2, len(table)), np.uint32)
    for i in range(len(table)):
        text = _text(table[i])
        if text:
            for side, key in enumerate((_class_before(text), _class_after(text))):
                number = numbers[side].setdefault(key, len(examples[side]))
                if number == len(examples[side]):
                    examples[side].append(text)
                of[side, i] = number
    return of[0], of[1], examples


def _reach(found: set[int], boundary: int, after: int) -> int:
    if any(at < boundary for at in found):
        return _INSIDE
    first = min(found, default=boundary + after)
    return _ALL if first >= boundary + after else first - boundary

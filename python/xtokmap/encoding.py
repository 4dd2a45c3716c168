"""EncodingRule: the rule by which a tokenizer cuts bytes into tokens, for the core to follow on short strings.

Whether the student's tokenizer would have put two tokens side by side is asked of every token that a teacher might have
said next; the rule itself answers in well under a microsecond.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from xtokmap._core import ByteTable, Encoding
from xtokmap.tokenizers import (
    _MODEL_NAME,
    _USER_DEFINED,
    _existing,
    _file_in,
    _gguf_fields,
    _is_tiktoken,
    _mistral_core,
    _packages,
    _protobuf,
    _serialized,
)

#: Where a pre-tokenizer cuts a text: positions in characters, 0 and the end left out.
Cuts: TypeAlias = Callable[[str], set[int]]
UInt32: TypeAlias = npt.NDArray[np.uint32]


class EncodingRule:
    """How a tokenizer cuts bytes into tokens.

    BPE (merges, or the ranks of tiktoken, tekken and SentencePiece), Unigram's best path and longest match (WordPiece)
    are followed on the bytes of two neighbours; what the pre-tokenizer does between them is found by asking it, once
    for each pair of classes of tokens (kinds of characters at their edges) that occurs. A bare vocabulary
    (`*.tiktoken`, GGUF) has no pre-tokenizer here, and a `ByteTable` no rule: longest match is taken.

    Attributes:
        name: "bpe", "unigram" or "longest match".
        core: the rule, as the core follows it.
    """

    def __init__(self, tokenizer: Any, table: ByteTable) -> None:
        self.name, arguments, self._cuts = _rule(tokenizer, table)
        splits = None
        if self._cuts is not None:
            self._before, after, self._examples = _classes(table)
            splits = (self._before, after, len(self._examples[0]), len(self._examples[1]))
            self._known = np.zeros(len(self._examples[0]), np.bool_)
        self.core = Encoding(table, self.name, splits=splits, **arguments)

    def learn(self, ids: npt.NDArray[Any]) -> None:
        """Asks the pre-tokenizer what it does after these tokens."""
        if self._cuts is None:
            return
        before, after = self._examples
        classes = self._before[ids]
        for c in np.unique(classes[~self._known[classes]]).tolist():
            row = np.full(len(after), _ALL, np.uint8)
            for k, text in enumerate(after):
                if before[c] and text:
                    row[k] = _reach(self._cuts(before[c] + text), len(before[c]), len(text))
            self.core.learn(c, row)
            self._known[c] = True

    def pieces(self, table: ByteTable) -> UInt32 | None:
        """For every token of a table how many of its bytes the pre-tokenizer puts in its first piece."""
        if self._cuts is None:
            return None
        ends = np.asarray(table.lengths, np.uint32)
        for i in np.flatnonzero(ends > 1).tolist():
            text = _text(table[i])
            if not text.strip(" ").isalpha():
                cut = min(self._cuts(text), default=0)
                if cut:
                    ends[i] = len(text[:cut].encode())
        return ends


_Rule: TypeAlias = "tuple[str, dict[str, Any], Cuts | None]"
_LONGEST: _Rule = ("longest match", {}, None)
#: tiktoken and tekken look a piece up before they merge in it.
_RANKED: dict[str, Any] = {"whole": True}


def _rule(tokenizer: Any, table: ByteTable) -> _Rule:
    if isinstance(tokenizer, ByteTable):
        return _LONGEST
    if isinstance(tokenizer, (str, os.PathLike)):
        return _rule_of_path(_existing(tokenizer), table)
    packages = _packages(tokenizer)
    if "transformers" in packages:
        inner = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "tokenizer", None)
        return _LONGEST if inner is None else _rule(inner, table)
    if packages & {"tokenizers", "fastokens"}:
        return _rule_of_json(json.loads(_serialized(tokenizer.to_str, "tokenizer")), tokenizer)
    if "tiktoken" in packages:
        return "bpe", _RANKED, _pattern(tokenizer._pat_str)
    if "sentencepiece" in packages:
        return _rule_of_pieces(tokenizer.serialized_model_proto())
    if "mistral_common" in packages:
        core = _mistral_core(tokenizer)
        if type(core).__name__ == "Tekkenizer":
            return "bpe", _RANKED, _pattern(core._model._pat_str)
        return _rule_of_pieces(core._model.serialized_model_proto())
    return _LONGEST


def _rule_of_path(path: Path, table: ByteTable) -> _Rule:
    path = _file_in(path) if path.is_dir() else path
    if path.suffix == ".gguf":
        return _rule_of_gguf(path)
    if path.suffix == ".json":
        spec = json.loads(path.read_bytes())  # merges and all, which the reader of bytes passes over
        if "config" in spec:
            return "bpe", _RANKED, _pattern(spec["config"]["pattern"])
        try:
            from tokenizers import Tokenizer
        except ImportError:
            return _rule_of_json(spec, None)
        return _rule_of_json(spec, Tokenizer.from_file(str(path)))
    if _MODEL_NAME.fullmatch(path.name) and not _is_tiktoken(path):
        return _rule_of_pieces(path.read_bytes())
    return "bpe", _RANKED, None


def _rule_of_json(spec: dict[str, Any], tokenizer: Any) -> _Rule:
    model = spec["model"]
    cuts = None
    if tokenizer is not None and hasattr(tokenizer, "pre_tokenizer"):
        cuts = _cuts_of(tokenizer.normalizer, tokenizer.pre_tokenizer)
    if model["type"] == "Unigram":
        scores = np.asarray([score for _, score in model["vocab"]], np.float32)
        return "unigram", {"scores": scores}, cuts
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return (*_LONGEST[:2], cuts)
    vocab: Mapping[str, int] = model["vocab"]
    arguments = {
        "merges": _merges(model["merges"], vocab),
        "characters": not _is_byte_level(spec),
        "whole": bool(model.get("ignore_merges")),
        "added": _ids(token["id"] for token in spec.get("added_tokens") or () if not token["special"]),
    }
    return "bpe", arguments, cuts


def _ids(ids: Iterable[int]) -> UInt32:
    return np.fromiter(ids, np.uint32)


def _is_byte_level(spec: Mapping[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps([spec.get("decoder"), spec.get("pre_tokenizer")])


def _merges(merges: Sequence[Any], vocab: Mapping[str, int]) -> UInt32:
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
    rows = [(vocab[a], vocab[b], vocab[a + b]) for a, b in pairs if a in vocab and b in vocab and a + b in vocab]
    return np.asarray(rows, np.uint32).reshape(-1, 3)


def _rule_of_pieces(proto: bytes) -> _Rule:
    scores: list[float] = []
    kind = 1  # unigram, the default of SentencePiece's TrainerSpec
    added = []
    for field, value in _protobuf(proto):
        if field == 1:
            piece = dict(_protobuf(value))
            if piece.get(3) == _USER_DEFINED:
                added.append(len(scores))
            scores.append(_float(piece.get(2, 0.0)))
        elif field == 2:
            kind = dict(_protobuf(value)).get(3, kind)
    if kind == 1:
        return "unigram", {"scores": np.asarray(scores, np.float32)}, None
    if kind == 2:
        return "bpe", {"ranks": _by_score(scores), "characters": True, "added": _ids(added)}, None
    return _LONGEST


def _float(value: Any) -> float:
    return float(np.frombuffer(value, "<f4")[0]) if isinstance(value, (bytes, bytearray)) else float(value)


def _by_score(scores: Sequence[float]) -> UInt32:
    """Ranks: the highest score first, equal ones in order of ids."""
    ranks = np.empty(len(scores), np.uint32)
    ranks[np.argsort(-np.asarray(scores, np.float64), kind="stable")] = np.arange(len(scores), dtype=np.uint32)
    return ranks


def _rule_of_gguf(path: Path) -> _Rule:
    keys = ("model", "tokens", "token_type", "merges", "scores")
    data = np.memmap(path, np.uint8, "r")
    fields, _ = _gguf_fields(data, {f"tokenizer.ggml.{key}".encode(): key for key in keys})
    added = _ids(i for i, kind in enumerate(fields.get("token_type", ())) if kind == _USER_DEFINED)
    if fields.get("model") == b"llama" and "scores" in fields:
        return "bpe", {"ranks": _by_score(fields["scores"]), "characters": True, "added": added}, None
    if "merges" in fields:
        vocab = {token.decode(): i for i, token in enumerate(fields["tokens"])}
        merges = _merges([merge.decode() for merge in fields["merges"]], vocab)
        return "bpe", {"merges": merges, "added": added}, None
    return _LONGEST


# ---- pre-tokenizers ----------------------------------------------------------------------------------------------


def _pattern(pattern: str) -> Cuts | None:
    """Cuts at the matches of a tiktoken pattern."""
    try:
        import regex
    except ImportError:
        return None
    find = regex.compile(pattern).finditer
    return lambda text: {end for match in find(text) for end in match.span()} - {0, len(text)}


def _cuts_of(normalizer: Any, pre_tokenizer: Any) -> Cuts | None:
    if pre_tokenizer is None:
        return None

    def cuts(text: str) -> set[int]:
        shift = 0
        if normalizer is not None:
            normal = normalizer.normalize_str(text)
            shift = len(normal) - len(text)
            if shift not in (0, 1):  # 1: a space before the text
                return set()
            text = normal
        found = {at - shift for _, span in pre_tokenizer.pre_tokenize_str(text) for at in span}
        return {at for at in found if 0 < at < len(text) - shift}

    return cuts


_INSIDE, _ALL = 255, 254
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

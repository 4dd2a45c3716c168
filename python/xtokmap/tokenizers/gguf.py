"""GGUF: the vocabulary in the header of a model's file. It has no encoder: load the tokenizer with transformers."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xtokmap import _core
from xtokmap._core import UnsupportedTokenizerError
from xtokmap.tokenizers.base import LONGEST, Kind, Rule, TextCodec, Vocabulary, bare, id_row, merge_rows
from xtokmap.tokenizers.parse import DAMAGE, File, reading
from xtokmap.tokenizers.sentencepiece import NORMAL, USER_DEFINED, by_score, of_pieces

__all__: list[str] = []


def vocabulary(file: File) -> Vocabulary:
    """The bytes of every token, of a byte-level or a SentencePiece vocabulary."""
    with reading(file.path, "GGUF file with a tokenizer"):
        keys = ("model", "tokens", "token_type", "eos_token_id", "eot_token_id", "eom_token_id")
        fields = _read(file.path, keys)
        kind, pieces, types = fields["model"].decode(), [t.decode() for t in fields["tokens"]], fields["token_type"]
        stop_ids = tuple(int(fields[end]) for end in keys[3:] if end in fields)
        if kind == "llama":
            return of_pieces(pieces, types, stop_ids)
        if kind != "gpt2":
            raise UnsupportedTokenizerError(
                f"tokenizer.ggml.model {kind!r}: only gpt2 (byte-level) and llama (SentencePiece) are known; load the "
                "model's own tokenizer and pass that"
            )
        rows = list(enumerate(zip(pieces, types, strict=True)))
        special = {i: piece for i, (piece, t) in rows if t not in (NORMAL, USER_DEFINED)}
        added = {i: piece for i, (piece, t) in rows if t == USER_DEFINED}
        normal = {i: piece for i, (piece, t) in rows if t == NORMAL}
        tokens = dict(zip(normal, _core.spell(list(normal.values()), [], "byte level"), strict=True))
        tokens.update((i, piece.encode()) for i, piece in added.items())
        return Vocabulary(tokens, special, added, stop_ids)


def rule(file: File) -> Rule:
    """Merges, or scores; a GGUF file only names its pre-tokenizer."""
    keys = ("model", "tokens", "token_type", "merges", "scores")
    fields = _read(file.path, keys)
    added = id_row(i for i, kind in enumerate(fields.get("token_type", ())) if kind == USER_DEFINED)
    if fields.get("model") == b"llama" and "scores" in fields:
        return Rule("bpe", {"ranks": by_score(fields["scores"]), "characters": True, "added": added})
    if "merges" in fields:
        vocab = {token.decode(): i for i, token in enumerate(fields["tokens"])}
        merges = merge_rows([merge.decode() for merge in fields["merges"]], vocab)
        return Rule("bpe", {"merges": merges, "added": added})
    return LONGEST


def codec(file: File, directory: Vocabulary | None = None) -> TextCodec:
    """None: refused."""
    raise bare(file)


def content(file: File) -> Iterable[Any]:
    """The header: the tensors behind it have no say."""
    try:
        data = np.memmap(file.path, np.uint8, "r")
        return [data[: _fields(data, {})[1]]]
    except DAMAGE:
        return []  # the reader will say what is wrong


def _read(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """Those of the tokenizer's keys that the file has."""
    fields, _ = _fields(np.memmap(path, np.uint8, "r"), {f"tokenizer.ggml.{key}".encode(): key for key in keys})
    return fields


#: struct formats of GGUF's value types; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def _fields(data: npt.NDArray[np.uint8], wanted: Mapping[bytes, str]) -> tuple[dict[str, Any], int]:
    """Wanted key-value pairs of a GGUF file's header (versions 2 and 3), strings as bytes; and where the pairs end.

    The reader of the `gguf` package makes arrays of every element of every key: 13 s for the 262,144 tokens of Gemma 3,
    where this takes 0.1 s. The tensors are not touched, so the first part of a split file will do.
    """
    fields: dict[str, Any] = {}
    buffer = data.data
    magic, version = struct.unpack_from("<4sI", buffer)
    order = "<" if version & 0xFFFF else ">"
    (version,) = struct.unpack_from(f"{order}I", buffer, 4)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"magic {magic!r}, version {version}; known are GGUF versions 2 and 3")
    u32, u64 = struct.Struct(f"{order}I").unpack_from, struct.Struct(f"{order}Q").unpack_from

    def strings(at: int, count: int, keep: bool = True) -> tuple[list[bytes], int]:
        found = _core.gguf_strings(data, at, count, order == ">", keep)
        if found is None:
            raise ValueError("a string is cut off")
        return found

    (pairs,), at = u64(buffer, 16), 24
    for _ in range(pairs):
        (key,), at = strings(at, 1)
        (kind,), at = u32(buffer, at), at + 4
        count = None
        if kind == 9:
            (kind,), (count,), at = u32(buffer, at), u64(buffer, at + 4), at + 12
        values: list[Any] = []
        if kind == 8:
            values, at = strings(at, 1 if count is None else count, key in wanted)
        else:
            row = struct.Struct(f"{order}{1 if count is None else count}{_SCALARS[kind]}")
            values.extend(row.unpack_from(buffer, at) if key in wanted else ())
            at += row.size
        if key in wanted:
            fields[wanted[key]] = values if count is not None else values[0]
    return fields, at


KIND = Kind(vocabulary, rule, codec, name=r".*\.gguf", in_directory=("*.gguf",), content=content)

"""SentencePiece: `sentencepiece.SentencePieceProcessor` and `*.model`; the package itself is only needed to encode."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from xtokmap._core import UnsupportedTokenizerError
from xtokmap.tokenizers.base import (
    BYTE_PIECES,
    LONGEST,
    MODEL_NAME,
    STOP_TOKENS,
    Kind,
    Lists,
    Rule,
    TextCodec,
    UInt32,
    Vocabulary,
    id_row,
    require,
    whole_file,
)
from xtokmap.tokenizers.parse import File, loaded, reading
from xtokmap.tokenizers.tiktoken import is_tiktoken

__all__: list[str] = []


#: Types of pieces, the same in SentencePiece models and GGUF files.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def is_sentencepiece(file: File) -> bool:
    """Whether a file is a SentencePiece model: by its name, unless it holds ranks."""
    return re.fullmatch(MODEL_NAME, file.path.name) is not None and not is_tiktoken(file)


def vocabulary(source: Any) -> Vocabulary:
    """The bytes of every piece."""
    if isinstance(source, File):
        with reading(source.path, "SentencePiece model"):
            return _of_proto(source.path.read_bytes())
    return _of_proto(source.serialized_model_proto())


def of_pieces(pieces: Sequence[str], types: Sequence[int], stop_ids: tuple[int, ...]) -> Vocabulary:
    """A vocabulary from pieces and their types, which GGUF files have too."""
    tokens: dict[int, bytes] = {}
    special: dict[int, str] = {}
    added: dict[int, str] = {}
    for i, (piece, kind) in enumerate(zip(pieces, types, strict=True)):
        if kind == NORMAL:
            tokens[i] = piece.replace("▁", " ").encode()
        elif kind == BYTE:
            if piece not in BYTE_PIECES:
                raise ValueError(f"byte piece {piece!r}: not of the form <0x0A>")
            tokens[i] = BYTE_PIECES[piece]
        elif kind != USER_DEFINED or (piece in STOP_TOKENS and piece != "</s>"):
            special[i] = piece  # Gemma's <end_of_turn> is user-defined; so is its </s>, but that is the HTML tag
        else:
            tokens[i], added[i] = piece.replace("▁", " ").encode(), piece
    return Vocabulary(tokens, special, added, stop_ids, "each")


def _of_proto(proto: bytes) -> Vocabulary:
    """A vocabulary from a serialized ModelProto (sentencepiece_model.proto); the package itself is not needed."""
    pieces: list[str] = []
    types: list[int] = []
    eos = "</s>"
    for field, value in _protobuf(proto):
        if field == 1:
            piece = dict(_protobuf(value))
            pieces.append(piece[1].decode())
            types.append(piece.get(3, NORMAL))
            if types[-1] not in range(NORMAL, BYTE + 1):
                raise ValueError(f"piece {pieces[-1]!r} has the unknown type {types[-1]!r}")
        elif field == 2:
            eos = dict(_protobuf(value)).get(47, eos.encode()).decode()
        elif field == 5 and dict(_protobuf(value)).get(2):
            raise UnsupportedTokenizerError(
                "denormalizer: this SentencePiece model rewrites the text that its pieces spell, so their bytes cannot "
                "be known exactly; build xtokmap.ByteTable.from_bytes([...]) yourself"
            )
    if not pieces:
        raise ValueError("no pieces")
    stop_ids = tuple(i for i, kind in enumerate(types) if kind == CONTROL and pieces[i] == eos)
    return of_pieces(pieces, types, stop_ids)


def content(source: Any) -> Iterable[Any] | None:
    """A processor is its serialized model."""
    return whole_file(source) or [b"SentencePiece", source.serialized_model_proto()]


def _protobuf(message: bytes) -> Iterator[tuple[int, Any]]:
    """The (field number, value) pairs of a protobuf message: int for a varint, else the raw bytes."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7
            if shift > 63:
                raise ValueError("a number has more than 64 bits")

    at = 0
    while at < len(message):
        key, at = (message[at], at + 1) if message[at] < 0x80 else varint(at)
        kind = key & 7
        if kind == 0:
            value, at = varint(at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = (message[at], at + 1) if message[at] < 0x80 else varint(at)
        else:
            size = {1: 8, 5: 4}[kind]
        if at + size > len(message):
            raise ValueError("a field is cut off")
        yield key >> 3, message[at : at + size]
        at += size


# ---- encoding rule --------------------------------------------------------------------------------------------------


def rule(source: Any) -> Rule:
    """The trainer's kind of model, by the scores of its pieces."""
    return _rule_of(source.path.read_bytes() if isinstance(source, File) else source.serialized_model_proto())


def _rule_of(proto: bytes) -> Rule:
    scores: list[float] = []
    kind = 1  # unigram, the default of SentencePiece's TrainerSpec
    added = []
    for field, value in _protobuf(proto):
        if field == 1:
            piece = dict(_protobuf(value))
            if piece.get(3) == USER_DEFINED:
                added.append(len(scores))
            scores.append(_float(piece.get(2, 0.0)))
        elif field == 2:
            kind = dict(_protobuf(value)).get(3, kind)
    if kind == 1:
        return Rule("unigram", {"scores": np.asarray(scores, np.float32)})
    if kind == 2:
        return Rule("bpe", {"ranks": by_score(scores), "characters": True, "added": id_row(added)})
    return LONGEST


def _float(value: Any) -> float:
    return float(np.frombuffer(value, "<f4")[0]) if isinstance(value, (bytes, bytearray)) else float(value)


def by_score(scores: Sequence[float]) -> UInt32:
    """Ranks: the highest score first, equal ones in order of ids."""
    ranks = np.empty(len(scores), np.uint32)
    ranks[np.argsort(-np.asarray(scores, np.float64), kind="stable")] = np.arange(len(scores), dtype=np.uint32)
    return ranks


# ---- encoder --------------------------------------------------------------------------------------------------------


def codec(source: Any, directory: Vocabulary | None = None) -> TextCodec:
    """A processor without the user's defaults."""
    if isinstance(source, File):
        path = source.path
        if directory is not None and directory.tokens.keys() - vocabulary(source).tokens.keys():
            raise UnsupportedTokenizerError(
                f"{path.parent}: {path.name} cannot encode the added tokens that the files beside it declare; load it "
                "with transformers.AutoTokenizer.from_pretrained and pass that"
            )
        package = require("sentencepiece", f"encoding with {path.name}")
        source = loaded(path, lambda: package.SentencePieceProcessor(model_file=str(path)))
    plain = _without_markers(source)
    return Lists(lambda texts: plain.encode(texts, out_type=int))


def _without_markers(processor: Any) -> Any:
    """A new processor without the user's defaults, that reads `<end_of_turn>` in a text as text.

    SentencePiece finds user-defined pieces in every text; those that have no bytes here become control pieces.
    """
    proto = processor.serialized_model_proto()
    special = _of_proto(proto).special
    fields = bytearray()
    piece_id = 0
    for field, value in _protobuf(proto):
        # The last type that a message gives is the one that counts.
        marker = field == 1 and piece_id in special and dict(_protobuf(value)).get(3) == USER_DEFINED
        body = value + bytes([3 << 3, CONTROL]) if marker else value
        fields += _varint(field << 3 | 2) + _varint(len(body)) + body
        piece_id += field == 1
    return type(processor)(model_proto=bytes(fields))


def _varint(value: int) -> bytes:
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])


KIND = Kind(
    vocabulary,
    rule,
    codec,
    packages=frozenset({"sentencepiece"}),
    name=MODEL_NAME,
    is_file=is_sentencepiece,
    in_directory=("tokenizer.model*", "*.model"),
    content=content,
)

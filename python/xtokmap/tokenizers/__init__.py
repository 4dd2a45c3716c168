"""Tokenizers: the bytes of every token id, the rule by which a text is cut into tokens, and encoders of text in bulk.

Each kind is a file that gives these three things as a `Kind`: `vocabulary`, `rule` and `codec`, for its objects and for
its files. To add one, write such a file (`tiktoken.py` is a short example; `base.Kind` says what each part is) and add
a line to `KINDS`. Files see `base`, `parse` and other kinds, never this module, which only finds the kind.

What a kind cannot do exactly is an `UnsupportedTokenizerError` that names the part; nothing is guessed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from xtokmap import _core
from xtokmap._core import ByteTable, UnsupportedTokenizerError, XTokMapError
from xtokmap.files import obstacle
from xtokmap.tokenizers import cache, gguf, hf, mistral, sentencepiece, tiktoken, transformers
from xtokmap.tokenizers.base import LONGEST, STOP_TOKENS, Kind, Rule, TextCodec, Vocabulary, packages_of
from xtokmap.tokenizers.directory import BESIDE, file_in, with_beside
from xtokmap.tokenizers.hf import ODD_TEXTS
from xtokmap.tokenizers.parse import File, reading

__all__ = ["ODD_TEXTS", "STOP_TOKENS", "TextCodec", "byte_table", "text_codec"]

#: Every kind, in the order in which they are asked whether an object, a file or a file of a directory is theirs.
KINDS: tuple[Kind, ...] = (
    transformers.KIND,  # objects of transformers, fast ones and those that hold another kind
    hf.KIND,  # tokenizers.Tokenizer and its wrappers, tokenizer.json
    mistral.KIND,  # mistral-common's tokenizers, tekken.json
    sentencepiece.KIND,  # SentencePieceProcessor, *.model
    tiktoken.KIND,  # tiktoken.Encoding, *.tiktoken, and *.model that holds ranks
    gguf.KIND,  # *.gguf
)


def byte_table(tokenizer: Any, *, special: Literal["none", "text"] = "none") -> ByteTable:
    """The bytes of every token id of a tokenizer: what its decoder spells for that id inside a text.

    No bytes (`None`): special tokens, control and unused pieces, the roles bos, eos, pad and unk, ids without an entry.
    Added tokens that are not special (`<think>`) are the UTF-8 bytes of their content.

    A space that a decoder leaves out at the edge of a text belongs to that place, not to the token, which keeps it:
    `▁the` is `b" the"` everywhere, though SentencePiece-style decoders strip the first one (Metaspace all of the first
    token); a WordPiece token that starts a word is `b" word"`, though nothing stands before the first; a BPEDecoder
    token that ends a word is `b"word "`, though nothing stands after the last. WordPiece's clean-up (`" ."` -> `"."`)
    is in the bytes as far as it happens inside one token, as in `tokenizers`; what transformers does over a whole text
    with `clean_up_tokenization_spaces` is not.

    The tables of paths and of SentencePiece models are kept on disk by their content (`xtokmap.tokenizers.cache`).
    Those of other objects are not: nothing identifies their content in less time than reading it takes.

    `invalid` says how the tokenizer's own decoder spells bytes that are not UTF-8. "maximal": one U+FFFD for each part
    that is (byte-level vocabularies). "each": one for each byte of such a part (SentencePiece and GGUF files with byte
    pieces, `<0x0A>`). "run": one for each byte of a run of `byte_pieces` that is not UTF-8 as a whole (Hugging Face's
    ByteFallback).

    Args:
        tokenizer: a transformers fast tokenizer, `tokenizers.Tokenizer`, `tiktoken.Encoding`,
            `sentencepiece.SentencePieceProcessor`, a mistral-common tokenizer, a `ByteTable`, or a path: a directory as
            saved by `save_pretrained`, `tokenizer.json`, `*.model`, `*.tiktoken` (also `.gz`), `tekken.json`, `*.gguf`.
            A bare `*.tiktoken` file holds no special tokens. Slow transformers tokenizers are read where they hold a
            tiktoken encoding or the SentencePiece model whose ids they use.
        special: what special tokens spell: "none", nothing; "text", their names, for those who align rendered text.
            Then nothing ends a turn.

    Returns:
        A table as long as the largest id + 1. Its stop ids are the tokenizer's own eos token, those that a directory's
        `tokenizer_config.json`, `generation_config.json` and `config.json` declare, then the names of `STOP_TOKENS`.

    Raises:
        UnsupportedTokenizerError: a kind or a part of a tokenizer whose bytes cannot be known exactly, a damaged file,
            a pipe, socket or device in the place of one, or a missing package; the message names it and says what to
            do.
        FileNotFoundError: a path that does not exist.
        XTokMapError: another `special`, or "text" of a `ByteTable`, which has no names.
    """
    if special not in ("none", "text"):
        raise XTokMapError(f'special={special!r}: use "none" or "text"')
    as_text = [b"special tokens as text"] if special == "text" else []
    if isinstance(tokenizer, ByteTable):
        if special == "text":
            raise XTokMapError('special="text": a ByteTable has no names of its special tokens; pass the tokenizer')
        return tokenizer
    if isinstance(tokenizer, (str, os.PathLike)):
        path = _existing(tokenizer)

        def read() -> ByteTable:
            vocabulary = _vocabulary_of_path(path)
            with reading(path, "vocabulary"):
                return vocabulary.table(special)

        return _cached(lambda: chain(_contents(path), as_text), read)
    kind = _kind_of_object(tokenizer)
    if kind is None:
        raise UnsupportedTokenizerError(
            f"{type(tokenizer).__name__} (from {type(tokenizer).__module__}): no reader for this type; pass a "
            "transformers fast tokenizer, a tokenizers.Tokenizer, tiktoken.Encoding, SentencePieceProcessor, "
            "mistral-common tokenizer, a path, or build xtokmap.ByteTable.from_bytes([...]) yourself"
        )

    def content() -> Iterable[Any] | None:
        found = kind.content(tokenizer)
        return None if found is None else chain(found, as_text)

    return _cached(content, lambda: kind.vocabulary(tokenizer).table(special))


def encoding_rule(tokenizer: Any) -> Rule:
    """The rule by which a tokenizer, as `byte_table` takes it, cuts bytes into tokens; longest match if none is known.

    Raises:
        FileNotFoundError: a path that does not exist.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        file = _file_of(_existing(tokenizer))
        return _kind_of_file(file).rule(file)
    kind = _kind_of_object(tokenizer)
    return LONGEST if kind is None else kind.rule(tokenizer)


def text_codec(tokenizer: Any) -> TextCodec:
    """The codec of a tokenizer as `byte_table` takes it, if it can encode.

    `tokenizers`-based ones are copied as they are now, so that no setting of the user's object is touched, and encode
    through `fastokens` where that is installed and gives the same ids on a sample of odd text (`ODD_TEXTS` and the
    tokenizer's added tokens), checked once here; a difference is a warning that names the text, and `tokenizers` is
    used.

    Raises:
        UnsupportedTokenizerError: nothing here can encode (a `ByteTable`, a GGUF file, a bare vocabulary), the package
            that can is missing, or the file is damaged.
        FileNotFoundError: a path that does not exist.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        path = _existing(tokenizer)
        file = _file_of(path)
        return _kind_of_file(file).codec(file, _vocabulary_of_path(path) if path.is_dir() else None)
    kind = _kind_of_object(tokenizer)
    if kind is None:
        raise UnsupportedTokenizerError(
            f"a {type(tokenizer).__name__} cannot encode text: give the Aligner the teacher's tokenizer itself"
        )
    return kind.codec(tokenizer, None)


# ---- which kind ----------------------------------------------------------------------------------------------------


def _kind_of_object(tokenizer: Any) -> Kind | None:
    packages = packages_of(tokenizer)
    return next((kind for kind in KINDS if packages & kind.packages), None)


def _kind_of_file(file: File) -> Kind:
    for kind in _named_as(file.path):
        if kind.is_file(file):
            return kind
    if file.path.name.endswith(".json"):
        raise UnsupportedTokenizerError(
            f"{file.path}: neither a tokenizer.json (keys model, decoder) nor a tekken.json (keys config, vocab)"
        )
    raise UnsupportedTokenizerError(
        f"{file.path}: unknown kind of file; known are {', '.join(_patterns())} and directories that hold one of them"
    )


def _named_as(path: Path) -> Iterator[Kind]:
    """The kinds whose files have such a name."""
    return (kind for kind in KINDS if re.fullmatch(kind.name, path.name))


def _patterns() -> Iterator[str]:
    return chain.from_iterable(kind.in_directory for kind in KINDS)


def _existing(path: str | os.PathLike[str]) -> Path:
    if not os.path.exists(path):  # unlike Path.exists, also for a name that is too long or empty
        raise FileNotFoundError(
            f"{path}: no such file or directory; a tokenizer on a hub must be loaded first, e.g. with "
            "transformers.AutoTokenizer.from_pretrained, and passed as an object"
        )
    if (problem := obstacle(Path(path), inside=True)) is not None:
        raise UnsupportedTokenizerError(problem)
    return Path(path)


def _file_of(path: Path) -> File:
    return File(file_in(path, _patterns()) if path.is_dir() else path)


def _vocabulary_of_path(path: Path) -> Vocabulary:
    file = _file_of(path)
    vocabulary = _kind_of_file(file).vocabulary(file)
    return with_beside(vocabulary, path) if path.is_dir() else vocabulary


# ---- tables on disk ------------------------------------------------------------------------------------------------


def _cached(content: Callable[[], Iterable[Any] | None], read: Callable[[], ByteTable]) -> ByteTable:
    """A table from the disk cache, by all the content that determines it; else read, and kept there."""
    if cache.directory() is None or (parts := content()) is None:
        return read()
    key = cache.key(chain(_readers(), parts))
    table = cache.load(key)
    if table is None:
        table = read()
        if cache.key(chain(_readers(), content() or ())) == key:  # not if the file has changed meanwhile
            cache.store(key, table)
    return table


@lru_cache(None)
def _readers() -> list[bytes]:
    """The code that reads: it is part of every key, so that no table outlives a change of it."""
    code = []
    with suppress(OSError):  # a package inside an archive
        code += [module.read_bytes() for module in sorted(Path(__file__).parent.glob("*.py"))]
    return [_core.__version__.encode(), *code]


def _contents(path: Path) -> Iterator[Any]:
    """What determines the table of a path: which reader it has, by its name, and all the bytes that one reads."""
    if path.is_dir():
        yield from _contents(_file_of(path).path)
        for file in BESIDE:
            yield b"+" + (path / file).read_bytes() if (path / file).exists() else b""
        return
    yield path.name.encode()
    for kind in _named_as(path):
        yield from kind.content(File(path)) or ()
        return

"""tiktoken: `tiktoken.Encoding`, and files of base64 tokens and ranks (`*.tiktoken`, Llama 3's `tokenizer.model`)."""

from __future__ import annotations

import gzip
import importlib
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from xtokmap.tokenizers.base import (
    MODEL_NAME,
    RANKED,
    Cuts,
    Kind,
    Lists,
    Rule,
    TextCodec,
    Vocabulary,
    bare,
    say_missing,
)
from xtokmap.tokenizers.parse import File, reading, unbase64

__all__: list[str] = []


_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s")


def is_tiktoken(file: File) -> bool:
    """Whether a file holds ranks: by its first line, where it is called `*.model` as Llama 3 and Kimi name theirs."""
    return re.fullmatch(MODEL_NAME, file.path.name) is None or _LINE.match(file.head) is not None


def vocabulary(source: Any) -> Vocabulary:
    """The bytes of every rank; a bare file has no special tokens."""
    return _of_file(source.path) if isinstance(source, File) else _of_encoding(source)


def _of_encoding(encoding: Any) -> Vocabulary:
    special = {encoding.encode_single_token(name): name for name in encoding.special_tokens_set}
    ordinary = [i for i in range(encoding.n_vocab) if i not in special]
    decode = encoding.decode_single_token_bytes
    try:
        return Vocabulary(dict(zip(ordinary, map(decode, ordinary), strict=True)), special)
    except KeyError:  # a hole in the ranks
        pass
    tokens = {}
    for i in ordinary:
        with suppress(KeyError):
            tokens[i] = decode(i)
    return Vocabulary(tokens, special)


#: Bytes; the largest known file has 4 million.
_UNPACKED_LIMIT = 1 << 26
#: Every byte but those that stand between the token and the rank of a line, and between lines.
_NO_SEPARATORS = bytes(set(range(256)) - set(b" \n"))


def _of_file(path: Path) -> Vocabulary:
    data = path.read_bytes()
    with reading(path, ".tiktoken file (lines of base64 token and rank)"):
        if path.name.endswith(".gz"):
            with gzip.open(path) as file:
                data = file.read(_UNPACKED_LIMIT + 1)
            if len(data) > _UNPACKED_LIMIT:
                raise ValueError(f"more than {_UNPACKED_LIMIT} bytes when unpacked")
        fields = data.split()
        if data.translate(None, delete=_NO_SEPARATORS) != b" \n" * (len(fields) // 2):
            rows = [line.split() for line in data.splitlines() if line]
            fields = [field for token, rank in rows for field in (token, rank)]
        tokens = dict(zip(map(int, fields[1::2]), map(unbase64, fields[::2]), strict=True))
        if 2 * len(tokens) < len(fields) or min(tokens) < 0:
            raise ValueError("a rank is negative or there twice; ranks are token ids from 0")
    return Vocabulary(tokens, {})


def rule(source: Any) -> Rule:
    """Ranks are merges; where a text is cut only an encoding knows, by its pattern."""
    return Rule("bpe", RANKED, None if isinstance(source, File) else pattern_cuts(source._pat_str))


def pattern_cuts(pattern: str) -> Cuts | None:
    """Cuts at the matches of a tiktoken pattern."""
    try:
        regex = importlib.import_module("regex")
    except ImportError:
        say_missing("regex", "what the tokenizer's pattern keeps apart is not known, and two tokens may pass for one")
        return None
    find = regex.compile(pattern).finditer
    return lambda text: {end for match in find(text) for end in match.span()} - {0, len(text)}


def codec(source: Any, directory: Vocabulary | None = None) -> TextCodec:
    """An encoding's own encoder."""
    if isinstance(source, File):
        raise bare(source)
    return Lists(source.encode_ordinary_batch)


KIND = Kind(
    vocabulary,
    rule,
    codec,
    packages=frozenset({"tiktoken"}),
    name=rf".*\.tiktoken(\.gz)?|{MODEL_NAME}",
    is_file=is_tiktoken,
    in_directory=("*.tiktoken*",),
)

"""Parsing the files of tokenizers: whatever damage there is becomes the one error that names the file."""

from __future__ import annotations

import base64
import binascii
import gzip
import json
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from xtokmap import _core
from xtokmap._core import UnsupportedTokenizerError

__all__: list[str] = []


class File:
    """A tokenizer's file, parsed once, whichever kinds look whether it is theirs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def head(self) -> bytes:
        """Its first bytes."""
        with self.path.open("rb") as file:
            return file.read(1024)

    @cached_property
    def json(self) -> dict[str, Any]:
        """What is in a JSON file, without the merges of a tokenizer.json."""
        return load_json(self.path)


#: What parsers raise on a damaged file. Not OSError: no permission, or no disk, is no damage.
DAMAGE = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, RecursionError, TypeError, ValueError),
    *(gzip.BadGzipFile, struct.error, zlib.error),
)


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Whatever a damaged file makes its parser raise becomes the one error that names the file."""
    try:
        yield
    except UnsupportedTokenizerError as error:
        raise UnsupportedTokenizerError(f"{path}: {error}") from None
    except DAMAGE as error:
        raise UnsupportedTokenizerError(
            f"{path}: not a readable {kind} ({type(error).__name__}: {error}); fetch the file again"
        ) from None


def loaded(path: Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # whatever each package raises: bare Exception, RuntimeError, AssertionError
        raise UnsupportedTokenizerError(
            f"{path}: cannot be loaded ({type(error).__name__}: {error}); fetch the file again"
        ) from None


def load_json(path: Path) -> dict[str, Any]:
    with reading(path, "JSON file"):
        spec = parsed(path.read_bytes())
        if not isinstance(spec, dict):
            raise TypeError(f"expected an object, got {type(spec).__name__}")
    return spec


def parsed(text: bytes) -> Any:
    """`json.loads` for a tokenizer.json: its vocabulary a few times faster, its merges, most of the file, left out."""
    text = _without_merges(text)
    for start in _values(text, b"vocab", b"{"):
        found = _core.json_ids(text, start)
        if found is None:
            continue
        names, ids, end = found
        spec = json.loads(b"%b%b%b" % (text[:start], json.dumps(_ELSEWHERE).encode(), text[end:]))
        model = spec.get("model") if isinstance(spec, dict) else None
        if isinstance(model, dict) and model.get("vocab") == _ELSEWHERE:
            model["vocab"] = dict(zip(names, ids, strict=True))
            return spec
        break
    return json.loads(text)


#: Stands in for a vocabulary that is read apart.
_ELSEWHERE = "xtokmap: read apart"


def _without_merges(text: bytes) -> bytes:
    for start in _values(text, b"merges", b"["):
        end = _core.json_strings_end(text, start)
        if end is not None:
            return b"%b[]%b" % (text[:start], text[end:])
    return text


def _values(text: bytes, key: bytes, bracket: bytes) -> Iterator[int]:
    """Where in a JSON text a key's value starts, if that starts with a bracket."""
    value = re.compile(rb'"%b"\s*:\s*(?=%b)' % (key, re.escape(bracket)))
    at = -1
    while (at := text.find(b'"%b"' % key, at + 1)) >= 0:
        found = value.match(text, at)
        if found and text[at - 1 : at] != b"\\":  # behind a backslash it is the end of a longer key
            yield found.end()


def integers(values: Iterable[Any]) -> list[int]:
    """Ids out of JSON, where 1.0, true and "1" are something else."""
    ids = list(values)
    if set(map(type, ids)) <= {int}:
        return ids
    for i in ids:
        if type(i) is not int:
            raise TypeError(f"expected an integer, got {i!r}")
    return ids


if sys.version_info >= (3, 11):
    #: base64.b64decode(validate=True), without the Python that it puts around every token.
    unbase64 = partial(binascii.a2b_base64, strict_mode=True)
else:
    unbase64 = partial(base64.b64decode, validate=True)

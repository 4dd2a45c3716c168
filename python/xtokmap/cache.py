"""Byte tables on disk, so that a vocabulary is read from its file once.

A table is kept under a digest of all the content that determines it and of the code that reads it: another content, or
another version of the code, is another file. Only raw arrays are stored, with a digest over them; a file that does not
hold exactly what was written is passed over and written again. Files are written under another name and renamed, so any
number of processes may share a directory. Nothing is ever removed; the directory can be deleted at any time.

The directory is `byte-tables` in `$XTOKMAP_CACHE`, or else in `xtokmap` in `$XDG_CACHE_HOME` or `~/.cache`.
`XTOKMAP_CACHE=0` (or `off`) means none.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from xtokmap._core import ByteTable

#: Part of every key: raise it when the layout of a file changes.
_FORMAT = 2
_MAGIC = b"xtokmap byte table\n"
#: Ids, bytes, stop ids, byte pieces, and the place of `invalid` among these; the arrays follow, the arena last.
_HEADER = struct.Struct("<QQQQB")
_INVALID = ("maximal", "each", "run")
_DIGEST = hashlib.sha256().digest_size


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write under; what is there at the end takes its place, so that no half file has it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    yield part
    part.replace(path)


def key(parts: Iterable[bytes]) -> str:
    """A name for the table that is made of these contents, in this order."""
    digest = hashlib.sha256(b"%b%d" % (_MAGIC, _FORMAT))
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def directory() -> Path | None:
    """Where tables are kept; None where they are not."""
    setting = os.environ.get("XTOKMAP_CACHE", "")
    if setting.lower() in ("0", "off"):
        return None
    if setting:
        return Path(setting) / "byte-tables"
    try:
        return user_folder() / "byte-tables"
    except RuntimeError:  # no home
        return None


def user_folder() -> Path:
    """`xtokmap` in the user's cache: `$XDG_CACHE_HOME`, or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xtokmap"


def load(name: str) -> ByteTable | None:
    """The table that `store` has kept under a key; None where there is none, or none that is whole."""
    where = directory()
    if where is None:
        return None
    try:
        data = (where / name).read_bytes()
    except (OSError, ValueError):  # also a directory that is no path
        return None
    start = len(_MAGIC) + _DIGEST
    if data[:start] != _MAGIC + _digest(name, data[start:]):
        return None
    try:
        ids, size, stops, pieces, invalid = _HEADER.unpack_from(data, start)
        start += _HEADER.size
        arrays = []
        for dtype, count in (("<u4", ids + 1), ("?", ids), ("<u4", stops), ("<u4", pieces), ("u1", size)):
            arrays.append(np.frombuffer(data, dtype, count, start))
            start += arrays[-1].nbytes
        offsets, special, stop_ids, byte_pieces, arena = arrays
        native = [array.astype(np.uint32) for array in (offsets, stop_ids, byte_pieces)]  # in order and aligned
        return ByteTable.from_arrays(arena, native[0], special, native[1], _INVALID[invalid], native[2])
    except (ValueError, IndexError, struct.error):  # signed, and yet no table: of another format
        return None


def store(name: str, table: ByteTable) -> None:
    """Keeps a table under a key, if that can be done."""
    where = directory()
    if where is None:
        return
    arena, offsets, special, stop_ids, invalid, byte_pieces = table.to_arrays()
    header = _HEADER.pack(len(table), arena.size, stop_ids.size, byte_pieces.size, _INVALID.index(invalid))
    little = (offsets.astype("<u4"), special, stop_ids.astype("<u4"), byte_pieces.astype("<u4"), arena)
    body = b"".join([header, *(array.tobytes() for array in little)])
    with suppress(OSError, ValueError):
        where.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f"{name[:16]}-", suffix=".part", dir=where)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(b"".join([_MAGIC, _digest(name, body), body]))
            Path(temporary).replace(where / name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _digest(name: str, body: bytes) -> bytes:
    digest = hashlib.sha256(name.encode())
    digest.update(body)
    return digest.digest()

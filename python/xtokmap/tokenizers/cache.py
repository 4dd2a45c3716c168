"""Byte tables on disk, so that a vocabulary is read from its file once.

A table is kept under a digest of all the content that determines it and of the code that reads it: another content, or
another version of the code, is another file. Only raw arrays are stored, with a digest over them; a file that does not
hold exactly what was written is passed over and written again. Files are written under another name and renamed, so any
number of processes may share a directory. Nothing is ever removed; the directory can be deleted at any time.

The directory is `byte-tables` in `$XTOKMAP_CACHE`, or else in `xtokmap` in `$XDG_CACHE_HOME` or `~/.cache`.
`XTOKMAP_CACHE=0` (or `no`, `off`, `false`) means none.

Whoever can write a table can say what a token spells. Tables are taken only from a directory that is this user's own
and that nobody else may write to, nor to the folder above it; else there is no cache, and a warning says so once.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import numpy as np

from xtokmap._core import ROLES, ByteTable

#: Part of every key: raise it when the layout of a file changes.
_FORMAT = 3
_MAGIC = b"xtokmap byte table\n"
#: Ids, bytes, stop ids, byte pieces, numbers of markers, and the place of `invalid` among these; the arrays follow, the
#: arena last.
_HEADER = struct.Struct("<QQQQQB")
_INVALID = ("maximal", "each", "run")
_DIGEST = hashlib.sha256().digest_size


def key(parts: Iterable[bytes]) -> str:
    """A name for the table that is made of these contents, in this order."""
    digest = hashlib.sha256(b"%b%d" % (_MAGIC, _FORMAT))
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


#: Values of `XTOKMAP_CACHE` that mean: none.
_OFF = ("0", "no", "off", "false")


def directory() -> Path | None:
    """Where tables are kept; None where they are not."""
    try:
        if os.environ.get("XTOKMAP_CACHE", "").lower() in _OFF:
            return None
        return folder() / "byte-tables"
    except RuntimeError:  # no home
        return None


def folder() -> Path:
    """`$XTOKMAP_CACHE`, if it is a folder's name, else `xtokmap` in the user's cache (`$XDG_CACHE_HOME`, `~/.cache`).

    Raises:
        RuntimeError: there is no home.
    """
    setting = os.environ.get("XTOKMAP_CACHE", "")
    if setting.lower() in ("", *_OFF):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xtokmap"
    return Path(setting).expanduser()


_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def _distrusted(status: os.stat_result) -> str | None:
    """Why what is in a file or a directory may be somebody else's; None where only this user can have written it."""
    if not hasattr(os, "geteuid"):  # Windows: a user's folders are the user's
        return None
    if status.st_uid != os.geteuid():
        return f"it is user {status.st_uid}'s, not {os.geteuid()}'s"
    if status.st_mode & _OTHERS:
        return "others may write to it"
    return None


@lru_cache(None)
def _say(path: Path, why: str) -> None:
    """Once for every reason."""
    warnings.warn(
        f"{path}: {why}, so that no byte tables are kept there or taken from there; chmod go-w it if it is yours, or "
        "set XTOKMAP_CACHE to a folder of your own (0: no cache)",
        stacklevel=7,
    )


@contextmanager
def _opened(where: Path) -> Iterator[int | None]:
    """A handle of the directory, for what is in it: nobody can put another one there after it was looked at.

    None where there are no such handles (Windows).

    Raises:
        PermissionError: others may write to it; said.
    """
    above = where.parent.stat().st_mode
    if (
        hasattr(os, "geteuid") and above & _OTHERS and not above & stat.S_ISVTX
    ):  # in one as /tmp is, none moves another's
        _say(where.parent, "others may write to it")
        raise PermissionError
    if os.open not in os.supports_dir_fd:
        yield None
        return
    handle = os.open(where, os.O_RDONLY | os.O_DIRECTORY)
    try:
        why = _distrusted(os.fstat(handle))
        if why is not None:
            _say(where, why)
            raise PermissionError
        yield handle
    finally:
        os.close(handle)


def load(name: str) -> ByteTable | None:
    """The table that `store` has kept under a key; None where there is none, or none that is whole."""
    where = directory()
    if where is None:
        return None
    try:
        with _opened(where) as inside:
            data = _read(where, name, inside)
    except (OSError, ValueError):  # also a directory that is no path
        return None
    start = len(_MAGIC) + _DIGEST
    if data[:start] != _MAGIC + _digest(name, data[start:]):
        return None
    try:
        ids, size, stops, pieces, numbers, invalid = _HEADER.unpack_from(data, start)
        start += _HEADER.size
        arrays = []
        counts = (("<u4", ids + 1), ("?", ids), ("<u4", stops), ("<u4", pieces), ("<u4", numbers), ("u1", size))
        for dtype, count in counts:
            arrays.append(np.frombuffer(data, dtype, count, start))
            start += arrays[-1].nbytes
        offsets, special, stop_ids, byte_pieces, marked, arena = arrays
        native = [array.astype(np.uint32) for array in (offsets, stop_ids, byte_pieces)]  # in order and aligned
        markers = _markers_of(marked.tolist())
        return ByteTable.from_arrays(arena, native[0], special, native[1], _INVALID[invalid], native[2], markers)
    except (ValueError, IndexError, struct.error):  # signed, and yet no table: of another format
        return None


def store(name: str, table: ByteTable) -> None:
    """Keeps a table under a key, if that can be done."""
    where = directory()
    if where is None:
        return
    arena, offsets, special, stop_ids, invalid, byte_pieces, markers = table.to_arrays()
    # A marker after the other: its role, how many ids it has, and these.
    marked = np.asarray([n for role, ids in markers for n in (ROLES.index(role), len(ids), *ids)], "<u4")
    sizes = (len(table), arena.size, stop_ids.size, byte_pieces.size, marked.size)
    header = _HEADER.pack(*sizes, _INVALID.index(invalid))
    little = (offsets.astype("<u4"), special, stop_ids.astype("<u4"), byte_pieces.astype("<u4"), marked, arena)
    body = b"".join([header, *(array.tobytes() for array in little)])
    with suppress(OSError, ValueError):
        where.parent.parent.mkdir(parents=True, exist_ok=True)
        for made in (where.parent, where):
            made.mkdir(mode=0o700, exist_ok=True)
        with _opened(where):
            handle, temporary = tempfile.mkstemp(prefix=f"{name[:16]}-", suffix=".part", dir=where)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(b"".join([_MAGIC, _digest(name, body), body]))
                Path(temporary).replace(where / name)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise


def _markers_of(numbers: list[int]) -> list[tuple[str, list[int]]]:
    markers = []
    while numbers:
        role, count, *numbers = numbers
        markers.append((ROLES[role], numbers[:count]))
        numbers = numbers[count:]
    return markers


def _read(where: Path, name: str, inside: int | None) -> bytes:
    """A table's file: no link, and this user's own."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(name if inside is not None else where / name, flags, dir_fd=inside), "rb") as file:
        status = os.fstat(file.fileno())
        why = _distrusted(status)
        if why is not None:
            _say(where / name, why)
        return b"" if why is not None or not stat.S_ISREG(status.st_mode) else file.read()


def _digest(name: str, body: bytes) -> bytes:
    digest = hashlib.sha256(name.encode())
    digest.update(body)
    return digest.digest()

"""Files: none that may never end is waited for, none is left half written, and a folder has one run at a time."""

from __future__ import annotations

import os
import stat
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from xtokmap._core import XTokMapError

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

#: What a shell makes of `<(command)`, and standard input: open already, and somebody is at the other end.
_OPEN_ALREADY = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")


def obstacle(path: Path, *, inside: bool = False) -> str | None:
    """Why a path is not opened: it may never end, or (`inside` a folder) a file in it may not; else None."""
    try:
        kind = _KINDS.get(stat.S_IFMT(path.stat().st_mode))
        if kind is not None:
            return f"{path}: is {kind}, not a file; it is not waited for: copy what it gives to a file"
        for entry in sorted(path.iterdir()) if inside and path.is_dir() else ():
            with suppress(OSError):  # a link to nothing
                kind = _KINDS.get(stat.S_IFMT(entry.stat().st_mode))
                if kind is not None:
                    return f"{entry}: is {kind}, not a file; it is not waited for: take it out of the folder"
    except (OSError, ValueError):  # whoever opens it says what is wrong
        pass
    return None


def read_text(path: Path) -> str:
    """A file's text as it is, line ends and all; also that of `<(command)` and of /dev/stdin.

    Raises:
        XTokMapError: not UTF-8, no name that a file can have, or no file but what may never end.
        OSError: it cannot be read.
    """
    check_name(str(path), repr(str(path)))
    if not str(path).startswith(_OPEN_ALREADY) and (problem := obstacle(path)) is not None:
        raise XTokMapError(problem)
    return decoded(path.read_bytes(), path)


def decoded(data: bytes, source: object, advice: str = "") -> str:
    """Bytes as text; `advice` is what to do where they are none.

    Raises:
        XTokMapError: they are not UTF-8, by place.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise XTokMapError(f"{source}: not UTF-8 at byte {error.start}{advice}") from None


def check_text(text: str, what: str) -> None:
    r"""Refuses half of a surrogate pair, which JSON can spell (`"\ud800"`) and no encoding of text can hold.

    Args:
        text: of a user.
        what: it is, and where.

    Raises:
        XTokMapError: by place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise XTokMapError(
            f"{what}: character {error.start} is U+{half:04X}, half of a surrogate pair, which UTF-8 cannot hold; "
            "take it out, or write the whole character"
        ) from None


def check_name(name: str, what: str) -> None:
    """Refuses what no path, model or address can be called: text with NUL in it, or what `check_text` refuses.

    Raises:
        XTokMapError: by place.
    """
    check_text(name, what)
    if "\0" in name:
        raise XTokMapError(f"{what}: character {name.index(chr(0))} is NUL, which no name can have; take it out")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write under; what is there at the end takes its place, so that no half file has it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    yield part
    part.replace(path)


# ---- one run in a folder -----------------------------------------------------------------------------------------

#: The file that the process has locked which works in a folder; what it says is for whoever is refused.
LOCK = ".lock"

#: Where Windows locks a byte: beyond what the file says, which others could not read otherwise.
_BEYOND = 1 << 30

_held: set[int] = set()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps every other run out of a folder, which is made, until this one ends, however it ends.

    The lock is the system's, so that a process that dies leaves none behind; nor does a child that it has forked have
    it. Two threads of a process have a lock each. Between machines it holds where the file system has locks between
    machines (NFS from version 4 on); where it has none, or another machine's run seems not to have ended, a warning
    says so.

    Raises:
        XTokMapError: another run has it: which, and since when.
        OSError: the folder cannot be made or written to.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    handle = _take(path, folder)
    try:
        yield
    finally:
        with suppress(OSError):
            if os.name == "posix":  # while it is locked: nobody takes a file that is about to go
                path.unlink()
        _held.discard(handle)
        os.close(handle)
        if made:
            with suppress(OSError):  # a run that has left nothing
                folder.rmdir()


def in_use(folder: Path) -> bool:
    """Whether a run is at work in a folder; nothing is touched."""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return False
    try:
        return _locked(handle) is False
    finally:
        os.close(handle)


def _take(path: Path, folder: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    while True:
        handle = os.open(path, flags, 0o644)
        try:
            locked = _locked(handle)
            said = os.read(handle, 1000).decode(errors="replace")
            if locked is False:
                raise XTokMapError(
                    f"{folder}: another run is at work in it ({said.strip() or 'it has not said which'}); wait for its "
                    "end or stop it, or use another output"
                )
            if os.name == "posix" and not _is_still(handle, path):
                os.close(handle)
                continue
            import socket  # which nothing but a run needs

            here = socket.gethostname()
            if locked is None:
                warnings.warn(f"{folder}: nothing keeps a second run out: its file system has no locks", stacklevel=5)
            elif said and f" on {here}, " not in said:
                warnings.warn(
                    f"{folder}: the run before did not end as it should ({said.strip()}); if it is still at work "
                    "there, stop one of the two: not every file system has locks between machines",
                    stacklevel=5,
                )
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            started = time.strftime("%Y-%m-%d %H:%M:%S %z")
            os.write(handle, f"process {os.getpid()} on {here}, since {started}\n".encode())
        except BaseException:
            with suppress(OSError):
                os.close(handle)
            raise
        _held.add(handle)
        return handle


def _is_still(handle: int, path: Path) -> bool:
    """Whether the file that was opened is there: a run that ends takes its own away."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _locked(handle: int) -> bool | None:
    """Whether the lock was free, and is taken; None where there are no locks."""
    try:
        import fcntl
    except ImportError:
        return _locked_on_windows(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK, EOPNOTSUPP, ENOSYS: of some file systems on a network
        return None
    return True


def _locked_on_windows(handle: int) -> bool | None:
    try:
        import msvcrt
    except ImportError:
        return None
    os.lseek(handle, _BEYOND, os.SEEK_SET)
    try:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
    except OSError:
        return False
    finally:
        os.lseek(handle, 0, os.SEEK_SET)
    return True


def _let_go() -> None:
    """In a forked child: the parent's locks stay with the parent, and end with it."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)

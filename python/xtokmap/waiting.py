"""What is said while something takes long."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Seconds after which a wait is named, and after which it is named again.
_FIRST, _AGAIN = 2.0, 10.0


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says on stderr what is waited for, if it takes more than two seconds, and from then on that it still is."""
    done, start = threading.Event(), time.monotonic()

    def say() -> None:
        pause = _FIRST
        while not done.wait(pause):
            print(f"{what}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
            pause = _AGAIN

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()

"""Experiment trackers, by a flag: the lines of `metrics.jsonl`, sent to one as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from xtokmap._core import XTokMapError

#: What is there to choose from, each a package with `init`, `log` and `finish`.
TRACKERS = ("trackio", "wandb")


@contextmanager
def tracker(name: str, run: str, config: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes a step's line; one that does nothing where no tracker is named.

    Args:
        name: one of `TRACKERS`, or "".
        run: the run's name.
        config: of the run.

    Raises:
        XTokMapError: the package is not installed.
    """
    if not name:
        yield lambda line: None
        return
    try:
        package = import_module(name)
    except ImportError:
        raise XTokMapError(f"track={name!r}: the package is not installed; pip install {name}") from None
    package.init(project="xtokmap", name=run, config=config)

    def log(line: dict[str, Any]) -> None:
        figures = flat(line)
        package.log(figures, step=figures.pop("step"))  # trackio keeps the name for itself

    try:
        yield log
    finally:
        package.finish()


def flat(line: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line, those of its parts as `part/name`; its warnings as their number."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}/")
        elif name == "warnings":
            found["warnings"] = len(value)
        elif isinstance(value, int | float):
            found[prefix + name] = value
    return found

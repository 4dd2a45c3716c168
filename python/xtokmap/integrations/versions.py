"""Whether an engine is the one that its module here was written for: hooks that are private change without a word."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from xtokmap._core import XTokMapError

__all__ = ["UnsupportedVersionError"]


class UnsupportedVersionError(XTokMapError):
    """The installed engine has other hooks than those that are used here."""


class Hook(NamedTuple):
    """A method that is used.

    Attributes:
        owner: its class or module.
        name: of the method.
        parameters: the names of its parameters as they are known here.
        overridden: whether it is overridden here, and so called by the engine with all its parameters; otherwise it is
            called from here, and may have more of them that need not be given.
    """

    owner: Any
    name: str
    parameters: str
    overridden: bool = True


def check_hooks(package: str, known: str, hooks: Iterable[Hook]) -> None:
    """Compares the hooks' signatures with those of the installed package.

    Args:
        package: its name.
        known: the versions that are known to fit.
        hooks: which to compare.

    Raises:
        UnsupportedVersionError: a hook is missing or has other parameters: which, what was expected and what was found.
    """
    for hook in hooks:
        function = getattr(hook.owner, hook.name, None)
        expected = hook.parameters.split()
        where = f"{hook.owner.__name__}.{hook.name}"
        if function is None:
            raise unsupported(package, known, f"there is no {where}")
        parameters = inspect.signature(function).parameters
        more = list(parameters.values())[len(expected) :]
        needed = more if hook.overridden else [p for p in more if p.default is p.empty]
        if list(parameters)[: len(expected)] != expected or needed:
            raise unsupported(package, known, f"{where} takes ({', '.join(parameters)}), not ({', '.join(expected)})")


def unsupported(package: str, known: str, found: str) -> UnsupportedVersionError:
    """The error, with what was found."""
    try:
        installed = version(package)
    except PackageNotFoundError:
        installed = "of unknown version"
    return UnsupportedVersionError(
        f"{package} {installed} is installed, which this version of xtokmap does not fit into: {found}; it was written "
        f"for {package} {known}: pip install '{package}=={known}'"
    )

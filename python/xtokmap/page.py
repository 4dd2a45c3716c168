"""The report of a run as a page."""

from pathlib import Path


def write(folder: Path) -> None:
    """Nothing yet."""

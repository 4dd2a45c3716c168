"""Forks of a process that aligns, in every way that Python has: nothing hangs, and every answer is right."""

from __future__ import annotations

import os
import sys

import pytest

from test_threads import run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")


def test_fork_after_use() -> None:
    assert run("fork_after_use", RAYON_NUM_THREADS="3") == 2


@pytest.mark.parametrize("forks", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_fork_while_other_threads_align(forks: int) -> None:
    assert run("fork_during_use", forks, seconds=forks) == forks


@pytest.mark.parametrize("forks", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_fork_while_other_threads_align_for_the_first_time(forks: int) -> None:
    assert run("fork_during_first_use", forks, seconds=forks) == forks


def test_forks_of_forks() -> None:
    assert run("fork_of_forks") == 6


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method: str) -> None:
    assert run("pools", method) == 6


def test_workers_of_a_data_loader() -> None:
    pytest.importorskip("torch")
    assert run("data_loader", RAYON_NUM_THREADS="2") == 8


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_fork_has_as_many_threads_as_its_parent_was_told() -> None:
    for threads in ("2", "5"):
        # OpenBLAS starts threads of its own again in a fork.
        assert run("threads_of_a_fork", RAYON_NUM_THREADS=threads, OPENBLAS_NUM_THREADS="1") >= int(threads)

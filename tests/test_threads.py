"""Many threads on one aligner: nothing hangs, and every answer is the one of a single thread."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import together
from xtokmap import ByteTable, XTokMapError, _core

HERE = Path(__file__).parent


def run(name: str, *arguments: object, seconds: float = 0, **environment: str) -> Any:
    """What a function of `together` gives in a process of its own, which may hang."""
    # The stacks of all threads come first, then the end; a fork has its own alarm.
    code = f"import faulthandler; faulthandler.dump_traceback_later({seconds + 2 * together.HANGS}, exit=True)\n"
    code = code if name == "threads" else ""
    code += "import together; together.main()"
    if name == "pools":
        code = "if __name__ == '__main__':\n import together; together.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, name, *map(str, arguments)],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]), **environment},
        capture_output=True,
        text=True,
        timeout=seconds + 3 * together.HANGS,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("seconds", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("threads", [2, 8, 16])
def test_one_aligner_in_many_threads(threads: int, seconds: int) -> None:
    counts = run("threads", threads, seconds, seconds=seconds, RAYON_NUM_THREADS="3")
    assert counts.keys() == together.CALLS.keys()


def test_an_interrupt_comes_after_the_call_and_leaves_everything_usable() -> None:
    assert run("interrupted") == 1


def test_4096_threads_are_no_more_than_help() -> None:
    al = together.aligner()
    assert together.align_batch(al, 4096) == together.answers()["align_batch"]
    together.check(al)


# ---- bugs of the core --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [None, 1, 2])
def test_a_panic_is_an_error_that_says_bug(threads: int | None, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(XTokMapError) as raised:
        _core._fail(threads)
    said = (
        r"bug in xtokmap: asked to fail \(rust/python/mod\.rs:\d+\); please report it with the arguments that led to it"
    )
    assert re.fullmatch(said, str(raised.value))
    assert capfd.readouterr() == ("", "")
    # The pool goes on.
    together.check(together.aligner(), ["align_batch", "two threads"])


def test_every_function_of_the_core_catches_panics() -> None:
    source = "".join(path.read_text() for path in sorted((HERE.parent / "rust" / "python").glob("*.rs")))
    blocks = re.findall(r"^#\[pymethods\]\n(.*?)^\}", source, re.M | re.S)
    blocks += re.findall(r"^#\[pyfunction\]\n((?:[^\n]+\n)*?\})$", source, re.M)
    functions = [part for block in blocks for part in re.split(r"^(?=(?: +|pub\(super\) )?fn )", block, flags=re.M)[1:]]
    assert len(functions) > 35
    # These read a field.
    fields = {"__len__", "__repr__", "invalid", "same", "_forked"}
    bare = {re.match(r"(?: +|pub\(super\) )?fn (\w+)", f)[1] for f in functions if "caught(||" not in f}  # type: ignore[index]
    assert bare == fields


# ---- arrays of bool ----------------------------------------------------------------------------------------------


def test_a_table_whose_specials_are_other_bytes_is_read() -> None:
    table = ByteTable.from_bytes([b"a", None, b"b", None])
    arena, offsets, special, *rest = table.to_arrays()
    odd = (special.view(np.uint8) * 128).view(np.bool_)
    again = ByteTable.from_arrays(arena, offsets, odd, *rest)
    assert [again[k] for k in range(4)] == [table[k] for k in range(4)]
    assert again.is_special.view(np.uint8).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("true", [1, 2, 128, 255])
@pytest.mark.parametrize("made", ["numpy", "torch"])
def test_masks_whose_true_is_another_byte(true: int, made: str) -> None:
    al = together.aligner()
    student, teacher = (np.asarray([row[:20] for row in side[:3]]) for side in together.rows())
    plain = np.arange(60).reshape(3, 20) % 7 != 3
    want = al.align_batch(student, teacher, plain, plain)
    odd: Any = plain.astype(np.uint8) * true
    if made == "torch":
        torch = pytest.importorskip("torch")
        odd = torch.from_numpy(odd).view(torch.bool)
    else:
        odd = odd.view(np.bool_)
    got = al.align_batch(student, teacher, odd, odd)
    for name in ("student_chunk", "teacher_chunk", "student_cu", "chunk_cu", "kind"):
        assert getattr(got, name).tolist() == getattr(want, name).tolist()
    assert got.student_mask is not None
    assert got.student_mask.view(np.uint8).max() == 1
    assert [chunk.text for chunk in got[1]] == [chunk.text for chunk in want[1]]
    assert al.cover_queries(got).set.tolist() == al.cover_queries(want).set.tolist()
    ids, _ = al.retokenize(student, odd)
    assert [row.tolist() for row in ids] == [row.tolist() for row in al.retokenize(student, plain)[0]]
    if made == "numpy":
        # Nothing but 0 and 1 is ever read as bool by the core, whoever calls it.
        ids, others, layout = student.reshape(-1), teacher.reshape(-1), np.ascontiguousarray(odd)
        call = lambda: al._core.align_batch(ids, layout, others, layout, False, 1)  # noqa: E731
        if true == 1:
            assert len(call()) == 12
        else:
            with pytest.raises(TypeError, match="a mask whose True is another byte than 1"):
                call()


def test_masked_arrays_are_refused_by_name() -> None:
    al = together.aligner()
    ids = np.asarray([together.rows()[0][0][:8]])
    masked = np.ma.masked_array(ids, ids > 40)
    for call, name in (
        (lambda: al.align(masked[0], ids[0]), "student_ids"),
        (lambda: al.align_batch(ids, masked), "teacher_ids"),
        (lambda: al.align_batch([ids[0], masked[0]], [ids[0], ids[0]]), "student_ids[1]"),
        (lambda: al.align_batch(list(masked), list(ids)), "student_ids[0]"),
        (lambda: al.align_batch(ids, ids, masked > 0), "student_mask"),
        (lambda: al.retokenize(masked), "student_ids"),
    ):
        with pytest.raises(XTokMapError, match=rf"^{re.escape(name)}: a numpy\.ma masked array, .*getmaskarray"):
            call()

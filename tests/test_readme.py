"""The README's example does what the README says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_first_example_prints_what_stands_under_it():
    text = README.read_text(encoding="utf-8")
    code, output = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL).groups()
    assert len(code.strip().splitlines()) <= 12
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == output


def test_no_placeholder_is_left_and_every_file_named_exists():
    text = README.read_text(encoding="utf-8")
    assert not re.search(r"@[A-Z]+@", text)
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (README.parent / link).exists(), link


def test_the_laws_are_those_of_the_crate():
    crate = (README.parent / "rust" / "lib.rs").read_text(encoding="utf-8")
    laws = [line[4:] for line in crate.splitlines() if re.match(r"//! \d+\. ", line)]
    readme = README.read_text(encoding="utf-8")
    assert len(laws) == 10
    for law in laws:
        number = law.split(".")[0]
        words = re.sub(r"[`]", "", law).split()[:5]
        plain = " ".join(words).replace("OneToOne", "ONE_TO_ONE").replace("Rewritten", "REWRITTEN")
        assert re.search(rf"^{number}\. ", readme, re.MULTILINE)
        assert plain.replace("Stop", "STOP") in readme

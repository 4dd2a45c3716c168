"""README.md, docs/ and what stands beside them do what they say: code runs, names can be imported, files exist."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
names = [page.name for page in PAGES]

#: A block of Python, the line before it, and what it prints, if that stands under it. `<!-- not run: why -->` in that
#: line says why a block is not run; such a block must parse all the same, and what it imports must be there.
BLOCK = re.compile(r"(?:^|\n)([^\n]*)\n```python\n(.*?)\n```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.+ -->")


def blocks(page: Path) -> list[tuple[str, str, str | None]]:
    found = [match.groups() for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]
    return [(before, code, printed) for before, code, printed in found]


def test_every_block_of_python_is_found():
    for page in PAGES:
        assert len(blocks(page)) == page.read_text(encoding="utf-8").count("```python"), page.name


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_python_prints_what_stands_under_it(page):
    names: dict[str, Any] = {}
    for before, code, printed in blocks(page):
        compiled = compile(code, page.name, "exec")
        if NOT_RUN.fullmatch(before):
            imports = [node for node in ast.parse(code).body if isinstance(node, ast.Import | ast.ImportFrom)]
            exec(compile(ast.Module(imports, []), page.name, "exec"), {})
            assert printed is None
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compiled, names)
        assert output.getvalue() == (printed or "")


def test_prompts_that_are_shown_are_read(tmp_path):
    """Blocks of JSON show lines of a file of prompts."""
    read_prompts = importlib.import_module("xtokmap.train").read_prompts
    shown = [block for page in PAGES for block in re.findall(r"```json\n(.*?)```", page.read_text("utf-8"), re.DOTALL)]
    assert shown
    for block in shown:
        (tmp_path / "prompts.jsonl").write_text(block)
        assert sum(map(len, read_prompts(tmp_path / "prompts.jsonl"))) == len(block.splitlines())


def test_the_first_example_is_short():
    before, code, printed = blocks(README)[0]
    assert not NOT_RUN.fullmatch(before)
    assert printed is not None
    assert len(code.splitlines()) <= 12


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_no_placeholder_is_left_and_every_file_named_exists(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"@[A-Z]+@", text)
    for link, anchor in re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor[1:] in slugs, (link, anchor)


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_name_of_the_package_can_be_had(page):
    for name in set(re.findall(r"\bxtokmap(?:\.[A-Za-z_]\w*)+", page.read_text(encoding="utf-8"))):
        found: Any = importlib.import_module("xtokmap")
        for k, part in enumerate(name.split(".")[1:], 2):
            module = ".".join(name.split(".")[:k])
            try:
                importlib.import_module(module)
            except ImportError as error:
                if not (error.name or "xtokmap").startswith(
                    "xtokmap"
                ):  # what it plugs into is not here, but its file is
                    spec = importlib.util.find_spec(module)
                    assert spec is not None
                    assert spec.origin is not None
                    code = Path(spec.origin).read_text(encoding="utf-8")
                    names = re.findall(r"^(?:class|def) (\w+)", code, re.MULTILINE)
                    assert set(name.split(".")[k:]) <= set(names), name
                    break
            assert hasattr(found, part), name
            found = getattr(found, part)


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_file_of_the_repository_that_is_spoken_of_exists(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    folders = "benches|docs|examples|fuzz|python|rust|tests"
    for name in re.findall(rf"`(?:python )?((?:{folders})/[\w./-]*)[^`\n]*`", text):
        assert "NAME" in name or (ROOT / name).exists(), name


def test_the_citation_is_of_this_version():
    version = re.search(r'^version = "(.*)"', (ROOT / "Cargo.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    assert f"\nversion: {version[1]}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_laws_are_those_of_the_crate():
    crate = (ROOT / "rust" / "lib.rs").read_text(encoding="utf-8")
    laws = [line[4:] for line in crate.splitlines() if re.match(r"//! \d+\. ", line)]
    readme = README.read_text(encoding="utf-8")
    assert len(laws) == 10
    for law in laws:
        number = law.split(".")[0]
        words = re.sub(r"[`]", "", law).split()[:5]
        plain = " ".join(words).replace("OneToOne", "ONE_TO_ONE").replace("Rewritten", "REWRITTEN")
        assert re.search(rf"^{number}\. ", readme, re.MULTILINE)
        assert plain.replace("Stop", "STOP") in readme

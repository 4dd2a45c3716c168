"""The site of docs/: every page has its place, every link leads somewhere, and pictures show what the aligner says."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


lay_out, pictures = script("lay_out"), script("pictures")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The text of every page of the site; other files are empty here."""
    folder = tmp_path_factory.mktemp("pages")
    lay_out.lay_out(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") if path.suffix == ".md" else ""
        for path in files
    }


def test_every_page_is_in_the_navigation_and_the_other_way_round(pages: dict[str, str]) -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r": (\S+\.md)$", nav, re.MULTILINE)
    assert len(listed) == len(set(listed))
    own = {name for name in pages if name.endswith(".md") and not name.startswith(("results/", "examples/"))}
    assert set(listed) == own


def test_links_of_the_site_lead_somewhere(pages: dict[str, str]) -> None:
    seen = 0
    for name, text in pages.items():
        for link, anchor in re.findall(r"\]\(([^)#:\s]*)(#[^)\s]*)?\)", FENCE.sub("", text)):
            parts = [*name.split("/")[:-1], *link.split("/")] if link else name.split("/")
            while ".." in parts:
                at = parts.index("..")
                del parts[at - 1 : at + 1]
            target = "/".join(parts)
            assert target in pages, (name, link)
            seen += 1
            if anchor:
                titles = re.findall(r"^#+ (.*)$", FENCE.sub("", pages[target]), re.MULTILINE)
                assert anchor[1:] in {slug(title) for title in titles}, (name, link, anchor)
    assert seen > 50


def slug(title: str) -> str:
    """As Python-Markdown makes it; where GitHub makes another one, a link to it would work in one place only."""
    plain = re.sub(r"[^\w\s-]", "", title).strip().lower()
    of_markdown, of_github = re.sub(r"[-\s]+", "-", plain), plain.replace(" ", "-")
    return of_markdown if of_markdown == of_github else f"{of_markdown} and {of_github}"


def test_links_become_the_sites_own_and_code_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "x.md"
    page.parent.mkdir()
    monkeypatch.setattr(lay_out, "ROOT", tmp_path)
    monkeypatch.setattr(lay_out, "DOCS", page.parent)
    page.write_text(
        "[a](y.md#z) [y.md](y.md) [b](../rust) ![c](../benches/results/c.png)\n```\n[d](../rust)\n```\n[e](https://e.org/f)\n"
    )
    (page.parent / "y.md").write_text("# Why\n")
    text, linked = lay_out.page(page, "x.md")
    assert text == "[a](y.md#z) [Why](y.md) b ![c](results/c.png)\n```\n[d](../rust)\n```\n[e](https://e.org/f)\n"
    assert linked == [page.parent / "y.md", page.parent / "y.md", tmp_path / "benches" / "results" / "c.png"]


@pytest.mark.parametrize("part", lay_out.API)
def test_public_names_are_documented(part: str) -> None:
    module = pytest.importorskip(f"xtokmap{part}", exc_type=ImportError)
    names = lay_out.public(f"xtokmap{part}")
    assert names
    for name in names:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isfunction(thing) or inspect.isbuiltin(thing):
            assert thing.__doc__, name


def test_the_core_of_the_copy_has_signatures_and_docstrings(tmp_path: Path) -> None:
    lay_out.package(tmp_path)
    core = ast.parse((tmp_path / "xtokmap" / "_core.py").read_text(encoding="utf-8"))
    [table] = [node for node in core.body if isinstance(node, ast.ClassDef) and node.name == "ByteTable"]
    assert (ast.get_docstring(table) or "").startswith("The bytes of every token id")
    for node in table.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
            assert node.returns is not None
    config = (tmp_path / "xtokmap" / "train" / "config.py").read_text(encoding="utf-8")
    assert "\n    student: the model to train: a directory, a .gguf file, or a hub id\n" in config
    assert "\n    student: str = ''\n" in config
    assert (tmp_path / "xtokmap" / "torch" / "pair.py").exists()
    assert not list(tmp_path.rglob("*.so"))


def test_pictures_are_those_of_the_alignments() -> None:
    drawn = pictures.pictures()
    assert {path.name for path in (ROOT / "docs").glob("*.svg")} == set(drawn)
    for name, svg in drawn.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == svg, f"python docs/pictures.py writes {name} anew"

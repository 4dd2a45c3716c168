"""Lays the pages of the site out: docs/*.md as they are, and what they link to elsewhere in the repository.

`python docs/lay_out.py FOLDER` writes FOLDER/pages, which mkdocs.yml takes as docs_dir, and FOLDER/package, of which
the API is shown: the package, with a core in Python that has the compiled one's signatures and docstrings.

On GitHub the pages are read where they lie, so their links go to files of the repository. Here a link to a script or a
benchmark's report becomes one to a page that is made of it, and a link to other source becomes plain text: the site has
no address of the repository.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import xtokmap
from xtokmap.train import Config

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

PACKAGE = ROOT / "python"
FROM_ROOT = {ROOT / "CHANGELOG.md": "changes.md", ROOT / "CONTRIBUTING.md": "contributing.md"}

#: A page of the API for each; it has the module's docstring and what is in its `__all__`, in that order.
API = ["", ".chat", ".torch", ".losses", ".teachers", ".train", ".integrations.arrow", ".integrations.trl"]

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def place(path: Path) -> str | None:
    """Where a file of the repository lies in the site; None: not in it."""
    if path.parent == DOCS:
        return path.name
    if path in FROM_ROOT:
        return FROM_ROOT[path]
    if path.parent == ROOT / "benches" / "results" and path.suffix in (".md", ".png"):
        return f"results/{path.name}"
    if path.parent == ROOT / "examples" and path.suffix == ".py":
        return f"examples/{path.stem}.md"
    return None


def lay_out(folder: Path) -> list[Path]:
    """Write all pages and what they show; gives back the files of the repository that are in the site."""
    waiting = [*sorted(p for p in DOCS.iterdir() if p.suffix in (".md", ".css")), *FROM_ROOT]
    done: list[Path] = []
    while waiting:
        path = waiting.pop()
        where = place(path)
        if path in done or where is None:
            continue
        done.append(path)
        target = folder / where
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".py":
            target.write_text(f"# {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n", encoding="utf-8")
        elif path.suffix == ".md":
            text, linked = page(path, where)
            target.write_text(text, encoding="utf-8")
            waiting += linked
        else:
            shutil.copyfile(path, target)
    (folder / "api").mkdir(exist_ok=True)
    for name in API:
        (folder / "api" / f"xtokmap{name}.md").write_text(api(f"xtokmap{name}"), encoding="utf-8")
    return done


def package(folder: Path) -> None:
    """Copy the package, and put the docstrings of the compiled core into its stub."""
    shutil.copytree(PACKAGE / "xtokmap", folder / "xtokmap", ignore=shutil.ignore_patterns("_core*", "__pycache__"))
    stub = ast.parse((PACKAGE / "xtokmap" / "_core.pyi").read_text(encoding="utf-8"))
    _document(stub, xtokmap._core)
    (folder / "xtokmap" / "_core.py").write_text(ast.unparse(ast.fix_missing_locations(stub)), encoding="utf-8")
    config = folder / "xtokmap" / "train" / "config.py"
    settings = ast.parse(config.read_text(encoding="utf-8"))
    _document_settings(settings)
    config.write_text(ast.unparse(ast.fix_missing_locations(settings)), encoding="utf-8")


def _document_settings(module: ast.Module) -> None:
    """List `Config`'s settings in its docstring: their words are metadata, for the command line."""
    [config] = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "Config"]
    for node in config.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            node.value = node.value.args[0]
    lines = (f"\n    {field.name}: {field.metadata['doc']}" for field in dataclasses.fields(Config))
    config.body[0] = ast.Expr(ast.Constant(f"{inspect.getdoc(Config)}\n\nAttributes:{''.join(lines)}"))


def _document(node: ast.Module | ast.ClassDef, thing: Any) -> None:
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            found = getattr(thing, child.name)
            if isinstance(child, ast.ClassDef):
                _document(child, found)
            if (doc := inspect.getdoc(found)) and not child.name.startswith("_"):
                child.body.insert(0, ast.Expr(ast.Constant(doc)))


def api(module: str) -> str:
    """The page of a module: what mkdocstrings makes of its docstring, and of each of its public names."""
    own = "members: false, show_root_heading: false, show_root_toc_entry: false"
    names = [f"\n::: {module}.{name}\n    options: {{heading_level: 2}}\n" for name in public(module)]
    return f"# {module}\n\n::: {module}\n    options: {{{own}}}\n{''.join(names)}"


def public(module: str) -> list[str]:
    """The names in `__all__` of a module, or what it defines, without importing it."""
    path = PACKAGE.joinpath(*module.split("."))
    source = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    body = ast.parse(source.read_text(encoding="utf-8")).body
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("__")]
    own = [node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    return [name for name in own if not name.startswith("_")]


def page(path: Path, where: str) -> tuple[str, list[Path]]:
    """The text of a page with the site's own links, and the files that these lead to."""
    linked: list[Path] = []

    def relink(match: re.Match[str]) -> str:
        image, words, link, anchor = match.groups()
        found = (path.parent / link).resolve()
        if (there := place(found)) is None:
            return words
        linked.append(found)
        up = "../" * where.count("/")
        if words.endswith(found.name) and found.suffix == ".md":  # a page goes by its title here, not by its file
            words = found.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        return f"{image}[{words}]({up}{there}{anchor or ''})"

    parts = _FENCE.split(path.read_text(encoding="utf-8"))
    parts[::2] = [_LINK.sub(relink, part) for part in parts[::2]]
    return "".join(parts), linked


if __name__ == "__main__":
    out = Path(sys.argv[1])
    for part, write in (("pages", lay_out), ("package", package)):
        shutil.rmtree(out / part, ignore_errors=True)
        write(out / part)

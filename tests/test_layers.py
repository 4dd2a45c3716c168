"""The layers of the package: data flows one way, and no file knows one that is above it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import xtokmap

ROOT = Path(xtokmap.__file__).parent

#: From the bottom to the top; a module belongs to the longest name that fits. What is on one line may know each other
#: as long as there is no circle.
LAYERS = [
    ["_core"],
    ["files", "ids", "columns", "view", "waiting"],
    ["alignment", "tokenizers"],
    ["boundary", "markers"],
    ["aligner"],
    ["chat", "report", "inspection", "integrations.arrow"],
    [""],  # xtokmap itself: what can be had without torch
    ["models", "torch"],
    ["losses"],
    ["teachers"],
    ["torch.pair"],
    ["torch.mixture"],
    ["train.support.distributed", "train.support.flops", "train.support.track"],
    ["train"],
    ["integrations"],
    ["demo"],
    ["cli"],
    ["__main__"],
]


def modules() -> dict[str, Path]:
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py")}
    return {name.removesuffix("__init__").removesuffix("."): path for path, name in names.items()}


def imports(name: str, path: Path) -> set[str]:
    """The package's own modules that a module imports, also inside functions; what only types need left out."""
    known, found = modules(), set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    left_out = {child for n in typing for child in ast.walk(n)}
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            module = node.module or ""
            targets = [f"{module}.{alias.name}" for alias in node.names]
            targets = [t if t.removeprefix("xtokmap.") in {*known, "_core"} else module for t in targets]
        else:
            continue
        own = (t.removeprefix("xtokmap").removeprefix(".") for t in targets if t.split(".")[0] == "xtokmap")
        found |= {t if t in known or t == "_core" else t.rpartition(".")[0] for t in own}
    return found - {name}


def layer(name: str) -> int:
    fitting = [(len(part), k) for k, parts in enumerate(LAYERS) for part in parts if f"{name}.".startswith(f"{part}.")]
    return max(fitting)[1] if fitting else next(k for k, parts in enumerate(LAYERS) if "" in parts)


def test_nothing_knows_what_is_above_it() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, path in modules().items()
        for other in imports(name, path)
        if layer(other) > layer(name)
    ]
    assert not wrong, sorted(wrong)


def test_there_are_no_circles() -> None:
    graph = {name: imports(name, path) for name, path in modules().items()}
    # What imports nothing that is left can go; what is left at the end imports each other.
    while done := [name for name, others in graph.items() if not others & set(graph)]:
        for name in done:
            del graph[name]
    assert not graph, {name: sorted(others & set(graph)) for name, others in graph.items()}


def test_every_module_has_a_layer() -> None:
    listed = [part for parts in LAYERS for part in parts if part and part != "_core"]
    assert [part for part in listed if part not in modules()] == []
    assert [name for name in modules() if name and layer(name) == layer("")] == []


def test_a_step_is_read_in_one_sitting() -> None:
    page = (Path(__file__).parent.parent / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    files = re.findall(r"python/xtokmap/(\w+/\w+\.py)\)", page.split("A default step")[1])
    assert len(files) == 6
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in files}
    assert lines["train/step.py"] <= 150
    assert sum(lines.values()) <= 900, lines


#: The files of the core, from the bottom to the top.
RUST = [
    *["error", "pool", "table", "rows", "tokens", "chunks"],
    *["merge/edits", "merge/resync", "merge/clean", "merge/general", "merge"],
    *["aligner", "spans", "encoding", "vocab_map", "cover", "scan"],
    *[f"python/{name}" for name in ("errors", "support", "table", "rows", "arrays", "aligner", "encoding", "cover")],
    *["python/spans", "python/readers", "python"],
]


def test_no_file_of_the_core_knows_what_is_above_it() -> None:
    root = Path(__file__).parent.parent / "rust"
    paths = {str(path.relative_to(root).with_suffix("")).removesuffix("/mod"): path for path in root.rglob("*.rs")}
    assert sorted(paths) == sorted([*RUST, "lib"])
    for name in RUST:
        code = re.sub(r"//.*", "", paths[name].read_text(encoding="utf-8"))
        folder = name if paths[name].stem == "mod" else name.rpartition("/")[0]
        used = [m.replace("::", "/") for m in re.findall(r"\bcrate::(\w+(?:::\w+)?)", code)]
        used += [f"{folder}/{m}" for m in re.findall(r"\b(?:super|self)::([a-z]\w*)", code)] if folder else []
        files = [one if one in paths else one.partition("/")[0] for one in used]
        # What the crate gives out again could come from anywhere.
        assert [one for one in files if one not in RUST] == []
        assert "crate::{" not in code
        assert [one for one in files if RUST.index(one) > RUST.index(name)] == [], name


#: Functions that may be longer than `LONGEST` lines without their docstring, by file and name, and why.
LONG: dict[str, str] = {}
LONGEST = 80


def python_functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            lines = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(node) else 0
            yield node.name, (node.end_lineno or 0) - node.lineno + 1 - lines


def rust_functions(path: Path) -> Iterator[tuple[str, int]]:
    """As rustfmt leaves them: a function ends at the first brace that stands where it began."""
    code = path.read_text(encoding="utf-8").partition("#[cfg(test)]")[0].splitlines()
    for start, line in enumerate(code):
        if (match := re.match(r"( *)(?:[a-z()]+ )*fn (\w+)", line)) and not line.endswith(";"):
            indent, name = match.groups()
            ends = (k for k in range(start, len(code)) if re.match(rf"{indent}(}}|\).*;$)", code[k]))
            yield name, next(ends) - start + 1


def test_a_function_fits_on_a_page() -> None:
    root = Path(__file__).parent.parent
    found = {
        f"{path.relative_to(root)}: {name}": lines
        for folder, ending, functions in (("python", "py", python_functions), ("rust", "rs", rust_functions))
        for path in root.joinpath(folder).rglob(f"*.{ending}")
        for name, lines in sorted(functions(path), key=lambda one: one[1])
    }
    assert sorted(name for name, lines in found.items() if lines > LONGEST) == sorted(LONG)

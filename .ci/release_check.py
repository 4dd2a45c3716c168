"""What a release must pass, as far as this machine can tell: `make release-check`.

Builds the wheel and the source distribution, installs them into clean environments and tries them there, and asks the
tools that know wheels, crates, licenses and workflows. Prints a list of what passed, what failed and what could not be
run here; fails if something failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "target" / "release-check"
TOOLS = ("maturin>=1.9,<2", "twine", "auditwheel", "abi3audit", "pip-audit", "zizmor")
#: Milliseconds that `import xtokmap` may take beside the interpreter and numpy.
IMPORT_LIMIT = 60
#: What the dependencies of the wheel's binary may be licensed under: all allow it to be given away under Apache-2.0.
LICENSES = {"Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "MIT"}
LICENSES |= {"0BSD", "Unicode-3.0", "Unlicense", "Zlib"}


class FailedError(Exception):
    """What a step found wrong."""


class MissingError(Exception):
    """Why a step could not be run here."""


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """What a command prints.

    Raises:
        FailedError: with the end of what it printed.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | environment
    done = subprocess.run(
        [str(part) for part in command],
        check=False,
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        name = " ".join([Path(command[0]).name, *map(str, command[1:3])])
        raise FailedError(f"{name}: exit code {done.returncode}\n{textwrap.indent(done.stdout[-2000:], '    ')}")
    return done.stdout


def environment(name: str, *requirements: str | Path) -> Path:
    """The Python of a new environment in which nothing else is installed."""
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    if requirements:
        run(python, "-m", "pip", "install", "--quiet", *requirements)
    return python


def tool(name: str) -> Path:
    return WORK / "tools" / "bin" / name


def one(pattern: str) -> Path:
    (found,) = (WORK / "dist").glob(pattern)
    return found


def wheel() -> str:
    """Built, with what belongs into it and nothing else."""
    shutil.rmtree(WORK / "dist", ignore_errors=True)
    run(tool("maturin"), "build", "--release", "--locked", "--out", WORK / "dist")
    path = one("*.whl")
    names = zipfile.ZipFile(path).namelist()
    for wanted in ("py.typed", "_core.pyi", "data/view.css", "data/report.css", "data/prompts.jsonl"):
        if f"xtokmap/{wanted}" not in names:
            raise FailedError(f"{wanted} is not in it")
    sources = {str(p.relative_to(ROOT / "python")) for p in (ROOT / "python").rglob("*.py")}
    if left := sources - set(names):
        raise FailedError(f"not in it: {sorted(left)}")
    if odd := [n for n in names if not n.startswith(("xtokmap/", "xtokmap-")) or "__pycache__" in n]:
        raise FailedError(f"should not be in it: {odd}")
    return f"{path.name}, {path.stat().st_size / 1e6:.2f} MB"


def sdist() -> str:
    """Built; it holds what a wheel is built from."""
    run(tool("maturin"), "sdist", "--out", WORK / "dist")
    path = one("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    if left := {"Cargo.lock", "Cargo.toml", "pyproject.toml", "LICENSE", "README.md", "rust/lib.rs"} - names:
        raise FailedError(f"not in it: {sorted(left)}")
    return f"{path.name}, {path.stat().st_size / 1e6:.2f} MB"


def sdist_builds() -> str:
    """A wheel comes of the source distribution alone, outside this checkout."""
    target = {"CARGO_TARGET_DIR": str(WORK / "sdist"), "CARGO_PROFILE_RELEASE_LTO": "off"}  # not what is shipped
    python = environment("from-sdist")
    run(python, "-m", "pip", "install", "--quiet", one("*.tar.gz"), cwd=WORK, **target)
    return run(python, "-c", "import xtokmap; print(xtokmap.__version__)", cwd=WORK).strip()


def twine() -> str:
    """The metadata are what an index takes."""
    run(tool("twine"), "check", "--strict", one("*.whl"), one("*.tar.gz"))
    return "wheel and source distribution"


def auditwheel() -> str:
    """Which systems can load the wheel's library."""
    if sys.platform != "linux":
        raise MissingError("auditwheel knows Linux")
    shown = " ".join(run(tool("auditwheel"), "show", one("*.whl")).split())
    found = re.search(r'"(manylinux_\d+_\d+_\w+|musllinux_\d+_\d+_\w+)"', shown)
    if found is None:
        raise FailedError(f"no policy fits: {shown}")
    return f"{found[1]} (the workflow builds in the oldest that is supported)"


def abi3() -> str:
    """One wheel serves every Python from the oldest on: it uses the stable ABI alone."""
    shown = run(tool("abi3audit"), "--strict", "--verbose", one("*.whl"))
    return shown.strip().splitlines()[-1].strip() if shown.strip() else "no violations"


def readme_example(python: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code, expected = re.search(r"```python\n(import xtokmap\n.*?)```\n+```text\n(.*?)```", text, re.DOTALL).groups()
    shown = run(python, "-c", code, cwd=ROOT / ".ci")  # where no folder is named xtokmap
    if shown != expected:
        raise FailedError(f"README example printed\n{shown}instead of\n{expected}")


def numpy_only() -> str:
    """The wheel beside numpy alone: the README's example, the command line."""
    python = environment("numpy", one("*.whl"))
    readme_example(python)
    have = {row["name"] for row in json.loads(run(python, "-m", "pip", "list", "--format", "json"))}
    if have - {"pip", "setuptools", "numpy", "xtokmap"}:
        raise FailedError(f"it brings more than numpy: {sorted(have)}")
    run(python.with_name("xtokmap"), "--version")
    run(python.with_name("xtokmap"), "align", "--help")
    return "README example, xtokmap --version"


def import_time() -> str:
    """What the import takes of a processor, beside the interpreter and numpy; the best of ten."""
    code = "import time, numpy; t = time.process_time(); import xtokmap; print(time.process_time() - t)"
    best = min(1000 * float(run(WORK / "numpy" / "bin" / "python", "-c", code, cwd=WORK)) for _ in range(10))
    if best > IMPORT_LIMIT:
        raise FailedError(
            f"{best:.0f} ms, more than {IMPORT_LIMIT}; python -X importtime -c 'import xtokmap' says of what"
        )
    return f"{best:.0f} ms"


def with_extra(extra: str, code: str, **variables: str) -> str:
    python = environment(extra, f"xtokmap[{extra}] @ {one('*.whl').as_uri()}")
    readme_example(python)
    return run(python, "-c", code, cwd=WORK, **variables).strip()


def torch() -> str:
    """The wheel with [torch] and nothing else."""
    code = (
        "import torch, xtokmap, xtokmap.torch, xtokmap.losses as losses\n"
        "t = xtokmap.ByteTable.from_bytes([b'a', b'b', b'ab'])\n"
        "batch = xtokmap.Aligner(t, t).align_batch([[0, 1, 2]], [[2, 0, 1]])\n"
        "index = xtokmap.torch.ChunkIndex.from_alignment(batch)\n"
        "assert index.sum_student(torch.ones(1, 3)).tolist() == [[2.0, 1.0]]\n"
        "print('torch', torch.__version__)"
    )
    return with_extra("torch", code)


def train() -> str:
    """The wheel with [train] and nothing else: a step of training on models made here."""
    code = (
        "import tempfile, pathlib, tiny, transformers\n"
        "from xtokmap.train import Config, train\n"
        "folder = pathlib.Path(tempfile.mkdtemp())\n"
        "(folder / 'p.txt').write_text('the sky\\nthe dog\\n')\n"
        "pair = tiny.student_model(), tiny.student_tokenizer(), tiny.teacher_model(), tiny.teacher_tokenizer()\n"
        "how = dict(prompts=str(folder / 'p.txt'), output=str(folder / 'o'), device='cpu', steps=2, batch_size=2)\n"
        "result = train(Config(student='s', teacher='t', max_new_tokens=8, **how), models=pair)\n"
        "assert len(result.metrics) == 2 and (folder / 'o' / 'report.html').exists()\n"
        "print('transformers', transformers.__version__)"
    )
    return with_extra("train", code, PYTHONPATH=str(ROOT / "tests")).splitlines()[-1]


def stubtest() -> str:
    """The stubs say what the compiled module has."""
    return run(sys.executable, "-m", "mypy.stubtest", "xtokmap._core", PYTHONPATH=str(ROOT / "python")).strip()


def cargo_package() -> str:
    """The crate packs, and what is packed compiles; nothing is uploaded."""
    shown = run("cargo", "publish", "--dry-run", "--locked", "--allow-dirty", CARGO_TERM_COLOR="never")
    return re.search(r"Packaged (.*)", shown)[1]


def licenses() -> str:
    """Every crate in the wheel has a license that allows it."""
    shown = run("cargo", "metadata", "--format-version", "1", "--locked", "--features", "python")
    metadata = json.loads(shown[shown.index("{") :])
    named = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    left, reached = [metadata["resolve"]["root"]], set()
    while left:
        node = left.pop()
        if node not in reached:
            reached.add(node)
            kinds = ((d["pkg"], {k["kind"] for k in d["dep_kinds"]}) for d in nodes[node]["deps"])
            left += [pkg for pkg, kind in kinds if kind & {None, "build"}]
    for package in (named[i] for i in reached):
        text = (package["license"] or "none").replace("/", " OR ")
        # Every part of an AND, and of each of these one of its OR.
        parts = re.split(r"\s+AND\s+", text.replace("(", "").replace(")", ""))
        if not all(any(c.strip() in LICENSES for c in part.split(" OR ")) for part in parts):
            raise FailedError(f"{package['name']} {package['version']}: {text}")
    return f"{len(reached)} crates"


def cargo_audit() -> str:
    """Known holes of the crates."""
    if shutil.which("cargo-audit") is None:
        raise MissingError("no cargo-audit: cargo install cargo-audit; its data are in a git repository on GitHub")
    return run("cargo", "audit").strip().splitlines()[-1]


def pip_audit() -> str:
    """Known holes of what the wheel brings."""
    (site,) = (WORK / "numpy" / "lib").glob("python*/site-packages")
    try:
        shown = run(tool("pip-audit"), "--path", site, "--skip-editable", "--progress-spinner", "off")
    except FailedError as error:
        if re.search(r"ConnectionError|ServiceError|Max retries|Name or service|HTTPError", str(error)):
            raise MissingError("its data cannot be had: no way to the index's JSON") from None
        raise
    return shown.strip().splitlines()[0]


def workflows() -> str:
    """The workflows of GitHub have none of the holes that zizmor knows."""
    return run(tool("zizmor"), "--offline", "--no-progress", ".github").strip().splitlines()[-1]


def dependencies() -> str:
    """What the wheel and its extras bring, as installed here: version, size, and the newest there is."""
    shown = []
    for requirement in sorted(importlib.metadata.requires("xtokmap") or ()):
        name, wanted = re.match(r"[\w-]+", requirement)[0], re.search(r"extra == '(\w+)'", requirement)
        extra = wanted[1] if wanted else "always"
        if extra in ("dev", "bench", "reproduce") or name == "xtokmap":
            continue
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            shown.append(f"{name:<14} {extra:<7} not installed here")
            continue
        size = sum(Path(file.locate()).stat().st_size for file in found.files or () if Path(file.locate()).is_file())
        newest = re.search(r"\((.*?)\)", run(sys.executable, "-m", "pip", "index", "versions", name))[1]
        shown.append(f"{name:<14} {extra:<7} {found.version}, {size / 1e6:,.1f} MB; newest {newest}")
    return "\n" + textwrap.indent("\n".join(dict.fromkeys(shown)), "    ")


STEPS: list[Callable[[], str]] = [
    *(wheel, sdist, twine, auditwheel, abi3, numpy_only, import_time, sdist_builds, stubtest, cargo_package, licenses),
    *(cargo_audit, pip_audit, workflows, dependencies),
]
#: Several gigabytes: torch from the index, twice.
HEAVY = [torch, train]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heavy", action="store_true", help="install torch and transformers freshly as well")
    parser.add_argument("--only", nargs="*", default=[], help="names of steps")
    parser.add_argument("--readme", action="store_true", help="only the README's example, with this Python")
    args = parser.parse_args()
    if args.readme:
        readme_example(Path(sys.executable))
        return 0
    WORK.mkdir(parents=True, exist_ok=True)
    if not tool("twine").exists():
        environment("tools", *TOOLS)
    steps = [s for s in STEPS + HEAVY * args.heavy if not args.only or s.__name__ in args.only]
    outcomes: list[tuple[str, str, str]] = []
    for step in steps:
        try:
            outcomes.append(("passed", step.__name__, step()))
        except FailedError as error:
            outcomes.append(("FAILED", step.__name__, str(error)))
        except MissingError as error:
            outcomes.append(("not run", step.__name__, str(error)))
        print("{:<8} {:<14} {}".format(*outcomes[-1]), flush=True)
    if not args.heavy:
        print("not run  torch, train   several gigabytes: make release-check HEAVY=1")
    count = {word: sum(o[0] == word for o in outcomes) for word in ("passed", "FAILED", "not run")}
    print(f"\n{count['passed']} passed, {count['FAILED']} failed, {count['not run']} could not be run here")
    return 1 if count["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())

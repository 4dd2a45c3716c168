"""What a release is checked by: the script, and the pins of the workflows."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("release_check", ROOT / ".ci" / "release_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "WORK", tmp_path)
    monkeypatch.setattr(module, "environment", lambda *_: None)
    return module


def test_the_list_says_what_passed_what_failed_and_what_could_not_be_run(
    checks: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def good() -> str:
        return "2.1 MB"

    def bad() -> str:
        return checks.run(sys.executable, "-c", "print('no good'); raise SystemExit(3)")

    def absent() -> str:
        raise checks.MissingError("no such tool")

    monkeypatch.setattr(checks, "HEAVY", [])
    for steps, code, said in (
        ([good, absent], 0, "1 passed, 0 failed, 1 could not be run here"),
        ([good, bad, absent], 1, "1 passed, 1 failed, 1 could not be run here"),
    ):
        monkeypatch.setattr(checks, "STEPS", steps)
        monkeypatch.setattr(sys, "argv", ["release_check.py"])
        assert checks.main() == code
        out = capsys.readouterr().out
        assert out.splitlines()[-1] == said
        assert re.search(r"^passed +good +2\.1 MB$", out, re.MULTILINE)
        assert re.search(r"^not run +absent +no such tool$", out, re.MULTILINE)
        assert ("FAILED" in out) == (bad in steps)
    assert "exit code 3" in out
    assert "no good" in out


def test_every_crate_of_the_wheel_may_be_given_away(checks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"\d+ crates", checks.licenses())
    monkeypatch.setattr(checks, "LICENSES", {"Apache-2.0"})
    with pytest.raises(checks.FailedError, match=r"\d: \S"):
        checks.licenses()


def test_the_example_of_the_readme_is_run(checks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.readme_example(Path(sys.executable))
    monkeypatch.setattr(checks, "run", lambda *_, **__: "another\n")
    with pytest.raises(checks.FailedError, match="printed\nanother\ninstead of\nrange"):
        checks.readme_example(Path(sys.executable))


@pytest.mark.parametrize("name", ["ci", "release"])
def test_actions_are_pinned_to_commits(name: str) -> None:
    text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8")
    used = re.findall(r"uses: (.*)", text)
    assert used
    assert [u for u in used if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", u)] == []
    assert len(re.findall(r"^permissions: \{\}$", text, re.MULTILINE)) == 1
    verbs = re.findall(r"^((?:[\w-]+ )*[\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    bounds = re.findall(r"bound: (\w+)", text)
    made = [
        target.replace("$BOUND", bound) for target in re.findall(r'make "?([\w$-]+)', text) for bound in bounds or [""]
    ]
    assert set(made) <= {verb for line in verbs for verb in line.split()}

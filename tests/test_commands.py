"""What the pages tell to type on a command line can be typed: commands, their flags, targets of make, extras."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from xtokmap import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:xtokmap|make|python|--)[^`\n]*)`")

#: Commands of others; what they are given is not checked here.
OTHERS = {"accelerate", "cargo", "cd", "git", "torchrun", "vllm"}
#: Flags in the text that are vLLM's or SGLang's.
FOREIGN_FLAGS = {
    "--allow-auto-truncate",
    "--chunked-prefill-size",
    "--logprobs-mode",
    "--max-model-len",
    "--max-num-batched-tokens",
}
#: What `...` stands for.
LEFT_OUT = {
    "train": "--student A --teacher B --prompts F",
    "align": "--student A --teacher B",
    "inspect": "--student A --teacher B",
}


class Parsed(Exception):  # noqa: N818
    """The command line was understood; nothing is run."""


@pytest.fixture(autouse=True)
def only_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    real = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, args: list[str]) -> None:
        real(self, args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(argparse.ArgumentParser, "_get_option_tuples", lambda self, option: [])  # nothing abbreviated


def lines(block: str) -> Iterator[list[str]]:
    """The commands of a block as lists of words, without what sets variables."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                command = command[1:]
            yield command


def check(words: list[str]) -> None:
    """Fails where a command cannot be what it says."""
    if "-m" in words and "xtokmap" in words:  # torchrun, accelerate, python
        words = words[words.index("xtokmap") :]
    match words:
        case ["xtokmap", verb, *rest]:
            at = rest.index("...") if "..." in rest else None
            if at is not None:
                rest[at : at + 1] = LEFT_OUT[verb].split()
            with pytest.raises(Parsed):
                cli.main([verb, *rest])
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            known = " ".join(re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)).split()
            assert {t for t in targets if "=" not in t} <= set(known), words
            assert all(re.search(rf"^{t.split('=')[0]} *\?=", makefile, re.MULTILINE) for t in targets if "=" in t), (
                words
            )
        case ["python", script, *rest] if script.endswith(".py"):
            source = (ROOT / script).read_text(encoding="utf-8")
            assert all(f'"{word}"' in source for word in rest if word.startswith("--")), words
        case ["pip" | "python", *rest] if "install" in rest:
            extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
            for wanted in rest[rest.index("install") + 1 :]:
                if found := re.fullmatch(r"(?:\.|xtokmap)\[(.*)\]", wanted):
                    assert set(found[1].split(",")) <= set(extras), wanted
        case ["python", "-m", *_]:
            pass
        case _:
            assert words[0] in OTHERS, words


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_blocks_can_be_typed_in(page: Path) -> None:
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for words in lines(block):
            if words:
                check(words)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_commands_and_flags_in_the_text_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scripts = [path.read_text(encoding="utf-8") for path in (ROOT / "benches").rglob("*.py")]
    flags = {flag for script in scripts for flag in re.findall(r'"(--[a-z][a-z-]*)"', script)}
    for verb in ("align", "inspect", "train", "report", "serve-teacher", "demo"):
        with pytest.raises(SystemExit):
            cli.main([verb, "--help"])
        flags |= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for said in INLINE.findall(text):
        words = shlex.split(said)
        if said.startswith("--"):
            assert words[0] in flags | FOREIGN_FLAGS, said
        elif words[0] == "xtokmap" and len(words) > 1:
            with pytest.raises(SystemExit) as end:
                cli.main([words[1], "--help"])
            assert end.value.code == 0, said
            assert {word for word in words if word.startswith("--")} <= set(
                re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)
            ), said
        elif words[0] in ("make", "python") and len(words) > 1:
            check([word.rstrip(",") for word in words])


def test_a_wrong_command_is_found() -> None:
    for line in (
        "xtokmap align --student A",
        "xtokmap train ... --los x",
        "make dem",
        "pip install '.[trane]'",
        "rm x",
    ):
        with pytest.raises((AssertionError, SystemExit)):
            check(shlex.split(line))

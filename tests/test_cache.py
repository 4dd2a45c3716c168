import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from xtokmap import ByteTable, XTokMapError, byte_table, tokenizers
from xtokmap.tokenizers import cache, parse

LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
LLAMA = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}


def spec(tokens=("a", "b", "Ġc"), decoder=LEVEL, merges=()):
    vocab = {token: i for i, token in enumerate(tokens)}
    added = [{"id": len(tokens), "content": "</s>", "special": True}]
    return {"added_tokens": added, "decoder": decoder, "model": {"type": "BPE", "vocab": vocab, "merges": list(merges)}}


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def parts(table):
    arrays = table.to_arrays()
    return [a.tolist() if isinstance(a, np.ndarray) else a for a in arrays]


@pytest.fixture
def where(tmp_path, monkeypatch):
    """A cache of its own for a test."""
    monkeypatch.setenv("XTOKMAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "byte-tables"


@pytest.fixture
def reads(monkeypatch):
    """The paths that a reader was called for."""
    seen = []
    read = tokenizers._vocabulary_of_path
    monkeypatch.setattr(tokenizers, "_vocabulary_of_path", lambda path: (seen.append(path), read(path))[1])
    return seen


# ---- arrays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("invalid", ["maximal", "each", "run"])
@pytest.mark.parametrize(
    ("tokens", "stop_ids"), [([], []), ([None], [0]), ([b"a", None, b"", b"\xff\x00", None], [4, 1])]
)
def test_arrays_there_and_back(where, tokens, stop_ids, invalid):
    byte_pieces = [i for i, token in enumerate(tokens) if token and len(token) == 1]
    table = ByteTable.from_bytes(tokens, stop_ids=stop_ids, invalid=invalid, byte_pieces=byte_pieces)
    cache.store("name", table)
    for again in (ByteTable.from_arrays(*table.to_arrays()), cache.load("name")):
        assert [again[i] for i in range(len(again))] == tokens
        assert (again.stop_ids, again.invalid, again.byte_pieces) == (tuple(stop_ids), invalid, tuple(byte_pieces))


U8, U32, BOOL = np.uint8, np.uint32, np.bool_


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": [0, 1, 3]},
        {"offsets": [0, 1, 3, 4, 4]},
        {"offsets": [1, 1, 3, 3]},
        {"offsets": [0, 3, 1, 3]},
        {"offsets": [0, 1, 3, 2]},
        {"offsets": [0, 1, 2**32 - 1, 3]},
        {"offsets": []},
        {"special": [True, False, True]},
        {"special": [False, False]},
        {"stop_ids": [3]},
        {"stop_ids": [1]},
        {"invalid": "other"},
        {"byte_pieces": [1]},
        {"byte_pieces": [3]},
    ],
)
def test_arrays_that_do_not_fit(change):
    whole = {"arena": b"abb", "offsets": [0, 1, 3, 3], "special": [False, False, True], "stop_ids": [2]}
    whole = {**whole, "invalid": "maximal", "byte_pieces": [0], **change}
    dtypes = {"offsets": U32, "special": BOOL, "stop_ids": U32, "byte_pieces": U32}
    arrays = {name: np.array(whole[name], dtype) for name, dtype in dtypes.items()}
    with pytest.raises(XTokMapError):
        ByteTable.from_arrays(np.frombuffer(whole["arena"], U8), **arrays, invalid=whole["invalid"])


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [LEVEL, LLAMA])
def test_a_file_is_read_once(tmp_path, where, reads, decoder):
    path = write(tmp_path / "tokenizer.json", spec(("a", "<0xFF>", "Ġ▁c"), decoder))
    first = byte_table(path)
    second = byte_table(str(path))
    assert parts(first) == parts(second)
    assert first.stop_ids == (3,)
    assert reads == [path]
    assert len(list(where.iterdir())) == 1


def test_one_token_makes_another_table(tmp_path, where):
    path = tmp_path / "tokenizer.json"
    assert byte_table(write(path, spec(("a", "b", "Ġc"))))[1] == b"b"
    assert byte_table(write(path, spec(("a", "x", "Ġc"))))[1] == b"x"
    assert byte_table(write(path, spec(("b", "a", "Ġc"))))[1] == b"a"
    assert len(list(where.iterdir())) == 3


@pytest.mark.parametrize(
    "file", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"]
)
def test_files_beside_a_vocabulary_are_content(tmp_path, where, file):
    write(tmp_path / "tokenizer.json", spec())
    assert byte_table(tmp_path).stop_ids == (3,)
    eos = {"eos_token_id": 3} if "config.json" in (file, file.removeprefix("generation_")) else {"eos_token": "a"}
    write(tmp_path / file, eos)
    byte_table(tmp_path)
    assert len(list(where.iterdir())) == 2
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(tokenizers.UnsupportedTokenizerError):
        byte_table(tmp_path)


def test_another_reader_reads_again(tmp_path, where, reads, monkeypatch):
    path = write(tmp_path / "tokenizer.json", spec())
    byte_table(path)
    monkeypatch.setattr(tokenizers, "_readers", lambda: [b"another version"])
    byte_table(path)
    assert len(reads) == 2


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, where, monkeypatch):
    path = write(tmp_path / "tokenizer.json", spec(("a", "b", "Ġc")))
    read = tokenizers._vocabulary_of_path

    def changing(file):
        write(path, spec(("a", "x", "Ġc")))
        return read(file)

    monkeypatch.setattr(tokenizers, "_vocabulary_of_path", changing)
    assert byte_table(path)[1] == b"x"
    assert not where.exists()


def test_sentencepiece_objects_are_kept(where):
    spm = pytest.importorskip("sentencepiece")
    import real_tokenizers as real

    processor = spm.SentencePieceProcessor(model_file=str(real.path("mistral-v3")))
    assert parts(byte_table(processor)) == parts(byte_table(processor))
    assert len(list(where.iterdir())) == 1


# ---- damage ------------------------------------------------------------------------------------------------------


def test_every_damage_is_noticed_and_mended(tmp_path, where, reads):
    path = write(tmp_path / "tokenizer.json", spec())
    whole = parts(byte_table(path))
    (file,) = where.iterdir()
    data = file.read_bytes()
    for at in range(len(data)):
        for flip in (0x01, 0xFF):
            file.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
            assert parts(byte_table(path)) == whole
            assert file.read_bytes() == data
    assert len(reads) == 1 + 2 * len(data)


def test_cut_and_foreign_files(tmp_path, where):
    path = write(tmp_path / "tokenizer.json", spec())
    other = write(tmp_path / "other.json", spec(("x", "y", "z")))
    whole = parts(byte_table(path))
    (file,) = where.iterdir()
    data = file.read_bytes()
    byte_table(other)
    (foreign,) = set(where.iterdir()) - {file}
    for content in (b"", data[:20], data[:60], data[:-1], data + b"\0", foreign.read_bytes(), os.urandom(400)):
        file.write_bytes(content)
        assert parts(byte_table(path)) == whole
        assert file.read_bytes() == data


def test_whatever_is_signed_but_does_not_fit_is_passed_over(where):
    table = ByteTable.from_bytes([b"a", None], stop_ids=[1])
    name = cache.key([b"x"])
    cache.store(name, table)
    data = (where / name).read_bytes()
    start = len(cache._MAGIC) + cache._DIGEST
    body = data[start:]
    for at in range(len(body)):
        changed = body[:at] + bytes([body[at] ^ 0x40]) + body[at + 1 :]
        (where / name).write_bytes(cache._MAGIC + cache._digest(name, changed) + changed)
        found = cache.load(name)
        assert found is None or len(found) == 2


# ---- where -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["0", "off", "OFF", "no", "No", "false", "FALSE"])
def test_no_cache(tmp_path, monkeypatch, reads, setting):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XTOKMAP_CACHE", setting)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path = write(tmp_path / "tokenizer.json", spec())
    assert parts(byte_table(path)) == parts(byte_table(path))
    assert len(reads) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_directories(tmp_path, monkeypatch):
    monkeypatch.setenv("XTOKMAP_CACHE", str(tmp_path))
    assert cache.directory() == tmp_path / "byte-tables"
    monkeypatch.delenv("XTOKMAP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.directory() == tmp_path / "xtokmap" / "byte-tables"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert cache.directory() == tmp_path / ".cache" / "xtokmap" / "byte-tables"
    monkeypatch.setenv("XTOKMAP_CACHE", "~/x")
    assert cache.directory() == tmp_path / "x" / "byte-tables"
    monkeypatch.setenv("XTOKMAP_CACHE", "~nobody-of-this-name/x")
    assert cache.directory() is None


@pytest.mark.parametrize("kind", ["a file", "below a file", "read-only", "no path", "a directory under the name"])
def test_a_directory_that_cannot_be_used_is_no_error(tmp_path, monkeypatch, kind):
    path = write(tmp_path / "tokenizer.json", spec())
    where = tmp_path / "cache"
    if kind == "a file":
        where.write_bytes(b"")
    elif kind == "below a file":
        where = path / "cache"
    elif kind == "read-only":
        where.mkdir(mode=0o500)
    elif kind == "no path":
        where = "x" * 5000
    monkeypatch.setenv("XTOKMAP_CACHE", str(where))
    if kind == "a directory under the name":
        name = cache.key([*tokenizers._readers(), *tokenizers._contents(path)])
        (where / "byte-tables" / name).mkdir(parents=True)
    for _ in range(2):
        assert byte_table(path).stop_ids == (3,)
    if kind == "a directory under the name":
        assert len(list((where / "byte-tables").iterdir())) == 1  # and nothing half-written beside it
    if kind == "read-only":
        where.chmod(stat.S_IRWXU)


# ---- whose -------------------------------------------------------------------------------------------------------

posix = pytest.mark.skipif(os.name != "posix", reason="no modes")


@posix
def test_a_new_cache_is_its_users_alone(tmp_path, where):
    previous = os.umask(0o002)
    try:
        byte_table(write(tmp_path / "tokenizer.json", spec()))
    finally:
        os.umask(previous)
    (file,) = where.iterdir()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (where.parent, where, file)] == [0o700, 0o700, 0o600]


@pytest.fixture
def planted(tmp_path, where):
    """A tokenizer's file, and in the cache under its name a table that says something else, signed as it should be."""
    path = write(tmp_path / "tokenizer.json", spec())
    byte_table(path)
    (file,) = where.iterdir()
    cache.store(file.name, ByteTable.from_bytes([b"planted"]))
    assert byte_table(path)[0] == b"planted"
    return path, file


@posix
@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702, 0o1777])
@pytest.mark.parametrize("which", ["the folder", "the one above", "the file"])
def test_tables_that_others_may_write_are_not_believed(planted, where, which, mode, recwarn):
    path, file = planted
    loose = {"the folder": where, "the one above": where.parent, "the file": file}[which]
    loose.chmod(mode)
    for _ in range(2):
        believed = byte_table(path)[0] == b"planted"
        assert believed == (which == "the one above" and mode == 0o1777)  # as /tmp is: nobody moves what is another's
        if which == "the file":
            break  # it is replaced by one of this user's own
    said = [str(w.message) for w in recwarn]
    assert len(said) == (not believed)  # once
    assert believed or (said[0].startswith(f"{loose}: others may write to it") and "chmod go-w" in said[0])
    if which == "the folder":
        assert [entry.name for entry in where.iterdir()] == [file.name]
    if which == "the file":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert byte_table(path)[0] == b"a"


@posix
@pytest.mark.parametrize("which", ["the folder", "the file"])
def test_tables_of_another_user_are_not_believed(planted, where, which, monkeypatch):
    path, file = planted
    real = os.fstat

    def fstat(handle):
        found = real(handle)
        if not os.path.samestat(found, os.stat(where if which == "the folder" else file)):
            return found
        return os.stat_result([*found[:4], os.geteuid() + 1, *found[5:10]])

    monkeypatch.setattr(cache.os, "fstat", fstat)
    with pytest.warns(UserWarning, match=f"it is user {os.geteuid() + 1}'s, not {os.geteuid()}'s"):
        assert byte_table(path)[0] == b"a"


@posix
def test_a_link_is_no_table(planted, tmp_path):
    path, file = planted
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert byte_table(path)[0] == b"a"
    assert not file.is_symlink()
    file.unlink()
    os.mkfifo(file)
    assert byte_table(path)[0] == b"a"


def test_many_at_once(tmp_path, where):
    paths = [write(tmp_path / f"{k}.json", spec((f"x{k}", "b", "Ġc"))) for k in range(4)]
    code = f"import sys, xtokmap\nfor p in sys.argv[1:]:\n    xtokmap.byte_table(p)\nprint({str(where)!r})"
    children = [
        subprocess.Popen([sys.executable, "-c", code, *map(str, paths)], stdout=subprocess.DEVNULL) for _ in range(2)
    ]
    with ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(byte_table, paths * 8))
    assert [child.wait() for child in children] == [0, 0]
    assert [table[0] for table in tables] == [f"x{k}".encode() for k in range(4)] * 8
    assert len(list(where.iterdir())) == 4
    assert not list(where.glob("*.part"))


# ---- the readers' own scans --------------------------------------------------------------------------------------

MERGES = [["a", "b"], ['"', "\\"], ["]", "["], ["é", "\u2028"], ['\\"merges"', ":"], ["\n", "\x7f"]]
NAMES = ('"merges": [', '\\"merges', "]", "merges", "vocab", '"vocab": {', "é\u2028\t\b\f\r\n", "/\\/", "𠮷", "")


@pytest.mark.parametrize("form", ["pairs", "strings"])
@pytest.mark.parametrize("layout", [{"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}])
def test_merges_are_left_out_and_nothing_else(form, layout):
    merges = MERGES if form == "pairs" else [" ".join(pair) for pair in MERGES]
    for merged in (merges, []):
        text = json.dumps(spec(NAMES, merges=merged), **layout).encode()
        assert parse.parsed(text) == spec(NAMES)


@pytest.mark.parametrize(
    "vocab",
    [
        '{"a": 0, "b": 1, "a": 2}',
        '{ "\\u00e9\\ud842\\udfb7" : 0 ,\n"\\/\\"": -7}',
        '{"\\ud842": 0}',
        '{"a": 1.0}',
        '{"a": true, "b": 99999999999999999999}',
        '{"a": {"vocab": {"b": 1}}}',
        "{}",
        "null",
        '[["a", -1.5]]',
    ],
)
def test_vocabularies_are_parsed_as_json_is(vocab):
    for text in (
        f'{{"vocab": {{"x": 1}}, "model": {{"vocab": {vocab}, "merges": []}}}}',
        f'{{"model": {{"vocab": {vocab}}}, "vocab": {{"x": 1}}}}',
        f'{{"model": {{"vocab": {vocab}, "vocab": {{"x": 1}}}}}}',
        f'{{"model": {{"vocab": {{"x": 1}}, "vocab": {vocab}}}}}',
        f'[{{"vocab": {vocab}}}]',
    ):
        assert parse.parsed(text.encode()) == json.loads(text)


def test_damage_is_parsed_as_ever():
    good = json.dumps(spec(NAMES, merges=MERGES)).encode()
    start = good.index(b'"vocab"')
    for at in range(start, len(good)):
        for byte in b'"\\,:[]{}\x00\xff 0.-':
            text = good[:at] + bytes([byte]) + good[at + 1 :]
            try:
                whole = json.loads(text)
            except ValueError:
                with pytest.raises(ValueError):  # noqa: PT011
                    parse.parsed(text)
                continue
            cut = parse.parsed(text)
            for read in (whole, cut):
                read.get("model", {}).pop("merges", None)
            assert cut == whole
    for end in range(start, len(good)):
        with pytest.raises(ValueError):  # noqa: PT011
            parse.parsed(good[:end])

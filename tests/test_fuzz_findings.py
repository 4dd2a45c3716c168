"""What `fuzz/readers.py` and inputs made by hand found in the file readers: small files, little time and memory."""

import gzip
import json
import re

import pytest

from xtokmap import UnsupportedTokenizerError, byte_table

DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
FINDINGS = {
    "endless.model": (b"\xff" * 400_000, "a number has more than 64 bits"),
    "bomb.tiktoken.gz": (gzip.compress(b"YQ== 0\n" + b" " * (1 << 26), 1), "bytes when unpacked"),
    "doubled.json": (
        json.dumps(
            {"model": {"vocab": {"a": 0}}, "decoder": {"type": "Sequence", "decoders": [*[DOUBLE] * 40]}}
        ).encode(),
        "Replace 'a': a token becomes longer than 4096 characters",
    ),
}


# Without a limit: minutes, gigabytes and 2^40 characters.
@pytest.mark.parametrize("name", FINDINGS)
def test_small_files_take_little_time_and_memory(tmp_path, name):
    content, message = FINDINGS[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UnsupportedTokenizerError, match=f"{re.escape(str(path))}: .*{message}"):
        byte_table(path)


def test_replacements_that_lengthen_a_token_are_read(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": {"ab" * 100: 0}}, "decoder": DOUBLE}))
    assert byte_table(path)[0] == b"aab" * 100

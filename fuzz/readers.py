"""Fuzzes the file readers: `python fuzz/readers.py [seconds] [seed]`.

Small valid files of every kind are mutated, byte by byte, number by number and part by part. Whatever comes out,
`byte_table` gives a table or raises `UnsupportedTokenizerError`, in little time and memory. A file that breaks this is
left in `fuzz/artifacts`, and the exit status is 1.
"""

import base64
import copy
import gzip
import json
import os
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from xtokmap import UnsupportedTokenizerError, byte_table

#: A table has a row for every id below the largest, 2^24 at most: what one such table may take, and no more.
MEMORY = 4 << 30
#: Seconds; a table of 2^24 rows takes about one.
SLOW = 5
ARTIFACTS = Path(__file__).parent / "artifacts"


# ---- valid files -------------------------------------------------------------------------------------------------

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
LLAMA = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}
ADDED = [
    {"id": 5, "content": "</s>", "special": True, "single_word": False, "lstrip": False},
    {"id": 6, "content": "<think>", "special": False},
]


def tokenizer_jsons():
    names = {"a": 0, "Ġthe": 1, "<0x0A>": 2, "▁the": 3, "##ing": 4}
    for decoder in (
        BYTE_LEVEL,
        LLAMA,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "BPEDecoder", "suffix": "</w>"},
    ):
        model = {"type": "BPE", "vocab": names, "merges": [], "unk_token": "a", "continuing_subword_prefix": None}
        yield {"version": "1.0", "added_tokens": ADDED, "decoder": decoder, "model": model}
    pieces = [["<unk>", 0.0], ["▁the", -1.5], ["<0x0A>", -2.0], ["a", -3.0], ["é", -4.0]]
    yield {"added_tokens": ADDED, "decoder": LLAMA, "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces}}


def tekken():
    vocab = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(40)]
    special = [{"rank": 0, "token_str": "<unk>", "is_control": True}, {"rank": 2, "token_str": "</s>"}]
    config = {"pattern": ".", "num_vocab_tokens": 40, "default_vocab_size": 44, "default_num_special_tokens": 4}
    return {"config": {**config, "version": "v7"}, "vocab": vocab, "special_tokens": special}


def tiktoken():
    return b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(40))


def varint(value):
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + varint(value >> 7)


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


PIECES = {"<unk>": 2, "<s>": 3, "</s>": 3, "<0x0A>": 6, "▁the": 1, "<think>": 4, "[PAD]": 5, "é": 1}


def sentencepiece():
    pieces = (field(1, name.encode()) + field(2, -1.0) + field(3, kind) for name, kind in PIECES.items())
    trainer = field(3, 2) + field(46, b"<s>") + field(47, b"</s>")
    normalizer = field(1, b"identity") + field(3, 1)
    return b"".join(field(1, piece) for piece in pieces) + field(2, trainer) + field(3, normalizer) + field(5, b"")


def gguf(order, model):
    def string(text):
        return struct.pack(f"{order}Q", len(text.encode())) + text.encode()

    def array(kind, values):
        body = (string(v) if kind == 8 else struct.pack(f"{order}i", v) for v in values)
        return struct.pack(f"{order}IIQ", 9, kind, len(values)) + b"".join(body)

    pairs = {
        "general.architecture": struct.pack(f"{order}I", 8) + string("llama"),
        "some.number": struct.pack(f"{order}Id", 12, 0.5),
        "tokenizer.ggml.model": struct.pack(f"{order}I", 8) + string(model),
        "tokenizer.ggml.tokens": array(8, list(PIECES)),
        "tokenizer.ggml.token_type": array(5, list(PIECES.values())),
        "tokenizer.ggml.eos_token_id": struct.pack(f"{order}II", 4, 2),
    }
    body = b"".join(string(key) + value for key, value in pairs.items())
    return b"GGUF" + struct.pack(f"{order}IQQ", 3, 0, len(pairs)) + body


# ---- mutations ---------------------------------------------------------------------------------------------------

NUMBERS = (-1, 0, 1, 7, 255, *(power + k for power in (1 << 16, 1 << 24, 1 << 31, 1 << 32, 1 << 63) for k in (-1, 0)))
VALUES = (
    *(None, True, False, 0.5, 1e300, float("nan"), float("inf"), 10**400, "", "a", "\ud800", "\0", "▁" * 3),
    *("<0xZZ>", "</s>", [], {}, [[]], [None], {"type": "Fuse"}, {"type": "Sequence", "decoders": []}, {"content": 1}),
    *NUMBERS,
)


def mutated_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 16))
        match rng.randrange(8):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at : at + size] = b""
            case 2:
                data[at:at] = rng.randbytes(size)
            case 3:
                order, number = rng.choice(("little", "big")), rng.choice(NUMBERS) & (1 << 8 * size) - 1
                data[at : at + size] = number.to_bytes(size, order)
            case 4:
                other = rng.randrange(len(data) + 1)
                data[at:at] = data[other : other + 8 * size]
            case 5:
                if rng.randrange(8) == 0:
                    del data[at:]
            case 6:
                if rng.randrange(64) == 0:
                    data[at:at] = rng.choice((bytes(data[at : at + size]), b"\xff", b"\0", b"[", b" ")) * (1 << 18)
            case 7:
                data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)] if at < len(data) else [])
    return bytes(data)


def places(value):
    """Every (container, key) inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


def mutated_json(spec, rng):
    spec = copy.deepcopy(spec)
    for _ in range(rng.choice((1, 1, 2, 3))):
        inside = list(places(spec))
        if not inside:
            break
        container, key = rng.choice(inside)
        match rng.randrange(5):
            case 0:
                del container[key]
            case 1:
                other, name = rng.choice(inside)
                if name in other if isinstance(other, dict) else name < len(other):
                    container[key] = copy.deepcopy(other[name])
            case 2 if isinstance(container, dict):
                container[rng.choice(("", "a", "\ud800", "type", "</s>"))] = container.pop(key)
            case _:
                container[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(spec).encode()


VALID = 13


def cases(rng):
    """(file name, content) for ever; the unharmed files first."""
    specs = {f"{k}.json": spec for k, spec in enumerate([*tokenizer_jsons(), tekken()])}
    raw = {
        **{name: json.dumps(spec).encode() for name, spec in specs.items()},
        **{"x.tiktoken": tiktoken(), "x.tiktoken.gz": gzip.compress(tiktoken()), "x.model": sentencepiece()},
        **{"little.gguf": gguf("<", "llama"), "big.gguf": gguf(">", "gpt2"), "llama3.model": tiktoken()},
    }
    assert len(raw) == VALID
    yield from raw.items()
    while True:
        name = rng.choice(list(raw))
        if name in specs and rng.randrange(4):
            yield name, mutated_json(specs[name], rng)
        elif name.endswith(".gz") and rng.randrange(2):
            yield name, gzip.compress(mutated_bytes(tiktoken(), rng))
        else:
            yield name, mutated_bytes(raw[name], rng)


def attempt(path):
    """What `byte_table` makes of a file: "read", "refused", or what is wrong with it."""
    begun = time.monotonic()
    try:
        byte_table(path)
        outcome = "read"
    except UnsupportedTokenizerError as error:
        outcome = "refused" if str(error).startswith(f"{path}: ") else f"a message that does not name the file: {error}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"{type(error).__name__} in {where.name}, line {where.lineno}"
    return outcome if time.monotonic() - begun < SLOW else "slow"


def main():
    seconds, seed = (float(sys.argv[1]) if len(sys.argv) > 1 else 60.0), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ["XTOKMAP_CACHE"] = "off"
    counts = Counter()
    smallest = {}
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as directory:
        for k, (name, content) in enumerate(cases(random.Random(seed))):
            if time.monotonic() > until:
                break
            path = Path(directory) / name
            path.write_bytes(content)
            outcome = attempt(path)
            if outcome == "refused" and k < VALID:
                outcome = f"{name} is valid and was refused"
            counts[outcome] += 1
            if outcome not in ("read", "refused") and len(content) < len(
                smallest.get(outcome, (name, content + b"."))[1]
            ):
                smallest[outcome] = name, content
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"seed {seed}: {counts['read']} read, {counts['refused']} refused, {len(smallest)} findings, {peak:.0f} MiB")
    for k, (outcome, (name, content)) in enumerate(smallest.items()):
        ARTIFACTS.mkdir(exist_ok=True)
        (ARTIFACTS / f"{k}-{name}").write_bytes(content)
        print(f"  {outcome}: {counts[outcome]} times, smallest in {ARTIFACTS / f'{k}-{name}'}")
    return 1 if smallest else 0


if __name__ == "__main__":
    sys.exit(main())

"""Readers: a tokenizer, or a tokenizer's file -> the bytes of every token id; and codecs that encode text in bulk.

What a reader cannot do exactly is an `UnsupportedTokenizerError` that names the part; nothing is guessed.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import importlib
import json
import os
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from itertools import chain
from operator import methodcaller
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from xtokmap import _core, cache
from xtokmap._core import ByteTable, UnsupportedTokenizerError
from xtokmap.files import check_text, obstacle

#: Tokens that end a turn or a text, by name. Those of them that a vocabulary holds as special tokens are its stop ids,
#: in this order, after the ones that the tokenizer itself declares; they correspond by this role, whatever their ids.
STOP_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|endofturn|>",
    "[|endofturn|]",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|eot|>",
    "<|EOT|>",
    "<|eom|>",
    "<end_of_utterance>",
    "<|user_end|>",
    "<|assistant_end|>",
    "<seed:eos>",
    "<｜end▁of▁sentence｜>",
    "<|end▁of▁sentence|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|eos|>",
    "</s>",
    "<eos>",
    "<EOT>",
    "[EOS]",
    "[SEP]",
)


def byte_table(tokenizer: Any) -> ByteTable:
    """The bytes of every token id of a tokenizer: what its decoder spells for that id inside a text.

    No bytes (`None`): special tokens, control and unused pieces, the roles bos, eos, pad and unk, ids without an entry.
    Added tokens that are not special (`<think>`) are the UTF-8 bytes of their content.

    A space that a decoder leaves out at the edge of a text belongs to that place, not to the token, which keeps it:
    `▁the` is `b" the"` everywhere, though SentencePiece-style decoders strip the first one (Metaspace all of the first
    token); a WordPiece token that starts a word is `b" word"`, though nothing stands before the first; a BPEDecoder
    token that ends a word is `b"word "`, though nothing stands after the last. WordPiece's clean-up (`" ."` -> `"."`)
    is in the bytes as far as it happens inside one token, as in `tokenizers`; what transformers does over a whole text
    with `clean_up_tokenization_spaces` is not.

    The tables of paths and of SentencePiece models are kept on disk by their content (`xtokmap.cache`). Those of other
    objects are not: nothing identifies their content in less time than reading it takes.

    `invalid` says how the tokenizer's own decoder spells bytes that are not UTF-8. "maximal": one U+FFFD for each part
    that is (byte-level vocabularies). "each": one for each byte of such a part (SentencePiece and GGUF files with byte
    pieces, `<0x0A>`). "run": one for each byte of a run of `byte_pieces` that is not UTF-8 as a whole (Hugging Face's
    ByteFallback).

    Args:
        tokenizer: a transformers fast tokenizer, `tokenizers.Tokenizer`, `tiktoken.Encoding`,
            `sentencepiece.SentencePieceProcessor`, a mistral-common tokenizer, a `ByteTable`, or a path: a directory as
            saved by `save_pretrained`, `tokenizer.json`, `*.model`, `*.tiktoken` (also `.gz`), `tekken.json`, `*.gguf`.
            A bare `*.tiktoken` file holds no special tokens. Slow transformers tokenizers are read where they hold a
            tiktoken encoding or the SentencePiece model whose ids they use.

    Returns:
        A table as long as the largest id + 1. Its stop ids are the tokenizer's own eos token, those that a directory's
        `tokenizer_config.json`, `generation_config.json` and `config.json` declare, then the names of `STOP_TOKENS`.

    Raises:
        UnsupportedTokenizerError: a kind or a part of a tokenizer whose bytes cannot be known exactly, a damaged file,
            a pipe, socket or device in the place of one, or a missing package; the message names it and says what to
            do.
        FileNotFoundError: a path that does not exist.
    """
    if isinstance(tokenizer, ByteTable):
        return tokenizer
    if isinstance(tokenizer, (str, os.PathLike)):
        path = _existing(tokenizer)

        def read() -> ByteTable:
            vocabulary = _vocabulary_of_path(path)
            with _reading(path, "vocabulary"):
                return vocabulary.table()

        return _cached(partial(_contents, path), read)
    if "sentencepiece" in _packages(tokenizer):
        proto = tokenizer.serialized_model_proto()
        return _cached(lambda: [b"SentencePiece", proto], lambda: _of_sentencepiece(proto).table())
    return _vocabulary_of_object(tokenizer).table()


def _cached(content: Callable[[], Iterable[Any]], read: Callable[[], ByteTable]) -> ByteTable:
    """A table from the disk cache, by all the content that determines it; else read, and kept there."""
    if cache.directory() is None:
        return read()
    key = cache.key(chain(_readers(), content()))
    table = cache.load(key)
    if table is None:
        table = read()
        if cache.key(chain(_readers(), content())) == key:  # not if the file has changed meanwhile
            cache.store(key, table)
    return table


@lru_cache(None)
def _readers() -> list[bytes]:
    """The code that reads: it is part of every key, so that no table outlives a change of it."""
    code = []
    with suppress(OSError):  # a package inside an archive
        code.append(Path(__file__).read_bytes())
    return [_core.__version__.encode(), *code]


def _contents(path: Path) -> Iterator[Any]:
    """What determines the table of a path: which reader it has, by its name, and all the bytes that one reads."""
    if path.is_dir():
        yield from _contents(_file_in(path))
        for file in _BESIDE:
            yield b"+" + (path / file).read_bytes() if (path / file).exists() else b""
        return
    yield path.name.encode()
    if path.name.endswith(".gguf"):
        try:
            data = np.memmap(path, np.uint8, "r")
            yield data[: _gguf_fields(data, {})[1]]
        except _DAMAGE:
            return  # the reader will say what is wrong
    else:
        yield path.read_bytes()


#: Ids from here on are damage, not vocabulary: a table has a row for every id below the largest one.
_ID_LIMIT = 1 << 24


class _Vocabulary(NamedTuple):
    """What every reader makes: bytes by id, the ids without bytes, and who ends a text."""

    tokens: Mapping[int, bytes]
    special: Mapping[int, str]
    #: Added and user-defined tokens that do have bytes, by name: a file beside may give one of them a role.
    added: Mapping[int, str] = {}
    stop_ids: tuple[int, ...] = ()
    invalid: str = "maximal"
    #: Ids that stand for a single byte (`<0x0A>`).
    byte_pieces: tuple[int, ...] = ()

    def table(self) -> ByteTable:
        size = max(max(ids, default=-1) for ids in (self.tokens, self.special)) + 1
        lowest = min(min(ids, default=0) for ids in (self.tokens, self.special))
        if lowest < 0 or size > _ID_LIMIT:
            raise UnsupportedTokenizerError(
                f"token id {min(lowest, 0) or size - 1}: ids go from 0 to {_ID_LIMIT - 1}; the vocabulary is damaged"
            )
        rows = list(map(self.tokens.get, range(size)))
        by_name = {name: i for i, name in self.special.items()}
        named = (by_name[name] for name in STOP_TOKENS if name in by_name)
        stop_ids = list(dict.fromkeys(i for i in chain(self.stop_ids, named) if 0 <= i < size))
        for i in chain(self.special, stop_ids):
            rows[i] = None
        byte_pieces = [i for i in self.byte_pieces if rows[i] is not None]
        return ByteTable.from_bytes(rows, stop_ids=stop_ids, invalid=self.invalid, byte_pieces=byte_pieces)


# ---- dispatch ----------------------------------------------------------------------------------------------------


def _packages(tokenizer: Any) -> set[str]:
    """The packages that an object's classes come from: found without importing any of them."""
    return {cls.__module__.partition(".")[0] for cls in type(tokenizer).__mro__}


def _vocabulary_of_object(tokenizer: Any) -> _Vocabulary:
    packages = _packages(tokenizer)
    if "transformers" in packages:
        return _of_transformers(tokenizer)
    if packages & {"tokenizers", "fastokens"}:
        return _of_tokenizers(tokenizer)
    if "tiktoken" in packages:
        return _of_tiktoken(tokenizer)
    if "sentencepiece" in packages:
        return _of_sentencepiece(tokenizer.serialized_model_proto())
    if "mistral_common" in packages:
        return _of_mistral(tokenizer)
    raise UnsupportedTokenizerError(
        f"{type(tokenizer).__name__} (from {type(tokenizer).__module__}): no reader for this type; pass a transformers "
        "fast tokenizer, a tokenizers.Tokenizer, tiktoken.Encoding, SentencePieceProcessor, mistral-common tokenizer, "
        "a path, or build xtokmap.ByteTable.from_bytes([...]) yourself"
    )


#: `tokenizer.model`, `spiece.model`, `tokenizer.model.v3`, `tokenizer.model.v7m1`.
_MODEL_NAME = re.compile(r".*\.model(\.v\d+(m\d+)?)?")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s")


def _existing(path: str | os.PathLike[str]) -> Path:
    if not os.path.exists(path):  # unlike Path.exists, also for a name that is too long or empty
        raise FileNotFoundError(
            f"{path}: no such file or directory; a tokenizer on a hub must be loaded first, e.g. with "
            "transformers.AutoTokenizer.from_pretrained, and passed as an object"
        )
    if (problem := obstacle(Path(path), inside=True)) is not None:
        raise UnsupportedTokenizerError(problem)
    return Path(path)


def _vocabulary_of_path(path: Path) -> _Vocabulary:
    if path.is_dir():
        return _of_directory(path)
    if path.name.endswith((".tiktoken", ".tiktoken.gz")):
        return _of_tiktoken_file(path)
    if path.name.endswith(".gguf"):
        return _of_gguf(path)
    if _MODEL_NAME.fullmatch(path.name):
        if _is_tiktoken(path):  # as Llama 3 and Kimi name theirs
            return _of_tiktoken_file(path)
        with _reading(path, "SentencePiece model"):
            return _of_sentencepiece(path.read_bytes())
    if path.name.endswith(".json"):
        spec = _load_json(path)
        with _reading(path, "tokenizer file"):
            if "config" in spec and isinstance(spec.get("vocab"), list):
                return _of_tekken(spec)
            if "model" in spec and "decoder" in spec:
                return _of_tokenizer_json(spec)
        raise UnsupportedTokenizerError(
            f"{path}: neither a tokenizer.json (keys model, decoder) nor a tekken.json (keys config, vocab)"
        )
    raise UnsupportedTokenizerError(
        f"{path}: unknown kind of file; known are tokenizer.json, *.model, *.tiktoken, *.tiktoken.gz, tekken.json, "
        "*.gguf and directories that hold one of them"
    )


#: What parsers raise on a damaged file. Not OSError: no permission, or no disk, is no damage.
_DAMAGE = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, RecursionError, TypeError, ValueError),
    *(gzip.BadGzipFile, struct.error, zlib.error),
)


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Whatever a damaged file makes its parser raise becomes the one error that names the file."""
    try:
        yield
    except UnsupportedTokenizerError as error:
        raise UnsupportedTokenizerError(f"{path}: {error}") from None
    except _DAMAGE as error:
        raise UnsupportedTokenizerError(
            f"{path}: not a readable {kind} ({type(error).__name__}: {error}); fetch the file again"
        ) from None


def _load_json(path: Path) -> dict[str, Any]:
    with _reading(path, "JSON file"):
        spec = _parsed(path.read_bytes())
        if not isinstance(spec, dict):
            raise TypeError(f"expected an object, got {type(spec).__name__}")
    return spec


def _parsed(text: bytes) -> Any:
    """`json.loads` for a tokenizer.json: its vocabulary a few times faster, its merges, most of the file, left out."""
    text = _without_merges(text)
    for start in _values(text, b"vocab", b"{"):
        found = _core.json_ids(text, start)
        if found is None:
            continue
        names, ids, end = found
        spec = json.loads(b"%b%b%b" % (text[:start], json.dumps(_ELSEWHERE).encode(), text[end:]))
        model = spec.get("model") if isinstance(spec, dict) else None
        if isinstance(model, dict) and model.get("vocab") == _ELSEWHERE:
            model["vocab"] = dict(zip(names, ids, strict=True))
            return spec
        break
    return json.loads(text)


#: Stands in for a vocabulary that is read apart.
_ELSEWHERE = "xtokmap: read apart"


def _without_merges(text: bytes) -> bytes:
    for start in _values(text, b"merges", b"["):
        end = _core.json_strings_end(text, start)
        if end is not None:
            return b"%b[]%b" % (text[:start], text[end:])
    return text


def _values(text: bytes, key: bytes, bracket: bytes) -> Iterator[int]:
    """Where in a JSON text a key's value starts, if that starts with a bracket."""
    value = re.compile(rb'"%b"\s*:\s*(?=%b)' % (key, re.escape(bracket)))
    at = -1
    while (at := text.find(b'"%b"' % key, at + 1)) >= 0:
        found = value.match(text, at)
        if found and text[at - 1 : at] != b"\\":  # behind a backslash it is the end of a longer key
            yield found.end()


def _integers(values: Iterable[Any]) -> list[int]:
    """Ids out of JSON, where 1.0, true and "1" are something else."""
    ids = list(values)
    if set(map(type, ids)) <= {int}:
        return ids
    for i in ids:
        if type(i) is not int:
            raise TypeError(f"expected an integer, got {i!r}")
    return ids


if sys.version_info >= (3, 11):
    #: base64.b64decode(validate=True), without the Python that it puts around every token.
    _unbase64 = partial(binascii.a2b_base64, strict_mode=True)
else:
    _unbase64 = partial(base64.b64decode, validate=True)


def _require(package: str, what: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0].replace("_", "-")
        extra = ', or "xtokmap[train]"' if name == "tokenizers" else ""
        raise UnsupportedTokenizerError(f"{what} needs the package {name}: pip install {name}{extra}") from None


# ---- directories -------------------------------------------------------------------------------------------------

#: Slow tokenizer classes whose ids are those of their SentencePiece model; others shift or reorder them.
_SENTENCEPIECE_IDS = ("Llama", "CodeLlama", "Gemma", "T5", "Albert", "GPTSw3")


#: What is read beside a vocabulary.
_BESIDE = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "config.json"),
)


def _file_in(directory: Path) -> Path:
    for pattern in ("tokenizer.json", "tekken.json", "tokenizer.model*", "*.model", "*.tiktoken*", "*.gguf"):
        found = sorted(directory.glob(pattern))
        if len(found) > 1:
            raise UnsupportedTokenizerError(
                f"{directory}: {len(found)} files match {pattern} ({', '.join(f.name for f in found)}); pass the right "
                "one"
            )
        if not found:
            continue
        if _MODEL_NAME.fullmatch(found[0].name) and not _is_tiktoken(found[0]):
            config = _config(directory, "tokenizer_config.json")
            name = str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer")
            if name and name not in _SENTENCEPIECE_IDS:
                raise UnsupportedTokenizerError(
                    f"{directory}: {config['tokenizer_class']} need not use the ids of {found[0].name}; load it with "
                    "transformers.AutoTokenizer.from_pretrained and pass that, or pass the file if its ids are meant"
                )
        return found[0]
    names = sorted(f.name for f in directory.iterdir() if f.is_file())
    raise UnsupportedTokenizerError(
        f"{directory}: no tokenizer.json, tekken.json, *.model, *.tiktoken or *.gguf among its files {names}; load it "
        "with transformers.AutoTokenizer.from_pretrained and pass that, or save_pretrained it again"
    )


def _of_directory(directory: Path) -> _Vocabulary:
    vocabulary = _vocabulary_of_path(_file_in(directory))
    tokens, special, added = dict(vocabulary.tokens), dict(vocabulary.special), dict(vocabulary.added)
    with _reading(directory, "tokenizer directory"):
        beside, roles = _added_beside(directory)
        for i, (content, is_special) in beside.items():
            if is_special:
                special[i] = content
            elif i not in special and i not in tokens:
                tokens[i], added[i] = content.encode(), content
        special.update((i, content) for i, content in added.items() if content in roles)
        vocabulary = vocabulary._replace(tokens=tokens, special=special, added=added)
        declared = tuple(_declared_stops(directory, {**added, **special}))
    return vocabulary._replace(stop_ids=(*declared, *vocabulary.stop_ids))


def _config(directory: Path, name: str) -> dict[str, Any]:
    return _load_json(directory / name) if (directory / name).exists() else {}


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _added_beside(directory: Path) -> tuple[dict[int, tuple[str, bool]], set[str]]:
    """What the files beside a vocabulary declare: added tokens (content, whether special) by id; tokens with a role."""
    config = _config(directory, "tokenizer_config.json")
    keys = {**config, **_config(directory, "special_tokens_map.json")}
    roles = {_content(value) for key, value in keys.items() if key.endswith("_token")}  # also flags: add_bos_token
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = keys.get(key) or ()
        roles.update(_content(token) for token in (extra.values() if isinstance(extra, dict) else extra))
    old = _config(directory, "added_tokens.json")
    added = {i: (name, name in roles) for name, i in zip(old, _integers(old.values()), strict=True)}
    if len(added) < len(old):
        raise ValueError("added_tokens.json gives one id to more than one token")
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        content = token["content"]
        if not isinstance(content, str):
            raise TypeError(f"added token {i} has the content {content!r}")
        added[int(i)] = content, bool(token.get("special")) or content in roles
    return added, roles


def _declared_stops(directory: Path, names: Mapping[int, str]) -> Iterator[int]:
    """The ends of a text that a directory declares, among its special and added tokens."""
    eos = _content(_config(directory, "tokenizer_config.json").get("eos_token"))
    yield from (i for i, name in names.items() if name == eos)
    for file in ("generation_config.json", "config.json"):
        ids: Any = _config(directory, file).get("eos_token_id")
        if ids is not None:
            yield from (i for i in _integers(ids if isinstance(ids, list) else [ids]) if i in names)


# ---- transformers and tokenizers ---------------------------------------------------------------------------------


def _of_transformers(tokenizer: Any) -> _Vocabulary:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = _of_slow(tokenizer)
    else:
        for method in ("decode", "_decode"):
            owner = next((cls for cls in type(tokenizer).__mro__ if method in vars(cls)), None)
            if owner is not None and not owner.__module__.startswith("transformers.tokenization_"):
                raise UnsupportedTokenizerError(
                    f"{type(tokenizer).__name__}: its class has its own {method}(), which can change what the decoder "
                    "spells; pass tokenizer.backend_tokenizer if that decoder is what you mean"
                )
        vocabulary = _of_tokenizers(backend)
        roles = ((backend.token_to_id(name), name) for name in tokenizer.all_special_tokens)
        special = {**vocabulary.special, **{i: name for i, name in roles if i is not None}}
        vocabulary = vocabulary._replace(special=special)
    eos = getattr(tokenizer, "eos_token_id", None)
    declared = (eos,) if isinstance(eos, int) else tuple(eos or ())
    return vocabulary._replace(stop_ids=(*declared, *vocabulary.stop_ids))


def _of_slow(tokenizer: Any) -> _Vocabulary:
    """A transformers object without a fast backend: by the known tokenizer inside it."""
    for name in ("tokenizer", "model"):  # processors, MistralCommonBackend, Qwen's and Kimi's own classes
        inner = getattr(tokenizer, name, None)
        if _packages(inner) & {"transformers", "tiktoken", "mistral_common"}:
            return _vocabulary_of_object(inner)
    processor = getattr(tokenizer, "sp_model", None)
    if processor is not None:
        ids = list(range(processor.get_piece_size()))
        if tokenizer.convert_ids_to_tokens(ids) == processor.id_to_piece(ids):  # many classes shift the ids
            vocabulary = _of_sentencepiece(processor.serialized_model_proto())
            decoder = tokenizer.added_tokens_decoder
            special = {i: token.content for i, token in decoder.items() if token.special}
            added = {i: token.content for i, token in decoder.items() if not token.special and i >= len(ids)}
            return vocabulary._replace(
                tokens={**vocabulary.tokens, **{i: content.encode() for i, content in added.items()}},
                special={**vocabulary.special, **special},
                added={**vocabulary.added, **added},
            )
    raise UnsupportedTokenizerError(
        f"{type(tokenizer).__name__} is a slow tokenizer: its decoder is Python code that cannot be read exactly; load "
        "its fast version (AutoTokenizer.from_pretrained), pass its vocabulary file if the ids are the file's, or "
        "build xtokmap.ByteTable.from_bytes([...]) yourself"
    )


def _of_tokenizers(tokenizer: Any) -> _Vocabulary:
    # The fast way reads the vocabulary without its merges. Unigram shows its unk id (and a piece that is there twice)
    # only in its JSON; wrappers (tokenizers.implementations, fastokens) have nothing but their JSON.
    if not hasattr(tokenizer, "get_added_tokens_decoder") or type(tokenizer.model).__name__ == "Unigram":
        return _of_tokenizer_json(json.loads(_serialized(tokenizer.to_str, "tokenizer")))
    model = tokenizer.model
    parts = {"type": type(model).__name__, **{key: getattr(model, key, None) for key in _AFFIXES}}
    unk_token = getattr(model, "unk_token", None)
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    pieces = list(map(model.id_to_token, range(size)))
    # Holes between the ids, or an id of two tokens, show as None.
    names = _names(tokenizer.get_vocab(with_added_tokens=False)) if None in pieces else dict(enumerate(pieces))
    unk = None if unk_token is None else model.token_to_id(unk_token)
    part = tokenizer.decoder
    decoder = None if part is None else json.loads(_serialized(part.__getstate__, "decoder"))
    added = {i: (token.content, token.special) for i, token in tokenizer.get_added_tokens_decoder().items()}
    return _of_parts(parts, names, unk, added, decoder)


def _serialized(serialize: Callable[[], Any], what: str) -> Any:
    try:
        return serialize()
    except Exception as error:  # tokenizers raises nothing narrower
        raise UnsupportedTokenizerError(
            f"{what}: {error}; a part that is written in Python cannot be read or copied, set a built-in one"
        ) from None


def _of_tokenizer_json(spec: dict[str, Any]) -> _Vocabulary:
    model = spec["model"]
    vocab = model.get("vocab")
    unk = model.get("unk_id")
    _integers([] if unk is None else [unk])
    unk_token = model.get("unk_token")
    if not isinstance(unk_token, (str, type(None))):
        raise TypeError(f"unk_token {unk_token!r} is no text")
    if isinstance(vocab, dict):
        _integers(vocab.values())
        known, names = dict(vocab), _names(vocab)
        unk = known.get(unk_token) if unk_token is not None else None
    elif isinstance(vocab, list):  # Unigram: [piece, score] in order of ids
        names = dict(enumerate(piece for piece, _ in vocab))
        known = {piece: i for i, piece in names.items()}
    else:
        raise UnsupportedTokenizerError(f"model {model.get('type')!r} has no vocabulary; a reader needs one")
    added: dict[int, tuple[str, bool]] = {}
    after = len(vocab)
    for token in spec.get("added_tokens") or []:
        i, content, is_special = token["id"], token["content"], token["special"]
        if [type(part) for part in (i, content, is_special)] != [int, str, bool] or not content:
            raise TypeError(f"added token {token!r}: needs an integer id, a content and true or false for special")
        # tokenizers does not take the id from the file: that of the vocabulary, else the next one.
        own = known.setdefault(content, after)
        if own != i:
            raise UnsupportedTokenizerError(
                f"added token {content!r} is listed as id {i}, but tokenizers loads it as {own}; make them agree, or "
                "load the tokenizer and pass that"
            )
        added[i] = content, is_special
        after = max(after, i + 1)
    return _of_parts(model, names, unk, added, spec["decoder"])


def _names(vocab: Mapping[str, int]) -> dict[int, str]:
    names = dict(zip(vocab.values(), vocab, strict=True))
    if len(names) < len(vocab):
        raise UnsupportedTokenizerError(
            f"{len(vocab) - len(names)} ids of the vocabulary belong to more than one token; give each its own id"
        )
    return names


#: How a model marks where a word ends or goes on; the decoder must take the mark away again.
_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")


def _of_parts(
    model: Mapping[str, Any],
    names: dict[int, str],
    unk: int | None,
    added: Mapping[int, tuple[str, bool]],
    decoder: dict[str, Any] | None,
) -> _Vocabulary:
    """A vocabulary from the parts of a tokenizer: its model's tokens, its added tokens, its decoder."""
    if decoder is None:
        raise UnsupportedTokenizerError(
            "decoder: this tokenizer has none, so what its tokens spell together is not defined; set tokenizer.decoder "
            "(e.g. tokenizers.decoders.ByteLevel()) as the model was trained"
        )
    spelling = _spelling(decoder)
    for key in _AFFIXES:
        if model.get(key) and model[key] not in spelling.undone:
            raise UnsupportedTokenizerError(
                f"model {model.get('type')!r}: {key} {model[key]!r} stays in the text, as decoder {decoder['type']} "
                "does not take it away; set a decoder that does (WordPiece, BPEDecoder), or build "
                "xtokmap.ByteTable.from_bytes([...]) yourself"
            )
    special = {i: content for i, (content, is_special) in added.items() if is_special}
    if unk is not None:
        special.setdefault(unk, names[unk])
    pieces = dict(names)
    for i in special:
        pieces.pop(i, None)
    tokens = dict(zip(pieces, spelling.of(list(pieces.values())), strict=True))
    ordinary = {i: content for i, (content, _) in added.items() if i not in special}
    for i, content in ordinary.items():
        # Only its own text encodes to a token outside the model's vocabulary, so that is what it spells, although
        # a ByteLevel decoder garbles it where its letters happen to be in the byte alphabet ("naïve").
        if names.get(i) != content:
            tokens[i] = spelling.of([content])[0] if spelling.joins_words else content.encode()
    byte_pieces = tuple(i for i, name in pieces.items() if name in _BYTE_PIECES) if spelling.invalid == "run" else ()
    return _Vocabulary(tokens, special, ordinary, invalid=spelling.invalid, byte_pieces=byte_pieces)


class _Spelling(NamedTuple):
    """What a tokenizers decoder does with tokens inside a text, each by itself."""

    of: Callable[[list[str]], list[bytes]]
    invalid: str
    undone: frozenset[str]
    joins_words: bool


def _spelling(spec: dict[str, Any]) -> _Spelling:
    texts: list[Callable[[str], str] | tuple[str, str]] = []
    kind_of_bytes: Literal["plain", "byte level", "byte pieces"] = "plain"
    undone: set[str] = set()
    invalid, open_, joins_words = "maximal", True, False  # open_: the step still sees single tokens, as text
    for step in _flatten(spec):
        kind = step["type"]
        if kind == "ByteLevel" and open_:
            kind_of_bytes, open_ = "byte level", False
        elif kind == "ByteFallback" and open_:
            kind_of_bytes, invalid, open_ = "byte pieces", "run", False
        elif kind == "Fuse":
            open_ = False
        elif kind == "Strip" and not open_ and (step["content"], step["stop"]) == (" ", 0) and step["start"] <= 1:
            pass  # the prefix space, at position 0 of a text
        elif kind == "Metaspace" and open_ and len(step.get("replacement", "▁")) == 1:
            texts.append(_replacer(step.get("replacement", "▁"), " "))
        elif kind == "Replace" and open_ and step["pattern"].get("String"):
            texts.append(_replacer(step["pattern"]["String"], step["content"]))
            undone.add(step["pattern"]["String"])
        elif kind == "BPEDecoder" and open_ and step["suffix"]:
            texts.append(_replacer(step["suffix"], " "))
            undone.add(step["suffix"])
        elif kind == "WordPiece" and open_:
            texts.append(_word_piece(step["prefix"], step["cleanup"]))
            undone.add(step["prefix"])
            joins_words = True
        else:
            detail = {key: value for key, value in step.items() if key != "type"}
            raise UnsupportedTokenizerError(
                f"decoder step {kind} {detail}{'' if open_ else ', after the tokens are joined'}: what a token spells "
                "depends on its neighbours or on a pattern, so its bytes cannot be known exactly; build "
                "xtokmap.ByteTable.from_bytes([...]) for this vocabulary yourself"
            )
    return _Spelling(_composed(texts, kind_of_bytes), invalid, frozenset(undone), joins_words)


def _composed(
    texts: Sequence[Callable[[str], str] | tuple[str, str]], kind: Literal["plain", "byte level", "byte pieces"]
) -> Callable[[list[str]], list[bytes]]:
    """All changes of a text, in order, then its bytes. A pair is (what to replace, with what)."""
    pairs = [text for text in texts if isinstance(text, tuple)]
    if len(pairs) == len(texts):
        return lambda tokens: _core.spell(tokens, pairs, kind)

    def spell(tokens: list[str]) -> list[bytes]:
        for text in texts:
            tokens = list(map(methodcaller("replace", *text) if isinstance(text, tuple) else text, tokens))
        return _core.spell(tokens, [], kind)

    return spell


def _flatten(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if spec["type"] == "Sequence":
        if not isinstance(spec["decoders"], list):
            raise TypeError(f"expected a list of decoders, got {spec['decoders']!r}")
        for step in spec["decoders"]:
            yield from _flatten(step)
    else:
        yield spec


_HEX = "0123456789abcdefABCDEF"
#: Pieces that stand for one byte.
_BYTE_PIECES = {f"<0x{a}{b}>": bytes.fromhex(a + b) for a in _HEX for b in _HEX}


#: Characters that a replacement may put into one token: a chain of them could double it at every step.
_GROWTH_LIMIT = 1 << 12


def _replacer(old: str, new: str) -> Callable[[str], str] | tuple[str, str]:
    if len(new) <= len(old):
        return old, new

    def spell(token: str) -> str:
        if token.count(old) * len(new) > _GROWTH_LIMIT:
            raise UnsupportedTokenizerError(
                f"decoder step Replace {old[:20]!r}: a token becomes longer than {_GROWTH_LIMIT} characters; the "
                "decoder is damaged"
            )
        return token.replace(old, new)

    return spell


#: What the WordPiece decoder's clean-up replaces, in its order.
_CLEANUP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def _word_piece(prefix: str, cleanup: bool) -> Callable[[str], str]:
    def spell(token: str) -> str:
        text = token.removeprefix(prefix) if token.startswith(prefix) else " " + token
        if cleanup:
            for old, new in _CLEANUP:
                text = text.replace(old, new)
        return text

    return spell


# ---- tiktoken ----------------------------------------------------------------------------------------------------


def _of_tiktoken(encoding: Any) -> _Vocabulary:
    special = {encoding.encode_single_token(name): name for name in encoding.special_tokens_set}
    ordinary = [i for i in range(encoding.n_vocab) if i not in special]
    decode = encoding.decode_single_token_bytes
    try:
        return _Vocabulary(dict(zip(ordinary, map(decode, ordinary), strict=True)), special)
    except KeyError:  # a hole in the ranks
        pass
    tokens = {}
    for i in ordinary:
        with suppress(KeyError):
            tokens[i] = decode(i)
    return _Vocabulary(tokens, special)


def _is_tiktoken(path: Path) -> bool:
    with path.open("rb") as file:
        return _TIKTOKEN_LINE.match(file.read(1024)) is not None


#: Bytes; the largest known file has 4 million.
_UNPACKED_LIMIT = 1 << 26


#: Every byte but those that stand between the token and the rank of a line, and between lines.
_NO_SEPARATORS = bytes(set(range(256)) - set(b" \n"))


def _of_tiktoken_file(path: Path) -> _Vocabulary:
    data = path.read_bytes()
    with _reading(path, ".tiktoken file (lines of base64 token and rank)"):
        if path.name.endswith(".gz"):
            with gzip.open(path) as file:
                data = file.read(_UNPACKED_LIMIT + 1)
            if len(data) > _UNPACKED_LIMIT:
                raise ValueError(f"more than {_UNPACKED_LIMIT} bytes when unpacked")
        fields = data.split()
        if data.translate(None, delete=_NO_SEPARATORS) != b" \n" * (len(fields) // 2):
            rows = [line.split() for line in data.splitlines() if line]
            fields = [field for token, rank in rows for field in (token, rank)]
        tokens = dict(zip(map(int, fields[1::2]), map(_unbase64, fields[::2]), strict=True))
        if 2 * len(tokens) < len(fields) or min(tokens) < 0:
            raise ValueError("a rank is negative or there twice; ranks are token ids from 0")
    return _Vocabulary(tokens, {})


# ---- SentencePiece and mistral-common ----------------------------------------------------------------------------

#: Types of pieces, the same in SentencePiece models and GGUF files.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


def _of_pieces(pieces: Sequence[str], types: Sequence[int], stop_ids: tuple[int, ...]) -> _Vocabulary:
    tokens: dict[int, bytes] = {}
    special: dict[int, str] = {}
    added: dict[int, str] = {}
    for i, (piece, kind) in enumerate(zip(pieces, types, strict=True)):
        if kind == _NORMAL:
            tokens[i] = piece.replace("▁", " ").encode()
        elif kind == _BYTE:
            if piece not in _BYTE_PIECES:
                raise ValueError(f"byte piece {piece!r}: not of the form <0x0A>")
            tokens[i] = _BYTE_PIECES[piece]
        elif kind != _USER_DEFINED or (piece in STOP_TOKENS and piece != "</s>"):
            special[i] = piece  # Gemma's <end_of_turn> is user-defined; so is its </s>, but that is the HTML tag
        else:
            tokens[i], added[i] = piece.replace("▁", " ").encode(), piece
    return _Vocabulary(tokens, special, added, stop_ids, "each")


def _of_sentencepiece(proto: bytes) -> _Vocabulary:
    """A vocabulary from a serialized ModelProto (sentencepiece_model.proto); the package itself is not needed."""
    pieces: list[str] = []
    types: list[int] = []
    eos = "</s>"
    for field, value in _protobuf(proto):
        if field == 1:
            piece = dict(_protobuf(value))
            pieces.append(piece[1].decode())
            types.append(piece.get(3, _NORMAL))
            if types[-1] not in range(_NORMAL, _BYTE + 1):
                raise ValueError(f"piece {pieces[-1]!r} has the unknown type {types[-1]!r}")
        elif field == 2:
            eos = dict(_protobuf(value)).get(47, eos.encode()).decode()
        elif field == 5 and dict(_protobuf(value)).get(2):
            raise UnsupportedTokenizerError(
                "denormalizer: this SentencePiece model rewrites the text that its pieces spell, so their bytes cannot "
                "be known exactly; build xtokmap.ByteTable.from_bytes([...]) yourself"
            )
    if not pieces:
        raise ValueError("no pieces")
    stop_ids = tuple(i for i, kind in enumerate(types) if kind == _CONTROL and pieces[i] == eos)
    return _of_pieces(pieces, types, stop_ids)


def _without_markers(processor: Any) -> Any:
    """A new processor without the user's defaults, that reads `<end_of_turn>` in a text as text.

    SentencePiece finds user-defined pieces in every text; those that have no bytes here become control pieces.
    """
    proto = processor.serialized_model_proto()
    special = _of_sentencepiece(proto).special
    fields = bytearray()
    piece_id = 0
    for field, value in _protobuf(proto):
        # The last type that a message gives is the one that counts.
        marker = field == 1 and piece_id in special and dict(_protobuf(value)).get(3) == _USER_DEFINED
        body = value + bytes([3 << 3, _CONTROL]) if marker else value
        fields += _varint(field << 3 | 2) + _varint(len(body)) + body
        piece_id += field == 1
    return type(processor)(model_proto=bytes(fields))


def _varint(value: int) -> bytes:
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])


def _protobuf(message: bytes) -> Iterator[tuple[int, Any]]:
    """The (field number, value) pairs of a protobuf message: int for a varint, else the raw bytes."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7
            if shift > 63:
                raise ValueError("a number has more than 64 bits")

    at = 0
    while at < len(message):
        key, at = (message[at], at + 1) if message[at] < 0x80 else varint(at)
        kind = key & 7
        if kind == 0:
            value, at = varint(at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = (message[at], at + 1) if message[at] < 0x80 else varint(at)
        else:
            size = {1: 8, 5: 4}[kind]
        if at + size > len(message):
            raise ValueError("a field is cut off")
        yield key >> 3, message[at : at + size]
        at += size


def _mistral_core(tokenizer: Any) -> Any:
    """The tekken or SentencePiece tokenizer inside mistral-common's layers."""
    for layer in ("instruct_tokenizer", "tokenizer"):
        tokenizer = getattr(tokenizer, layer, tokenizer)
    return tokenizer


def _of_mistral(tokenizer: Any) -> _Vocabulary:
    core = _mistral_core(tokenizer)
    if type(core).__name__ == "Tekkenizer":
        special = {i: core.id_to_piece(i) for i in range(core.num_special_tokens)}
        tokens = {i: core.id_to_byte_piece(i) for i in range(core.num_special_tokens, core.n_words)}
        return _Vocabulary(tokens, special, stop_ids=(core.eos_id,))
    if type(core).__name__ == "SentencePieceTokenizer":
        return _of_sentencepiece(core._model.serialized_model_proto())
    raise UnsupportedTokenizerError(
        f"mistral-common {type(core).__name__}: only its tekken and SentencePiece tokenizers are known; pass their file"
    )


def _of_tekken(spec: dict[str, Any]) -> _Vocabulary:
    config = spec["config"]
    count, size = _integers((config["default_num_special_tokens"], config["default_vocab_size"]))
    # A file may hold more tokens than it declares; the surplus is not part of the vocabulary.
    vocab = spec["vocab"][: max(size - count, 0)]
    if not 0 <= count <= size <= _ID_LIMIT or len(vocab) < size - count:
        raise ValueError(f"{len(vocab)} tokens and {count} special ones where {size} are declared")
    if _integers(token["rank"] for token in vocab) != list(range(len(vocab))):
        raise ValueError("the ranks of the vocabulary do not count up from 0")
    special = {i: f"<SPECIAL_{i}>" for i in range(count)}
    listed: Sequence[Mapping[str, Any]] = spec.get("special_tokens") or _TEKKEN_SPECIAL
    ranks = _integers(token["rank"] for token in listed)
    if len(set(ranks)) < len(ranks) or not special.keys() >= set(ranks):
        raise ValueError(f"special tokens: a rank is there twice or not below {count}")
    for i, token in zip(ranks, listed, strict=True):
        if not isinstance(token["token_str"], str):
            raise TypeError(f"special token {i} is called {token['token_str']!r}")
        special[i] = token["token_str"]
    tokens = {count + i: _unbase64(token["token_bytes"]) for i, token in enumerate(vocab)}
    return _Vocabulary(tokens, special)


#: Files before version 7 do not list their special tokens; only the end of text matters here.
_TEKKEN_SPECIAL = ({"rank": 2, "token_str": "</s>"},)


# ---- GGUF --------------------------------------------------------------------------------------------------------


def _of_gguf(path: Path) -> _Vocabulary:
    with _reading(path, "GGUF file with a tokenizer"):
        keys = ("model", "tokens", "token_type", "eos_token_id", "eot_token_id", "eom_token_id")
        data = np.memmap(path, np.uint8, "r")
        fields, _ = _gguf_fields(data, {f"tokenizer.ggml.{key}".encode(): key for key in keys})
        kind, pieces, types = fields["model"].decode(), [t.decode() for t in fields["tokens"]], fields["token_type"]
        stop_ids = tuple(int(fields[end]) for end in keys[3:] if end in fields)
        if kind == "llama":
            return _of_pieces(pieces, types, stop_ids)
        if kind != "gpt2":
            raise UnsupportedTokenizerError(
                f"tokenizer.ggml.model {kind!r}: only gpt2 (byte-level) and llama (SentencePiece) are known; load the "
                "model's own tokenizer and pass that"
            )
        rows = list(enumerate(zip(pieces, types, strict=True)))
        special = {i: piece for i, (piece, t) in rows if t not in (_NORMAL, _USER_DEFINED)}
        added = {i: piece for i, (piece, t) in rows if t == _USER_DEFINED}
        normal = {i: piece for i, (piece, t) in rows if t == _NORMAL}
        tokens = dict(zip(normal, _core.spell(list(normal.values()), [], "byte level"), strict=True))
        tokens.update((i, piece.encode()) for i, piece in added.items())
        return _Vocabulary(tokens, special, added, stop_ids)


#: struct formats of GGUF's value types; 8 is a string, 9 an array.
_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def _gguf_fields(data: npt.NDArray[np.uint8], wanted: Mapping[bytes, str]) -> tuple[dict[str, Any], int]:
    """Wanted key-value pairs of a GGUF file's header (versions 2 and 3), strings as bytes; and where the pairs end.

    The reader of the `gguf` package makes arrays of every element of every key: 13 s for the 262,144 tokens of Gemma 3,
    where this takes 0.1 s. The tensors are not touched, so the first part of a split file will do.
    """
    fields: dict[str, Any] = {}
    buffer = data.data
    magic, version = struct.unpack_from("<4sI", buffer)
    order = "<" if version & 0xFFFF else ">"
    (version,) = struct.unpack_from(f"{order}I", buffer, 4)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"magic {magic!r}, version {version}; known are GGUF versions 2 and 3")
    u32, u64 = struct.Struct(f"{order}I").unpack_from, struct.Struct(f"{order}Q").unpack_from

    def strings(at: int, count: int, keep: bool = True) -> tuple[list[bytes], int]:
        found = _core.gguf_strings(data, at, count, order == ">", keep)
        if found is None:
            raise ValueError("a string is cut off")
        return found

    (pairs,), at = u64(buffer, 16), 24
    for _ in range(pairs):
        (key,), at = strings(at, 1)
        (kind,), at = u32(buffer, at), at + 4
        count = None
        if kind == 9:
            (kind,), (count,), at = u32(buffer, at), u64(buffer, at + 4), at + 12
        values: list[Any] = []
        if kind == 8:
            values, at = strings(at, 1 if count is None else count, key in wanted)
        else:
            row = struct.Struct(f"{order}{1 if count is None else count}{_GGUF_SCALARS[kind]}")
            values.extend(row.unpack_from(buffer, at) if key in wanted else ())
            at += row.size
        if key in wanted:
            fields[wanted[key]] = values if count is not None else values[0]
    return fields, at


# ---- codecs: text -> ids, in bulk --------------------------------------------------------------------------------

Int64: TypeAlias = npt.NDArray[np.int64]


class TextCodec(Protocol):
    """Encodes texts with a user's tokenizer, in bulk."""

    def encode_batch(self, texts: Sequence[str]) -> tuple[Int64, Int64]:
        """Texts -> flat int64 ids and `cu_seqlens` int64 `[len(texts) + 1]`.

        No special tokens are added, and text that looks like one is encoded as text; added tokens that are not special
        (`<think>`) are found in the text as ever, except by slow transformers tokenizers. A prefix space that the
        tokenizer itself puts before a text stays: alignment takes it into the first chunk. Nothing is truncated or
        padded.

        Raises:
            XTokMapError: half of a surrogate pair in a text, where the tokenizer does not take it.
        """
        ...


def text_codec(tokenizer: Any) -> TextCodec:
    """The codec of a tokenizer as `byte_table` takes it, if it can encode.

    `tokenizers`-based ones are copied as they are now, so that no setting of the user's object is touched, and encode
    through `fastokens` where that is installed and gives the same ids on a sample of odd text (`ODD_TEXTS` and the
    tokenizer's added tokens), checked once here; a difference is a warning that names the text, and `tokenizers` is
    used.

    Raises:
        UnsupportedTokenizerError: nothing here can encode (a `ByteTable`, a GGUF file, a bare vocabulary), the package
            that can is missing, or the file is damaged.
        FileNotFoundError: a path that does not exist.
    """
    roles: Iterable[str] = ()
    if isinstance(tokenizer, (str, os.PathLike)):
        path = _existing(tokenizer)
        tokenizer = _load_encoder(path)
        roles = _of_directory(path).special.values() if path.is_dir() else ()
    packages = _packages(tokenizer)
    if "transformers" in packages:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            return _fastest(backend, tokenizer.all_special_tokens)
        inner = getattr(tokenizer, "tokenizer", None)
        if _packages(inner) & {"transformers", "tiktoken", "mistral_common"}:
            return text_codec(inner)
        return _Lists(
            lambda texts: [tokenizer.encode(t, add_special_tokens=False, split_special_tokens=True) for t in texts]
        )
    if packages & {"tokenizers", "fastokens"}:
        return _fastest(tokenizer, roles)
    if "tiktoken" in packages:
        return _Lists(tokenizer.encode_ordinary_batch)
    if "sentencepiece" in packages:
        plain = _without_markers(tokenizer)
        return _Lists(lambda texts: plain.encode(texts, out_type=int))
    if "mistral_common" in packages:
        core = _mistral_core(tokenizer)
        return _Lists(lambda texts: [core.encode(text, bos=False, eos=False) for text in texts])
    raise UnsupportedTokenizerError(
        f"a {type(tokenizer).__name__} cannot encode text: give the Aligner the teacher's tokenizer itself"
    )


def _loaded(path: Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # whatever each package raises: bare Exception, RuntimeError, AssertionError
        raise UnsupportedTokenizerError(
            f"{path}: cannot be loaded ({type(error).__name__}: {error}); fetch the file again"
        ) from None


def _load_encoder(path: Path) -> Any:
    directory = path if path.is_dir() else None
    path = _file_in(path) if directory else path
    if path.name.endswith(".json"):
        if "config" in _load_json(path):
            tekken = _require("mistral_common.tokens.tokenizers.tekken", f"encoding with {path.name}")
            return _loaded(path, lambda: tekken.Tekkenizer.from_file(path))
        package = _require("tokenizers", f"encoding with {path.name}")
        return _loaded(path, lambda: package.Tokenizer.from_file(str(path)))
    if _MODEL_NAME.fullmatch(path.name) and not _is_tiktoken(path):
        if directory and _of_directory(directory).tokens.keys() - _vocabulary_of_path(path).tokens.keys():
            raise UnsupportedTokenizerError(
                f"{directory}: {path.name} cannot encode the added tokens that the files beside it declare; load it "
                "with transformers.AutoTokenizer.from_pretrained and pass that"
            )
        package = _require("sentencepiece", f"encoding with {path.name}")
        return _loaded(path, lambda: package.SentencePieceProcessor(model_file=str(path)))
    raise UnsupportedTokenizerError(
        f"{path}: a bare vocabulary cannot encode; load the tokenizer (a tiktoken.Encoding with its pattern, or "
        "transformers' AutoTokenizer, with gguf_file= for GGUF) and pass that"
    )


@contextmanager
def _named(texts: Sequence[str]) -> Iterator[None]:
    """What no encoder takes is named; each has an error of its own for it."""
    try:
        yield
    except (TypeError, UnicodeError):
        for k, text in enumerate(texts):
            check_text(text, f"text {k}")
        raise


class _Lists:
    """A codec from a function that gives a list of ids for each text."""

    def __init__(self, encode: Callable[[list[str]], Iterable[Sequence[int]]]) -> None:
        self._encode = encode

    def encode_batch(self, texts: Sequence[str]) -> tuple[Int64, Int64]:
        with _named(texts):
            rows = list(self._encode(list(texts)))
        cu = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)), out=cu[1:])
        return np.fromiter(chain.from_iterable(rows), np.int64, int(cu[-1])), cu


class _Fastokens:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode_batch(self, texts: Sequence[str]) -> tuple[Int64, Int64]:
        with _named(texts):
            ids, offsets = self._tokenizer.encode_batch_flat(list(texts), split_special_tokens=True)
        return np.frombuffer(ids, np.uint32).astype(np.int64), np.frombuffer(offsets, np.uint64).astype(np.int64)


#: Text on which two encoders of one tokenizer tend to differ.
ODD_TEXTS = (
    "",
    " ",
    "  leading, trailing and   inner spaces  ",
    "\n\n\t mixed \r\n white\u00a0space\u3000here \n",
    "don't, we'll, I'D and 's 're",
    "1234567890 3.14159 1,000,000 0x1F ١٢٣ ५",
    "caf\u00e9 cafe\u0301 na\u00efve \u1e69 s\u0323\u0307",
    "漢字とかな交じり文、한국어 문장, นี่คือภาษาไทย",
    "हिन्दी और العربية עברית",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 e\u200bz\ufeff",
    "\ufffd\ufffd broken \u0000\u0001\u007f control",
    "<|im_end|> <s> </s> <eos> [INST] <0x41> ▁word",
    "def f(x):\n    return x**2  # comment\n\n\nclass A: pass",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ﬁne ½ Ａ１ ㎏ ſ İi ß ẞ",
)


def _fastest(tokenizer: Any, roles: Iterable[str]) -> TextCodec:
    copy = _require("tokenizers", "encoding").Tokenizer.from_str(_serialized(tokenizer.to_str, "tokenizer"))
    copy.encode_special_tokens = True
    copy.no_truncation()
    copy.no_padding()
    added = {token.content: token.special for token in copy.get_added_tokens_decoder().values()}
    copy.add_special_tokens([name for name in roles if added.get(name) is False])  # an eos may not be marked special
    # encode_batch_fast leaves the offsets out
    exact = _Lists(lambda texts: [row.ids for row in copy.encode_batch_fast(texts, add_special_tokens=False)])
    try:
        fastokens = importlib.import_module("fastokens")
    except ImportError:
        return exact
    sample = [*ODD_TEXTS, "".join(sorted(added)[:64]), " a ".join(sorted(added)[:64])]
    try:
        fast = _Fastokens(fastokens.Tokenizer.from_json_str(copy.to_str()))
        got, got_cu = fast.encode_batch(sample)
    except ValueError:
        return exact  # a kind that fastokens does not know
    except (AttributeError, TypeError) as error:
        warnings.warn(f"this version of fastokens cannot be used ({error}); tokenizers is", stacklevel=3)
        return exact
    want, want_cu = exact.encode_batch(sample)
    for k, text in enumerate(sample):
        a, b = want[want_cu[k] : want_cu[k + 1]].tolist(), got[got_cu[k] : got_cu[k + 1]].tolist()
        if a != b:
            warnings.warn(
                f"fastokens gives other ids than tokenizers on {text!r} ({b} for {a}); tokenizers is used", stacklevel=3
            )
            return exact
    return fast

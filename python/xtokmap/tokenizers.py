"""Readers: a tokenizer, or a tokenizer's file -> the bytes of every token id; and codecs that encode text in bulk.

What a reader cannot do exactly is an `UnsupportedTokenizerError` that names the part; nothing is guessed.
"""

from __future__ import annotations

import base64
import gzip
import importlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from xtokmap._core import ByteTable, UnsupportedTokenizerError

#: Tokens that end a turn or a text, by name. Those of them that a vocabulary holds as special tokens are its stop ids,
#: after the ones that the tokenizer itself declares; they correspond by this role, whatever their ids.
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
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|eot|>",
    "<|eom|>",
    "<|user_end|>",
    "<|assistant_end|>",
    "<｜end▁of▁sentence｜>",
    "<|end▁of▁sentence|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|eos|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "[SEP]",
)


def byte_table(tokenizer: Any) -> ByteTable:
    """The bytes of every token id of a tokenizer.

    Special tokens (and ids without an entry) have none. Added tokens that are not special are ordinary bytes. A prefix
    space that a tokenizer puts before a text belongs to the text's first position, not to the token: `▁the` is
    `b" the"` everywhere; likewise the space with which WordPiece decodes a token that starts a word.

    Args:
        tokenizer: a transformers fast tokenizer, `tokenizers.Tokenizer`, `tiktoken.Encoding`,
            `sentencepiece.SentencePieceProcessor`, a mistral-common tokenizer, a `ByteTable`, or a path: a directory as
            saved by `save_pretrained`, `tokenizer.json`, `*.model`, `*.tiktoken` (also `.gz`), `tekken.json`, `*.gguf`.

    Raises:
        UnsupportedTokenizerError: a kind or a part of a tokenizer whose bytes cannot be known exactly, or a missing
            package; the message names it and says what to do.
        FileNotFoundError: a path that does not exist.
    """
    if isinstance(tokenizer, ByteTable):
        return tokenizer
    if isinstance(tokenizer, (str, Path)):
        return _vocabulary_of_path(Path(tokenizer)).table()
    return _vocabulary_of_object(tokenizer).table()


class _Vocabulary(NamedTuple):
    """What every reader makes: bytes by id, the special ids, and who ends a text."""

    tokens: Mapping[int, bytes]
    special: Mapping[int, str]
    stop_ids: tuple[int, ...] = ()
    invalid: str = "maximal"

    def table(self) -> ByteTable:
        size = max(chain(self.tokens, self.special), default=-1) + 1
        rows = list(map(self.tokens.get, range(size)))
        for i in self.special:
            rows[i] = None
        by_name = {name: i for i, name in self.special.items()}
        named = [by_name[name] for name in STOP_TOKENS if name in by_name]
        declared = [i for i in self.stop_ids if 0 <= i < size]
        stop_ids = list(dict.fromkeys([*declared, *named]))
        for i in stop_ids:
            rows[i] = None
        return ByteTable.from_bytes(rows, stop_ids=stop_ids, invalid=self.invalid)


# ---- dispatch ----------------------------------------------------------------------------------------------------


def _packages(tokenizer: Any) -> set[str]:
    """The packages that an object's classes come from: found without importing any of them."""
    return {cls.__module__.partition(".")[0] for cls in type(tokenizer).__mro__}


def _vocabulary_of_object(tokenizer: Any) -> _Vocabulary:
    packages, name = _packages(tokenizer), type(tokenizer).__name__
    if "transformers" in packages:
        return _of_transformers(tokenizer)
    if "tokenizers" in packages:
        return _of_tokenizers(tokenizer)
    if "tiktoken" in packages:
        return _of_tiktoken(tokenizer)
    if "sentencepiece" in packages:
        return _of_sentencepiece(tokenizer)
    if "mistral_common" in packages:
        return _of_mistral(tokenizer)
    raise UnsupportedTokenizerError(
        f"{name} (from {type(tokenizer).__module__}): no reader for this type; pass a transformers fast tokenizer, a "
        "tokenizers.Tokenizer, tiktoken.Encoding, SentencePieceProcessor, mistral-common tokenizer, a path, or build "
        "xtokmap.ByteTable.from_bytes([...]) yourself"
    )


def _vocabulary_of_path(path: Path) -> _Vocabulary:
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or directory; a tokenizer on a hub must be loaded first, e.g. with "
            "transformers.AutoTokenizer.from_pretrained, and passed as an object"
        )
    if path.is_dir():
        return _of_directory(path)
    name = path.name
    if name.endswith((".tiktoken", ".tiktoken.gz")):
        return _of_tiktoken_file(path)
    if name.endswith(".gguf"):
        return _of_gguf(path)
    if ".model" in name:
        return _of_sentencepiece(_load_sentencepiece(path))
    if name.endswith(".json"):
        spec = _load_json(path)
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


def _of_directory(path: Path) -> _Vocabulary:
    for pattern in ("tokenizer.json", "tekken.json", "tokenizer.model*", "*.model", "*.tiktoken", "*.gguf"):
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            raise UnsupportedTokenizerError(
                f"{path}: {len(found)} files match {pattern} ({', '.join(f.name for f in found)}); pass the right one"
            )
        if found:
            vocabulary = _vocabulary_of_path(found[0])
            return vocabulary._replace(stop_ids=(*_declared_stops(path, vocabulary), *vocabulary.stop_ids))
    raise UnsupportedTokenizerError(
        f"{path}: no tokenizer.json, tekken.json, *.model, *.tiktoken or *.gguf in it; a slow tokenizer must be "
        "converted to a fast one first (load it with transformers and save_pretrained)"
    )


def _declared_stops(path: Path, vocabulary: _Vocabulary) -> Iterator[int]:
    """End-of-text ids that the files beside a tokenizer declare."""
    config = path / "tokenizer_config.json"
    if config.exists():
        eos = _load_json(config).get("eos_token")
        name = eos.get("content") if isinstance(eos, dict) else eos
        yield from (i for i, content in vocabulary.special.items() if content == name)
    generation = path / "generation_config.json"
    if generation.exists():
        ids: Any = _load_json(generation).get("eos_token_id")
        yield from (i for i in (ids if isinstance(ids, list) else [ids]) if i in vocabulary.special)


def _load_json(path: Path) -> dict[str, Any]:
    try:
        spec = json.loads(path.read_bytes())
    except ValueError as error:
        raise UnsupportedTokenizerError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(spec, dict):
        raise UnsupportedTokenizerError(f"{path}: expected a JSON object, got {type(spec).__name__}")
    return spec


def _require(package: str, what: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UnsupportedTokenizerError(f"{what} needs the package {package}: pip install {package}") from None


# ---- transformers and tokenizers ---------------------------------------------------------------------------------

#: The GPT-2 alphabet: every byte as one printable character.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(0x100) if byte not in _PRINTABLE]
_BYTE_OF = {**{byte: byte for byte in _PRINTABLE}, **{0x100 + k: byte for k, byte in enumerate(_OTHERS)}}
_IN_ALPHABET = re.compile("[" + "".join(re.escape(chr(c)) for c in _BYTE_OF) + "]*")
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _byte_level(token: str) -> bytes:
    # A character outside the alphabet makes the whole token plain text, as in the decoder.
    if _IN_ALPHABET.fullmatch(token):
        return token.translate(_BYTE_OF).encode("latin-1")
    return token.encode()


def _byte_piece(token: str) -> bytes:
    return bytes([int(token[3:5], 16)]) if _BYTE_PIECE.fullmatch(token) else token.encode()


def _of_transformers(tokenizer: Any) -> _Vocabulary:
    name = type(tokenizer).__name__
    if "Mistral" in name and hasattr(tokenizer, "tokenizer") and "mistral_common" in _packages(tokenizer.tokenizer):
        return _of_mistral(tokenizer.tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocab_file = str(getattr(tokenizer, "vocab_file", None) or "")
        if ".model" in vocab_file and Path(vocab_file).exists():
            vocabulary = _of_sentencepiece(_load_sentencepiece(Path(vocab_file)))
            added = tokenizer.added_tokens_decoder
            if all(i in vocabulary.tokens or i in vocabulary.special for i in added):
                return vocabulary
        raise UnsupportedTokenizerError(
            f"{name} is a slow tokenizer: its decoder is Python code that cannot be read exactly; use its fast version "
            "(AutoTokenizer.from_pretrained(..., use_fast=True)) or pass its vocabulary file"
        )
    vocabulary = _of_tokenizers(backend)
    special = dict(vocabulary.special)
    special.update(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=False))
    eos = tokenizer.eos_token_id
    stop_ids = (eos,) if isinstance(eos, int) else tuple(eos or ())
    return vocabulary._replace(special=special, stop_ids=stop_ids)


def _of_tokenizers(tokenizer: Any) -> _Vocabulary:
    if not hasattr(tokenizer, "get_added_tokens_decoder"):
        raise UnsupportedTokenizerError(
            f"{type(tokenizer).__name__} (from {type(tokenizer).__module__}): pass the tokenizers.Tokenizer inside it"
        )
    if tokenizer.decoder is None:
        raise UnsupportedTokenizerError(_no_decoder())
    decoder = json.loads(tokenizer.decoder.__getstate__())
    added = {i: (token.content, token.special) for i, token in tokenizer.get_added_tokens_decoder().items()}
    return _of_parts(tokenizer.get_vocab(with_added_tokens=False), added, decoder)


def _of_tokenizer_json(spec: dict[str, Any]) -> _Vocabulary:
    vocab = spec["model"].get("vocab")
    if isinstance(vocab, list):  # Unigram: [piece, score] in order of ids
        vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
    if not isinstance(vocab, dict):
        raise UnsupportedTokenizerError(f"tokenizer.json: model {spec['model'].get('type')!r} has no vocabulary")
    if spec["decoder"] is None:
        raise UnsupportedTokenizerError(_no_decoder())
    added = {token["id"]: (token["content"], token["special"]) for token in spec.get("added_tokens") or []}
    return _of_parts(vocab, added, spec["decoder"])


def _no_decoder() -> str:
    return (
        "this tokenizer has no decoder: what its tokens spell together is not defined; set tokenizer.decoder "
        "(e.g. tokenizers.decoders.ByteLevel()) as the model was trained"
    )


def _of_parts(vocab: Mapping[str, int], added: Mapping[int, tuple[str, bool]], decoder: dict[str, Any]) -> _Vocabulary:
    spell, invalid = _decoder(decoder)
    special = {i: content for i, (content, is_special) in added.items() if is_special}
    names = {i: token for token, i in vocab.items()}
    names.update({i: content for i, (content, _) in added.items()})
    tokens = {i: spell(token) for i, token in names.items() if i not in special}
    return _Vocabulary(tokens, special, invalid=invalid)


def _decoder(spec: dict[str, Any]) -> tuple[Callable[[str], bytes], str]:
    """What one token spells inside a text, by the steps of a tokenizers decoder; and how invalid bytes are counted."""
    steps = list(_flatten(spec))
    texts: list[Callable[[str], str]] = []
    to_bytes: Callable[[str], bytes] = str.encode
    invalid, fused = "maximal", False
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            to_bytes = _byte_level
        elif kind == "ByteFallback":
            to_bytes, invalid = _byte_piece, "each"
        elif kind == "Fuse":
            fused = True
        elif kind == "Metaspace":
            texts.append(_replacer(step.get("replacement", "▁"), " "))
        elif kind == "Replace" and isinstance(step["pattern"], dict) and "String" in step["pattern"]:
            texts.append(_replacer(step["pattern"]["String"], step["content"]))
        elif kind == "Strip" and fused and step["content"] == " " and step["start"] <= 1 and step["stop"] == 0:
            pass  # the prefix space of a text, at position 0
        elif kind == "WordPiece":
            texts.append(_word_piece(step["prefix"], step["cleanup"]))
        else:
            detail = {key: value for key, value in step.items() if key != "type"}
            raise UnsupportedTokenizerError(
                f"decoder step {kind} {detail}: what a token spells depends on its neighbours or on a pattern, so its "
                "bytes cannot be known exactly; build xtokmap.ByteTable.from_bytes([...]) for this vocabulary yourself"
            )
    if not texts:
        return to_bytes, invalid

    def spell(token: str) -> bytes:
        for text in texts:
            token = text(token)
        return to_bytes(token)

    return spell, invalid


def _flatten(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if spec["type"] == "Sequence":
        for step in spec["decoders"]:
            yield from _flatten(step)
    else:
        yield spec


def _replacer(old: str, new: str) -> Callable[[str], str]:
    return lambda token: token.replace(old, new)


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
    tokens = {}
    for i in range(encoding.n_vocab):
        if i not in special:
            try:
                tokens[i] = encoding.decode_single_token_bytes(i)
            except KeyError:
                continue  # a hole in the ranks
    return _Vocabulary(tokens, special)


def _of_tiktoken_file(path: Path) -> _Vocabulary:
    data = path.read_bytes()
    try:
        if path.name.endswith(".gz"):
            data = gzip.decompress(data)
        rows = (line.split() for line in data.splitlines() if line)
        tokens = {int(rank): base64.b64decode(token, validate=True) for token, rank in rows}
    except (ValueError, OSError, EOFError) as error:
        raise UnsupportedTokenizerError(
            f"{path}: not a .tiktoken file (lines of base64 token and rank): {error}"
        ) from None
    if any(rank < 0 for rank in tokens):
        raise UnsupportedTokenizerError(f"{path}: a negative rank; ranks are token ids from 0")
    return _Vocabulary(tokens, {})


# ---- SentencePiece and mistral-common ----------------------------------------------------------------------------


def _load_sentencepiece(path: Path) -> Any:
    package = _require("sentencepiece", f"reading {path.name}")
    try:
        return package.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UnsupportedTokenizerError(f"{path}: not a SentencePiece model ({error})") from None


def _of_sentencepiece(processor: Any) -> _Vocabulary:
    ids = list(range(processor.get_piece_size()))
    pieces = processor.id_to_piece(ids)
    hidden = zip(processor.IsControl(ids), processor.IsUnknown(ids), processor.IsUnused(ids), strict=True)
    special = {i: pieces[i] for i, flags in enumerate(hidden) if any(flags)}
    is_byte = processor.IsByte(ids)
    tokens = {
        i: bytes([int(piece[3:5], 16)]) if is_byte[i] else piece.replace("▁", " ").encode()
        for i, piece in enumerate(pieces)
        if i not in special
    }
    eos = processor.eos_id()
    return _Vocabulary(tokens, special, (eos,) if eos >= 0 else (), "each")


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
        return _Vocabulary(tokens, special, (core.eos_id,))
    if type(core).__name__ == "SentencePieceTokenizer":
        return _of_sentencepiece(core._model)
    raise UnsupportedTokenizerError(f"mistral-common {type(core).__name__}: only tekken and SentencePiece are known")


def _of_tekken(spec: dict[str, Any]) -> _Vocabulary:
    config = spec["config"]
    count = int(config["default_num_special_tokens"])
    inner = int(config["default_vocab_size"]) - count
    special = {i: f"<SPECIAL_{i}>" for i in range(count)}
    listed: Sequence[Mapping[str, Any]] = spec.get("special_tokens") or _TEKKEN_SPECIAL
    special.update({int(token["rank"]): token["token_str"] for token in listed})
    tokens = {
        count + int(token["rank"]): base64.b64decode(token["token_bytes"])
        for token in spec["vocab"]
        if int(token["rank"]) < inner
    }
    return _Vocabulary(tokens, special)


#: Files before version 7 do not list their special tokens; only the end of text matters here.
_TEKKEN_SPECIAL = ({"rank": 2, "token_str": "</s>"},)


# ---- GGUF --------------------------------------------------------------------------------------------------------

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


def _of_gguf(path: Path) -> _Vocabulary:
    package = _require("gguf", f"reading {path.name}")
    try:
        fields = package.GGUFReader(path).fields
        kind = fields["tokenizer.ggml.model"].contents()
        names = fields["tokenizer.ggml.tokens"].contents()
        types = fields["tokenizer.ggml.token_type"].contents()
    except (KeyError, ValueError, IndexError, OSError) as error:
        raise UnsupportedTokenizerError(f"{path}: no tokenizer in this GGUF file ({error})") from None
    if kind == "gpt2":
        spell, invalid = _byte_level, "maximal"
    elif kind == "llama":
        spell, invalid = (lambda token: token.replace("▁", " ").encode()), "each"
    else:
        raise UnsupportedTokenizerError(
            f"{path}: GGUF tokenizer model {kind!r}; gpt2 (byte-level) and llama (SentencePiece) are known. Load the "
            "model's own tokenizer instead"
        )
    tokens: dict[int, bytes] = {}
    special: dict[int, str] = {}
    for i, (name, token_type) in enumerate(zip(names, types, strict=True)):
        if token_type in (_UNKNOWN, _CONTROL, _UNUSED):
            special[i] = name
        elif token_type == _BYTE:
            tokens[i] = _byte_piece(name)
        elif token_type == _USER_DEFINED and kind == "gpt2":
            tokens[i] = name.encode()
        else:
            tokens[i] = spell(name)
    ends = (f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot", "eom"))
    stop_ids = tuple(int(fields[end].contents()) for end in ends if end in fields)
    return _Vocabulary(tokens, special, stop_ids, invalid)


# ---- codecs: text -> ids, in bulk --------------------------------------------------------------------------------

Int64: TypeAlias = npt.NDArray[np.int64]


class TextCodec(Protocol):
    """Encodes texts with a user's tokenizer, in bulk."""

    def encode_batch(self, texts: Sequence[str]) -> tuple[Int64, Int64]:
        """Texts -> flat int64 ids and `cu_seqlens` int64 `[len(texts) + 1]`.

        No special tokens are added, and text that looks like one is encoded as text. A prefix space that the tokenizer
        itself puts before a text stays: alignment takes it into the first chunk.
        """
        ...


def text_codec(tokenizer: Any) -> TextCodec:
    """The codec of a tokenizer as `byte_table` takes it, if it can encode.

    `tokenizers`-based ones encode through `fastokens` where that is installed and gives the same ids on a sample of odd
    text (`ODD_TEXTS`), checked once here; a difference is a warning that names the text, and `tokenizers` is used.

    Raises:
        UnsupportedTokenizerError: nothing here can encode (a `ByteTable`, a bare vocabulary).
    """
    if isinstance(tokenizer, (str, Path)):
        tokenizer = _load_encoder(Path(tokenizer))
    packages = _packages(tokenizer)
    if "transformers" in packages and getattr(tokenizer, "backend_tokenizer", None) is not None:
        return _fastest(tokenizer.backend_tokenizer)
    if "transformers" in packages:
        return _Lists(lambda texts: [tokenizer.encode(text, add_special_tokens=False) for text in texts])
    if "tokenizers" in packages:
        return _fastest(tokenizer)
    if "tiktoken" in packages:
        return _Lists(tokenizer.encode_ordinary_batch)
    if "sentencepiece" in packages:
        return _Lists(tokenizer.encode)
    if "mistral_common" in packages:
        core = _mistral_core(tokenizer)
        return _Lists(lambda texts: [core.encode(text, bos=False, eos=False) for text in texts])
    raise UnsupportedTokenizerError(
        f"a {type(tokenizer).__name__} cannot encode text: give the Aligner the teacher's tokenizer itself"
    )


def _load_encoder(path: Path) -> Any:
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tekken.json") if (path / name).exists()]
        found += sorted(path.glob("*.model*"))
        if not found:
            raise UnsupportedTokenizerError(f"{path}: no tokenizer.json, tekken.json or *.model that can encode")
        path = found[0]
    if ".model" in path.name:
        return _load_sentencepiece(path)
    if path.name.endswith(".json"):
        if "config" in _load_json(path):
            return _require("mistral_common.tokens.tokenizers.tekken", "encoding with tekken").Tekkenizer.from_file(
                path
            )
        return _require("tokenizers", "encoding with tokenizer.json").Tokenizer.from_file(str(path))
    raise UnsupportedTokenizerError(
        f"{path}: a bare vocabulary cannot encode; load the tokenizer (tiktoken.Encoding, or transformers with "
        "gguf_file=) and pass that"
    )


class _Lists:
    """A codec from a function that gives a list of ids for each text."""

    def __init__(self, encode: Callable[[list[str]], Iterable[Sequence[int]]]) -> None:
        self._encode = encode

    def encode_batch(self, texts: Sequence[str]) -> tuple[Int64, Int64]:
        rows = list(self._encode(list(texts)))
        cu = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)), out=cu[1:])
        return np.fromiter(chain.from_iterable(rows), np.int64, int(cu[-1])), cu


@contextmanager
def _as_text(tokenizer: Any) -> Iterator[None]:
    """A `tokenizers.Tokenizer` that neither truncates nor pads, and that reads special tokens as text."""
    before = tokenizer.encode_special_tokens, tokenizer.truncation, tokenizer.padding
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        yield
    finally:
        tokenizer.encode_special_tokens = before[0]
        if before[1] is not None:
            tokenizer.enable_truncation(**before[1])
        if before[2] is not None:
            tokenizer.enable_padding(**before[2])


class _Tokenizers:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode_batch(self, texts: Sequence[str]) -> tuple[Int64, Int64]:
        with _as_text(self._tokenizer):
            encode = self._tokenizer.encode_batch_fast  # leaves the offsets out
            return _Lists(lambda t: [e.ids for e in encode(t, add_special_tokens=False)]).encode_batch(texts)


class _Fastokens:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode_batch(self, texts: Sequence[str]) -> tuple[Int64, Int64]:
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


def _fastest(tokenizer: Any) -> TextCodec:
    exact = _Tokenizers(tokenizer)
    try:
        fastokens = importlib.import_module("fastokens")
    except ImportError:
        return exact
    try:
        fast = _Fastokens(fastokens.Tokenizer.from_json_str(tokenizer.to_str()))
        fast._tokenizer.no_truncation()
        fast._tokenizer.no_padding()
        (want, want_cu), (got, got_cu) = exact.encode_batch(ODD_TEXTS), fast.encode_batch(ODD_TEXTS)
    except Exception as error:  # a foreign parser may refuse a tokenizer in any way; `exact` serves it
        warnings.warn(f"fastokens cannot read this tokenizer ({error}); tokenizers is used", stacklevel=3)
        return exact
    for k, text in enumerate(ODD_TEXTS):
        a, b = want[want_cu[k] : want_cu[k + 1]], got[got_cu[k] : got_cu[k + 1]]
        if not np.array_equal(a, b):
            warnings.warn(
                f"fastokens gives other ids than tokenizers on {text!r} ({b.tolist()} for {a.tolist()}); "
                "tokenizers is used",
                stacklevel=3,
            )
            return exact
    return fast

"""Hugging Face's `tokenizers`: `tokenizers.Tokenizer`, its wrappers, and tokenizer.json.

Where `fastokens` is installed, an optional accelerator that gives the same ids, it does the encoding; where it is not,
or is not right about a tokenizer, `tokenizers` does.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import methodcaller
from typing import Any, Literal, NamedTuple

import numpy as np

from xtokmap import _core
from xtokmap._core import UnsupportedTokenizerError
from xtokmap.ids import Int64
from xtokmap.tokenizers.base import (
    BYTE_PIECES,
    LONGEST,
    Cuts,
    Kind,
    Lists,
    Rule,
    TextCodec,
    Vocabulary,
    id_row,
    merge_rows,
    named,
    require,
    say_missing,
)
from xtokmap.tokenizers.parse import File, integers, loaded, reading

__all__ = ["ODD_TEXTS"]


def vocabulary(source: Any) -> Vocabulary:
    """The bytes of a tokenizer: its model's tokens as its decoder spells them, and its added tokens."""
    if isinstance(source, File):
        with reading(source.path, "tokenizer file"):
            return _of_json(source.json)
    return _of_tokenizer(source)


def _of_tokenizer(tokenizer: Any) -> Vocabulary:
    # The fast way reads the vocabulary without its merges. Unigram shows its unk id (and a piece that is there twice)
    # only in its JSON; wrappers (tokenizers.implementations, fastokens) have nothing but their JSON.
    if not hasattr(tokenizer, "get_added_tokens_decoder") or type(tokenizer.model).__name__ == "Unigram":
        return _of_json(json.loads(_serialized(tokenizer.to_str, "tokenizer")))
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


def _of_json(spec: dict[str, Any]) -> Vocabulary:
    model = spec["model"]
    vocab = model.get("vocab")
    unk = model.get("unk_id")
    integers([] if unk is None else [unk])
    unk_token = model.get("unk_token")
    if not isinstance(unk_token, (str, type(None))):
        raise TypeError(f"unk_token {unk_token!r} is no text")
    if isinstance(vocab, dict):
        integers(vocab.values())
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
) -> Vocabulary:
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
    byte_pieces = tuple(i for i, name in pieces.items() if name in BYTE_PIECES) if spelling.invalid == "run" else ()
    return Vocabulary(tokens, special, ordinary, invalid=spelling.invalid, byte_pieces=byte_pieces)


# ---- what a decoder does with one token -----------------------------------------------------------------------------


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
                "depends on its neighbors or on a pattern, so its bytes cannot be known exactly; build "
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


# ---- encoding rule --------------------------------------------------------------------------------------------------


def rule(source: Any) -> Rule:
    """The rule of a tokenizer's model, and its pre-tokenizer's cuts."""
    if not isinstance(source, File):
        return _rule_of(json.loads(_serialized(source.to_str, "tokenizer")), source)
    spec = json.loads(source.path.read_bytes())  # merges and all, which the reader of bytes passes over
    try:
        package = importlib.import_module("tokenizers")
    except ImportError:
        if spec.get("pre_tokenizer") is not None:
            say_missing(
                "tokenizers",
                "what the pre-tokenizer of a tokenizer.json keeps apart is not known, and two tokens may pass for one",
            )
        return _rule_of(spec, None)
    return _rule_of(spec, package.Tokenizer.from_file(str(source.path)))


def _rule_of(spec: dict[str, Any], tokenizer: Any) -> Rule:
    model = spec["model"]
    cuts = None
    if tokenizer is not None and hasattr(tokenizer, "pre_tokenizer"):
        cuts = _cuts_of(tokenizer.normalizer, tokenizer.pre_tokenizer)
    if model["type"] == "Unigram":
        scores = np.asarray([score for _, score in model["vocab"]], np.float32)
        return Rule("unigram", {"scores": scores}, cuts)
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return LONGEST._replace(cuts=cuts)
    vocab: Mapping[str, int] = model["vocab"]
    arguments = {
        "merges": merge_rows(model["merges"], vocab),
        "characters": not _is_byte_level(spec),
        "whole": bool(model.get("ignore_merges")),
        "added": id_row(token["id"] for token in spec.get("added_tokens") or () if not token["special"]),
    }
    return Rule("bpe", arguments, cuts)


def _is_byte_level(spec: Mapping[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps([spec.get("decoder"), spec.get("pre_tokenizer")])


def _cuts_of(normalizer: Any, pre_tokenizer: Any) -> Cuts | None:
    if pre_tokenizer is None:
        return None

    def cuts(text: str) -> set[int]:
        shift = 0
        if normalizer is not None:
            normal = normalizer.normalize_str(text)
            shift = len(normal) - len(text)
            if shift not in (0, 1):  # 1: a space before the text
                return set()
            text = normal
        found = {at - shift for _, span in pre_tokenizer.pre_tokenize_str(text) for at in span}
        return {at for at in found if 0 < at < len(text) - shift}

    return cuts


# ---- encoder --------------------------------------------------------------------------------------------------------


def codec(source: Any, directory: Vocabulary | None = None) -> TextCodec:
    """An encoder that leaves the user's object alone: `fastest`, of a copy."""
    if isinstance(source, File):
        path = source.path
        package = require("tokenizers", f"encoding with {path.name}")
        source = loaded(path, lambda: package.Tokenizer.from_file(str(path)))
    return fastest(source, () if directory is None else directory.special.values())


class _Fastokens:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode_batch(self, texts: Sequence[str]) -> tuple[Int64, Int64]:
        with named(texts):
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


def fastest(tokenizer: Any, roles: Iterable[str]) -> TextCodec:
    """`fastokens` where it gives the same ids as `tokenizers` on odd text, else that; `roles` are text in a text."""
    copy = require("tokenizers", "encoding").Tokenizer.from_str(_serialized(tokenizer.to_str, "tokenizer"))
    copy.encode_special_tokens = True
    copy.no_truncation()
    copy.no_padding()
    added = {token.content: token.special for token in copy.get_added_tokens_decoder().values()}
    copy.add_special_tokens([name for name in roles if added.get(name) is False])  # an eos may not be marked special
    # encode_batch_fast leaves the offsets out
    exact = Lists(lambda texts: [row.ids for row in copy.encode_batch_fast(texts, add_special_tokens=False)])
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
        warnings.warn(f"this version of fastokens cannot be used ({error}); tokenizers is", stacklevel=4)
        return exact
    want, want_cu = exact.encode_batch(sample)
    for k, text in enumerate(sample):
        a, b = want[want_cu[k] : want_cu[k + 1]].tolist(), got[got_cu[k] : got_cu[k + 1]].tolist()
        if a != b:
            warnings.warn(
                f"fastokens gives other ids than tokenizers on {text!r} ({b} for {a}); tokenizers is used", stacklevel=4
            )
            return exact
    return fast


KIND = Kind(
    vocabulary,
    rule,
    codec,
    packages=frozenset({"tokenizers", "fastokens"}),
    name=r".*\.json",
    is_file=lambda file: "model" in file.json and "decoder" in file.json,
    in_directory=("tokenizer.json",),
)

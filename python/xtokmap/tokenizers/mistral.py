"""mistral-common: its tokenizers, which hold a tekken or a SentencePiece one, and tekken.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtokmap._core import UnsupportedTokenizerError
from xtokmap.tokenizers import sentencepiece
from xtokmap.tokenizers.base import ID_LIMIT, RANKED, Kind, Lists, Rule, TextCodec, Vocabulary, require
from xtokmap.tokenizers.parse import File, integers, loaded, reading, unbase64
from xtokmap.tokenizers.tiktoken import pattern_cuts

__all__: list[str] = []


def _core_of(tokenizer: Any) -> Any:
    """The tekken or SentencePiece tokenizer inside mistral-common's layers."""
    for layer in ("instruct_tokenizer", "tokenizer"):
        tokenizer = getattr(tokenizer, layer, tokenizer)
    return tokenizer


def vocabulary(source: Any) -> Vocabulary:
    """The bytes of every rank, after the special tokens; or those of the SentencePiece model."""
    if isinstance(source, File):
        with reading(source.path, "tokenizer file"):
            return _of_tekken(source.json)
    core = _core_of(source)
    if type(core).__name__ == "Tekkenizer":
        special = {i: core.id_to_piece(i) for i in range(core.num_special_tokens)}
        tokens = {i: core.id_to_byte_piece(i) for i in range(core.num_special_tokens, core.n_words)}
        return Vocabulary(tokens, special, stop_ids=(core.eos_id,))
    if type(core).__name__ == "SentencePieceTokenizer":
        return sentencepiece.vocabulary(core._model)
    raise UnsupportedTokenizerError(
        f"mistral-common {type(core).__name__}: only its tekken and SentencePiece tokenizers are known; pass their file"
    )


def _of_tekken(spec: dict[str, Any]) -> Vocabulary:
    config = spec["config"]
    count, size = integers((config["default_num_special_tokens"], config["default_vocab_size"]))
    # A file may hold more tokens than it declares; the surplus is not part of the vocabulary.
    vocab = spec["vocab"][: max(size - count, 0)]
    if not 0 <= count <= size <= ID_LIMIT or len(vocab) < size - count:
        raise ValueError(f"{len(vocab)} tokens and {count} special ones where {size} are declared")
    if integers(token["rank"] for token in vocab) != list(range(len(vocab))):
        raise ValueError("the ranks of the vocabulary do not count up from 0")
    special = {i: f"<SPECIAL_{i}>" for i in range(count)}
    listed: Sequence[Mapping[str, Any]] = spec.get("special_tokens") or _TEKKEN_SPECIAL
    ranks = integers(token["rank"] for token in listed)
    if len(set(ranks)) < len(ranks) or not special.keys() >= set(ranks):
        raise ValueError(f"special tokens: a rank is there twice or not below {count}")
    for i, token in zip(ranks, listed, strict=True):
        if not isinstance(token["token_str"], str):
            raise TypeError(f"special token {i} is called {token['token_str']!r}")
        special[i] = token["token_str"]
    tokens = {count + i: unbase64(token["token_bytes"]) for i, token in enumerate(vocab)}
    return Vocabulary(tokens, special)


#: Files before version 7 do not list their special tokens; only the end of text matters here.
_TEKKEN_SPECIAL = ({"rank": 2, "token_str": "</s>"},)


def rule(source: Any) -> Rule:
    """Ranks and a pattern, as tiktoken's; or the rule of the SentencePiece model."""
    if isinstance(source, File):
        return Rule("bpe", RANKED, pattern_cuts(source.json["config"]["pattern"]))
    core = _core_of(source)
    if type(core).__name__ == "Tekkenizer":
        return Rule("bpe", RANKED, pattern_cuts(core._model._pat_str))
    return sentencepiece.rule(core._model)


def codec(source: Any, directory: Vocabulary | None = None) -> TextCodec:
    """The inner tokenizer's own encoder."""
    if isinstance(source, File):
        path = source.path
        tekken = require("mistral_common.tokens.tokenizers.tekken", f"encoding with {path.name}")
        source = loaded(path, lambda: tekken.Tekkenizer.from_file(path))
    core = _core_of(source)
    return Lists(lambda texts: [core.encode(text, bos=False, eos=False) for text in texts])


KIND = Kind(
    vocabulary,
    rule,
    codec,
    packages=frozenset({"mistral_common"}),
    name=r".*\.json",
    is_file=lambda file: "config" in file.json and isinstance(file.json.get("vocab"), list),
    in_directory=("tekken.json",),
)

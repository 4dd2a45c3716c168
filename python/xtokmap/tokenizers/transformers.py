"""transformers: fast tokenizers, by the `tokenizers` object inside, and slow ones that hold another known tokenizer."""

from __future__ import annotations

from typing import Any

from xtokmap._core import UnsupportedTokenizerError
from xtokmap.tokenizers import hf, mistral, sentencepiece, tiktoken
from xtokmap.tokenizers.base import LONGEST, Kind, Lists, Rule, TextCodec, Vocabulary, packages_of

__all__: list[str] = []


def _inside(tokenizer: Any) -> tuple[Kind, Any] | None:
    """The known tokenizer in an object without a fast backend.

    So have it processors, MistralCommonBackend, Qwen's and Kimi's own classes.
    """
    for name in ("tokenizer", "model"):
        inner = getattr(tokenizer, name, None)
        for kind in (KIND, tiktoken.KIND, mistral.KIND):
            if packages_of(inner) & kind.packages:
                return kind, inner
    return None


def vocabulary(tokenizer: Any) -> Vocabulary:
    """The bytes of the tokenizer inside, and the roles and the end of text that the object gives its tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        found = _of_slow(tokenizer)
    else:
        for method in ("decode", "_decode"):
            owner = next((cls for cls in type(tokenizer).__mro__ if method in vars(cls)), None)
            if owner is not None and not owner.__module__.startswith("transformers.tokenization_"):
                raise UnsupportedTokenizerError(
                    f"{type(tokenizer).__name__}: its class has its own {method}(), which can change what the decoder "
                    "spells; pass tokenizer.backend_tokenizer if that decoder is what you mean"
                )
        found = hf.vocabulary(backend)
        roles = ((backend.token_to_id(name), name) for name in tokenizer.all_special_tokens)
        special = {**found.special, **{i: name for i, name in roles if i is not None}}
        found = found._replace(special=special)
    eos = getattr(tokenizer, "eos_token_id", None)
    declared = (eos,) if isinstance(eos, int) else tuple(eos or ())
    return found._replace(stop_ids=(*declared, *found.stop_ids))


def _of_slow(tokenizer: Any) -> Vocabulary:
    """A transformers object without a fast backend: by the known tokenizer inside it."""
    if (inside := _inside(tokenizer)) is not None:
        kind, inner = inside
        return kind.vocabulary(inner)
    processor = getattr(tokenizer, "sp_model", None)
    if processor is not None:
        ids = list(range(processor.get_piece_size()))
        if tokenizer.convert_ids_to_tokens(ids) == processor.id_to_piece(ids):  # many classes shift the ids
            found = sentencepiece.vocabulary(processor)
            decoder = tokenizer.added_tokens_decoder
            special = {i: token.content for i, token in decoder.items() if token.special}
            added = {i: token.content for i, token in decoder.items() if not token.special and i >= len(ids)}
            return found._replace(
                tokens={**found.tokens, **{i: content.encode() for i, content in added.items()}},
                special={**found.special, **special},
                added={**found.added, **added},
            )
    raise UnsupportedTokenizerError(
        f"{type(tokenizer).__name__} is a slow tokenizer: its decoder is Python code that cannot be read exactly; load "
        "its fast version (AutoTokenizer.from_pretrained), pass its vocabulary file if the ids are the file's, or "
        "build xtokmap.ByteTable.from_bytes([...]) yourself"
    )


def rule(tokenizer: Any) -> Rule:
    """The rule of the tokenizer inside."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return hf.rule(backend)
    inside = _inside(tokenizer)
    return LONGEST if inside is None else inside[0].rule(inside[1])


def codec(tokenizer: Any, directory: Vocabulary | None = None) -> TextCodec:
    """The encoder of the tokenizer inside, or the object's own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return hf.fastest(backend, tokenizer.all_special_tokens)
    if (inside := _inside(tokenizer)) is not None:
        kind, inner = inside
        return kind.codec(inner, None)
    return Lists(
        lambda texts: [tokenizer.encode(t, add_special_tokens=False, split_special_tokens=True) for t in texts]
    )


KIND = Kind(vocabulary, rule, codec, packages=frozenset({"transformers"}))

"""A directory as `save_pretrained` makes it: which of its files holds the vocabulary, and what those beside it add."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from xtokmap._core import UnsupportedTokenizerError
from xtokmap.tokenizers.base import Vocabulary
from xtokmap.tokenizers.parse import File, integers, load_json, reading
from xtokmap.tokenizers.sentencepiece import is_sentencepiece

__all__: list[str] = []


#: Slow tokenizer classes whose ids are those of their SentencePiece model; others shift or reorder them.
_SENTENCEPIECE_IDS = ("Llama", "CodeLlama", "Gemma", "T5", "Albert", "GPTSw3")


#: What is read beside a vocabulary.
BESIDE = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "config.json"),
)


def file_in(directory: Path, patterns: Iterable[str]) -> Path:
    """The one file that holds the vocabulary: the match of the first pattern that has any."""
    for pattern in patterns:
        found = sorted(directory.glob(pattern))
        if len(found) > 1:
            raise UnsupportedTokenizerError(
                f"{directory}: {len(found)} files match {pattern} ({', '.join(f.name for f in found)}); pass the right "
                "one"
            )
        if not found:
            continue
        if is_sentencepiece(File(found[0])):
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


def with_beside(vocabulary: Vocabulary, directory: Path) -> Vocabulary:
    """The vocabulary of a directory's file, with the tokens, the roles and the stops that the files beside declare."""
    tokens, special, added = dict(vocabulary.tokens), dict(vocabulary.special), dict(vocabulary.added)
    with reading(directory, "tokenizer directory"):
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
    return load_json(directory / name) if (directory / name).exists() else {}


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
    added = {i: (name, name in roles) for name, i in zip(old, integers(old.values()), strict=True)}
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
            yield from (i for i in integers(ids if isinstance(ids, list) else [ids]) if i in names)

"""What every kind of tokenizer gives: bytes (`Vocabulary`), an encoding rule (`Rule`) and an encoder (`TextCodec`)."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from xtokmap._core import ByteTable, UnsupportedTokenizerError
from xtokmap.files import check_text
from xtokmap.ids import Int64
from xtokmap.tokenizers.parse import File

__all__: list[str] = []

UInt32: TypeAlias = npt.NDArray[np.uint32]
#: Where a pre-tokenizer cuts a text: positions in characters, 0 and the end left out.
Cuts: TypeAlias = Callable[[str], set[int]]


def whole_file(source: Any) -> Iterable[Any] | None:
    """All of a file determines its table; nothing identifies an object in less time than reading it takes."""
    return [source.path.read_bytes()] if isinstance(source, File) else None


@dataclass(frozen=True)
class Kind:
    """A kind of tokenizer: by what its objects and files are known, and the three things that are asked of it.

    `vocabulary`, `rule` and `codec` take an object of the kind, or a `File` of it. Packages are only imported when an
    object of theirs is there already or a codec needs them.

    Attributes:
        vocabulary: its bytes.
        rule: how it cuts bytes into tokens.
        codec: text -> ids, in bulk. Its second argument is what a whole directory declares, if the file is in one:
            special tokens by name, which stay text in a text.
        packages: an object is of this kind if its class, or one of that's bases, comes from one of them.
        name: pattern of the names of its files.
        is_file: whether a file with such a name is one; where the name is not enough, by what is in it.
        in_directory: globs that find its file in a directory.
        content: what determines the bytes, to find a table on disk by; None: it is read every time.
    """

    vocabulary: Callable[[Any], Vocabulary]
    rule: Callable[[Any], Rule]
    codec: Callable[[Any, Vocabulary | None], TextCodec]
    packages: frozenset[str] = frozenset()
    name: str = "(?!)"  # no file's
    is_file: Callable[[File], bool] = lambda file: True
    in_directory: tuple[str, ...] = ()
    content: Callable[[Any], Iterable[Any] | None] = whole_file


def packages_of(tokenizer: Any) -> set[str]:
    """The packages that an object's classes come from: found without importing any of them."""
    return {cls.__module__.partition(".")[0] for cls in type(tokenizer).__mro__}


def require(package: str, what: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0].replace("_", "-")
        extra = ', or "xtokmap[train]"' if name == "tokenizers" else ""
        raise UnsupportedTokenizerError(f"{what} needs the package {name}: pip install {name}{extra}") from None


@lru_cache(None)
def say_missing(package: str, without: str) -> None:
    """Warns, once, of what is not known without a package that is not installed."""
    warnings.warn(f"the package {package} is not installed: {without}; pip install {package}", stacklevel=2)


#: `tokenizer.model`, `spiece.model`, `tokenizer.model.v3`, `tokenizer.model.v7m1`: SentencePiece's, or ranks.
MODEL_NAME = r".*\.model(\.v\d+(m\d+)?)?"


# ---- bytes ----------------------------------------------------------------------------------------------------------


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


#: Ids from here on are damage, not vocabulary: a table has a row for every id below the largest one.
ID_LIMIT = 1 << 24


_HEX = "0123456789abcdefABCDEF"
#: Pieces that stand for one byte.
BYTE_PIECES = {f"<0x{a}{b}>": bytes.fromhex(a + b) for a in _HEX for b in _HEX}


class Vocabulary(NamedTuple):
    """What every reader makes: bytes by id, the ids without bytes, and who ends a text."""

    tokens: Mapping[int, bytes]
    special: Mapping[int, str]
    #: Added and user-defined tokens that do have bytes, by name: a file beside may give one of them a role.
    added: Mapping[int, str] = {}
    stop_ids: tuple[int, ...] = ()
    invalid: str = "maximal"
    #: Ids that stand for a single byte (`<0x0A>`).
    byte_pieces: tuple[int, ...] = ()

    def table(self, special: str = "none") -> ByteTable:
        size = max(max(ids, default=-1) for ids in (self.tokens, self.special)) + 1
        lowest = min(min(ids, default=0) for ids in (self.tokens, self.special))
        if lowest < 0 or size > ID_LIMIT:
            raise UnsupportedTokenizerError(
                f"token id {min(lowest, 0) or size - 1}: ids go from 0 to {ID_LIMIT - 1}; the vocabulary is damaged"
            )
        rows = list(map(self.tokens.get, range(size)))
        by_name = {name: i for i, name in self.special.items()}
        named = (by_name[name] for name in STOP_TOKENS if name in by_name)
        stop_ids = list(dict.fromkeys(i for i in chain(self.stop_ids, named) if 0 <= i < size))
        if special == "text":
            stop_ids = []
        for i in chain(self.special, stop_ids):
            rows[i] = self.special[i].encode() if special == "text" else None
        byte_pieces = [i for i in self.byte_pieces if rows[i] is not None]
        return ByteTable.from_bytes(rows, stop_ids=stop_ids, invalid=self.invalid, byte_pieces=byte_pieces)


# ---- encoding rule --------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """How a tokenizer cuts bytes into tokens.

    Attributes:
        name: "bpe", "unigram" or "longest match".
        arguments: what that rule goes by, as `_core.Encoding` takes it: merges, ranks or scores, whether characters
            or bytes are merged, whether a whole piece is looked up first, tokens that are found before anything else.
        cuts: its pre-tokenizer; None where there is none, or it is not known.
    """

    name: str
    arguments: Mapping[str, Any]
    cuts: Cuts | None = None


#: Where nothing else is known.
LONGEST = Rule("longest match", {})
#: tiktoken and tekken look a piece up before they merge in it.
RANKED: Mapping[str, Any] = {"whole": True}


def id_row(ids: Iterable[int]) -> UInt32:
    """Ids as the core takes them."""
    return np.fromiter(ids, np.uint32)


def merge_rows(merges: Sequence[Any], vocab: Mapping[str, int]) -> UInt32:
    """Merges of pieces -> `[k, 3]`: the two ids and the one they become, for those that are in the vocabulary."""
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
    rows = [(vocab[a], vocab[b], vocab[a + b]) for a, b in pairs if a in vocab and b in vocab and a + b in vocab]
    return np.asarray(rows, np.uint32).reshape(-1, 3)


# ---- encoder --------------------------------------------------------------------------------------------------------


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


@contextmanager
def named(texts: Sequence[str]) -> Iterator[None]:
    """What no encoder takes is named; each has an error of its own for it."""
    try:
        yield
    except (TypeError, UnicodeError):
        for k, text in enumerate(texts):
            check_text(text, f"text {k}")
        raise


class Lists:
    """A codec from a function that gives a list of ids for each text."""

    def __init__(self, encode: Callable[[list[str]], Iterable[Sequence[int]]]) -> None:
        self._encode = encode

    def encode_batch(self, texts: Sequence[str]) -> tuple[Int64, Int64]:
        with named(texts):
            rows = list(self._encode(list(texts)))
        cu = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)), out=cu[1:])
        return np.fromiter(chain.from_iterable(rows), np.int64, int(cu[-1])), cu


def bare(file: File) -> UnsupportedTokenizerError:
    """The error of a file that has ids for bytes and no more."""
    return UnsupportedTokenizerError(
        f"{file.path}: a bare vocabulary cannot encode; load the tokenizer (a tiktoken.Encoding with its pattern, or "
        "transformers' AutoTokenizer, with gguf_file= for GGUF) and pass that"
    )

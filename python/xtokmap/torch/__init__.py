"""Index tensors of alignments, what is computed from rows of logits without a copy of them all, and `Pair`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from xtokmap.torch.index import ChunkIndex, VocabTensors
from xtokmap.torch.logits import Logits, TopK, map_rows, token_logprobs, token_logprobs_from_hidden

if TYPE_CHECKING:
    from xtokmap.torch.pair import Pair, PairBatch, PairLoss

__all__ = [
    "ChunkIndex",
    "Logits",
    "Pair",
    "PairBatch",
    "PairLoss",
    "TopK",
    "VocabTensors",
    "map_rows",
    "token_logprobs",
    "token_logprobs_from_hidden",
]


def __getattr__(name: str) -> Any:
    """`Pair` stands on the losses, which stand on what is here: it is imported when it is first asked for."""
    if name in ("Pair", "PairBatch", "PairLoss"):
        return getattr(import_module("xtokmap.torch.pair"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

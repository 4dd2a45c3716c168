"""Losses for distillation across tokenizers, all on the chunks of one `ChunkIndex`."""

from xtokmap.losses.bytes import Completions, Spelling, byte_kl, completion, whitespace_tokens
from xtokmap.losses.chunks import alm, uld_hybrid
from xtokmap.losses.credit import CREDITS, Credit, chunk_credit, chunk_gap, compass, policy_loss
from xtokmap.losses.measured import means
from xtokmap.losses.rule import LossRule, LossSettings
from xtokmap.losses.strict import strict_kl
from xtokmap.losses.table import LOSSES
from xtokmap.losses.target import TransferTarget
from xtokmap.losses.terms import Loss, weighted_sum
from xtokmap.losses.transfer import transfer_kl

__all__ = [
    "CREDITS",
    "LOSSES",
    "Completions",
    "Credit",
    "Loss",
    "LossRule",
    "LossSettings",
    "Spelling",
    "TransferTarget",
    "alm",
    "byte_kl",
    "chunk_credit",
    "chunk_gap",
    "compass",
    "completion",
    "means",
    "policy_loss",
    "strict_kl",
    "transfer_kl",
    "uld_hybrid",
    "weighted_sum",
    "whitespace_tokens",
]

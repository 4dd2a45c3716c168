"""Tensors in the body of a request or an answer: safetensors, whose reader trusts nobody."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import safetensors.torch
from torch import Tensor


def pack(tensors: Mapping[str, Tensor], words: dict[str, str] | None = None) -> bytes:
    """A body of tensors and words by name."""
    content: bytes = safetensors.torch.save({name: x.contiguous().cpu() for name, x in tensors.items()}, words)
    return content


def unpack(body: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and words of a body.

    Raises:
        ValueError: it is none.
    """
    try:
        tensors = safetensors.torch.load(body)
        words = json.loads(body[8 : 8 + int(np.frombuffer(body, "<u8", 1)[0])]).get("__metadata__", {})
    except Exception as error:  # of another type in every layer
        raise ValueError(f"{len(body)} bytes that are no safetensors: {' '.join(str(error).split())[:200]}") from None
    return tensors, words

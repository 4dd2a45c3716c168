"""Answers of a model, by transformers' `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from xtokmap._core import XTokMapError
from xtokmap.models import one_line, without_wrapper
from xtokmap.torch.completions import padded_inputs
from xtokmap.train.config import Config


@torch.no_grad()
def sample(
    model: Any, prompt_ids: Sequence[Sequence[int]], stops: Sequence[int], config: Config, *, greedy: bool = False
) -> tuple[list[list[int]], list[bool]]:
    """Answers of a model: `config.max_new_tokens` at most, at `config.temperature`, top-p 1, whatever the model likes.

    Args:
        model: a transformers causal language model; left in evaluation mode.
        prompt_ids: B rows, each of at least one id.
        stops: ids that end an answer.
        config: length and temperature.
        greedy: the likeliest token every time instead.

    Returns:
        B rows of completion ids, up to the first end of turn, included; and whether that came.

    Raises:
        XTokMapError: the model's probabilities are not finite.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    width, pad = max(map(len, prompt_ids)), stops[0]
    inputs = padded_inputs(prompt_ids, device, left=True, pad=pad)
    how = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=not greedy,
        eos_token_id=list(stops),
        pad_token_id=pad,
        **({} if greedy else {"temperature": config.temperature, "top_k": 0, "top_p": 1.0}),
    )
    model.eval()
    model = without_wrapper(model)
    with _only(model, how):
        try:
            out = model.generate(**inputs, generation_config=how)
        except RuntimeError as error:  # on a GPU the sampler's assertion, after which nothing more can be asked
            if not any(sign in str(error) for sign in ("probability tensor contains", "device-side assert")):
                raise
            raise XTokMapError(
                f"nothing can be sampled: probabilities are not finite; a learning_rate that is too large for the "
                f"weights, or temperature={config.temperature}, makes them so ({one_line(error)[:200]})"
            ) from error
    completions, completed = [], []
    for row in out[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in stops), None)
        completions.append(row if end is None else row[: end + 1])
        completed.append(end is not None)
    return completions, completed


@contextmanager
def _only(model: Any, how: Any) -> Iterator[None]:
    """Samples of the policy itself: what `how` leaves open, `generate` would take from the model (a penalty, min_p)."""
    own, model.generation_config = model.generation_config, how
    try:
        yield
    finally:
        model.generation_config = own

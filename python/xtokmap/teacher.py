"""Teachers: who gives every teacher token its logprob, and the models behind them.

One convention everywhere: `logprobs[i]` scores `ids[i]` given `ids[<i]`. Hugging Face models give logits whose row i
scores token i + 1; the shift happens here and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.tokenizers import byte_table
from xtokmap.torch import token_logprobs, token_logprobs_from_hidden

#: How a prompt is put to a model whose tokenizer has no chat template.
PLAIN_TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"


@dataclass(frozen=True, eq=False)
class Scores:
    """What a teacher says about B completions.

    Attributes:
        logprobs: float32 `[B, Tt]`; `logprobs[b, i]` scores token i of completion b, in nats; 0 on padding (right).
        mask: bool `[B, Tt]`; where there is a token.
    """

    logprobs: Tensor
    mask: Tensor


class LocalTeacher:
    """A causal language model in this process that scores token ids. It is never trained.

    Args:
        model: a transformers causal language model; moved nowhere, its device is used.
        tokenizer: its tokenizer.
        micro_batch: completions in one forward pass; they are taken in order of length.
        plain_template: the prompt format where the tokenizer has no chat template; must contain `{prompt}`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, micro_batch: int = 8, plain_template: str = PLAIN_TEMPLATE
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.micro_batch = micro_batch
        self.plain_template = plain_template
        self.stop_id = stop_id(tokenizer)

    def render(self, prompts: Sequence[str]) -> list[list[int]]:
        """Every prompt as the ids after which this model would answer."""
        return render(self.tokenizer, prompts, self.plain_template)

    def score(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> Scores:
        """Logprobs of the completions' tokens, each given its prompt and what precedes it.

        Args:
            prompt_ids: B rows, each of at least one id.
            completion_ids: B rows.

        Raises:
            XTokMapError: an empty prompt, or different numbers of rows.
        """
        _check_pairs(prompt_ids, completion_ids)
        device = next(self.model.parameters()).device
        logprobs = batched_logprobs(self.model, prompt_ids, completion_ids, self.micro_batch)
        lengths = torch.tensor([len(row) for row in completion_ids], device=device)
        return Scores(logprobs, torch.arange(logprobs.shape[1], device=device) < lengths[:, None])


def render(tokenizer: Any, prompts: Sequence[str], plain_template: str = PLAIN_TEMPLATE) -> list[list[int]]:
    """Prompts as ids: through the tokenizer's chat template, or through `plain_template` when it has none."""
    if "{prompt}" not in plain_template:
        raise XTokMapError(f"plain_template={plain_template!r} must contain {{prompt}}")
    if getattr(tokenizer, "chat_template", None):
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
        return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    return [tokenizer(plain_template.replace("{prompt}", prompt)).input_ids for prompt in prompts]


def stop_id(tokenizer: Any) -> int | None:
    """The token with which this model ends its answer: what its chat template puts there, else its end of text."""
    stops = byte_table(tokenizer).stop_ids
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(text[text.rindex("b") + 1 :], add_special_tokens=False).input_ids
        in_template = [i for i in ids if i in stops]
        if in_template:
            return int(in_template[0])
    eos = tokenizer.eos_token_id
    if isinstance(eos, int):
        return eos
    return stops[0] if stops else None


def completion_logprobs(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    width: int | None = None,
) -> Tensor:
    """Logprobs of completions under a transformers causal language model, with a gradient where grad is enabled.

    The output head runs on completion rows only and one slice of the vocabulary's logits exists at a time, so that
    memory is that of the hidden states.

    Args:
        model: its parameters' device is used.
        prompt_ids: B rows, each of at least one id.
        completion_ids: B rows.
        temperature: of the distribution that sampled.
        width: T of the result; None takes the longest completion.

    Returns:
        float32 `[B, T]`; 0 on padding, which is on the right.
    """
    _check_pairs(prompt_ids, completion_ids)
    device = next(model.parameters()).device
    width = max(map(len, completion_ids), default=0) if width is None else width
    rows = [[*p, *c] for p, c in zip(prompt_ids, completion_ids, strict=True)]
    length = max(map(len, rows), default=0)
    # Everything about lengths is known here, so that the device is never asked.
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    source: list[int] = []
    target: list[int] = []
    for b, (p, c) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        source += range(b * length + len(p) - 1, b * length + len(p) - 1 + len(c))
        target += range(b * width, b * width + len(c))
    wanted = torch.tensor([i for row in completion_ids for i in row], dtype=torch.long)
    ids, mask, wanted = ids.to(device), mask.to(device), wanted.to(device)
    at, to = (
        torch.tensor(source, device=device, dtype=torch.long),
        torch.tensor(target, device=device, dtype=torch.long),
    )

    body, head = _parts(model)
    if body is None:
        # Rows before the shortest prompt's last token score nothing that is wanted.
        skip = min(map(len, prompt_ids), default=1) - 1
        if skip and "logits_to_keep" in inspect.signature(model.forward).parameters:
            out = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=length - skip).logits
            at = at - skip * (at // length + 1)
        else:
            out = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        flat = token_logprobs(out.flatten(0, 1).index_select(0, at), wanted, temperature=temperature)
    else:
        hidden = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        flat = token_logprobs_from_hidden(
            hidden.flatten(0, 1).index_select(0, at),
            head.weight,
            wanted,
            bias=head.bias,
            temperature=temperature,
            softcap=_softcap(model),
        )
    return flat.new_zeros(len(rows) * width).index_copy(0, to, flat).view(len(rows), width)


def by_length(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], size: int
) -> Iterator[list[int]]:
    """Rows in order of length, `size` at a time, so that a micro-batch has little padding."""
    lengths = [len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for first in range(0, len(order), size):
        yield order[first : first + size]


@torch.no_grad()
def batched_logprobs(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    micro_batch: int,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """`completion_logprobs` of any number of rows, a few at a time and without a gradient: float32 `[B, T]`."""
    device = next(model.parameters()).device
    width = max(map(len, completion_ids), default=0)
    logprobs = torch.zeros(len(completion_ids), width, device=device)
    for rows in by_length(prompt_ids, completion_ids, micro_batch):
        prompts, completions = [prompt_ids[b] for b in rows], [completion_ids[b] for b in rows]
        part = completion_logprobs(model, prompts, completions, temperature=temperature, width=width)
        logprobs[torch.tensor(rows, device=device)] = part
    return logprobs


def _check_pairs(prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> None:
    if len(prompt_ids) != len(completion_ids):
        raise XTokMapError(f"{len(prompt_ids)} prompts and {len(completion_ids)} completions; they must go in pairs")
    for b, row in enumerate(prompt_ids):
        if len(row) == 0:
            raise XTokMapError(f"prompt_ids[{b}] is empty: the first token of a completion is scored given something")


#: Whether a model's logits are its head's, of its hidden states; asked of every model once.
_plain: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def _parts(model: Any) -> tuple[Any, Any]:
    """The body that gives hidden states and the linear head, or None where a model is not made of just these two."""
    body, head = getattr(model, "base_model", None), model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or body is None or body is model:
        return None, None
    if model not in _plain:
        _plain[model] = _is_plain(model, body, head)
    return (body, head) if _plain[model] else (None, None)


def _softcap(model: Any) -> float | None:
    cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return cap


@torch.no_grad()
def _is_plain(model: Any, body: Any, head: torch.nn.Linear) -> bool:
    """Compares both ways on two tokens: families scale or cap their logits under many names, only `forward` knows."""
    ids = torch.tensor([[0, 1]], device=next(model.parameters()).device)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        hidden = getattr(body(input_ids=ids, use_cache=False), "last_hidden_state", None)
        if hidden is None or hidden.shape[-1] != head.in_features:
            return False
        want = model(input_ids=ids, use_cache=False).logits.float()
        got = head(hidden).float()
        if (cap := _softcap(model)) is not None:
            got = cap * torch.tanh(got / cap)
    finally:
        for module, mode in training.items():
            module.training = mode
    scale = float(want.abs().max())
    return bool((want - got).abs().max() <= scale * max(1e-4, 4 * torch.finfo(hidden.dtype).eps))

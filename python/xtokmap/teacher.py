"""Teachers: who gives every teacher token its logprob, and the models behind them.

One convention everywhere: `logprobs[i]` scores `ids[i]` given `ids[<i]`. Hugging Face models give logits whose row i
scores token i + 1; the shift happens here and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xtokmap import cover
from xtokmap._core import XTokMapError
from xtokmap.cover import CoverQueries
from xtokmap.files import check_text
from xtokmap.models import without_wrapper
from xtokmap.served import Answer, Client, TeacherError, self_test
from xtokmap.tokenizers import byte_table
from xtokmap.torch import Logits, TopK, token_logprobs, token_logprobs_from_hidden
from xtokmap.transfer import TransferTarget, transfer

__all__ = [
    "PLAIN_TEMPLATE",
    "LocalTeacher",
    "Scores",
    "ServerTeacher",
    "Teacher",
    "TeacherError",
    "batched_logprobs",
    "by_length",
    "completion_logprobs",
    "completion_rows",
    "padded_logprobs",
    "padded_places",
    "render",
    "stop_id",
]

#: How a prompt is put to a model whose tokenizer has no chat template.
PLAIN_TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"


@dataclass(frozen=True, eq=False)
class Scores:
    """What a teacher says about B completions.

    Attributes:
        logprobs: float32 `[B, Tt]`; `logprobs[b, i]` scores token i of completion b, in nats; 0 on padding (right).
        mask: bool `[B, Tt]`; where there is a token.
        transferred: float32 `[B, Ts]`, where asked for; `transferred[b, i]` is log q*(s_i | s_<i) of student token i,
            as the ids lay that were aligned; NaN where there is no query and on padding.
        rows: where kept; the flat rows `[N + B]` of `LocalTeacher.rows`, for losses of whole distributions.
        target: where kept and with queries; q*(u | s_<i) for `transfer_kl`.
        top: of a served teacher, where asked for; `[B, Tt]` rows of the likeliest tokens and its own, for `strict_kl`.
        missing: where there is `top`; float32 `[B, Tt]`, the mass of each row that it does not show; 0 on padding.
    """

    logprobs: Tensor
    mask: Tensor
    transferred: Tensor | None = None
    rows: Logits | None = None
    target: TransferTarget | None = None
    top: TopK | None = None
    missing: Tensor | None = None


class _Prompted:
    """What every teacher has of its tokenizer, wherever its weights are."""

    def __init__(self, tokenizer: Any, plain_template: str) -> None:
        self.tokenizer = tokenizer
        self.plain_template = plain_template
        self.stop_id = stop_id(tokenizer)

    def render(self, prompts: Sequence[str]) -> list[list[int]]:
        """Every prompt as the ids after which this model would answer."""
        return render(self.tokenizer, prompts, self.plain_template)


class LocalTeacher(_Prompted):
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
        super().__init__(tokenizer, plain_template)
        self.model = model.eval().requires_grad_(False)
        self.micro_batch = micro_batch

    def score(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        *,
        queries: CoverQueries | None = None,
        transferred: bool | None = None,
        keep: bool = False,
    ) -> Scores:
        """Logprobs of the completions' tokens, each given its prompt and what precedes it.

        Args:
            prompt_ids: B rows, each of at least one id.
            completion_ids: B rows.
            queries: of the batch in which these completions were aligned, from `Aligner.cover_queries`.
            transferred: whether to evaluate them (`transfer`): what the teacher thinks of the student's own tokens. It
                is worked out beside the output head, a slice of rows at a time. None: where there are queries.
            keep: whether to keep the hidden states of the completions (the logits, of a model that is not made of a
                body and a head), from which whole distributions are made.

        Raises:
            XTokMapError: an empty prompt, different numbers of rows, queries of other completions or none.
        """
        _check_pairs(prompt_ids, completion_ids)
        device = next(self.model.parameters()).device
        mask = _mask(completion_ids, device)
        asked = queries is not None if transferred is None else transferred
        if not asked and not keep:
            return Scores(batched_logprobs(self.model, prompt_ids, completion_ids, self.micro_batch), mask)
        _check_queries(queries, completion_ids, asked)
        cu = _cu(completion_ids)
        flat = torch.zeros(int(cu[-1]), device=device)
        found = torch.full((0 if queries is None else len(queries.base),), torch.nan, device=device)
        kept: Logits | None = None
        for rows in by_length(prompt_ids, completion_ids, self.micro_batch):
            own = self.rows([prompt_ids[b] for b in rows], [completion_ids[b] for b in rows])
            if keep:  # in the order of the batch, and worked on below
                if kept is None:
                    kept = replace(own, rows=own.rows.new_zeros(len(flat) + len(completion_ids), own.rows.shape[-1]))
                kept.rows[_spans(cu + np.arange(len(cu)), rows).to(device)] = own.rows
            elif queries is not None:
                part = transfer(own, _flat([completion_ids[b] for b in rows], device), queries.select(rows))
                flat[_spans(cu, rows).to(device)] = part.logprobs.float()
                found[_spans(queries.student_cu, rows).to(device)] = part.transferred.float()
        target = None
        if kept is not None and queries is not None:
            part = transfer(kept, _flat(completion_ids, device), queries)
            flat, found = part.logprobs.float(), part.transferred.float()
            target = TransferTarget.of(kept, part, queries)
        elif kept is not None:
            rows_of_tokens = _spans(cu + np.arange(len(cu)), range(len(completion_ids)), but_last=True).to(device)
            flat = _logprobs(replace(kept, rows=kept.rows[rows_of_tokens]), _flat(completion_ids, device))
        logprobs = torch.zeros(mask.shape, device=device).masked_scatter(mask, flat)
        if queries is None:
            return Scores(logprobs, mask, rows=kept)
        return Scores(logprobs, mask, _padded_found(found, queries), kept, target)

    @torch.no_grad()
    def rows(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> Logits:
        """Next-token logits at every place of the completions, in one forward pass, for `transfer` and the losses.

        Returns:
            Flat rows `[N + B]`: for each completion those that predict its n tokens, and the one after the last. Hidden
            states with their output head where the model is made of just these, so that no `[T, V]` is in memory.
        """
        return completion_rows(self.model, prompt_ids, completion_ids, after=True)


class ServerTeacher(_Prompted):
    """A causal language model behind HTTP that scores token ids: vLLM, SGLang, or whatever speaks their protocols.

    Its tokenizer is here, its weights are not: it gives logprobs and the top k of every row, never whole rows, so that
    the credits of logprobs and `cover` work with it, and losses of whole distributions do not.

    Args:
        url: of the server, `http://host:port`.
        tokenizer: the served model's own.
        protocol: `vllm`, `sglang`, `openai`, or `auto`, which finds out.
        model: the name under which the server has the model; empty: the only one that it has.
        topk: likeliest tokens of every row to ask for where queries are to be answered; 0: none.
        plain_template: the prompt format where the tokenizer has no chat template; must contain `{prompt}`.
        device: of the scores.
        options: of `served.Client`: concurrency, timeout, retries, key, pause.

    Raises:
        XTokMapError: a URL or protocol that cannot be.
    """

    def __init__(
        self,
        url: str,
        tokenizer: Any,
        *,
        protocol: str = "auto",
        model: str = "",
        topk: int = 20,
        plain_template: str = PLAIN_TEMPLATE,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, plain_template)
        self.topk, self.device = topk, torch.device(device)
        self._table = byte_table(tokenizer)
        # Many models have some more rows than their tokenizers have tokens, in round numbers; a server may show them.
        rows = len(self._table) + len(self._table) // 32
        self.client = Client(url, protocol=protocol, model=model, spell=self._spell, vocab_size=rows, **options)

    def __repr__(self) -> str:
        return f"ServerTeacher({self.client!r}, topk={self.topk})"

    def _spell(self, token: int) -> bytes | None:
        return self._table[token] if token < len(self._table) else None

    def self_test(self) -> str | None:
        """Whether the server can be believed, from a known text; see `served.self_test`.

        Returns:
            None, or what could not be told, and why.

        Raises:
            TeacherError: it does not answer, or must not be a teacher.
        """
        text = self.tokenizer(_KNOWN_TEXT).input_ids[:32]
        ids = [*self.render(["?"])[0][:8], *text]
        others = [token for token in dict.fromkeys(text) if token != ids[len(ids) // 2]][:4]
        self.client.connect(ids, self.topk)
        return self_test(self.client, ids, others, topk=self.topk, spell=self._spell)

    def score(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        *,
        queries: CoverQueries | None = None,
        transferred: bool | None = None,
        keep: bool = False,
        top: bool = False,
    ) -> Scores:
        """Logprobs of the completions' tokens, as `LocalTeacher.score`.

        Queries are evaluated from the top k of every row and the token that is there (`TopK`): mass that these do not
        show counts as none, except where all of a row but some tokens is asked for.

        Args:
            prompt_ids: B rows, each of at least one id.
            completion_ids: B rows.
            queries: of the batch in which these completions were aligned, from `Aligner.cover_queries`.
            transferred: whether to evaluate them. None: where there are queries.
            keep: must be False.
            top: whether to ask for the top k without queries, too.

        Raises:
            TeacherError: the server gives no answer that can be used for one of the rows.
            XTokMapError: whole rows are asked for, and what `LocalTeacher.score` names.
        """
        _check_pairs(prompt_ids, completion_ids)
        if keep:
            raise XTokMapError(
                "keep=True: a served teacher gives no whole rows; take the credit 'cover' (with top k) or one of "
                "logprobs alone, as 'prior', or load the teacher here (LocalTeacher)"
            )
        if transferred is False:
            queries = None
        _check_queries(queries, completion_ids, transferred is True)
        asked = top or queries is not None
        if asked and not self.topk:
            raise XTokMapError("queries need rows: set topk, or take a credit of logprobs alone, as 'prior'")
        # One more token, so that there is a row after the last one. Which does not matter: it is among that row's.
        after = [self.stop_id or 0] if asked else []
        rows = [[*p, *c, *after] for p, c in zip(prompt_ids, completion_ids, strict=True)]
        wanted = [b for b, row in enumerate(completion_ids) if row or asked]
        answers = dict(
            zip(wanted, self.client.score([rows[b] for b in wanted], self.topk if asked else 0), strict=True)
        )
        mask = _mask(completion_ids, torch.device("cpu"))
        logprobs = torch.zeros(mask.shape)
        for b, answer in answers.items():
            first, n = len(prompt_ids[b]), len(completion_ids[b])
            logprobs[b, :n] = torch.from_numpy(answer.logprobs[first : first + n])
        logprobs, mask = logprobs.to(self.device), mask.to(self.device)
        if not asked:
            return Scores(logprobs, mask)
        flat = _top_rows([(answers[b], len(prompt_ids[b])) for b in wanted]).to(self.device)
        first_row = torch.from_numpy(_cu(completion_ids)[:-1] + np.arange(len(completion_ids))).to(self.device)
        shown = flat.at(torch.where(mask, first_row[:, None] + torch.arange(mask.shape[1], device=self.device), -1))
        shown = replace(shown, ids=torch.where(mask[..., None], shown.ids, -1))
        missing = 1 - torch.where(shown.ids < 0, -torch.inf, shown.logprobs).exp().sum(-1)
        missing = torch.where(mask, missing.clamp(min=0), 0)
        found = None
        if queries is not None:
            part = transfer(flat, _flat(completion_ids, self.device), queries)
            found = _padded_found(part.transferred.float(), queries)
        return Scores(logprobs, mask, found, top=shown, missing=missing)


#: Whoever scores.
Teacher: TypeAlias = LocalTeacher | ServerTeacher

#: What the self-test asks about: letters, digits, other scripts.
_KNOWN_TEXT = "The quick brown fox jumps over 13 lazy dogs, und 7 schöne Grüße: the sky is blue, the grass is green."


def _top_rows(answers: Sequence[tuple[Answer, int]]) -> TopK:
    """The rows of completions, each from the one after its prompt on, flat."""
    width = max((answer.top_ids.shape[1] for answer, _ in answers), default=1)
    ids = [np.pad(a.top_ids[p:], ((0, 0), (0, width - a.top_ids.shape[1])), constant_values=-1) for a, p in answers]
    logprobs = [np.pad(a.top_logprobs[p:], ((0, 0), (0, width - a.top_logprobs.shape[1]))) for a, p in answers]
    return TopK(
        torch.from_numpy(np.concatenate([np.zeros((0, width), np.int64), *ids])),
        torch.from_numpy(np.concatenate([np.zeros((0, width), np.float32), *logprobs])),
    )


def _check_queries(queries: CoverQueries | None, completion_ids: Sequence[Sequence[int]], asked: bool) -> None:
    if asked and queries is None:
        raise XTokMapError("transferred=True needs queries=aligner.cover_queries(batch) of these completions")
    if queries is not None and np.diff(queries.teacher_cu).tolist() != [len(row) for row in completion_ids]:
        raise XTokMapError("queries are of other completions: their rows have other numbers of teacher tokens")


def _padded_found(found: Tensor, queries: CoverQueries) -> Tensor:
    """What was found of every student token, `[B, Ts]`, NaN on padding."""
    places, shape = queries.places()
    padded = torch.full((shape[0] * shape[1],), torch.nan, device=found.device)
    padded[torch.from_numpy(places).to(found.device)] = found
    return padded.view(shape)


def _spans(cu: npt.NDArray[np.int64], rows: Sequence[int], *, but_last: bool = False) -> Tensor:
    """Flat places of some rows, one after the other."""
    spans = (np.arange(cu[b], cu[b + 1] - but_last) for b in rows)
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *spans]))


def _cu(rows: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """int64 `[B+1]`: tokens before each row."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum([len(row) for row in rows], dtype=np.int64)])


def _mask(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """bool `[B, T]`: where ragged rows have a token."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return torch.arange(max(map(len, rows), default=0), device=device) < lengths[:, None]


def _flat(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    return torch.tensor([i for row in rows for i in row], dtype=torch.long).to(device)


def _logprobs(rows: Logits, ids: Tensor) -> Tensor:
    """float32 `[N]`: of token `ids[i]` in row i; differentiable."""
    if rows.weight is None:
        return token_logprobs(rows.rows, ids, temperature=rows.temperature, softcap=rows.softcap)
    return token_logprobs_from_hidden(
        rows.rows, rows.weight, ids, bias=rows.bias, temperature=rows.temperature, softcap=rows.softcap
    )


def render(tokenizer: Any, prompts: Sequence[str], plain_template: str = PLAIN_TEMPLATE) -> list[list[int]]:
    """Prompts as ids: through the tokenizer's chat template, or through `plain_template` when it has none."""
    if "{prompt}" not in plain_template:
        raise XTokMapError(f"plain_template={plain_template!r} must contain {{prompt}}")
    for k, prompt in enumerate(prompts):
        check_text(prompt, f"prompt {k}")
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


def completion_rows(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    after: bool = False,
) -> Logits:
    """The rows of a transformers causal language model that score completions, flat, row of the batch after row.

    Args:
        model: its parameters' device is used. With a gradient where grad is enabled.
        prompt_ids: B rows, each of at least one id.
        completion_ids: B rows of N ids together.
        temperature: of the distribution that sampled.
        after: also the row after each completion's last token: `[N + B]` instead of `[N]`.
    """
    _check_pairs(prompt_ids, completion_ids)
    device = next(model.parameters()).device
    rows = [[*p, *c] for p, c in zip(prompt_ids, completion_ids, strict=True)]
    length = max(map(len, rows), default=0)
    # Everything about lengths is known here, so that the device is never asked.
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.long).to(device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], dtype=torch.long).to(device)
    source: list[int] = []
    for b, (p, c) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        first = b * length + len(p) - 1
        source += range(first, first + len(c) + after)
    at = torch.tensor(source, device=device, dtype=torch.long)

    body, head = _parts(model)
    if body is None:
        # Rows before the shortest prompt's last token score nothing that is wanted.
        skip = min(map(len, prompt_ids), default=1) - 1
        if skip and "logits_to_keep" in inspect.signature(model.forward).parameters:
            out = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=length - skip).logits
            at = at - skip * (at // length + 1)
        else:
            out = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return Logits(out.flatten(0, 1).index_select(0, at), temperature=temperature)
    hidden = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return Logits(
        hidden.flatten(0, 1).index_select(0, at),
        head.weight,
        head.bias,
        temperature=temperature,
        softcap=_softcap(model),
    )


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
    rows = completion_rows(model, prompt_ids, completion_ids, temperature=temperature)
    return padded_logprobs(rows, completion_ids, width)


def padded_logprobs(rows: Logits, completion_ids: Sequence[Sequence[int]], width: int | None = None) -> Tensor:
    """Logprobs of completions from their flat rows: float32 `[B, width]`, 0 on padding; differentiable."""
    device = rows.rows.device
    width = max(map(len, completion_ids), default=0) if width is None else width
    flat = _logprobs(rows, _flat(completion_ids, device))
    shape = (len(completion_ids), width)
    return (
        flat.new_zeros(shape).view(-1).index_copy(0, padded_places(completion_ids, width).to(device), flat).view(shape)
    )


def padded_places(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """int64 `[N]`, on the CPU: where the tokens of ragged rows lie in `[B, width]`, flat."""
    return torch.from_numpy(cover.padded_places(_cu(rows), None, width))


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
    inner = without_wrapper(model)  # an adapter's wrapper calls its tuner `base_model`
    body, head = getattr(inner, "base_model", None), inner.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or body is None or body is inner:
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

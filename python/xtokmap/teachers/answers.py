"""What a served teacher is asked and says, in the words of its protocols; nothing here knows of sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.ids import Int32
from xtokmap.teachers import binary, sums
from xtokmap.teachers.scorer import Reading, RefusedError, Scored, Scorer, check_numbers, score_row
from xtokmap.teachers.states import XtokmapStates
from xtokmap.tokenizers import byte_table
from xtokmap.torch.logits import Logits


@dataclass(frozen=True, eq=False)
class Asked:
    """A request that was understood.

    Attributes:
        rows: of ids, checked; to be scored.
        read: what is wanted of each.
        answer: makes what is answered of that: bytes, or something for JSON.
    """

    rows: list[list[int]]
    read: Reading
    answer: Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Route:
    """How one path is asked.

    Attributes:
        method: of HTTP.
        understand: the body, or raises what is wrong with it as `RefusedError`.
        binary: whether the body is bytes, and not JSON.
    """

    method: str
    understand: Callable[[Any], Asked]
    binary: bool = False


class Answers:
    """vLLM's words for what a model says, and two paths of our own for what those have no words for.

    `POST /v1/hidden_states` takes JSON: `prompt` (ids), `first` (the first place that is to be scored; 1 is the least)
    and `dtype` (auto: as the model computes). It answers with safetensors: `hidden` `[n - first + 1, H]`, after the
    final norm, of which row i is what the output head makes the logits of place first + i of.

    `POST /v1/sums` takes safetensors: `ids`, `Terms`, and as metadata `first`, `order` (`sums.digest`) and `model`. It
    answers with safetensors: `logprobs` of the ids from `first` on and `masses`, float32.

    Args:
        scorer: of the model; what it takes is what a request may have.
        tokenizer: the model's.
        name: of the model, in `/v1/models`.
    """

    def __init__(self, scorer: Scorer, tokenizer: Any, name: str) -> None:
        self.scorer, self.tokenizer, self.name = scorer, tokenizer, name
        self._encoding = threading.Lock()  # a tokenizer of transformers cannot encode in two threads at a time
        self._routes = {
            "/health": Route("GET", lambda _: Asked([], _nothing, lambda _: {"status": "ok"})),
            "/v1/models": Route("GET", lambda _: Asked([], _nothing, lambda _: self._models())),
            "/v1/completions": Route("POST", self._completions),
            XtokmapStates.path: Route("POST", self._hidden),
            sums.PATH: Route("POST", self._sums, binary=True),
        }

    def route(self, method: str, path: str) -> Route:
        """How a request to a path is understood.

        Raises:
            RefusedError: there is no such path, or it takes another method.
        """
        if path not in self._routes:
            raise RefusedError(404, f"there is no {path:.100} here; this server has {', '.join(self._routes)}")
        route = self._routes[path]
        if method != route.method:
            raise RefusedError(405, f"{path} takes {route.method}", {"Allow": route.method})
        return route

    def _models(self) -> Any:
        entry = {"id": self.name, "object": "model", "owned_by": "xtokmap", "max_model_len": self.scorer.max_length}
        return {"object": "list", "data": [entry]}

    def _completions(self, body: Any) -> Asked:
        """vLLM's `prompt_logprobs`."""
        self._check(body)
        for name in ("stream", "suffix", "best_of", "n"):
            if body.get(name) not in (None, False, 1) or body.get(name) is True:
                raise RefusedError(400, f"{name}: this server scores prompts, and knows nothing of that")
        for name in ("echo", "logprobs"):
            if body.get(name) is not None and body[name] is not False:
                raise RefusedError(400, f"{name}: this server has vLLM's prompt_logprobs instead")
        new = _whole(body, "max_tokens", 1, 0, 1)
        asked = self._topk(body, "prompt_logprobs")
        rows = self._prompts(body.get("prompt"), new)

        def answer(found: Sequence[Scored]) -> Any:
            choices = []
            for number, (row, scored) in enumerate(zip(rows, found, strict=True)):
                choice: dict[str, Any] = {"index": number, "finish_reason": "length", "logprobs": None}
                choice["text"] = self._text([scored.new]) if new else ""
                if asked is not None:
                    ranked = (self._ranked(scored, i, t, asked) for i, t in enumerate(row[1:]))
                    choice["prompt_logprobs"] = [None, *ranked]
                if body.get("return_token_ids"):
                    choice |= {"prompt_token_ids": row, "token_ids": [scored.new] * new}
                choices.append(choice)
            tokens = sum(map(len, rows))
            usage = {
                "prompt_tokens": tokens,
                "completion_tokens": new * len(rows),
                "total_tokens": tokens + new * len(rows),
            }
            head = {"id": f"cmpl-{time.monotonic_ns()}", "object": "text_completion", "created": int(time.time())}
            return {**head, "model": self.name, "choices": choices, "usage": usage}

        return Asked(rows, partial(score_row, topk=asked or 0), answer)

    def _ranked(self, scored: Scored, i: int, token: int, k: int) -> dict[str, Any]:
        """Place i as vLLM has it: the token that is there, whatever its rank, and the k likeliest."""
        ranked = {token: (scored.logprobs[i], scored.ranks[i])}
        for rank, (other, value) in enumerate(zip(scored.top_ids[i][:k], scored.top_logprobs[i][:k], strict=True), 1):
            ranked.setdefault(other, (value, rank))
        # vLLM's stand-in for what JSON cannot have.
        return {
            str(token): {"logprob": max(value, -9999.0), "rank": rank, "decoded_token": self._text([token])}
            for token, (value, rank) in ranked.items()
        }

    def _check(self, body: Any) -> None:
        """Whether a body is an object, and of this model."""
        if not isinstance(body, dict):
            raise RefusedError(400, "the body must be a JSON object")
        model = body.get("model")
        if not isinstance(model, str | None):
            raise RefusedError(400, f"model is {model!r:.40}; it must be a name")
        if model not in (None, "", self.name):
            raise RefusedError(404, f"the model {model!r:.100} does not exist; this server has {self.name!r}")

    def _hidden(self, body: Any) -> Asked:
        """The states behind the logits."""
        self._check(body)
        row = self._prompts(body.get("prompt"), 0)[0]
        if _nested(body["prompt"]):
            raise RefusedError(400, "prompt must be one row of token ids")
        first = _whole(body, "first", 1, 1, len(row))
        name = body.get("dtype") or "auto"
        if name not in ("auto", *_DTYPES):
            raise RefusedError(400, f"dtype is {name!r:.40}; this server takes auto, {', '.join(_DTYPES)}")

        def read(rows: Logits, ids: list[int]) -> Tensor:
            if rows.weight is None:
                raise RefusedError(400, "this model is not made of a body and an output head: it has no hidden states")
            found = rows.rows[first - 1 :]
            found = found if name == "auto" else found.to(_DTYPES[name])
            check_numbers((~torch.isfinite(found).all(-1)).tolist(), len(ids))
            return found.contiguous().cpu()

        return Asked([row], read, lambda found: binary.pack({"hidden": found[0]}))

    def _sums(self, body: bytes) -> Asked:
        """The masses of sets of tokens."""
        try:
            tensors, said = binary.unpack(body)
        except ValueError as error:
            raise RefusedError(400, f"the body has {error}") from None
        self._check({"model": said.get("model")})
        ids = tensors.pop("ids", None)
        if ids is None or ids.dtype != torch.int32 or ids.ndim != 1:
            raise RefusedError(400, "ids must be int32, of one dimension")
        row = self._prompts(ids.tolist(), 0, name="ids")[0]
        first = said.get("first", "1")
        if not first.isascii() or not first.isdigit() or len(first) > 9 or not 1 <= int(first) <= len(row):
            raise RefusedError(400, f"first is {first!r:.40}; this server takes 1 to {len(row)}")
        if said.get("order") != sums.digest(self._order):
            raise RefusedError(409, "order: the tokens of the tokenizer here are not those of yours, sorted by bytes")
        try:
            terms = sums.Terms.of(tensors, len(row) - int(first) + 1, self.scorer.vocab_size, len(self._order))
        except XTokMapError as error:
            raise RefusedError(400, str(error)) from None

        def read(rows: Logits, ids: list[int]) -> dict[str, Tensor]:
            own = replace(rows, rows=rows.rows[int(first) - 1 :])
            device = rows.rows.device
            tokens = torch.tensor(ids[int(first) :], dtype=torch.long).to(device)
            logprobs, masses = sums.masses(own, tokens, terms, torch.from_numpy(self._order).long().to(device))
            check_numbers(torch.isnan(logprobs).tolist(), len(ids))
            check_numbers(torch.isnan(masses).tolist(), len(ids))
            return {"logprobs": logprobs.cpu(), "masses": masses.cpu()}

        return Asked([row], read, lambda found: binary.pack(found[0]))

    @cached_property
    def _order(self) -> Int32:
        return sums.byte_order(byte_table(self.tokenizer))

    def _topk(self, body: dict[str, Any], name: str) -> int | None:
        if body.get(name) is None:
            return None
        most = self.scorer.limits.max_logprobs or self.scorer.vocab_size
        return _whole(body, name, 0, 0, most)

    def _prompts(self, prompt: Any, new: int, name: str = "prompt") -> list[list[int]]:
        """Rows of ids, checked."""
        given = prompt if _nested(prompt) else [prompt]
        if not given:
            raise RefusedError(400, f"{name} has no row")
        if len(given) > self.scorer.limits.max_queue:
            said = f"{name} has {len(given)} rows; this server takes {self.scorer.limits.max_queue} of a request"
            raise RefusedError(413, said)
        rows = []
        for b, row in enumerate(given):
            where = f"{name}[{b}]" if _nested(prompt) else name
            ids = self._ids(row) if isinstance(row, str) else row
            if not isinstance(ids, list) or not ids:
                raise RefusedError(400, f"{where} must be a text or a list of token ids, and not empty")
            for i, token in enumerate(ids):
                if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.scorer.vocab_size:
                    raise RefusedError(
                        400, f"{where}[{i}] is {token!r:.40}; the model has token ids 0 to {self.scorer.vocab_size - 1}"
                    )
            if len(ids) + new > self.scorer.max_length:
                raise RefusedError(
                    400,
                    f"{where} has {len(ids)} tokens, and {new} new; the model takes {self.scorer.max_length} together",
                )
            rows.append(ids)
        return rows

    def _ids(self, text: str) -> list[int]:
        with self._encoding:
            ids: list[int] = self.tokenizer(text).input_ids
        return ids

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _nothing(rows: Logits, ids: list[int]) -> None:
    """What a request without rows wants of them."""


def _nested(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], (list, str))


def _whole(body: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = body.get(name, default)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RefusedError(400, f"{name} is {value!r:.40}; this server takes {least} to {most}")
    return value

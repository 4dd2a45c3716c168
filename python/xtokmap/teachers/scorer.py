"""What a served teacher says: a transformers causal language model that scores rows, and three protocols around it.

Nothing here knows of sockets: `Scorer` asks the model, `Answers` understands a request and writes its answer.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.models import one_line
from xtokmap.torch.completions import completion_rows

#: Float32 values of one slice of logits, as everywhere: 64 MiB.
_SLICE = 2**24


@dataclass(frozen=True)
class Limits:
    """What the server takes.

    Attributes:
        max_batch: rows in one forward pass.
        max_queue: rows that wait; more are refused with 429, a request that alone has more with 413.
        max_length: tokens of a row, the new one included; 0: as many as the model's configuration says.
        max_logprobs: likeliest tokens of a row; 0: no limit.
        max_body: bytes of a request's body; 0: what `max_queue` rows of `max_length` ids take, and 4 MiB at most.
        max_seconds: that a request may take to arrive, headers and body together, and its answer to be read.
        max_connections: at a time; one more closes the one that has kept the server waiting longest.

    Raises:
        XTokMapError: a value that cannot be.
    """

    max_batch: int = 8
    max_queue: int = 1024
    max_length: int = 0
    max_logprobs: int = 0
    max_body: int = 0
    max_seconds: float = 60.0
    max_connections: int = 256

    def __post_init__(self) -> None:
        least = {"max_batch": 1, "max_queue": 1, "max_length": 0, "max_logprobs": 0, "max_body": 0}
        for name, low in {**least, "max_connections": 1}.items():
            if getattr(self, name) < low:
                raise XTokMapError(f"{name}={getattr(self, name)}: must be at least {low}")
        if not 0 < self.max_seconds < math.inf:
            raise XTokMapError(f"max_seconds={self.max_seconds}: must be above 0 and finite")


@dataclass(frozen=True, eq=False)
class Scored:
    """What the model says of a row of n ids.

    Attributes:
        logprobs: of tokens 1 to n - 1 and of the new one: n values.
        ranks: of the same tokens: 1 is the likeliest.
        top_ids: the k likeliest tokens of the same places, likeliest first.
        top_logprobs: of these.
        new: the likeliest token after the row.
    """

    logprobs: list[float]
    ranks: list[int]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]
    new: int


@dataclass(frozen=True, eq=False)
class _Job:
    ids: list[int]
    topk: int
    done: Future[Scored] = field(default_factory=Future)


class RefusedError(Exception):
    """A request that the server does not take, with the HTTP status that says so."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}


class Scorer:
    """The model, and the one thread that asks it; rows that wait are taken together.

    Args:
        model: a transformers causal language model.
        limits: what is taken.
    """

    def __init__(self, model: Any, limits: Limits | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.limits = limits or Limits()
        config = model.config.get_text_config()
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        longest = getattr(config, "max_position_embeddings", None)
        self.max_length: int = self.limits.max_length or longest or 2**31
        self.batches = 0
        self._waiting: deque[_Job] = deque()
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[list[int]], topk: int) -> list[Future[Scored]]:
        """Puts rows, already checked, among those that wait: all of them or none.

        Raises:
            RefusedError: more rows than may ever wait (413) or than may wait now (429), or the end has come (503).
        """
        jobs, most = [_Job(ids, topk) for ids in rows], self.limits.max_queue
        if len(jobs) > most:
            raise RefusedError(413, f"{len(jobs)} rows; this server takes {most} of a request")
        with self._changed:
            if self._closing:
                raise RefusedError(503, "this server is about to stop")
            if len(self._waiting) + len(jobs) > most:
                said = f"{len(self._waiting)} rows wait already; with these {len(jobs)} there would be more than {most}"
                raise RefusedError(429, said, {"Retry-After": "1"})
            self._waiting += jobs
            self._changed.notify()
        return [job.done for job in jobs]

    def drop(self, rows: Iterable[Future[Scored]]) -> None:
        """Forgets rows that nobody waits for any more, unless the model has them or is done with them."""
        if not sum(row.cancel() for row in rows):
            return
        with self._changed:
            self._waiting = deque(job for job in self._waiting if not job.done.cancelled())

    def close(self, patience: float | None = None) -> None:
        """Ends the thread after the rows that wait, and waits for that: `patience` seconds, or as long as it takes."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(patience)

    def _work(self) -> None:
        while jobs := self._take():
            self._run(jobs)

    def _take(self) -> list[_Job]:
        """The next rows for the model, as soon as there are some; none at the end."""
        with self._changed:
            jobs: list[_Job] = []
            while not jobs and (self._waiting or not self._closing):
                self._changed.wait_for(lambda: self._waiting or self._closing)
                while self._waiting and len(jobs) < self.limits.max_batch:
                    job = self._waiting.popleft()
                    if job.done.set_running_or_notify_cancel():
                        jobs.append(job)
            return jobs

    def _run(self, jobs: Sequence[_Job]) -> None:
        self.batches += 1
        try:
            found = self._score([job.ids for job in jobs], [job.topk for job in jobs])
        except Exception as error:  # out of memory, a model's own check: these requests fail, the server goes on
            if len(jobs) == 1:
                jobs[0].done.set_exception(RefusedError(500, f"the model failed: {one_line(error)}"))
                return
            for job in jobs:  # one of them may be to blame
                self._run([job])
            return
        for job, scored in zip(jobs, found, strict=True):
            broken = next((i for i, value in enumerate(scored.logprobs) if math.isnan(value)), None)
            if broken is None:
                job.done.set_result(scored)
            else:
                said = f"the model failed: its logprobs after token {broken} of {len(job.ids)} are NaN"
                job.done.set_exception(RefusedError(500, said))

    @torch.no_grad()
    def _score(self, rows: list[list[int]], topk: list[int]) -> list[Scored]:
        # Row i of a model's logits scores token i + 1: all but the first token are a completion of the first.
        logits = completion_rows(self.model, [row[:1] for row in rows], [row[1:] for row in rows], after=True)
        k = min(max(topk), self.vocab_size)
        targets = torch.tensor([i for row in rows for i in (*row[1:], -1)]).to(logits.rows.device)
        size = max(1, _SLICE // self.vocab_size)
        parts: list[tuple[Tensor, ...]] = []
        for a in range(0, len(targets), size):
            x = logits.slice(a, a + size).float().log_softmax(-1)
            best = x.argmax(-1)
            ids = torch.where(targets[a : a + size] < 0, best, targets[a : a + size])
            own = x.gather(1, ids[:, None])
            values, likeliest = x.topk(k) if k else (x[:, :0], best[:, None][:, :0])
            parts.append((own[:, 0], (x > own).sum(-1) + 1, likeliest, values, best))
        columns = [torch.cat(column).tolist() for column in zip(*parts, strict=True)]
        found, first = [], 0
        for row, own_k in zip(rows, topk, strict=True):
            own_logprobs, ranks, top_ids, tops, bests = (column[first : first + len(row)] for column in columns)
            first += len(row)
            top_ids, tops = [i[:own_k] for i in top_ids], [v[:own_k] for v in tops]
            found.append(Scored(own_logprobs, ranks, top_ids, tops, bests[-1]))
        return found


@dataclass(frozen=True, eq=False)
class Asked:
    """A request that was understood.

    Attributes:
        rows: of ids, checked; to be scored.
        topk: likeliest tokens that each place of them needs.
        answer: makes what is answered, for JSON, of what the model says of the rows.
    """

    rows: list[list[int]]
    topk: int
    answer: Callable[[Sequence[Scored]], Any]


class Answers:
    """vLLM's, OpenAI's and SGLang's words for what a model says.

    Args:
        scorer: of the model; what it takes is what a request may have.
        tokenizer: the model's.
        name: of the model, in `/v1/models`.
    """

    def __init__(self, scorer: Scorer, tokenizer: Any, name: str) -> None:
        self.scorer, self.tokenizer, self.name = scorer, tokenizer, name
        self._encoding = threading.Lock()  # a tokenizer of transformers cannot encode in two threads at a time
        self._routes: dict[str, tuple[str, Callable[[Any], Asked]]] = {
            "/health": ("GET", lambda _: Asked([], 0, lambda _: {"status": "ok"})),
            "/v1/models": ("GET", lambda _: Asked([], 0, lambda _: self._models())),
            "/v1/completions": ("POST", self._completions),
            "/generate": ("POST", self._generate),
        }

    def route(self, method: str, path: str) -> Callable[[Any], Asked]:
        """What understands the body of a request, or says as `RefusedError` what is wrong with it.

        Raises:
            RefusedError: there is no such path, or it takes another method.
        """
        if path not in self._routes:
            raise RefusedError(404, f"there is no {path:.100} here; this server has {', '.join(self._routes)}")
        known, understand = self._routes[path]
        if method != known:
            raise RefusedError(405, f"{path} takes {known}", {"Allow": known})
        return understand

    def _models(self) -> Any:
        entry = {"id": self.name, "object": "model", "owned_by": "xtokmap", "max_model_len": self.scorer.max_length}
        return {"object": "list", "data": [entry]}

    def _completions(self, body: Any) -> Asked:
        """vLLM's `prompt_logprobs` and OpenAI's `echo` with `logprobs`."""
        if not isinstance(body, dict):
            raise RefusedError(400, "the body must be a JSON object")
        model = body.get("model")
        if not isinstance(model, str | None):
            raise RefusedError(400, f"model is {model!r:.40}; it must be a name")
        if model not in (None, "", self.name):
            raise RefusedError(404, f"the model {model!r:.100} does not exist; this server has {self.name!r}")
        for name in ("stream", "suffix", "best_of", "n"):
            if body.get(name) not in (None, False, 1) or body.get(name) is True:
                raise RefusedError(400, f"{name}: this server scores prompts, and knows nothing of that")
        new = _whole(body, "max_tokens", 1, 0, 1)
        echo, logprobs = bool(body.get("echo", False)), self._topk(body, "logprobs")
        asked = self._topk(body, "prompt_logprobs")
        rows = self._prompts(body.get("prompt"), new)

        def answer(found: Sequence[Scored]) -> Any:
            choices = []
            for number, (row, scored) in enumerate(zip(rows, found, strict=True)):
                text = self._text([scored.new]) if new else ""
                choice: dict[str, Any] = {"index": number, "finish_reason": "length"}
                choice["text"] = self._text(row) + text if echo else text
                choice["logprobs"] = None if logprobs is None else self._openai(row, scored, logprobs, echo, new, body)
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

        return Asked(rows, max(asked or 0, logprobs or 0), answer)

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

    def _openai(
        self, row: list[int], scored: Scored, k: int, echo: bool, new: int, body: dict[str, Any]
    ) -> dict[str, Any]:
        as_ids = bool(body.get("return_tokens_as_token_ids", False))

        def spelled(token: int) -> str:
            return f"token_id:{token}" if as_ids else self._text([token])

        # Places of the tokens to speak of; -1 is the first token's, which nothing scores.
        places = [*(range(-1, len(row) - 1) if echo else ()), *([len(row) - 1] if new else ())]
        tokens = [*row, scored.new]
        texts = [spelled(tokens[i + 1]) for i in places]
        offsets = [0]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        tops: list[dict[str, float] | None] = []
        for i in places:
            pairs = zip(scored.top_ids[i][:k], scored.top_logprobs[i][:k], strict=True) if i >= 0 else ()
            top = {spelled(token): max(value, -9999.0) for token, value in pairs}
            tops.append(None if i < 0 else {spelled(tokens[i + 1]): max(scored.logprobs[i], -9999.0), **top})
        return {
            "tokens": texts,
            "token_logprobs": [None if i < 0 else max(scored.logprobs[i], -9999.0) for i in places],
            "top_logprobs": tops,
            "text_offset": offsets[:-1],
        }

    def _generate(self, body: Any) -> Asked:
        """SGLang's `/generate` with `return_logprob`."""
        if not isinstance(body, dict):
            raise RefusedError(400, "the body must be a JSON object")
        sampling = body.get("sampling_params") or {}
        if not isinstance(sampling, dict):
            raise RefusedError(400, "sampling_params must be a JSON object")
        new = _whole(sampling, "max_new_tokens", 1, 0, 1)
        topk = self._topk(body, "top_logprobs_num") or 0
        texts = bool(body.get("return_text_in_logprobs", False))
        prompt = body.get("input_ids") if body.get("input_ids") is not None else body.get("text")
        rows = self._prompts(prompt, new, name="input_ids")
        first = _whole(body, "logprob_start_len", -1, -1, 2**31)

        def triple(value: float | None, token: int) -> list[Any]:
            return [value if value is None else max(value, -9999.0), token, self._text([token]) if texts else None]

        def meta(row: list[int], scored: Scored) -> dict[str, Any]:
            places = range(len(row) if first < 0 else min(first, len(row)), len(row))

            def top(i: int) -> list[Any]:
                return [triple(v, t) for t, v in zip(scored.top_ids[i], scored.top_logprobs[i], strict=True)]

            found: dict[str, Any] = {"prompt_tokens": len(row), "completion_tokens": new}
            if body.get("return_logprob"):
                found["input_token_logprobs"] = [triple(scored.logprobs[i - 1] if i else None, row[i]) for i in places]
                found["output_token_logprobs"] = [triple(scored.logprobs[-1], scored.new)] * new
                if topk:
                    found["input_top_logprobs"] = [top(i - 1) if i else None for i in places]
                    found["output_top_logprobs"] = [top(len(row) - 1)] * new
            return found

        def answer(found: Sequence[Scored]) -> Any:
            answers = [
                {"text": self._text([scored.new]) if new else "", "meta_info": meta(row, scored)}
                for row, scored in zip(rows, found, strict=True)
            ]
            return answers if _nested(prompt) else answers[0]

        return Asked(rows, topk, answer)

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


def _nested(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], (list, str))


def _whole(body: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = body.get(name, default)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RefusedError(400, f"{name} is {value!r:.40}; this server takes {least} to {most}")
    return value

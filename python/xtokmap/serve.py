"""`xtokmap serve-teacher`: any transformers causal language model as a teacher behind HTTP.

It scores; it does not chat. Of three protocols it speaks what a teacher is asked: vLLM's and OpenAI's completions and
SGLang's generate, each with the logprobs of the prompt and at most one new token (the likeliest). Requests that come at
the same time share a forward pass. It is for models that no server takes and for machines without one; where vLLM or
SGLang run, they are faster.
"""

from __future__ import annotations

import hmac
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.models import one_line
from xtokmap.served import KEY_VARIABLE
from xtokmap.teacher import completion_rows

#: Longest body of a request, in bytes; a prompt of a million ids has about 8 MiB.
_LONGEST_BODY = 64 * 2**20

#: Float32 values of one slice of logits, as everywhere: 64 MiB.
_SLICE = 2**24


@dataclass(frozen=True)
class Limits:
    """What the server takes.

    Attributes:
        max_batch: requests in one forward pass.
        max_queue: requests that wait; more are refused with 429.
        max_length: tokens of a row, the new one included; 0: as many as the model's configuration says.
        max_logprobs: likeliest tokens of a row; 0: no limit.

    Raises:
        XTokMapError: a value that cannot be.
    """

    max_batch: int = 8
    max_queue: int = 1024
    max_length: int = 0
    max_logprobs: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_batch", 1), ("max_queue", 1), ("max_length", 0), ("max_logprobs", 0)):
            if getattr(self, name) < least:
                raise XTokMapError(f"{name}={getattr(self, name)}: must be at least {least}")


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
        self._jobs: queue.Queue[_Job | None] = queue.Queue(self.limits.max_queue)
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def submit(self, ids: list[int], topk: int) -> Future[Scored]:
        """Puts a row, already checked, among those that wait.

        Raises:
            RefusedError: too many wait.
        """
        job = _Job(ids, topk)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise RefusedError(429, f"{self.limits.max_queue} requests wait already", {"Retry-After": "1"}) from None
        return job.done

    def close(self) -> None:
        """Ends the thread after the rows that wait."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            jobs = [job]
            while len(jobs) < self.limits.max_batch and not self._jobs.empty():
                if (another := self._jobs.get()) is None:
                    self._jobs.put(None)
                    break
                jobs.append(another)
            self._run(jobs)

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
            job.done.set_result(scored)

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


class TeacherServer(ThreadingHTTPServer):
    """Scores token ids behind HTTP, as vLLM, SGLang and OpenAI do; see the module.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        name: of the model, in `/v1/models`.
        host: to listen on.
        port: to listen on; 0: a free one (`url` says which).
        limits: what is taken.
        key: asked of every request but `/health`; empty: none.

    Raises:
        XTokMapError: the host and port cannot be listened on.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "teacher",
        host: str = "127.0.0.1",
        port: int = 0,
        limits: Limits | None = None,
        key: str = "",
    ) -> None:
        self.tokenizer, self.name, self.key = tokenizer, name, key
        self.limits = limits or Limits()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), self.handler())
        except (OSError, OverflowError) as error:
            raise XTokMapError(f"cannot listen on {host}:{port}: {one_line(error)}") from None
        self.scorer = Scorer(model, self.limits)
        self.answered = 0
        self._lock = threading.Lock()
        self._busy = 0

    def handler(self) -> type[BaseHTTPRequestHandler]:
        """What handles a connection."""
        return Handler

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks between requests is nobody's error; anything else is printed."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.server_address[:2]
        name = host.decode() if isinstance(host, bytes) else str(host)
        return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"

    def close(self, patience: float = 10.0) -> None:
        """Answers what it has taken, for `patience` seconds at most, and stops. To be called by another thread."""
        self.shutdown()
        deadline = time.monotonic() + patience
        while self._busy and time.monotonic() < deadline:
            time.sleep(0.01)
        self.server_close()
        self.scorer.close()

    def answer(self, method: str, path: str, body: Any) -> Any:
        """The JSON that answers a request.

        Raises:
            RefusedError: a request that cannot be answered.
        """
        routes: dict[tuple[str, str], Callable[[], Any]] = {
            ("GET", "/health"): lambda: {"status": "ok"},
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/completions"): lambda: self._completions(body),
            ("POST", "/generate"): lambda: self._generate(body),
        }
        if (method, path) not in routes:
            known = [m for m, p in routes if p == path]
            if known:
                raise RefusedError(405, f"{path} takes {known[0]}", {"Allow": known[0]})
            raise RefusedError(404, f"there is no {path} here; this server has {', '.join(p for _, p in routes)}")
        found: Any = routes[method, path]()
        return found

    def _models(self) -> Any:
        entry = {"id": self.name, "object": "model", "owned_by": "xtokmap", "max_model_len": self.scorer.max_length}
        return {"object": "list", "data": [entry]}

    def _completions(self, body: Any) -> Any:
        """vLLM's `prompt_logprobs` and OpenAI's `echo` with `logprobs`."""
        if not isinstance(body, dict):
            raise RefusedError(400, "the body must be a JSON object")
        if body.get("model") not in (None, "", self.name):
            raise RefusedError(404, f"the model {body['model']!r:.100} does not exist; this server has {self.name!r}")
        for name in ("stream", "suffix", "best_of", "n"):
            if body.get(name) not in (None, False, 1) or body.get(name) is True:
                raise RefusedError(400, f"{name}: this server scores prompts, and knows nothing of that")
        new = _whole(body, "max_tokens", 1, 0, 1)
        echo, logprobs = bool(body.get("echo", False)), self._topk(body, "logprobs")
        asked = self._topk(body, "prompt_logprobs")
        rows = self._prompts(body.get("prompt"), new)
        topk = max(asked or 0, logprobs or 0)
        jobs = [self.scorer.submit(row, topk) for row in rows]
        choices = []
        for number, (row, job) in enumerate(zip(rows, jobs, strict=True)):
            scored = job.result()
            text = self._text([scored.new]) if new else ""
            choice: dict[str, Any] = {"index": number, "finish_reason": "length"}
            choice["text"] = self._text(row) + text if echo else text
            choice["logprobs"] = None if logprobs is None else self._openai(row, scored, logprobs, echo, new, body)
            if asked is not None:
                choice["prompt_logprobs"] = [None, *(self._ranked(scored, i, t, asked) for i, t in enumerate(row[1:]))]
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

    def _generate(self, body: Any) -> Any:
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
        jobs = [self.scorer.submit(row, topk) for row in rows]
        answers = []
        for row, job in zip(rows, jobs, strict=True):
            scored = job.result()
            start = min(_whole(body, "logprob_start_len", -1, -1, 2**31), len(row))
            start = len(row) if start < 0 else start

            def triple(value: float | None, token: int) -> list[Any]:
                return [value if value is None else max(value, -9999.0), token, self._text([token]) if texts else None]

            def top(i: int, scored: Scored = scored, triple: Any = triple) -> list[Any]:
                return [triple(v, t) for t, v in zip(scored.top_ids[i], scored.top_logprobs[i], strict=True)]

            meta: dict[str, Any] = {"prompt_tokens": len(row), "completion_tokens": new}
            if body.get("return_logprob"):
                meta["input_token_logprobs"] = [
                    triple(scored.logprobs[i - 1] if i else None, row[i]) for i in range(start, len(row))
                ]
                meta["output_token_logprobs"] = [triple(scored.logprobs[-1], scored.new)] * new
                if topk:
                    meta["input_top_logprobs"] = [top(i - 1) if i else None for i in range(start, len(row))]
                    meta["output_top_logprobs"] = [top(len(row) - 1)] * new
            answers.append({"text": self._text([scored.new]) if new else "", "meta_info": meta})
        return answers[0] if not _nested(prompt) else answers

    def _topk(self, body: dict[str, Any], name: str) -> int | None:
        if body.get(name) is None:
            return None
        most = self.limits.max_logprobs or self.scorer.vocab_size
        return _whole(body, name, 0, 0, most)

    def _prompts(self, prompt: Any, new: int, name: str = "prompt") -> list[list[int]]:
        """Rows of ids, checked."""
        given = prompt if _nested(prompt) else [prompt]
        if not given:
            raise RefusedError(400, f"{name} has no row")
        rows = []
        for b, row in enumerate(given):
            where = f"{name}[{b}]" if _nested(prompt) else name
            ids = self.tokenizer(row).input_ids if isinstance(row, str) else row
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


class Handler(BaseHTTPRequestHandler):
    """One connection; requests come one after the other."""

    protocol_version = "HTTP/1.1"
    # An answer goes out in one piece and at once, or every request would wait for an acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True
    timeout = 600
    server: TeacherServer

    def do_GET(self) -> None:
        """Answers a GET."""
        self._serve("GET")

    def do_POST(self) -> None:
        """Answers a POST."""
        self._serve("POST")

    def _serve(self, method: str) -> None:
        with self.server._lock:
            self.server._busy += 1
        try:
            path = self.path.partition("?")[0].rstrip("/")
            try:
                body = self._body() if method == "POST" else None
                self._check_key(path)
                status, found, headers = 200, self.server.answer(method, path, body), {}
            except RefusedError as error:
                kind = "BadRequestError" if error.status == 400 else "Error"
                found = {"error": {"message": str(error), "type": kind, "param": None, "code": error.status}}
                status, headers = error.status, dict(error.headers)
            except Exception as error:  # a defect costs one request
                found = {"error": {"message": f"internal error: {one_line(error)}", "code": 500}}
                status, headers = 500, {}
            self.reply(status, found, headers)
            self.wfile.flush()
        except OSError:  # whoever asked is gone
            self.close_connection = True
        finally:
            with self.server._lock:
                self.server._busy -= 1

    def reply(self, status: int, found: Any, headers: dict[str, str]) -> None:
        """Sends an answer."""
        content = json.dumps(found, allow_nan=False).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.server.answered += status == 200

    def _body(self) -> Any:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > _LONGEST_BODY:
            self.close_connection = True  # what follows is not read
            if length.isdigit():
                raise RefusedError(413, f"a body of {length} bytes; this server takes {_LONGEST_BODY}")
            raise RefusedError(411, "a POST needs a Content-Length")
        content = self.rfile.read(int(length))
        try:
            return json.loads(content)
        except ValueError as error:
            raise RefusedError(400, f"the body is no JSON: {one_line(error)}") from None

    def _check_key(self, path: str) -> None:
        given = self.headers.get("Authorization", "")
        wanted = f"Bearer {self.server.key}"
        if self.server.key and path != "/health" and not hmac.compare_digest(given.encode(), wanted.encode()):
            raise RefusedError(401, "the API key is missing or not the one of this server")

    def log_message(self, *_: object) -> None:
        """Nothing: a line a request helps nobody."""


def serve(
    source: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    dtype: str = "auto",
    name: str = "",
    limits: Limits | None = None,
) -> None:
    """Serves a model until Ctrl-C or SIGTERM, and then answers what it has taken. The key is in `XTOKMAP_TEACHER_KEY`.

    Args:
        source: a directory, a .gguf file, or a hub id.
        host: to listen on.
        port: to listen on; 0: a free one.
        device: as `models.pick_device`.
        dtype: as `models.load`.
        name: of the model; empty: `source`.
        limits: what is taken.

    Raises:
        XTokMapError: a model that cannot be loaded, or a host and port that cannot be listened on.
    """
    from xtokmap.models import load, pick_device

    model, tokenizer = load(source, pick_device(device), dtype)
    key = os.environ.get(KEY_VARIABLE, "")
    server = TeacherServer(model, tokenizer, name=name or source, host=host, port=port, limits=limits, key=key)
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    secured = f"; a key is asked for ({KEY_VARIABLE})" if key else ""
    print(f"serving {server.name} at {server.url} (vLLM, SGLang and OpenAI completions){secured}", flush=True)
    try:
        stop.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        server.close()
        print(f"stopped after {server.answered} answers", flush=True)

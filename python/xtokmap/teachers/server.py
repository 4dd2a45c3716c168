"""`xtokmap serve-teacher`: any transformers causal language model as a teacher behind HTTP.

It scores; it does not chat. It speaks what a teacher is asked of vLLM's completions: the logprobs of the prompt and at
most one new token (the likeliest). And it gives what whole rows are made of, in few bytes: hidden states, and sums over
sets of tokens (`xtokmap.teachers.answers`). Requests that come at the same time share a forward pass. It is for models
that no server takes and for machines without one; where vLLM or SGLang run, they are faster.

HTTP is uvicorn's, and nobody who asks is trusted: every request has a bound on its size, its time and its company, the
key comes before the body, and what nobody waits for any more is not scored (`xtokmap.teachers.scorer`).
"""

from __future__ import annotations

import asyncio
import gc
import hmac
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote_to_bytes

from xtokmap._core import XTokMapError
from xtokmap.models import one_line
from xtokmap.teachers.answers import Answers, Asked, Route
from xtokmap.teachers.client import KEY_VARIABLE
from xtokmap.teachers.scorer import Limits, RefusedError, Scored, Scorer
from xtokmap.waiting import waiting

try:
    import h11
    import uvicorn
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise XTokMapError(f"serve-teacher needs the package {error.name}: pip install 'xtokmap[serve]'") from None

__all__ = ["Limits", "RefusedError", "Scored", "Scorer", "TeacherServer", "serve"]

#: Bytes of a body, unless `Limits.max_body` says otherwise: half a million ids. As JSON of the worst kind, a body of
#: this size costs a tenth of a second and 120 MB.
_LONGEST_BODY = 4 * 2**20

#: Bytes for everything in a body but the ids.
_SETTINGS = 2**16

#: Bodies of the longest kind that are held at a time, from their first byte to their answer.
_BODIES = 16

#: Bytes of a request's headers; more than twice as many are never looked at.
_HEADERS = 2**14

#: Types of answers.
_JSON, _BINARY = "application/json", "application/octet-stream"

#: A surrogate that JSON spells; most are one half of a character.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class _Requests(h11.Connection):
    """HTTP's grammar, less the bodies of unknown length: those come in pieces of a byte, or hide a second request."""

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if {b"transfer-encoding", b"content-length"} <= names:
                raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding in one request")
            if b"transfer-encoding" in names:
                raise h11.RemoteProtocolError("a body needs a Content-Length", error_status_hint=411)
        return event


class _Connection(H11Protocol):
    """A connection with the bounds that uvicorn does not have; one request at a time.

    One deadline holds for headers and body together, another for the reading of an answer, and there is no state
    without a deadline but that of a request which waits for the model.
    """

    limits: Limits
    _deadline: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _waits_since = 0.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn = _Requests(h11.SERVER, _HEADERS)

    @property
    def _asked(self) -> bool:
        """Whether a request has come as a whole and is not answered yet."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the clock, and makes room where there are too many."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # `pause_writing` is called when there is anything left to be read
        self._expect()
        if len(self.connections) > self.limits.max_connections:
            others = [c for c in self.connections if isinstance(c, _Connection) and c is not self and not c._asked]
            if others:
                min(others, key=lambda c: c._waits_since).transport.abort()
            else:
                self.refuse(503, f"{self.limits.max_connections} requests are at work already", {"Retry-After": "1"})

    def _expect(self) -> None:
        self._waits_since = self.loop.time()
        self._deadline = self.loop.call_later(self.limits.max_seconds, self._late)

    def _late(self) -> None:
        self.refuse(408, f"the request took more than {self.limits.max_seconds:g} seconds to arrive")

    def data_received(self, data: bytes) -> None:
        """Takes what has come, in pieces small enough for the bound on headers to hold."""
        if self._deadline is None and not self._asked:
            self._expect()
        for first in range(0, len(data), _HEADERS):
            if self.transport.is_closing():
                return
            if self._asked:
                self._second()
                return
            super().data_received(data[first : first + _HEADERS])
        if self._asked:
            self._stop_clock()
            if self.conn.trailing_data[0]:
                self._second()

    def _second(self) -> None:
        self.refuse(400, "bytes after the request, before its answer; this server takes one request at a time")

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def on_response_complete(self) -> None:
        """Waits for another request; uvicorn closes what stays idle."""
        self._stop_clock()
        self._waits_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Starts the clock of whoever is to read an answer."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.limits.max_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The answer is read."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops every clock."""
        self._stop_clock()
        self.resume_writing()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def send_400_response(self, msg: str) -> None:
        """Says what is wrong with what was no request."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self.refuse(status, f"no request of HTTP: {one_line(error) if error else msg}")

    def refuse(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        """Answers in the place of whoever is about to, if it can be done, and closes."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            content = error_content(status, message)
            own = {"Content-Type": "application/json", "Content-Length": str(len(content)), "Connection": "close"}
            every = [*own.items(), *(headers or {}).items()]
            events = h11.Response(status_code=status, headers=every), h11.Data(data=content), h11.EndOfMessage()
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()


def error_content(status: int, message: str) -> bytes:
    """An error as OpenAI's protocol has it."""
    kind = "BadRequestError" if status == 400 else "Error"
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()


def json_of(content: bytes) -> Any:
    """What a body says.

    Raises:
        RefusedError: it is no JSON, or no Unicode.
    """
    collects = gc.isenabled()
    gc.disable()  # JSON has no cycles, and to look for them costs thirty times what it takes to read a list of lists
    try:
        found = json.loads(content.decode(), parse_constant=_no_constant)
        if _SURROGATE.search(content):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise RefusedError(400, f"the body is no Unicode: it has half a character, \\u{half:x}") from None
    except ValueError as error:
        raise RefusedError(400, f"the body is no JSON: {one_line(error)}") from None
    finally:
        if collects:
            gc.enable()
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} in it")


class TeacherServer:
    """Scores token ids behind HTTP, as vLLM does; see the module.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        name: of the model, in `/v1/models`.
        host: to listen on.
        port: to listen on; 0: a free one (`url` says which).
        limits: what is taken.
        key: asked of every request but `/health`; empty: none.

    Attributes:
        url: where it listens.
        answered: how many requests it has.

    Raises:
        XTokMapError: the host and port cannot be listened on.
    """

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
        self.name, self.key, self.limits, self.answered = name, key, limits or Limits(), 0
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        if not 0 <= port < 2**16:
            raise XTokMapError(f"cannot listen on {host}:{port}: ports are 0 to 65535")
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=256)
        except (OSError, ValueError) as error:  # ValueError: a host that can be none
            raise XTokMapError(f"cannot listen on {host}:{port}: {one_line(error)}") from None
        host, port = self._socket.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.scorer = Scorer(model, self.limits)
        self.answers = Answers(self.scorer, tokenizer, name)
        row = self.scorer.max_length * (len(str(self.scorer.vocab_size)) + len(", "))
        self.max_body = self.limits.max_body or min(self.limits.max_queue * row, _LONGEST_BODY) + _SETTINGS
        self._held = 0  # bytes of bodies
        # Reading and writing JSON and text, which would keep the loop from everybody else.
        self._pool = ThreadPoolExecutor(2, "json")
        self._lock, self._started, self._closed = threading.Lock(), False, False
        self._stopped = threading.Event()

        class Connection(_Connection):
            limits = self.limits

        config = uvicorn.Config(
            self._app, http=Connection, ws="none", loop="asyncio", lifespan="off", interface="asgi3",
            log_config=None, log_level="critical", access_log=False, proxy_headers=False, server_header=False,
            timeout_graceful_shutdown=10,
        )  # fmt: skip
        self._server = uvicorn.Server(config)

    def serve_forever(self) -> None:
        """Answers until `close` is called, by another thread."""
        with self._lock:
            if self._closed:
                return
            self._started = True
        try:
            asyncio.run(self._serve())
        finally:
            self._stopped.set()

    async def _serve(self) -> None:
        await self._server.serve(sockets=[self._socket])
        state = self._server.server_state
        if state.tasks:  # they were told to stop, and say so to those who wait
            await asyncio.wait(state.tasks, timeout=1)
        for connection in list(state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)

    def close(self, patience: float = 10.0) -> None:
        """Answers what it has taken, for `patience` seconds at most, and stops. To be called by another thread."""
        with self._lock:
            self._closed = True
        self._server.config.timeout_graceful_shutdown = patience  # type: ignore[assignment]  # any number will do
        self._server.should_exit = True
        if self._started:
            self._stopped.wait()
        self._socket.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.scorer.close(patience)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a request; uvicorn calls it as soon as the headers are there."""
        request, body, status, kind = Request(scope, receive), bytearray(), 200, _JSON
        # What is refused by its headers is not read.
        headers = {"Connection": "close"} if request.headers.get("content-length", "0") != "0" else {}
        try:
            route = self._admit(request)
            await self._read(request, body)
            headers = {}
            content, kind = await self._answer(route, bytes(body), receive)
        except ClientDisconnect:
            return
        except RefusedError as error:
            status, content = error.status, error_content(error.status, str(error))
            headers |= error.headers
        except asyncio.CancelledError:  # the server's patience is at its end
            status, content = 503, error_content(503, "this server is about to stop")
        except Exception as error:  # a defect costs one request
            status, content = 500, error_content(500, f"internal error: {one_line(error)}")
        finally:
            self._held -= len(body)
        await Response(content, status, headers, kind)(scope, receive, send)
        self.answered += status == 200

    def _admit(self, request: Request) -> Route:
        """How the body is to be understood, as far as the headers allow one.

        Raises:
            RefusedError: they do not.
        """
        try:
            path = unquote_to_bytes(request.scope["raw_path"]).decode().rstrip("/")
        except UnicodeDecodeError:
            raise RefusedError(400, "the path is no UTF-8") from None
        given = next((value for name, value in request.scope["headers"] if name == b"authorization"), b"")
        wanted = f"Bearer {self.key}".encode()
        if self.key and path != "/health" and not hmac.compare_digest(given, wanted):
            raise RefusedError(401, "the API key is missing or not the one of this server")
        route = self.answers.route(request.method, path)
        length = request.headers.get("content-length")
        if length is None and request.method == "POST":
            raise RefusedError(411, "a POST needs a Content-Length")
        if int(length or 0) > self.max_body:
            raise RefusedError(413, f"a body of {length} bytes; this server takes {self.max_body}")
        return route

    async def _read(self, request: Request, body: bytearray) -> None:
        async for piece in request.stream():
            body += piece
            self._held += len(piece)
            if self._held > _BODIES * self.max_body:
                raise RefusedError(503, "too many long requests at a time", {"Retry-After": "1"})

    async def _answer(self, route: Route, body: bytes, receive: Any) -> tuple[bytes, str]:
        """What answers a request and its type, unless whoever asked goes away before the model has answered.

        Raises:
            ClientDisconnect: nobody waits any more; none of the rows is scored that was not at it already.
            RefusedError: a request that cannot be answered.
        """
        if not body:
            asked = route.understand(b"" if route.binary else None)
            return _content(asked, [])
        loop = asyncio.get_running_loop()
        gone = loop.create_task(_gone(receive))
        try:
            asked = await loop.run_in_executor(self._pool, _understood, route, body)
            if gone.done():
                raise ClientDisconnect
            rows = self.scorer.submit(asked.rows, asked.read)
            found = loop.create_task(_all(rows))
            first: set[asyncio.Task[Any]] = {found, gone}
            try:
                await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
                if not found.done():
                    raise ClientDisconnect
                return await loop.run_in_executor(self._pool, _content, asked, found.result())
            finally:
                found.cancel()
                self.scorer.drop(rows)
        finally:
            gone.cancel()


async def _all(rows: Sequence[Future[Any]]) -> list[Any]:
    return [await asyncio.wrap_future(row) for row in rows]


async def _gone(receive: Any) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _understood(route: Route, body: bytes) -> Asked:
    try:
        return route.understand(body if route.binary else json_of(body))
    except RecursionError:
        raise RefusedError(400, "the body is nested too deeply") from None


def _content(asked: Asked, found: Sequence[Any]) -> tuple[bytes, str]:
    content = asked.answer(found)
    if isinstance(content, bytes):
        return content, _BINARY
    return json.dumps(content, allow_nan=False).encode(), _JSON


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

    with waiting(f"loading {source}"):
        model, tokenizer = load(source, pick_device(device), dtype)
    key = os.environ.get(KEY_VARIABLE, "")
    server = TeacherServer(model, tokenizer, name=name or source, host=host, port=port, limits=limits, key=key)
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}

    def run() -> None:
        try:
            server.serve_forever()
        finally:
            stop.set()  # whatever ends it ends the command

    threading.Thread(target=run, daemon=True).start()
    secured = f"; a key is asked for ({KEY_VARIABLE})" if key else ""
    print(f"serving {server.name} at {server.url} (vLLM's completions, hidden states, sums){secured}", flush=True)
    try:
        stop.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        server.close()
        print(f"stopped after {server.answered} answers", flush=True)

"""HTTP/1.1 requests, each bounded as a whole: the seconds that it takes and the bytes that come back.

Clients of HTTP limit every read and not their sum: headers that trickle and `100 Continue` for ever keep them waiting,
and a compressed body grows behind the count. Here every byte comes through one `recv`, which knows the request's
deadline and what it may still read; what the bytes mean is h11's to say, which has no sockets. Nothing is followed,
decompressed or asked again.
"""

from __future__ import annotations

import base64
import os
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import certifi
import h11

from xtokmap._core import XTokMapError

#: Bytes of the head of an answer, and of an error's body that are read.
_HEAD, _ERROR = 64 * 2**10, 64 * 2**10

_JSON = "application/json"

#: Answers of status 1xx before the one that counts.
_INFORMATIONAL = 100


class ExchangeError(Exception):
    """The connection failed, or what came over it is no HTTP."""


class UnreachedError(ExchangeError):
    """Nobody took the connection: there is no server, or not yet, or no way to it."""


class LateError(ExchangeError):
    """No whole answer within the seconds of the request."""


class UnfitError(ExchangeError):
    """A whole answer is not to be had: it is longer than it may be, or encoded though nobody asked for that."""


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        status: 200 to 599.
        headers: by lower-case name; of several with one name, the first.
        content: the body; of other statuses than 200, as much as could be had of its beginning.
    """

    status: int
    headers: Mapping[str, str]
    content: bytes


def certificates() -> ssl.SSLContext:
    """Whom to trust: the system, and certifi's list; or SSL_CERT_FILE and SSL_CERT_DIR alone, where they are set."""
    context = ssl.create_default_context()
    if not os.environ.get("SSL_CERT_FILE") and not os.environ.get("SSL_CERT_DIR"):
        context.load_verify_locations(certifi.where())
    context.set_alpn_protocols(["http/1.1"])
    return context


class Connections:
    """Connections to one server, for any number of threads; each is used again for as long as it is sound.

    Proxies of the environment are used (`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY`).

    Args:
        url: `http://` or `https://`, a host, and what all paths begin with.
        headers: of every request.
        context: of https.

    Raises:
        XTokMapError: a proxy that does not speak HTTP.
    """

    def __init__(self, url: str, headers: Mapping[str, str], context: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(url)
        host = parts.hostname or ""
        self._host = host if host.isascii() else host.encode("idna").decode()
        self._tls = (context or certificates()) if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        name = f"[{self._host}]" if ":" in self._host else self._host
        self._authority = f"{name}:{self._port}"
        self._prefix = quote(parts.path, safe="/%:@!$&'()*+,;=~")
        self._headers = {
            "Host": name if parts.port is None else self._authority,
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            **headers,
        }
        self._proxy, self._proxy_headers = _proxy(parts.scheme, self._host)
        self._lock = threading.Lock()
        self._idle: list[_Wire] = []
        self._sockets: set[socket.socket] = set()
        self._closed = False

    def __enter__(self) -> Connections:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every connection; threads that wait for an answer have an `ExchangeError` at once."""
        with self._lock:
            self._closed = True
            for wire in self._idle:
                wire.close()
            self._idle.clear()
            for sock in self._sockets:
                _shut(sock)  # whoever uses it closes it

    def ask(
        self, method: str, path: str, body: bytes | None = None, *, seconds: float, most: int, kind: str = _JSON
    ) -> Answer:
        """One request and its answer.

        Args:
            method: `GET` or `POST`.
            path: behind the URL.
            body: of that kind, or None.
            seconds: for all of it. Names are looked up in the time that the system takes for that.
            most: bytes that may come back, all together.
            kind: the type of the body.

        Raises:
            LateError: it took longer.
            UnreachedError: it could not be connected to.
            UnfitError: more came, or something encoded.
            ExchangeError: anything else without an answer.
        """
        deadline = time.monotonic() + seconds
        headers = {**self._headers, **(self._proxy_headers if not self._tls else {})}
        if body is not None:
            headers |= {"Content-Type": kind, "Content-Length": str(len(body))}
        target = self._prefix + path
        if self._proxy and not self._tls:
            target = f"http://{self._authority}{target}"
        try:
            request = h11.Request(method=method, target=target, headers=list(headers.items()))
            wire = self._ready() or self._opened(deadline)
        except (OSError, UnicodeError, h11.ProtocolError) as error:
            failure = _failure(error, seconds)
            # Certificates that do not fit, and names that are none, are not waited for.
            waits = isinstance(error, OSError) and not isinstance(error, (TimeoutError, ssl.SSLError))
            raise (UnreachedError(str(failure)) if waits else failure) from None
        wire.deadline, wire.room = deadline, most
        kept = False
        try:
            answer = wire.exchange(request, body or b"")
            kept = wire.sound()
            return answer
        except (OSError, h11.ProtocolError) as error:
            raise _failure(error, seconds) from None
        finally:
            with self._lock:
                if kept and not self._closed:
                    self._idle.append(wire)
                else:
                    self._sockets.discard(wire.sock)
                    wire.close()

    def _ready(self) -> _Wire | None:
        """A connection that is open and has nothing to say: bytes that nobody asked for are no answer."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                wire = self._idle.pop()
            if wire.quiet():
                return wire
            with self._lock:
                self._sockets.discard(wire.sock)
            wire.close()

    def _opened(self, deadline: float) -> _Wire:
        host, port = self._proxy or (self._host, self._port)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        error: OSError = OSError(f"{host} has no address")
        for number, (family, kind, protocol, _, address) in enumerate(found):
            sock = socket.socket(family, kind, protocol)
            try:
                self._keep(sock)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.settimeout(_left(deadline) / (len(found) - number))  # an address that is silent is not the last
                sock.connect(address)
                break
            except OSError as problem:
                error = problem
                self._drop(sock)
        else:
            raise error
        try:
            if self._tls is None:
                return _Wire(sock)
            if self._proxy:
                wire = _Wire(sock)
                wire.deadline, wire.room = deadline, _HEAD
                headers = {"Host": self._authority, **self._proxy_headers}
                wire.tunnel(h11.Request(method="CONNECT", target=self._authority, headers=list(headers.items())))
            sock.settimeout(_left(deadline))
            plain, sock = sock, self._tls.wrap_socket(sock, server_hostname=self._host)
            with self._lock:
                self._sockets.discard(plain)
            self._keep(sock)
            return _Wire(sock)
        except BaseException:
            self._drop(sock)
            raise

    def _keep(self, sock: socket.socket) -> None:
        with self._lock:
            if self._closed:
                raise OSError("given up")
            self._sockets.add(sock)

    def _drop(self, sock: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(sock)
        sock.close()


class _Wire:
    """A connection: its socket, and what of their bounds the request at hand has left."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.deadline, self.room = 0.0, 0
        self._state = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD)

    def close(self) -> None:
        self.sock.close()

    def quiet(self) -> bool:
        """Whether it is open and nothing has come; asked of the socket below TLS, which has no peeking."""
        try:
            self.sock.settimeout(0)
            socket.socket.recv(self.sock, 1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def sound(self) -> bool:
        """Whether another request can follow; then the connection is ready for it."""
        state = self._state
        if state.our_state is not h11.DONE or state.their_state is not h11.DONE or state.trailing_data[0]:
            return False
        state.start_next_cycle()
        return True

    def exchange(self, request: h11.Request, body: bytes) -> Answer:
        data = self._state.send(request) or b""
        data += self._state.send(h11.Data(data=body)) or b""
        data += self._state.send(h11.EndOfMessage()) or b""
        unsent = self._send(data)
        try:
            head = self._head()
        except OSError as error:  # a server may answer before it has read everything; this one has not
            raise unsent or error from None
        headers: dict[str, str] = {}
        for name, value in head.headers:
            headers.setdefault(name.decode("ascii"), value.decode("latin-1"))
        if head.status_code != 200:
            return Answer(head.status_code, headers, self._beginning())
        if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise UnfitError("it is compressed, which was not asked for")
        content = bytearray()
        while (event := self._event()) is not None:
            content += event
        return Answer(200, headers, bytes(content))

    def tunnel(self, request: h11.Request) -> None:
        """Asks a proxy for a connection."""
        unsent = self._send((self._state.send(request) or b"") + (self._state.send(h11.EndOfMessage()) or b""))
        if unsent is not None:
            raise unsent
        status = self._head().status_code
        if not 200 <= status < 300:
            raise ExchangeError(f"the proxy refused with status {status}")
        if self._state.trailing_data[0]:
            raise ExchangeError("the proxy spoke before the server")

    def _send(self, data: bytes) -> OSError | None:
        """Sends; returns the error of a server that stopped reading, which may have answered."""
        rest = memoryview(data)
        try:
            while rest:
                self.sock.settimeout(_left(self.deadline))
                rest = rest[self.sock.send(rest[: 2**18]) :]
        except TimeoutError:
            raise
        except OSError as error:
            return error
        return None

    def _head(self) -> h11.Response:
        for _ in range(_INFORMATIONAL):
            event = self._next()
            if isinstance(event, h11.Response):
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise ExchangeError("it ended without an answer")
        raise UnfitError(f"{_INFORMATIONAL} times the server has said that it will answer")

    def _event(self) -> bytes | None:
        """The next part of the body; None at its end."""
        event = self._next()
        return bytes(event.data) if isinstance(event, h11.Data) else None

    def _beginning(self) -> bytes:
        """Of an error's body; the status has said what matters, whatever becomes of it."""
        content = bytearray()
        try:
            while len(content) < _ERROR and (part := self._event()) is not None:
                content += part
        except (OSError, h11.ProtocolError, ExchangeError):
            pass
        return bytes(content[:_ERROR])

    def _next(self) -> object:
        while (event := self._state.next_event()) is h11.NEED_DATA:
            if self.room <= 0:
                raise UnfitError("it is longer than any answer to this can be")
            self.sock.settimeout(_left(self.deadline))
            data = self.sock.recv(min(self.room, 2**16))
            if not data and self._state.their_state is h11.SEND_RESPONSE:
                raise ExchangeError("closed without an answer")
            self.room -= len(data)
            self._state.receive_data(data)
        return event


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _failure(error: Exception, seconds: float) -> ExchangeError:
    if isinstance(error, TimeoutError):
        return LateError(f"no whole answer within {seconds:g} s")
    return ExchangeError(str(error) or type(error).__name__)


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not TLS's own, which takes its state away from the reader


def _proxy(scheme: str, host: str) -> tuple[tuple[str, int] | None, dict[str, str]]:
    """Where the environment wants such requests to go, and what to say there."""
    proxies = getproxies()
    url = proxies.get(scheme) or proxies.get("all")
    if not url or proxy_bypass(host):
        return None, {}
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        name, port = parts.hostname, parts.port or 80
    except ValueError:
        parts, name, port = urlsplit(""), None, 0
    if parts.scheme != "http" or not name:
        raise XTokMapError(
            f"the proxy that the environment names for {scheme} is not http://host:port; set NO_PROXY={host} to go "
            "without one"
        )
    if parts.username is None:
        return (name, port), {}
    secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return (name, port), {"Proxy-Authorization": "Basic " + base64.b64encode(secret.encode()).decode()}

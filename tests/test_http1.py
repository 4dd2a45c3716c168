"""Requests are bounded as a whole, in seconds and in bytes, whatever comes back and however."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

import faults
import xtokmap
from xtokmap.teachers.http1 import Answer, Connections, ExchangeError, LateError, UnfitError, certificates

PEM = Path(__file__).parent / "server.pem"
#: Seconds: far more than a busy machine needs for a request on itself, and what is tried with silence.
LONG, SHORT = 30.0, 0.3


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="module")
def server_side():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM)
    return context


def trusting():
    context = certificates()
    context.load_verify_locations(PEM)
    return context


def saying(*parts):
    """Sends these and hangs up."""

    def speak(sock, head):
        for part in parts:
            sock.sendall(part)

    return speak


def asked(url, *, seconds=LONG, most=10_000, **options):
    with Connections(url, {"X-Own": "mine"}, **options) as connections:
        return connections.ask("POST", "/there", b'{"a": 1}', seconds=seconds, most=most)


def test_a_request_is_what_it_should_be_and_its_connection_is_used_again():
    heads, ports = [], []

    def speak(sock, head):
        heads.append(head)
        ports.append(sock.getpeername()[1])
        sock.sendall(faults.plain(b"yes", b"X-Thing: one", b"X-Thing: two"))
        return True

    with faults.talking(speak) as url, Connections(url + "/at a/", {"X-Own": "mine"}) as connections:
        answers = [connections.ask("POST", "/there", b"{}", seconds=LONG, most=1000) for _ in range(3)]
        answers.append(connections.ask("GET", "/there", seconds=LONG, most=1000))
    assert answers == [Answer(200, {"x-thing": "one", "content-length": "3"}, b"yes")] * 4
    assert len(set(ports)) == 1
    assert heads[0].startswith(b"POST /at%20a//there HTTP/1.1\r\n")
    assert heads[0].endswith(b"\r\n\r\n{}")
    host = url.removeprefix("http://").encode()
    for line in (b"Host: " + host, b"X-Own: mine", b"Accept-Encoding: identity", b"Content-Length: 2"):
        assert b"\r\n" + line + b"\r\n" in heads[0]
    assert heads[3].startswith(b"GET /at%20a//there HTTP/1.1\r\n")
    assert b"Content-Length" not in heads[3]


@pytest.mark.parametrize(
    "parts",
    [
        [b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nX: y\r\n\r\n", faults.plain(b"yes")],
        [faults.OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nye\r\n1;x=y\r\ns\r\n0\r\nX: y\r\n\r\n"],
        [bytes([byte]) for byte in faults.plain(b"yes")],
        [b"HTTP/1.0 200 OK\r\n\r\nyes"],
        [faults.plain(b"yes", b"Content-Encoding: identity")],
    ],
)
def test_what_http_may_look_like(parts):
    with faults.talking(saying(*parts)) as url:
        assert asked(url).content == b"yes"


def test_a_connection_with_an_answer_that_nobody_asked_for_is_not_used_again():
    ports = []

    def speak(sock, head):
        ports.append(sock.getpeername()[1])
        sock.sendall(faults.plain(b"one") + faults.plain(b"another's") * (len(ports) == 1))
        if len(ports) == 2:  # on its own, later
            sock.sendall(faults.plain(b"another's"))
            came.set()
        return True

    came = threading.Event()
    with faults.talking(speak) as url, Connections(url, {}) as connections:
        for _ in range(2):
            assert connections.ask("GET", "/", seconds=LONG, most=1000).content == b"one"
        assert came.wait(LONG)
        until = time.monotonic() + LONG
        while connections._idle and connections._idle[0].quiet() and time.monotonic() < until:
            time.sleep(0.01)
        assert connections.ask("GET", "/", seconds=LONG, most=1000).content == b"one"
    assert len(set(ports)) == 3


@pytest.mark.parametrize("name", [name for name in faults.LIES if "endless" in name or "long" in name])
@pytest.mark.parametrize("encrypted", [False, True])
def test_bytes_without_an_end_are_ended_by_their_number(name, encrypted, server_side):
    sent = 0

    def speak(sock, head):
        nonlocal sent
        for part in faults.LIES[name]({}):
            sock.sendall(part)
            sent += len(part)

    context = trusting() if encrypted else None
    with faults.talking(speak, server_side if encrypted else None) as url:
        if name == "an endless error":  # the status is enough
            assert asked(url, context=context, most=200_000).status == 500
        else:
            with pytest.raises(ExchangeError) as caught:
                asked(url, context=context, most=200_000)
            assert not isinstance(caught.value, LateError)
    assert sent < 2**25  # what the buffers of the two sockets may take besides


@pytest.mark.parametrize("most", [10, 60, 99])
def test_the_head_and_the_framing_count(most):
    answer = faults.plain(b"x" * 61)
    assert len(answer) == 100
    with faults.talking(saying(answer)) as url:
        assert asked(url, most=100).content == b"x" * 61
        with pytest.raises(UnfitError, match="longer than any answer to this can be"):
            asked(url, most=most)


@pytest.mark.parametrize("name", [name for name in faults.SLOW if name in faults.LIES])
def test_what_trickles_is_ended_by_its_time(name):
    def speak(sock, head):
        for part in faults.LIES[name]({}):
            sock.sendall(part)

    with faults.talking(speak) as url, pytest.raises(LateError, match=r"no whole answer within 0\.3 s"):
        asked(url, seconds=SHORT)


def test_silence_is_ended_by_its_time(server_side):
    done = threading.Event()

    def silent(sock, head):
        done.wait(LONG)

    with faults.talking(silent) as url:
        with pytest.raises(LateError):
            asked(url, seconds=SHORT)
        with pytest.raises(LateError):  # of a server that does not shake hands
            asked(url.replace("http:", "https:"), seconds=SHORT, context=trusting())
        done.set()


def test_a_server_that_does_not_read_is_ended_by_its_time():
    done = threading.Event()

    def deaf(sock, head):
        done.wait(LONG)

    with faults.talking(deaf) as url, Connections(url, {}) as connections:
        with pytest.raises(LateError):
            connections.ask("POST", "/", b" " * 2**25, seconds=SHORT, most=1000)
        done.set()


def test_an_answer_before_the_end_of_the_request_is_taken():
    def early(sock, head):
        sock.sendall(faults.plain(b"too long", b"Connection: close", status="413 No"))
        sock.shutdown(socket.SHUT_WR)
        with suppress(OSError):
            while sock.recv(2**20):
                pass

    with faults.talking(early) as url, Connections(url, {}) as connections:
        answer = connections.ask("POST", "/", b" " * 2**24, seconds=LONG, most=1000)
    assert (answer.status, answer.content) == (413, b"too long")


@pytest.mark.parametrize(
    ("parts", "kind", "message"),
    [
        ([b""], ExchangeError, "without"),
        ([b"\x16\x03\x01\x02\x00"], ExchangeError, "illegal"),
        ([faults.OK + b"Content-Length: -5\r\n\r\nyes"], ExchangeError, "bad Content-Length"),
        ([faults.OK + "Content-Length: ²\r\n\r\nyes".encode()], ExchangeError, "bad Content-Length"),
        ([faults.OK + b"Content-Length: 9\r\n\r\nyes"], ExchangeError, "without sending complete message body"),
        ([faults.OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\nyes"], ExchangeError, "illegal chunk header"),
        ([b"HTTP/1.1 101 Yes\r\n\r\n"], ExchangeError, "SWITCH"),
        ([faults.plain(b"yes", b"Content-Encoding: gzip")], UnfitError, "compressed"),
        ([faults.plain(b"yes", b"Content-Encoding: identity, br")], UnfitError, "compressed"),
    ],
)
def test_what_is_no_answer_is_an_error_of_ours(parts, kind, message):
    with faults.talking(saying(*parts)) as url, pytest.raises(kind, match=message):
        asked(url)


def test_an_errors_status_counts_whatever_becomes_of_its_body():
    for body in (b"Content-Length: 99\r\n\r\nwhy", b"Transfer-Encoding: chunked\r\n\r\n3\r\nwhy\r\nzz"):
        with faults.talking(saying(b"HTTP/1.1 503 No\r\nRetry-After: 7\r\n" + body)) as url:
            answer = asked(url)
        assert (answer.status, answer.headers["retry-after"], answer.content) == (503, "7", b"why")


def test_closing_ends_what_waits():
    done, waiting = threading.Event(), threading.Event()
    failures = []

    def silent(sock, head):
        waiting.set()
        done.wait(LONG)

    with faults.talking(silent) as url:
        connections = Connections(url, {})

        def wait():
            try:
                connections.ask("GET", "/", seconds=10 * LONG, most=1000)
            except ExchangeError as error:
                failures.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        assert waiting.wait(LONG)
        connections.close()
        thread.join(LONG)
        assert not thread.is_alive()
        with pytest.raises(ExchangeError, match="given up"):
            connections.ask("GET", "/", seconds=LONG, most=1000)
        done.set()
    assert len(failures) == 1
    assert not connections._sockets


def test_tls_is_checked(server_side, monkeypatch):
    with faults.talking(saying(faults.plain(b"yes")), server_side) as url:
        assert asked(url, context=trusting()).content == b"yes"
        with pytest.raises(ExchangeError, match="CERTIFICATE_VERIFY_FAILED"):
            asked(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(PEM))
        assert asked(url).content == b"yes"


def test_nobody_there():
    with pytest.raises(ExchangeError, match="refused"):
        asked("http://127.0.0.1:9")
    with pytest.raises(ExchangeError):
        asked("http://no-such-host.invalid")


def test_the_environments_proxy_is_used(monkeypatch, server_side):
    heads = []

    def proxy(sock, head):
        heads.append(head)
        sock.sendall(faults.plain(b"from the proxy"))

    with faults.talking(proxy) as url:
        monkeypatch.setenv("HTTP_PROXY", url.replace("//", "//me:p%40ss@"))
        monkeypatch.setenv("http_proxy", url.replace("//", "//me:p%40ss@"))
        assert asked("http://far.invalid:8000/v").content == b"from the proxy"
        monkeypatch.setenv("no_proxy", "far.invalid")
        with pytest.raises(ExchangeError):
            asked("http://far.invalid:8000/v")
    assert heads[0].startswith(b"POST http://far.invalid:8000/v/there HTTP/1.1\r\nHost: far.invalid:8000\r\n")
    assert b"\r\nProxy-Authorization: Basic bWU6cEBzcw==\r\n" in heads[0]


def test_a_proxy_that_cannot_be_is_named(monkeypatch):
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:9")
    with pytest.raises(xtokmap.XTokMapError, match=r"is not http://host:port; set NO_PROXY=far\.invalid"):
        Connections("https://far.invalid", {}, trusting())


@pytest.mark.parametrize("status", ["200 OK", "403 No"])
def test_https_goes_through_a_proxy_as_it_is(monkeypatch, server_side, status):
    heads = []

    def proxy(sock, head):
        heads.append(head)
        sock.sendall(f"HTTP/1.1 {status}\r\n\r\n".encode())
        if status == "200 OK":
            with server_side.wrap_socket(sock, server_side=True) as inner:
                heads.append(inner.recv(65536))
                inner.sendall(faults.plain(b"from behind"))

    with faults.talking(proxy) as url:
        monkeypatch.setenv("https_proxy", url)
        if status == "200 OK":
            assert asked("https://localhost:9", context=trusting()).content == b"from behind"
            assert heads[1].startswith(b"POST /there HTTP/1.1\r\nHost: localhost:9\r\n")
        else:
            with pytest.raises(ExchangeError, match="the proxy refused with status 403"):
                asked("https://localhost:9", context=trusting())
    assert heads[0].startswith(b"CONNECT localhost:9 HTTP/1.1\r\nHost: localhost:9\r\n")
    assert b"X-Own" not in heads[0]

"""A teacher's server that does what real ones do when something is wrong, on a plan."""

from __future__ import annotations

import copy
import gzip
import json
import random
import re
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress

from fake_server import Handler, TeacherServer


def plain(body, *headers, status="200 OK"):
    """An answer's bytes."""
    return b"\r\n".join([f"HTTP/1.1 {status}".encode(), *headers, b"Content-Length: %d" % len(body), b"", body])


def last(body, *headers, **options):
    """An answer behind which the connection is closed, as it is behind every lie."""
    return plain(body, b"Connection: close", *headers, **options)


def first_number(new):
    """A sound answer whose first logprob is something else."""

    def lie(found):
        text, count = re.subn(r"-[0-9]+[.][0-9e-]+", lambda _: new, json.dumps(found), count=1)
        assert count
        yield last(text.encode())

    return lie


def changed(change):
    """A sound answer whose rows are changed one by one; `change(row)` returns the new one."""

    def lie(found):
        found = copy.deepcopy(found)
        place, name = rows_at(found)
        place[name] = [row if row is None else change(row) for row in place[name]]
        yield last(json.dumps(found).encode())

    return lie


def rows_at(found):
    """Where an answer of any protocol has its rows: the object and the name in it."""
    if "meta_info" in found:
        tops = "input_top_logprobs" in found["meta_info"]
        return found["meta_info"], "input_top_logprobs" if tops else "input_token_logprobs"
    choice = found["choices"][0]
    return (choice, "prompt_logprobs") if choice.get("prompt_logprobs") else (choice["logprobs"], "top_logprobs")


def another_id(token):
    """A row with one token more, or with an id of SGLang's replaced."""
    named = "token_id:" + token

    def change(row):
        if isinstance(row, dict):
            of_texts = any(key.startswith("token_id:") for key in row)
            return {**row, (named if of_texts else token): -9.0 if of_texts else {"logprob": -9.0}}
        if row and isinstance(row[0], list):
            return [*row, [-9.0, token, None]]
        return [row[0], token, *row[2:]]

    return changed(change)


def endless(head, part, pause=0.0):
    """Goes on until nobody listens; pauses where it should not be the bytes that end it."""

    def lie(found):
        yield head
        for _ in range(10**6):
            yield part
            time.sleep(pause)

    return lie


def wide(row):
    if isinstance(row, dict):
        names = any(key.startswith("token_id:") for key in row)
        more = {f"token_id:{k}" if names else str(k): -99.0 if names else {"logprob": -99.0} for k in range(300)}
        return {**more, **row}
    return row if not row or not isinstance(row[0], list) else [*row, *([-99.0, 10**6 + k, None] for k in range(300))]


#: What a terminal would obey, in the middle of what it shows.
UGLY = "\x1b[2J\x1b]0;owned\x07 \u202eright\u2066 to\r\nleft [/red] \x9b31m"

BOMB = gzip.compress(b" " * 2**28, compresslevel=9)

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"

#: Answers that no server gives that is merely broken. Each has `lie(found)`: the bytes for a sound answer, in parts.
LIES = {
    "nested": lambda found: [last(b"[" * 100_000)],
    "nested objects": lambda found: [last(b'{"choices":' * 50_000)],
    "not UTF-8": lambda found: [last(json.dumps(found).encode().replace(b'"', b'"\xff', 1))],
    "UTF-16": lambda found: [last(json.dumps(found).encode("utf-16"))],
    "a list": lambda found: [last(json.dumps([found]).encode())],
    "null": lambda found: [last(b"null")],
    "only lists": lambda found: [last(b"[" + b"[]," * 50_000 + b"[]]")],
    "400 digits": first_number("1" * 400),
    "5,000 digits": first_number("1" * 5000),
    "Infinity": first_number("Infinity"),
    "1e999": first_number("1e999"),
    "a text for a number": first_number('"-1.5"'),
    "true for a number": first_number("true"),
    "null rows": changed(lambda row: None),
    "numbers for rows": changed(lambda row: 7),
    "a name twice": lambda found: [last(json.dumps(found).encode().replace(b"{", b'{"id": 1, "id": 1, ', 1))],
    "half a surrogate pair": lambda found: [last(json.dumps({"said": "\ud83d", **found}).encode())],
    "an id beyond the vocabulary": another_id("1234567"),
    "an id of many digits": another_id("1" * 5000),
    "an id with a space": another_id(" 6"),
    "an id with a zero": another_id("06"),
    "an id with a sign": another_id("+6"),
    "an id in other digits": another_id("٦"),
    "a huge row": changed(wide),
    "gzip": lambda found: [last(gzip.compress(json.dumps(found).encode()), b"Content-Encoding: gzip")],
    "a gzip bomb": lambda found: [last(BOMB, b"Content-Encoding: gzip")],
    "no HTTP": lambda found: [b"\x16\x03\x01\x02\x00" * 100],
    "a long status line": lambda found: [b"HTTP/1.1 200 " + b"O" * 2**20],
    "a long header": endless(OK + b"X: ", b"x" * 2**16),
    "endless headers": endless(OK, b"X-Y: z\r\n" * 1000),
    "endless 100": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "an endless body": endless(OK + CHUNKED, b"10000\r\n" + b" " * 2**16 + b"\r\n"),
    "a body of crumbs": endless(OK + CHUNKED, b"1\r\n \r\n" * 1000),
    "a body without an end": endless(OK + b"\r\n", b" " * 2**16),
    "an endless error": endless(b"HTTP/1.1 500 No\r\n\r\n", b"x" * 2**16),
    "a negative length": lambda found: [OK + b"Content-Length: -5\r\n\r\n" + json.dumps(found).encode()],
    "two lengths": lambda found: [OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + json.dumps(found).encode()],
    "a length of 10**30": lambda found: [OK + b"Content-Length: 1" + b"0" * 30 + b"\r\n\r\n{}"],
    "a status of 0": lambda found: [last(b"{}", status="000 No")],
    "switching protocols": lambda found: [last(b"", status="101 Yes")],
    "429 now": lambda found: [last(b"{}", b"Retry-After: 0", status="429 No")],
    "429 in the past": lambda found: [last(b"{}", b"Retry-After: -1e308", status="429 No")],
    "503 with nested words": lambda found: [last(b'{"error":' + b"[" * 50_000, status="503 No")],
    "503 with control characters": lambda found: [last(UGLY.encode(), status="503 No")],
    "trickling headers": endless(OK, b"X: y\r\n", 0.05),
    "trickling 100": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.05),
    "a trickling body": endless(OK + CHUNKED, b"1\r\n \r\n", 0.05),
}

#: Of these, and of `FAULTS`, those that a time-out ends.
SLOW = ("slow", "trickling headers", "trickling 100", "a trickling body")

#: What can go wrong with one answer; `limits` and `errors` before it is made, the others with the answer itself.
FAULTS = (
    "429",
    "429 in 0.05 s",
    "500",
    "503",
    "no answer",
    "cut body",
    "slow",
    "broken JSON",
    "NaN",
    "positive",
    "one row short",
    "shifted",
    "other ids",
    "sum above 1",
)


class Plan:
    """Which fault the next scoring request gets: first those of a list, then some by chance.

    `log` has one entry for each fault: its name and the ids of the request.
    """

    def __init__(self, faults=(), rate=0.0, names=FAULTS, seed=0, slow=0.6):
        self.faults, self.rate, self.names, self.slow = list(faults), rate, names, slow
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.log: list[str] = []
        self.answered: Counter[tuple[int, ...]] = Counter()
        self.seen_keys: set[str | None] = set()
        #: Bytes that answer the next requests for the list of models.
        self.lists: list[bytes] = []

    def next(self):
        with self.lock:
            if self.faults:
                fault = self.faults.pop(0)
            else:
                fault = self.random.choice(self.names) if self.random.random() < self.rate else None
            if fault:
                self.log.append(fault)
            return fault


class FaultyServer(TeacherServer):
    plan: Plan

    def handler(self):
        return FaultyHandler


class FaultyHandler(Handler):
    server: FaultyServer

    def reply(self, status, found, headers):
        plan = self.server.plan
        if self.command == "GET" and plan.lists:
            self.close_connection = True
            self.wfile.write(plan.lists.pop(0))
            return
        if self.command != "POST" or status != 200:
            super().reply(status, found, headers)
            return
        fault = plan.next()
        plan.seen_keys.add(self.headers.get("Authorization"))
        if fault in ("429", "500", "503"):
            said = f"{fault} of {self.headers.get('Authorization')}"
            super().reply(int(fault), {"error": {"message": said}}, {})
        elif fault == "429 in 0.05 s":
            super().reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.05"})
        elif fault == "no answer":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault in LIES:
            self.close_connection = True
            for part in LIES[fault]({} if isinstance(found, bytes) else found):
                self.wfile.write(part)
                self.wfile.flush()
        elif fault in ("cut body", "broken JSON"):
            content = json.dumps(found).encode()
            self.send_response(200)
            length = len(content) if fault == "cut body" else len(content) // 2
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if fault == "cut body":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
        else:
            if fault == "slow":
                time.sleep(plan.slow)
            elif fault is not None:
                found = damaged(found, fault)
            content = found if isinstance(found, bytes) else json.dumps(found).encode()  # NaN may be in it
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with self.server._lock:
                self.server.answered += 1
            self.wfile.write(content)


def damaged(found, fault):
    """An answer of any of the protocols with something wrong in its rows."""
    found = copy.deepcopy(found)
    if "meta_info" in found:
        if fault == "other ids":  # not a neighbor's row, which may be of the same token
            rows = found["meta_info"]["input_token_logprobs"]
            rows[len(rows) // 2][1] += 1
            return found
        for name in ("input_token_logprobs", "input_top_logprobs"):
            if name in found["meta_info"]:
                found["meta_info"][name] = rows_of(found["meta_info"][name], fault, lambda row: row)
        if fault == "sum above 1":
            found["meta_info"]["input_token_logprobs"][-1][0] = 1.0
        return found
    choice = found["choices"][0]
    if choice.get("prompt_logprobs") is not None:
        if fault == "other ids":
            choice["prompt_token_ids"] = [i + 1 for i in choice["prompt_token_ids"]]
        else:
            choice["prompt_logprobs"] = rows_of(choice["prompt_logprobs"], fault, list)
        return found
    given = choice["logprobs"]
    if fault in ("other ids", "sum above 1"):
        given["tokens"] = [*given["tokens"][1:], given["tokens"][0]]
        return found
    for name in ("tokens", "token_logprobs", "top_logprobs") if fault == "one row short" else ("token_logprobs",):
        rows = given[name]
        if fault == "one row short":
            del rows[-2:]
        elif fault == "shifted":
            given[name] = [*rows[1:], -1.0]
        else:
            rows[len(rows) // 2] = float("nan") if fault == "NaN" else 0.5
    return found


def rows_of(rows, fault, keys):
    middle = len(rows) // 2
    if fault == "one row short":
        return rows[:-1]
    if fault == "shifted":
        return [*rows[1:], rows[-1]]
    row = rows[middle]
    if fault == "sum above 1" and isinstance(row, dict) and len(row) == 1:
        row["0"] = {"logprob": -0.01}
    for key in keys(row) if isinstance(row, dict) else range(len(row)):
        entry = row[key]
        value = {"NaN": float("nan"), "positive": 0.5, "sum above 1": -0.01}[fault]
        if isinstance(entry, dict):
            entry["logprob"] = value
        elif isinstance(entry, list):
            entry[0] = value
        else:  # [logprob, id, text]
            row[0] = value
            break
    return rows


@contextmanager
def serving(model, tokenizer, plan=None, **options):
    """A server that runs; faulty where there is a plan."""
    kind = TeacherServer if plan is None else FaultyServer
    server = kind(model, tokenizer, **options)
    server.plan = plan
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close(patience=2.0)
        thread.join()


@contextmanager
def talking(speak, context=None):
    """A bare socket: `speak(sock, head)` for every request, whose head has come, with or without its body; its URL.

    A request's body may be unread. `speak` returns whether the connection goes on.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    open_sockets = []

    def connection(sock):
        try:
            if context is not None:
                sock = context.wrap_socket(sock, server_side=True)
                open_sockets.append(sock)
            head = b""
            while part := sock.recv(65536):
                head += part
                if b"\r\n\r\n" in head:
                    if not speak(sock, head):
                        break
                    head = b""
        except (OSError, ValueError):
            pass  # whoever asked is gone
        finally:
            sock.close()

    def accept():
        with suppress(OSError):
            while True:
                sock, _ = listener.accept()
                open_sockets.append(sock)
                threading.Thread(target=connection, args=(sock,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http{'s' if context else ''}://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for sock in open_sockets:
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            sock.close()
        thread.join()

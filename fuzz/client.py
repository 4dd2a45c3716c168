"""Fuzzes the client of a served teacher: `python fuzz/client.py [seconds] [seed]`.

A server that lies by grammar: true answers of the three protocols are changed at every level, numbers and ids, JSON's
structure and text, bytes, HTTP's head and framing. The client gives the true answer or raises `TeacherError` with a
message of one line, in bounded time and memory, whatever comes. A quarter of the answers go over sockets, the others
are only read. What breaks this is left in `fuzz/artifacts`, and the exit status is 1.
"""

import copy
import json
import math
import os
import random
import resource
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
from readers import places as places_in

from xtokmap.teachers.client import PROTOCOLS, Client, TeacherError
from xtokmap.teachers.http1 import Answer

ARTIFACTS = Path(__file__).parent / "artifacts"
#: Bytes that the process may grow by from its first answers on.
MEMORY = 256 << 20
#: Seconds of a request, and what may pass besides on a busy machine.
TIMEOUT, SLACK = 0.5, 3.0
VOCAB = 100


# ---- true answers ------------------------------------------------------------------------------------------------


def row_of(rng):
    """Ids, the top k asked for, and of every place but the first: the logprob of each token that is shown."""
    ids = [rng.randrange(VOCAB) for _ in range(rng.randrange(2, 7))]
    topk = rng.choice((0, 1, 3))
    places = []
    for token in ids[1:]:
        shown = [token, *rng.sample([i for i in range(VOCAB) if i != token], topk)]
        shares = [rng.uniform(0.01, 1) for _ in shown]
        whole = sum(shares) * rng.uniform(1.0, 3.0)
        places.append({i: math.log(share / whole) for i, share in zip(shown, shares, strict=True)})
    return ids, topk, places


def vllm(ids, topk, places):
    rows = [{str(i): {"logprob": x, "rank": 1, "decoded_token": f"t{i}"} for i, x in row.items()} for row in places]
    return {
        "id": "c",
        "choices": [{"index": 0, "text": "x", "prompt_logprobs": [None, *rows], "prompt_token_ids": ids}],
    }


def sglang(ids, topk, places):
    own = [[row[token], token, f"t{token}"] for token, row in zip(ids[1:], places, strict=True)]
    tops = [[[x, i, None] for i, x in row.items()][1:] for row in places]
    meta = {"prompt_tokens": len(ids), "input_token_logprobs": [[None, ids[0], "a"], *own]}
    return {"text": "x", "meta_info": {**meta, **({"input_top_logprobs": [None, *tops]} if topk else {})}}


def openai(ids, topk, places):
    own = [row[token] for token, row in zip(ids[1:], places, strict=True)]
    tops = [{f"token_id:{i}": x for i, x in row.items()} for row in places]
    given = {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": [None, *own], "top_logprobs": [None, *tops]}
    return {"choices": [{"logprobs": given}]}


MAKE = {"vllm": vllm, "sglang": sglang, "openai": openai}

# ---- lies --------------------------------------------------------------------------------------------------------

#: Values, as JSON's text, so that what Python would not write is among them.
VALUES = (
    *("null", "true", "false", "0", "-0", "1", "-1", "6.9", "-0.5", "0.02", "-9999.0", "1e999", "-1e999", "1e-999"),
    *("NaN", "Infinity", "-Infinity", "1" * 400, "-" + "1" * 400, "1" * 5000, str(2**31), str(2**64), str(VOCAB)),
    *('""', '"a"', '"6"', '" 6"', '"06"', '"token_id:6"', '"token_id:06"', '"token_id:"', '"\\ud800"', '"\\u0000"'),
    *('"\\u001b[2J\\u202e"', '"' + "x" * 5000 + '"', "[]", "{}", "[[]]", "[null]", "[null,6]", "[-1.0,6]", '{"6":-1}'),
    *('{"6":{"logprob":-1}}', "[" * 50 + "]" * 50, "[" * 5000 + "]" * 5000, '{"a":' * 3000 + "1" + "}" * 3000),
    *("[" + "[]," * 3000 + "1]", "{" + ",".join(f'"{k}":{{"logprob":-99}}' for k in range(3000)) + "}", ""),
)
KEYS = ("6", " 6", "06", "+6", "6 ", "6_0", "٦", "1" * 500, "-1", "token_id:7", "token_id: 7", "", "logprob", "\ud800")
MARK = "@@value@@"


def lie_in_structure(found, rng):
    """The JSON's text with values, names and rows changed."""
    found, values = copy.deepcopy(found), []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        inside = list(places_in(found))
        if not inside:
            break
        container, key = rng.choice(inside)
        match rng.randrange(8):
            case 0:
                del container[key]
            case 1:
                other, name = rng.choice(inside)
                if name not in other if isinstance(other, dict) else name >= len(other):
                    continue
                container[key] = copy.deepcopy(other[name])
            case 2 if isinstance(container, dict):
                container[rng.choice(KEYS)] = container.pop(key)
            case 3 if isinstance(container, dict):
                container[rng.choice(KEYS)] = copy.deepcopy(container[key])
            case 4 if isinstance(container, list):
                container.insert(rng.randrange(len(container) + 1), copy.deepcopy(container[key]))
            case 5 if isinstance(container[key], float):
                container[key] += rng.choice((-1.0, -1e-3, 1e-3, 0.5, 1e3, -1e5))
            case 6 if isinstance(container[key], int):
                container[key] += rng.choice((-1, 1, VOCAB, -VOCAB, 2**31))
            case _:
                container[key] = MARK
                values.append(rng.choice(VALUES))
    text = json.dumps(found)
    for value in values:
        text = text.replace(f'"{MARK}"', value, 1)
    if rng.randrange(8) == 0:  # a name twice
        text = text.replace("{", '{"id":1,"id":2,', 1)
    return text.encode("utf-8", "surrogatepass")


def lie_in_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 64))
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at : at + size] = b""
            case 2:
                data[at:at] = rng.randbytes(size)
            case 3:
                other = rng.randrange(len(data) + 1)
                data[at:at] = data[other : other + size]
            case 4:
                data[at:at] = rng.choice((b'"', b"[", b"{", b",", b"\\", b"\\u", b"\xff", b"\0", b"9")) * rng.choice(
                    (1, 1, 99)
                )
            case 5:
                if rng.randrange(4) == 0:
                    del data[at:]
    return bytes(data)


def body_of(protocol, row, rng):
    """The bytes of an answer, a true one at times."""
    found = MAKE[protocol](*row)
    match rng.randrange(8):
        case 0:
            return json.dumps(found).encode()
        case 1:
            return lie_in_bytes(json.dumps(found).encode(), rng)
        case 2:
            return lie_in_bytes(lie_in_structure(found, rng), rng)
        case 3:  # another row's, or another protocol's
            return json.dumps(MAKE[rng.choice(list(MAKE))](*row_of(rng))).encode()
        case _:
            return lie_in_structure(found, rng)


STATUSES = (
    "200 OK",
    "200",
    "204 No",
    "206 Part",
    "301 Away",
    "400 No",
    "401 No",
    "404 No",
    "429 No",
    "500 No",
    "503 No",
)
ODD_STATUSES = ("000 No", "99 No", "101 Yes", "1000 No", "abc", "", "-200 OK", "２００ OK", "200 \x1b[2J")
HEADERS = (
    *("Retry-After: 0", "Retry-After: -1", "Retry-After: 1e308", "Retry-After: nan", "Retry-After: soon"),
    *("Retry-After: Fri, 31 Dec 9999 23:59:59 GMT", "Retry-After: Mon, 01 Jan 0001 00:00:00 +2359"),
    *(
        "Content-Length: 5",
        "Content-Length: -5",
        "Content-Length: 1" + "0" * 30,
        "Content-Length: ²",
        "Content-Length:",
    ),
    *("Transfer-Encoding: chunked", "Transfer-Encoding: gzip", "Transfer-Encoding: chunked, chunked"),
    *("Content-Encoding: gzip", "Content-Encoding: identity", "Content-Encoding: br, gzip", "Connection: close"),
    *("Connection: upgrade", "Upgrade: h2c", "Location: http://127.0.0.1:9/", "Set-Cookie: a=b", "X: " + "y" * 3000),
    *("no colon", ": no name", " folded", "X\x00: y", "X: \x00", "X : y", "Content-Type: text/html; charset=utf-7"),
)


def chunks(body, rng):
    """A body in chunks, not always well."""
    at = 0
    while at < len(body):
        size = rng.choice((1, 10, 1000, 10**6))
        part = body[at : at + size]
        length = len(part) if rng.randrange(50) else rng.choice((0, 10**6, 2**64))
        yield b"%x%s\r\n" % (length, b";x=y" if rng.randrange(9) == 0 else b"") + part + b"\r\n"
        at += size
    yield rng.choice((b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"-1\r\n\r\n", b""))


def spoken(body, rng):
    """Parts to send, and the seconds between them: the answer over HTTP."""
    if rng.randrange(32) == 0:  # without an end
        head = rng.choice((b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 500 No\r\n\r\n"))
        part = rng.choice((b"HTTP/1.1 100 Go\r\n\r\n", b"X: y\r\n", b"[]," * 99, b"x" * 9999, b"1\r\n \r\n"))
        if rng.randrange(2):
            return [head, *[part] * 40], 0.05
        return [head, *[part * 500] * 2000], 0.0
    status = rng.choice(STATUSES) if rng.randrange(3) == 0 else "200 OK"
    status = rng.choice(ODD_STATUSES) if rng.randrange(20) == 0 else status
    headers = rng.sample(HEADERS, rng.choice((0, 0, 0, 1, 1, 2, 5)))
    in_chunks = rng.randrange(3) == 0
    framing = "Transfer-Encoding: chunked" if in_chunks else f"Content-Length: {len(body)}"
    if rng.randrange(20):
        headers.insert(rng.randrange(len(headers) + 1), framing)
    before = b"HTTP/1.1 100 Continue\r\n\r\n" * rng.choice((0, 0, 0, 0, 1, 3))
    head = "\r\n".join([f"HTTP/{rng.choice(('1.1', '1.1', '1.1', '1.0', '2', '9.9'))} {status}", *headers, "", ""])
    data = before + head.encode() + (b"".join(chunks(body, rng)) if in_chunks else body)
    if rng.randrange(8) == 0:
        data = lie_in_bytes(data, rng)
    if rng.randrange(8) == 0:  # an answer more than there are questions
        data += data
    size = rng.choice((len(data) or 1, len(data) or 1, 1000, 50))
    return [data[k : k + size] for k in range(0, len(data), size)][:200], 0.0


class Server:
    """Says the parts that `say` has, to whoever asks."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.say, self.pause = [], 0.0
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            sock, _ = self.listener.accept()
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock):
        say, pause = self.say, self.pause
        try:
            sock.settimeout(TIMEOUT + SLACK)
            sock.recv(2**16)
            for part in say:
                sock.sendall(part)
                time.sleep(pause)
        except OSError:  # nobody listens
            pass
        finally:
            sock.close()


class Said:
    """Instead of connections: an answer of status 200."""

    def __init__(self, content):
        self.content = content

    def ask(self, *_, **__):
        return Answer(200, {}, self.content)


# ---- what must hold ----------------------------------------------------------------------------------------------


def wrong(answer, protocol, row):
    """What an answer that is believed has that it must not have; None where it can be believed."""
    ids, topk, _ = row
    n = len(ids)
    shapes = answer.logprobs.shape == (n,) and answer.top_ids.shape == answer.top_logprobs.shape
    if not shapes or answer.top_ids.shape[0] != n or answer.top_ids.shape[1] > max(topk, 1) + 1:
        return "shapes"
    if not np.isnan(answer.logprobs[0]) or not (answer.logprobs[1:] <= 0).all():
        return "logprobs"
    if answer.top_ids.min(initial=-1) < -1 or answer.top_ids.max(initial=-1) >= VOCAB:
        return "ids"
    for i in range(1, n):
        shown = answer.top_ids[i][answer.top_ids[i] >= 0]
        if len(set(shown)) < len(shown) or ids[i] not in shown:
            return "an id twice, or its own not at all"
        if np.exp(answer.top_logprobs[i][: len(shown)]).sum() > 1.02:
            return "mass above 1"
    if len(answer.texts) != n or not all(text is None or isinstance(text, str) for text in answer.texts):
        return "texts"
    return None


def same(answer, row):
    """Whether it is the true answer."""
    ids, _, places = row
    want = [place[token] for token, place in zip(ids[1:], places, strict=True)]
    return np.allclose(answer.logprobs[1:], want, atol=1e-5)


def attempt(ask, protocol, row, true):
    """What came of a request: "answered", "true", "refused", or what is wrong with it."""
    begun = time.monotonic()
    try:
        answer = ask()
        problem = wrong(answer, protocol, row)
        outcome = f"believed: {problem}" if problem else "true" if same(answer, row) else "answered"
        if true and outcome != "true":
            outcome = f"a true answer was {outcome}"
    except TeacherError as error:
        text = str(error)
        outcome = "refused" if text.isprintable() and len(text) < 1000 else "a message that cannot be shown"
        if true:
            outcome = f"a true answer was refused: {text.rpartition('the last: ')[2]}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"{type(error).__name__} in {where.name}, line {where.lineno}"
    return outcome if time.monotonic() - begun < TIMEOUT + SLACK else "slow"


def main():
    seconds, seed = (float(sys.argv[1]) if len(sys.argv) > 1 else 60.0), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    rng, server = random.Random(seed), Server()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        os.environ.pop(name, None)
    clients = {
        name: Client(
            server.url, protocol=name, model="m", retries=0, timeout=TIMEOUT, vocab_size=VOCAB, pause=0.0, patience=0.0
        )
        for name in PROTOCOLS
    }
    counts, smallest, first_peak = Counter(), {}, 0
    until, made = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        protocol, row = rng.choice(list(PROTOCOLS)), row_of(rng)
        client = clients[protocol]
        client._not_before = 0.0  # a pause that a server asks for is not waited out here
        body = body_of(protocol, row, rng)
        true = body == json.dumps(MAKE[protocol](*row)).encode()
        if made % 4:
            stop, dialect = threading.Event(), PROTOCOLS[protocol]
            content = body

            def ask(client=client, dialect=dialect, row=row, body=body, stop=stop):
                return client._ask(Said(body), dialect, row[0], row[1], stop)
        else:
            server.say, server.pause = spoken(body, rng)
            content, true = b"".join(server.say[: 9 if len(server.say) > 200 else None]), False

            def ask(client=client, row=row):
                return client.score([row[0]], row[1])[0]

        outcome = attempt(ask, protocol, row, true)
        counts[outcome] += 1
        made += 1
        if outcome not in ("true", "answered", "refused") and len(content) < len(
            smallest.get(outcome, (0, content + b"."))[1]
        ):
            smallest[outcome] = (protocol, row[0], row[1]), content
        if made == 200:
            first_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first_peak) * 1024
    if first_peak and growth > MEMORY:
        smallest[f"{growth >> 20} MiB more than at its beginning"] = ("", [], 0), b""
    print(
        f"seed {seed}: {counts['true']} true, {counts['answered']} believed, {counts['refused']} refused, "
        f"{len(smallest)} findings, {growth / 2**20:.0f} MiB more than after 200"
    )
    for k, (outcome, (asked, content)) in enumerate(smallest.items()):
        ARTIFACTS.mkdir(exist_ok=True)
        path = ARTIFACTS / f"client-{k}"
        path.write_bytes(content)
        print(f"  {outcome}: {counts[outcome]} times, smallest in {path}, asked {asked}")
    return 1 if smallest else 0


if __name__ == "__main__":
    sys.exit(main())

"""`serve-teacher`: the model's own numbers, and a clear no to what it cannot do."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import httpx2
import pytest
import torch

import tiny
import xtokmap
from xtokmap.teachers import server as serve
from xtokmap.teachers.client import Client
from xtokmap.teachers.scorer import Limits, RefusedError, score_row
from xtokmap.teachers.server import TeacherServer

KEY = "sk-of-the-server"
ROW = [5, 6, 7, 300, 301]
POST, GET = "POST /v1/completions", "GET /health"
WAIT = 60.0  # seconds, for what a busy machine may take; nothing that works takes them


@contextmanager
def serving(model, **options):
    """A server that runs in a thread of this process."""
    server = TeacherServer(model, tiny.teacher_tokenizer(), **options)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.close(patience=2.0)
        thread.join()


@pytest.fixture(scope="module")
def model():
    return tiny.teacher_model()


@pytest.fixture(scope="module")
def server(model):
    with serving(model, limits=Limits(max_length=64, max_logprobs=50), name="tiny") as server:
        yield server


def post(server, path, **body):
    return httpx2.post(server.url + path, json=body)


@torch.no_grad()
def rows_of(model, ids):
    """float64 `[n, V]`: row i scores what comes after token i."""
    return model.eval()(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_prompt_logprobs_are_the_models_own(model, server):
    body = post(server, "/v1/completions", prompt=ROW, prompt_logprobs=3, max_tokens=1, return_token_ids=True).json()
    want, choice = rows_of(model, ROW), body["choices"][0]
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_token_ids"] == ROW
    for i, row in enumerate(choice["prompt_logprobs"][1:]):
        own = row[str(ROW[i + 1])]
        assert own["logprob"] == pytest.approx(want[i, ROW[i + 1]].item(), abs=2e-5)
        assert own["rank"] == (want[i] > want[i, ROW[i + 1]]).sum().item() + 1
        best = {str(token) for token in want[i].topk(3).indices.tolist()}
        assert set(row) == best | {str(ROW[i + 1])}
        assert own["decoded_token"] == tiny.teacher_tokenizer().decode([ROW[i + 1]])
    assert choice["token_ids"] == [want[-1].argmax().item()]
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
    assert body["model"] == "tiny"


def test_several_prompts_and_texts(model, server):
    text = "the sky is blue"
    ids = tiny.teacher_tokenizer()(text).input_ids
    both = post(server, "/v1/completions", prompt=[ROW, ids], prompt_logprobs=0, max_tokens=0).json()["choices"]
    assert [choice["index"] for choice in both] == [0, 1]
    one = post(server, "/v1/completions", prompt=text, prompt_logprobs=0, max_tokens=0).json()["choices"][0]
    assert [list(row or ()) for row in one["prompt_logprobs"]] == [[], *([str(i)] for i in ids[1:])]
    for a, b in zip(one["prompt_logprobs"][1:], both[1]["prompt_logprobs"][1:], strict=True):
        assert next(iter(a.values()))["logprob"] == pytest.approx(next(iter(b.values()))["logprob"], abs=2e-5)
    assert one["text"] == ""
    assert httpx2.get(server.url + "/v1/models").json()["data"][0]["id"] == "tiny"
    assert httpx2.get(server.url + "/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/completions", {"prompt": [1, 380]}, 400, "prompt[1] is 380; the model has token ids 0 to 379"),
        ("/v1/completions", {"prompt": [-1]}, 400, "prompt[0] is -1; the model has"),
        ("/v1/completions", {"prompt": [[1], [2, "a"]]}, 400, "prompt[1][1] is 'a'; the model has"),
        ("/v1/completions", {"prompt": [1, True]}, 400, "prompt[1] is True"),
        ("/v1/completions", {"prompt": [1, 2.0]}, 400, "prompt[1] is 2.0"),
        ("/v1/completions", {"prompt": []}, 400, "prompt must be a text or a list of token ids, and not empty"),
        ("/v1/completions", {}, 400, "prompt must be a text or a list"),
        ("/v1/completions", {"prompt": [1] * 64}, 400, "prompt has 64 tokens, and 1 new; the model takes 64 together"),
        ("/v1/completions", {"prompt": [1], "max_tokens": 16}, 400, "max_tokens is 16; this server takes 0 to 1"),
        ("/v1/completions", {"prompt": [1], "prompt_logprobs": 51}, 400, "prompt_logprobs is 51; this server takes 0"),
        ("/v1/completions", {"prompt": [1], "prompt_logprobs": "5"}, 400, "prompt_logprobs is '5'"),
        ("/v1/completions", {"prompt": [1], "stream": True}, 400, "stream: this server scores prompts"),
        (
            "/v1/completions",
            {"prompt": [1], "model": "big"},
            404,
            "the model 'big' does not exist; this server has 'ti",
        ),
        ("/v1/completions", {"prompt": [1], "echo": True}, 400, "echo: this server has vLLM's prompt_logprobs instead"),
        ("/v1/completions", {"prompt": [1], "logprobs": 0}, 400, "logprobs: this server has vLLM's prompt_logprobs"),
        ("/generate", {"prompt": [999]}, 404, "there is no /generate here"),
        ("/v1/chat/completions", {}, 404, "there is no /v1/chat/completions here; this server has /health, /v1/models"),
        ("/health", {}, 405, "/health takes GET"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server, path, body, status, message):
    answer = post(server, path, **body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["code"] == status
    assert message in error["message"]


@pytest.mark.parametrize(("content", "message"), [(b"{", "the body is no JSON"), (b"[1]", "must be a JSON object")])
def test_a_body_that_is_no_object_is_refused(server, content, message):
    for path in ("/v1/completions", "/v1/hidden_states"):
        answer = httpx2.post(server.url + path, content=content)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]


def test_bodies_that_say_no_length_or_too_much(server):
    assert httpx2.post(server.url + "/v1/completions", content=iter([b"{}"])).status_code == 411
    said = refused(server, head("POST /v1/completions", "Content-Length: 1099511627776"), 413)
    assert said == f"a body of 1099511627776 bytes; this server takes {server.max_body}"
    assert_answers(server)


def test_the_key_opens_everything_but_health(model):
    with serving(model, key=KEY) as server:
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": KEY}):
            answer = httpx2.get(server.url + "/v1/models", headers=headers)
            assert answer.status_code == 401
            assert KEY not in answer.text
        assert httpx2.get(server.url + "/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        assert httpx2.get(server.url + "/health").status_code == 200


def test_requests_that_wait_share_a_pass(model):
    with serving(model, limits=Limits(max_batch=8)) as server:
        first = server.scorer.batches
        answer = post(server, "/v1/completions", prompt=[ROW[: 2 + b % 4] for b in range(40)], prompt_logprobs=0)
        assert len(answer.json()["choices"]) == 40
        assert 5 <= server.scorer.batches - first <= 12


def test_a_pass_that_fails_costs_the_request_that_is_to_blame(model):
    with serving(model) as server:
        own = server.scorer._pass

        def fails(rows):
            if any(13 in row for row in rows):
                raise RuntimeError("out of\nmemory")
            return own(rows)

        server.scorer._pass = fails
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda i: post(server, "/v1/completions", prompt=[i, 1]), range(8, 16)))
    assert [answer.status_code for answer in found] == [200] * 5 + [500] + [200] * 2
    assert found[5].json()["error"]["message"] == "the model failed: out of memory"


def test_limits_and_addresses_that_cannot_be_are_named(model, server):
    with pytest.raises(xtokmap.XTokMapError, match="max_batch=0: must be at least 1"):
        Limits(max_batch=0)
    port = int(server.url.rpartition(":")[2])
    for bad in (port, 2**20, -1):
        with pytest.raises(xtokmap.XTokMapError, match=f"cannot listen on 127.0.0.1:{bad}"):
            TeacherServer(model, tiny.teacher_tokenizer(), port=bad)
    with pytest.raises(xtokmap.XTokMapError, match=r"cannot listen on 192\.0\.2\.1:0: "):
        TeacherServer(model, tiny.teacher_tokenizer(), host="192.0.2.1")


@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_told_to_stop(tmp_path, told):
    tiny.teacher_model().save_pretrained(tmp_path)
    tiny.teacher_tokenizer().save_pretrained(tmp_path)
    command = [sys.executable, "-m", "xtokmap", "serve-teacher", "--model", str(tmp_path), "--port", "0", "--name", "t"]
    environment = {**os.environ, "XTOKMAP_TEACHER_KEY": KEY}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        line = process.stdout.readline()
        assert line.startswith("serving t at http://127.0.0.1:")
        assert "a key is asked for (XTOKMAP_TEACHER_KEY)" in line
        assert KEY not in line
        url = line.split()[3]
        headers = {"Authorization": f"Bearer {KEY}"}
        body = {"prompt": ROW, "prompt_logprobs": 0}
        answer = httpx2.post(url + "/v1/completions", json=body, headers=headers, timeout=60)
        assert len(json.loads(answer.text)["choices"][0]["prompt_logprobs"]) == 5
        process.send_signal(told)
        assert process.stdout.read() == "stopped after 1 answers\n"
        assert process.wait() == 0


def test_the_command_names_what_is_wrong(tmp_path, capsys):
    from xtokmap.cli import main

    assert main(["serve-teacher", "--model", str(tmp_path / "none")]) == 2
    assert "none: no such model" in capsys.readouterr().err
    assert main(["serve-teacher", "--model", "x", "--max-batch", "0"]) == 2
    assert "max_batch=0" in capsys.readouterr().err
    assert main(["serve-teacher", "--model", "x", "--max-seconds", "nan"]) == 2
    assert "max_seconds=nan: must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["uvicorn", "starlette", "h11"])
def test_a_missing_package_is_named(package, monkeypatch, capsys):
    from xtokmap.cli import main

    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "xtokmap.teachers.server")
    monkeypatch.delattr("xtokmap.teachers.server")
    assert main(["serve-teacher", "--model", "x"]) == 2
    assert f"serve-teacher needs the package {package}" in (said := capsys.readouterr().err)
    assert "pip install 'xtokmap[serve]'" in said


def test_the_client_of_this_package_gets_the_models_numbers(model, server):
    rows = [ROW, [9, 8, 7, 6]]
    answers = Client(server.url, protocol="vllm", model="tiny").score(rows, topk=2)
    for row, answer in zip(rows, answers, strict=True):
        want = rows_of(model, row)
        assert answer.logprobs[1:] == pytest.approx([want[i, t].item() for i, t in enumerate(row[1:])], abs=2e-5)


# ---- hostile clients: raw bytes, and after each of them an honest request is answered ----------------------------


def head(request, *headers):
    """The head of a request, of Latin-1."""
    return "\r\n".join([f"{request} HTTP/1.1", "Host: x", *headers, "", ""]).encode("latin-1")


def whole(body, path="/v1/completions"):
    """A request that is in order."""
    content = json.dumps(body).encode()
    return head(f"POST {path}", f"Content-Length: {len(content)}") + content


def connect(server):
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=WAIT)


def rest(connection):
    """All that comes until the server closes."""
    found = b""
    try:
        while piece := connection.recv(2**16):
            found += piece
    except ConnectionResetError:  # it had more to read than it cared for
        pass
    return found


def message(answer, status):
    """What one answer, and nothing but it, says is wrong."""
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer
    assert answer.count(b"HTTP/1.1 ") == 1
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == status
    return error["message"]


def refused(server, sent, status):
    """What is said to these bytes before the server closes."""
    with connect(server) as connection:
        connection.sendall(sent)
        return message(rest(connection), status)


def assert_answers(server, headers=None):
    """The server is there for an honest client."""
    answer = httpx2.post(server.url + "/v1/completions", json={"prompt": ROW}, headers=headers, timeout=WAIT)
    assert answer.status_code == 200
    assert answer.json()["usage"]["prompt_tokens"] == 5


def until(true):
    deadline = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def held(server):
    """A model that keeps its first batch until it may go on; yields what lets it, and the rows it was given."""
    go, seen, own = threading.Event(), [], server.scorer._pass

    def waits(rows):
        seen.extend(rows)
        assert go.wait(WAIT)
        return own(rows)

    server.scorer._pass = waits
    try:
        yield go, seen
    finally:
        go.set()


def test_the_key_comes_before_the_body(model):
    with serving(model, key=KEY) as server:
        long = f"Content-Length: {64 * 2**20}"
        for headers in ([long], [long, "Authorization: Bearer no"], [long, "Expect: 100-continue"], [long + "0" * 9]):
            said = refused(server, head("POST /v1/completions", *headers), 401)  # and not a byte of the body was sent
            assert said == "the API key is missing or not the one of this server"
        assert_answers(server, {"Authorization": f"Bearer {KEY}"})


def test_a_body_may_have_what_its_rows_need(model):
    with serving(model, limits=Limits(max_queue=8, max_length=64)) as server:
        assert server.max_body == 8 * 64 * len("379, ") + 2**16
    with serving(model, limits=Limits(max_length=2**20)) as server:
        assert server.max_body == 2**22 + 2**16
    with serving(model, limits=Limits(max_body=100)) as server:
        assert refused(server, head("POST /v1/completions", "Content-Length: 101"), 413) == (
            "a body of 101 bytes; this server takes 100"
        )
        assert_answers(server)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"G" * 999,
        head("GET /health")[:-2] + b"a: b\r\n" * 999,
        head("POST /v1/completions", "Content-Length: 999"),
    ],
    ids=["nothing", "a line", "headers", "a body"],
)
def test_what_comes_in_drops_is_cut(model, sent):
    with serving(model, limits=Limits(max_seconds=0.3)) as server, connect(server) as connection:
        connection.sendall(sent[:-900])
        connection.settimeout(0.02)
        for drop in itertools.chain(sent[-900:], itertools.repeat(32, 2000)):
            try:
                if sent:
                    connection.sendall(bytes([drop]))
                found = connection.recv(2**16)
                break
            except TimeoutError:
                continue
        connection.settimeout(WAIT)
        assert message(found + rest(connection), 408) == "the request took more than 0.3 seconds to arrive"
        assert_answers(server)


def test_an_answer_that_nobody_reads_is_cut(model, monkeypatch):
    with serving(model, limits=Limits(max_seconds=0.3)) as server, connect(server) as connection:
        with monkeypatch.context() as patch:
            patch.setattr(serve, "_content", lambda *_: (b" " * 2**25, "text/plain"))
            connection.sendall(whole({"prompt": ROW}))
            until(lambda: server.answered)
            until(lambda: not server._server.server_state.connections)
        assert_answers(server)


def test_a_request_whose_client_is_gone_is_not_worked_off(model):
    with serving(model, limits=Limits(max_batch=2)) as server:
        with ThreadPoolExecutor(1) as pool, held(server) as (go, seen):
            first = pool.submit(assert_answers, server)
            until(lambda: seen)
            with connect(server) as connection:
                connection.sendall(whole({"prompt": [[9, 9]] * 40}))
                until(lambda: len(server.scorer._waiting) == 40)
            until(lambda: not server.scorer._waiting)
            go.set()
            first.result()
            assert_answers(server)
        assert seen == [ROW, ROW]


def test_rows_wait_all_or_none_and_too_many_never(model):
    with serving(model, limits=Limits(max_queue=4)) as server:
        with ThreadPoolExecutor(2) as pool, held(server) as (_, seen):
            first = pool.submit(assert_answers, server)
            until(lambda: seen)
            second = pool.submit(post, server, "/v1/completions", prompt=[ROW] * 2)
            until(lambda: len(server.scorer._waiting) == 2)
            full = post(server, "/v1/completions", prompt=[ROW] * 3)
            assert full.status_code == 429
            assert full.headers["Retry-After"] == "1"
            assert "2 rows wait already; with these 3 there would be more than 4" in full.json()["error"]["message"]
            assert len(server.scorer._waiting) == 2
            never = post(server, "/v1/completions", prompt=[ROW] * 5)
            assert never.status_code == 413
            assert never.json()["error"]["message"] == "prompt has 5 rows; this server takes 4 of a request"
        first.result()
        assert second.result().status_code == 200
        assert_answers(server)


def test_nan_is_said_in_words_and_costs_its_own_row():
    model = tiny.teacher_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[13] = torch.nan
    own = torch.nn.Parameter(tiny.teacher_model().get_output_embeddings().weight.detach().clone())
    model.get_output_embeddings().weight = own
    bodies = {
        "/v1/completions": {"prompt": [[1, 13, 2], ROW], "prompt_logprobs": 1},
        "/v1/hidden_states": {"prompt": [1, 13, 2]},
    }
    with serving(model) as server:
        for path, body in bodies.items():
            answer = post(server, path, **body)
            assert answer.status_code == 500
            assert answer.json()["error"]["message"] == "the model failed: its logprobs after token 0 of 3 are NaN"
            assert_answers(server)
        first, second = server.scorer.submit([[1, 13, 2], ROW], partial(score_row, topk=1))  # one pass
        with pytest.raises(RefusedError, match="are NaN"):
            first.result()
        assert len(second.result().logprobs) == 5


CHUNKED = "Transfer-Encoding: chunked"


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        (head(POST, "Content-Length: \xb2"), 400, "bad Content-Length"),
        (head(POST, "Content-Length: \xc2\xb2"), 400, "bad Content-Length"),
        (head(POST, "Content-Length: -1"), 400, "bad Content-Length"),
        (head(POST, "Content-Length: +1"), 400, "bad Content-Length"),
        (head(POST, "Content-Length: 0x1"), 400, "bad Content-Length"),
        (head(POST, "Content-Length: " + "1" * 21), 400, "bad Content-Length"),
        (head(POST, "Content-Length: 1, 2"), 400, "conflicting Content-Length"),
        (head(POST, "Content-Length: 1", "Content-Length: 2"), 400, "conflicting Content-Length"),
        (head(POST, "Content-Length: 6", CHUNKED) + b"0\r\n\r\nG", 400, "Content-Length and Transfer-Encoding in one"),
        (head(POST, CHUNKED, "Content-Length: 6") + b"0\r\n\r\nG", 400, "Content-Length and Transfer-Encoding in one"),
        (head(POST, CHUNKED) + b"1\r\n{\r\n" * 999, 411, "a body needs a Content-Length"),
        (head(POST, "Transfer-Encoding: chunked, identity"), 501, "Only Transfer-Encoding: chunked"),
        (head(POST, "Connection: close"), 411, "a POST needs a Content-Length"),
        (whole({"prompt": ROW}) + head(GET), 400, "bytes after the request"),
        (whole({"prompt": ROW}) + b"X", 400, "bytes after the request"),
        (head(GET, "Content-Length: 0") + head(GET), 400, "bytes after the request"),
        (head(GET) + b"\0" * 99999, 400, "bytes after the request"),
        (b"\0" * 9, 400, "no request of HTTP"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 99, 400, "no request of HTTP"),
        (b"GET /health HTTP/1.1\r\n\r\n", 400, "Missing mandatory Host"),
        (head("GET /h\xe9alth"), 400, "no request of HTTP"),
        (head("GET /health /health"), 400, "no request of HTTP"),
        (head(GET, "a b: c"), 400, "no request of HTTP"),
        (head(GET, "a: \0"), 400, "no request of HTTP"),
        (head(GET)[:-2] + b"a" * 20000, 431, "no request of HTTP"),
        (head(GET, *["a: b"] * 9000), 431, "no request of HTTP"),
        (head("GET /" + "a" * 99999), 431, "no request of HTTP"),
    ],
)
def test_what_is_no_request_is_refused_in_words(server, sent, status, said):
    assert said in refused(server, sent, status)
    assert_answers(server)


@pytest.mark.parametrize("path", ["/%ED%A0%80", "/%FF", "/v1/%ED%A0%80%ED%B0%80"])
def test_a_path_that_is_no_unicode_is_refused(server, path):
    answer = httpx2.get(server.url + path)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "the path is no UTF-8"
    assert_answers(server)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100000, "the body is nested too deeply"),
        (b'{"a":' * 20000, "the body is nested too deeply"),
        (b'{"prompt":' + b"[" * 900 + b"]" * 900 + b"}", "prompt"),
        (b'{"model":' + b"[" * 900 + b"]" * 900 + b"}", "model is [[["),
        (b'{"prompt": [' + b"1" * 5000 + b"]}", "the body is no JSON: Exceeds the limit"),
        (b'{"prompt": [' + b"1" * 400 + b"]}", "prompt[0] is 1111"),
        (b'{"prompt": [1], "prompt_logprobs": ' + b"1" * 400 + b"}", "prompt_logprobs is 111"),
        (b'{"prompt": [1], "max_tokens": 1e999}', "max_tokens is inf"),
        (b'{"prompt": [1e0]}', "prompt[0] is 1.0"),
        (b'{"prompt": [1, 1e999]}', "prompt[1] is inf"),
        (b'{"prompt": [1, true]}', "prompt[1] is True"),
        (b'{"prompt": [1, null]}', "prompt[1] is None"),
        (b'{"prompt": [1, "2"]}', "prompt[1] is '2'"),
        (b'{"prompt": [NaN]}', "the body is no JSON: NaN in it"),
        (b'{"prompt": [1], "x": -Infinity}', "the body is no JSON: -Infinity in it"),
        (b'{"prompt": "a\\ud800b"}', "the body is no Unicode: it has half a character, \\ud800"),
        (b'{"prompt": "\\udc00\\ud800"}', "half a character, \\udc00"),
        (b'{"prompt": "a", "\\uDFFF": 1}', "half a character, \\udfff"),
        (b'{"model": "\\ud800", "prompt": [1]}', "half a character"),
        (b'{"prompt": "\xed\xa0\x80"}', "the body is no JSON: 'utf-8' codec"),
        (b'{"prompt": "\xff"}', "the body is no JSON: 'utf-8' codec"),
        ('{"prompt": [1]}'.encode("utf-16"), "the body is no JSON"),
        (b'\xef\xbb\xbf{"prompt": [1]}', "the body is no JSON: Unexpected UTF-8 BOM"),
        (b"", "the body must be a JSON object"),
        (b"null", "the body must be a JSON object"),
        (b'{"prompt": ""}', "prompt must be a text or a list of token ids"),
        (b'{"prompt": [[1], 2]}', "prompt[1] must be a text or a list"),
    ],
)
def test_a_body_that_is_no_request_is_refused_in_words(server, content, said):
    answer = httpx2.post(server.url + "/v1/completions", content=content, headers={"Content-Length": str(len(content))})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    assert_answers(server)


@pytest.mark.parametrize("model_name", [1, True, ["tiny"], {"tiny": 1}, 0.5])
def test_a_model_that_is_no_name_is_refused(server, model_name):
    answer = post(server, "/v1/completions", prompt=ROW, model=model_name)
    assert answer.status_code == 400
    assert "it must be a name" in answer.json()["error"]["message"]


def test_whole_characters_that_json_spells_in_halves_are_texts(server):
    content = b'{"prompt": "\\ud83d\\ude00", "return_token_ids": true}'
    answer = httpx2.post(server.url + "/v1/completions", content=content)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["prompt_token_ids"] == tiny.teacher_tokenizer()("\U0001f600").input_ids


def test_json_is_read_and_written_beside_the_loop(server, monkeypatch):
    threads = []
    for name in ("json_of", "_content"):
        own = getattr(serve, name)

        def watched(*args, own=own):
            threads.append(threading.current_thread().name)
            return own(*args)

        monkeypatch.setattr(serve, name, watched)
    assert_answers(server)
    assert [name.startswith("json") for name in threads] == [True, True]


def test_reading_json_looks_for_no_cycles():
    seen = []
    gc.callbacks.append(lambda *what: seen.append(what))
    try:
        assert len(serve.json_of(b"[" + b"[]," * 10**5 + b"[]]")) == 10**5 + 1
        during = list(seen)
        with pytest.raises(RefusedError):
            serve.json_of(b"[" * 10)
        assert gc.isenabled()
    finally:
        gc.callbacks.pop()
    assert not during


def test_connections_that_wait_make_room(model):
    with serving(model, limits=Limits(max_connections=4)) as server:
        idle = [connect(server) for _ in range(12)]
        assert_answers(server)
        assert rest(idle[0]) == b""
        for connection in idle:
            connection.close()


def test_connections_at_work_are_not_cut_for_others(model):
    with serving(model, limits=Limits(max_connections=2)) as server:
        with ThreadPoolExecutor(2) as pool, held(server):
            first = [pool.submit(assert_answers, server) for _ in range(2)]
            until(lambda: len(server._server.server_state.tasks) == 2)
            with connect(server) as third:
                assert message(rest(third), 503) == "2 requests are at work already"
        for one in first:
            one.result()
        until(lambda: not server._server.server_state.connections)
        assert_answers(server)


def test_long_bodies_are_held_up_to_a_bound(model, monkeypatch):
    monkeypatch.setattr(serve, "_BODIES", 1)
    content = json.dumps({"prompt": ROW}).encode().ljust(1000)
    request = head("POST /v1/completions", "Content-Length: 1000", "Connection: close") + content
    with serving(model, limits=Limits(max_body=1000)) as server, connect(server) as first:
        first.sendall(request[:-1])
        until(lambda: server._held == 999)
        with connect(server) as second:
            second.sendall(request[:-500])
            assert message(rest(second), 503) == "too many long requests at a time"
        first.sendall(request[-1:])
        assert rest(first).startswith(b"HTTP/1.1 200 ")
        assert_answers(server)
        assert server._held == 0


def test_what_was_taken_is_answered_before_the_end(model):
    with serving(model) as server, ThreadPoolExecutor(2) as pool:
        with held(server) as (_, seen):
            first = pool.submit(assert_answers, server)
            until(lambda: seen)
            end = pool.submit(server.close, WAIT)
            until(lambda: server._server.should_exit)
        first.result()
        end.result()
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(server.url + "/health")


def test_patience_has_an_end(model):
    with serving(model) as server, ThreadPoolExecutor(1) as pool:
        with held(server) as (_, seen):
            first = pool.submit(post, server, "/v1/completions", prompt=ROW)
            until(lambda: seen)
            server.close(patience=0.1)
            answer = first.result()
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "this server is about to stop"


def test_a_server_that_never_ran_closes(model):
    server = TeacherServer(model, tiny.teacher_tokenizer())
    server.close()
    server.serve_forever()  # returns
    assert not server.scorer._thread.is_alive()

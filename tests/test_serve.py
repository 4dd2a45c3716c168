"""`serve-teacher`: the model's own numbers, and a clear no to what it cannot do."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

import faults
import tiny
import xtokmap
from xtokmap.serve import Limits, Scorer, TeacherServer

KEY = "sk-of-the-server"
ROW = [5, 6, 7, 300, 301]


@pytest.fixture(scope="module")
def model():
    return tiny.teacher_model()


@pytest.fixture(scope="module")
def server(model):
    limits = Limits(max_length=64, max_logprobs=50)
    with faults.serving(model, tiny.teacher_tokenizer(), limits=limits, name="tiny") as server:
        yield server


def post(server, path, **body):
    return httpx.post(server.url + path, json=body)


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


def test_echo_has_the_same_as_texts_or_as_ids(model, server):
    want = rows_of(model, ROW)
    asked = {"prompt": ROW, "echo": True, "logprobs": 2, "max_tokens": 1}
    given = post(server, "/v1/completions", **asked, return_tokens_as_token_ids=True).json()["choices"][0]["logprobs"]
    assert given["tokens"] == [f"token_id:{i}" for i in [*ROW, want[-1].argmax().item()]]
    assert given["token_logprobs"][0] is None
    assert given["top_logprobs"][0] is None
    for i, value in enumerate(given["token_logprobs"][1:-1]):
        assert value == pytest.approx(want[i, ROW[i + 1]].item(), abs=2e-5)
    choice = post(server, "/v1/completions", **asked).json()["choices"][0]
    assert choice["logprobs"]["tokens"] == [tiny.teacher_tokenizer().decode([i]) for i in [*ROW, want[-1].argmax()]]
    assert choice["logprobs"]["token_logprobs"] == given["token_logprobs"]
    assert choice["text"].startswith(tiny.teacher_tokenizer().decode(ROW))
    alone = post(server, "/v1/completions", prompt=ROW, logprobs=2, max_tokens=1).json()["choices"][0]["logprobs"]
    assert alone["token_logprobs"] == [pytest.approx(want[-1].max().item(), abs=2e-5)]


def test_generate_has_triples(model, server):
    asked = {"input_ids": ROW, "sampling_params": {"max_new_tokens": 1}, "return_logprob": True}
    meta = post(server, "/generate", **asked, logprob_start_len=2, top_logprobs_num=2).json()["meta_info"]
    want = rows_of(model, ROW)
    assert [(token, text) for _, token, text in meta["input_token_logprobs"]] == [(7, None), (300, None), (301, None)]
    assert meta["input_token_logprobs"][1][0] == pytest.approx(want[2, 300].item(), abs=2e-5)
    assert [token for _, token, _ in meta["input_top_logprobs"][0]] == want[1].topk(2).indices.tolist()
    assert meta["output_token_logprobs"][0][1] == want[-1].argmax().item()
    assert post(server, "/generate", **asked).json()["meta_info"]["input_token_logprobs"] == []
    both = post(server, "/generate", **{**asked, "input_ids": [ROW, ROW[:2]]}, logprob_start_len=0).json()
    assert [len(answer["meta_info"]["input_token_logprobs"]) for answer in both] == [5, 2]


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
    assert httpx.get(server.url + "/v1/models").json()["data"][0]["id"] == "tiny"
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}


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
        ("/v1/completions", {"prompt": [1], "logprobs": "5"}, 400, "logprobs is '5'"),
        ("/v1/completions", {"prompt": [1], "stream": True}, 400, "stream: this server scores prompts"),
        (
            "/v1/completions",
            {"prompt": [1], "model": "big"},
            404,
            "the model 'big' does not exist; this server has 'ti",
        ),
        ("/generate", {"input_ids": [1], "sampling_params": 3}, 400, "sampling_params must be a JSON object"),
        ("/generate", {"input_ids": [999]}, 400, "input_ids[0] is 999"),
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
    for path in ("/v1/completions", "/generate"):
        answer = httpx.post(server.url + path, content=content)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]


def test_bodies_that_say_no_length_or_too_much(server):
    assert httpx.post(server.url + "/generate", content=iter([b"{}"])).status_code == 411
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    connection.request("POST", "/generate", headers={"Content-Length": str(2**40)})
    answer = connection.getresponse()
    assert answer.status == 413
    answer.read()
    connection.close()


def test_the_key_opens_everything_but_health(model):
    with faults.serving(model, tiny.teacher_tokenizer(), key=KEY) as server:
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": KEY}):
            answer = httpx.get(server.url + "/v1/models", headers=headers)
            assert answer.status_code == 401
            assert KEY not in answer.text
        assert httpx.get(server.url + "/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        assert httpx.get(server.url + "/health").status_code == 200


def test_requests_that_wait_share_a_pass(model):
    with faults.serving(model, tiny.teacher_tokenizer(), limits=Limits(max_batch=8)) as server:
        first = server.scorer.batches
        answer = post(server, "/v1/completions", prompt=[ROW[: 2 + b % 4] for b in range(40)], prompt_logprobs=0)
        assert len(answer.json()["choices"]) == 40
        assert 5 <= server.scorer.batches - first <= 12


def test_a_full_queue_asks_to_come_back(model, monkeypatch):
    scorer = Scorer(model, Limits(max_queue=1))
    scorer.close()  # nobody takes anything from now on
    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        own, server.scorer = server.scorer, scorer
        scorer.submit([1], 0)
        answer = post(server, "/generate", input_ids=[1])
        server.scorer = own
    assert answer.status_code == 429
    assert answer.headers["Retry-After"] == "1"
    assert "1 requests wait already" in answer.json()["error"]["message"]


def test_a_pass_that_fails_costs_the_request_that_is_to_blame(model):
    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        score = server.scorer._score

        def fails(rows, topk):
            if any(13 in row for row in rows):
                raise RuntimeError("out of\nmemory")
            return score(rows, topk)

        server.scorer._score = fails
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda i: post(server, "/generate", input_ids=[i, 1]), range(8, 16)))
    assert [answer.status_code for answer in found] == [200] * 5 + [500] + [200] * 2
    assert found[5].json()["error"]["message"] == "the model failed: out of memory"


def test_limits_and_addresses_that_cannot_be_are_named(model, server):
    with pytest.raises(xtokmap.XTokMapError, match="max_batch=0: must be at least 1"):
        Limits(max_batch=0)
    port = int(server.url.rpartition(":")[2])
    for bad in (port, 2**20):
        with pytest.raises(xtokmap.XTokMapError, match=f"cannot listen on 127.0.0.1:{bad}"):
            TeacherServer(model, tiny.teacher_tokenizer(), port=bad)


def test_the_command_serves_until_it_is_told_to_stop(tmp_path):
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
        answer = httpx.post(url + "/v1/completions", json=body, headers=headers, timeout=60)
        assert len(json.loads(answer.text)["choices"][0]["prompt_logprobs"]) == 5
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "stopped after 1 answers\n"
        assert process.wait() == 0


def test_the_command_names_what_is_wrong(tmp_path, capsys):
    from xtokmap.__main__ import main

    assert main(["serve-teacher", "--model", str(tmp_path / "none")]) == 2
    assert "none: no such model" in capsys.readouterr().err
    assert main(["serve-teacher", "--model", "x", "--max-batch", "0"]) == 2
    assert "max_batch=0" in capsys.readouterr().err

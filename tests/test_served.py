"""A served teacher says what a local one says, over every protocol, whatever goes wrong on the way."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from dataclasses import replace
from email.utils import formatdate

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import faults
import killable
import tiny
import xtokmap
from xtokmap import Aligner
from xtokmap.chat import render
from xtokmap.losses.credit import chunk_credit
from xtokmap.losses.strict import strict_kl
from xtokmap.teachers import client as served
from xtokmap.teachers.client import PROTOCOLS, Client, RowRefusedError, TeacherError
from xtokmap.teachers.http1 import Answer
from xtokmap.teachers.local import LocalTeacher
from xtokmap.teachers.remote import ServerTeacher
from xtokmap.torch.index import ChunkIndex, VocabTensors
from xtokmap.torch.logits import Logits
from xtokmap.train import run as running
from xtokmap.train.config import Config
from xtokmap.train.generation import sample
from xtokmap.train.loop import Run, train
from xtokmap.train.prompts import read_prompts
from xtokmap.train.sampling import Roller
from xtokmap.train.step import update
from xtokmap.train.support.checkpoint import found
from xtokmap.train.support.overlap import Scoring

pytestmark = pytest.mark.filterwarnings("ignore:fastokens gives other ids")

KEY = "sk-not-to-be-seen-0123456789"
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
COMPLETIONS = [[300, 301], [], [20, 21, 22, 23]]
FAST = {"pause": 0.001, "timeout": 20.0, "patience": 0.0}


@pytest.fixture(scope="module")
def model():
    return tiny.teacher_model()


@pytest.fixture(autouse=True)
def _no_look_again(monkeypatch):
    """Requests are counted here: none more to see whether the model is the same (tests/test_waiting.py)."""
    monkeypatch.setattr(Client, "remember", lambda *args: None)


@pytest.fixture(scope="module")
def server(model):
    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        yield server


def teacher_of(server, **options):
    return ServerTeacher(server.url, tiny.teacher_tokenizer(), **{**FAST, **options})


@pytest.fixture(scope="module")
def batch():
    """Samples of the student, retokenized: prompts and completions in the teacher's ids, their index and queries."""
    student, tokenizer = tiny.student_model(), tiny.student_tokenizer()
    torch.manual_seed(3)
    aligner = Aligner(tokenizer, tiny.teacher_tokenizer())
    asked = ["the sky", "the dog", "a fox?", "1 + 2", "hello"]
    ids, _ = sample(student, render(tokenizer, asked), aligner.student.stop_ids, Config(max_new_tokens=24))
    teacher_ids, aligned = aligner.retokenize(ids)
    prompts = render(tiny.teacher_tokenizer(), asked)
    rows = [row.tolist() for row in teacher_ids]
    return prompts, rows, ChunkIndex.from_alignment(aligned), aligner.cover_queries(aligned)


# ---- the same scores ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [*PROTOCOLS, "auto"])
def test_scores_are_the_local_teachers(model, server, protocol):
    teacher = teacher_of(server, protocol=protocol)
    want = LocalTeacher(model, tiny.teacher_tokenizer()).score(PROMPTS, COMPLETIONS)
    got = teacher.score(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(got.logprobs, want.logprobs, atol=2e-5, rtol=0)
    assert torch.equal(got.mask, want.mask)
    assert got.logprobs.dtype == torch.float32
    assert got.transferred is None
    assert teacher.client.protocol == ("vllm" if protocol == "auto" else protocol)
    assert teacher.self_test() is None


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_cover_from_all_of_every_row_is_the_local_one(model, server, batch, protocol):
    prompts, rows, index, queries = batch
    want = LocalTeacher(model, tiny.teacher_tokenizer()).score(prompts, rows, queries=queries)
    teacher = teacher_of(server, protocol=protocol, topk=model.config.vocab_size)
    got = teacher.score(prompts, rows, queries=queries)
    torch.testing.assert_close(got.logprobs, want.logprobs, atol=2e-5, rtol=0)
    torch.testing.assert_close(got.transferred, want.transferred, atol=1e-4, rtol=0, equal_nan=True)
    own = torch.full(index.student_chunk.shape, -3.0)
    credits = [chunk_credit(own, s.logprobs, index, "cover", s.transferred) for s in (got, want)]
    torch.testing.assert_close(credits[0].advantages, credits[1].advantages, atol=1e-4, rtol=0)
    assert torch.equal(credits[0].scored, credits[1].scored)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_small_k_leaves_mass_out_and_never_the_token_that_is_there(model, server, batch, protocol):
    prompts, rows, _, queries = batch
    whole = LocalTeacher(model, tiny.teacher_tokenizer()).score(prompts, rows, queries=queries)
    teacher = teacher_of(server, protocol=protocol, topk=2)
    got = teacher.score(prompts, rows, queries=queries)
    torch.testing.assert_close(got.logprobs, whole.logprobs, atol=2e-5, rtol=0)
    assert (got.missing[got.mask] > 1e-3).all()
    assert (got.missing[~got.mask] == 0).all()
    known = torch.isfinite(whole.transferred)
    assert (torch.isnan(got.transferred) == torch.isnan(whole.transferred)).all()
    assert (got.transferred[known] < whole.transferred[known] - 1e-3).any()
    # Each row: the two likeliest, and the token that is there; the rest of the mass is not shown.
    answer = teacher.client.score([prompts[0] + rows[0]], topk=2)[0]
    ids = [*prompts[0], *rows[0]]
    for i in range(1, len(ids)):
        shown = answer.top_ids[i][answer.top_ids[i] >= 0]
        assert ids[i] in shown
        assert 2 <= len(shown) <= 3
        assert np.exp(answer.top_logprobs[i][: len(shown)]).sum() < 1 - 1e-3


def test_strict_kl_from_all_of_every_row_is_the_local_one(model, server, batch):
    prompts, rows, index, _ = batch
    got = teacher_of(server, protocol="vllm", topk=model.config.vocab_size).score(prompts, rows, keep=True)
    assert got.transferred is None
    assert got.top.shape == got.mask.shape
    assert got.missing.abs().max() < 1e-5
    maps = VocabTensors.from_map(Aligner(tiny.student_tokenizer(), tiny.teacher_tokenizer()).vocab_map)
    torch.manual_seed(0)
    student = Logits(torch.randn(*index.student_chunk.shape, len(tiny.student_tokenizer())))
    local = LocalTeacher(model, tiny.teacher_tokenizer())
    whole = torch.zeros(*got.mask.shape, model.config.vocab_size)
    for b, row in enumerate(rows):
        whole[b, : len(row)] = local.rows([prompts[b]], [row]).slice(0, len(row))
    losses = [strict_kl(student, teacher, index, maps, k=None) for teacher in (got.top, Logits(whole))]
    assert losses[0].loss.item() == pytest.approx(losses[1].loss.item(), abs=1e-4)
    assert losses[0].loss.item() > 0.1


def test_what_cannot_be_asked_is_named(server, batch):
    prompts, rows, _, queries = batch
    with pytest.raises(xtokmap.XTokMapError, match="queries need rows: set topk"):
        teacher_of(server, topk=0).score(prompts, rows, queries=queries)
    with pytest.raises(xtokmap.XTokMapError, match="queries are of other completions"):
        teacher_of(server).score(prompts, [*rows[1:], rows[0]], queries=queries)
    with pytest.raises(xtokmap.XTokMapError, match=r"prompt_ids\[1\] is empty"):
        teacher_of(server).score([[1], []], [[2], [3]])


# ---- faults ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_passing_fault_is_survived(model, protocol, fault):
    plan = faults.Plan()
    want = LocalTeacher(model, tiny.teacher_tokenizer()).score(PROMPTS, COMPLETIONS).logprobs
    with faults.serving(model, tiny.teacher_tokenizer(), plan) as server:
        # A slow answer runs into its time-out here.
        teacher = teacher_of(server, protocol=protocol, timeout=0.3 if fault == "slow" else 20.0)
        teacher.client.connect(PROMPTS[0])
        plan.faults = [fault, None, fault]
        got = teacher.score(PROMPTS, COMPLETIONS).logprobs
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    assert plan.log == [fault] * 2
    figures = teacher.client.figures
    assert figures["answers"] == 1 + 2
    names = {"429": "status 429", "429 in 0.05 s": "status 429", "500": "status 500", "503": "status 503"}
    names |= {"no answer": "connection", "cut body": "connection", "slow": "time-out"}
    assert figures[names.get(fault, "bad answer")] == 2


@pytest.mark.parametrize(
    ("fault", "protocol", "message"),
    [
        ("500", "vllm", "gave up after 3 attempts, the last: status 500: 500 of"),
        ("429", "sglang", r"the last: status 429: .*; ask for less at a time \(teacher_concurrency\)"),
        ("no answer", "vllm", "the last: the connection failed"),
        ("cut body", "vllm", "the last: the connection failed"),
        ("slow", "openai", r"the last: no whole answer within 0\.3 s; set a longer teacher_timeout, or ask"),
        ("broken JSON", "vllm", "bytes that are no JSON"),
        ("NaN", "vllm", "NaN in it, which is no JSON"),
        ("NaN", "sglang", "NaN in it, which is no JSON"),
        ("positive", "openai", r"row 3 has logprob 0\.5"),
        ("one row short", "vllm", "prompt_logprobs has 5 rows for 6 tokens"),
        ("one row short", "sglang", "input_token_logprobs has 5 rows for 6 tokens"),
        ("one row short", "openai", r"5 logprobs\.tokens for 6 ids"),
        ("shifted", "vllm", r"row 0 of prompt_logprobs is not null: rows are shifted"),
        ("shifted", "sglang", r"input_token_logprobs\[0\] is of token 9; 8 is there"),
        ("shifted", "openai", r"token_logprobs\[0\] is not null: rows are shifted"),
        ("other ids", "vllm", "prompt_token_ids are not the ids that were sent"),
        ("other ids", "sglang", r"input_token_logprobs\[3\] is of token 21; 20 is there"),
        ("other ids", "openai", r"logprobs.tokens\[0\] is token 9; 8 is there"),
        ("sum above 1", "vllm", r"the probabilities of row 3 add up to 3\.9"),
    ],
)
def test_a_lasting_fault_is_named_and_nothing_is_handed_on(model, fault, protocol, message):
    plan = faults.Plan()
    with faults.serving(model, tiny.teacher_tokenizer(), plan) as server:
        teacher = teacher_of(server, protocol=protocol, retries=2, timeout=0.3 if fault == "slow" else 20.0)
        teacher.client.connect([8, 9])
        plan.faults = [fault] * 3
        with pytest.raises(TeacherError, match=message) as caught:
            teacher.client.score([[8, 9, 10, 20, 21, 22]], topk=3)
    assert str(caught.value).startswith(server.url)
    assert "\n" not in str(caught.value)
    assert plan.log == [fault] * 3


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ({"model": "other"}, [[1, 2]], "status 404: the model 'other' does not exist.*teacher_model"),
        ({}, [[1, 2**20]], r"status 400: prompt\[1\] is 1048576; the model has token ids 0 to"),
        ({}, [[1] * 60], "status 400: prompt has 60 tokens, and 1 new; the model takes 50"),
    ],
)
def test_what_cannot_get_better_is_asked_once(model, options, rows, message):
    with faults.serving(model, tiny.teacher_tokenizer(), limits=xtokmap_limits(max_length=50)) as server:
        client = teacher_of(server, protocol="vllm", **options).client
        client.model = client.model or "teacher"
        with pytest.raises(TeacherError, match=message):
            client.score(rows)
    assert client.figures["requests"] == 1


def xtokmap_limits(**values):
    from xtokmap.teachers.scorer import Limits

    return Limits(**values)


def test_no_request_is_lost_and_none_is_doubled(model):
    rng = np.random.default_rng(0)
    rows = [[b // 100, b % 100, *rng.integers(4, 300, 6).tolist()] for b in range(300)]
    local = LocalTeacher(model, tiny.teacher_tokenizer())
    want = local.score([row[:1] for row in rows], [row[1:] for row in rows]).logprobs
    passing = [name for name in faults.FAULTS if name not in ("slow", "429 in 0.05 s")]
    plan = faults.Plan(rate=0.2, names=passing)
    with faults.serving(model, tiny.teacher_tokenizer(), plan) as server:
        client = Client(server.url, protocol="vllm", model="teacher", retries=12, **FAST)
        answers = client.score(rows, topk=2)
    got = torch.from_numpy(np.stack([answer.logprobs[1:] for answer in answers]))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    assert len(plan.log) > 30
    assert client.figures["answers"] == 300
    assert client.figures["requests"] == 300 + len(plan.log)


def test_requests_at_a_time_are_bound(model):
    most = 0
    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        answer = server.answer

        def watched(*args):
            nonlocal most
            most = max(most, server._busy)
            return answer(*args)

        server.answer = watched
        teacher = teacher_of(server, protocol="vllm", concurrency=3)
        teacher.client.score([[1, 2, 3]] * 40)
    assert 2 <= most <= 3


def test_a_pause_that_the_server_asks_for_is_bounded():
    most = served._LONGEST_ASKED_PAUSE
    assert most <= 60
    assert served._retry_after("1.5") == 1.5
    assert served._retry_after(formatdate(time.time() + 20, usegmt=True)) == pytest.approx(20, abs=5)
    absurd = ("1e9", "1e308", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT", "1000000", "1000000.5")
    assert [served._retry_after(text) for text in absurd] == [None, None, most, most, most, most]
    past = ("0", "-0", "-5", "-1e308", formatdate(time.time() - 100, usegmt=True), "Mon, 01 Jan 0001 00:00:00 +2359")
    none = (None, "soon", "nan", "inf", "", "²", "1_0", "1.2.3", "." * 400, "Mon, 99 Jan 2026", "-", "\x00")
    assert [served._retry_after(text) for text in (*past, *none)] == [None] * (len(past) + len(none))


@pytest.mark.parametrize("said", ["0", "-1", "-1e308", "Mon, 01 Jan 2001 00:00:00 GMT", None])
def test_without_a_pause_of_the_servers_there_is_ones_own(said, monkeypatch):
    def speak(sock, head):
        headers = [] if said is None else [f"Retry-After: {said}".encode()]
        sock.sendall(faults.plain(b"{}", *headers, status="429 No"))
        return True

    pauses = []
    monkeypatch.setattr(threading.Event, "wait", lambda event, seconds=None: pauses.append(seconds))
    with faults.talking(speak) as url:
        client = Client(url, protocol="sglang", retries=8, pause=1.0, timeout=20.0)
        with (
            client._connections() as http,
            pytest.raises(TeacherError, match="gave up after 9 attempts, the last: status 429"),
        ):
            client._answer(http, client.question([1, 2]), threading.Event())
    own = [seconds for seconds in pauses if seconds is not None and seconds > 0]
    assert len(own) == 8
    for k, seconds in enumerate(own):
        assert min(2**k, 30) / 2 <= seconds <= min(2**k, 30)


def test_a_pause_is_waited_for(model):
    plan = faults.Plan(["429 in 0.05 s"])
    with faults.serving(model, tiny.teacher_tokenizer(), plan) as server:
        client = teacher_of(server, protocol="sglang").client
        start = time.monotonic()
        client.score([[1, 2, 3]])
        assert client._not_before >= start + 0.05
        assert time.monotonic() >= client._not_before


# ---- lies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("lie", faults.LIES)
def test_a_lie_is_a_bad_answer_and_asked_again(model, protocol, lie):
    plan = faults.Plan()
    want = LocalTeacher(model, tiny.teacher_tokenizer()).score(PROMPTS, COMPLETIONS).logprobs
    with faults.serving(model, tiny.teacher_tokenizer(), plan) as server:
        teacher = teacher_of(server, protocol=protocol, topk=2, timeout=0.5 if lie in faults.SLOW else 20.0)
        teacher.client.connect(PROMPTS[0])
        plan.faults = [lie, None, lie]
        got = teacher.score(PROMPTS, COMPLETIONS, keep=True)
        torch.testing.assert_close(got.logprobs, want, atol=2e-5, rtol=0)
        assert plan.log == [lie] * 2
        figures = dict(teacher.client.figures)
        kinds = {*figures} - {"requests", "answers"}
        assert sum(figures[kind] for kind in kinds) == 2
        assert kinds <= {"bad answer", "connection", "time-out", "status 429", "status 500", "status 503"}
        # And for good: an error of ours, in one line that can be shown.
        teacher.client.retries = 1
        plan.faults = [lie] * 2
        with pytest.raises(TeacherError, match="gave up after 2 attempts, the last: ") as caught:
            teacher.client.score([[8, 9, 10, 20]], topk=2)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def vllm(rows, **more):
    return {"choices": [{"prompt_logprobs": rows, **more}]}


def sglang(rows, tops=None):
    return {"meta_info": {"input_token_logprobs": rows, "input_top_logprobs": tops}}


def openai(tokens, values, tops):
    return {"choices": [{"logprobs": {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}}]}


IDS = [5, 6]
OWN = {"logprob": -1.0, "decoded_token": "b"}
NAMED = ["token_id:5", "token_id:6"]
DEEP = "[" * 900 + "]" * 900


@pytest.mark.parametrize(
    ("protocol", "answer", "message"),
    [
        ("vllm", "[" * 100_000, "more lists"),
        ("vllm", "[" * 20_000, "nested too deeply"),
        ("vllm", '{"a":' * 20_000, "nested too deeply"),
        ("vllm", vllm([None, {"6": {"logprob": 10**400}}]), "row 1 has logprob an integer of 1329 bits"),
        ("vllm", '{"choices":[{"prompt_logprobs":[null,{"6":{"logprob":-' + "1" * 5000 + "}}]}]}", "no JSON"),
        ("vllm", vllm([None, {"6": OWN, " 6": OWN}]), "' 6' is no token id"),
        ("vllm", vllm([None, {"6": OWN, "06": OWN}]), "'06' is no token id"),
        ("vllm", vllm([None, {"6": OWN, "+6": OWN}]), r"'\+6' is no token id"),
        ("vllm", vllm([None, {"6": OWN, "1_0": OWN}]), "'1_0' is no token id"),
        ("vllm", vllm([None, {"6": OWN, "٦": OWN}]), "is no token id"),
        ("vllm", vllm([None, {"6": OWN, "6\n": OWN}]), r"'6\\n' is no token id"),
        ("vllm", vllm([None, {"6": OWN, "4294967302": OWN}]), "'4294967302' is no token id"),
        ("vllm", vllm([None, {"6": OWN, "100": {"logprob": -9.0}}]), "token 100 is among .*; the vocabulary has 100"),
        ("vllm", '{"choices":[{"prompt_logprobs":[null,{"6":{"logprob":-1},"6":{"logprob":-2}}]}]}', "a name twice"),
        ("vllm", vllm([None, {str(k): {"logprob": -9.0} for k in range(50)}]), "row 1 has 50 tokens; 3 and the one"),
        ("vllm", vllm([None, {"6": {**OWN, "decoded_token": 7}}]), "row 1 has 7 for a text"),
        ("vllm", vllm([None, {"6": {**OWN, "decoded_token": "\ud800"}}]), "half a surrogate pair"),
        ("vllm", vllm([None, {"6": {"logprob": True}}]), "row 1 has True for a logprob"),
        ("vllm", vllm([None, {"6": {"logprob": "-1"}}]), "row 1 has '-1' for a logprob"),
        ("vllm", vllm([None, {"6": [-1.0]}]), "row 1 of prompt_logprobs does not have token 6"),
        ("vllm", vllm([None, [["6", -1.0]]]), "row 1 of prompt_logprobs does not have token 6"),
        ("vllm", vllm({"0": None, "1": {"6": OWN}}), "prompt_logprobs is a dict of 2 for 2 tokens"),
        ("vllm", '{"choices":[{"prompt_logprobs":' + DEEP + "}]}", "prompt_logprobs has 1 rows|nested too deeply"),
        ("vllm", vllm([None, {"6": OWN}], prompt_token_ids=7), "not the ids that were sent"),
        ("vllm", {"choices": {"0": {}}}, "not one choice"),
        ("vllm", {"choices": [[]]}, "not one choice"),
        ("vllm", "7", "not one choice"),
        ("vllm", '"' + "\\ud83d" + '"', "half a surrogate pair"),
        ("sglang", '{"meta_info":{"input_token_logprobs":[[null,5],[-1.0,Infinity]]}}', "Infinity in it"),
        ("sglang", '{"meta_info":{"input_token_logprobs":[[null,5],[-1.0,1e999]]}}', "inf, which is no token id"),
        ("sglang", sglang([[None, 5], [-1.0, 6.9]]), "6.9, which is no token id"),
        ("sglang", sglang([[None, 5], [-1.0, 6.0]]), "6.0, which is no token id"),
        ("sglang", sglang([[None, 5], [-1.0, "6"]]), "'6', which is no token id"),
        ("sglang", sglang([[None, 5], [-1.0, True]]), "True, which is no token id"),
        ("sglang", sglang([[None, 5], [-1.0, None]]), "None, which is no token id"),
        ("sglang", sglang([[None, 5], [-1.0, 10**400]]), "an integer of 1329 bits, which is no token id"),
        ("sglang", sglang([[None, 5], [-1.0, 6, ["b"]]]), "has a list of 1 for a text"),
        ("sglang", sglang([[None, 5], {"0": -1.0, "1": 6}]), "is a dict of 2, not"),
        ("sglang", sglang([[None, 5], [-1.0, 6]]), "input_top_logprobs is None for 2 tokens"),
        ("sglang", sglang([[None, 5], [-1.0, 6]], [None, None]), r"input_top_logprobs\[1\] is None, not a list"),
        ("sglang", sglang([[None, 5], [-1.0, 6]], [None, 7]), r"input_top_logprobs\[1\] is 7, not a list"),
        ("sglang", sglang([[None, 5], [-1.0, 6]], [None, [[-1.0, 6], [-1.0, 6]]]), "has a token twice"),
        ("sglang", sglang([[None, 5], [-1.0, 6]], [None, [[-9.0, 100]]]), "token 100 is among"),
        ("sglang", sglang([[None, 5], [-1.0, 6]], [None, [[None, 7]]]), "row 1 has None for a logprob"),
        ("sglang", {"meta_info": [1]}, "no meta_info"),
        ("openai", openai(NAMED, [None, -1.0], [None, None]), r"top_logprobs\[1\] is None, not a mapping"),
        ("openai", openai(NAMED, [None, -1.0], None), "top_logprobs is None for 2 tokens"),
        ("openai", openai(NAMED, [None, -1.0], [None, {"token_id:06": -1.0}]), "'06' is no token id"),
        ("openai", openai(NAMED, [None, -1.0], [None, {"token_id:100": -9.0}]), "token 100 is among"),
        ("openai", openai(NAMED, [None, -1.0], [None, {"b": -9.0}]), "tokens without ids"),
        ("openai", openai(["token_id:5", "b"], [None, -1.0], [None, {}]), "are ids, and others are not"),
        ("openai", openai(["token_id:5", 6], [None, -1.0], [None, {}]), "has 6 for a text"),
        ("openai", openai([["a"], "b"], [None, -1.0], [None, {}]), "has a list of 1 for a text"),
        ("openai", openai(NAMED, [None, [-1.0]], [None, {}]), "row 1 has a list of 1 for a logprob"),
        ("openai", {"choices": [{"logprobs": {"tokens": {"0": 1}}}]}, "no logprobs.tokens"),
    ],
)
def test_smallest_lies(protocol, answer, message):
    content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
    client = Client("http://127.0.0.1:9", protocol=protocol, vocab_size=100)

    class Said:
        def ask(self, *args, **kwargs):
            return Answer(200, {}, content)

    client.retries, client.pause = 1, 0.0
    with pytest.raises(TeacherError, match=f"gave up after 2 attempts, the last: .*({message})"):
        client._answer(Said(), client.question(IDS, 3), threading.Event())
    assert client.figures["bad answer"] == 2


def test_pairs_of_surrogates_and_escaped_backslashes_are_no_lies():
    text = r'{"a": "\ud83d\ude00 \\ud83d \\\ud83d\ude00 \u00e9 \"", "b": "\\"}'
    assert served._json(text.encode(), 10_000) == {"a": '😀 \\ud83d \\😀 é "', "b": "\\"}


def test_a_check_that_is_missing_costs_no_run(model, monkeypatch):
    def broken(*args):
        raise OverflowError

    monkeypatch.setattr(served, "_checked", broken)
    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        teacher = teacher_of(server, protocol="vllm", retries=1)
        with pytest.raises(TeacherError, match=r"gave up after 2 attempts.*OverflowError on reading it"):
            teacher.client.score([[1, 2, 3]])


@pytest.mark.parametrize(
    "content",
    [
        b'{"data": [{"id": 7}]}',
        b'{"data": [{"id": 7}, {"id": "a"}]}',
        b'{"data": [{"id": ["a"]}]}',
        b'{"data": [{"id": ""}]}',
        b'{"data": [{"id": "' + b"a" * 2000 + b'"}]}',
        b'{"data": [{"id": "\\ud800"}]}',
        b'{"data": [7]}',
        b'{"data": [{}]}',
        b'{"data": {"id": "a"}}',
        b'{"data": 7}',
        b"[]",
        b"[" * 100_000,
        b"1" * 5000,
    ],
)
def test_lists_of_models_that_are_none(model, content):
    plan = faults.Plan()
    with faults.serving(model, tiny.teacher_tokenizer(), plan) as server:
        plan.lists = [faults.plain(content)]
        client = teacher_of(server, protocol="vllm", retries=1).client
        assert client.connect([1, 2, 3]) == "vllm"
        assert client.model == "teacher"
        assert client.figures["bad answer"] == 1
        plan.lists = [faults.plain(content)] * 2
        with pytest.raises(TeacherError, match="/v1/models: gave up after 2 attempts") as caught:
            teacher_of(server, protocol="vllm", retries=1).client.connect([1, 2, 3])
    assert str(caught.value).isprintable()


def test_what_a_server_says_is_escaped_and_short(model):
    names = json.dumps({"data": [{"id": faults.UGLY + str(k)} for k in range(100)]}).encode()

    def said_of(body, status="400 No"):
        def speak(sock, head):
            sock.sendall(faults.plain(body, status=status))

        with faults.talking(speak) as url, pytest.raises(TeacherError) as caught:
            Client(url, protocol="vllm", key=KEY, **FAST).connect([1, 2])
        return str(caught.value)

    ugly = faults.UGLY + KEY
    bodies = [ugly.encode(), json.dumps({"error": {"message": ugly}}).encode(), json.dumps({"detail": [ugly]}).encode()]
    said = [*map(said_of, bodies), said_of(names, status="200 OK")]
    for text in said:
        assert text.isprintable()
        assert len(text) < 500
        assert KEY not in text
        assert "owned" in text
    assert r"\x1b[2J\x1b]0;owned\x07 \u202eright\u2066 to left [/red] \x9b31m***" in said[0]
    # Not even the beginning of a key that is cut off.
    assert KEY[:10] not in said_of(b"x" * (served._LONGEST_TEXT - 15) + KEY.encode())
    assert KEY[:10] not in said_of(json.dumps({"detail": "y" * 290 + KEY}).encode())


def test_words_of_a_server_are_no_markup():
    from rich.console import Console
    from rich.progress import Progress as Bar

    from xtokmap.train.support.progress import Progress

    progress = Progress(1)
    progress.bar = Bar(console=Console(width=200, force_terminal=True, record=True))
    progress.say(f"before: not evaluated: {served._escaped(faults.UGLY)} [/no]")
    assert "[/red] \\x9b31m [/no]" in progress.bar.console.export_text()


# ---- who is a teacher --------------------------------------------------------------------------------------------


def altered(server, change):
    """Answers of a real server, changed one and all."""
    answer = server.answer

    def changed(method, path, body):
        found = answer(method, path, body)
        return change(found, body) if method == "POST" else found

    server.answer = changed


def shift(by):
    def change(found, body):
        rows = found["choices"][0]["prompt_logprobs"]
        later = rows[by:] + rows[1 : 1 + by] if by > 0 else [None, *rows[1 : 1 - by], *rows[1:by]]
        found["choices"][0]["prompt_logprobs"] = [None, *later[1:]] if by > 0 else later
        return found

    return change


@pytest.mark.parametrize("by", [1, 2, -1])
def test_shifted_rows_are_found_where_ids_do_not_show_them(model, by):
    # Every row has every token: the ids fit whichever row it is.
    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        altered(server, shift(by))
        teacher = teacher_of(server, protocol="vllm", topk=model.config.vocab_size)
        with pytest.raises(TeacherError, match=r"first .* to change is .*: rows are shifted"):
            teacher.self_test()


@pytest.mark.parametrize("by", [1, -1])
def test_shifted_logprobs_are_found_where_there_is_nothing_else(model, by):
    def change(found, body):
        rows = found["choices"][0]["logprobs"]["token_logprobs"]
        moved = [*rows[2:], -1.0] if by > 0 else [-1.0, *rows[1:-1]]
        found["choices"][0]["logprobs"]["token_logprobs"] = [None, *moved]
        return found

    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        altered(server, change)
        with pytest.raises(TeacherError, match=r"first token to change is .*: rows are shifted"):
            teacher_of(server, protocol="openai", topk=0).self_test()


def test_tokens_that_are_looked_up_in_the_next_row_are_found(model):
    """What llama-cpp-python 0.3 does with `echo`: the logprob of each token after itself."""
    teacher = LocalTeacher(model, tiny.teacher_tokenizer())

    def change(found, body):
        ids = body["prompt"]
        rows = torch.cat([teacher.rows([ids[:1]], [ids[1:]]).slice(0, len(ids)).log_softmax(-1)])
        given = found["choices"][0]["logprobs"]
        given["token_logprobs"] = [None, *(rows[i, token].item() for i, token in enumerate(ids) if i), -1.0]
        given["top_logprobs"] = [None, *({"?": rows[i].max().item()} for i in range(1, len(ids))), None]
        given["tokens"] = [tiny.teacher_tokenizer().decode([i]) for i in [*ids, 5]]
        return found

    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        altered(server, change)
        with pytest.raises(TeacherError, match=r"first row to change is .*: rows are shifted"):
            teacher_of(server, protocol="openai", topk=0).self_test()


def test_a_server_that_does_not_repeat_itself_is_refused(model):
    calls = 0

    def change(found, body):
        nonlocal calls
        calls += 1
        for row in found["choices"][0]["prompt_logprobs"][1:]:
            for entry in row.values():
                entry["logprob"] -= calls
        return found

    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        altered(server, change)
        with pytest.raises(TeacherError, match=r"the same ids have logprobs that differ by [0-9.]+ nats"):
            teacher_of(server, protocol="vllm").self_test()


@pytest.mark.parametrize("back", [1, 2])
def test_a_row_that_is_rounded_otherwise_is_not_the_change_that_is_due(model, back):
    """bfloat16 in batches of other sizes: all rows before are the same to the bit, but one of the last before it."""
    known, others = [], []

    def change(found, body):
        ids = body["prompt"]
        if len(ids) > 8:  # not the question that finds the protocol
            known[:] = known or ids
            if ids != known:
                others.append(ids)
                for entry in found["choices"][0]["prompt_logprobs"][len(ids) // 2 - back].values():
                    entry["logprob"] -= 0.0005
        return found

    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        altered(server, change)
        assert teacher_of(server, protocol="vllm", concurrency=1).self_test() is None
    assert len(others) == 4
    assert all(ids[: len(ids) // 2] == known[: len(ids) // 2] for ids in others)


def test_another_vocabulary_is_refused(model):
    with faults.serving(model, tiny.student_tokenizer()) as server:  # spells the model's ids as another would
        teacher = ServerTeacher(server.url, tiny.teacher_tokenizer(), protocol="vllm", **FAST)
        with pytest.raises(TeacherError, match=r"in the tokenizer of --teacher: these are two vocabularies"):
            teacher.self_test()


def test_what_cannot_be_told_is_said(model):
    def change(found, body):
        for row in found["choices"][0]["prompt_logprobs"][1:]:
            for entry in row.values():
                entry["logprob"] = -6.0
        return found

    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        altered(server, change)
        assert "whether rows are shifted is not known" in teacher_of(server, protocol="vllm", topk=0).self_test()


def test_texts_for_ids_are_checked_by_their_bytes(model):
    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        answer = server.answer

        def as_texts(method, path, body):
            return answer(method, path, {k: v for k, v in (body or {}).items() if k != "return_tokens_as_token_ids"})

        server.answer = as_texts
        teacher = teacher_of(server, protocol="openai", topk=0)
        want = LocalTeacher(model, tiny.teacher_tokenizer()).score(PROMPTS, COMPLETIONS).logprobs
        torch.testing.assert_close(teacher.score(PROMPTS, COMPLETIONS).logprobs, want, atol=2e-5, rtol=0)
        assert teacher.self_test() is None
        with pytest.raises(TeacherError, match=r"its top k cannot be used; set teacher_topk=0"):
            teacher_of(server, protocol="openai", topk=3).self_test()
        altered(server, lambda found, body: json.loads(json.dumps(found).replace("he", "it")))
        teacher = teacher_of(server, protocol="openai", topk=0, retries=0)
        with pytest.raises(TeacherError, match=r"logprobs.tokens\[.*; token .* spells"):
            teacher.self_test()


def test_what_has_no_mass_is_minus_infinity(model):
    def change(found, body):
        found["choices"][0]["prompt_logprobs"][2][str(body["prompt"][2])]["logprob"] = -9999.0
        return found

    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        altered(server, change)
        answer = teacher_of(server, protocol="vllm").client.score([[1, 2, 3]])[0]
    assert math.isnan(answer.logprobs[0])
    assert answer.logprobs[2] == -math.inf
    assert math.isfinite(answer.logprobs[1])


def test_a_row_that_the_server_cuts_is_left_out_as_a_row(model):
    """SGLang's --allow-auto-truncate, which its own refusal advises."""

    def cut(found, body):
        meta = found["meta_info"]
        if len(body["input_ids"]) > 5:
            meta["prompt_tokens"] = 5
            meta["input_token_logprobs"] = meta["input_token_logprobs"][:5]
        return found

    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        altered(server, cut)
        client = teacher_of(server, protocol="sglang").client
        with pytest.raises(RowRefusedError, match=r"1 of 2 rows.*cuts it to 5 of its 6 tokens.*--allow-auto-truncate"):
            client.score([[1, 2, 3], [1, 2, 3, 4, 5, 6]])
        assert client.figures["requests"] == 2


def test_nobody_there_is_named():
    class Gone:
        url = "http://127.0.0.1:9"

    for protocol in ("auto", "sglang"):
        teacher = teacher_of(Gone, protocol=protocol, retries=1)
        with pytest.raises(
            TeacherError, match=r"http://127\.0\.0\.1:9/.*gave up after 2 attempts.*connection failed.*; is it st"
        ):
            teacher.self_test()


def test_a_page_for_people_is_repeated_without_its_markup(model):
    """Of a proxy, or of a server that is none."""
    page = b"<!DOCTYPE html>\n<html><head><title>Not here</title></head>\n<body><h1 class='a'>Go &amp; away</h1><p<"
    plan = faults.Plan()
    with faults.serving(model, tiny.teacher_tokenizer(), plan) as server:
        client = teacher_of(server, protocol="vllm").client
        plan.lists = [faults.plain(page + b"<" * 9, status="403 No")]
        with pytest.raises(TeacherError) as caught:
            client.name_model()
    assert ": refused with status 403: Not here Go & away; set XTOKMAP_TEACHER_KEY" in str(caught.value)


def test_no_protocol_gives_every_ones_reason(model):
    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        altered(server, lambda found, body: {"choices": [{"message": {"content": "Hello!"}}]})
        with pytest.raises(
            TeacherError, match=r"no protocol works here; vllm: .*no prompt_logprobs.*sglang: .*openai: "
        ):
            teacher_of(server).self_test()


# ---- the key -----------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_never_seen(model, prompts, monkeypatch, capsys, recwarn):
    monkeypatch.setenv("XTOKMAP_TEACHER_KEY", KEY)
    plan = faults.Plan()
    with faults.serving(model, tiny.teacher_tokenizer(), plan, key=KEY) as server:
        settings = config(prompts, teacher_url=server.url, teacher_retries=0, teacher_failures=1, eval_samples=0)
        settings = replace(settings, save_every=2)
        teacher = ServerTeacher(server.url, tiny.teacher_tokenizer(), **FAST)
        said = [repr(teacher), repr(teacher.client), repr(settings)]
        plan.faults = [None] * 7 + [None] * 4 + ["500"] + [None] * 20
        # The self-test takes 7 requests; the second step's first request is answered with what was sent.
        result = train(settings, models=tiny.pair())
        said += capsys.readouterr()
        assert re.search(r"a batch has no scores and is left out .*500 of Bearer \*\*\*", "".join(said))
        plan.faults = [None] * 7 + ["500"] * 99
        with pytest.raises(TeacherError, match=r"500 of Bearer \*\*\*") as caught:
            train(replace(settings, output=settings.output + "-ended"), models=tiny.pair())
    said += [str(caught.value), *(str(w.message) for w in recwarn), *capsys.readouterr()]
    files = [path.read_bytes() for path in result.output.rglob("*") if path.is_file()]
    assert plan.seen_keys == {f"Bearer {KEY}"}
    assert all(KEY not in text for text in said)
    assert len(files) > 4
    assert all(KEY.encode() not in content for content in files)
    cause = caught.value
    while cause is not None:  # a traceback shows these, too
        assert KEY not in str(cause)
        cause = cause.__cause__


def test_a_missing_or_wrong_key_is_named(model, monkeypatch):
    with faults.serving(model, tiny.teacher_tokenizer(), key=KEY) as server:
        monkeypatch.delenv("XTOKMAP_TEACHER_KEY", raising=False)
        with pytest.raises(TeacherError, match=r"status 401: .*set XTOKMAP_TEACHER_KEY to the server's key"):
            teacher_of(server, protocol="sglang").self_test()
        with pytest.raises(TeacherError, match=r"status 401: .*the key of XTOKMAP_TEACHER_KEY"):
            teacher_of(server, key="another").self_test()
        assert teacher_of(server, key=KEY).self_test() is None
        with pytest.raises(xtokmap.XTokMapError, match="XTOKMAP_TEACHER_KEY: the key has white space"):
            teacher_of(server, key=KEY + "\n")


# ---- in the loop -------------------------------------------------------------------------------------------------


def config(prompts, **changes) -> Config:
    values = {"prompts": str(prompts), "output": str(prompts.parent / "out"), "steps": 3, "batch_size": 4}
    values |= {
        "max_new_tokens": 12,
        "learning_rate": 3e-3,
        "warmup_steps": 1,
        "micro_batch": 3,
        "device": "cpu",
        "save_every": 0,
        "teacher_patience": 0.0,
    }
    if "teacher_url" in changes:  # what more there is to have is another file's, test_rows.py
        values["teacher_rows"] = "top" if changes.get("teacher_topk", 20) else "none"
    return Config(**{**values, **changes})


def sharp_pair():
    """A teacher that prefers something, so that a wrong row would be seen in the loss."""
    models = tiny.pair()
    with torch.no_grad():
        for p in models[2].parameters():
            p.mul_(2)
    return models


@pytest.mark.parametrize("loss", ["prior", "cover"])
def test_a_run_is_the_local_teachers_run(prompts, loss):
    local = train(config(prompts, loss=loss), models=sharp_pair())
    models = sharp_pair()
    with faults.serving(models[2], models[3]) as server:
        settings = config(prompts, teacher_url=server.url, teacher_topk=len(models[3]) if loss == "cover" else 0)
        assert settings.rule == loss
        found = train(settings, models=(*models[:2], None, models[3]))
    assert len(found.metrics) == 3
    for a, b in zip(found.metrics, local.metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        for name in ("kl_per_byte", "grad_norm", "scored", "response_length"):
            assert a[name] == pytest.approx(b[name], rel=1e-3)
        assert a["skipped_batches"] == 0
        assert a.get("missing", 0) == pytest.approx(0, abs=1e-5)
    assert found.before.kl_per_byte == pytest.approx(local.before.kl_per_byte, rel=1e-4)
    assert found.after.kl_per_byte == pytest.approx(local.after.kl_per_byte, rel=1e-3)


def test_a_lost_batch_is_left_out_and_counted(prompts, model, capsys):
    plan = faults.Plan()
    with faults.serving(model, tiny.teacher_tokenizer(), plan) as server:
        settings = config(prompts, teacher_url=server.url, teacher_retries=0, eval_samples=0, steps=2)
        # The self-test takes 7 requests; then one batch, a lost one, and whatever comes.
        plan.faults = [None] * 7 + [None] * 4 + ["NaN"]  # one is enough: what is not asked yet is given up then
        result = train(settings, models=tiny.pair())
    assert re.search(r"warning: a batch has no scores and is left out .*NaN in it", capsys.readouterr().out)
    assert [line["skipped_batches"] for line in result.metrics] == [0, 1]
    assert all(math.isfinite(line["loss"]) for line in result.metrics)


def test_a_teacher_that_is_gone_ends_the_run_with_what_there_is(prompts, model, capsys):
    plan = faults.Plan()
    with faults.serving(model, tiny.teacher_tokenizer(), plan) as server:
        settings = config(prompts, teacher_url=server.url, teacher_retries=0, teacher_failures=2, eval_samples=0)
        plan.faults = [None] * 7 + [None] * 4 + ["no answer"] * 99
        with pytest.raises(TeacherError, match=r"ended after 1 steps, which are saved in .*3 batches in a row have no"):
            train(settings, models=tiny.pair())
    assert capsys.readouterr().out.count("is left out") == 2
    output = prompts.parent / "out"
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 1
    assert (output / "student" / "model.safetensors").exists()


def test_an_evaluation_that_fails_costs_itself(prompts, model, capsys):
    plan = faults.Plan()
    with faults.serving(model, tiny.teacher_tokenizer(), plan) as server:
        settings = config(prompts, teacher_url=server.url, teacher_retries=0, steps=1)
        plan.faults = [None] * 7 + ["500", "500"]
        result = train(settings, models=tiny.pair())
    assert result.before is None
    assert result.after is not None
    assert "before: not evaluated: " in capsys.readouterr().out


def test_a_server_that_must_not_be_a_teacher_ends_the_run_at_its_start(prompts, model):
    with (
        faults.serving(model, tiny.student_tokenizer()) as server,
        pytest.raises(TeacherError, match="two vocabularies"),
    ):
        train(config(prompts, teacher_url=server.url), models=tiny.pair())
    assert not (prompts.parent / "out").exists()


#: Requests of a run: of the self-test, and of a batch.
TEST, BATCH = 7, 2


def faulty_run(prompts, model, capsys, fault, at):
    """Three steps, an evaluation before and after, and a fault at one request: how many batches it has cost.

    None where it ended the run at its start.
    """
    plan = faults.Plan([None] * at + [fault], slow=3.0)
    # Nothing is asked twice here, so that what is lost can be seen.
    changes = {"teacher_retries": 0, "teacher_concurrency": 1, "batch_size": BATCH}
    changes |= {"teacher_timeout": 1.5 if fault in faults.SLOW else 20.0, "save_every": 2, "max_new_tokens": 6}
    ended = None
    with faults.serving(model, tiny.teacher_tokenizer(), plan) as server:
        settings = config(prompts, teacher_url=server.url, **{**changes, "output": f"{prompts.parent}/out-{at}"})
        try:
            result = train(settings, models=tiny.pair())
        except TeacherError as error:  # and nothing else
            ended = str(error)
    assert plan.log == [fault]
    if ended is not None:
        assert at < TEST, ended
        assert ended.isprintable()
        assert not (prompts.parent / f"out-{at}").exists()
        return None
    assert len(result.metrics) == 3
    assert all(math.isfinite(line["loss"]) for line in result.metrics)
    lost = sum(line["skipped_batches"] for line in result.metrics)
    # With its first request the client looks for a protocol, and finds another one than it would have.
    assert lost + (result.before is None) + (result.after is None) == (at > 0)
    said = capsys.readouterr().out.splitlines()
    assert [line.isprintable() for line in said if "no scores" in line] == [True] * lost
    assert (result.output / "student" / "model.safetensors").exists()
    return lost


KINDS = [*faults.FAULTS, *faults.LIES]


@pytest.mark.parametrize("overlap", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_fault_of_any_kind_costs_its_batch(prompts, model, capsys, overlap):
    plan = faults.Plan()
    with faults.serving(model, tiny.teacher_tokenizer(), plan) as server:
        changes = {"teacher_url": server.url, "teacher_retries": 0, "teacher_concurrency": 1, "batch_size": BATCH}
        changes |= {"teacher_timeout": 1.0, "max_new_tokens": 4, "eval_samples": 0, "steps": len(KINDS)}
        plan.slow = 1.5
        # The last request of a batch fails, and none of the next.
        plan.faults = [None] * TEST + [
            part for kind in KINDS for part in (*[None] * (BATCH - 1), kind, *[None] * BATCH)
        ]
        result = train(config(prompts, overlap=overlap, **changes), models=tiny.pair())
    assert plan.log == KINDS
    assert [line["skipped_batches"] for line in result.metrics] == [1] * len(KINDS)
    assert all(math.isfinite(line["loss"]) for line in result.metrics)
    said = capsys.readouterr().out.splitlines()
    assert [line.isprintable() for line in said if "no scores" in line] == [True] * len(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("fault", KINDS)
def test_a_fault_at_any_request_of_a_run_costs_at_most_its_batch(prompts, model, capsys, fault):
    ends = [faulty_run(prompts, model, capsys, fault, at) for at in range(TEST + 2 + 3 * BATCH + 2)]
    # The evaluations have as many held-out prompts as there are in the file.
    assert ends[0] in (None, 0)
    assert ends[1:] == [None] * (TEST - 1) + [0, 0] + [1] * 3 * BATCH + [0, 0]


def test_a_run_that_cannot_go_on_has_a_checkpoint_of_what_there_is(prompts, model, capsys, recwarn):
    plan = faults.Plan()
    with faults.serving(model, tiny.teacher_tokenizer(), plan) as server:
        settings = config(prompts, teacher_url=server.url, teacher_retries=0, eval_samples=0, save_every=50)
        plan.faults = [None] * (TEST + 4) + ["nested"] * 99
        with pytest.raises(TeacherError, match=r"ended after 1 steps, which are saved in .*4 batches in a row"):
            train(settings, models=tiny.pair())
        plan.faults = []
        result = train(replace(settings, resume=True), models=tiny.pair())
    assert len(result.metrics) == 3
    assert [path.name for path in found(result.output / "checkpoints")]


# ---- overlap -----------------------------------------------------------------------------------------------------


def test_overlapped_samples_are_one_update_old_and_corrected(prompts):
    """Against the same steps, written one after the other: a batch is sampled before the update in front of it."""
    models = sharp_pair()
    settings = config(prompts, loss="prior", steps=4, eval_samples=0, learning_rate=0.02)
    roller = Roller(*models[:2], LocalTeacher(*models[2:]), settings)
    torch.manual_seed(settings.seed)
    run = Run(roller, read_prompts(prompts)[0], watch=False)

    def sampled():
        rollouts = roller.sample(run.draw())
        rollouts.old_logprobs = roller.all_logprobs(rollouts.batch)
        return rollouts

    want, shift = [], 0.0
    following = sampled()
    for step in range(4):
        batch, following = following, sampled() if step < 3 else None
        shift = max(shift, float((roller.all_logprobs(batch.batch) - batch.old_logprobs).abs().max()))
        found = update(roller, roller.score(batch), run.optimizer)
        run.schedule.step()
        want.append((float(found.loss), float(found.grad_norm), batch.lengths))
    assert shift > 0.1  # the policy has moved in between

    served = sharp_pair()
    with faults.serving(served[2], served[3]) as server:
        changed = replace(settings, teacher_url=server.url, overlap=True)
        result = train(changed, models=(*served[:2], None, served[3]))
    for line, (loss, norm, lengths) in zip(result.metrics, want, strict=True):
        assert line["loss"] == pytest.approx(loss, abs=1e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert line["response_length"] == pytest.approx(sum(lengths) / len(lengths))
        assert line["hidden_seconds"] >= 0
    for a, b in zip(models[0].parameters(), served[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_the_next_batch_is_scored_while_this_one_updates(prompts, model, monkeypatch):
    """The second batch's scores wait for the first update: one after the other, neither would ever end."""
    updating = threading.Event()
    waited, scored = [], ServerTeacher.score

    def score(teacher, *args, **kwargs):
        waited.append(updating.wait(20) if waited else True)
        return scored(teacher, *args, **kwargs)

    def updated(*args):
        updating.set()
        return update(*args)

    monkeypatch.setattr(ServerTeacher, "score", score)
    monkeypatch.setattr(running, "update", updated)
    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        train(config(prompts, teacher_url=server.url, overlap=True, eval_samples=0), models=tiny.pair())
    assert waited == [True] * 3


def test_a_lost_batch_is_left_out_with_overlap(prompts, model, capsys):
    plan = faults.Plan()
    with faults.serving(model, tiny.teacher_tokenizer(), plan) as server:
        settings = config(prompts, teacher_url=server.url, teacher_retries=0, eval_samples=0, overlap=True)
        plan.faults = [None] * 7 + [None] * 4 + ["NaN"]  # one is enough: what is not asked yet is given up then
        result = train(settings, models=tiny.pair())
    assert re.search(r"warning: a batch has no scores and is left out .*NaN in it", capsys.readouterr().out)
    assert [line["skipped_batches"] for line in result.metrics] == [0, 1, 0]
    assert all(math.isfinite(line["loss"]) for line in result.metrics)


def test_an_overlapped_run_that_was_stopped_goes_on_to_the_bit(prompts, model, monkeypatch):
    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        settings = config(
            prompts, teacher_url=server.url, overlap=True, eval_samples=0, save_every=50, steps=5, updates=2
        )
        whole = train(replace(settings, output=settings.output + "-whole"), models=tiny.pair())
        with monkeypatch.context() as patch:
            killable.stop_in_step(patch, 3)
            stopped = train(settings, models=tiny.pair())
        assert stopped.interrupted
        assert len(stopped.metrics) == 3
        names = load_file(found(stopped.output / "checkpoints")[-1] / "state.safetensors")
        assert {"ahead.ids.0", "ahead.lengths.0", "ahead.completed.0", "ahead.logprobs.0"} <= set(names)
    torch.manual_seed(99)
    with faults.serving(model, tiny.teacher_tokenizer()) as elsewhere:
        again = replace(settings, resume=True, teacher_url=elsewhere.url, teacher_retries=1, report_every=0)
        assert again.teacher_url != settings.teacher_url
        result = train(again, models=tiny.pair())
    assert len(result.metrics) == 5
    assert killable.left(result.output) == killable.left(whole.output)


def test_a_run_that_ends_gives_up_the_scores_that_it_waits_for(prompts, model):
    plan = faults.Plan()
    with faults.serving(model, tiny.teacher_tokenizer(), plan) as server:
        teacher = teacher_of(server, retries=10**6)
        assert teacher.self_test() is None
        plan.faults = ["500"] * 10**5
        settings = config(prompts, teacher_url=server.url, overlap=True, loss="prior")
        run = Run(Roller(*tiny.pair()[:2], teacher, settings), ["the sky", "the dog"], watch=False)
        run.ahead = Scoring(run.roller, run.roller.sample(run.draw()))
        waiting = run.ahead
        while not plan.log:
            time.sleep(0.001)
        run.close()
        with pytest.raises(TeacherError, match="given up"):
            waiting.wait()


def test_the_tokenizer_is_all_that_is_read_of_the_teacher(prompts, model, tmp_path):
    folder = tmp_path / "teacher"
    tiny.teacher_tokenizer().save_pretrained(folder)
    tiny.student_model().save_pretrained(tmp_path / "student")
    tiny.student_tokenizer().save_pretrained(tmp_path / "student")
    with faults.serving(model, tiny.teacher_tokenizer()) as server:
        names = {"teacher": str(folder), "student": str(tmp_path / "student"), "teacher_url": server.url}
        result = train(config(prompts, steps=1, eval_samples=0, **names))
    assert len(result.metrics) == 1
    saved = json.loads((result.output / "config.json").read_text())
    assert saved["teacher_url"] == server.url
    with pytest.raises(xtokmap.XTokMapError, match="/no/such: no such model"):
        train(config(prompts, **{**names, "teacher": "/no/such"}))


def test_auto_asks_what_there_is():
    local = Config()
    assert local.rule == "transfer_kl"
    assert replace(local, teacher_url="http://a:1").rule == "cover"
    assert replace(local, teacher_url="http://a:1", teacher_topk=0).rule == "prior"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "transfer_kl", "teacher_rows": "top"}, "loss='transfer_kl' with teacher_rows='top': it needs more"),
        ({"loss": "byte_kl", "teacher_rows": "sums"}, "it needs more of the teacher's rows, one of hidden; or use"),
        ({"method": "kd"}, "method='kd' with teacher_url: a served teacher scores and does not sample"),
        ({"method": "sft"}, "method='sft' with teacher_url"),
        ({"loss": "cover", "teacher_rows": "top", "teacher_topk": 0}, "teacher_topk=0 asks for no top k"),
        ({"teacher_url": "localhost:8000"}, "teacher_url='localhost:8000': expected http://host:port"),
        ({"teacher_url": "http://"}, "expected http://host:port"),
        ({"teacher_url": "http://a:99999"}, "expected http://host:port"),
        ({"teacher_protocol": "grpc"}, "teacher_protocol='grpc': use one of auto, vllm, sglang, openai"),
        ({"teacher_timeout": 0.0}, r"teacher_timeout=0\.0: must be positive"),
        ({"teacher_concurrency": 0}, "teacher_concurrency=0: must be at least 1"),
        ({"teacher_topk": -1}, "teacher_topk=-1: must be finite and not negative"),
        ({"teacher_url": "", "overlap": True}, "overlap=True without teacher_url: a teacher that is loaded here"),
    ],
)
def test_settings_that_no_served_teacher_can_use(changes, message):
    with pytest.raises(xtokmap.XTokMapError, match=message):
        Config(**{"teacher_url": "http://127.0.0.1:8000", **changes})


@pytest.mark.parametrize("url", [f"http://user:{KEY}@a:1", f"http://a:1/?key={KEY}", f"https://{KEY}@a"])
def test_a_url_with_a_secret_is_refused_without_it(url):
    with pytest.raises(xtokmap.XTokMapError, match="a key goes into the variable XTOKMAP_TEACHER_KEY") as caught:
        Config(teacher_url=url)
    assert KEY not in str(caught.value)

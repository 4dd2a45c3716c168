"""How much of a served teacher's rows can be had: hidden states, sums over sets, the likeliest tokens, or nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import httpx2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import faults
import tiny
import xtokmap
from test_serve import post, serving
from xtokmap import Aligner, byte_table
from xtokmap.chat import render
from xtokmap.losses.plan import plan
from xtokmap.losses.queries import transfer, transfer_masses
from xtokmap.teachers import binary, sums
from xtokmap.teachers.client import RowRefusedError, TeacherError
from xtokmap.teachers.head import Head, read_head
from xtokmap.teachers.http1 import Answer
from xtokmap.teachers.local import LocalTeacher
from xtokmap.teachers.remote import ServerTeacher
from xtokmap.teachers.scorer import Limits
from xtokmap.teachers.states import SGLangStates, VLLMPooling, XtokmapStates, verified
from xtokmap.torch.completions import completion_rows
from xtokmap.torch.logits import Logits
from xtokmap.train import loop
from xtokmap.train.config import Config
from xtokmap.train.generation import sample
from xtokmap.train.loop import train

pytestmark = pytest.mark.filterwarnings("ignore:fastokens gives other ids")

CPU = torch.device("cpu")
ROW = [5, 6, 7, 300, 301]


def sharp_model():
    """A teacher whose logits are large enough for a scale, a cap and a norm to show."""
    model = tiny.teacher_model()
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(4, 12, 32))
    return model


@pytest.fixture(scope="module")
def model():
    return sharp_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The teacher's files."""
    path = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(path)
    tiny.teacher_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(model):
    with serving(model, name="tiny", limits=Limits(max_length=256)) as server:
        yield server


@pytest.fixture(scope="module")
def batch():
    """Prompts and completions in the teacher's ids, and their queries; one completion is empty."""
    student, tokenizer = tiny.student_model(), tiny.student_tokenizer()
    torch.manual_seed(3)
    aligner = Aligner(tokenizer, tiny.teacher_tokenizer())
    asked = ["the sky", "the dog", "a fox?", "1 + 2"]
    ids, _ = sample(student, render(tokenizer, asked), aligner.student.stop_ids, Config(max_new_tokens=24))
    ids[2] = []
    teacher_ids, aligned = aligner.retokenize(ids)
    return (
        render(tiny.teacher_tokenizer(), asked),
        [row.tolist() for row in teacher_ids],
        aligner.cover_queries(aligned),
    )


def teacher_of(server, rows, folder=None, **options):
    head = None if folder is None else lambda: read_head(str(folder), CPU)
    given = {"pause": 0.001, "timeout": 20.0, "retries": 2, **options}
    return ServerTeacher(server.url, tiny.teacher_tokenizer(), rows=rows, head=head, **given)


# ---- the same as a teacher that is here ----------------------------------------------------------------------------


def test_hidden_states_give_everything_that_a_local_teacher_gives(model, server, folder, batch):
    prompts, rows, queries = batch
    want = LocalTeacher(model, tiny.teacher_tokenizer()).score(prompts, rows, queries=queries, keep=True)
    teacher = teacher_of(server, "hidden", folder)
    assert teacher.self_test() is None
    got = teacher.score(prompts, rows, queries=queries, keep=True)
    torch.testing.assert_close(got.logprobs, want.logprobs, atol=2e-5, rtol=0)
    torch.testing.assert_close(got.transferred, want.transferred, atol=1e-4, rtol=0, equal_nan=True)
    assert torch.equal(got.mask, want.mask)
    n = got.rows.shape.numel()
    assert n == sum(len(row) + 1 for row in rows)
    # What could stand behind an empty completion nobody asks.
    there = torch.tensor([bool(row) for row in rows for _ in [*row, 0]])
    assert not there.all()
    torch.testing.assert_close(got.rows.slice(0, n)[there], want.rows.slice(0, n)[there], atol=1e-5, rtol=0)
    for a, b in zip(got.target.slice(0, len(got.target)), want.target.slice(0, len(want.target)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert got.missing is None
    assert teacher.bytes_per_token == 32 * 4
    plain = teacher.score(prompts, rows)
    torch.testing.assert_close(plain.logprobs, want.logprobs, atol=2e-5, rtol=0)
    assert plain.rows is None


@pytest.fixture
def sglang(model):
    """A server of SGLang's words, with hidden states in JSON."""
    with faults.serving(model, tiny.teacher_tokenizer(), limits=Limits(max_length=256)) as server:
        server.answers.gives_states = True
        yield server


def test_sglangs_hidden_states_give_what_others_do(model, sglang, folder, batch):
    prompts, rows, queries = batch
    want = LocalTeacher(model, tiny.teacher_tokenizer()).score(prompts, rows, queries=queries, keep=True)
    teacher = teacher_of(sglang, "hidden", folder, protocol="sglang")
    del sglang.answers._routes[XtokmapStates.path]
    assert teacher.self_test() is None
    for _ in range(2):  # the second time all of it is in the server's cache
        got = teacher.score(prompts, rows, queries=queries, keep=True)
        torch.testing.assert_close(got.logprobs, want.logprobs, atol=2e-5, rtol=0)
        torch.testing.assert_close(got.transferred, want.transferred, atol=1e-4, rtol=0, equal_nan=True)
    assert 32 * 8 < teacher.bytes_per_token < 32 * 24  # digits
    teacher.client._doubted = True  # the known text is asked for again, whatever is cached
    teacher.score(prompts, rows)
    longer, _ = teacher.too_long([[1] * 6] * 2, [[2] * 243, [2] * 244])
    assert longer == [1]
    assert teacher.score([[1] * 6], [[2] * 243]).mask.sum() == 243


def test_sglang_without_hidden_states_gives_its_top(sglang, folder):
    sglang.answers.gives_states = False
    del sglang.answers._routes[XtokmapStates.path]
    teacher = teacher_of(sglang, ("hidden", "top"), folder, protocol="sglang")
    assert teacher.self_test() is None
    assert teacher.rows == "top"
    assert "not configured to return hidden states" in teacher.refused["hidden"]


def test_sglangs_states_of_a_prompt_in_pieces_are_refused_with_what_to_set(sglang, folder):
    del sglang.answers._routes[XtokmapStates.path]
    sglang.answers.piece = 16
    with pytest.raises(TeacherError, match=r"keeps those of the last piece .* --chunked-prefill-size -1"):
        teacher_of(sglang, "hidden", folder, protocol="sglang").self_test()


def test_sglangs_states_of_a_row_that_it_cuts_are_refused_as_a_row():
    question = SGLangStates().question([5, 6, 7, 8], 2, "", HEAD)
    with pytest.raises(RowRefusedError, match="cuts it to 3 of its 4 tokens"):
        question.read(sglang_body(prompt_tokens=3))


def sglang_body(**changes):
    meta = {"input_token_logprobs": [[None, 6, None], [-1.0, 7, None], [-1.0, 8, None]], "cached_tokens": 1}
    meta["hidden_states"] = [[[0.5] * 32, [1.5] * 32, [2] * 32]]
    return {"meta_info": {name: x for name, x in {**meta, **changes}.items() if x is not None}}


def test_sglangs_states_are_read_from_the_place_that_is_asked_for():
    question = SGLangStates().question([5, 6, 7, 8], 2, "", HEAD)
    asked = json.loads(question.payload)
    assert asked["input_ids"] == [5, 6, 7, 8]
    assert asked["logprob_start_len"] == 1
    assert asked["return_hidden_states"] is True
    assert question.read(sglang_body())[:, 0].tolist() == [0.5, 1.5, 2]
    more = [[[9] * 32, [0.5] * 32, [1.5] * 32, [2] * 32]]
    assert question.read(sglang_body(hidden_states=more, cached_tokens=0))[:, 0].tolist() == [0.5, 1.5, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": None}, "no meta_info with hidden_states"),
        ({"hidden_states": []}, "no meta_info with hidden_states"),
        ({"hidden_states": [None]}, "hidden states behind 1 tokens"),
        ({"cached_tokens": None}, "no meta_info with hidden_states"),
        ({"cached_tokens": 2}, "hidden states behind 2 tokens; those from 1 on are asked"),
        ({"cached_tokens": True}, "hidden states behind True"),
        ({"cached_tokens": 0}, "3 hidden states for 4 places"),
        ({"input_token_logprobs": [[None, 6], [-1, 9], [-1, 8]]}, "are not of the ids that were sent"),
        ({"input_token_logprobs": 1}, "no meta_info with hidden_states"),
        ({"hidden_states": [[[0.5] * 32, [1.5] * 31, [2] * 32]]}, "no rows of one length"),
        ({"hidden_states": [[[], [], []]]}, "no rows of one length"),
        ({"hidden_states": [[1, 2, 3]]}, "no rows of one length"),
        ({"hidden_states": [[["1"] * 32] * 3]}, "no numbers"),
        ({"hidden_states": [[[True] * 32] * 3]}, "no numbers"),
        ({"hidden_states": [[[[1]] * 32] * 3]}, "no numbers"),
        ({"hidden_states": [[[1e300] * 32] * 3]}, "not finite"),
        ({"hidden_states": [[[1.0] * 31] * 3]}, "hidden states of 31 numbers"),
    ],
)
def test_sglangs_states_that_are_none_are_bad_answers(changes, message):
    question = SGLangStates().question([5, 6, 7, 8], 2, "", HEAD)
    with pytest.raises(Exception, match=message) as caught:
        question.read(sglang_body(**changes))
    assert type(caught.value).__name__ == "BadAnswerError"


def test_sums_give_the_cover_of_whole_rows(model, server, batch):
    prompts, rows, queries = batch
    want = LocalTeacher(model, tiny.teacher_tokenizer()).score(prompts, rows, queries=queries)
    teacher = teacher_of(server, "sums")
    assert teacher.self_test() is None
    got = teacher.score(prompts, rows, queries=queries)
    torch.testing.assert_close(got.logprobs, want.logprobs, atol=2e-5, rtol=0)
    torch.testing.assert_close(got.transferred, want.transferred, atol=1e-4, rtol=0, equal_nan=True)
    assert torch.isfinite(got.transferred).sum() > 20
    assert got.missing is None
    with pytest.raises(xtokmap.XTokMapError, match="sums over sets of tokens are no rows"):
        teacher.score(prompts, rows, queries=queries, keep=True)


@pytest.mark.parametrize("way", ["hidden", "sums", "top"])
def test_nothing_is_asked_about_an_empty_completion(server, folder, batch, way):
    prompts, rows, queries = batch
    teacher = teacher_of(server, way, folder)
    teacher.self_test()
    before = teacher.client.figures["answers"]
    teacher.score(prompts, rows, queries=queries)
    assert teacher.client.figures["answers"] == before + sum(map(bool, rows)) < before + len(rows)
    empty = [[] for _ in rows]
    aligner = Aligner(tiny.student_tokenizer(), tiny.teacher_tokenizer())
    none = aligner.cover_queries(aligner.align_batch(empty, empty))
    scores = teacher.score([[0] * 300] * len(rows), empty, queries=none, keep=way != "sums")
    assert scores.mask.shape == (len(rows), 0)
    assert teacher.client.figures["answers"] == before + sum(map(bool, rows))


def test_half_precision_goes_over_the_wire_as_it_is(batch):
    model = sharp_model().bfloat16()
    ids = [*batch[0][0], *batch[1][0]]
    want = completion_rows(model, [ids[:1]], [ids[1:]], after=True).rows
    with serving(model) as server:
        for asked, dtype in (("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)):
            answer = post(server, "/v1/hidden_states", prompt=ids, first=4, dtype=asked)
            assert answer.headers["content-type"] == "application/octet-stream"
            got = binary.unpack(answer.content)[0]["hidden"]
            assert got.dtype == dtype
            torch.testing.assert_close(got.float(), want[3:].to(dtype).float(), atol=0, rtol=0)


# ---- sums ----------------------------------------------------------------------------------------------------------


def test_terms_are_the_sets_of_the_queries(batch):
    queries = batch[2]
    order, p = queries.vocab_map.teacher_order, plan(queries)
    assert sums.byte_order(byte_table(tiny.teacher_tokenizer())).tolist() == order.tolist()
    size = len(queries.vocab_map.teacher_to_student)
    found = sums.terms_of(queries)
    at = 0
    for terms in found:
        for which in terms.set:
            want = set(
                [-1 - p.set[at]] if p.set[at] < 0 else queries.sets.ids[slice(*queries.sets.indptr[p.set[at] :][:2])]
            )
            if p.set[at] >= 0 and queries.sets.complement[p.set[at]]:
                want = set(range(size)) - want
            got = {-1 - which} if which < 0 else set()
            if which >= 0:
                for lo, hi in terms.ranges[slice(*terms.indptr[which:][:2])]:
                    got |= set(order[lo:hi].tolist())
                got |= set(range(size)) - set(order.tolist()) if terms.special[which] else set()
            assert got == want
            at += 1
    assert at == len(p.set)
    assert any((terms.set >= 0).any() for terms in found)


@pytest.mark.parametrize("sides", ["teacher, student", "student, student", "teacher, teacher"])
def test_sums_give_the_cover_of_any_two_tokenizers(sides):
    student, teacher = (getattr(tiny, f"{side}_tokenizer")() for side in sides.split(", "))
    aligner = Aligner(student, teacher)
    ids = [student(text, add_special_tokens=False).input_ids for text in tiny.TEXT]
    teacher_ids, batch = aligner.retokenize([[*row, student.eos_token_id] for row in ids])
    queries, order = aligner.cover_queries(batch), torch.from_numpy(aligner.vocab_map.teacher_order).long()
    rows = [row.tolist() for row in teacher_ids]
    n, size = sum(len(row) + 1 for row in rows), len(teacher) + 5
    whole = torch.randn(n, size, generator=torch.Generator().manual_seed(0)) * 4
    want = transfer(Logits(whole), torch.tensor([i for row in rows for i in row]), queries)
    parts, first = [], 0
    for row, terms in zip(rows, sums.terms_of(queries), strict=True):
        checked = sums.Terms.of(terms.tensors(), len(row) + 1, size, len(order))
        parts.append(sums.masses(Logits(whole[first : first + len(row) + 1]), torch.tensor(row), checked, order))
        first += len(row) + 1
    got = transfer_masses(*(torch.cat([part[k] for part in parts]) for k in (0, 1)), queries)
    torch.testing.assert_close(got.transferred, want.transferred, atol=1e-4, rtol=1e-5, equal_nan=True)
    assert torch.isfinite(got.transferred).sum() > 50


def test_masses_are_sums_of_probabilities_and_small_ones_lose_nothing():
    torch.manual_seed(0)
    rows, order = torch.randn(3, 37, dtype=torch.float64) * 30, torch.randperm(37)[:33]
    terms = sums.Terms(
        np.array([0, 0, 1, 2, 2], np.int32),
        np.array([0, 1, 2, -6, 1], np.int32),
        np.array([0, 2, 3, 3], np.int32),
        np.array([[0, 5], [7, 32], [13, 14]], np.int32),
        np.array([True, False, True]),
    )
    logprobs, found = sums.masses(Logits(rows.float()), torch.tensor([3, 4]), terms, order)
    p = rows.float().double().log_softmax(-1)
    others = torch.tensor(sorted(set(range(37)) - set(order.tolist())))
    sets = [torch.cat([order[:5], order[7:32], others]), order[13:14], others, torch.tensor([5]), order[13:14]]
    want = torch.stack([p[row, ids].logsumexp(0) for row, ids in zip((0, 0, 1, 2, 2), sets, strict=True)])
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-6)
    assert want.min() < -40
    torch.testing.assert_close(logprobs.double(), p[[0, 1], [3, 4]], atol=1e-5, rtol=1e-6)


def test_many_ranges_are_summed_up_in_parts(monkeypatch, model, batch):
    prompts, rows, queries = batch
    monkeypatch.setattr(sums, "_AT_ONCE", 7)
    logits = LocalTeacher(model, tiny.teacher_tokenizer()).rows(prompts[:1], rows[:1])
    [terms, *_] = sums.terms_of(queries)
    order = torch.from_numpy(queries.vocab_map.teacher_order).long()
    some = sums.masses(logits, torch.tensor(rows[0]), terms, order)[1]
    monkeypatch.undo()
    torch.testing.assert_close(some, sums.masses(logits, torch.tensor(rows[0]), terms, order)[1])


# ---- the head ------------------------------------------------------------------------------------------------------


def test_a_head_is_read_from_one_file_or_several_tied_or_not(folder, model, tmp_path):
    want = model.get_output_embeddings().weight
    head = read_head(str(folder), CPU)
    torch.testing.assert_close(head.weight, want, atol=0, rtol=0)
    assert head.softcap == 3.0
    torch.testing.assert_close(head.norm_weight, model.model.norm.weight, atol=0, rtol=0)
    assert read_head(str(folder), CPU, "bfloat16").weight.dtype == torch.bfloat16
    own = torch.randn_like(want)
    untied = sharp_model()
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(own)
    untied.save_pretrained(tmp_path, max_shard_size="40kB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    torch.testing.assert_close(read_head(str(tmp_path), CPU).weight, own, atol=0, rtol=0)


def test_scales_of_families_are_known(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    for name, value, scale in (("logit_scale", 0.0625, 0.0625), ("logits_scaling", 8.0, 0.125)):
        (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
        save_file({"lm_head.weight": torch.ones(380, 32)}, tmp_path / "model.safetensors")
        head = read_head(str(tmp_path), CPU)
        assert head.scale == scale
        want = 3 * math.tanh(32 * scale / 3)
        torch.testing.assert_close(head.logits(torch.ones(1, 32)).slice(0, 1), torch.full((1, 380), want))
        plain = replace(head, softcap=None).logits(torch.ones(1, 32)).slice(0, 1)
        torch.testing.assert_close(plain, torch.full((1, 380), 32 * scale))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("teacher.gguf", "is read from safetensors, not from a .gguf file"),
        ("bare", "has no safetensors"),
        ("headless", "no output head among its 1 tensors"),
        ("broken", "its output head cannot be read"),
    ],
)
def test_a_head_that_cannot_be_read_is_named(folder, tmp_path, source, message):
    place = tmp_path / source
    place.mkdir()
    (place / "config.json").write_text((folder / "config.json").read_text())
    if source == "headless":
        save_file({"model.norm.weight": torch.ones(32)}, place / "model.safetensors")
    if source == "broken":
        (place / "model.safetensors").write_bytes(b"\xff" * 99)
    with pytest.raises(xtokmap.XTokMapError, match=message):
        read_head(str(place), CPU)


# ---- whether states can be believed --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known(model, folder):
    """Head, states of a text, its ids, the server's logprobs, and the states before the final norm."""
    ids = torch.randint(4, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    before = []
    hook = model.model.norm.register_forward_pre_hook(lambda module, args: before.append(args[0]))
    with torch.no_grad():
        rows = completion_rows(model, [ids[:1]], [ids[1:]], after=True)
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])
    hook.remove()
    own = torch.cat([torch.tensor([torch.nan]), logprobs[:, 0]])
    return read_head(str(folder), CPU), rows.rows.detach(), ids, own, before[-1][0].detach()


def test_states_that_are_right_are_believed(known):
    head, states, ids, logprobs, _ = known
    assert verified(head, states, ids, logprobs) is head
    assert verified(head, states.bfloat16().float(), ids, logprobs) is head


def test_states_before_the_norm_are_normed_here(known):
    head, states, ids, logprobs, before = known
    found = verified(head, before, ids, logprobs)
    assert found.norm == "RMSNorm of 1 + weight"
    torch.testing.assert_close(found.logits(before).slice(0, 40), head.logits(states).slice(0, 40), atol=1e-4, rtol=0)
    with pytest.raises(TeacherError, match="neither norm, scale, cap nor shift"):
        verified(replace(head, norm_weight=None), before, ids, logprobs)


@pytest.mark.parametrize(
    ("change", "shift", "message"),
    [
        ({}, 1, "its rows are shifted by one: each is that of the place behind"),
        ({}, -1, "its rows are shifted by one: each is that of the place before"),
        ({"scale": 4.0}, 0, r"the logits are to be scaled by 1 \(capped at 3\), the configuration says 4"),
        ({"softcap": None}, 0, "the logits are capped at 3; the configuration says no cap"),
        ({"softcap": 6.0}, 0, "the logits are capped at 3; the configuration says a cap of 6"),
        ({"weight": torch.randn(380, 32, generator=torch.Generator().manual_seed(1))}, 0, "is the output head another"),
        ({"weight": torch.ones(9, 32)}, 0, "the output head has 9 tokens; the text has token"),
    ],
    ids=["late", "early", "scale", "no cap", "cap", "head", "vocabulary"],
)
def test_what_is_off_is_named(known, change, shift, message):
    head, states, ids, logprobs, _ = known
    with pytest.raises(TeacherError, match=message):
        verified(replace(head, **change), states.roll(-shift, 0), ids, logprobs)


def test_a_text_that_is_likely_needs_no_logprobs():
    """A made-up model: each state is the next token's row of the head, and as much noise as it allows for."""
    weight = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 200, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    noise = torch.randn(40, 64, generator=torch.Generator().manual_seed(2))
    states = 0.2 * torch.cat([weight[ids[1:]], weight[:1]]) + 0.2**0.5 * noise
    head = Head(weight)
    assert verified(head, states, ids, None) is head
    with pytest.raises(TeacherError, match="rows are shifted"):
        verified(head, states.roll(1, 0), ids, None)
    with pytest.raises(TeacherError, match=r"to be scaled by about [01]\.\d+; the configuration says 0\.02"):
        verified(replace(head, scale=0.02), states, ids, None)
    with pytest.raises(TeacherError, match="no way to read them makes it likely"):
        verified(Head(weight.roll(1, 0)), states, ids, None)
    sizes = torch.linspace(0.01, 30, 40)[:, None]
    gain = states.square().mean(-1).sqrt().mean().expand(64)
    assert verified(Head(weight, norm_weight=gain), states * sizes, ids, None).norm == "RMSNorm"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :16], "they have 16 numbers, the output head takes 32"),
        (lambda x: torch.cat([x[1:], x[:1]]), "its rows are shifted"),
        (lambda x: x * 3, r"the logits are to be scaled by 0\.3333"),
        (lambda x: x.flip(-1), "neither norm, scale, cap nor shift"),
    ],
    ids=["width", "shift", "scale", "another's"],
)
def test_a_server_with_other_states_is_refused_by_name(model, folder, monkeypatch, change, message):
    pack = binary.pack
    monkeypatch.setattr(binary, "pack", lambda tensors: pack({"hidden": change(tensors["hidden"])}))
    with serving(model) as server, pytest.raises(TeacherError, match=message):
        teacher_of(server, "hidden", folder).self_test()


# ---- answers that lie ----------------------------------------------------------------------------------------------

STATES = torch.zeros(4, 32)
HEAD = Head(torch.zeros(9, 32))


def packed(**tensors):
    return binary.pack(tensors)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes that are no safetensors"),
        (b"\xff" * 99, "99 bytes that are no safetensors"),
        (packed(hidden=STATES)[:-1], "no safetensors"),
        (packed(hidden=STATES) + b"x", "no safetensors"),
        (b'{"error": "no"}', "no safetensors"),
        (packed(other=STATES), r"no hidden \[n, H\] in it"),
        (packed(hidden=STATES[0]), r"no hidden \[n, H\] in it"),
        (packed(hidden=STATES[:3]), "3 hidden states for 4 places"),
        (packed(hidden=torch.zeros(4, 31)), "hidden states of 31 numbers; the output head takes 32"),
        (packed(hidden=STATES.double()), r"hidden states of torch\.float64"),
        (packed(hidden=STATES.int()), r"hidden states of torch\.int32"),
        (packed(hidden=STATES.index_fill(0, torch.tensor([2]), torch.nan)), "hidden states that are not finite"),
        (packed(hidden=STATES.index_fill(0, torch.tensor([2]), torch.inf)), "hidden states that are not finite"),
    ],
)
def test_hidden_states_that_are_none_are_bad_answers(content, message):
    question = XtokmapStates().question([5, 6, 7, 8, 9], 2, "tiny", HEAD)
    with pytest.raises(Exception, match=message) as caught:
        question.read(Answer(200, {}, content))
    assert type(caught.value).__name__ == "BadAnswerError"


def metadata(**changes):
    item = {"index": 0, "embed_dtype": "float32", "endianness": "little", "shape": [5, 32], **changes}
    return {"metadata": json.dumps({"data": [item], "usage": {"prompt_tokens": changes.get("tokens", 5)}})}


@pytest.mark.parametrize(
    ("headers", "size", "message"),
    [
        ({}, 640, "no metadata in its headers"),
        ({"metadata": "{"}, 640, "no metadata"),
        ({"metadata": '{"data": []}'}, 640, "no metadata"),
        ({"metadata": "[1]"}, 640, "no metadata"),
        (metadata(tokens=6), 640, "6 tokens of 'float32'"),
        (metadata(embed_dtype="float16"), 640, "of 'float16'"),
        (metadata(endianness="big"), 640, "'big'"),
        (metadata(shape=[5]), 640, "a shape that is none"),
        (metadata(shape=[5, True]), 640, "a shape that is none"),
        (metadata(shape=[4, 40]), 640, r"640 bytes for 5 states of shape \[4, 40\]"),
        (metadata(), 639, "639 bytes for 5 states"),
        (metadata(shape=[5, -32]), 640, "640 bytes for 5 states"),
        (metadata(shape=[5, 0]), 0, "0 bytes for 5 states"),
        (metadata(shape=[5, 31]), 620, "hidden states of 31 numbers"),
    ],
)
def test_pooled_states_that_are_none_are_bad_answers(headers, size, message):
    question = VLLMPooling().question([5, 6, 7, 8, 9], 2, "tiny", HEAD)
    with pytest.raises(Exception, match=message) as caught:
        question.read(Answer(200, headers, bytes(size)))
    assert type(caught.value).__name__ == "BadAnswerError"


def test_pooled_states_are_read_from_the_place_that_is_asked_for():
    sent = torch.arange(160, dtype=torch.float32).view(5, 32)
    question = VLLMPooling().question([5, 6, 7, 8, 9], 2, "tiny", HEAD)
    asked = json.loads(question.payload)
    assert asked["input"] == [[5, 6, 7, 8, 9]]
    assert asked["task"] == "token_embed"
    assert asked["use_activation"] is False
    got = question.read(Answer(200, metadata(), sent.numpy().tobytes()))
    torch.testing.assert_close(got, sent[1:])
    half = VLLMPooling().question([5, 6, 7, 8, 9], 2, "tiny", Head(torch.zeros(9, 32, dtype=torch.bfloat16)))
    content = binary.pack({"x": sent.bfloat16()})[-320:]
    got = half.read(Answer(200, metadata(embed_dtype="bfloat16"), content))
    torch.testing.assert_close(got, sent[1:].bfloat16())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "no logprobs for 3 tokens and 4 sets"),
        ({"logprobs": torch.zeros(2)}, r"torch\.float32 \(2,\) as logprobs"),
        ({"logprobs": torch.zeros(3).double()}, r"torch\.float64 \(3,\) as logprobs"),
        ({"masses": torch.zeros(4, 1)}, r"\(4, 1\) as masses"),
        ({"masses": torch.tensor([0, 0, 0, torch.nan])}, "masses with nan"),
        ({"masses": torch.tensor([0, 0, 0, 0.5])}, r"masses with 0\.5"),
    ],
)
def test_sums_that_are_none_are_bad_answers(tensors, message):
    terms = sums.Terms(
        np.zeros(4, np.int32), np.full(4, -1, np.int32), np.zeros(1, np.int32), np.zeros((0, 2), np.int32),
        np.zeros(0, np.bool_),
    )  # fmt: skip
    question = sums.question([5, 6, 7, 8, 9], 2, terms, "", "tiny")
    good = {"logprobs": torch.zeros(3), "masses": torch.full((4,), -torch.inf)}
    assert question.read(Answer(200, {}, packed(**good)))[1].tolist() == [-math.inf] * 4
    with pytest.raises(Exception, match=message) as caught:
        question.read(Answer(200, {}, packed(**{**good, **tensors} if tensors else {})))
    assert type(caught.value).__name__ == "BadAnswerError"


# ---- requests that lie ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": ROW, "first": 0}, 400, "first is 0; this server takes 1 to 5"),
        ({"prompt": ROW, "first": 6}, 400, "first is 6"),
        ({"prompt": ROW, "first": True}, 400, "first is True"),
        ({"prompt": ROW, "dtype": "int8"}, 400, "dtype is 'int8'; this server takes auto, float32"),
        ({"prompt": ROW, "dtype": ["float32"]}, 400, "dtype is"),
        ({"prompt": [ROW]}, 400, "prompt must be one row"),
        ({"prompt": [1, 380]}, 400, "prompt[1] is 380"),
        ({"prompt": [1] * 257}, 400, "prompt has 257 tokens, and 0 new; the model takes 256"),
        ({"prompt": ROW, "model": "big"}, 404, "the model 'big' does not exist"),
        ({}, 400, "prompt must be a text or a list"),
    ],
)
def test_requests_for_states_that_cannot_be_met_are_refused(server, body, status, message):
    answer = post(server, "/v1/hidden_states", **body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_a_model_without_a_plain_head_says_so(monkeypatch):
    model = tiny.teacher_model()
    monkeypatch.setattr("xtokmap.torch.completions.body_and_head", lambda model: (None, None))
    with serving(model) as server:
        answer = post(server, "/v1/hidden_states", prompt=ROW)
        assert answer.status_code == 400
        assert "it has no hidden states" in answer.json()["error"]["message"]
        with pytest.raises(TeacherError, match="gives no rows that could be used: hidden: there are none"):
            teacher_of(server, "hidden").self_test()


TERMS = {
    "ids": torch.tensor(ROW, dtype=torch.int32),
    "row": torch.tensor([0, 1, 1], dtype=torch.int32),
    "set": torch.tensor([0, 1, -5], dtype=torch.int32),
    "indptr": torch.tensor([0, 2, 3], dtype=torch.int32),
    "ranges": torch.tensor([[0, 4], [9, 20], [3, 5]], dtype=torch.int32),
    "special": torch.tensor([False, True]),
}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "words", "status", "message"),
    [
        ({}, {}, 200, ""),
        ({"ids": None}, {}, 400, "ids must be int32"),
        ({"ids": torch.tensor(ROW)}, {}, 400, "ids must be int32"),
        ({"ids": int32(1, 380)}, {}, 400, "ids[1] is 380"),
        ({"ids": int32()}, {}, 400, "ids must be a text or a list of token ids, and not empty"),
        ({}, {"first": "0"}, 400, "first is '0'; this server takes 1 to 5"),
        ({}, {"first": "²"}, 400, "first is '²'"),
        ({}, {"first": "1" * 30}, 400, "first is '1111"),
        ({}, {"order": "x"}, 409, "are not those of yours"),
        ({}, {"model": "big"}, 404, "the model 'big' does not exist"),
        ({"row": None}, {}, 400, "row is missing; it must be torch.int32 of shape"),
        ({"row": torch.tensor([0, 1, 1])}, {}, 400, "row is torch.int64 (3,)"),
        ({"row": int32(0, 1, 4)}, {}, 400, "row does not rise from 0 to 3"),
        ({"row": int32(-1, 1, 1)}, {}, 400, "row does not rise"),
        ({"row": int32(1, 0, 1)}, {}, 400, "row does not rise"),
        ({"row": int32(0, 1)}, {}, 400, "2 rows and 3 sets of terms"),
        ({"row": int32(*[0] * 2000), "set": int32(*[0] * 2000)}, {}, 400, "2000 rows and 2000 sets of terms for 4"),
        ({"set": int32(0, 2, 0)}, {}, 400, "set has values beyond 2 sets and 380 tokens"),
        ({"set": int32(0, 1, -381)}, {}, 400, "set has values beyond"),
        ({"indptr": int32(0, 3)}, {}, 400, "indptr does not divide 3 ranges into 2 sets"),
        ({"indptr": int32(0, 5, 3)}, {}, 400, "indptr does not divide"),
        ({"indptr": int32(0, -1, 3)}, {}, 400, "indptr does not divide"),
        ({"indptr": int32(1, 2, 3)}, {}, 400, "indptr does not divide"),
        ({"ranges": TERMS["ranges"].flatten()}, {}, 400, "ranges is torch.int32 (6,)"),
        ({"ranges": torch.tensor([[0, 4], [3, 20], [3, 5]], dtype=torch.int32)}, {}, 400, "ranges do not rise"),
        ({"ranges": torch.tensor([[0, 4], [20, 9], [3, 5]], dtype=torch.int32)}, {}, 400, "ranges do not rise"),
        ({"ranges": torch.tensor([[0, 4], [9, 999], [3, 5]], dtype=torch.int32)}, {}, 400, "ranges do not rise from 0"),
        ({"ranges": torch.tensor([[-1, 4], [9, 20], [3, 5]], dtype=torch.int32)}, {}, 400, "ranges do not rise"),
        ({"special": torch.tensor([0, 1])}, {}, 400, "special is torch.int64"),
    ],
)
def test_requests_for_sums_are_checked(server, change, words, status, message):
    order = sums.digest(sums.byte_order(byte_table(tiny.teacher_tokenizer())))
    tensors = {name: x for name, x in {**TERMS, **change}.items() if x is not None}
    content = binary.pack(tensors, {"first": "2", "order": order, "model": "tiny", **words})
    answer = httpx2.post(server.url + "/v1/sums", content=content)
    assert answer.status_code == status, answer.text
    if status == 200:
        found, _ = binary.unpack(answer.content)
        assert found["logprobs"].shape == found["masses"].shape == (3,)
    else:
        assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 50, b"\x08" + b"\0" * 7 + b'{"a": 1}', b"\0" * 8])
def test_a_body_that_is_no_safetensors_is_refused(server, content):
    answer = httpx2.post(server.url + "/v1/sums", content=content, headers={"Content-Length": str(len(content))})
    assert answer.status_code == 400
    assert "no safetensors" in answer.json()["error"]["message"]


def test_ranges_are_bounded_together(monkeypatch, server):
    monkeypatch.setattr(sums, "_RANGES", 0)
    with pytest.raises(xtokmap.XTokMapError, match="the terms have more than 0 ranges for each of 4 places"):
        sums.Terms.of({name: x for name, x in TERMS.items() if name != "ids"}, 4, 380, 376)


# ---- auto ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "ways"),
    [
        ({}, ("hidden", "sums", "top", "none")),
        ({"teacher_topk": 0}, ("hidden", "sums", "none")),
        ({"loss": "transfer_kl"}, ("hidden",)),
        ({"loss": "cover"}, ("sums", "hidden", "top")),
        ({"loss": "strict_kl"}, ("hidden", "top")),
        ({"loss": "prior"}, ("none", "top", "sums", "hidden")),
        ({"teacher_rows": "sums"}, ("sums",)),
    ],
)
def test_auto_asks_for_what_the_loss_can_use(config, ways):
    assert Config(teacher_url="http://x:1", **config).teacher_ways == ways


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"loss": "transfer_kl", "teacher_rows": "top"}, "it needs more of the teacher's rows, one of hidden"),
        ({"loss": "strict_kl", "teacher_rows": "sums"}, "one of hidden, top"),
        ({"loss": "cover", "teacher_rows": "none"}, "one of sums, hidden, top"),
        ({"loss": "cover", "teacher_rows": "top", "teacher_topk": 0}, "teacher_topk=0 asks for no top k"),
        ({"teacher_rows": "all"}, "teacher_rows='all': use one of auto, hidden, sums, top, none"),
        ({"teacher_states_url": "http://a@b"}, "leave out user names"),
    ],
)
def test_rows_that_a_loss_cannot_use_are_named(config, message):
    with pytest.raises(xtokmap.XTokMapError, match=message):
        Config(teacher_url="http://x:1", **config)


def without(server, *paths):
    for path in paths:
        del server.answers._routes[path]


@pytest.mark.parametrize(
    ("gone", "topk", "rows", "loss"),
    [
        ([], 5, "hidden", "transfer_kl"),
        (["/v1/hidden_states"], 5, "sums", "cover"),
        (["/v1/hidden_states", "/v1/sums"], 5, "top", "cover"),
        (["/v1/hidden_states", "/v1/sums"], 99, "none", "prior"),
    ],
)
def test_auto_takes_the_best_and_says_what_and_why(model, folder, tmp_path, capsys, gone, topk, rows, loss):
    with serving(model, limits=Limits(max_logprobs=50)) as server:
        without(server, *gone)
        line = run(tmp_path, server, folder, teacher_topk=topk, steps=1)[0]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["teacher_rows"], written["loss"]) == (rows, loss)
    said = capsys.readouterr().out
    assert f"the teacher gives {loop.ROWS[rows].split(':')[0]}" in said
    assert f"loss={loss}" in said
    assert ("not hidden: " in said) == bool(gone)
    assert ("not top: " in said) == (topk == 99)
    assert ("missing" in line) == (rows == "top")
    if topk == 99:
        assert "prompt_logprobs is 99; this server takes 0 to 50" in said


def run(tmp_path, server=None, folder="", **changes):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the sky\nthe dog\na fox?\n1 + 2\nhello\n")
    student, tokenizer, _, teacher_tokenizer = tiny.pair()
    settings = {"prompts": str(prompts), "output": str(tmp_path / "out"), "steps": 3, "batch_size": 4}
    settings |= {"max_new_tokens": 12, "learning_rate": 1e-3, "device": "cpu", "save_every": 0, "warmup_steps": 0}
    settings |= {"teacher": str(folder), "teacher_url": "" if server is None else server.url}
    config = Config(**{**settings, **changes})
    return train(config, models=(student, tokenizer, sharp_model(), teacher_tokenizer)).metrics


@pytest.mark.parametrize(
    ("changes", "rows"),
    [({"loss": "transfer_kl"}, "hidden"), ({"loss": "byte_kl"}, "hidden"), ({"loss": "cover"}, "sums")],
)
def test_a_run_over_the_wire_is_the_run_with_the_teacher_here(server, folder, tmp_path, changes, rows):
    here = tmp_path / "here"
    here.mkdir()
    want = run(here, **changes)
    got = run(tmp_path, server, folder, **changes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["teacher_rows"] == rows
    assert [line["loss"] for line in got] == pytest.approx([line["loss"] for line in want], abs=1e-6, rel=1e-5)
    assert [line["kl_per_byte"] for line in got] == pytest.approx([line["kl_per_byte"] for line in want], rel=1e-4)
    if rows == "hidden":
        assert [line["boundary_leak"] for line in got] == pytest.approx([x["boundary_leak"] for x in want], abs=1e-5)


def test_states_are_scored_while_the_student_samples(server, folder, tmp_path):
    lines = run(tmp_path, server, folder, overlap=True)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["skipped_batches"] == 0 and math.isfinite(line["loss"]) for line in lines)


def test_states_may_come_from_another_server(model, server, folder, tmp_path):
    with serving(model) as other:
        without(other, "/v1/completions")
        lines = run(tmp_path, server, folder, teacher_states_url=other.url, steps=2)
        assert len(lines) == 2
        assert other.answered > 8


def test_a_server_with_states_alone_is_believed_by_its_text(folder, monkeypatch):
    """Nothing is known of such a server but how likely it finds a text: a model that has learned nothing fails."""
    with serving(sharp_model()) as server:
        without(server, "/v1/completions")
        with pytest.raises(TeacherError, match="no way to read them makes it likely"):
            teacher_of(server, ("hidden", "sums"), folder).self_test()
        with pytest.raises(TeacherError, match="no protocol works here"):
            teacher_of(server, "sums", folder).self_test()


def test_faults_of_hidden_states_are_asked_again(model, folder, batch):
    prompts, rows, queries = batch
    plan = faults.Plan()
    want = LocalTeacher(model, tiny.teacher_tokenizer()).score(prompts, rows, queries=queries).transferred
    with faults.serving(model, tiny.teacher_tokenizer(), plan) as server:
        teacher = teacher_of(server, "hidden", folder, retries=4)  # all of them may be one row's
        teacher.self_test()
        plan.faults = ["429", "no answer", "a list", None, "nested"]
        got = teacher.score(prompts, rows, queries=queries).transferred
        assert len(plan.log) == 4
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0, equal_nan=True)


def test_mass_that_the_likeliest_tokens_leave_out_is_warned_of(server, folder, tmp_path):
    (tmp_path / "all").mkdir()
    for where, topk, warns in ((tmp_path, 2, True), (tmp_path / "all", 380, False)):
        lines = run(where, server, folder, teacher_rows="top", teacher_topk=topk)
        said = [w["text"] for line in lines for w in line["warnings"] if w["name"] == "missing"]
        assert len(said) == warns
        assert (min(line["missing"] for line in lines) > 0.02) == warns
    (text,) = [w["text"] for line in run_lines(tmp_path) for w in line["warnings"] if w["name"] == "missing"]
    assert text.startswith("step 3: the 2 likeliest tokens of a row leave out ")
    assert "teacher_states_url" in text


def run_lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]

"""The served teacher against a real SGLang on a CPU: `make test-sglang`. Figures are printed, as in `test-servers`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from real_server import LONGEST, SGLANG_VENV, TEXTS, SGLang, folder, local_teacher
from xtokmap import Aligner, demo
from xtokmap.chat import render
from xtokmap.models import load_tokenizer
from xtokmap.teachers.client import OtherTeacherError, RowRefusedError, TeacherError
from xtokmap.teachers.head import read_head
from xtokmap.teachers.remote import ServerTeacher

pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(SGLANG_VENV is None, reason="make test-sglang says where SGLang is (XTOKMAP_SGLANG)"),
    pytest.mark.filterwarnings("ignore"),  # of transformers and torch, about models of this size
]

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("sglang") / "log"
    with SGLang(folder(demo.GEMMA), log, SGLang.length, str(LONGEST)) as found:
        yield found


@pytest.fixture(scope="module")
def local():
    return local_teacher()


@pytest.fixture(scope="module")
def batch(local):
    """Prompts, the teacher's ids of some texts of the student's, and their queries."""
    student = load_tokenizer(str(folder(demo.SMOLLM2)))
    aligner = Aligner(student, local.tokenizer)
    ids = [student(text, add_special_tokens=False).input_ids for text in TEXTS]
    teacher_ids, aligned = aligner.retokenize(ids)
    prompts = render(local.tokenizer, ["Go on."] * len(TEXTS))
    return prompts, [row.tolist() for row in teacher_ids], aligner.cover_queries(aligned)


def teacher_of(server, tokenizer, **options):
    return ServerTeacher(server.url, tokenizer, timeout=300.0, **options)


def test_self_test_and_what_it_refuses(server, local):
    teacher = teacher_of(server, local.tokenizer)
    assert teacher.self_test() is None
    assert (teacher.client.protocol, teacher.client.max_length) == ("sglang", LONGEST)
    with pytest.raises(TeacherError, match=r"two vocabularies|the vocabulary has 5"):
        teacher_of(server, load_tokenizer(str(folder(demo.SMOLLM2)))).self_test()


def test_logprobs_are_the_local_teachers(server, local, batch, capsys):
    prompts, rows, _ = batch
    want = local.score(prompts, rows)
    got = teacher_of(server, local.tokenizer).score(prompts, rows, keep=True)
    gap = (got.logprobs - want.logprobs)[want.mask].abs()
    same = total = 0
    for b, row in enumerate(rows):
        best = local.rows([prompts[b]], [row]).slice(0, len(row)).topk(20).indices
        for i in range(len(row)):
            same += len({*best[i].tolist()} & {int(token) for token in got.top.ids[b, i] if token >= 0})
            total += 20
    with capsys.disabled():
        print(
            f"\n  float32, {len(gap)} tokens: largest {gap.max():.2g}, mean {gap.mean():.2g}; {same / total:.2%} of 20"
        )
    assert gap.max() < 2e-3
    assert same / total > 0.999


def test_rows_at_the_limit(server, local):
    teacher = teacher_of(server, local.tokenizer, topk=20)
    teacher.self_test()
    lengths = [LONGEST - 10, LONGEST - 9, LONGEST - 8, LONGEST - 7]
    token = local.tokenizer("a", add_special_tokens=False).input_ids[0]
    rows = [[token] * n for n in lengths]
    longer, _ = teacher.too_long([[2]] * 4, rows)
    assert longer == [2, 3]
    scores = teacher.score([[2]] * 2, rows[:2], keep=True)
    assert scores.mask.sum(1).tolist() == lengths[:2]
    # One that it is asked all the same is named: also the first one that is too long.
    teacher.client.score([[2, 5], [token] * (LONGEST - 7)])
    for n in (LONGEST - 6, LONGEST + 50):
        with pytest.raises(RowRefusedError, match="1 of 3 rows are not taken") as caught:
            teacher.client.score([[2, 5], [token] * n, [2, 6]])
        assert caught.value.rows == [1]


def test_hidden_states_are_those_of_the_model_here(server, local, batch, capsys):
    prompts, rows, queries = batch
    want = local.score(prompts, rows, queries=queries, keep=True)
    teacher = teacher_of(server, local.tokenizer, rows="hidden", head=read_head(str(folder(demo.GEMMA)), CPU))
    assert teacher.self_test() is None
    for _ in range(2):  # then all of it is in the server's cache
        got = teacher.score(prompts, rows, queries=queries, keep=True)
        gap = (got.logprobs - want.logprobs).abs()[want.mask]
        assert gap.max() < 1e-3
        torch.testing.assert_close(got.transferred, want.transferred, atol=1e-2, rtol=1e-3, equal_nan=True)
    with capsys.disabled():
        print(f"\n  hidden states: {teacher.bytes_per_token} bytes a token; largest {gap.max():.2g}, {gap.mean():.2g}")


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("more", [(), ("--loss", "cover", "--teacher-rows", "top")], ids=["default", "cover"])
def test_the_command_line_trains_with_it(server, overlap, more, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(["Why is the sky blue?", "Name three colors.", "What is 2 + 2?", "Say hello."]))
    command = [sys.executable, "-m", "xtokmap", "train", "--student", str(folder(demo.SMOLLM2))]
    command += ["--teacher", str(folder(demo.GEMMA)), "--teacher-url", server.url, "--prompts", str(prompts)]
    command += ["--output", str(tmp_path / "out"), "--steps", "3", "--batch-size", "4", "--max-new-tokens", "24"]
    command += ["--teacher-timeout", "300", "--device", "cpu", "--save-every", "0", *more]
    command += ["--overlap"] if overlap else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"loss={'cover' if more else 'transfer_kl'}" in done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert [line["skipped_batches"] + line["skipped_rows"] for line in lines] == [0] * 3
    assert all(np.isfinite([line["loss"], line["kl_per_byte"]]).all() for line in lines)
    assert (Path(tmp_path) / "out" / "student" / "model.safetensors").exists()


def test_it_is_killed_started_again_for_longer_rows_and_replaced(server, local, batch, tmp_path, capsys):
    """The last test: the server has another model then."""
    prompts, rows, _ = batch
    longer, said = LONGEST + 64, []
    teacher = teacher_of(server, local.tokenizer, patience=1200.0)
    teacher.self_test()
    teacher.client.say = said.append
    before = teacher.score(prompts, rows).logprobs

    def after(*arguments):
        """Scores that are asked for while it is away."""
        server.kill()
        thread = threading.Thread(target=server.restart, args=(SGLang.length, str(longer), *arguments))
        thread.start()
        try:
            return teacher.score(prompts, rows).logprobs
        finally:
            thread.join()

    assert (after("--allow-auto-truncate") - before).abs().max() < 1e-3
    assert "is not there" in said[0]
    assert said[-1].startswith(f"{server.url} answers, after ")
    assert teacher.client.max_length == longer
    # Told so, it cuts what is too long, and does not say so but by a number.
    token = local.tokenizer("a", add_special_tokens=False).input_ids[0]
    with pytest.raises(RowRefusedError, match=f"cuts it to .* of its {longer + 9} tokens") as caught:
        teacher.client.score([[2, 5], [token] * (longer + 9)])
    assert caught.value.rows == [1]
    torch.manual_seed(0)
    with torch.no_grad():
        for p in local.model.parameters():
            p.add_(torch.randn_like(p) * 0.1 * p.std().nan_to_num(0))
    local.model.save_pretrained(tmp_path / "other")
    local.tokenizer.save_pretrained(tmp_path / "other")
    server.model = tmp_path / "other"
    with pytest.raises(OtherTeacherError, match="has another model than at the start") as error:
        after()
    with capsys.disabled():
        print(f"\n  {said[-1]}; {error.value}")

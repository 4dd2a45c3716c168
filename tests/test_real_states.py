"""Hidden states of a real vLLM's pooling runner: `make test-servers`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from real_server import LONGEST, VENV, VLLM, folder, local_teacher
from xtokmap import Aligner, demo
from xtokmap.models import load_tokenizer
from xtokmap.teachers.client import RowRefusedError, TeacherError
from xtokmap.teachers.head import read_head
from xtokmap.teachers.remote import ServerTeacher
from xtokmap.train.config import Config
from xtokmap.train.loop import train

pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(VENV is None, reason="make test-servers says where vLLM is (XTOKMAP_VLLM)"),
    pytest.mark.filterwarnings("ignore"),  # of transformers and torch, about models of this size
]

CPU = torch.device("cpu")
#: Rows are not cut in parts here.
LENGTH = ("--max-model-len", str(LONGEST), "--max-num-batched-tokens", str(LONGEST))
POOLING = ("--runner", "pooling", "--convert", "embed", "--pooler-config", '{"task":"token_embed"}')
TEXTS = ["The sky is blue because air scatters short waves more than long ones.", "Grüße: 12 * 12 = 144, 你好."]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("vllm") / "log"
    with VLLM(folder(demo.GEMMA), log, *LENGTH, *POOLING) as found:
        yield found


@pytest.fixture(scope="module")
def local():
    return local_teacher()


def test_states_are_those_of_the_model_here(server, local):
    head = read_head(str(folder(demo.GEMMA)), CPU)
    teacher = ServerTeacher(server.url, local.tokenizer, rows=("hidden", "sums"), head=head, timeout=300.0)
    assert "hidden states alone" in teacher.self_test()
    assert (teacher.rows, teacher.bytes_per_token) == ("hidden", 640 * 4)
    assert teacher.head.norm == ""
    aligner = Aligner(load_tokenizer(str(folder(demo.SMOLLM2))), local.tokenizer)
    teacher_ids, batch = aligner.retokenize([aligner_ids(text) for text in TEXTS])
    rows, queries = [row.tolist() for row in teacher_ids], aligner.cover_queries(batch)
    prompts = [local.tokenizer("Go on:").input_ids] * len(rows)
    want = local.score(prompts, rows, queries=queries, keep=True)
    got = teacher.score(prompts, rows, queries=queries, keep=True)
    apart = (got.logprobs - want.logprobs).abs()[want.mask]
    print(f"logprobs: largest gap {apart.max():.2g}, mean {apart.mean():.2g}")
    assert apart.max() < 1e-3
    torch.testing.assert_close(got.transferred, want.transferred, atol=1e-2, rtol=1e-3, equal_nan=True)
    n = want.rows.shape.numel()
    torch.testing.assert_close(got.rows.slice(0, n), want.rows.slice(0, n), atol=2e-3, rtol=1e-3)
    wrong = ServerTeacher(server.url, local.tokenizer, rows="hidden", head=replace(head, scale=0.1), timeout=300.0)
    with pytest.raises(TeacherError, match=r"to be scaled by about [01]\.\d+; the configuration says 0\.1"):
        wrong.self_test()


def test_rows_at_the_limit(server, local):
    head = read_head(str(folder(demo.GEMMA)), CPU)
    teacher = ServerTeacher(server.url, local.tokenizer, rows="hidden", head=head, timeout=300.0)
    teacher.self_test()
    token = local.tokenizer("a", add_special_tokens=False).input_ids[0]
    rows = [[token] * n for n in (LONGEST - 1, LONGEST)]
    assert teacher.too_long([[2]] * 2, rows)[0] == [1]
    assert teacher.score([[2]], rows[:1]).mask.sum() == LONGEST - 1
    with pytest.raises(RowRefusedError, match="1 of 2 rows are not taken") as caught:
        teacher.score([[2]] * 2, [[token], rows[1]])
    assert caught.value.rows == [1]


def aligner_ids(text):
    return load_tokenizer(str(folder(demo.SMOLLM2)))(text).input_ids


def test_five_steps_over_the_wire_are_those_with_the_teacher_here(server, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"What is {a} plus {50 - a}?" for a in range(3, 43)))
    runs = []
    for name, changes in (("here", {}), ("served", {"teacher_url": server.url, "teacher_timeout": 300.0})):
        config = Config(
            student=str(folder(demo.SMOLLM2)), teacher=str(folder(demo.GEMMA)), prompts=str(prompts), steps=5,
            output=str(tmp_path / name), batch_size=2, max_new_tokens=12, learning_rate=1e-5, device="cpu",
            save_every=0, report_every=0, **changes,
        )  # fmt: skip
        runs.append([line["loss"] for line in train(config).metrics])
        print(f"{name}: {runs[-1]}")
    assert runs[0] == pytest.approx(runs[1], rel=1e-3, abs=1e-4)

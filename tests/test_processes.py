"""Several processes do what one does: the same loss, gradients and weights, and the same files."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import faults
import killable
import several
import tiny
import xtokmap
from xtokmap.train.config import Config
from xtokmap.train.loop import train
from xtokmap.train.support.checkpoint import found
from xtokmap.train.support.distributed import Processes, launched, shard

pytestmark = pytest.mark.filterwarnings("ignore:fastokens gives other ids")


@pytest.mark.parametrize(
    ("dtype", "empty", "changes"),
    [
        ("float32", 9, {}),
        ("float32", 9, {"shard": True}),
        ("float32", 3, {"shard": True, "updates": 2, "loss": "prior", "aggregate": "scored", "score_stop": False}),
        ("bfloat16", 3, {"aggregate": "scored", "score_stop": False}),
    ],
)
def test_two_processes_make_the_step_of_one(tmp_path, dtype, empty, changes):
    """Five rows, three and two; in two of the cases the second process has nothing that is scored."""
    values = killable.settings(tmp_path, batch_size=5, micro_batch=2, learning_rate=1e-3, warmup_steps=1, **changes)
    one, two = several.launch(several.compare, tmp_path, values, empty, dtype)
    print({name: value for name, value in one.items() if name != "digest"})
    assert one["digest"] == two["digest"]  # the same weights in both, to the bit
    assert one["scored"] > 0.1
    assert bool(one["shards"]) == ("shard" in changes)
    # bfloat16 passes round each micro-batch's gradient, and other rows share one.
    tolerance = 1e-6 if dtype == "float32" else 2e-2
    assert one["gradient"] > 0.05
    assert one["gradients"] < tolerance
    assert one["loss"] < tolerance
    assert one["metrics"] < 100 * tolerance
    # AdamW makes a step of the sign of a gradient near zero: only a few times the learning rate is certain of all.
    assert one["weights"] < (1e-4 if dtype == "float32" else 4e-3)


@pytest.mark.parametrize("form", several.FORMS)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_plain_loop_in_pytorchs_wrappers_makes_the_step_of_one(tmp_path, how, form):
    """Five rows, three and two, with answers of other lengths: the denominator is what all processes have."""
    for differences in several.launch(several.own_loop, tmp_path, how, form):
        assert differences["sampled"]
        assert differences["gradient"] > 0.05
        assert differences["first"] < 1e-6
        assert differences["second"] < 1e-6
        assert differences["weights"] < 1e-6


@pytest.fixture(scope="module")
def url():
    with faults.serving(tiny.teacher_model(), tiny.teacher_tokenizer()) as server:
        yield server.url


@pytest.mark.parametrize(
    "how", ["plain", *(pytest.param(x, marks=pytest.mark.slow) for x in ("sharded", "overlap", "states"))]
)
def test_two_processes_stop_together_and_resume_to_the_bit(tmp_path, how, url):
    sharded = how == "sharded"
    prompts = tmp_path / "p.jsonl"
    rows = [{"prompt": t, "split": s} for s in ("train", "heldout") for t in ("the sky", "a fox?", "1 + 2")]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    values = killable.settings(tmp_path, prompts=str(prompts), steps=4, batch_size=3, shard=sharded)
    if how == "overlap":
        values |= {"teacher_url": url, "overlap": True}
    if how == "states":
        tiny.teacher_model().save_pretrained(tmp_path / "teacher")
        values |= {"teacher": str(tmp_path / "teacher"), "teacher_url": url, "loss": "transfer_kl", "overlap": True}
    whole = {**values, "output": str(tmp_path / "whole")}
    (steps, interrupted, after), other = several.launch(several.loop_of, tmp_path, whole, None, "float32")
    assert (steps, interrupted, after) == tuple(other) == (4, False, after)
    assert several.launch(several.loop_of, tmp_path, values, 3, "float32") == [[3, True, None]] * 2
    assert [path.name[-1] for path in found(tmp_path / "out/checkpoints")] == ["2", "3"]
    assert several.launch(several.loop_of, tmp_path, {**values, "resume": True}, None, "float32") == [other] * 2
    assert killable.left(tmp_path / "out") == killable.left(tmp_path / "whole")
    assert (tmp_path / "0.log").read_text().count("step 4/4") == 2
    assert "step 4/4" not in (tmp_path / "1.log").read_text()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out/student")
    assert not all(
        torch.equal(a, b) for a, b in zip(saved.parameters(), tiny.student_model().parameters(), strict=True)
    )
    # One process cannot resume what two began.
    alone = Config(**{**values, "resume": True, "steps": 5, "shard": False})
    with pytest.raises(xtokmap.XTokMapError, match="shard=True, not False" if sharded else "2 processes, not 1"):
        train(alone, models=tiny.pair())


def test_what_several_processes_cannot_do(tmp_path, monkeypatch):
    values = killable.settings(tmp_path, batch_size=1)
    for error in several.launch(several.refuse, tmp_path, values):
        assert error == "XTokMapError: batch_size=1: each of the 2 processes needs a prompt"
    with pytest.raises(xtokmap.XTokMapError, match="shard=True needs several processes"):
        shard(tiny.student_model(), Processes(), torch.device("cpu"))
    with monkeypatch.context() as old:
        old.delattr("torch.distributed.fsdp.FSDPModule.set_force_sum_reduction_for_comms")
        with pytest.raises(xtokmap.XTokMapError, match=r"shard=True: torch .* cannot shard layers as needed here"):
            shard(tiny.student_model(), Processes(0, 2), torch.device("cpu"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "")
    with pytest.raises(xtokmap.XTokMapError, match="start several processes with accelerate launch or torchrun"):
        launched("cpu").__enter__()


@pytest.mark.parametrize(("rows", "count"), [(5, 2), (4, 4), (2, 3), (0, 2), (7, 3)])
def test_shares_are_the_batch_in_order(rows, count):
    shares = [Processes(rank, count).share(range(rows)) for rank in range(count)]
    assert [i for share in shares for i in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_every_process_has_a_seed_of_its_own():
    seeds = [Processes(rank, 4).seed(2**63 - 1) for rank in range(4)]
    assert len(set(seeds)) == 4
    assert seeds[0] == 2**63 - 1
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)

"""LoRA: the adapter alone is trained, on the paths of a plain model, and it can be saved and loaded."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import tiny
import xtokmap
from xtokmap.models import float32_parameters, with_adapter, without_wrapper
from xtokmap.torch import completions
from xtokmap.torch.completions import completion_logprobs, completion_rows
from xtokmap.train.config import Config
from xtokmap.train.loop import train

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    "ignore:fastokens gives other ids",
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",  # peft's own, where it loads an adapter
    "ignore:Model has .tie_word_embeddings=True.:UserWarning",
)

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
COMPLETIONS = [[300, 301], [], [20, 21, 22, 23]]


def adapted(dtype=torch.float32, **settings):
    """With an adapter that does something: a fresh one is zero."""
    model = with_adapter(tiny.student_model().to(dtype), 4, **settings)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * 0.3)
    return model


def one_by_one(model):
    rows = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        if completion:
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            rows.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_go_past_the_logits_as_those_of_a_plain_model(dtype):
    model = adapted(dtype)
    rows = completion_rows(model, PROMPTS, COMPLETIONS)
    assert rows.weight is without_wrapper(model).get_output_embeddings().weight
    own = completion_logprobs(model, PROMPTS, COMPLETIONS)
    flat = torch.cat([own[b, : len(row)] for b, row in enumerate(COMPLETIONS)])
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(flat, one_by_one(model).float(), atol=tolerance, rtol=0)
    assert (
        flat - completion_logprobs(tiny.student_model().to(dtype), PROMPTS, COMPLETIONS)[own != 0]
    ).abs().max() > 0.1
    flat.sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == ("lora_" in name)


def test_an_adapter_on_the_head_is_seen_and_goes_through_the_logits():
    model = adapted(targets="q_proj, lm_head")
    assert completions.body_and_head(model) == (None, None)
    own = completion_logprobs(model, PROMPTS, COMPLETIONS)
    torch.testing.assert_close(own[own != 0], one_by_one(model), atol=1e-5, rtol=0)


def test_float32_adapters_of_a_bfloat16_model_are_what_is_optimised():
    model = adapted(torch.bfloat16)
    parameters = float32_parameters(model)
    assert {id(p) for p in parameters} == {id(p) for name, p in model.named_parameters() if "lora_" in name}
    assert all(p.dtype == torch.float32 for p in parameters)
    assert without_wrapper(model).dtype == torch.bfloat16


def config(tmp_path, **changes):
    prompts = tmp_path / "p.jsonl"
    rows = [{"prompt": t} for t in ("the sky", "the dog", "a fox?", "1 + 2")]
    prompts.write_text("\n".join(json.dumps(row) for row in [*rows, {"prompt": "the grass", "split": "heldout"}]))
    values = {"prompts": str(prompts), "output": str(tmp_path / "out"), "steps": 3, "batch_size": 8, "device": "cpu"}
    values |= {"max_new_tokens": 12, "learning_rate": 1e-2, "warmup_steps": 1, "max_chunk_tokens": 0, "lora_rank": 4}
    return Config(**{**values, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_changes_and_saves_the_adapter_alone(tmp_path, dtype):
    models = tiny.pair()
    models[0].to(dtype)
    before = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    result = train(config(tmp_path), models=models)
    assert [m["skipped_updates"] for m in result.metrics] == [0, 0, 0]
    trained = models[0]  # the adapter is inside its layers
    after = dict(trained.named_parameters())
    for name, p in before.items():
        place = name.replace(".weight", ".base_layer.weight")
        assert torch.equal(p, after[place if place in after else name])
    folder = result.output / "student"
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / "model.safetensors").exists()
    base = tiny.student_model().to(dtype)
    loaded = peft.PeftModel.from_pretrained(base, folder)
    got = completion_logprobs(loaded.eval(), PROMPTS, COMPLETIONS)
    want = completion_logprobs(trained.eval(), PROMPTS, COMPLETIONS)
    torch.testing.assert_close(got, want, atol=0, rtol=0)
    assert not torch.equal(got, completion_logprobs(tiny.student_model().to(dtype), PROMPTS, COMPLETIONS))
    assert " trained)" in json.loads((result.output / "environment.json").read_text())["student"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_learns(dtype):
    base = tiny.student_model().to(dtype)
    with torch.no_grad():
        for p in base.parameters():
            p.mul_(6)  # embeddings that are long enough for hidden states to move logits
    model = with_adapter(base, 8)
    optimizer = torch.optim.AdamW(float32_parameters(model), lr=2e-2)
    losses = []
    for _ in range(40):
        loss = -completion_logprobs(model, PROMPTS, COMPLETIONS).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 6  # nats, of six tokens


def test_what_cannot_be_adapted_is_named(monkeypatch):
    with pytest.raises(xtokmap.XTokMapError, match=r"lora_targets='no_such': .*no_such"):
        with_adapter(tiny.student_model(), 4, targets="no_such")
    with pytest.raises(xtokmap.XTokMapError, match="lora_rank=-1"):
        Config(lora_rank=-1)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(xtokmap.XTokMapError, match=r"pip install 'xtokmap\[lora\]'"):
        with_adapter(tiny.student_model(), 4)

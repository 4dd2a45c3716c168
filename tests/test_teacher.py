"""Teachers: logprobs[i] scores ids[i] given ids[<i], whatever the batching."""

from __future__ import annotations

import pytest
import torch
from transformers import FalconH1Config, FalconH1ForCausalLM, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

import tiny
import xtokmap
from xtokmap.chat import PLAIN_TEMPLATE, render, stop_id
from xtokmap.teachers.local import LocalTeacher
from xtokmap.torch.completions import completion_logprobs

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
COMPLETIONS = [[300, 301], [], [20, 21, 22, 23]]


def one_by_one(model, prompt, completion):
    """What every row of logits says of the token after it, in float64."""
    logits = model(torch.tensor([prompt + completion])).logits[0].double()
    rows = logits.log_softmax(-1)
    return [rows[len(prompt) - 1 + k, token].item() for k, token in enumerate(completion)]


@pytest.mark.parametrize("make", [tiny.teacher_model, tiny.student_model])
@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_scores_are_the_models_own(make, micro_batch):
    model = make()
    teacher = LocalTeacher(model, tiny.teacher_tokenizer(), micro_batch=micro_batch)
    scores = teacher.score(PROMPTS, COMPLETIONS)
    assert scores.logprobs.dtype == torch.float32
    assert scores.mask.tolist() == [[True, True, False, False], [False] * 4, [True] * 4]
    for b, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        with torch.no_grad():
            want = one_by_one(model, prompt, completion)
        assert scores.logprobs[b, : len(want)].tolist() == pytest.approx(want, abs=2e-5)
        assert (scores.logprobs[b, len(want) :] == 0).all()
    assert not scores.logprobs.requires_grad


def test_a_model_without_a_known_head_goes_through_its_own_logits(monkeypatch):
    model = tiny.teacher_model()
    want = LocalTeacher(model, tiny.teacher_tokenizer()).score(PROMPTS, COMPLETIONS).logprobs
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    got = LocalTeacher(model, tiny.teacher_tokenizer()).score(PROMPTS, COMPLETIONS).logprobs
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def capped() -> RecurrentGemmaForCausalLM:
    settings = {"num_hidden_layers": 3, "num_attention_heads": 4, "attention_window_size": 32, "logits_soft_cap": 1.0}
    return RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(vocab_size=420, hidden_size=32, intermediate_size=64, **settings)
    )


def multiplied() -> FalconH1ForCausalLM:
    settings = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "lm_head_multiplier": 0.2}
    mamba = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 16}
    return FalconH1ForCausalLM(
        FalconH1Config(vocab_size=420, hidden_size=32, intermediate_size=64, **settings, **mamba)
    )


@pytest.mark.parametrize("make", [capped, multiplied])
def test_what_a_family_does_to_its_logits_is_seen_whatever_its_name(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    scores = LocalTeacher(model, tiny.teacher_tokenizer()).score(PROMPTS, COMPLETIONS)
    for b, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        with torch.no_grad():
            want = one_by_one(model, prompt, completion)
        assert scores.logprobs[b, : len(want)].tolist() == pytest.approx(want, abs=2e-4)


@pytest.mark.parametrize("prompts", [[[5, 6, 7], [8, 9, 10, 11], [9, 10, 11, 12, 13]], PROMPTS])
def test_own_logits_are_made_from_the_shortest_prompts_end(monkeypatch, prompts):
    model, kept = tiny.teacher_model(), []
    forward = type(model).forward

    def spy(self, *args, logits_to_keep=0, **kwargs):
        kept.append(logits_to_keep)
        return forward(self, *args, logits_to_keep=logits_to_keep, **kwargs)

    want = LocalTeacher(model, tiny.teacher_tokenizer()).score(prompts, COMPLETIONS).logprobs
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    monkeypatch.setattr(type(model), "forward", spy)
    got = LocalTeacher(model, tiny.teacher_tokenizer()).score(prompts, COMPLETIONS).logprobs
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    assert kept == [9 - (min(map(len, prompts)) - 1) if min(map(len, prompts)) > 1 else 0]


def test_gradients_reach_every_parameter_as_through_logits():
    model = tiny.student_model()
    completion_logprobs(model, PROMPTS, COMPLETIONS, width=6).sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        if completion:
            rows = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
            at = torch.arange(len(completion))
            rows[len(prompt) - 1 + at, torch.tensor(completion)].sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, atol=1e-4, rtol=1e-3)


def test_prompts_go_through_the_chat_template_or_a_plain_one():
    chat = render(tiny.student_tokenizer(), ["the sky?"])[0]
    assert tiny.student_tokenizer().decode(chat) == "<|im_start|>user\nthe sky?<|im_end|>\n<|im_start|>assistant\n"
    plain = render(tiny.teacher_tokenizer(), ["the sky?"])[0]
    assert xtokmap.byte_table(tiny.teacher_tokenizer()).decode(plain).decode() == PLAIN_TEMPLATE.format(
        prompt="the sky?"
    )
    with pytest.raises(xtokmap.XTokMapError, match=r"must contain \{prompt\}"):
        render(tiny.teacher_tokenizer(), ["a"], "no place for it")


def test_the_stop_token_is_the_templates_own():
    assert stop_id(tiny.student_tokenizer()) == tiny.student_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert stop_id(tiny.teacher_tokenizer()) == tiny.teacher_tokenizer().convert_tokens_to_ids("<eos>")


def test_bad_input_is_named():
    teacher = LocalTeacher(tiny.teacher_model(), tiny.teacher_tokenizer())
    with pytest.raises(xtokmap.XTokMapError, match=r"prompt_ids\[1\] is empty"):
        teacher.score([[1], []], [[2], [3]])
    with pytest.raises(xtokmap.XTokMapError, match="2 prompts and 1 completions"):
        completion_logprobs(tiny.teacher_model(), [[1], [1]], [[2]])

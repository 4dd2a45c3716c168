"""Conversations: contents go with contents, ends of turns with ends of turns, for any two templates."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import tiny
import xtokmap
from xtokmap import Kind
from xtokmap.chat import Renderer, render_pair
from xtokmap.torch.index import ChunkIndex

# In the shape of the families' own templates, with their markers and their trimming.
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
)
GEMMA = (
    "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "<｜begin▁of▁sentence｜>{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}"
    "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endfor %}"
)
TEMPLATES = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "llama3": (LLAMA3, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "gemma": (GEMMA, ["<bos>", "<start_of_turn>", "<end_of_turn>"]),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"]),
    "deepseek": (DEEPSEEK, ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"]),
    "harmony": (HARMONY, ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"]),
    "plain": (None, []),
}
pytestmark = pytest.mark.filterwarnings("ignore:fastokens gives other ids")

CONVERSATION = [
    {"role": "user", "content": "what is the sky?"},
    {"role": "assistant", "content": "the sky is blue <|im_end|> user\n<end_of_turn> é"},
    {"role": "user", "content": "the sky is blue"},  # the same text as a part of an answer
    {"role": "assistant", "content": "  the grass\n is green </s> "},
]


def tokenizer(side: str, name: str) -> PreTrainedTokenizerFast:
    source = tiny.student_tokenizer() if side == "student" else tiny.teacher_tokenizer()
    copy = PreTrainedTokenizerFast(
        tokenizer_object=type(source.backend_tokenizer).from_str(source.backend_tokenizer.to_str()),
        eos_token=source.eos_token,
    )
    template, markers = TEMPLATES[name]
    if markers:
        copy.add_tokens(markers, special_tokens=True)
    copy.chat_template = template
    return copy


@pytest.mark.parametrize(("one", "other"), [*product(TEMPLATES, TEMPLATES)])
def test_any_two_templates(one, other):
    student, teacher = tokenizer("student", one), tokenizer("teacher", other)
    aligner = xtokmap.Aligner(student, teacher)
    s, t, batch = render_pair(aligner, student, teacher, [CONVERSATION, CONVERSATION[:2]])
    a = batch[0]
    for side, conversations, table in (("student", s, aligner.student), ("teacher", t, aligner.teacher)):
        for k, (message, (start, stop)) in enumerate(zip(CONVERSATION, conversations[0].contents, strict=True)):
            own = table.decode(conversations[0].ids[start:stop].tolist()).decode()
            assert own.strip() == message["content"].strip(), (side, k)
        assert (conversations[0].stops >= 0).tolist() == [False, True, False, True]
        assert all(int(conversations[0].ids[i]) in table.stop_ids for i in conversations[0].stops if i >= 0)
    # Both ends of turns correspond, and nothing but the assistant's words was aligned.
    assert (a.kind == Kind.STOP).sum() == 2
    assert a.coverage > 0.9
    ends = np.flatnonzero(a.kind == Kind.STOP)
    assert ends[-1] == len(a.kind) - 1
    for chunk in a:
        if chunk.kind not in (Kind.REWRITTEN, Kind.STOP):
            words = t[0].ids[t[0].mask()][chunk.teacher.start : chunk.teacher.stop]
            assert aligner.teacher.decode(words.tolist()) == chunk.text
    # The first answer is not trimmed by any template: it is exact.
    assert not (a.kind[: ends[0]] == Kind.REWRITTEN).any()
    index = ChunkIndex.from_alignment(batch)
    assert index.student_chunk.shape == (2, max(len(c.ids) for c in s))
    inside = index.student_chunk[0, : len(s[0].ids)] >= 0
    assert not inside[~s[0].mask()].any()


def test_trimming_costs_the_white_space_only():
    student, teacher = tokenizer("student", "chatml"), tokenizer("teacher", "llama3")
    aligner = xtokmap.Aligner(student, teacher)
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n the fox runs away \n"}]
    _, _, batch = render_pair(aligner, student, teacher, [conversation])
    kept = b"".join(c.text for c in batch[0] if c.kind not in (Kind.REWRITTEN, Kind.STOP))
    assert b"fox runs" in kept
    assert batch[0].kind[-1] == Kind.STOP


def test_a_rewritten_content_keeps_the_turns_apart():
    student, teacher = tokenizer("student", "chatml"), tokenizer("teacher", "deepseek")
    aligner = xtokmap.Aligner(student, teacher)
    conversation = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>what is it?</think>the sky is blue and the grass is green"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "the fox"},
    ]
    s, _, batch = render_pair(aligner, student, teacher, [conversation])
    a = batch[0]
    assert (a.kind == Kind.STOP).sum() == 2
    words = [c.text for c in a if c.kind not in (Kind.REWRITTEN, Kind.STOP)]
    assert b"".join(words).endswith(b"the grass is greenthe fox")
    # Markers of thinking that are not special are ordinary bytes on the side that keeps them.
    start, stop = s[0].contents[1]
    assert aligner.student.decode(s[0].ids[start:stop].tolist()).startswith(b"<think>what")


def test_a_truncated_turn_has_no_stop():
    student, teacher = tokenizer("student", "chatml"), tokenizer("teacher", "gemma")
    aligner = xtokmap.Aligner(student, teacher)
    s, t, batch = render_pair(aligner, student, teacher, [CONVERSATION] * 2, truncated=[False, True])
    assert [(a.kind == Kind.STOP).sum() for a in batch] == [2, 1]
    assert s[1].stops[-1] == t[1].stops[-1] == -1
    assert s[1].contents[-1][1] == len(s[1].ids)


def test_what_cannot_be_rendered_is_named():
    student = tokenizer("student", "chatml")
    renderer = Renderer(student, xtokmap.byte_table(student).stop_ids)
    with pytest.raises(xtokmap.XTokMapError, match=r"messages\[1\]: expected a dict with role and content"):
        renderer([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}])
    student.chat_template = "{{ messages[0].content }}"
    with pytest.raises(xtokmap.XTokMapError, match=r"messages\[1\] \(role 'assistant'\): the chat template leaves"):
        renderer([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    student.chat_template = "{% for m in messages %}{{ m.content | length }}:{{ m.content }}{% endfor %}"
    with pytest.raises(xtokmap.XTokMapError, match=r"messages\[0\].*changes the text around it"):
        renderer([{"role": "user", "content": "a"}])
    aligner = xtokmap.Aligner(student, tokenizer("teacher", "gemma"))
    with pytest.raises(xtokmap.XTokMapError, match="truncated has 1 flags for 2 conversations"):
        render_pair(aligner, student, student, [[], []], truncated=[True])

"""Prompts: what is asked, as users and data sets have it, comes to each side whole, or is refused by name."""

from __future__ import annotations

import copy
import json
import pickle
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import real_tokenizers as real
import tiny
from test_chat import TEMPLATES
from xtokmap import XTokMapError, byte_table
from xtokmap.chat import PLAIN_TEMPLATE, Prompt, Renderer, render
from xtokmap.train.prompts import read_prompts

# In the shape of the families' own templates, as they publish them.
QWEN3 = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- "# Tools\\n\\n<tools>" }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
{{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}
{%- if message.content is string %}{{- message.content.split('</think>')[-1].lstrip('\\n') }}{%- endif %}
{%- for call in message.tool_calls or [] %}{%- set call = call.function or call %}
{{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + call.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
GEMMA2 = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""
# It shows parts of a content, as models that see pictures have them, and no string.
IDEFICS = """\
{% for message in messages %}{{ message.role }}:{% for part in message['content'] %}{% if part['type'] == 'text' %}\
{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}\
{% if add_generation_prompt %}Assistant:{% endif %}"""

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wie ist es in München?",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
USER = {"role": "user", "content": "what is the sky?"}
TURNS = [
    {"role": "system", "content": "be brief"},
    USER,
    {"role": "assistant", "content": "the sky is blue"},
    {"role": "user", "content": "and the grass?"},
]
CALLED = {
    "messages": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "sunny"},
    ],
    "tools": [TOOL],
}


def tokenizer(template: str | None, make=tiny.student_tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    source = make()
    backend = type(source.backend_tokenizer).from_str(source.backend_tokenizer.to_str())
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=source.eos_token, **tokens)
    made.chat_template = template
    return made


def told(tokenizer: PreTrainedTokenizerFast, prompt: object, *template: str) -> str:
    (ids,) = render(tokenizer, [prompt], *template)
    return tokenizer.decode(ids)


def as_json(found: tuple[list[Prompt], list[Prompt]]) -> tuple[list[object], list[object]]:
    return [p.as_json() for p in found[0]], [p.as_json() for p in found[1]]


# ---- what is a prompt --------------------------------------------------------------------------------------------


def test_what_can_be_asked():
    whole = Prompt.of({"messages": TURNS})
    assert [m["content"] for m in whole.messages] == [
        "be brief",
        "what is the sky?",
        "the sky is blue",
        "and the grass?",
    ]
    assert whole == Prompt.of(TURNS) == Prompt(TURNS) == Prompt.of(whole) == Prompt.of({"prompt": TURNS, "answer": 3})
    assert whole != Prompt.of(TURNS[:2])
    assert whole != TURNS
    assert len({whole, Prompt.of(TURNS), Prompt.of("a")}) == 2
    assert Prompt.of("what is the sky?") == Prompt.of([USER]) == Prompt.of({"prompt": "what is the sky?"})
    assert Prompt.of({"prompt": "a", "messages": None, "tools": [], "chat_template_kwargs": None}) == Prompt.of("a")
    called = Prompt.of(CALLED)
    assert called.tools == [TOOL]
    assert called == Prompt.of({**CALLED, "tools": json.dumps([TOOL])})
    assert Prompt.of({**CALLED, "tools": "null"}).tools is None
    # OpenAI leaves the content out beside a call, or has null there.
    bare = [{name: m[name] for name in m if m[name] is not None} for m in CALLED["messages"]]
    assert Prompt.of({"messages": bare, "tools": [TOOL]}) == called
    assert pickle.loads(pickle.dumps(called)) == copy.deepcopy(called) == called


def test_what_json_has_of_it():
    assert Prompt.of("what is\nthe sky?").as_json() == "what is\nthe sky?"
    assert Prompt.of([USER]).as_json() == "what is the sky?"
    assert Prompt.of([{**USER, "name": "ann"}]).as_json() == {"messages": [{**USER, "name": "ann"}]}
    assert Prompt.of({"prompt": "a", "chat_template_kwargs": {"enable_thinking": False}}).as_json() == {
        "messages": [{"role": "user", "content": "a"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert Prompt.of(CALLED).as_json() == CALLED


def test_what_a_report_calls_it():
    assert Prompt.of(" what is\n\n the\u2028sky? ").title == "what is the sky?"
    assert Prompt.of(TURNS).title == "and the grass?"
    assert Prompt.of(CALLED).title == "what is the sky?"
    assert Prompt.of([{"role": "tool", "content": "sunny"}]).title == "sunny"


def test_nobody_changes_it_from_outside():
    turns = copy.deepcopy(TURNS)
    prompt = Prompt.of(turns)
    turns[0]["content"] = "be long"
    turns.append({"role": "user", "content": "more"})
    prompt.as_json()["messages"].clear()
    assert prompt == Prompt.of(TURNS)


NESTED: list[object] = []
for _ in range(2000):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, r'prompt 3: expected a string, a list of messages or an object with "prompt" or "messages", got 3'),
        (None, "prompt 3: expected a string, a list of messages"),
        (b"what?", r"prompt 3: expected a string, .* got b'what\?'"),
        ({"text": "a"}, r"""prompt 3: expected an object with "prompt" or "messages", got \{'text': 'a'\}"""),
        ({"text": NESTED}, 'prompt 3: expected an object with "prompt" or "messages", got '),
        (USER, 'expected an object with "prompt" or "messages", .*; a single message goes into a list'),
        ({"prompt": 3}, "prompt 3: prompt must be a string or a list of messages, got 3"),
        ({"prompt": USER}, "prompt 3: prompt must be a string or a list of messages, got "),
        ({"messages": "a"}, "prompt 3: messages must be a list of at least one message, got 'a'"),
        ({"messages": USER}, "prompt 3: messages must be a list of at least one message"),
        ([], r"prompt 3: messages must be a list of at least one message, got \[\]"),
        (["a"], r"prompt 3: messages\[0\]: expected a dict with role and content, both strings, got 'a'"),
        ([USER, {"role": 3, "content": "a"}], r"prompt 3: messages\[1\]: expected a dict with role and content"),
        ([{"role": "user"}], r"prompt 3: messages\[0\]: expected a dict with role and content, both strings"),
        ([{"role": "user", "content": None}], r"messages\[0\]: expected a dict with role and content"),
        ([{"role": "user", "content": None, "tool_calls": [CALL]}], r"messages\[0\]: expected a dict"),
        ([{"role": "assistant", "content": None, "tool_calls": []}, USER], r"messages\[0\]: expected a dict"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "; join its parts into one text"),
        (
            TURNS[:3],
            r"prompt 3: messages\[2\] is the last and of role 'assistant': what is asked must end with the user",
        ),
        (
            TURNS[:1],
            r"messages\[0\] is the last and of role 'system': .* or a tool's turn; take off what comes after it",
        ),
        ("a\ud800", r"prompt 3: character 1 is U\+D800"),
        ({"prompt": "a\ud800"}, r"prompt 3: prompt: character 1 is U\+D800"),
        ([{"role": "user", "content": "\udfff"}], r"prompt 3: messages\[0\], content: character 0 is U\+DFFF"),
        ([{"role": "\udfff", "content": ""}], r"prompt 3: messages\[0\], role: character 0 is U\+DFFF"),
        ([{**USER, "name": ["a", "\udfff"]}], r"prompt 3: messages\[0\], name\[1\]: character 0 is U\+DFFF"),
        ([{**USER, "\udfff": ""}], r"messages\[0\], a name: character 0 is U\+DFFF"),
        ([{**USER, 3: ""}], r"prompt 3: messages\[0\]: expected what JSON can hold"),
        ([{**USER, "weight": float("nan")}], r"prompt 3: messages\[0\], weight: expected what JSON can hold, got nan"),
        ([{**USER, "weight": 10**5000}], r"messages\[0\], weight: expected what JSON can hold"),
        ([{**USER, "x": {1, 2}}], r"messages\[0\], x: expected what JSON can hold, got \{1, 2\}"),
        ([{**USER, "x": NESTED}], r"messages\[0\], x\[0\].*: more than 64 lists and objects inside each other"),
        ({"prompt": "a", "tools": {"name": "f"}}, r"prompt 3: tools must be a list of objects, got \{'name'"),
        ({"prompt": "a", "tools": ["f"]}, r"prompt 3: tools\[0\] must be an object that describes a tool, got 'f'"),
        ({"prompt": "a", "tools": [{"name": "\ud800"}]}, r"prompt 3: tools\[0\], name: character 0 is U\+D800"),
        ({"prompt": "a", "tools": "hammer"}, "prompt 3: tools is text, and not JSON: 'hammer'"),
        ({"prompt": "a", "tools": "[" * 100_000}, "prompt 3: tools is text, and not JSON"),
        ({"prompt": "a", "chat_template_kwargs": [1]}, r"prompt 3: chat_template_kwargs must be an object, got \[1\]"),
        ({"prompt": "a", "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs: tokenize is no variable"),
    ],
)
def test_what_cannot_be_asked_is_named(value, message):
    with pytest.raises(XTokMapError, match=message):
        Prompt.of(value, "prompt 3")


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | WORDS,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(WORDS, part, max_size=3),
    max_leaves=6,
)


def messages(role: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, object]]:
    more = st.dictionaries(st.sampled_from(["name", "tool_call_id", "reasoning_content"]), JSON, max_size=2)
    return st.builds(lambda role, content, more: {"role": role, "content": content, **more}, role, WORDS, more)


CONVERSATIONS = st.builds(
    lambda before, last: [*before, last],
    st.lists(messages(st.sampled_from(["system", "user", "assistant", "tool"])), max_size=3),
    messages(st.sampled_from(["user", "tool"])),
)
ASKED = WORDS | CONVERSATIONS
ROWS = st.builds(
    lambda name, asked, tools, kwargs: (
        {name if isinstance(asked, list) else "prompt": asked, "tools": tools} | {"chat_template_kwargs": kwargs}
    ),
    st.sampled_from(["prompt", "messages"]),
    ASKED,
    st.none() | st.lists(st.dictionaries(WORDS, JSON, max_size=2), max_size=2),
    st.none() | st.dictionaries(st.sampled_from(["enable_thinking", "date"]), JSON),
)


@settings(deadline=None)
@given(ASKED | ROWS)
def test_a_prompt_is_what_its_json_says(value):
    prompt = Prompt.of(value)
    again = Prompt.of(json.loads(json.dumps(prompt.as_json())))
    assert again == prompt
    assert hash(again) == hash(prompt)
    assert again.messages == prompt.messages
    assert (again.tools or None, again.chat_template_kwargs) == (prompt.tools or None, prompt.chat_template_kwargs)
    assert len(prompt.title.splitlines()) <= 1
    if isinstance(value, str):
        assert prompt.as_json() == value


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=2),
    lambda part: (
        st.lists(part, max_size=3)
        | st.dictionaries(
            st.sampled_from(["prompt", "messages", "tools", "chat_template_kwargs", "role", "content", "tool_calls"])
            | st.integers(),
            part | st.sampled_from(["user", "assistant", "tool"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(ANYTHING)
def test_anything_is_a_prompt_or_refused_by_place(value):
    try:
        prompt = Prompt.of(value, "there")
    except XTokMapError as error:
        assert str(error).startswith("there: ")  # noqa: PT017
    else:
        assert Prompt.of(json.loads(json.dumps(prompt.as_json()))) == prompt


# ---- rendered ----------------------------------------------------------------------------------------------------


def of_old(tokenizer, prompts, plain_template=PLAIN_TEMPLATE):
    """What became of strings before there were conversations."""
    if tokenizer.chat_template:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
        return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    return [tokenizer(plain_template.replace("{prompt}", prompt)).input_ids for prompt in prompts]


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf")
    path = real.path("smollm2")
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


STRINGS = ["the sky?", "", " \n a ", "<|im_end|> {prompt} </s>", "naïve 你好 \U0001f600", "{{ x }} {% if %}", "a\0b"]


@pytest.mark.parametrize("name", [*TEMPLATES, "qwen3", "gemma2"])
@pytest.mark.parametrize("make", [tiny.student_tokenizer, tiny.teacher_tokenizer])
def test_strings_are_what_they_were(name, make):
    template = {"qwen3": QWEN3, "gemma2": GEMMA2}.get(name) or TEMPLATES[name][0]
    side = tokenizer(template, make, bos_token="<bos>")
    assert render(side, STRINGS) == of_old(side, STRINGS)
    assert render(side, [Prompt.of(text) for text in STRINGS]) == of_old(side, STRINGS)
    if template is None:
        assert render(side, STRINGS, "Q: {prompt}\nA:") == of_old(side, STRINGS, "Q: {prompt}\nA:")


def test_strings_are_what_they_were_to_a_real_model(smollm2):
    assert render(smollm2, STRINGS) == of_old(smollm2, STRINGS)


def test_a_real_models_turns(smollm2):
    assert told(smollm2, TURNS) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nwhat is the sky?<|im_end|>\n"
        "<|im_start|>assistant\nthe sky is blue<|im_end|>\n<|im_start|>user\nand the grass?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert told(smollm2, TURNS[1:2]).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    with pytest.raises(XTokMapError, match=r"^prompt 1: the chat template of .* leaves out the tools, and the model"):
        render(smollm2, ["a", {"prompt": "a", "tools": [TOOL]}])
    with pytest.raises(XTokMapError, match=r"^prompt 0: the chat template of .* fails: .*; take out what it does not"):
        render(smollm2, [{"messages": CALLED["messages"]}])  # its template adds texts, and null is none


def test_one_start_of_text():
    side = tokenizer(GEMMA2, bos_token="<bos>")
    side.add_tokens(["<bos>", "<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    bos = side.convert_tokens_to_ids("<bos>")
    side.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    assert side("a").input_ids[0] == bos
    for prompt in ("a", TURNS[1:]):
        (ids,) = render(side, [prompt])
        assert ids[0] == bos
        assert ids.count(bos) == 1
    side.chat_template = None
    (ids,) = render(side, [TURNS])
    assert ids.count(bos) == 1


def test_tools_and_what_they_say():
    side = tokenizer(QWEN3)
    assert told(side, CALLED) == (
        "<|im_start|>system\n# Tools\n\n<tools>\n" + json.dumps(TOOL, ensure_ascii=False) + "\n</tools><|im_end|>\n"
        "<|im_start|>user\nwhat is the sky?<|im_end|>\n"
        '<|im_start|>assistant\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    with_system = {"messages": [TURNS[0], *CALLED["messages"]], "tools": [TOOL]}
    assert told(side, with_system).startswith("<|im_start|>system\nbe brief\n\n# Tools")


def test_variables_of_a_template():
    side = tokenizer(QWEN3)
    plain = told(side, "a")
    for value, more in ((False, "<think>\n\n</think>\n\n"), (True, "")):
        asked = {"prompt": "a", "chat_template_kwargs": {"enable_thinking": value}}
        assert told(side, asked) == plain + more
        # The other side does not know it.
        assert told(tiny.student_tokenizer(), asked) == told(tiny.student_tokenizer(), "a")


def test_a_template_that_fails_is_named():
    side = tokenizer(GEMMA2, bos_token="")
    assert told(side, TURNS[1:]).endswith("<start_of_turn>user\nand the grass?<end_of_turn>\n<start_of_turn>model\n")
    side.name_or_path = "google/gemma-2"
    with pytest.raises(
        XTokMapError, match=r"^prompt 1: the chat template of google/gemma-2 fails: System role not supp"
    ):
        render(side, ["a", TURNS])
    with pytest.raises(XTokMapError, match=r"fails: Conversation roles must alternate"):
        render(side, [[USER, USER]])
    for template in ("{% for %}", "{{ 1 / 0 }}", "{{ messages[7].content + 'a' }}", "{{ nothing.of.it }}"):
        side.chat_template = template
        with pytest.raises(XTokMapError, match=r"^prompt 0: the chat template of google/gemma-2 fails: \S"):
            render(side, ["a"])
        with pytest.raises(XTokMapError, match=r"^this conversation: the chat template of google/gemma-2 fails: \S"):
            Renderer(side, byte_table(side).stop_ids)(TURNS)


@pytest.mark.parametrize(
    ("template", "prompt", "left_out"),
    [
        ("{{ messages[-1].content }}", TURNS, r"messages\[0\] \(role 'system'\)"),
        (
            "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}",
            TURNS,
            r"messages\[2\] \(role 'a",
        ),
        (
            "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}",
            CALLED,
            r"messages\[2\] \(role 'tool",
        ),
        ("{{ messages }}", CALLED, "the tools"),
        ("hello", "a", r"messages\[0\] \(role 'user'\)"),
        (IDEFICS, "a", r"messages\[0\] \(role 'user'\)"),
    ],
)
def test_nothing_is_left_out_without_a_word(template, prompt, left_out):
    with pytest.raises(
        XTokMapError, match=rf"^prompt 0: the chat template of .* leaves out {left_out}.*take it out of the"
    ):
        render(tokenizer(template), [prompt])


def test_the_second_of_two_shapes_is_looked_at_too():
    side = tokenizer("{{ messages[-1].content }}{{ tools[0] if tools and show else '' }}")
    assert len(render(side, ["a", "b", [USER]])) == 3
    with pytest.raises(XTokMapError, match=r"^prompt 2: .* leaves out messages\[0\]"):
        render(side, ["a", "b", TURNS])
    shown = {"prompt": "a", "tools": [TOOL], "chat_template_kwargs": {"show": True}}
    with pytest.raises(XTokMapError, match=r"^prompt 1: .* leaves out the tools"):
        render(side, [shown, {"prompt": "a", "tools": [TOOL]}])


def test_what_a_template_rewrites_is_not_left_out():
    thinking = [USER, {"role": "assistant", "content": "<think>hm</think>blue"}, USER]
    assert "hm" not in told(tokenizer(QWEN3), thinking)
    # Nor are words beside a call, for which some families have no place.
    beside = [USER, {"role": "assistant", "content": "let me see", "tool_calls": [CALL]}, CALLED["messages"][2]]
    side = tokenizer("{% for m in messages %}{{ m.tool_calls or m.content }}{% endfor %}{{ tools }}")
    assert "let me see" not in told(side, {**CALLED, "messages": beside})


# ---- rendered without a chat template ----------------------------------------------------------------------------


def test_turns_in_plain_text():
    side = tokenizer(None)
    assert told(side, TURNS) == (
        "be brief\n\n### Instruction:\nwhat is the sky?\n\n### Response:\nthe sky is blue<|im_end|>\n\n"
        "### Instruction:\nand the grass?\n\n### Response:\n"
    )
    assert told(side, TURNS, "Q: {prompt}\nA:") == (
        "be brief\n\nQ: what is the sky?\nA:the sky is blue<|im_end|>\n\nQ: and the grass?\nA:"
    )
    # Every answer lies where this model's own would: right behind its question.
    asked, answered = told(side, TURNS[:2]), told(side, TURNS)
    assert answered.startswith(f"{asked}the sky is blue")
    # A whole conversation is put in the same way.
    whole = Renderer(side, byte_table(side).stop_ids)([*TURNS, {"role": "assistant", "content": "green"}])
    assert side.decode(whole.ids) == f"{answered}green<|im_end|>\n\n"


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ({"prompt": "a", "tools": [TOOL]}, "tools"),
        (CALLED["messages"], r"messages\[1\] of role 'assistant' with tool_calls"),
        ([USER, {"role": "tool", "content": "sunny"}], r"messages\[1\] of role 'tool'"),
        ([USER, TURNS[0], USER], r"messages\[1\] of role 'system'"),
        ([USER, USER], r"messages\[1\] of role 'user'"),
        ([TURNS[2], USER], r"messages\[0\] of role 'assistant'"),
    ],
)
def test_what_a_model_without_a_template_cannot_be_told(prompt, what):
    with pytest.raises(XTokMapError, match=rf"^prompt 1: {what}: .* has no chat template, .*give the tokenizer a chat"):
        render(tokenizer(None), ["a", prompt])


def test_a_single_prompt_goes_into_a_list():
    for single in ("abc", {"prompt": "a"}, Prompt.of("a")):
        with pytest.raises(
            XTokMapError, match=r"prompts must be a list of prompts, got .*put a single one into a list"
        ):
            render(tiny.student_tokenizer(), single)
    with pytest.raises(XTokMapError, match=r"prompt 0: .*a single message goes into a list"):
        render(tiny.student_tokenizer(), TURNS)


# ---- files -------------------------------------------------------------------------------------------------------

ROW = {"messages": TURNS, "chat_template_kwargs": {"enable_thinking": False}}
TRAIN = ["one", CALLED, {"prompt": TURNS}, ROW]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def datasets():
    found = pytest.importorskip("datasets")
    found.disable_progress_bars()
    return found


def test_lines_of_conversations(tmp_path):
    rows = [{"prompt": "one", "id": 3}, CALLED, {"prompt": TURNS}, {**ROW, "split": "heldout"}]
    assert as_json(read_prompts(lines(tmp_path / "p.jsonl", rows))) == (
        ["one", CALLED, {"messages": TURNS}],
        [ROW],
    )


def test_files_as_they_were(tmp_path):
    text = tmp_path / "p.txt"
    text.write_bytes("one\r\n\ntwo\x0cthree\u2028four\n".encode())
    assert as_json(read_prompts(text)) == (["one", "two\x0cthree\u2028four"], [])
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"prompt": "a\u2028b\x85c"}\r\n{"prompt": "d", "split": "heldout"}'.encode())
    assert as_json(read_prompts(path)) == (["a\u2028b\x85c"], ["d"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", r'line 2: expected an object with "prompt" or "messages", got \'not json\''),
        ('["a"]', 'line 2: expected an object with "prompt" or "messages", got '),
        ("[" * 100_000, 'line 2: expected an object with "prompt"'),
        ('{"text": "a"}', 'line 2: expected an object with "prompt" or "messages"'),
        ('{"prompt": 3}', "line 2: prompt must be a string or a list of messages"),
        ('{"prompt": "a", "split": "test"}', "line 2: expected split train or heldout, got 'test'"),
        ('{"prompt": "a", "split": ["x"]}', "line 2: expected split train or heldout"),
        ('{"prompt": "a\\ud800"}', r"line 2: prompt: character 1 is U\+D800"),
        ('{"prompt": "a", "tools": 3}', "line 2: tools must be a list"),
        ('{"messages": [{"role": "user"}]}', r"line 2: messages\[0\]: expected a dict with role and content"),
        (
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            r"line 2: messages\[0\] is the last and of role 'assi",
        ),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(XTokMapError, match=rf"p\.jsonl, {message}"):
        read_prompts(path)


def test_no_prompts_are_named(tmp_path):
    for name in ("missing.txt", "missing.parquet"):
        with pytest.raises(XTokMapError, match=rf"{name}: no such prompt file; give a .jsonl, .parquet or .txt file"):
            read_prompts(tmp_path / name)
    with pytest.raises(XTokMapError, match=r"p\.jsonl: no training prompt in it"):
        read_prompts(lines(tmp_path / "p.jsonl", [{"prompt": "a", "split": "heldout"}]))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text("# Data")
    with pytest.raises(XTokMapError, match=r"folder: no prompts in it; a folder has .jsonl or .parquet files"):
        read_prompts(tmp_path / "folder")
    (tmp_path / "folder" / "train.jsonl").symlink_to("nowhere")
    with pytest.raises(XTokMapError, match=r"train\.jsonl: a link to nothing"):
        read_prompts(tmp_path / "folder")
    with pytest.raises(XTokMapError, match="NUL"):
        read_prompts("a\0b")


def test_a_folder_of_lines(tmp_path):
    rows = {
        "data/train-00000-of-00002.jsonl": "a",
        "data/train-00001-of-00002.jsonl": "b",
        "data/test_sft-00000.jsonl": "c",
        "dev/more.jsonl": "d",
        "validation.jsonl": "e",
        "questions.jsonl": "f",
        "contest.jsonl": "g",  # in which there is no test
        ".cache/train.jsonl": "h",
        "notes.txt": "i",
    }
    for name, prompt in rows.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        lines(tmp_path / name, [{"prompt": prompt}])
    train, heldout = as_json(read_prompts(tmp_path))
    assert sorted(train) == ["a", "b", "f", "g"]
    assert sorted(heldout) == ["c", "d", "e"]
    # A line knows better than its file.
    lines(tmp_path / "questions.jsonl", [{"prompt": "f", "split": "heldout"}, {"prompt": 3}])
    with pytest.raises(XTokMapError, match=r"questions\.jsonl, line 2: prompt must be"):
        read_prompts(tmp_path)


COLUMNS = {
    "prompt": [None, [{"role": "user", "content": "two"}], None],
    "messages": [TURNS, None, CALLED["messages"]],
    "tools": [None, [], [TOOL]],
    "chat_template_kwargs": [{"enable_thinking": False}, {"enable_thinking": None}, None],
    "answer": ["x", None, "y"],
}
#: What they ask: null is what a column's rows have of each other's fields.
COLUMNS_ASK = [ROW, "two", CALLED]


def test_tables(tmp_path, datasets):
    data = datasets.Dataset.from_dict(COLUMNS)
    data.to_parquet(tmp_path / "p.parquet")
    assert as_json(read_prompts(tmp_path / "p.parquet")) == (COLUMNS_ASK, [])
    split = data.add_column("split", ["train", "heldout", "train"])
    split.to_parquet(tmp_path / "p.parquet")
    assert as_json(read_prompts(tmp_path / "p.parquet")) == ([ROW, CALLED], ["two"])
    # Tools of several forms do not fit into a column, but as text.
    text = datasets.Dataset.from_dict({"prompt": ["a", "b"], "tools": [json.dumps([TOOL]), None]})
    text.to_parquet(tmp_path / "p.parquet")
    first, second = read_prompts(tmp_path / "p.parquet")[0]
    assert (first.tools, second.tools) == ([TOOL], None)


def test_tables_of_others(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "n": [1, 2]}), tmp_path / "p.parquet")
    assert as_json(read_prompts(tmp_path / "p.parquet")) == (["a", "b"], [])


def test_data_sets(tmp_path, datasets):
    data = datasets.Dataset.from_dict(COLUMNS)
    for name in ("one", "prompts.test"):  # whatever it is called: there is no other
        data.save_to_disk(tmp_path / name)
        assert as_json(read_prompts(tmp_path / name)) == (COLUMNS_ASK, [])
    for heldout in ("heldout", "test", "validation"):
        whole = datasets.DatasetDict({"train": data, heldout: data.select([1])})
        whole.save_to_disk(tmp_path / heldout)
        assert as_json(read_prompts(tmp_path / heldout)) == (COLUMNS_ASK, ["two"])
    whole["other"] = data
    whole.save_to_disk(tmp_path / "other")
    with pytest.raises(XTokMapError, match="other: split 'other': use one of train, heldout, test, validation"):
        read_prompts(tmp_path / "other")


def test_a_folder_of_tables(tmp_path, datasets):
    data = datasets.Dataset.from_dict(COLUMNS)
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    data.select([1]).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    lines(tmp_path / "data" / "train.jsonl", [{"prompt": "more"}])
    assert as_json(read_prompts(tmp_path)) == ([*COLUMNS_ASK, "more"], ["two"])


def test_tables_that_cannot_be_used_are_named(tmp_path, datasets):
    path = tmp_path / "p.parquet"
    datasets.Dataset.from_dict({"text": ["a"], "n": [1]}).to_parquet(path)
    with pytest.raises(XTokMapError, match=r"p\.parquet: no column \"prompt\" or \"messages\"; there is 'text', 'n'"):
        read_prompts(path)
    datasets.Dataset.from_dict({"prompt": ["a", None]}).to_parquet(path)
    with pytest.raises(XTokMapError, match=r'p\.parquet, row 1: expected an object with "prompt"'):
        read_prompts(path)
    datasets.Dataset.from_dict({"messages": [TURNS[:3]]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        XTokMapError, match=r"saved, split train, row 0: messages\[2\] is the last and of role 'assistant"
    ):
        read_prompts(tmp_path / "saved")
    path.write_bytes(b"PAR1 is not all that there is")
    with pytest.raises(XTokMapError, match=r"p\.parquet: cannot be read as parquet: \S"):
        read_prompts(path)
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.write_bytes(b"nothing")
    with pytest.raises(XTokMapError, match=r"saved: datasets cannot read it: \S"):
        read_prompts(tmp_path / "saved")


def test_what_is_needed_for_tables_is_named(tmp_path, monkeypatch):
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("p.parquet", "saved"):
        with pytest.raises(XTokMapError, match=rf"{name}: reading it needs datasets: pip install datasets"):
            read_prompts(tmp_path / name)
    # Lines need nothing.
    assert as_json(read_prompts(lines(tmp_path / "p.jsonl", [{"prompt": "a"}]))) == (["a"], [])

"""Families whose assistants think and call tools: their published chat templates, shortened, on tokenizers of any kind.

Each template keeps what matters of its family's: markers and white space, what is dropped of earlier turns, how a
generation prompt ends, how tools and their results are told.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

# Qwen3: thoughts are kept since the user's last turn only.
QWEN3 = r"""
{%- if tools %}<|im_start|>system
# Tools

<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% elif m.role == 'assistant' %}
{%- set content = m.content or '' %}{% set thought = m.reasoning_content or '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant
{% if loop.index0 > ns.last and thought %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content }}
{%- for call in m.tool_calls %}{% if content or not loop.first %}{{ '\n' }}{% endif %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""

# DeepSeek-R1: no thought of an earlier turn is kept, and the generation prompt opens the next one.
DEEPSEEK_R1 = r"""
{{- bos_token }}{% for m in messages %}
{%- if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}<｜User｜>{{ m.content }}
{%- elif m.role == 'tool' %}<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>
{{- '<｜tool▁outputs▁end｜>' }}
{%- elif m.tool_calls %}<｜Assistant｜>{{ m.content or '' }}
{%- for call in m.tool_calls %}{{ '<｜tool▁calls▁begin｜>' if loop.first else '\n' }}
{{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name + '\n' + '```json' + '\n' }}
{{- call.function.arguments | tojson }}{{ '\n' + '```' + '<｜tool▁call▁end｜>' }}{% endfor %}
{{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
{%- else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"""

# DeepSeek-V3.1: the generation prompt opens a thought, or closes it at once.
DEEPSEEK_V31 = r"""
{{- bos_token }}{% if tools %}## Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}{% for m in messages %}
{%- if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}<｜User｜>{{ m.content }}
{%- elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>
{%- else %}<｜Assistant｜></think>{{ (m.content or '').split('</think>')[-1] }}
{%- for call in m.tool_calls %}{{ '<｜tool▁calls▁begin｜>' if loop.first }}
{{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' }}{{ call.function.arguments | tojson }}
{{- '<｜tool▁call▁end｜>' }}{{ '<｜tool▁calls▁end｜>' if loop.last }}{% endfor %}<｜end▁of▁sentence｜>{% endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}<｜Assistant｜>
{{- '<think>' if thinking else '</think>' }}{% endif %}"""

# gpt-oss (Harmony): a thought before a call is kept until there is a final answer.
GPT_OSS = r"""
{{- '<|start|>system<|message|>You are ChatGPT.<|end|>' }}
{%- if tools %}{{ '<|start|>developer<|message|># Tools\n\nnamespace functions {\n' }}
{%- for tool in tools %}{{ '// ' + tool.function.description + '\ntype ' + tool.function.name + ' = (_: ' }}
{{- tool.function.parameters | tojson }}{{ ') => any;\n' }}{% endfor %}{{ '}<|end|>' }}{% endif %}
{%- set ns = namespace(final=-1, name='') %}
{%- for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}{% set ns.final = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|start|>functions.' + ns.name + ' to=assistant<|channel|>commentary<|message|>' }}
{{- m.content | tojson }}<|end|>
{%- elif m.role == 'assistant' and m.tool_calls %}
{%- if m.content and m.thinking %}{{ raise_exception('Cannot pass both content and thinking') }}{% endif %}
{%- set thought = m.content or m.thinking %}{% set call = m.tool_calls[0].function %}{% set ns.name = call.name %}
{%- if thought and loop.index0 > ns.final %}<|start|>assistant<|channel|>analysis<|message|>{{ thought }}<|end|>
{%- endif %}{{ '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
{{- call.arguments | tojson }}<|call|>
{%- elif m.role == 'assistant' and loop.last and not add_generation_prompt %}
{%- if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
{%- elif m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>
{%- elif m.role == 'system' %}<|start|>developer<|message|># Instructions{{ '\n\n' + m.content }}<|end|>
{%- else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""

# Llama 3.1: tools are told in the first user's turn; a call is a turn of its own, without markers.
LLAMA31 = r"""
{{- bos_token }}{% for m in messages %}
{%- if m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' }}{{ m.content | tojson }}<|eot_id|>
{%- elif m.tool_calls %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- set tool_call = m.tool_calls[0].function %}{{ '{"name": "' + tool_call.name + '", ' }}{{ '"parameters": ' }}
{{- tool_call.arguments | tojson }}{{ '}' }}<|eot_id|>
{%- else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{%- if m.role == 'user' and tools and loop.index0 == 0 %}{{ 'Given the following functions, please respond with a JSON '
 + 'for a function call.\n\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\n\n' }}{% endfor %}{% endif %}
{{- m.content | trim }}<|eot_id|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

# Gemma 3 and SmolLM2: no thoughts, no calls.
GEMMA = r"""
{{- bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
SMOLLM2 = r"""
{%- for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI '
 + 'assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_CALLS = ["calls▁begin", "calls▁end", "call▁begin", "call▁end", "outputs▁begin", "outputs▁end"]
_DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
_DEEPSEEK += [f"<｜tool▁{name}｜>" for name in [*_CALLS, "output▁begin", "output▁end", "sep"]]
_HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_HARMONY = [f"<|{name}|>" for name in ("start", "end", "message", "channel", "constrain", "return", "call")]
_XML = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]

#: Template; special tokens, the first of which begins a text where it is needed; what ends a turn; other added tokens.
FAMILIES = {
    "qwen3": (QWEN3, ["<|im_start|>", "<|im_end|>"], "<|im_end|>", _XML),
    "deepseek-r1": (DEEPSEEK_R1, _DEEPSEEK, "<｜end▁of▁sentence｜>", _XML[:2]),
    "deepseek-v3.1": (DEEPSEEK_V31, _DEEPSEEK, "<｜end▁of▁sentence｜>", _XML[:2]),
    "gpt-oss": (GPT_OSS, _HARMONY, "<|return|>", []),
    "llama3.1": (LLAMA31, _HEADERS, "<|eot_id|>", []),
    "gemma": (GEMMA, ["<bos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", []),
    "smollm2": (SMOLLM2, ["<|im_start|>", "<|im_end|>"], "<|im_end|>", []),
    # The format of Qwen3 with markers that are plain text, as in a model that was tuned to it later.
    "text": (QWEN3, ["<|im_start|>", "<|im_end|>"], "<|im_end|>", []),
}


def of_family(tokenizer: object, name: str) -> PreTrainedTokenizerFast:
    """A family's template and markers on a copy of a `tokenizers.Tokenizer`; markers that it has stay as they are."""
    template, special, stop, added = FAMILIES[name]
    copy = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer).from_str(tokenizer.to_str()), bos_token=special[0], eos_token=stop
    )
    known = copy.get_vocab()
    copy.add_tokens([token for token in special if token not in known], special_tokens=True)
    copy.add_tokens([token for token in added if token not in known])
    copy.chat_template = template.strip("\n")
    return copy

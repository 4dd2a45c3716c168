"""The only renderer: prompts as the ids after which a model answers, and whole conversations, aligned.

A `Prompt` is what is asked: a string, or messages with tools and variables of the chat template. Each side renders it
with its own chat template, or in plain text when it has none. Nothing that was asked is left out without a word: a
model that cannot be told all of it is an error.

In a conversation, where a message's content lies is found by rendering once more with a stand-in for it, never by
looking for marker text: what a template puts around a content is what both renderings share. So any two templates go
together, also where a content contains marker text, and where a template trims or rewrites it (which makes REWRITTEN
chunks).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from xtokmap._core import XTokMapError
from xtokmap.aligner import Aligner
from xtokmap.alignment import AlignmentBatch
from xtokmap.files import check_text
from xtokmap.ids import Int64
from xtokmap.tokenizers import byte_table, text_codec
from xtokmap.tokenizers.base import TextCodec

Message = Mapping[str, Any]

#: How a prompt is put to a model whose tokenizer has no chat template.
PLAIN_TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"

#: Stands for a content: private-use characters and letters, which no template trims, splits or looks for.
_STAND_IN = "\ue0f0content\ue0f1"


@dataclass(frozen=True, eq=False)
class Conversation:
    """One conversation as the ids of one side; T ids, M messages.

    Attributes:
        ids: int64 `[T]`.
        roles: the role of every message.
        contents: int64 `[M, 2]`; (start, stop) of every message's content in `ids`.
        stops: int64 `[M]`; the end-of-turn token of every assistant message, -1 where there is none.
    """

    ids: Int64
    roles: tuple[str, ...]
    contents: Int64
    stops: Int64

    def mask(self, role: str = "assistant") -> npt.NDArray[np.bool_]:
        """bool `[T]`: the contents of that role's messages and the tokens that end them."""
        mask = np.zeros(len(self.ids), dtype=np.bool_)
        for own, (start, stop), end in zip(self.roles, self.contents, self.stops, strict=True):
            if own == role:
                mask[start:stop] = True
                if end >= 0:
                    mask[end] = True
        return mask


class Renderer:
    """Renders conversations for one side.

    Template text is encoded with its special tokens, contents without: a content that spells a marker stays text, and
    no token reaches across the border between template and content, as when an answer is generated after a prompt.

    Args:
        tokenizer: a transformers tokenizer; without a chat template turns are put as `render` puts them.
        stop_ids: the ids that end a turn (`ByteTable.stop_ids`).
        plain_template: how a user's turn is put where there is no chat template.
        template_arguments: passed on to the chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: Sequence[int],
        *,
        plain_template: str = PLAIN_TEMPLATE,
        **template_arguments: Any,
    ) -> None:
        _check_plain_template(plain_template)
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.plain_template = plain_template
        self.arguments = template_arguments
        self._codec: TextCodec = text_codec(tokenizer)

    def __call__(self, messages: Sequence[Message], *, truncated: bool = False) -> Conversation:
        """One conversation.

        Args:
            messages: dicts with `role` and `content`, a string.
            truncated: whether the last message was cut off: nothing of what the template puts after it is kept.

        Raises:
            XTokMapError: a message without role or content, a template that refuses the conversation, or one whose text
                around a content depends on it.
        """
        parts, contents = self._parts(messages)
        if truncated:
            parts[-1] = ""
        flat, cu = self._codec.encode_batch(contents)
        pieces: list[Int64] = [self._template_ids(parts[0])]
        ranges, stops = [], []
        at = len(pieces[0])
        for k, message in enumerate(messages):
            content, after = flat[cu[k] : cu[k + 1]], self._template_ids(parts[k + 1])
            ranges.append((at, at + len(content)))
            at += len(content)
            ends = (i for i, token in enumerate(after.tolist()) if token in self.stop_ids)
            stop = next(ends, None) if message["role"] == "assistant" else None
            stops.append(-1 if stop is None else at + stop)
            at += len(after)
            pieces += [content, after]
        return Conversation(
            np.concatenate(pieces),
            tuple(message["role"] for message in messages),
            np.asarray(ranges, dtype=np.int64).reshape(-1, 2),
            np.asarray(stops, dtype=np.int64),
        )

    def _template_ids(self, text: str) -> Int64:
        ids = self.tokenizer(text, add_special_tokens=False).input_ids if text else []
        return np.asarray(ids, dtype=np.int64)

    def _parts(self, messages: Sequence[Message]) -> tuple[list[str], list[str]]:
        """The template's text around the contents, and the contents as the template spells them."""
        for k, message in enumerate(messages):
            _check_message(message, f"messages[{k}]")
        whole = self._render(messages)
        parts, contents, last = [], [], 0
        for k, message in enumerate(messages):
            probe = self._render([*messages[:k], {**message, "content": _STAND_IN}, *messages[k + 1 :]])
            start = probe.find(_STAND_IN)
            after = probe[start + len(_STAND_IN) :]
            stop = len(whole) - len(after)
            if start < last or stop < start or whole[:start] != probe[:start] or whole[stop:] != after:
                raise XTokMapError(
                    f"messages[{k}] (role {message['role']!r}): the chat template leaves this content out, or changes "
                    "the text around it with it, so that its place cannot be known; render this conversation yourself"
                )
            parts.append(whole[last:start])
            contents.append(whole[start:stop])
            last = stop
        return [*parts, whole[last:]], contents

    def _render(self, messages: Sequence[Message]) -> str:
        return _text(self.tokenizer, messages, self.arguments, self.plain_template, "this conversation")


def render_pair(
    aligner: Aligner,
    student: Any,
    teacher: Any,
    conversations: Sequence[Sequence[Message]],
    *,
    truncated: Sequence[bool] | None = None,
) -> tuple[list[Conversation], list[Conversation], AlignmentBatch]:
    """B conversations for both sides, and the alignment of every assistant message's content with itself.

    Args:
        aligner: of the two tokenizers.
        student: the student's transformers tokenizer.
        teacher: the teacher's.
        conversations: B lists of messages.
        truncated: B flags; whether the last message was cut off, so that it has no end of turn. None: none was.

    Returns:
        Student and teacher conversations, and the alignment. Its masks are those of the ids padded on the right, so
        that `ChunkIndex.from_alignment` gives tensors for whole rows; the end of an assistant turn is a STOP chunk.

    Raises:
        XTokMapError: as `Renderer`.
    """
    cut = [False] * len(conversations) if truncated is None else list(truncated)
    if len(cut) != len(conversations):
        raise XTokMapError(f"truncated has {len(cut)} flags for {len(conversations)} conversations")
    sides = []
    for tokenizer, table in ((student, aligner.student), (teacher, aligner.teacher)):
        renderer = Renderer(tokenizer, table.stop_ids)
        sides.append([renderer(c, truncated=t) for c, t in zip(conversations, cut, strict=True)])
    (student_ids, student_mask), (teacher_ids, teacher_mask) = map(_padded, sides)
    batch = aligner.align_batch(student_ids, teacher_ids, student_mask, teacher_mask)
    return sides[0], sides[1], batch


def _padded(conversations: Sequence[Conversation]) -> tuple[Int64, npt.NDArray[np.bool_]]:
    width = max((len(c.ids) for c in conversations), default=0)
    ids = np.zeros((len(conversations), width), dtype=np.int64)
    mask = np.zeros(ids.shape, dtype=np.bool_)
    for b, c in enumerate(conversations):
        ids[b, : len(c.ids)] = c.ids
        mask[b, : len(c.ids)] = c.mask()
    return ids, mask


# ---- prompts -----------------------------------------------------------------------------------------------------

#: Whose turn can be the last of a prompt; the last three are what some families call a tool's.
_ASKING = ("user", "tool", "ipython", "function", "observation")

#: What is not a template's variable but an argument of the call that renders, and `render`'s own to set.
_RESERVED = frozenset(
    (
        *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
        *("return_assistant_tokens_mask", "processor_kwargs"),
    )
)

#: Lists and objects inside each other: more than any tool's description has, and no stack runs out.
_DEPTH = 64


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is asked: the turns before the answer. `Prompt.of` makes one of what users and data sets have.

    Two are equal where their JSON is, order included: then every template makes the same of them.

    Attributes:
        messages: dicts with `role` and `content`, both strings, and whatever else a chat template reads (`name`,
            `tool_calls`, beside which an assistant's content may be None, and `reasoning_content`, which templates find
            as `reasoning` and `thinking` too); the last turn is the user's or a tool's.
        tools: what the model may call, as transformers' chat templates take it (JSON schemas); None: nothing.
        chat_template_kwargs: variables of the chat template such as `enable_thinking`; a template that does not know
            one leaves it alone.
        domain: what it is about, where teachers count by that (`Config.domains`); nothing that a model sees.

    Raises:
        XTokMapError: by field, where it is none of that.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    domain: str = ""

    def __post_init__(self) -> None:
        for name in ("messages", "tools", "chat_template_kwargs"):  # copies: nobody changes them from outside
            object.__setattr__(self, name, _copy(getattr(self, name), name))
        if not isinstance(self.messages, list) or not self.messages:
            raise XTokMapError(f"messages must be a list of at least one message, got {_short(self.messages)}")
        for k, message in enumerate(self.messages):
            _check_message(message, f"messages[{k}]", calls=True)
            self.messages[k] = {"role": message["role"], "content": None, **message}  # templates ask for both
        last = self.messages[-1]["role"]
        if last not in _ASKING:
            raise XTokMapError(
                f"messages[{len(self.messages) - 1}] is the last and of role {last!r}: what is asked must end with the "
                "user's or a tool's turn; take off what comes after it"
            )
        if self.tools is not None and not isinstance(self.tools, list):
            raise XTokMapError(f"tools must be a list of objects, got {_short(self.tools)}")
        for k, tool in enumerate(self.tools or ()):
            if not isinstance(tool, dict):
                raise XTokMapError(f"tools[{k}] must be an object that describes a tool, got {_short(tool)}")
        if not isinstance(self.domain, str):
            raise XTokMapError(f"domain must be a string, got {_short(self.domain)}")
        if not isinstance(self.chat_template_kwargs, dict):
            raise XTokMapError(f"chat_template_kwargs must be an object, got {_short(self.chat_template_kwargs)}")
        for name in self.chat_template_kwargs:
            if name in _RESERVED:
                raise XTokMapError(f"chat_template_kwargs: {name} is no variable of a chat template; take it out")

    @classmethod
    def of(cls, value: PromptLike, where: str = "prompt") -> Prompt:
        """A prompt of a string, of a list of messages, or of an object such as a row of a data set.

        An object has `prompt` (a string, or messages as TRL has them) or else `messages`, and perhaps `tools` (a list,
        or its JSON), `chat_template_kwargs` and `domain`. Its other fields mean nothing here.

        Args:
            value: is copied; a `Prompt` is given back.
            where: it stands, for errors.

        Raises:
            XTokMapError: it is none of that, by place and field.
        """
        if isinstance(value, Prompt):
            return value
        if isinstance(value, str):
            check_text(value, where)
            return cls([{"role": "user", "content": value}])
        if not isinstance(value, Mapping) and not _is_list(value):
            kinds = 'a string, a list of messages or an object with "prompt" or "messages"'
            raise XTokMapError(f"{where}: expected {kinds}, got {_short(value)}")
        try:
            return cls._of_object(value) if isinstance(value, Mapping) else cls(value)
        except XTokMapError as error:
            raise XTokMapError(f"{where}: {error}") from None

    @classmethod
    def _of_object(cls, value: Mapping[str, Any]) -> Prompt:
        asked, messages, tools = value.get("prompt"), value.get("messages"), value.get("tools")
        if asked is None and messages is None:
            advice = "; a single message goes into a list" if "role" in value else ""
            raise XTokMapError(f'expected an object with "prompt" or "messages", got {_short(value)}{advice}')
        if isinstance(asked, str):
            check_text(asked, "prompt")
            messages = [{"role": "user", "content": asked}]
        elif asked is not None:
            if not _is_list(asked):
                raise XTokMapError(f"prompt must be a string or a list of messages, got {_short(asked)}")
            messages = asked
        if isinstance(tools, str):  # a column of a data set has tools of one form only, unless they are text
            try:
                tools = json.loads(tools)
            except (ValueError, RecursionError):
                raise XTokMapError(f"tools is text, and not JSON: {_short(tools)}") from None
        kwargs = value.get("chat_template_kwargs")
        rest = {} if kwargs is None else kwargs, value.get("domain") or ""
        return cls(messages, None if tools == [] else tools, *rest)  # type: ignore[arg-type]

    def as_json(self) -> str | dict[str, Any]:
        """What JSON can hold and `Prompt.of` makes this prompt of: a string where a string says it all."""
        (first, *more), tools, kwargs = self.messages, self.tools, self.chat_template_kwargs
        plain = first.keys() == {"role", "content"} and first["role"] == "user"
        if plain and not (more or tools or kwargs or self.domain):
            return str(first["content"])
        whole = {"messages": self.messages, "tools": tools, "chat_template_kwargs": kwargs, "domain": self.domain}
        return {name: _copy(part, name) for name, part in whole.items() if part}

    @property
    def title(self) -> str:
        """One line for a report: the user's last words, or the last there are where the user has said nothing."""
        said = [m for m in self.messages if m["role"] == "user"] or self.messages
        return " ".join(str(said[-1]["content"]).split())

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Prompt) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> str:
        return json.dumps(self.as_json())


#: What `Prompt.of` and `render` take.
PromptLike: TypeAlias = str | Sequence[Message] | Mapping[str, Any] | Prompt


def prompts_of(prompts: Sequence[PromptLike]) -> list[Prompt]:
    """Prompts, whatever they were given as."""
    return [Prompt.of(prompt, f"prompt {k}") for k, prompt in enumerate(prompts)]


def render(tokenizer: Any, prompts: Sequence[PromptLike], plain_template: str = PLAIN_TEMPLATE) -> list[list[int]]:
    """Prompts as the ids after which this model answers.

    Through the tokenizer's chat template, with tools and `chat_template_kwargs`. A model whose tokenizer has none is
    told a system message first, with an empty line after it; every user's turn in `plain_template`; an earlier answer
    right behind it, as this model's own would be, with its end of text and an empty line. Of tools it can be told
    nothing.

    Args:
        tokenizer: of transformers.
        prompts: strings, lists of messages, objects (`Prompt.of`) or `Prompt`s.
        plain_template: has `{prompt}` in it.

    Raises:
        XTokMapError: no prompt, or one that this model cannot be told whole: its template fails, or leaves a message or
            the tools out; or it has no template, and there is more than a system message, questions and answers.
    """
    _check_plain_template(plain_template)
    if isinstance(prompts, str | Mapping | Prompt):
        raise XTokMapError(f"prompts must be a list of prompts, got {_short(prompts)}; put a single one into a list")
    texts, seen = [], set()
    for k, value in enumerate(prompts):
        prompt, where = Prompt.of(value, f"prompt {k}"), f"prompt {k}"
        texts.append(_prompt_text(tokenizer, prompt, plain_template, where))
        if _shape(prompt) not in seen:  # what a template leaves out depends on that, and not on the words
            seen.add(_shape(prompt))
            _check_told(tokenizer, prompt, texts[-1], plain_template, where)
    if getattr(tokenizer, "chat_template", None):  # which writes the start of a text where the model wants one
        return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    return [tokenizer(text).input_ids for text in texts]


def _prompt_text(tokenizer: Any, prompt: Prompt, plain_template: str, where: str) -> str:
    arguments = {**prompt.chat_template_kwargs, "add_generation_prompt": True}
    if prompt.tools:
        arguments["tools"] = prompt.tools
    return _text(tokenizer, prompt.messages, arguments, plain_template, where)


def _shape(prompt: Prompt) -> tuple[object, ...]:
    turns = tuple((m["role"], bool(m["content"]), *sorted(m)) for m in prompt.messages)
    return turns, bool(prompt.tools), json.dumps(prompt.chat_template_kwargs)


def _check_told(tokenizer: Any, prompt: Prompt, text: str, plain_template: str, where: str) -> None:
    """Refuses a prompt of whose messages or tools nothing is in its text, without regard to what they say."""
    left_out = []
    # Beside a call a template may have no place for words, as its family's own do.
    shown = [k for k, m in enumerate(prompt.messages) if m["content"] and not m.get("tool_calls")]
    marks = {k: f"contentstandin{k}here" for k in shown}  # letters: also JSON and Python write them as they are
    marked = [{**m, "content": marks.get(k, m["content"])} for k, m in enumerate(prompt.messages)]
    with suppress(XTokMapError):  # of a template that reads contents, and not the marks
        found = _prompt_text(tokenizer, replace(prompt, messages=marked), plain_template, where)
        left_out += [f"messages[{k}] (role {marked[k]['role']!r})" for k in shown if marks[k] not in found]
    if prompt.tools:
        with suppress(XTokMapError):  # of a template that cannot do without
            left_out += ["the tools"] * (
                text == _prompt_text(tokenizer, replace(prompt, tools=None), plain_template, where)
            )
    if left_out:
        raise XTokMapError(
            f"{where}: the chat template of {_name(tokenizer)} leaves out {left_out[0]}, and the model would not be "
            "told; take it out of the prompt, or give the tokenizer another chat template"
        )


def stop_id(tokenizer: Any) -> int | None:
    """The token with which this model ends its answer: what its chat template puts there, else its end of text."""
    stops = byte_table(tokenizer).stop_ids
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(text[text.rindex("b") + 1 :], add_special_tokens=False).input_ids
        in_template = [i for i in ids if i in stops]
        if in_template:
            return int(in_template[0])
    eos = tokenizer.eos_token_id
    if isinstance(eos, int):
        return eos
    return stops[0] if stops else None


# ---- what both share ---------------------------------------------------------------------------------------------


def _text(
    tokenizer: Any, messages: Sequence[Message], arguments: Mapping[str, Any], plain_template: str, where: str
) -> str:
    """Messages as one text: through the tokenizer's chat template, or in plain text when it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return _plain(tokenizer, messages, arguments, plain_template, where)
    try:
        return str(tokenizer.apply_chat_template(list(map(_thought, messages)), tokenize=False, **arguments))
    except Exception as error:  # a template is a program of anybody's
        reason = " ".join(str(error).split()) or type(error).__name__
        raise XTokMapError(
            f"{where}: the chat template of {_name(tokenizer)} fails: {reason}; take out what it does not take, or "
            "give the tokenizer another chat template"
        ) from error


#: What the families' templates call what an assistant thought.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def _thought(message: Message) -> Message:
    """A message whose thought every template finds, whatever it calls it."""
    found = next((message[name] for name in _THOUGHTS if isinstance(message.get(name), str)), None)
    return message if found is None else {**dict.fromkeys(_THOUGHTS, found), **message}


def _plain(
    tokenizer: Any, messages: Sequence[Message], arguments: Mapping[str, Any], plain_template: str, where: str
) -> str:
    def cannot(what: str) -> XTokMapError:
        return XTokMapError(
            f"{where}: {what}: {_name(tokenizer)} has no chat template, and without one a model is told a system "
            "message first, then questions and answers in turn; take it out, or give the tokenizer a chat template"
        )

    if arguments.get("tools"):
        raise cannot("tools")
    text, asked = "", False
    for k, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role in ("system", "developer") and k == 0:
            text += f"{content}\n\n"
        elif role == "user" and not asked:
            text, asked = text + plain_template.replace("{prompt}", content), True
        elif role == "assistant" and asked and not message.get("tool_calls"):
            text, asked = f"{text}{content}{tokenizer.eos_token or ''}\n\n", False
        else:
            calls = " with tool_calls" if message.get("tool_calls") else ""
            raise cannot(f"messages[{k}] of role {role!r}{calls}")
    return text


def _check_plain_template(plain_template: str) -> None:
    if "{prompt}" not in plain_template:
        raise XTokMapError(f"plain_template={plain_template!r} must contain {{prompt}}")


def _check_message(message: Any, what: str, *, calls: bool = False) -> None:
    """Refuses what has no role and content; with `calls`, an assistant's tool calls may stand for its content."""
    role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
    called = calls and role == "assistant" and content is None and message.get("tool_calls")
    if not isinstance(role, str) or not (isinstance(content, str) or called):
        advice = "; join its parts into one text" if isinstance(content, list) else ""
        raise XTokMapError(
            f"{what}: expected a dict with role and content, both strings, got {_short(message)}{advice}"
        )
    for name in ("role", "content"):
        check_text(message.get(name) or "", f"{what}, {name}")


def _copy(value: Any, what: str, depth: int = 0) -> Any:
    """A value as JSON holds it, and refused where JSON cannot."""
    if isinstance(value, str):
        check_text(value, what)
        return str(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if depth == _DEPTH:
        raise XTokMapError(f"{what}: more than {_DEPTH} lists and objects inside each other")
    if _is_list(value):
        return [_copy(part, f"{what}[{k}]", depth + 1) for k, part in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        for name in value:
            check_text(name, f"{what}, a name")
        return {str(name): _copy(part, f"{what}, {name}", depth + 1) for name, part in value.items()}
    raise XTokMapError(f"{what}: expected what JSON can hold, got {_short(value)}")


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _short(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # lists in lists in lists, an integer of 5000 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:197]}..."


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)

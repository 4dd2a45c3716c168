"""How assistants of each family think and call tools: the markers, and one family's turn as another's.

A turn is thoughts, tool calls and answers, in any order. What stands around them is the family's own: `<think>`,
gpt-oss's channels, DeepSeek's call tokens. A `Format` says what, as its published template does; `Voice` knows it in
one tokenizer's ids. Markers correspond by role, as ends of turns do; what is thought, called and answered goes from one
format into the other as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias

from xtokmap._core import ROLES, ByteTable, XTokMapError

__all__: list[str] = []

#: What becomes of thoughts and calls for which the other side has no format.
Foreign: TypeAlias = Literal["omit", "text"]

#: Text to be encoded, or ids.
Piece: TypeAlias = str | tuple[int, ...]

THINK_OPEN, THINK_CLOSE, CALL_OPEN, CALL_CLOSE, ANSWER_OPEN = range(5)


@dataclass(frozen=True)
class Format:
    """What a family writes around thoughts, calls and answers; empty where it writes nothing.

    New lines at the edges of a marker are not part of it: they are text, and each family's own.

    Attributes:
        think: what opens and what closes a thought; None: this family does not think.
        call: what stands before a call's name, between name and arguments, and behind these; None: it calls no tools.
        call_open: opens the first call of several, and every other one.
        call_close: closes the last call, and every other one.
        answer_open: opens an answer.
        answer_close: closes an answer that something follows.
        call_stop: the token that ends a turn with a call, if it is another one.
        also: other spellings, by role.
    """

    think: tuple[str, str] | None = None
    call: tuple[str, str, str] | None = None
    call_open: tuple[str, str] = ("", "")
    call_close: tuple[str, str] = ("", "")
    answer_open: str = ""
    answer_close: str = ""
    call_stop: str = ""
    also: tuple[tuple[int, str], ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> Format:
        """By what the chat template has in it; without one, a model neither thinks nor calls."""
        template = getattr(tokenizer, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("tool_use", template.get("default"))
        template = template or ""
        if "<|channel|>" in template:
            return HARMONY
        think, call = None, cls()
        if "</think>" in template:
            # A template has new lines as they are, or as an escape in a string.
            plain = "<think>" in template and not re.search(r"<think>(\\n|\n)", template)
            think = ("<think>", "</think>") if plain else ("<think>\n", "\n</think>\n\n")
        if "<｜tool▁calls▁begin｜>" in template:
            call = DEEPSEEK_V3 if "```json" in template else DEEPSEEK_V31
        elif "<tool_call>" in template and '"arguments"' in template:
            call = HERMES
        elif '"parameters": ' in template and "tool_call" in template:
            call = LLAMA
        return cls(think, call.call, call.call_open, call.call_close)

    @property
    def calls_alone(self) -> bool:
        """Whether a call has no markers, but is a whole turn."""
        return self.call is not None and not self.call_open[0]

    def texts(self) -> Iterator[tuple[int, str]]:
        """All markers with their roles, the preferred one of each role first, without new lines at their edges."""
        found = [*zip((THINK_OPEN, THINK_CLOSE), self.think or ("", ""), strict=True)]
        found += [(CALL_OPEN, text) for text in self.call_open] + [(CALL_CLOSE, text) for text in self.call_close]
        found += [(ANSWER_OPEN, self.answer_open), *self.also]
        yield from dict.fromkeys((role, text.strip("\n")) for role, text in found if text.strip("\n"))


#: gpt-oss (the Harmony format): https://github.com/openai/harmony
HARMONY = Format(
    think=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
    call=(".", " <|constrain|>json<|message|>", ""),
    call_open=("<|channel|>commentary to=functions",) * 2,
    call_close=("", "<|call|><|start|>assistant"),
    answer_open="<|channel|>final<|message|>",
    answer_close="<|end|><|start|>assistant",
    call_stop="<|call|>",
    also=((ANSWER_OPEN, "<|channel|>commentary<|message|>"),),
)
#: Qwen, Hermes and many others.
HERMES = Format(
    call=('\n{"name": "', '", "arguments": ', "}\n"),
    call_open=("\n<tool_call>", "\n<tool_call>"),
    call_close=("</tool_call>", "</tool_call>"),
)
DEEPSEEK_V3 = Format(
    call=("function<｜tool▁sep｜>", "\n```json\n", "\n```"),
    call_open=("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "\n<｜tool▁call▁begin｜>"),
    call_close=("<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "<｜tool▁call▁end｜>"),
)
DEEPSEEK_V31 = Format(
    call=("", "<｜tool▁sep｜>", ""),
    call_open=("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "<｜tool▁call▁begin｜>"),
    call_close=("<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "<｜tool▁call▁end｜>"),
)
#: Llama 3.1: a turn that is one call, as JSON.
LLAMA = Format(call=('{"name": "', '", "parameters": ', "}"))

# White space is bounded: a sample may go on with it forever, and a pattern must not try all ways to part it.
_JSON_CALL = re.compile(
    r'_\[?_\{_"name"_:_"([^"\\]+)"_,_"(?:arguments|parameters)"_:_(\{.*)'.replace("_", r"\s{0,9}"), re.DOTALL
)
_JSON_END = re.compile(r"(.*\})\s{0,9}\}\s{0,9}\]?\s{0,9}", re.DOTALL)
_NAMED_CALL = re.compile(
    r"(?:function(?=.*```)(?:<｜tool▁sep｜>)?|\.)?([\w-]+)(?:<｜tool▁sep｜>)?"
    r"\s{0,9}(?:<\|constrain\|>)?(?:```)?(?:json)?(?:<\|message\|>)?\s{0,9}(\{.*)",
    re.DOTALL,
)
_NAMED_END = re.compile(r"(.*\})\s{0,9}(?:```)?\s{0,9}", re.DOTALL)


def parsed(body: str) -> tuple[str, str, bool] | None:
    """Name and arguments of a call in any format, as they are spelled, and whether it is whole; None: it is none."""
    for begin, end in ((_JSON_CALL, _JSON_END), (_NAMED_CALL, _NAMED_END)):
        if match := begin.fullmatch(body):
            whole = end.fullmatch(match[2])
            return match[1], (whole or match)[1 if whole else 2], whole is not None
    return None


@dataclass(frozen=True)
class Part:
    """A part of a turn: "think", "call" or "answer", with its text; "gap", white space between two markers; "end"."""

    state: str
    text: str = ""


def parts(texts: Sequence[str], cuts: Sequence[int | None], form: Format, *, thinking: bool = False) -> list[Part]:
    """A row as its parts.

    Args:
        texts: before, between and after the cuts.
        cuts: a role each, or None for an end of turn.
        form: of whose row it is.
        thinking: whether the prompt has opened a thought.
    """
    begins: dict[int | None, str] = {THINK_OPEN: "think", CALL_OPEN: "call"}
    found = [Part("think" if thinking else "answer", texts[0])]
    for cut, text in zip(cuts, texts[1:], strict=True):
        found += [Part("end")] * (cut is None) + [Part(begins.get(cut, "answer"), text)]
    for k, part in enumerate(found):
        again = k == 0 and thinking and cuts and cuts[0] == THINK_OPEN
        if (part.state == "answer" or again) and not part.text.strip("\n" if cuts else ""):
            found[k] = Part("gap", part.text)
        elif part.state == "answer" and form.calls_alone and _JSON_CALL.fullmatch(part.text):
            found[k] = Part("call", part.text)
    return found


class Voice:
    """One side's format, in the ids of its tokenizer.

    Args:
        tokenizer: of transformers, or a `tokenizers.Tokenizer`.
        table: its bytes.
    """

    def __init__(self, tokenizer: Any, table: ByteTable) -> None:
        self.format = Format.of(tokenizer)
        self.tokenizer, self._table = tokenizer, table
        self.ids = cache(self._ids)

    def _ids(self, text: str) -> tuple[int, ...]:
        if callable(self.tokenizer):
            return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def markers(self, other: Format, foreign: Foreign) -> list[tuple[str, tuple[int, ...]]]:
        """The markers for a `ByteTable`, beside another side's format."""
        found: dict[tuple[int, ...], str] = {}
        for role, text in self.format.texts():
            known = other.think if role in (THINK_OPEN, THINK_CLOSE) else other.call
            name = ROLES[role]
            if role != ANSWER_OPEN and known is None:
                if foreign == "text":
                    continue
                name = "aside_open" if role in (THINK_OPEN, CALL_OPEN) else "aside_close"
                if text == self.format.answer_close:  # it closes answers too: what opens next ends what stands aside
                    name = "answer_open"
            for ids in self._spellings(text):
                found.setdefault(ids, name)
        return [(name, ids) for ids, name in found.items()]

    def _spellings(self, text: str) -> Iterator[tuple[int, ...]]:
        """The ids of a marker; of one that is plain text also those that take a new line with it."""
        own = self.ids(text)
        yield own
        if len(own) == 1 or any(self._table.is_special[list(own)]):
            return
        for before, after in ((b, a) for b in ("", "\n", "\n\n") for a in ("", "\n", "\n\n")):
            ids, start = self.ids(before + text + after), 0
            lengths = [int(n) for n in self._table.lengths[list(ids)]]
            # Without what is new line alone.
            first, last, end = 0, len(ids), sum(lengths)
            while first < last and start + lengths[first] <= len(before):
                start, first = start + lengths[first], first + 1
            while last > first and end - lengths[last - 1] >= len((before + text).encode()):
                end, last = end - lengths[last - 1], last - 1
            if self._table.decode(ids) == (before + text + after).encode():
                yield ids[first:last]

    def opens(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt leaves a thought open, as some templates' generation prompts do."""
        if self.format.think is None:
            return False
        end = len(prompt_ids)
        while end and not (self._table[prompt_ids[end - 1]] or b"-").strip(b"\n"):
            end -= 1
        marker = self.ids(self.format.think[0].strip("\n"))
        return tuple(prompt_ids[max(end - len(marker), 0) : end]) == marker

    def closes(self, ids: Sequence[int]) -> bool:
        """Whether a thought ends somewhere in these ids."""
        marker = self.ids((self.format.think or ("", ""))[1].strip("\n"))
        return any(tuple(ids[k : k + len(marker)]) == marker for k in range(len(ids) - len(marker) + 1))

    def says(self, turn: Sequence[Part], of: Format, stop_id: int | None, *, thinking: bool = False) -> Iterator[Piece]:
        """A row of another side's as this one writes it.

        Args:
            turn: its parts.
            of: the format in which they were written; where it is this one, texts stay as they are.
            stop_id: ends a turn; None: nothing does.
            thinking: whether this side's prompt has opened a thought.
        """
        same, state, said, left = of == self.format, "think" if thinking else "", False, False
        for k, part in enumerate(turn):
            more = k + 1 < len(turn)
            if part.state == "gap":
                if k and not left:
                    to = next((p.state for p in turn[k:] if p.state != "gap"), "end")
                    to = "answer" if state == "think" else to  # what is between: it was closed
                    yield from self._mark(self._leave(state, to), same=same)
                    left = True
                if same:
                    yield part.text
                continue
            if part.state != state or said:
                if not left:
                    yield from self._mark(self._leave(state, part.state), same=same)
                yield from self._mark(self._enter(state, part.state, said=said), same=same)
            left = False
            if part.state == "end":
                if stop_id is not None:
                    yield self.ids(self.format.call_stop) if state == "call" and self.format.call_stop else (stop_id,)
                state, said = "", False
                continue
            text = part.text
            call = self._call(text, complete=more) if part.state == "call" else [text]
            if part.state == "call" and (not same or text == "".join(p for p in call if isinstance(p, str))):
                yield from call  # of its own format too: texts lack what has no bytes
            elif same:
                yield text
            else:  # new lines beside a marker are the family's own
                text = text.lstrip("\n") if k or part.state == "think" else text
                beside = more and (part.state == "think" or turn[k + 1].state != "end")
                yield text.rstrip("\n") if beside else text
            state, said = part.state, True

    def _leave(self, state: str, to: str) -> str:
        form = self.format
        if state == "think" and form.think and to != "end":
            return form.think[1]
        if state == "call":
            return form.call_close[to == "call" or (to != "end" and bool(form.call_stop))]
        return form.answer_close if state == "answer" and to != "end" else ""

    def _enter(self, state: str, to: str, *, said: bool) -> str:
        form = self.format
        if to == "think" and form.think:
            return form.think[0]
        if to == "call":
            opened = form.call_open[state == "call"]
            return opened if state in ("answer", "call") and said else opened.lstrip("\n")
        return form.answer_open if to == "answer" else ""

    def _mark(self, text: str, *, same: bool) -> Iterator[Piece]:
        core = text.strip("\n")
        before, _, after = text.partition(core) if core else ("", "", "")
        yield from (before if not same else "", self.ids(core) if core else (), after if not same else "")

    def _call(self, body: str, *, complete: bool) -> list[Piece]:
        call = parsed(body)
        if call is None or self.format.call is None:
            return [body.strip("\n") if complete else body.lstrip("\n")]
        (head, between, tail), (name, arguments, whole) = self.format.call, call
        pieces: list[Piece] = []
        for template, content in ((head, name), (between, arguments), (tail if whole else "", "")):
            texts = re.split(r"(<[|｜][^|｜<>]+[|｜]>)", template)  # every other one is a token's name
            pieces += [self.ids(text) if k % 2 else text for k, text in enumerate(texts)]
            pieces.append(content)
        return pieces


def joined(pieces: Iterator[Piece]) -> list[Piece]:
    """Texts that stand side by side are one text: tokens go across."""
    found: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and found and isinstance(found[-1], str):
            found[-1] += piece
        elif piece:
            found.append(piece)
    return found


def voice_of(tokenizer: Any, table: ByteTable, side: str) -> Voice:
    """A side's voice.

    Raises:
        XTokMapError: a tokenizer that cannot encode markers.
    """
    if not callable(tokenizer) and not hasattr(tokenizer, "encode"):
        raise XTokMapError(
            f"markers=True: the {side} is a {type(tokenizer).__name__}; markers are known by a chat template: give its "
            "transformers tokenizer"
        )
    return Voice(tokenizer, table)

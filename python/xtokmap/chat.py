"""Conversations: one list of messages, rendered with each side's own chat template and aligned content with content.

Where a message's content lies is found by rendering once more with a stand-in for it, never by looking for marker
text: what a template puts around a content is what both renderings share. So any two templates go together, also where
a content contains marker text, and where a template trims or rewrites it (which makes REWRITTEN chunks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xtokmap._core import XTokMapError
from xtokmap.alignment import Aligner, AlignmentBatch
from xtokmap.files import check_text
from xtokmap.tokenizers import TextCodec, text_codec

Message = Mapping[str, Any]
Int64 = npt.NDArray[np.int64]

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
        tokenizer: a transformers tokenizer; without a chat template a plain one with role names is used.
        stop_ids: the ids that end a turn (`ByteTable.stop_ids`).
        template_arguments: passed on to the chat template.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], **template_arguments: Any) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.arguments = template_arguments
        self._codec: TextCodec = text_codec(tokenizer)

    def __call__(self, messages: Sequence[Message], *, truncated: bool = False) -> Conversation:
        """One conversation.

        Args:
            messages: dicts with `role` and `content`, a string.
            truncated: whether the last message was cut off: nothing of what the template puts after it is kept.

        Raises:
            XTokMapError: a message without role or content, or a template whose text around a content depends on it.
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
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise XTokMapError(
                    f"messages[{k}]: expected a dict with role and content, both strings, got {message!r}"
                )
            for name in ("role", "content"):
                check_text(message[name], f"messages[{k}], {name}")
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
        if getattr(self.tokenizer, "chat_template", None):
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **self.arguments))
        ends = {"assistant": self.tokenizer.eos_token or ""}
        rows = (f"### {m['role'].capitalize()}:\n{m['content']}{ends.get(m['role'], '')}\n\n" for m in messages)
        return "".join(rows)


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

"""Hidden states over the wire: who gives them, how they are asked for, and whether they can be believed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from xtokmap.teachers import binary, http1
from xtokmap.teachers.client import SGLANG, BadAnswerError, Floats, Question, TeacherError
from xtokmap.teachers.head import NORMS, Head

#: Bytes for everything in an answer but the states.
_ROOM = 2**17

#: Bytes of a number in JSON, at most, with what is between two.
_DIGITS = 32

#: Nats that logprobs from hidden states may be from the server's own, in the mean, by the precision of the states:
#: float32 servers are 3e-5 from each other, bfloat16 ones 0.03.
_ROUNDING = {torch.float32: 5e-4, torch.float16: 0.03, torch.bfloat16: 0.15}

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Source(Protocol):
    """A way to ask for hidden states.

    Attributes:
        name: what messages call it.
        spare: tokens that a row must be shorter than the server's longest.
    """

    name: str
    spare: int

    def question(self, ids: Sequence[int], first: int, model: str, head: Head | None) -> Question:
        """The request for the states that score the places from `first` on, and the one behind: `[n - first + 1, H]`.

        Without a head any width will do.
        """

    def size(self, states: Tensor) -> int:
        """Bytes of the states of one token, over the wire."""


class XtokmapStates:
    """`POST /v1/hidden_states` of `xtokmap serve-teacher`: safetensors."""

    name, path, spare = "serve-teacher's hidden states", "/v1/hidden_states", 0

    def question(self, ids: Sequence[int], first: int, model: str, head: Head | None) -> Question:
        """The request for the states that score the places from `first` on, and the one behind."""
        # Never more than the head can use; and never more than the model has.
        dtype = "auto" if head is None or head.weight.dtype == torch.float32 else _NAMES[head.weight.dtype]
        n, width = len(ids) - first + 1, 2**16 if head is None else head.width
        payload = json.dumps({"model": model, "prompt": list(ids), "first": first, "dtype": dtype}).encode()

        def read(answer: http1.Answer) -> Tensor:
            try:
                tensors, _ = binary.unpack(answer.content)
            except ValueError as error:
                raise BadAnswerError(str(error)) from None
            found = tensors.get("hidden")
            if found is None or found.ndim != 2:
                raise BadAnswerError("no hidden [n, H] in it")
            return _checked(found, n, head)

        return Question(self.path, payload, _ROOM + 4 * n * width, read, binary=True)

    def size(self, states: Tensor) -> int:
        """Bytes of the states of one token, over the wire."""
        return states[0].nbytes


class VLLMPooling:
    """`POST /pooling` of vLLM's pooling runner (`--runner pooling --convert embed`): bare numbers, and a header.

    The states are those after the final norm, of the whole row: there is no asking for its end.
    """

    name, path, spare = "vLLM's pooling runner", "/pooling", 0

    def question(self, ids: Sequence[int], first: int, model: str, head: Head | None) -> Question:
        """The request for the states that score the places from `first` on, and the one behind."""
        half = head is not None and head.weight.dtype != torch.float32
        dtype, kind = ("bfloat16", torch.bfloat16) if half else ("float32", torch.float32)
        width = 2**16 if head is None else head.width
        asked = {"task": "token_embed", "use_activation": False, "add_special_tokens": False}
        asked |= {"encoding_format": "bytes", "embed_dtype": dtype, "endianness": "little"}
        payload = json.dumps({"model": model, "input": [list(ids)], **asked}).encode()

        def read(answer: http1.Answer) -> Tensor:
            try:
                said = json.loads(answer.headers.get("metadata", ""))
                [item], tokens = said["data"], said["usage"]["prompt_tokens"]
                shape, order, named = item["shape"], item["endianness"], item["embed_dtype"]
            except (ValueError, KeyError, TypeError):
                raise BadAnswerError("no metadata in its headers that say what it is") from None
            if tokens != len(ids) or named != dtype or order != "little":
                raise BadAnswerError(f"{tokens!r} tokens of {named!r:.20}, {order!r:.20}; {len(ids)} of {dtype} asked")
            if not isinstance(shape, list) or len(shape) != 2 or any(type(n) is not int for n in shape):
                raise BadAnswerError("a shape that is none")
            if shape[0] != len(ids) or shape[1] < 1 or shape[0] * shape[1] * kind.itemsize != len(answer.content):
                raise BadAnswerError(f"{len(answer.content)} bytes for {len(ids)} states of shape {shape!r:.60}")
            states = torch.frombuffer(bytearray(answer.content), dtype=kind).view(len(ids), -1)
            return _checked(states[first - 1 :], len(ids) - first + 1, head)

        return Question(self.path, payload, _ROOM + kind.itemsize * len(ids) * width, read, binary=True)

    def size(self, states: Tensor) -> int:
        """Bytes of the states of one token, over the wire."""
        return states[0].nbytes


class SGLangStates:
    """`POST /generate` of SGLang with `return_hidden_states` (`--enable-return-hidden-states`): JSON, all digits.

    The states are those after the final norm, of what is not in the server's cache of prefixes. Logprobs are asked for
    as well, from where states are wanted: what is behind that place is never taken from the cache then, and their ids
    say whose states these are.
    """

    name, path, spare = "SGLang's return_hidden_states", SGLANG.path, SGLANG.spare

    def question(self, ids: Sequence[int], first: int, model: str, head: Head | None) -> Question:
        """The request for the states that score the places from `first` on, and the one behind."""
        width = 2**14 if head is None else head.width
        asked = SGLANG.payload(ids, 0, model) | {"return_hidden_states": True, "logprob_start_len": first - 1}
        payload = json.dumps({**asked, "return_text_in_logprobs": False}).encode()

        def read(body: Any) -> Tensor:
            try:
                meta = body["meta_info"]
                named = [token for _, token, *_ in meta["input_token_logprobs"]]
                found, cached = meta["hidden_states"][0], meta["cached_tokens"]
            except (KeyError, TypeError, ValueError, IndexError):
                raise BadAnswerError("no meta_info with hidden_states and input_token_logprobs in it") from None
            SGLANG.check_whole(meta, len(ids))
            if named != list(ids[first - 1 :]):
                raise BadAnswerError("its input_token_logprobs are not of the ids that were sent")
            if type(cached) is not int or not 0 <= cached < first or not isinstance(found, list):
                raise BadAnswerError(f"hidden states behind {cached!r:.20} tokens; those from {first - 1} on are asked")
            if len(found) != len(ids) - cached:
                raise BadAnswerError(
                    f"{len(found)} hidden states for {len(ids) - cached} places: SGLang keeps those of the last piece "
                    "of a prompt alone; start it with --chunked-prefill-size -1"
                )
            rows = found[first - 1 - cached :]
            if not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows) or not rows[0]:
                raise BadAnswerError("hidden states that are no rows of one length")
            if not all(type(x) is float or type(x) is int for row in rows for x in row):
                raise BadAnswerError("hidden states that are no numbers")
            return _checked(torch.tensor(rows, dtype=torch.float32), len(rows), head)

        return Question(self.path, payload, _ROOM + _DIGITS * len(ids) * (width + 8), read)

    def size(self, states: Tensor) -> int:
        """Bytes of the states of one token, over the wire."""
        return len(json.dumps(states[-1].tolist(), separators=(",", ":")))


SOURCES: tuple[Source, ...] = (XtokmapStates(), VLLMPooling(), SGLangStates())


def _checked(found: Tensor, n: int, head: Head | None) -> Tensor:
    if found.dtype not in _ROUNDING:
        raise BadAnswerError(f"hidden states of {found.dtype}")
    if found.shape[0] != n:
        raise BadAnswerError(f"{found.shape[0]} hidden states for {n} places")
    if head is not None and found.shape[1] != head.width:
        raise BadAnswerError(f"hidden states of {found.shape[1]} numbers; the output head takes {head.width}")
    if not bool(torch.isfinite(found).all()):
        raise BadAnswerError("hidden states that are not finite")
    return found


# ---- whether they can be believed ----------------------------------------------------------------------------------


@torch.no_grad()
def verified(head: Head, states: Tensor, ids: Sequence[int], logprobs: Tensor | None) -> Head:
    """The head with which these states give what the server says, or what a known text leaves no doubt about.

    Args:
        head: as the model's files have it.
        states: `[n, H]`, of all places of a known text but the first, and the one behind.
        ids: of the text; n.
        logprobs: float `[n]`, of the server, the first without a meaning; None: it gives none. Then the text itself
            must be likely, and likelier than by any other way to read the states; a scale of the logits that is
            nearly right, and a cap, cannot be seen.

    Returns:
        The head; where states come before the final norm, one that applies it.

    Raises:
        TeacherError: which of norm, scale, cap or shift is off; or that the head is another model's.
    """
    if max(ids) >= head.weight.shape[0]:
        raise TeacherError(f"the output head has {head.weight.shape[0]} tokens; the text has token {max(ids)}")
    own = torch.tensor(ids[1:], device=head.weight.device)
    if logprobs is not None:
        want = logprobs[1:].to(head.weight.device).float()
        whole = torch.isfinite(want)
        whole[0] = whole[-1] = False  # shifted rows have nothing there

        def off(rows: Tensor) -> float:
            """Nats from what the server says, in the mean."""
            return float((_of(rows, own) - want)[whole].abs().clamp(max=10).mean())

        most = _ROUNDING[_precision(states, head)]
        if (apart := off(_rows(head, states))) <= most:
            return head
        ways = [(what, other, off(rows)) for what, other, rows in _readings(head, states, off, exact=True)]
        what, found, error = min(ways, key=lambda way: way[2])
        if error > most:
            raise TeacherError(
                f"logprobs from its hidden states are {apart:.3g} nats from its own, in the mean, and neither norm, "
                "scale, cap nor shift explains it: is the output head another model's?"
            )
        if found is not None:
            return found
        raise TeacherError(f"logprobs from its hidden states are {apart:.3g} nats from its own, in the mean: {what}")

    def unlikely(rows: Tensor) -> float:
        """Nats that the text costs, in the mean."""
        return -float(_of(rows, own).clamp(min=-100).mean())

    cost, most = unlikely(_rows(head, states)), 0.6 * math.log(head.weight.shape[0])
    ways = [(what, other, unlikely(rows)) for what, other, rows in _readings(head, states, unlikely, exact=False)]
    what, found, least = min(ways, key=lambda way: way[2])
    # A fitted scale or cap makes any text somewhat likelier.
    if cost <= most and least > cost - max(0.3, 0.1 * cost):
        return head
    if least > most:
        raise TeacherError(
            f"a known text costs {cost:.3g} nats a token by its hidden states, and no way to read them makes it "
            "likely: is the output head another model's?"
        )
    if found is not None:
        return found
    raise TeacherError(f"a known text costs {cost:.3g} nats a token by its hidden states: {what}")


@torch.no_grad()
def logprobs_of(head: Head, ids: Sequence[int], states: Tensor) -> Floats:
    """Logprobs of a text's tokens but the first, float32 `[n - 1]`.

    Args:
        head: of the states.
        ids: of the text; n.
        states: `[n, H]`, of all places but the first, and the one behind.
    """
    own = torch.tensor(ids[1:], device=head.weight.device)
    found: Floats = _of(_rows(head, states).float(), own).cpu().numpy()
    return found


def _of(rows: Tensor, ids: Tensor) -> Tensor:
    """Logprobs of some tokens, one a row."""
    return rows.log_softmax(-1).gather(1, ids[:, None])[:, 0]


def _precision(states: Tensor, head: Head) -> torch.dtype:
    """What the numbers are made of: a server may write bfloat16 states as float32."""
    if head.weight.dtype != torch.float32:
        return head.weight.dtype
    narrow = states.dtype == torch.float32 and bool((states.bfloat16().float() == states).all())
    return torch.bfloat16 if narrow else states.dtype


def _rows(head: Head, states: Tensor) -> Tensor:
    """Logits of the places that score tokens, whole: a known text is short."""
    return head.logits(states[:-1]).slice(0, len(states) - 1)


def _readings(
    head: Head, states: Tensor, badness: Callable[[Tensor], float], *, exact: bool
) -> Iterator[tuple[str, Head | None, Tensor]]:
    """Other ways to read hidden states: what would be wrong, the head that mends it if there is one, the logits."""
    if head.norm_weight is not None:
        for norm in NORMS:
            other = replace(head, norm=norm)
            yield f"they come before the final norm ({norm})", other, _rows(other, states)
        if not head.norm:
            plain = torch.nn.functional.rms_norm(states.float(), states.shape[-1:], eps=head.eps).to(states.dtype)
            yield "they come before the final norm, and with its weights in them", None, _rows(head, plain)
    rows = _rows(head, states)
    behind = torch.cat([rows[1:], head.logits(states[-1:]).slice(0, 1)])
    yield "its rows are shifted by one: each is that of the place before", None, behind
    yield "its rows are shifted by one: each is that of the place behind", None, torch.cat([rows[:1], rows[:-1]])
    raw = _rows(replace(head, scale=1.0, softcap=None), states)
    if not exact:
        scale = _best(lambda s: badness(_capped(raw * s, head.softcap)), 2.0**-8, 2.0**8, 0.05)
        if not 0.5 < scale / head.scale < 2:
            named = f"the logits are to be scaled by about {scale:.2g}; the configuration says {head.scale:.4g}"
            yield named, None, _capped(raw * scale, head.softcap)
        return
    for cap in dict.fromkeys((head.softcap, None)):
        scale = _best(lambda s, cap=cap: badness(_capped(raw * s, cap)), 2.0**-8, 2.0**8)  # type: ignore[misc]
        named = f"capped at {cap:g}" if cap else "without a cap"
        yield (
            (
                f"the logits are to be scaled by {scale:.4g} ({named}), the configuration says {head.scale:.4g}"
                if cap == head.softcap
                else f"the logits are {named} and scaled by {scale:.4g}; the configuration says "
                f"{_said(head.softcap)} and {head.scale:.4g}"
            ),
            None,
            _capped(raw * scale, cap),
        )
    cap = _best(lambda c: badness(_capped(raw * head.scale, c)), 1.0, 1000.0)
    said = _said(head.softcap)
    yield f"the logits are capped at {cap:.4g}; the configuration says {said}", None, _capped(raw * head.scale, cap)
    yield f"the logits are not capped; the configuration says {said}", None, raw * head.scale


def _said(cap: float | None) -> str:
    return "no cap" if cap is None else f"a cap of {cap:g}"


def _capped(rows: Tensor, cap: float | None) -> Tensor:
    return rows if cap is None else cap * torch.tanh(rows / cap)


def _best(badness: Callable[[float], float], low: float, high: float, precision: float = 1e-5) -> float:
    """Where it is least, to a relative precision: the best of a coarse grid of powers, and then by thirds around it."""
    steps = 16
    grid = [low * (high / low) ** (k / steps) for k in range(steps + 1)]
    at = min(range(len(grid)), key=lambda k: badness(grid[k]))
    a, b = math.log(grid[max(at - 1, 0)]), math.log(grid[min(at + 1, steps)])
    while b - a > precision:
        c, d = a + (b - a) / 3, b - (b - a) / 3
        if badness(math.exp(c)) <= badness(math.exp(d)):
            b = d
        else:
            a = c
    return math.exp((a + b) / 2)

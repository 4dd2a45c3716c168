"""The client of a served teacher: what vLLM, SGLang and OpenAI-compatible servers are asked, and what is believed.

Token ids go in, logprobs and the top k of every row come out. Whatever a server or the way to it does wrong is either
survived (asked again) or named (`TeacherError`); an answer that contradicts itself or the question is never used.
"""

from __future__ import annotations

import html
import json
import math
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any, Protocol, TypeAlias, TypeVar
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from xtokmap._core import XTokMapError
from xtokmap.teachers import http1

#: The environment variable with the server's API key. It is no setting, so that it is in no config.json.
KEY_VARIABLE = "XTOKMAP_TEACHER_KEY"

#: vLLM writes -9999 for -inf, which JSON does not have.
_NOTHING = -9000.0

#: How far above 0 a logprob, and above 1 the sum of a row's probabilities, may be: rounding of low precisions.
_ABOVE = 1e-2

#: Seconds: the longest pause that is made of its own accord, and the longest that a server may ask for; the longest
#: between two looks for a server that is gone, and between two words about it.
_LONGEST_PAUSE, _LONGEST_ASKED_PAUSE = 30.0, 60.0
_LONGEST_LOOK, _SAID_EVERY = 5.0, 60.0

#: Statuses of a proxy or a server that has nobody to answer yet, and of a server that does not take this row.
_GONE, _UNFIT = (502, 503, 504), (400, 413, 422)

#: Seconds without an answer, and since the last look, after which there may be another model behind the URL; and how
#: far from before the known text's logprobs may be then, in nats, in the mean. From float32, bfloat16 is .03 to .07,
#: 8 bits a weight .05 to .1, 4 bits 2; 16 steps of AdamW at 1e-6 are .08, and the first no further than rounding.
_UNHEARD, _LOOKED, SAME = 10.0, 60.0, 0.1

#: Bytes that may come back: for each of a row's k likeliest tokens, a few times what any protocol writes of one; and
#: for everything else, headers included. One in `_STRUCTURE` may be a comma or open a list or an object: a megabyte of
#: `[],` is twenty of Python's.
_ENTRY, _ROOM, _STRUCTURE = 256, 2**18, 8

#: Bytes of a list of models.
_LIST_ROOM = 2**21

#: Characters of a server's text in a message.
_LONGEST_TEXT = 300

#: What a token id spells; None for special tokens and ids that are none.
Spell: TypeAlias = "Callable[[int], bytes | None]"

Found = TypeVar("Found")

Floats: TypeAlias = "npt.NDArray[np.float32]"


class TeacherError(XTokMapError):
    """A served teacher did not answer, or not so that it can be believed, and asking again would not help."""


class TeacherUnreachableError(TeacherError):
    """There is no server, or it answers no request in time and without an error of its own."""


class OtherTeacherError(TeacherError):
    """Another model answers than at the start: its scores are of no use, and a run must not go on."""


class RowRefusedError(TeacherError):
    """A server takes some of the rows of a batch, and not these.

    Attributes:
        rows: which ones.
    """

    rows: Sequence[int] = ()


class _AgainError(Exception):
    """Worth another attempt.

    Attributes:
        kind: for the figures.
        after: seconds that the server asks for.
        gone: whether there is no server, which is worth a wait.
    """

    def __init__(self, kind: str, message: str, after: float | None = None, *, gone: bool = False) -> None:
        super().__init__(message)
        self.kind, self.after, self.gone = kind, after, gone


class BadAnswerError(_AgainError):
    """An answer that contradicts itself or the question; by chance (a cut body, a mixed-up proxy) or for good."""

    def __init__(self, message: str) -> None:
        super().__init__("bad answer", f"an answer that cannot be used: {message}")


@dataclass(frozen=True, eq=False)
class Answer:
    """What a server says of one row of n token ids; row i scores token i, and row 0 nothing.

    Attributes:
        logprobs: float32 `[n]`; NaN for token 0; -inf where the model gives none of its mass.
        top_ids: int64 `[n, k]`; the likeliest tokens and the one that is there, -1 on padding and in row 0.
        top_logprobs: float32 `[n, k]`; of these, 0 on padding.
        best: float32 `[n]`; the largest logprob that the server shows of each row, NaN where it shows none.
        texts: what the server spells each token as, None where it does not say.
    """

    logprobs: npt.NDArray[np.float32]
    top_ids: npt.NDArray[np.int64]
    top_logprobs: npt.NDArray[np.float32]
    best: npt.NDArray[np.float32]
    texts: list[str | None]


@dataclass(frozen=True, eq=False)
class Question:
    """A request, and how its answer is read.

    Attributes:
        path: behind the URL.
        payload: the body; None: there is none, and it is a GET.
        most: bytes that may come back.
        read: what to make of the answer's JSON, checked; raises `BadAnswerError`.
        kind: the type of the body.
        binary: whether `read` is given the answer itself, which is no JSON.
    """

    path: str
    payload: bytes | None
    most: int
    read: Callable[[Any], Any]
    kind: str = "application/json"
    binary: bool = False


# ---- protocols ---------------------------------------------------------------------------------------------------


class Dialect(Protocol):
    """How a kind of server is asked and answers.

    Attributes:
        name: what `--teacher-protocol` calls it.
        path: behind the URL.
        spare: tokens that a row must be shorter than the server's longest: what it generates, and what it keeps free.
    """

    name: str
    path: str
    spare: int

    def payload(self, ids: Sequence[int], topk: int, model: str) -> dict[str, Any]:
        """The request for the logprobs of a row of ids."""

    def parse(self, body: Any, ids: Sequence[int], topk: int, spell: Spell | None) -> Answer:
        """The answer to it, checked; raises `BadAnswerError`."""


class VLLM:
    """`POST /v1/completions` with `prompt_logprobs`: a mapping from token id to logprob for every token but the first.

    The token that is there is always among a row's, whatever its rank: a row without it is another row's.
    """

    name, path, spare = "vllm", "/v1/completions", 1

    def payload(self, ids: Sequence[int], topk: int, model: str) -> dict[str, Any]:
        """The request for the logprobs of a row of ids."""
        asked = {"prompt_logprobs": topk, "max_tokens": 1, "temperature": 1.0, "return_token_ids": True}
        return {"model": model, "prompt": list(ids), **asked}

    def parse(self, body: Any, ids: Sequence[int], topk: int, spell: Spell | None) -> Answer:
        """The answer to it, checked; raises `BadAnswerError`."""
        choice = _one_choice(body)
        rows = choice.get("prompt_logprobs")
        if rows is None:
            raise BadAnswerError("no prompt_logprobs in it")
        rows = _rows("prompt_logprobs", rows, len(ids))
        echo = choice.get("prompt_token_ids")
        if echo is not None and echo != list(ids):
            raise BadAnswerError("its prompt_token_ids are not the ids that were sent")
        if rows[0] is not None:
            raise BadAnswerError("row 0 of prompt_logprobs is not null: rows are shifted")
        logprobs: list[float] = [math.nan]
        tops: list[dict[int, float]] = [{}]
        texts: list[str | None] = [None]
        for i in range(1, len(ids)):
            row = rows[i]
            own = row.get(str(ids[i])) if isinstance(row, dict) else None
            if not isinstance(own, dict):
                raise BadAnswerError(f"row {i} of prompt_logprobs does not have token {ids[i]}, which is there")
            tops.append({_key(key): _number(entry, "logprob", i) for key, entry in row.items()})
            logprobs.append(tops[-1][ids[i]])
            texts.append(_text(own.get("decoded_token"), i))
        return _checked(ids, topk, logprobs, tops, texts)


class SGLang:
    """`POST /generate` with `return_logprob`: triples of logprob, id and text."""

    name, path, spare = "sglang", "/generate", 7

    def payload(self, ids: Sequence[int], topk: int, model: str) -> dict[str, Any]:
        """The request for the logprobs of a row of ids."""
        return {
            "input_ids": list(ids),
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": topk,
            "return_text_in_logprobs": True,
        }

    def parse(self, body: Any, ids: Sequence[int], topk: int, spell: Spell | None) -> Answer:
        """The answer to it, checked; raises `BadAnswerError`."""
        meta = body.get("meta_info") if isinstance(body, dict) else None
        meta = meta if isinstance(meta, dict) else {}
        rows = meta.get("input_token_logprobs")
        if rows is None:
            raise BadAnswerError("no meta_info.input_token_logprobs in it")
        self.check_whole(meta, len(ids))
        rows = _rows("input_token_logprobs", rows, len(ids))
        triples = [_triple(row, f"input_token_logprobs[{i}]") for i, row in enumerate(rows)]
        for i, (_, token, _) in enumerate(triples):
            if token != ids[i]:
                raise BadAnswerError(f"input_token_logprobs[{i}] is of token {token}; {ids[i]} is there")
        if triples[0][0] is not None:
            raise BadAnswerError("input_token_logprobs[0] is not null: rows are shifted")
        logprobs = [math.nan, *(_number(row, 0, i) for i, row in enumerate(rows[1:], 1))]
        tops: list[dict[int, float]] = [{} for _ in ids]
        if topk:
            top_rows = _rows("input_top_logprobs", meta.get("input_top_logprobs"), len(ids))
            for i in range(1, len(ids)):
                where = f"input_top_logprobs[{i}]"
                if not isinstance(top_rows[i], list):
                    raise BadAnswerError(f"{where} is {_shown(top_rows[i])}, not a list")
                row = [_triple(entry, where) for entry in top_rows[i]]
                tops[i] = {token: _number(entry, 0, i) for entry, (_, token, _) in zip(top_rows[i], row, strict=True)}
                if len(tops[i]) < len(row):
                    raise BadAnswerError(f"{where} has a token twice")
        return _checked(ids, topk, logprobs, tops, [text for _, _, text in triples])

    def check_whole(self, meta: Mapping[str, Any], n: int) -> None:
        """Raises `RowRefusedError` where the server has cut a row of n tokens, which it does not call an error."""
        seen = meta.get("prompt_tokens", n)
        if type(seen) is int and 0 < seen < n:
            raise RowRefusedError(
                f"the server cuts it to {seen} of its {n} tokens; start it with a larger --context-length, and without "
                "--allow-auto-truncate"
            )


class OpenAI:
    """`POST /v1/completions` with `echo` and `logprobs`: the tokens' texts rather than their ids.

    vLLM's servers are asked to write ids instead (`token_id:42`), which are checked as those of the other protocols.
    Where texts come back, their number must be right and each must spell the bytes of the id that was sent, as far as
    both are whole characters. Which token an alternative is, its text does not say, so that there is no top k of those.
    """

    name, path, spare = "openai", "/v1/completions", 1

    def payload(self, ids: Sequence[int], topk: int, model: str) -> dict[str, Any]:
        """The request for the logprobs of a row of ids."""
        # Not max_tokens 0: to some servers that is no limit.
        asked = {"echo": True, "logprobs": max(topk, 1), "max_tokens": 1, "return_tokens_as_token_ids": True}
        return {"model": model, "prompt": list(ids), **asked, "temperature": 1.0}

    def parse(self, body: Any, ids: Sequence[int], topk: int, spell: Spell | None) -> Answer:
        """The answer to it, checked; raises `BadAnswerError`."""
        given = _one_choice(body).get("logprobs")
        if not isinstance(given, dict) or not isinstance(given.get("tokens"), list):
            raise BadAnswerError("no logprobs.tokens in it")
        n, tokens = len(ids), given["tokens"]
        if len(tokens) not in (n, n + 1):
            raise BadAnswerError(f"{len(tokens)} logprobs.tokens for {n} ids and at most one more")
        values = _rows("token_logprobs", given.get("token_logprobs"), len(tokens))
        if values[0] is not None:
            raise BadAnswerError("token_logprobs[0] is not null: rows are shifted, or a token was put before them")
        texts: list[str | None] = [_text(token, i) for i, token in enumerate(tokens[:n])]
        named = [_named_id(text) for text in texts]
        tops: list[dict[int, float]] = [{} for _ in ids]
        top_rows = given.get("top_logprobs")
        if None not in named:
            texts = [None] * n
            for i, token in enumerate(named):
                if token != ids[i]:
                    raise BadAnswerError(f"logprobs.tokens[{i}] is token {token}; {ids[i]} is there")
            if topk:
                top_rows = _rows("top_logprobs", top_rows, len(tokens))
                for i in range(1, n):
                    row = {_named_id(text): value for text, value in _mapping(top_rows[i], i).items()}
                    if None in row:
                        raise BadAnswerError(f"top_logprobs[{i}] has tokens without ids")
                    tops[i] = {token: _number(row, token, i) for token in row if token is not None}
        elif any(token is not None for token in named):
            raise BadAnswerError("some of logprobs.tokens are ids, and others are not")
        else:
            for i, text in enumerate(texts):
                if spell is not None and text is not None and spells(text, spell(ids[i])) is False:
                    raise BadAnswerError(
                        f"logprobs.tokens[{i}] is {_shown(text)}; token {ids[i]} spells {spell(ids[i])!r}"
                    )
            if topk:
                raise TeacherError(
                    "this server names tokens by their texts, which do not tell alternatives apart: its top k cannot "
                    "be used; set teacher_topk=0 (and a loss of logprobs alone, as 'prior')"
                )
        logprobs = [math.nan, *(_number(values, i, i) for i in range(1, n))]
        answer = _checked(ids, topk, logprobs, tops, texts)
        if isinstance(top_rows, list) and len(top_rows) == len(tokens):
            # Whose they are may not be known; what the likeliest has is.
            for i in range(1, n):
                row_of_texts = _mapping(top_rows[i] or {}, i)
                answer.best[i] = max((_number(row_of_texts, text, i) for text in row_of_texts), default=math.nan)
        return answer


SGLANG = SGLang()

PROTOCOLS: dict[str, Dialect] = {dialect.name: dialect for dialect in (VLLM(), SGLANG, OpenAI())}


def spells(text: str, spelled: bytes | None) -> bool | None:
    """Whether a server's text of a token is its bytes, white space at its ends aside; None where texts cannot tell."""
    if spelled is None or not spelled.strip() or not text.strip() or "\ufffd" in text or not spelled.isascii():
        return None
    return text.replace("Ġ", " ").replace("▁", " ").strip() == spelled.decode().strip()


def _one_choice(body: Any) -> dict[str, Any]:
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadAnswerError("not one choice in it")
    return choices[0]


def _rows(name: str, rows: Any, n: int) -> list[Any]:
    if not isinstance(rows, list) or len(rows) != n:
        found = f"has {len(rows)} rows" if isinstance(rows, list) else f"is {_shown(rows)}"
        raise BadAnswerError(f"{name} {found} for {n} tokens")
    return rows


def _triple(row: Any, where: str) -> tuple[Any, int, str | None]:
    if not isinstance(row, list) or len(row) < 2:
        raise BadAnswerError(f"{where} is {_shown(row)}, not [logprob, id, text]")
    if type(row[1]) is not int or not 0 <= row[1] < 2**31:
        raise BadAnswerError(f"{where} has {_shown(row[1])}, which is no token id")
    return row[0], row[1], _text(row[2], where) if len(row) > 2 else None


def _key(text: str) -> int:
    """A token id that is the name of something; in one spelling, so that none is there twice."""
    if not _CANONICAL.fullmatch(text) or int(text) >= 2**31:
        raise BadAnswerError(f"{_shown(text)} is no token id")
    return int(text)


_CANONICAL = re.compile("0|[1-9][0-9]{0,9}")


def _mapping(row: Any, i: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadAnswerError(f"top_logprobs[{i}] is {_shown(row)}, not a mapping")
    return row


def _named_id(text: str | None) -> int | None:
    head, _, tail = (text or "").partition(":")
    return _key(tail) if head == "token_id" else None


def _text(value: Any, where: int | str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise BadAnswerError(f"row {where} has {_shown(value)} for a text")
    return value


def _number(row: Any, key: Any, i: int) -> float:
    try:
        value = row[key]
    except (KeyError, IndexError, TypeError):
        value = None
    if type(value) not in (int, float):
        raise BadAnswerError(f"row {i} has {_shown(value)} for a logprob")
    if not value <= _ABOVE:  # NaN is not, either; an integer may have more digits than a float can take
        raise BadAnswerError(f"row {i} has logprob {_shown(value)}")
    return -math.inf if value <= _NOTHING else min(float(value), 0.0)


def _shown(value: Any) -> str:
    """Something of a server's in a message: in one short line of characters that do nothing to a terminal."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return f"an integer of {value.bit_length()} bits"
    return repr(value if not isinstance(value, str) or len(value) <= 60 else f"{value[:60]}...")


def _escaped(text: str) -> str:
    """A server's own words, in one line: white space is a space, and what does not print is its escape."""
    line = " ".join(text[: 4 * _LONGEST_TEXT].split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)[:_LONGEST_TEXT]


def _json(content: bytes, most: int) -> Any:
    """What an answer's bytes mean, where they are JSON in the strict sense: no NaN, and no name twice.

    Raises:
        BadAnswerError: they are not, or are more than `most` bytes' worth of objects.
    """
    try:
        text = content.decode()
        if sum(map(text.count, "[{,")) > most // _STRUCTURE:
            raise BadAnswerError("more lists, objects and commas than any answer to this can have")
        if any(match[1] for match in _SURROGATES.finditer(text)):
            raise BadAnswerError("half a surrogate pair in it")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise BadAnswerError(f"{len(content)} bytes that are nested too deeply") from None
    except ValueError:  # UTF-8 and the digits of integers included
        raise BadAnswerError(f"{len(content)} bytes that are no JSON") from None


#: Escapes of JSON that may be part of a surrogate pair, as far as these matter; group 1 is one without its other half.
_SURROGATES = re.compile(r"\\(?:[^u]|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F]|(u[dD][89a-fA-F]))")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise BadAnswerError("a name twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise BadAnswerError(f"{name} in it, which is no JSON")


def _checked(
    ids: Sequence[int], topk: int, logprobs: list[float], tops: list[dict[int, float]], texts: Sequence[Any]
) -> Answer:
    for i in range(1, len(ids)):
        own = tops[i].setdefault(ids[i], logprobs[i])
        if own != logprobs[i] and not abs(own - logprobs[i]) < _ABOVE:
            raise BadAnswerError(f"row {i} has {logprobs[i]} and {own} for the same token")
        if len(tops[i]) > max(topk, 1) + 1:
            raise BadAnswerError(f"row {i} has {len(tops[i])} tokens; {topk} and the one that is there were asked for")
        total = sum(map(math.exp, tops[i].values()))
        if total > 1 + _ABOVE:
            raise BadAnswerError(f"the probabilities of row {i} add up to {total:.4g}")
    width = max(map(len, tops), default=0)
    top_ids = np.full((len(ids), width), -1, np.int64)
    top_logprobs = np.zeros((len(ids), width), np.float32)
    for i, row in enumerate(tops):
        top_ids[i, : len(row)] = list(row)
        top_logprobs[i, : len(row)] = list(row.values())
    best = np.array([max(row.values(), default=math.nan) for row in tops], np.float32)
    return Answer(np.array(logprobs, np.float32), top_ids, top_logprobs, best, list(texts))


# ---- the client --------------------------------------------------------------------------------------------------


def check_url(url: str, name: str = "teacher_url", key: str = KEY_VARIABLE) -> None:
    """Whether this can be a server's URL, and has no secret in it; the message repeats nothing of what it has.

    Raises:
        XTokMapError: it cannot.
    """
    try:
        parts = urlsplit(url)
        named = bool((parts.hostname or "").encode("idna")) and (parts.port is None or parts.port > 0)
    except ValueError:
        parts, named = urlsplit(""), False
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise XTokMapError(f"{name}: leave out user names, passwords and queries; a key goes into the variable {key}")
    if parts.scheme not in ("http", "https") or not named:
        raise XTokMapError(f"{name}={url!r}: expected http://host:port or https://host")


class Client:
    """Asks a server for the logprobs of rows of token ids: several at once, and again where that can help.

    A request is made again after a time-out, a cut connection, a status of 408, 425, 429 or 5xx (but 501), and an
    answer that is no JSON or fails its checks; after a pause that doubles each time, half of it by chance, or as long
    as the server's Retry-After says (a minute at most), which then holds for all requests. Other statuses are for good.
    A server that cannot be connected to, or is not there behind its proxy (502, 503, 504), is waited for as long as
    `patience` says. When it is back, when nobody has heard of it for a while, and once a minute it must say of a known
    text what it said before.

    A server is believed in nothing: a request's time and the bytes that come back are bounded as a whole, whatever
    comes is checked, and what is repeated of it in a message is escaped.

    Args:
        url: of the server, up to and without `/v1`.
        protocol: a name of `PROTOCOLS`, or `auto`: whichever answers, in their order.
        model: the name under which the server has the model; empty: the only one that it has.
        concurrency: most requests at a time.
        timeout: seconds for one request, from before it is connected to the end of its answer.
        retries: attempts after the first.
        patience: seconds to wait for a server that is gone, since it was.
        key: sent as `Authorization: Bearer`; None takes the environment variable `XTOKMAP_TEACHER_KEY`, if it is set.
        spell: the bytes of a token id, by which texts are checked where a protocol gives no ids.
        vocab_size: token ids are below it; 0: not known.
        pause: seconds before the second attempt.
        role: what settings call the server: `teacher` or `sampler`.

    Attributes:
        figures: counts: `requests`, `answers` that could be used, and the causes of further attempts.
        known: logprobs of a known text's tokens as they were at first, float `[n]`; None: nobody has asked.
        max_length: most tokens of a row, the new one included, as far as the server says; 0: not known.
        say: what to do with a line that somebody may want to read: that the server is waited for, and is back.

    Raises:
        XTokMapError: a URL or protocol that cannot be.
    """

    def __init__(
        self,
        url: str,
        *,
        protocol: str = "auto",
        model: str = "",
        concurrency: int = 16,
        timeout: float = 60.0,
        retries: int = 5,
        patience: float = 300.0,
        key: str | None = None,
        spell: Spell | None = None,
        vocab_size: int = 0,
        pause: float = 0.5,
        role: str = "teacher",
    ) -> None:
        self.role, self.key_variable = role, f"XTOKMAP_{role.upper()}_KEY"
        check_url(url, f"{role}_url", self.key_variable)
        if protocol != "auto" and protocol not in PROTOCOLS:
            raise XTokMapError(f"protocol={protocol!r}: use one of auto, {', '.join(PROTOCOLS)}")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model, self.concurrency, self.timeout, self.retries = model, concurrency, timeout, retries
        self.spell, self.vocab_size, self.pause = spell, vocab_size, pause
        self.patience, self.max_length = patience, 0
        self.figures: Counter[str] = Counter()
        self.say: Callable[[str], None] = lambda text: None
        self._known: tuple[Question, Callable[[Any], Floats]] | None = None
        self.known: Floats | None = None
        self._heard, self._doubted, self._looking = time.monotonic(), False, threading.Lock()
        self._looked = self._heard
        self._gone: float | None = None
        self._said = 0.0
        self._dialect = PROTOCOLS.get(protocol)
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._not_before = 0.0
        self._batches: set[threading.Event] = set()
        self._key = os.environ.get(self.key_variable, "") if key is None else key
        if self._key != self._key.strip() or not self._key.isascii() or not self._key.isprintable():
            raise XTokMapError(
                f"{self.key_variable}: the key has white space around it, or characters that no header takes"
            )
        # No certificates are read where none are needed.
        self._tls = http1.certificates() if self.url.startswith("https") else None
        self._connections().close()  # a proxy that cannot be is named here

    def __repr__(self) -> str:
        return f"Client({self.url!r}, protocol={self._dialect.name if self._dialect else 'auto'!r})"

    def _connections(self) -> http1.Connections:
        """For one batch: a server drops connections that idle through an update, and the next request with them."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return http1.Connections(self.url, headers, self._tls)

    @property
    def protocol(self) -> str:
        """What the server speaks; `auto` where nobody has asked yet."""
        return self._dialect.name if self._dialect else "auto"

    @property
    def spare(self) -> int:
        """Tokens that a row must be shorter than `max_length`."""
        return self._dialect.spare if self._dialect else 1

    def name_model(self, *, optional: bool = False) -> None:
        """Finds the model's name, where it is open, and how long its rows may be.

        Args:
            optional: whether the server need not say.

        Raises:
            TeacherError: there is no server; or several models and no name of one; or it does not say.
        """
        with self._connections() as http:
            models = self._models(http, optional=optional)
        self.model = self.model or self._only_model(models)
        self._set_longest(models)

    def _set_longest(self, models: Mapping[str, int]) -> None:
        self.max_length = models.get(self.model, next(iter(models.values())) if len(models) == 1 else 0)

    def connect(self, ids: Sequence[int], topk: int = 0) -> str:
        """Finds the protocol and the model's name, where they are open, by asking about some ids; returns the protocol.

        Raises:
            TeacherError: nothing that answers, or no protocol in which the answer can be used, with each one's reason.
        """
        dialects = [self._dialect] if self._dialect else list(PROTOCOLS.values())
        with self._connections() as http:
            named = self._dialect is not None and self._dialect.path.startswith("/v1") and not self.model
            models = self._models(http, optional=not named)
            if not self.model and any(dialect.path.startswith("/v1") for dialect in dialects):
                self.model = self._only_model(models)
            self._set_longest(models)
            if self._dialect is not None:
                self._answer(http, self._question(self._dialect, ids, topk), threading.Event())
                return self._dialect.name
            refusals = []
            for dialect in dialects:
                refusal = self._refusal_of(http, dialect, ids, topk)
                if refusal is None:
                    self._dialect = dialect
                    return dialect.name
                refusals.append(f"{dialect.name}: {refusal}")
        raise TeacherError(f"{self.url}: no protocol works here; {'; '.join(refusals)}")

    def _refusal_of(self, http: http1.Connections, dialect: Dialect, ids: Sequence[int], topk: int) -> str | None:
        try:
            self._answer(http, self._question(dialect, ids, topk), threading.Event(), probing=True)
        except TeacherUnreachableError:
            raise
        except TeacherError as error:
            return str(error).removeprefix(self.url)
        return None

    def score(self, rows: Sequence[Sequence[int]], topk: int = 0) -> list[Answer]:
        """Answers for every row, in their order.

        Args:
            rows: of at least two ids each.
            topk: how many of the likeliest tokens of each place; 0: the logprobs alone.

        Raises:
            RowRefusedError: some of them the server does not take, and all others have an answer.
            TeacherError: there is no answer for one of them, with the reason. The others are given up then.
        """
        if self._dialect is None and rows:
            self.connect(rows[0], topk)
        return self.ask([self.question(row, topk) for row in rows])

    def question(self, ids: Sequence[int], topk: int = 0) -> Question:
        """The request for the logprobs of a row, in the protocol that was found."""
        assert self._dialect is not None
        return self._question(self._dialect, ids, topk)

    def _question(self, dialect: Dialect, ids: Sequence[int], topk: int) -> Question:
        def read(body: Any) -> Answer:
            found = dialect.parse(body, ids, topk, self.spell)
            largest = int(found.top_ids.max(initial=-1))
            if self.vocab_size and largest >= max(self.vocab_size, max(ids) + 1):
                raise BadAnswerError(f"token {largest} is among the likeliest; the vocabulary has {self.vocab_size}")
            return found

        payload = json.dumps(dialect.payload(ids, topk, self.model)).encode()
        return Question(dialect.path, payload, _ROOM + _ENTRY * len(ids) * (topk + 2), read)

    def ask(self, questions: Sequence[Question]) -> list[Any]:
        """What each question's `read` gives, in their order. Several are asked at a time.

        Raises:
            RowRefusedError: as `score`.
            TeacherError: as `score`.
        """
        stop = threading.Event()
        self._batches.add(stop)
        pool = ThreadPoolExecutor(min(self.concurrency, max(len(questions), 1)), thread_name_prefix="teacher")
        http = self._connections()
        try:
            futures = [pool.submit(_or_refusal, self._answer, http, one, stop) for one in questions]
            done = wait(futures, return_when=FIRST_EXCEPTION).done
            failed = next((e for f in futures if f in done and (e := f.exception()) is not None), None)
            if failed is not None:
                raise failed
            return _whole([future.result() for future in futures])
        finally:
            stop.set()
            self._batches.discard(stop)
            pool.shutdown(wait=False, cancel_futures=True)
            http.close()  # ends the requests that are under way when another one failed, or Ctrl-C came

    def give_up(self) -> None:
        """Ends the batches that other threads are waiting for, without further attempts: they get a TeacherError."""
        for stop in list(self._batches):
            stop.set()

    def _answer(
        self, http: http1.Connections, question: Question, stop: threading.Event, *, probing: bool = False
    ) -> Any:
        found = self._again(http, question, stop, probing=probing)
        self._look_again(stop)
        with self._lock:
            self.figures["answers"] += 1
        return found

    def _again(
        self, http: http1.Connections, question: Question, stop: threading.Event, *, probing: bool = False
    ) -> Any:
        """An answer, asked for again where that may help; the only place from which errors go out."""
        pause = self.pause
        for number in count(1):
            stop.wait(self._not_before - time.monotonic())
            if stop.is_set():
                raise TeacherError(f"{self.url}: given up, as another request of the batch failed or the run ended")
            start = time.monotonic()
            found, error = self._caught(http, question)
            if error is None:
                self._hear(start)
                return found
            if probing and number > 1 and isinstance(error, BadAnswerError):
                break  # another protocol's, and not by chance
            waits = error.gone and self._waits(str(error))
            if number > self.retries and not waits:
                break
            # What the server asks for comes on top: a moment of it is none.
            stop.wait(min(pause, _LONGEST_LOOK if waits else _LONGEST_PAUSE) * (1 + random.random()) / 2)
            pause = min(2 * pause, _LONGEST_PAUSE)
        assert error is not None
        kind = TeacherError if isinstance(error, BadAnswerError) else TeacherUnreachableError
        said = f"{self.url}{question.path}: gave up after {number} attempts, the last: {error}"
        raise kind(self._clean(said + self._advice(error)))

    def _advice(self, error: _AgainError) -> str:
        """What may help against something that did not pass."""
        if error.kind == "time-out":
            return f"; set a longer {self.role}_timeout, or ask for less at a time ({self.role}_concurrency)"
        if error.kind == "status 429":
            return f"; ask for less at a time ({self.role}_concurrency)"
        if error.gone:
            return f"; is it started, and is this its address? teacher_patience is {self.patience:g} seconds"
        return ""

    def _caught(self, http: http1.Connections, question: Question) -> tuple[Any, _AgainError | None]:
        try:
            return self._asked(http, question), None
        except _AgainError as error:
            with self._lock:
                self.figures[error.kind] += 1
                if error.after is not None:
                    self._not_before = max(self._not_before, time.monotonic() + error.after)
            return None, error
        except TeacherError as error:
            raise type(error)(self._clean(f"{self.url}{question.path}: {error}")) from None

    def _waits(self, why: str) -> bool:
        """Whether to wait for a server that is gone, and says so from time to time."""
        now = time.monotonic()
        with self._lock:
            if self._gone is None:
                self._gone, self._said = now, -math.inf
            since = now - self._gone
            waits = since < self.patience
            says = waits and now - self._said >= _SAID_EVERY
            self._said = now if says else self._said
        if says:
            so_far = f", for {since:.0f} s so far" if since else ""
            self.say(f"{self.url} is not there ({self._clean(why)}): waiting{so_far}; {self.patience:g} s at most")
        return waits

    def _hear(self, start: float) -> None:
        """An answer has come, to a request of that time."""
        now = time.monotonic()
        with self._lock:
            gone, self._gone = self._gone, None if self._gone is not None and start >= self._gone else self._gone
            back = gone is not None and self._gone is None
            says = back and self._said > -math.inf
            self._doubted |= back or now - self._heard > _UNHEARD or now - self._looked > _LOOKED
            self._heard = now
        if says and gone is not None:
            self.say(f"{self.url} answers, after {now - gone:.0f} s")

    def remember(self, question: Question, answer: Any, logprobs: Callable[[Any], Floats]) -> None:
        """Asks this again when there may be another model behind the URL.

        Args:
            question: about a known text.
            answer: to it.
            logprobs: of the text's tokens, by an answer.
        """
        self._known, self.known, self._doubted = (question, logprobs), logprobs(answer), False
        self._looked = time.monotonic()

    def _look_again(self, stop: threading.Event) -> None:
        """Whether the model is the same, and how long its rows may be now, where that is in doubt; answers wait for it.

        Raises:
            OtherTeacherError: it is not.
        """
        if self._known is None or not self._doubted:
            return
        with self._looking:
            if not self._doubted:
                return
            question, logprobs = self._known
            assert self.known is not None
            self._doubted, self._looked = False, time.monotonic()
            try:
                with self._connections() as http:
                    apart = nats_apart(self.known, logprobs(self._again(http, question, stop)))
                    if models := self._models(http, optional=True, stop=stop):
                        self._set_longest(models)
                if not apart <= SAME:
                    raise OtherTeacherError(
                        f"{self.url} has another model than at the start: the logprobs of a known text are "
                        f"{apart:.2g} nats from what they were, in the mean; serve that one again"
                    )
            except BaseException:
                self._doubted = True
                raise

    def _asked(self, http: http1.Connections, question: Question) -> Any:
        """One attempt; raises `_AgainError` or, without the URL, `TeacherError`."""
        method, most = "GET" if question.payload is None else "POST", question.most
        with self._lock:
            self.figures["requests"] += 1
        try:
            answer = http.ask(
                method, question.path, question.payload, seconds=self.timeout, most=most, kind=question.kind
            )
        except http1.LateError as error:
            raise _AgainError("time-out", str(error)) from None
        except http1.UnfitError as error:
            raise BadAnswerError(str(error)) from None
        except http1.ExchangeError as error:
            gone = isinstance(error, http1.UnreachedError)
            raise _AgainError("connection", f"the connection failed: {self._repeated(str(error))}", gone=gone) from None
        if answer.status != 200:
            raise self._refusal(answer.status, answer.headers, answer.content)
        # One at a time: only one of them is in memory as Python's objects, which are larger than its bytes.
        with self._reading:
            try:
                return question.read(answer if question.binary else _json(answer.content, most))
            except (TeacherError, _AgainError):
                raise
            except Exception as error:  # what no check above has thought of
                raise BadAnswerError(f"{type(error).__name__} on reading it") from None

    def _refusal(self, status: int, headers: Mapping[str, str], content: bytes) -> Exception:
        said = self._repeated(_said(content))
        said = f": {said}" if said else ""
        if status in (408, 425, 429) or (status >= 500 and status != 501):
            after = _retry_after(headers.get("retry-after"))
            return _AgainError(f"status {status}", f"status {status}{said}", after, gone=status in _GONE)
        hint = ""
        if status in (401, 403):
            name = self.key_variable
            hint = f"; set {name} to the server's key" if not self._key else f"; the key of {name}?"
        elif status == 404:
            hint = f"; another protocol, or a model that it does not have{self._naming(' ({})')}?"
        elif 300 <= status < 400:
            hint = "; redirects are not followed, as they would take the key along: give the server's own URL"
        kind = RowRefusedError if status in _UNFIT else TeacherError
        return kind(f"refused with status {status}{said}{hint}")

    def _naming(self, text: str) -> str:
        """How to say which model is meant, where there is a setting for that."""
        return text.format("teacher_model") if self.role == "teacher" else ""

    def _models(
        self, http: http1.Connections, *, optional: bool, stop: threading.Event | None = None
    ) -> dict[str, int]:
        """The models that the server has, and how long their rows may be; none where it does not say, if that may be.

        Raises:
            TeacherError: there is no server; or no list that can be read, and it is not optional.
        """
        question = Question("/v1/models", None, _LIST_ROOM, _models_in)
        try:
            found: dict[str, int] = self._again(http, question, stop or threading.Event(), probing=optional)
        except TeacherUnreachableError:
            raise
        except TeacherError:
            if optional:
                return {}
            raise
        return found

    def _only_model(self, models: Mapping[str, int]) -> str:
        """The name of the one model that the server has; empty where it does not say."""
        if len(models) > 1:
            some = self._repeated(", ".join(models))
            raise TeacherError(f"{self.url} has several models{self._naming(', set {} to one')}: {some}")
        return next(iter(models), "")

    def _repeated(self, text: str) -> str:
        """A server's words for a message: escaped, and first without the key, which would be cut in two."""
        return _escaped(self._clean(text))

    def _clean(self, message: str) -> str:
        """A message without the key, which a server may well repeat."""
        return message.replace(self._key, "***") if self._key else message


def _said(content: bytes) -> str:
    """What an error's body says, as far as that can be told."""
    try:
        body = _json(content, _ROOM)
    except BadAnswerError:
        body = None
    error = body.get("error", body) if isinstance(body, dict) else body
    text = error.get("message", error.get("detail")) if isinstance(error, dict) else error
    text = text if isinstance(text, str) else content.decode(errors="replace")
    # A page for people, of a proxy or of a server that is none, without its markup.
    return html.unescape(_MARKUP.sub(" ", text)) if text.lstrip().startswith("<") else text


_MARKUP = re.compile("<[^<>]*>?")


def _models_in(body: Any) -> dict[str, int]:
    entries = body.get("data", []) if isinstance(body, dict) else None
    if not isinstance(entries, list):
        raise BadAnswerError(f"its list of models is {_shown(entries)}")
    models = {}
    for entry in entries:
        name = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not 0 < len(name) <= 1000:
            raise BadAnswerError(f"{_shown(name)} is no model's name")
        longest = entry.get("max_model_len")
        models[name] = longest if type(longest) is int and 0 < longest < 2**31 else 0
    return models


def _or_refusal(ask: Callable[..., Found], *args: Any) -> Found | RowRefusedError:
    """What a server makes of a row; that it does not take it is no failure of the others."""
    try:
        return ask(*args)
    except RowRefusedError as error:
        return error


def _whole(answers: Sequence[Found | RowRefusedError]) -> list[Found]:
    refused = {b: answer for b, answer in enumerate(answers) if isinstance(answer, RowRefusedError)}
    if not refused:
        return [answer for answer in answers if not isinstance(answer, RowRefusedError)]
    first = next(iter(refused.values()))
    if len(refused) == len(answers):
        raise TeacherError(str(first))
    error = RowRefusedError(f"{len(refused)} of {len(answers)} rows are not taken, the first: {first}")
    error.rows = list(refused)
    raise error


def nats_apart(before: npt.ArrayLike, now: npt.ArrayLike) -> float:
    """How far two models' logprobs of a text are from each other, in the mean over the tokens that both have."""
    a, b = (np.maximum(np.asarray(x, np.float64), _NOTHING) for x in (before, now))
    n = min(len(a), len(b))
    return float(np.minimum(np.abs(a[:n] - b[:n]), 10).mean())


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which has seconds or a date; None where it has neither, or nothing to come."""
    if value is None:
        return None
    try:
        if re.fullmatch(r"\s*-?[0-9.]{1,400}\s*", value):
            seconds = float(value)
        else:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return min(seconds, _LONGEST_ASKED_PAUSE) if seconds > 0 else None


# ---- the self-test -----------------------------------------------------------------------------------------------


def self_test(
    client: Client, ids: Sequence[int], others: Sequence[int], *, topk: int = 0, spell: Spell | None = None
) -> str | None:
    """Whether a server repeats itself, scores each token at its own row, and has the tokenizer that is thought.

    The same ids are asked twice. Then the token in the middle becomes each of `others`. What precedes it cannot know;
    its own row scores other tokens then, from the same distribution; the next row's distribution is another. So the
    first logprob that changes is the changed token's, and the first largest logprob of a row that changes is the next
    row's, unless rows are shifted. That needs no model that has learned anything.

    Args:
        client: of the server.
        ids: of a known text; a dozen tokens or more.
        others: other tokens, all different, and different from the middle one.
        topk: how many of the likeliest tokens to ask for.
        spell: the bytes of a token id.

    Returns:
        None, or what could not be told, and why.

    Raises:
        TeacherError: a server that must not be a teacher.
    """
    middle = len(ids) // 2
    variants = [[*ids[:middle], other, *ids[middle + 1 :]] for other in others]
    # Of every row something that does not depend on the token that is there. OpenAI's dialect has that anyway.
    topk = topk if client.protocol == OpenAI.name else max(topk, 1)
    first, second, *rest = client.score([ids, ids, *variants], topk)
    client.remember(client.question(ids, topk), first, lambda answer: answer.logprobs[1:])
    with np.errstate(invalid="ignore"):
        gap = np.nan_to_num(np.abs(first.logprobs - second.logprobs))
    apart = float(gap.max())
    # Low precisions in batches of other sizes differ; more so where a logprob is far from 0.
    if (gap > 0.25 + 0.02 * np.abs(np.nan_to_num(first.logprobs, neginf=0))).any():
        raise TeacherError(
            f"{client.url}: the same ids have logprobs that differ by {apart:.3g} nats when asked again; is a "
            "sampling setting applied to them, or are there several models behind this URL?"
        )
    if spell is not None:
        known = [(text, i, spells(text, spell(i))) for text, i in zip(first.texts, ids, strict=True) if text]
        wrong = [(text, i) for text, i, same in known if same is False]
        if len(wrong) * 2 > sum(same is not None for *_, same in known):
            text, i = wrong[0]
            raise TeacherError(
                f"{client.url}: token {i} is {_shown(text)} there and {spell(i)!r} in the tokenizer of --teacher: "
                "these are two vocabularies"
            )
    answers = (first, *rest)
    views = [("token", middle, [a.logprobs for a in answers]), ("row", middle + 1, [a.best for a in answers])]
    for what, due, rows in views:
        spread = np.ptp(np.stack([np.nan_to_num(row, neginf=_NOTHING) for row in rows]), axis=0)
        noise = max(float(spread[1 : max(2, middle // 2)].max()), apart)
        some = 10 * noise + 1e-4
        # Before the change that is due, a row may be rounded otherwise, as it was in a batch of another size.
        changed = np.flatnonzero(spread > np.where(np.arange(len(ids)) < due, max(some, spread.max() / 10), some))
        if not len(changed):
            return (
                f"no {what} changes with token {middle} (noise {noise:.2g} nats): whether rows are shifted is not known"
            )
        if changed[0] != due:
            raise TeacherError(
                f"{client.url}: with token {middle} changed, the first {what} to change is {changed[0]} instead of "
                f"{due}: rows are shifted"
            )
    return None

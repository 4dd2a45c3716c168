"""ServerTeacher: a causal language model behind HTTP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.boundary.cover import CoverQueries
from xtokmap.chat import PLAIN_TEMPLATE
from xtokmap.losses.queries import transfer, transfer_masses
from xtokmap.teachers import sums
from xtokmap.teachers.client import (
    Answer,
    Client,
    OtherTeacherError,
    RowRefusedError,
    TeacherError,
    TeacherUnreachableError,
    self_test,
)
from xtokmap.teachers.head import Head
from xtokmap.teachers.scores import Prompted, Scores, check_queries, padded_found, scores_of
from xtokmap.teachers.states import SOURCES, logprobs_of, verified
from xtokmap.tokenizers import byte_table
from xtokmap.torch.completions import check_pairs, flat_ids, row_ends, token_mask
from xtokmap.torch.logits import Logits, TopK

#: What may be had of a server's rows, from the most to the least, and what is lost with each.
ROWS = {
    "hidden": "hidden states, from which whole rows are made here: exact",
    "sums": "sums over sets of tokens: cover is exact, and no loss sees whole rows",
    "top": "the likeliest tokens of each row: what they leave out is lost (`missing`)",
    "none": "logprobs of the sampled tokens alone: nothing is known of what else could stand there",
}

Found = TypeVar("Found")

#: Asks about some ids, and looks at the answer beside the server's own logprobs of them, if it gives any.
_Attempt: TypeAlias = "Callable[[list[int], Callable[[], Tensor | None]], None]"


class ServerTeacher(Prompted):
    """A causal language model behind HTTP that scores token ids: vLLM, SGLang, or whatever speaks their protocols.

    Its tokenizer is here, its weights are not. How much of its rows can be had depends on the server (`ROWS`): with
    hidden states everything works as with a teacher that is here.

    Args:
        url: of the server, `http://host:port`.
        tokenizer: the served model's own.
        rows: names of `ROWS`, one or several, the best first: the self-test takes the first that can be had.
        head: the model's output head, or what reads it, for hidden states.
        states_url: of the server that gives hidden states, where that is another one (vLLM's pooling runner).
        protocol: `vllm`, `sglang`, `openai`, or `auto`, which finds out.
        model: the name under which the server has the model; empty: the only one that it has.
        topk: likeliest tokens of every row to ask for, with `rows="top"`.
        plain_template: the prompt format where the tokenizer has no chat template; must contain `{prompt}`.
        device: of the scores.
        options: of `xtokmap.teachers.client.Client`: concurrency, timeout, retries, patience, key, pause.

    Attributes:
        rows: what is had of the server's rows; empty where the self-test is to find out.
        refused: why what would be better is not had, by name.
        bytes_per_token: of hidden states, over the wire; 0: none.

    Raises:
        XTokMapError: a URL, protocol or rows that cannot be.
    """

    def __init__(
        self,
        url: str,
        tokenizer: Any,
        *,
        rows: str | Sequence[str] = "top",
        head: Head | Callable[[], Head] | None = None,
        states_url: str = "",
        protocol: str = "auto",
        model: str = "",
        topk: int = 20,
        plain_template: str = PLAIN_TEMPLATE,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, plain_template)
        self.topk, self.device = topk, torch.device(device)
        self.ways = (rows,) if isinstance(rows, str) else tuple(rows)
        for name in self.ways:
            if name not in ROWS:
                raise XTokMapError(f"rows={name!r}: use one or several of {', '.join(ROWS)}")
        self.rows = self.ways[0] if self.ways in (("top",), ("none",)) else ""
        self.head, self._source = head, SOURCES[0]
        self.refused: dict[str, str] = {}
        self.bytes_per_token = 0
        self._table = byte_table(tokenizer)
        # Many models have some more rows than their tokenizers have tokens, in round numbers; a server may show them.
        size = len(self._table) + len(self._table) // 32
        self.client = Client(url, protocol=protocol, model=model, spell=self._spell, vocab_size=size, **options)
        self.states_client = Client(states_url, **options) if states_url else self.client

    def __repr__(self) -> str:
        return f"ServerTeacher({self.client!r}, rows={self.rows or self.ways!r}, topk={self.topk})"

    @property
    def clients(self) -> list[Client]:
        """Of the one server, or of the two."""
        return [self.client] if self.states_client is self.client else [self.client, self.states_client]

    @property
    def known(self) -> list[float]:
        """Logprobs of the self-test's text, by which its model is known again; empty: nobody has asked."""
        found = (self.states_client if self.rows == "hidden" else self.client).known
        return [] if found is None else [max(float(x), -1e4) for x in found]

    def _spell(self, token: int) -> bytes | None:
        return self._table[token] if token < len(self._table) else None

    def self_test(self) -> str | None:
        """Whether the server can be believed, from a known text, and how much of its rows it gives.

        See `xtokmap.teachers.client.self_test`; hidden states must give the server's own logprobs (`states.verified`).
        A server that has nothing but hidden states is believed where they make the text likely.

        Returns:
            None, or what could not be told, and why.

        Raises:
            TeacherError: it does not answer, must not be a teacher, or gives nothing of what `rows` names.
        """
        text = self.tokenizer(_KNOWN_TEXT).input_ids[:32]
        ids = [*self.render(["?"])[0][:8], *text]
        topk = self.topk if self.ways == ("top",) else 0
        try:
            self.client.connect(ids[:8], topk)
        except TeacherUnreachableError:
            raise
        except TeacherError as error:
            if "hidden" not in self.ways or self.states_client is not self.client:
                raise
            self._settle(("hidden",), ids, lambda: None, silent=str(error))
            return "it gives hidden states alone, and all that was seen is that they make a known text likely"
        if self.client.max_length:
            ids = ids[: max(2, self.client.max_length - self.client.spare)]
        others = [token for token in dict.fromkeys(text) if token != ids[len(ids) // 2]][:4]
        unknown = self_test(self.client, ids, others, topk=topk, spell=self._spell)
        if self.ways not in (("top",), ("none",)):
            self._settle(self.ways, ids, lambda: torch.from_numpy(self.client.score([ids])[0].logprobs))
        return unknown

    def _settle(self, ways: Sequence[str], ids: list[int], own: Callable[[], Tensor | None], silent: str = "") -> None:
        """Takes the first of these ways that the server has and that gives its own logprobs of some ids."""
        tried: dict[str, _Attempt] = {
            "hidden": self._try_hidden,
            "sums": self._try_sums,
            "top": self._try_top,
            "none": lambda ids, own: None,
        }
        self.refused = {}
        for way in ways:
            if (refusal := self._refusal(tried[way], ids, own)) is None:
                self.rows = way
                return
            self.refused[way] = refusal
        reasons = "; ".join(f"{way}: {why}" for way, why in self.refused.items())
        raise TeacherError(f"{self.client.url}: gives no rows that could be used: {reasons}{silent and f'; {silent}'}")

    def _refusal(self, attempt: _Attempt, ids: list[int], own: Callable[[], Tensor | None]) -> str | None:
        try:
            attempt(ids, own)
        except OtherTeacherError:
            raise
        except XTokMapError as error:
            return str(error).removeprefix(self.client.url)
        return None

    def _try_hidden(self, ids: list[int], own: Callable[[], Tensor | None]) -> None:
        client, refusals = self.states_client, []
        client.name_model(optional=True)
        whole = ids
        for source in SOURCES:
            ids = whole[: max(2, client.max_length - source.spare) if client.max_length else None]
            asked = source.question(ids, 1, client.model, None)
            try:
                [states] = client.ask([asked])
            except TeacherError as error:
                refusals.append(f"{source.name}: {str(error).removeprefix(client.url)}")
                continue
            break
        else:
            raise TeacherError(f"there are none: {'; '.join(refusals)}")
        if self.head is None:
            raise TeacherError("it gives them, and there is no output head here to make rows of them")
        head = self.head if isinstance(self.head, Head) else self.head()
        if states.shape[1] != head.width:
            raise TeacherError(f"they have {states.shape[1]} numbers, the output head takes {head.width}")
        logprobs = own()
        head = verified(head, states, ids, None if logprobs is None else logprobs[: len(ids)])
        client.remember(asked, states, lambda states: logprobs_of(head, ids, states))
        self.head, self._source = head, source
        self.bytes_per_token = source.size(states)

    def _try_sums(self, ids: list[int], own: Callable[[], Tensor | None]) -> None:
        order = sums.byte_order(self._table)
        n, half = len(ids) - 1, len(order) // 2
        # Of every row the token that is there, and two halves of the vocabulary.
        terms = sums.Terms(
            np.repeat(np.arange(n, dtype=np.int32), 3),
            np.stack([-1 - np.array(ids[1:]), np.zeros(n), np.ones(n)], 1).reshape(-1).astype(np.int32),
            np.array([0, 1, 2], np.int32),
            np.array([[0, half], [half, len(order)]], np.int32),
            np.array([True, False]),
        )
        asked = sums.question(ids, 1, terms, sums.digest(order), self.client.model)
        [(logprobs, masses)] = self.client.ask([asked])
        want = own()
        assert want is not None
        single, one, other = masses.view(n, 3).unbind(1)
        whole = (one.exp() + other.exp() - 1).abs().max()
        apart = max(float((x - want[1:]).nan_to_num().abs().mean()) for x in (logprobs, single))
        if not float(whole) < 1e-3 or not apart < _SUMS_APART:
            raise TeacherError(
                f"the sums over two halves of the vocabulary are off 1 by up to {whole:.3g}, the logprobs {apart:.3g} "
                "nats from its own, in the mean"
            )

    def _try_top(self, ids: list[int], own: Callable[[], Tensor | None]) -> None:
        if not self.topk:
            raise XTokMapError("queries need rows: set topk, or take a credit of logprobs alone, as 'prior'")
        self.client.score([ids], self.topk)

    def too_long(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> tuple[list[int], str]:
        """Which rows are longer than the server takes, as far as it has said how long they may be; and what to do."""
        client = self.states_client if self.rows == "hidden" else self.client
        longest, spare = client.max_length, client.spare
        # Of the likeliest tokens one more, which makes a row of what follows.
        more = {"hidden": self._source.spare, "sums": 0, "top": spare + (self.topk > 0)}
        room = longest - more.get(self.rows, spare)
        rows = [
            b for b, (p, c) in enumerate(zip(prompt_ids, completion_ids, strict=True)) if c and len(p) + len(c) > room
        ]
        why = (
            f"with their prompts they have more than {room} of the teacher's tokens (the server's max_model_len is "
            f"{longest}); start it with a larger --max-model-len, or lower max_new_tokens or max_prompt_tokens"
        )
        return (rows, why) if longest else ([], "")

    def score(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        *,
        queries: CoverQueries | None = None,
        transferred: bool | None = None,
        keep: bool = False,
    ) -> Scores:
        """Logprobs of the completions' tokens, as `LocalTeacher.score`.

        With `rows="top"` queries are evaluated from the top k of every row and the token that is there (`TopK`): mass
        that these do not show counts as none, except where all of a row but some tokens is asked for.

        Args:
            prompt_ids: B rows, each of at least one id.
            completion_ids: B rows.
            queries: of the batch in which these completions were aligned, from `Aligner.cover_queries`.
            transferred: whether to evaluate them. None: where there are queries.
            keep: whether to keep what is had of the rows: all of them from hidden states, else the top k.

        Raises:
            RowRefusedError: the server does not take some of the rows.
            TeacherError: it gives no answer that can be used for one of them.
            XTokMapError: more is asked than `rows` has, and what `LocalTeacher.score` names.
        """
        check_pairs(prompt_ids, completion_ids)
        if transferred is False:
            queries = None
        check_queries(queries, completion_ids, transferred is True)
        if not self.rows:
            self.self_test()
        if self.rows == "hidden":
            return scores_of(self._hidden(prompt_ids, completion_ids), completion_ids, queries, keep=keep)
        asked = keep or queries is not None
        if asked and (self.rows == "none" or (self.rows == "top" and not self.topk)):
            raise XTokMapError("queries need rows: set topk, or take a credit of logprobs alone, as 'prior'")
        if asked and keep and self.rows == "sums":
            raise XTokMapError("keep=True: sums over sets of tokens are no rows; take the credit 'cover'")
        if queries is not None and self.rows == "sums":
            return self._summed(prompt_ids, completion_ids, queries)
        # One more token, so that there is a row after the last one. Which does not matter: it is among that row's.
        after = [self.stop_id or 0] if asked else []
        rows = [[*p, *c, *after] for p, c in zip(prompt_ids, completion_ids, strict=True)]
        top = self.topk if asked else 0
        answers = _asked(completion_ids, lambda wanted: self.client.score([rows[b] for b in wanted], top))
        mask = token_mask(completion_ids, torch.device("cpu"))
        logprobs = torch.zeros(mask.shape)
        for b, answer in answers.items():
            first, n = len(prompt_ids[b]), len(completion_ids[b])
            logprobs[b, :n] = torch.from_numpy(answer.logprobs[first : first + n])
        logprobs, mask = logprobs.to(self.device), mask.to(self.device)
        if not asked:
            return Scores(logprobs, mask)
        flat = _top_rows([(answers.get(b), len(row)) for b, row in enumerate(prompt_ids)]).to(self.device)
        first_row = torch.from_numpy(row_ends(completion_ids)[:-1] + np.arange(len(completion_ids))).to(self.device)
        shown = flat.at(torch.where(mask, first_row[:, None] + torch.arange(mask.shape[1], device=self.device), -1))
        shown = replace(shown, ids=torch.where(mask[..., None], shown.ids, -1))
        missing = 1 - torch.where(shown.ids < 0, -torch.inf, shown.logprobs).exp().sum(-1)
        missing = torch.where(mask, missing.clamp(min=0), 0)
        found = None
        if queries is not None:
            part = transfer(flat, flat_ids(completion_ids, self.device), queries)
            found = padded_found(part.transferred.float(), queries)
        return Scores(logprobs, mask, found, top=shown, missing=missing)

    def _hidden(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> Logits:
        """Whole rows, flat `[N + B]`, from hidden states."""
        head, client = self.head, self.states_client
        assert isinstance(head, Head)

        def ask(wanted: list[int]) -> list[Tensor]:
            rows = [([*prompt_ids[b], *completion_ids[b]], len(prompt_ids[b])) for b in wanted]
            return client.ask([self._source.question(*row, client.model, head) for row in rows])

        found = _asked(completion_ids, ask)
        dtype = next((part.dtype for part in found.values()), torch.float32)
        # Of an empty completion nobody looks at the row behind it.
        nothing = torch.zeros(1, head.width, dtype=dtype)
        states = torch.cat([nothing[:0], *(found.get(b, nothing) for b in range(len(completion_ids)))])
        return head.logits(states)

    def _summed(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], queries: CoverQueries
    ) -> Scores:
        """Scores for `cover`, exact, from sums over sets of tokens."""
        order = sums.digest(queries.vocab_map.teacher_order)
        terms = sums.terms_of(queries)

        def ask(wanted: list[int]) -> list[tuple[Tensor, Tensor]]:
            rows = [([*prompt_ids[b], *completion_ids[b]], len(prompt_ids[b]), terms[b]) for b in wanted]
            return self.client.ask([sums.question(*row, order, self.client.model) for row in rows])

        answers = _asked(completion_ids, ask)
        parts = [answers.get(b) or (torch.zeros(0), torch.zeros(len(terms[b].row))) for b in range(len(completion_ids))]
        logprobs, masses = (torch.cat([torch.zeros(0), *(part[k] for part in parts)]) for k in (0, 1))
        found = transfer_masses(logprobs, masses, queries)
        mask = token_mask(completion_ids, torch.device("cpu"))
        padded = torch.zeros(mask.shape).masked_scatter(mask, logprobs)
        transferred = padded_found(found.transferred.float(), queries).to(self.device)
        return Scores(padded.to(self.device), mask.to(self.device), transferred)


#: Nats that a server's sums may be from its logprobs, in the mean: two passes of it in bfloat16, other batches.
_SUMS_APART = 0.15

#: What the self-test asks about: letters, digits, other scripts.
_KNOWN_TEXT = "The quick brown fox jumps over 13 lazy dogs, und 7 schöne Grüße: the sky is blue, the grass is green."


def _asked(completions: Sequence[Sequence[int]], ask: Callable[[list[int]], list[Found]]) -> dict[int, Found]:
    """What is found of every completion that is not empty; nothing is asked about the others.

    Raises:
        RowRefusedError: the server does not take some of them, by their numbers among all.
    """
    wanted = [b for b, row in enumerate(completions) if row]
    try:
        return dict(zip(wanted, ask(wanted), strict=True))
    except RowRefusedError as error:
        error.rows = [wanted[b] for b in error.rows]
        raise


def _top_rows(answers: Sequence[tuple[Answer | None, int]]) -> TopK:
    """The rows of completions, each from the one after its prompt on, flat; a row of nothing for an empty one."""
    width = max((answer.top_ids.shape[1] for answer, _ in answers if answer is not None), default=1)
    ids, logprobs = [np.zeros((0, width), np.int64)], [np.zeros((0, width), np.float32)]
    for answer, p in answers:
        own = np.zeros((1, 0)) if answer is None else answer.top_ids[p:]
        more = ((0, 0), (0, width - own.shape[1]))
        ids.append(np.pad(own, more, constant_values=-1).astype(np.int64))
        logprobs.append(np.pad(own[:, :0] if answer is None else answer.top_logprobs[p:], more).astype(np.float32))
    return TopK(torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(logprobs)))

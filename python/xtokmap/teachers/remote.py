"""ServerTeacher: a causal language model behind HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from xtokmap._core import XTokMapError
from xtokmap.boundary.cover import CoverQueries
from xtokmap.chat import PLAIN_TEMPLATE
from xtokmap.losses.queries import transfer
from xtokmap.teachers.client import Answer, Client, RowRefusedError, self_test
from xtokmap.teachers.scores import Prompted, Scores, check_queries, padded_found
from xtokmap.tokenizers import byte_table
from xtokmap.torch.completions import check_pairs, flat_ids, row_ends, token_mask
from xtokmap.torch.logits import TopK


class ServerTeacher(Prompted):
    """A causal language model behind HTTP that scores token ids: vLLM, SGLang, or whatever speaks their protocols.

    Its tokenizer is here, its weights are not: it gives logprobs and the top k of every row, never whole rows, so that
    the credits of logprobs and `cover` work with it, and losses of whole distributions do not.

    Args:
        url: of the server, `http://host:port`.
        tokenizer: the served model's own.
        protocol: `vllm`, `sglang`, `openai`, or `auto`, which finds out.
        model: the name under which the server has the model; empty: the only one that it has.
        topk: likeliest tokens of every row to ask for where queries are to be answered; 0: none.
        plain_template: the prompt format where the tokenizer has no chat template; must contain `{prompt}`.
        device: of the scores.
        options: of `xtokmap.teachers.client.Client`: concurrency, timeout, retries, key, pause.

    Raises:
        XTokMapError: a URL or protocol that cannot be.
    """

    def __init__(
        self,
        url: str,
        tokenizer: Any,
        *,
        protocol: str = "auto",
        model: str = "",
        topk: int = 20,
        plain_template: str = PLAIN_TEMPLATE,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, plain_template)
        self.topk, self.device = topk, torch.device(device)
        self._table = byte_table(tokenizer)
        # Many models have some more rows than their tokenizers have tokens, in round numbers; a server may show them.
        rows = len(self._table) + len(self._table) // 32
        self.client = Client(url, protocol=protocol, model=model, spell=self._spell, vocab_size=rows, **options)

    def __repr__(self) -> str:
        return f"ServerTeacher({self.client!r}, topk={self.topk})"

    def _spell(self, token: int) -> bytes | None:
        return self._table[token] if token < len(self._table) else None

    def self_test(self) -> str | None:
        """Whether the server can be believed, from a known text; see `xtokmap.teachers.client.self_test`.

        Returns:
            None, or what could not be told, and why.

        Raises:
            TeacherError: it does not answer, or must not be a teacher.
        """
        text = self.tokenizer(_KNOWN_TEXT).input_ids[:32]
        ids = [*self.render(["?"])[0][:8], *text]
        self.client.connect(ids[:8], self.topk)
        if self.client.max_length:
            ids = ids[: max(2, self.client.max_length - 1)]
        others = [token for token in dict.fromkeys(text) if token != ids[len(ids) // 2]][:4]
        return self_test(self.client, ids, others, topk=self.topk, spell=self._spell)

    def too_long(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> tuple[list[int], str]:
        """Which rows are longer than the server takes, as far as it has said how long they may be; and what to do."""
        longest = self.client.max_length
        # Behind the completion, the token that makes a row of what follows it, and the one that is generated.
        room = longest - (2 if self.topk else 1)
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
        top: bool = False,
    ) -> Scores:
        """Logprobs of the completions' tokens, as `LocalTeacher.score`.

        Queries are evaluated from the top k of every row and the token that is there (`TopK`): mass that these do not
        show counts as none, except where all of a row but some tokens is asked for.

        Args:
            prompt_ids: B rows, each of at least one id.
            completion_ids: B rows.
            queries: of the batch in which these completions were aligned, from `Aligner.cover_queries`.
            transferred: whether to evaluate them. None: where there are queries.
            keep: must be False.
            top: whether to ask for the top k without queries, too.

        Raises:
            RowRefusedError: the server does not take some of the rows.
            TeacherError: it gives no answer that can be used for one of them.
            XTokMapError: whole rows are asked for, and what `LocalTeacher.score` names.
        """
        check_pairs(prompt_ids, completion_ids)
        if keep:
            raise XTokMapError(
                "keep=True: a served teacher gives no whole rows; take the credit 'cover' (with top k) or one of "
                "logprobs alone, as 'prior', or load the teacher here (LocalTeacher)"
            )
        if transferred is False:
            queries = None
        check_queries(queries, completion_ids, transferred is True)
        asked = top or queries is not None
        if asked and not self.topk:
            raise XTokMapError("queries need rows: set topk, or take a credit of logprobs alone, as 'prior'")
        # One more token, so that there is a row after the last one. Which does not matter: it is among that row's.
        after = [self.stop_id or 0] if asked else []
        rows = [[*p, *c, *after] for p, c in zip(prompt_ids, completion_ids, strict=True)]
        wanted = [b for b, row in enumerate(completion_ids) if row]
        try:
            found_rows = self.client.score([rows[b] for b in wanted], self.topk if asked else 0)
        except RowRefusedError as error:
            error.rows = [wanted[b] for b in error.rows]
            raise
        answers = dict(zip(wanted, found_rows, strict=True))
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


#: What the self-test asks about: letters, digits, other scripts.
_KNOWN_TEXT = "The quick brown fox jumps over 13 lazy dogs, und 7 schöne Grüße: the sky is blue, the grass is green."


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

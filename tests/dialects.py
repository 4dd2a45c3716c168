"""SGLang's and OpenAI's words for what a model says, for tests of the client: the package's server speaks vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from xtokmap.teachers.answers import Answers, Asked, Route, _nested, _whole
from xtokmap.teachers.scorer import RefusedError, Scored, score_row
from xtokmap.torch.logits import Logits

#: Tokens that SGLang keeps free behind a row.
_FREE = 7


@dataclass(frozen=True, eq=False)
class _Stated:
    """What is said of a row, and the states behind it."""

    scored: Scored
    states: list[list[float]]


class EveryDialect(Answers):
    """Three protocols around the real scorer: vLLM's own words, `echo` with `logprobs`, and `/generate`.

    Attributes:
        gives_states: whether `/generate` gives hidden states.
        piece: tokens of a piece of a prompt; 0: it is whole. The states of the last one are kept.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._routes["/generate"] = Route("POST", self._generate)
        self.gives_states, self.piece = False, 0
        self._cached: set[tuple[int, ...]] = set()

    def _completions(self, body: Any) -> Asked:
        """OpenAI's, where it has `echo` or `logprobs`."""
        if not isinstance(body, dict) or not {"echo", "logprobs"} & body.keys():
            return super()._completions(body)
        echo, logprobs = bool(body.get("echo", False)), self._topk(body, "logprobs")
        asked = super()._completions({name: x for name, x in body.items() if name not in ("echo", "logprobs")})
        new = body.get("max_tokens", 1)

        def answer(found: Sequence[Scored]) -> Any:
            answered = asked.answer(found)
            for choice, row, scored in zip(answered["choices"], asked.rows, found, strict=True):
                choice["text"] = (self._text(row) if echo else "") + choice["text"]
                choice["logprobs"] = None if logprobs is None else self._openai(row, scored, logprobs, echo, new, body)
            return answered

        return Asked(asked.rows, partial(score_row, topk=logprobs or 0), answer)

    def _openai(
        self, row: list[int], scored: Scored, k: int, echo: bool, new: int, body: dict[str, Any]
    ) -> dict[str, Any]:
        as_ids = bool(body.get("return_tokens_as_token_ids", False))

        def spelled(token: int) -> str:
            return f"token_id:{token}" if as_ids else self._text([token])

        # Places of the tokens to speak of; -1 is the first token's, which nothing scores.
        places = [*(range(-1, len(row) - 1) if echo else ()), *([len(row) - 1] if new else ())]
        tokens = [*row, scored.new]
        texts = [spelled(tokens[i + 1]) for i in places]
        offsets = [0]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        tops: list[dict[str, float] | None] = []
        for i in places:
            pairs = zip(scored.top_ids[i][:k], scored.top_logprobs[i][:k], strict=True) if i >= 0 else ()
            top = {spelled(token): max(value, -9999.0) for token, value in pairs}
            tops.append(None if i < 0 else {spelled(tokens[i + 1]): max(scored.logprobs[i], -9999.0), **top})
        return {
            "tokens": texts,
            "token_logprobs": [None if i < 0 else max(scored.logprobs[i], -9999.0) for i in places],
            "top_logprobs": tops,
            "text_offset": offsets[:-1],
        }

    def _generate(self, body: Any) -> Asked:
        """SGLang's `/generate` with `return_logprob`, and `return_hidden_states` of what is not in its cache."""
        if not isinstance(body, dict):
            raise RefusedError(400, "the body must be a JSON object")
        sampling = body.get("sampling_params") or {}
        if not isinstance(sampling, dict):
            raise RefusedError(400, "sampling_params must be a JSON object")
        new = _whole(sampling, "max_new_tokens", 1, 0, 1)
        topk = self._topk(body, "top_logprobs_num") or 0
        texts = bool(body.get("return_text_in_logprobs", False))
        prompt = body.get("input_ids") if body.get("input_ids") is not None else body.get("text")
        rows = self._prompts(prompt, _FREE, name="input_ids")
        wants = bool(body.get("return_hidden_states", False))
        if wants and not self.gives_states:
            raise RefusedError(400, "The server is not configured to return hidden states.")
        first = _whole(body, "logprob_start_len", -1, -1, 2**31)

        def triple(value: float | None, token: int) -> list[Any]:
            return [value if value is None else max(value, -9999.0), token, self._text([token]) if texts else None]

        def meta(row: list[int], stated: _Stated) -> dict[str, Any]:
            scored = stated.scored
            places = range(len(row) if first < 0 else min(first, len(row)), len(row))

            def top(i: int) -> list[Any]:
                return [triple(v, t) for t, v in zip(scored.top_ids[i], scored.top_logprobs[i], strict=True)]

            found: dict[str, Any] = {"prompt_tokens": len(row), "completion_tokens": new}
            if body.get("return_logprob"):
                found["input_token_logprobs"] = [triple(scored.logprobs[i - 1] if i else None, row[i]) for i in places]
                found["output_token_logprobs"] = [triple(scored.logprobs[-1], scored.new)] * new
                if topk:
                    found["input_top_logprobs"] = [top(i - 1) if i else None for i in places]
                    found["output_top_logprobs"] = [top(len(row) - 1)] * new
            # Of what logprobs are asked of nothing is cached, nor of the last token.
            most = min(first if body.get("return_logprob") and first >= 0 else len(row), len(row) - 1)
            cached = max((n for n in range(most + 1) if tuple(row[:n]) in self._cached), default=0)
            self._cached.update(tuple(row[: n + 1]) for n in range(len(row)))
            found["cached_tokens"] = cached
            if wants:
                pieces = len(row) - cached
                kept = (pieces - 1) % self.piece + 1 if self.piece else pieces
                found["hidden_states"] = [stated.states[-kept:]]
            return found

        def answer(found: Sequence[_Stated]) -> Any:
            answers = [
                {"text": self._text([stated.scored.new]) if new else "", "meta_info": meta(row, stated)}
                for row, stated in zip(rows, found, strict=True)
            ]
            return answers if _nested(prompt) else answers[0]

        def read(logits: Logits, ids: list[int]) -> _Stated:
            return _Stated(score_row(logits, ids, topk=topk), logits.rows.tolist() if wants else [])

        return Asked(rows, read, answer)

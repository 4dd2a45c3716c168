"""ServerSampler: the student's samples from a vLLM server that has the student's weights.

    VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT
    xtokmap train --student STUDENT --sampler-url http://HOST:8000 --sampler-folder SHARED ...

Token ids go in; answers come out as ids, with the server's own logprobs of them. After an update the weights are saved
to a folder that both see, the server loads them in place (`reload_weights` over `/collective_rpc`) and forgets what it
has cached, and is told a name for them. That name is asked for before and after every batch: a server that was started
again has other weights, and loads these again before anything of its is used.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from xtokmap._core import XTokMapError
from xtokmap.models import one_line
from xtokmap.teachers.client import BadAnswerError, Client, Question, TeacherError
from xtokmap.torch.completions import batched_logprobs
from xtokmap.train.config import Config

#: Bytes of an answer: for each token, and for everything else.
_ENTRY, _ROOM = 512, 2**18

#: How often a batch is sampled again because the server was started again meanwhile.
_ATTEMPTS = 3

#: Nats that logprobs of server and trainer may differ by in the mean; bfloat16 against float32 is 0.03.
_SAME = 0.1


@dataclass(frozen=True)
class Sampled:
    """B answers.

    Attributes:
        ids: B rows, each up to its first end of turn, included.
        completed: whether that came.
        logprobs: what the server says of every token, at the temperature of the sampling.
        version: of the weights.
    """

    ids: list[list[int]]
    completed: list[bool]
    logprobs: list[list[float]]
    version: int


class ServerSampler:
    """Samples of a model whose weights a vLLM server has.

    Args:
        url: of the server, started with VLLM_SERVER_DEV_MODE=1.
        folder: that the server sees under the same name; for the weights.
        name: of the run, the same in all its processes and no other run's.
        first: whether this process is the one that writes them.
        options: of `teachers.client.Client`: concurrency, timeout, retries, patience.

    Attributes:
        version: of the weights that the server has been given: the updates that are in them; -1: none yet.
    """

    def __init__(self, url: str, folder: Path, name: str, *, first: bool = True, **options: Any) -> None:
        self.client = Client(url, protocol="vllm", role="sampler", **options)
        self.folder, self.name, self.first, self.version = folder, name, first, -1
        self._name, self._weights = "", folder

    def load(self, student: Any, version: int, weights: dict[str, Any] | None = None) -> None:
        """Gives the server the student's weights; by the first process, all others only learn of the version.

        Args:
            student: a transformers model.
            version: how many updates are in them.
            weights: instead of the model's own, where it is parted.

        Raises:
            TeacherError: the server does not load them.
            XTokMapError: they cannot be written.
        """
        self.version, self._name = version, f"{self.name}-{version}"
        self._weights = self.folder.resolve() / f"weights-{version:08d}"
        if not self.first:
            return
        part = self._weights.with_suffix(".part")
        try:
            for path in (part, self._weights):
                shutil.rmtree(path, ignore_errors=True)
            student.save_pretrained(part, state_dict=weights)
            _save_head(student, weights, part)
            os.replace(part, self._weights)
        except (OSError, SafetensorError) as error:
            raise XTokMapError(f"{self._weights}: cannot be written: {one_line(error)}") from error
        self._have_loaded()
        for path in self.folder.glob("weights-*"):
            if path != self._weights:
                shutil.rmtree(path, ignore_errors=True)

    def _have_loaded(self) -> None:
        try:
            self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self._weights)}})
            done = self._post("/reset_prefix_cache", {})
            self._post("/update_weight_version", {"new_version": self._name})
        except TeacherError as error:
            raise TeacherError(
                f"the sampler does not load {self._weights}: {error}; it must see that folder, and be a vLLM that was "
                "started with VLLM_SERVER_DEV_MODE=1"
            ) from error
        if not isinstance(done, dict) or done.get("success") is not True:
            raise TeacherError(f"{self.client.url} keeps what it has cached of other weights: is it used by others?")

    def _post(self, path: str, body: Any) -> Any:
        return self.client.ask([Question(path, json.dumps(body).encode(), _ROOM, lambda found: found)])[0]

    def _there(self) -> str:
        """The name of the weights that the server has."""

        def read(body: Any) -> str:
            name = body.get("weight_version") if isinstance(body, dict) else None
            if not isinstance(name, str):
                raise BadAnswerError("no weight_version in it")
            return name

        return str(self.client.ask([Question("/weight_info", None, _ROOM, read)])[0])

    def _current(self) -> None:
        """Sees to it that the server has the last weights."""
        start = time.monotonic()
        while self._there() != self._name:
            if self.first:
                self._have_loaded()
                return
            if time.monotonic() - start > self.client.timeout:
                raise TeacherError(f"{self.client.url} has other weights than {self._name}")
            time.sleep(0.5)

    def sample(self, prompt_ids: Sequence[Sequence[int]], stops: Sequence[int], config: Config) -> Sampled:
        """Answers as `train.generation.sample` gives them, with the same right to be anything that the policy says.

        Args:
            prompt_ids: B rows, each of at least one id.
            stops: ids that end an answer.
            config: length and temperature.

        Raises:
            TeacherError: the server gives no answer that can be used for one of them.
        """
        if not self.client.model:
            self.client.name_model()
        questions = [self._question(row, stops, config) for row in prompt_ids]
        for _ in range(_ATTEMPTS):
            self._current()
            answers = self.client.ask(questions)
            if self._there() == self._name:
                ids, logprobs = [list(row) for row, _ in answers], [list(row) for _, row in answers]
                return Sampled(ids, [row[-1] in stops for row in ids], logprobs, self.version)
        raise TeacherError(f"{self.client.url} had other weights after each of {_ATTEMPTS} batches than before it")

    def _question(self, prompt: Sequence[int], stops: Sequence[int], config: Config) -> Question:
        longest = self.client.max_length - len(prompt) if self.client.max_length else config.max_new_tokens
        most = min(config.max_new_tokens, longest)
        if most < 1:
            raise TeacherError(f"{self.client.url} takes {self.client.max_length} tokens, a prompt has {len(prompt)}")
        # No seed: a vLLM of a CPU dies of one as soon as it takes a prompt in two pieces.
        body = {
            **{"model": self.client.model, "prompt": list(prompt), "max_tokens": most, "logprobs": 0},
            # What a model's own settings would bring along is left out of the policy, and of what ends an answer.
            **{"temperature": config.temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
            **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True, "stop_token_ids": list(stops)},
            **{"skip_special_tokens": False, "return_token_ids": True, "return_tokens_as_token_ids": True},
        }

        def read(found: Any) -> tuple[list[int], list[float]]:
            choices = found.get("choices") if isinstance(found, dict) else None
            choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
            if not isinstance(choice, dict) or not isinstance(choice.get("logprobs"), dict):
                raise BadAnswerError("not one choice with logprobs in it")
            ids, logprobs = choice.get("token_ids"), choice["logprobs"].get("token_logprobs")
            if not isinstance(ids, list) or not isinstance(logprobs, list) or len(ids) != len(logprobs):
                raise BadAnswerError("token_ids and token_logprobs are not there, or are of other lengths")
            if not 1 <= len(ids) <= most or any(type(i) is not int or not 0 <= i < 2**31 for i in ids):
                raise BadAnswerError(f"{len(ids)} token_ids, or some that are none; at most {most} were asked for")
            if any(type(x) not in (int, float) or not math.isfinite(x) or x > 1e-2 for x in logprobs):
                raise BadAnswerError("token_logprobs that no sampled token can have")
            if any(i in stops for i in ids[:-1]) or (ids[-1] not in stops and len(ids) < most):
                raise BadAnswerError("it ends elsewhere than at the first end of turn")
            return ids, [min(float(x), 0.0) for x in logprobs]

        return Question("/v1/completions", json.dumps(body).encode(), _ROOM + _ENTRY * most, read)

    def self_test(
        self, student: Any, prompt_ids: Sequence[Sequence[int]], stops: Sequence[int], config: Config
    ) -> float:
        """Whether the server samples from these weights, and says so of its samples.

        Args:
            student: whose weights it was given.
            prompt_ids: some prompts.
            stops: ids that end an answer.
            config: of the run.

        Returns:
            How far the logprobs of both are apart: nats, in the mean over the tokens.

        Raises:
            TeacherError: too far.
        """
        found = self.sample(prompt_ids, stops, config)
        theirs = [x for row in found.logprobs for x in row]

        def apart(temperature: float) -> float:
            own = batched_logprobs(student, prompt_ids, found.ids, config.micro_batch, temperature=temperature)
            flat = torch.cat([row[: len(ids)] for row, ids in zip(own.cpu(), found.ids, strict=True)])
            return float((flat - torch.tensor(theirs)).abs().mean())

        gap = apart(config.temperature)
        if gap <= _SAME:
            return gap
        if config.temperature != 1 and apart(1.0) <= _SAME:
            raise TeacherError(
                f"{self.client.url} gives logprobs of temperature 1 with samples of temperature "
                f"{config.temperature:g}; start it with --logprobs-mode processed_logprobs"
            )
        raise TeacherError(
            f"{self.client.url}: its logprobs of its own samples are {gap:.2g} nats from the student's, in the mean: "
            "does it have another model, a quantized one, or an adapter of its own?"
        )


def _save_head(student: Any, weights: dict[str, Any] | None, folder: Path) -> None:
    """An output head that is the embedding again, as a tensor of its own, for servers that do not tie them.

    A vLLM of a CPU must not: the packed copy that it makes of a tied head stays what it was.
    """
    head, embedding = student.get_output_embeddings(), student.get_input_embeddings()
    if head is None or head.weight is not embedding.weight or (folder / "model.safetensors.index.json").exists():
        return
    name = next(name for name, module in student.named_modules() if module is head)
    weight = head.weight if weights is None else weights[f"{name}.weight"]
    save_file({f"{name}.weight": weight.detach().cpu().contiguous()}, folder / "head.safetensors")


def padded(rows: Sequence[Sequence[float]], like: torch.Tensor) -> torch.Tensor:
    """Values of the answers' tokens, float32, as wide as a mask and 0 on padding."""
    out = torch.zeros(like.shape)
    for b, row in enumerate(rows):
        out[b, : len(row)] = torch.tensor(row)
    return out.to(like.device)

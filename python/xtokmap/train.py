"""On-policy distillation across tokenizers: a `Config`, and one loop that reads from top to bottom.

A step samples answers from the student, retokenises their text for the teacher, asks the teacher what it thinks of
them, aligns the two, and makes an update: by default of the divergence from the teacher's whole distribution as the
student's vocabulary sees it (`losses.transfer_kl`); or, as in arXiv 2606.09456, of a policy gradient.
Different from a textbook PPO loop: there is no value function and no reward model; the advantage of a token is the
teacher's logprob, handed over by `losses.chunk_credit`, minus the student's own.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from xtokmap._core import XTokMapError
from xtokmap.alignment import Aligner, Kind
from xtokmap.losses import CREDITS, byte_kl, chunk_credit, chunk_gap, policy_loss, transfer_kl
from xtokmap.teacher import (
    PLAIN_TEMPLATE,
    LocalTeacher,
    Scores,
    batched_logprobs,
    by_length,
    completion_rows,
    padded_logprobs,
    padded_places,
    render,
)
from xtokmap.torch import ChunkIndex, Logits, VocabTensors, coverage_counts

#: Losses of whole distributions: they need a teacher that gives whole rows.
_WHOLE = ("transfer_kl", "byte_kl")


def _doc(default: Any, text: str) -> Any:
    return field(default=default, metadata={"doc": text})


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. The command line has a flag for every field.

    Raises:
        XTokMapError: a value that no run can use, by name.
    """

    student: str = _doc("", "the model to train: a directory, a .gguf file, or a hub id")
    teacher: str = _doc("", "the model to learn from, of any family: a directory, a .gguf file, or a hub id")
    prompts: str = _doc("", "prompts: .jsonl with a field `prompt` (and `split`: train, heldout) or .txt, one a line")
    output: str = _doc("runs/opd", "folder for the student, metrics.jsonl, config.json and curves.png")
    steps: int = _doc(100, "updates of the student's samples")
    batch_size: int = _doc(32, "prompts a step, one sample each (the paper: 128)")
    max_prompt_tokens: int = _doc(1024, "longer prompts are left out, with a warning (the paper: 1024)")
    max_new_tokens: int = _doc(256, "longest response, in student tokens (the paper: 16384)")
    temperature: float = _doc(1.0, "of the student's samples (the paper: 1, top-p 1)")
    updates: int = _doc(1, "optimizer steps on each batch of samples (the paper: 1)")
    micro_batch: int = _doc(8, "samples in one forward pass; changes memory and speed, not the result")
    learning_rate: float = _doc(1e-6, "AdamW's (the paper: 1e-6)")
    warmup_steps: int = _doc(10, "steps over which the learning rate rises to its value (the paper: 10)")
    weight_decay: float = _doc(0.01, "AdamW's (the paper: 0.01)")
    grad_clip: float = _doc(1.0, "largest gradient norm (the paper: 1)")
    loss: str = _doc(
        "auto",
        "auto (transfer_kl), transfer_kl, byte_kl, or a policy gradient from the sampled tokens alone with the credit "
        + ", ".join(CREDITS)
        + " (the paper: prior)",
    )
    beta: float = _doc(1.0, "of transfer_kl and byte_kl: 1 reverse KL, 0 forward, between them Jensen-Shannon")
    clamp: float = _doc(10.0, "largest absolute advantage (the paper: 10)")
    max_chunk_tokens: int = _doc(6, "chunks with more tokens on a side are unscored, 0: no limit (the paper: 6)")
    score_stop: bool = _doc(True, "score ends of turns, and measure them; a base teacher does not know when to stop")
    clip_low: float = _doc(0.2, "PPO's lower clip (the paper: 0.2)")
    clip_high: float = _doc(0.28, "PPO's upper clip (the paper: 0.28)")
    clip_dual: float = _doc(10.0, "PPO's dual clip (the paper: 10)")
    aggregate: str = _doc("response", "mean of the loss over `response` tokens (the paper) or `scored` tokens")
    plain_template: str = _doc(PLAIN_TEMPLATE, "prompt format for a model without a chat template")
    eval_samples: int = _doc(1, "samples for each held-out prompt, before and after; 0: no evaluation")
    seed: int = _doc(0, "of samples and shuffling")
    device: str = _doc("auto", "auto (cuda, mps, cpu), or a torch device")
    dtype: str = _doc(
        "auto", "auto (bfloat16 on cuda, float32 elsewhere), float32, bfloat16 or float16; updates are float32"
    )

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_new_tokens", "updates", "micro_batch", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise XTokMapError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("temperature", "learning_rate", "grad_clip", "clamp"):
            if not 0 < getattr(self, name) < math.inf:
                raise XTokMapError(f"{name}={getattr(self, name)}: must be positive and finite")
        for name in ("warmup_steps", "weight_decay", "max_chunk_tokens", "eval_samples", "clip_low", "clip_high"):
            if not 0 <= getattr(self, name) < math.inf:
                raise XTokMapError(f"{name}={getattr(self, name)}: must be finite and not negative")
        if not 1 < self.clip_dual < math.inf:
            raise XTokMapError(f"clip_dual={self.clip_dual}: must be more than 1 and finite")
        if not -(2**63) <= self.seed < 2**63:
            raise XTokMapError(f"seed={self.seed}: must fit into 64 bits")
        if self.loss not in ("auto", *_WHOLE, *CREDITS):
            raise XTokMapError(f"loss={self.loss!r}: use one of auto, {', '.join((*_WHOLE, *CREDITS))}")
        if not 0 <= self.beta <= 1:
            raise XTokMapError(f"beta={self.beta}: must lie between 0 and 1")
        if self.aggregate not in ("response", "scored"):
            raise XTokMapError(f"aggregate={self.aggregate!r}: use 'response' or 'scored'")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise XTokMapError(f"dtype={self.dtype!r}: use auto, float32, bfloat16 or float16")
        if "{prompt}" not in self.plain_template:
            raise XTokMapError(f"plain_template={self.plain_template!r} must contain {{prompt}}")

    @property
    def rule(self) -> str:
        """The loss that `auto` stands for with a teacher in this process: it gives whole rows."""
        return "transfer_kl" if self.loss == "auto" else self.loss


# ---- models and prompts ------------------------------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """`auto`: CUDA, then MPS, then CPU.

    Raises:
        XTokMapError: no such device here.
    """
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise XTokMapError(f"device={name!r}: {_one_line(error)}") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load(source: str, device: torch.device, dtype: str = "auto") -> tuple[Any, Any]:
    """A causal language model and its tokenizer, from a directory, a .gguf file (needs `gguf`) or a hub id.

    Raises:
        XTokMapError: nothing is there, or transformers cannot read it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = torch.bfloat16 if dtype == "auto" and device.type == "cuda" else torch.float32
    kind = kind if dtype == "auto" else getattr(torch, dtype)
    path, kwargs = Path(source), {}
    if source.endswith(".gguf"):
        source, kwargs = str(path.parent), {"gguf_file": path.name}
    if (kwargs or source.startswith((".", "/", "~"))) and not path.exists():
        raise XTokMapError(f"{path}: no such model; pass a directory, a .gguf file or a hub id")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=kind, **kwargs)
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        raise XTokMapError(
            f"{path}: transformers cannot load it as a causal language model: {_one_line(error)}"
        ) from error
    if kwargs:
        # The weights are plain tensors now; without this they could not be saved.
        with suppress(AttributeError):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    return model.to(device), tokenizer


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_prompts(path: str | Path) -> tuple[list[str], list[str]]:
    """Training and held-out prompts of a .jsonl file (`prompt`, optional `split`) or of a .txt file, one a line.

    Raises:
        XTokMapError: no such file, no prompt in it, or a line that cannot be used, by number.
    """
    path = Path(path)
    if not path.is_file():
        raise XTokMapError(f"{path}: no such prompt file; give a .jsonl or .txt file")
    train: list[str] = []
    heldout: list[str] = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise XTokMapError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    # Not splitlines(), which also parts at U+2028 and its like: they may stand inside a prompt.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            train.append(line)
            continue
        try:
            row = json.loads(line)
            prompt, split = row["prompt"], row.get("split", "train")
        except (ValueError, TypeError, KeyError, AttributeError):
            raise XTokMapError(f'{path}, line {number}: expected an object with "prompt", got {line[:80]!r}') from None
        if not isinstance(prompt, str) or split not in ("train", "heldout"):
            raise XTokMapError(
                f"{path}, line {number}: prompt must be a string and split train or heldout, got {line[:80]!r}"
            )
        (train if split == "train" else heldout).append(prompt)
    if not train:
        raise XTokMapError(f"{path}: no training prompt in it")
    return train, heldout


# ---- one step's parts --------------------------------------------------------------------------------------------


@dataclass
class Rollouts:
    """Samples of the student, and the teacher's view of them; B rows."""

    prompts: list[str]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    completed: list[bool]
    teacher_ids: list[list[int]]
    teacher: Scores
    index: ChunkIndex
    seconds: dict[str, float]

    @property
    def lengths(self) -> list[int]:
        """Student tokens of every completion, its end of turn included."""
        return [len(row) for row in self.completion_ids]


class Roller:
    """Samples from the student and has the teacher score the samples."""

    def __init__(self, student: Any, tokenizer: Any, teacher: LocalTeacher, config: Config) -> None:
        self.student, self.tokenizer, self.teacher, self.config = student, tokenizer, teacher, config
        self.aligner = Aligner(tokenizer, teacher.tokenizer)
        self.device = next(student.parameters()).device
        if not self.aligner.student.stop_ids:
            raise XTokMapError("the student's tokenizer has no end-of-turn token: set its eos_token")

    @cached_property
    def vocab_tensors(self) -> VocabTensors:
        """The two vocabularies' map, on the device."""
        return self.aligner.vocab_map.torch(self.device)

    @torch.no_grad()
    def sample(self, prompts: Sequence[str]) -> tuple[list[list[int]], list[list[int]], list[bool]]:
        """Prompt ids, completion ids (up to the first end of turn, included) and whether that came."""
        from transformers import GenerationConfig

        stops = self.aligner.student.stop_ids
        prompt_ids = render(self.tokenizer, prompts, self.config.plain_template)
        width = max(map(len, prompt_ids))
        pad = stops[0]
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompt_ids], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompt_ids], device=self.device)
        how = GenerationConfig(
            max_new_tokens=self.config.max_new_tokens,
            do_sample=True,
            temperature=self.config.temperature,
            top_k=0,
            top_p=1.0,
            eos_token_id=list(stops),
            pad_token_id=pad,
        )
        self.student.eval()
        with _only(self.student, how):
            out = self.student.generate(input_ids=ids, attention_mask=mask, generation_config=how)
        completions, completed = [], []
        for row in out[:, width:].tolist():
            end = next((i for i, token in enumerate(row) if token in stops), None)
            completions.append(row if end is None else row[: end + 1])
            completed.append(end is not None)
        return prompt_ids, completions, completed

    def roll(self, prompts: Sequence[str]) -> Rollouts:
        """One batch: sampled, retokenised, scored by the teacher, aligned."""
        clock = _Clock(self.device)
        with clock("sample"):
            prompt_ids, completions, completed = self.sample(prompts)
        with clock("retokenise"):
            teacher_ids = self.aligner.teacher_ids(completions, stop_id=self.teacher.stop_id)
            teacher_prompts = self.teacher.render(prompts)
        with clock("align"):
            batch = self.aligner.align_batch(completions, teacher_ids)
            index = ChunkIndex.from_alignment(batch, self.device)
            queries = self.aligner.cover_queries(batch) if self.config.rule in ("cover", "transfer_kl") else None
        with clock("teacher"):
            rows = [row.tolist() for row in teacher_ids]
            whole = self.config.rule in _WHOLE
            scores = self.teacher.score(teacher_prompts, rows, queries=queries, keep=whole)
        return Rollouts(list(prompts), prompt_ids, completions, completed, rows, scores, index, clock.seconds)

    def rows(self, rollouts: Rollouts, rows: list[int]) -> Logits:
        """The student's logits that score some rows' tokens, flat; with a gradient where grad is enabled."""
        return completion_rows(
            self.student,
            [rollouts.prompt_ids[b] for b in rows],
            [rollouts.completion_ids[b] for b in rows],
            temperature=self.config.temperature,
        )

    def all_logprobs(self, rollouts: Rollouts) -> Tensor:
        """The student's logprobs of all rows, float32 `[B, Ts]`, without a gradient."""
        return batched_logprobs(
            self.student,
            rollouts.prompt_ids,
            rollouts.completion_ids,
            self.config.micro_batch,
            temperature=self.config.temperature,
        )


@contextmanager
def _only(model: Any, how: Any) -> Iterator[None]:
    """Samples of the policy itself: what `how` leaves open, `generate` would take from the model (a penalty, min_p)."""
    own, model.generation_config = model.generation_config, how
    try:
        yield
    finally:
        model.generation_config = own


def float32_parameters(model: Any) -> list[torch.nn.Parameter]:
    """What to optimise: the model's own parameters where they are float32, else a float32 copy of each.

    A step of 1e-6 is less than half the distance to the next bfloat16 number for nearly every weight of a trained model
    (SmolLM2 135M: 99.6 %), so that an optimizer on bfloat16 weights would leave them where they are. Gradients of
    micro-batches are summed in float32, too. `write_back` brings the copies' values into the model.
    """
    copies = []
    for own in model.parameters():
        if not own.requires_grad or own.dtype == torch.float32:
            copies += [own] if own.requires_grad else []
            continue
        copy = torch.nn.Parameter(own.detach().float())
        copy.xtokmap_own = own  # type: ignore[attr-defined]
        copies.append(copy)

        def hand_over(own: Tensor, copy: Tensor = copy) -> None:
            assert own.grad is not None
            copy.grad = own.grad.float() if copy.grad is None else copy.grad.add_(own.grad)
            own.grad = None

        own.register_post_accumulate_grad_hook(hand_over)
    return copies


@torch.no_grad()
def write_back(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """After a step: the optimizer's float32 copies, rounded, into the model that they are copies of."""
    for group in optimizer.param_groups:
        for copy in group["params"]:
            if (own := getattr(copy, "xtokmap_own", None)) is not None:
                own.copy_(copy)


def update(roller: Roller, rollouts: Rollouts, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """One or more optimizer steps on a batch; gradients of micro-batches add up to the whole batch's.

    Returns:
        Per-row sums of nats and bytes of the gap to the teacher, counts, and the gradient norm, all of the policy that
        sampled.
    """
    config, student, index = roller.config, roller.student, rollouts.index
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    teacher = rollouts.teacher.logprobs.to(roller.device)
    width = index.student_chunk.shape[1]
    response = torch.arange(width) < torch.tensor(rollouts.lengths)[:, None]
    response = response.to(roller.device)
    loss_of = _whole_loss if config.rule in _WHOLE else _policy_loss

    scored = _but_stops(response & (index.to_student((index.teacher_count > 0).long()) > 0), index, config)
    if config.rule == "strict":
        scored &= index.strict_teacher_pos() >= 0
    denominator = response.sum() if config.aggregate == "response" else scored.sum().clamp(min=1)

    student.eval()  # no dropout: what is updated is the policy that sampled
    old_logprobs = roller.all_logprobs(rollouts) if config.updates > 1 else None

    nats = torch.zeros(len(rollouts.prompts), device=roller.device)
    nbytes = torch.zeros(len(rollouts.prompts), dtype=torch.long, device=roller.device)
    figures: dict[str, Tensor] = {}
    skipped = 0
    for turn in range(config.updates):
        loss_sum = torch.zeros((), device=roller.device)
        for rows in by_length(rollouts.prompt_ids, rollouts.completion_ids, config.micro_batch):
            at = torch.tensor(rows, device=roller.device)
            flat = roller.rows(rollouts, rows)
            loss, own, found = loss_of(roller, rollouts, rows, flat, old_logprobs, response[at], denominator)
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum = loss_sum + loss.detach()
            if turn == 0:
                nats[at], nbytes[at] = chunk_gap(own, teacher[at], index.rows(at), stops=config.score_stop)
                for name, value in found.items():
                    figures[name] = figures.get(name, 0) + value
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        # The step's only question to the device.
        if bool(torch.isfinite(norm) & torch.isfinite(loss_sum)):
            optimizer.step()
        else:
            skipped += 1
            warnings.warn("the loss or the gradient is not finite: this update was skipped", stacklevel=2)
        optimizer.zero_grad(set_to_none=True)
    counts = {"nats": nats, "bytes": nbytes, "loss": loss_sum, "grad_norm": norm, "skipped": skipped}
    return {**counts, "figures": figures}


#: A loss over some rows of a batch, the policy's own logprobs of their tokens, and sums over tokens to report.
_Part: TypeAlias = "tuple[Tensor, Tensor, dict[str, Tensor]]"


def _policy_loss(
    roller: Roller,
    rollouts: Rollouts,
    rows: list[int],
    flat: Logits,
    old_logprobs: Tensor | None,
    response: Tensor,
    denominator: Tensor,
) -> _Part:
    """The policy gradient: the teacher's logprobs of sampled tokens as advantages."""
    config, device = roller.config, roller.device
    at = torch.tensor(rows, device=device)
    index, teacher = rollouts.index.rows(at), rollouts.teacher
    logprobs = padded_logprobs(flat, [rollouts.completion_ids[b] for b in rows], response.shape[1])
    old = logprobs.detach() if old_logprobs is None else old_logprobs[at]
    given = chunk_credit(
        old,
        teacher.logprobs.to(device)[at],
        index,
        config.rule,  # type: ignore[arg-type]
        None if teacher.transferred is None else teacher.transferred.to(device)[at],
        config.clamp,
        max_chunk_tokens=config.max_chunk_tokens or None,
    )
    scored = _but_stops(given.scored & response, index, config)
    loss = policy_loss(
        logprobs,
        old,
        given.advantages,
        response,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        clip_dual=config.clip_dual,
        scored=scored,
        denominator=denominator,
    )
    names = ("clamped", "fallback", "nonfinite")
    sums = {name: (getattr(given, name) & response).sum() for name in names}
    return loss, old, {"scored": scored.sum(), **sums}


def _whole_loss(
    roller: Roller,
    rollouts: Rollouts,
    rows: list[int],
    flat: Logits,
    old_logprobs: Tensor | None,
    response: Tensor,
    denominator: Tensor,
) -> _Part:
    """A divergence between the student's and the teacher's whole distributions."""
    config, device, teacher = roller.config, roller.device, rollouts.teacher
    completions = [rollouts.completion_ids[b] for b in rows]
    width = response.shape[1]
    own = padded_logprobs(flat.detach(), completions, width)
    at = torch.tensor(rows, device=device)
    places = padded_places(completions, width).to(device)
    student = flat.at(_inverse(places, (len(rows), width)))
    common: Any = {"beta": config.beta, "mask": response, "denominator": denominator}
    if config.rule == "transfer_kl":
        assert teacher.target is not None
        assert teacher.transferred is not None
        ids = torch.zeros_like(response, dtype=torch.long).view(-1)
        ids[places] = torch.tensor([i for row in completions for i in row], device=device)
        loss = transfer_kl(
            student,
            teacher.target.select(rows),
            rollouts.index.rows(at),
            student_ids=ids.view(len(rows), width),
            transferred=teacher.transferred[at],
            clamp=config.clamp,
            stops=config.score_stop,
            **common,
        )
        names: tuple[str, ...] = ("undetermined", "rest", "shared")
    else:
        assert teacher.rows is not None
        teacher_ids = [rollouts.teacher_ids[b] for b in rows]
        # Aligned again, as wide as the batch: what is cheap need not be kept.
        batch = roller.aligner.align_batch(completions, teacher_ids)
        queries = roller.aligner.interior_queries(batch, width=width)
        index = rollouts.index.rows(at)
        before = list(accumulate((len(row) + 1 for row in rollouts.teacher_ids), initial=0))
        first = torch.tensor([before[b] for b in rows], device=device)
        among = torch.arange(index.teacher_chunk.shape[1], device=device)
        lengths = torch.tensor([len(row) for row in teacher_ids], device=device)
        row_of = torch.where(among < lengths[:, None], first[:, None] + among, -1)
        mask = _but_stops(response, index, config)
        maps = roller.vocab_tensors
        loss = byte_kl(student, teacher.rows.at(row_of), index, maps, queries, **{**common, "mask": mask})
        names = ("residual",)
    tokens = loss.figures["tokens"]
    sums = {name: loss.figures[name] * tokens for name in names}
    return loss.loss, own, {"scored": tokens, "nonfinite": loss.figures["nonfinite"], **sums}


def _but_stops(tokens: Tensor, index: ChunkIndex, config: Config) -> Tensor:
    """Without ends of turns, where these are not scored."""
    return tokens if config.score_stop else tokens & (index.kind_of_student() != int(Kind.STOP))


def _inverse(places: Tensor, shape: tuple[int, int]) -> Tensor:
    """Which flat token lies at each place of `shape`; -1 on padding."""
    of = torch.full((shape[0] * shape[1],), -1, dtype=torch.long, device=places.device)
    of[places] = torch.arange(len(places), device=places.device)
    return of.view(shape)


def ratio_with_error(nats: Sequence[float], nbytes: Sequence[float]) -> tuple[float, float]:
    """Sum of nats / sum of bytes over independent rows, and its standard error (linearised ratio estimator)."""
    n, total = len(nats), sum(nbytes)
    if total == 0:
        return math.nan, math.nan
    ratio = sum(nats) / total
    if n < 2:
        return ratio, math.nan
    residual = sum((a - ratio * b) ** 2 for a, b in zip(nats, nbytes, strict=True))
    return ratio, math.sqrt(residual * n / (n - 1)) / total


def coverage_shares(counts: Sequence[int], tokens: int) -> dict[str, float]:
    """Share of the response tokens in chunks of each kind, and of those in none."""
    shares = {kind.name: counts[kind] / max(tokens, 1) for kind in Kind}
    return {**shares, "UNALIGNED": max(0.0, 1 - sum(shares.values()))}


# ---- evaluation --------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """What the student is like on held-out prompts; one entry a prompt, its samples summed."""

    prompts: list[str]
    nats: list[float]
    nbytes: list[float]
    responses: list[str]
    completed: float
    length: float
    coverage: dict[str, float]

    @property
    def kl_per_byte(self) -> tuple[float, float]:
        """Reverse KL to the teacher, nats per byte (sampled estimate), and its standard error over prompts."""
        return ratio_with_error(self.nats, self.nbytes)

    def fall_since(self, before: Evaluation) -> tuple[float, float]:
        """How far the KL has fallen, and the standard error of that, paired by prompt."""
        r0, r1 = before.kl_per_byte[0], self.kl_per_byte[0]
        n, b0, b1 = len(self.nats), sum(before.nbytes), sum(self.nbytes)
        parts = [
            (x0 - r0 * y0) / b0 - (x1 - r1 * y1) / b1
            for x0, y0, x1, y1 in zip(before.nats, before.nbytes, self.nats, self.nbytes, strict=True)
        ]
        error = math.sqrt(sum(part * part for part in parts) * n / (n - 1)) if n > 1 else math.nan
        return r0 - r1, error

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        kl, error = self.kl_per_byte
        keys = ("completed", "length", "coverage")
        return {"kl_per_byte": kl, "kl_error": error, **{key: getattr(self, key) for key in keys}}


@torch.no_grad()
def evaluate(roller: Roller, prompts: Sequence[str], samples: int = 1, *, seed: int = 1234) -> Evaluation:
    """Samples answers to held-out prompts (the same seed every time) and measures the gap to the teacher.

    Args:
        roller: student and teacher.
        prompts: held-out prompts.
        samples: for each prompt.
        seed: of the samples; the state of the random generators is restored afterwards.
    """
    config, n = roller.config, len(prompts)
    nats, nbytes = [0.0] * n, [0.0] * n
    responses = [""] * n
    completed, lengths, counts = 0, 0, torch.zeros(len(Kind), dtype=torch.long, device=roller.device)
    devices = [roller.device] if roller.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        work = [i for i in range(n) for _ in range(samples)]
        for first in range(0, len(work), config.batch_size):
            batch = work[first : first + config.batch_size]
            rollouts = roller.roll([prompts[i] for i in batch])
            own = roller.all_logprobs(rollouts)
            gap, size = chunk_gap(own, rollouts.teacher.logprobs, rollouts.index, stops=config.score_stop)
            counts += coverage_counts(rollouts.index)
            for i, x, y, ids in zip(batch, gap.tolist(), size.tolist(), rollouts.completion_ids, strict=True):
                nats[i] += x
                nbytes[i] += y
                responses[i] = responses[i] or roller.tokenizer.decode(ids, skip_special_tokens=True)
            completed += sum(rollouts.completed)
            lengths += sum(rollouts.lengths)
    total = max(n * samples, 1)
    coverage = coverage_shares(counts.tolist(), lengths)
    return Evaluation(list(prompts), nats, nbytes, responses, completed / total, lengths / total, coverage)


# ---- the loop ----------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a run leaves: where it is, its last step, and the evaluations before and after (None where not made)."""

    output: Path
    metrics: list[dict[str, Any]]
    before: Evaluation | None
    after: Evaluation | None
    interrupted: bool


def train(config: Config, *, models: tuple[Any, Any, Any, Any] | None = None) -> Result:
    """Distil the teacher into the student, on the student's own samples.

    Writes `config.json`, `metrics.jsonl` (a line a step), `curves.png` and `student/` (safetensors) into
    `config.output`. Ctrl-C ends the loop after saving what there is.

    Args:
        config: the run.
        models: (student, its tokenizer, teacher, its tokenizer), already loaded; None loads what `config` names.

    Raises:
        XTokMapError: prompts or models that cannot be used.
    """
    prompts, heldout = read_prompts(config.prompts)
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    if models is None:
        student, tokenizer = load(config.student, device, config.dtype)
        teacher_model, teacher_tokenizer = load(config.teacher, device, config.dtype)
    else:
        student, tokenizer, teacher_model, teacher_tokenizer = models
    teacher = LocalTeacher(
        teacher_model, teacher_tokenizer, micro_batch=config.micro_batch, plain_template=config.plain_template
    )
    roller = Roller(student, tokenizer, teacher, config)
    prompts = _fitting(prompts, roller)
    order = _shuffled(len(prompts), torch.Generator().manual_seed(config.seed))

    optimizer = torch.optim.AdamW(
        float32_parameters(student), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.95)
    )
    optimizer.register_step_post_hook(write_back)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / max(1, config.warmup_steps)))

    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.json").write_text(json.dumps(asdict(config), indent=2, ensure_ascii=False) + "\n")
    history: list[dict[str, Any]] = []
    before = after = None
    interrupted = False
    try:
        with open(output / "metrics.jsonl", "w", encoding="utf-8") as log, _Progress(config.steps) as progress:
            if heldout and config.eval_samples:
                progress.say(f"evaluating on {len(heldout)} held-out prompts")
                before = evaluate(roller, heldout, config.eval_samples)
                progress.say(_evaluation_line("before", before))
            for step in range(1, config.steps + 1):
                start = time.perf_counter()
                rollouts = roller.roll([prompts[next(order)] for _ in range(config.batch_size)])
                clock = _Clock(device, rollouts.seconds)
                with clock("update"):
                    found = update(roller, rollouts, optimizer)
                    warmup.step()
                history.append(_metrics(step, rollouts, found, time.perf_counter() - start))
                log.write(json.dumps(history[-1]) + "\n")
                log.flush()
                progress.step(history[-1])
            if heldout and config.eval_samples:
                after = evaluate(roller, heldout, config.eval_samples)
                progress.say(_evaluation_line("after", after))
    except KeyboardInterrupt:
        interrupted = True
        print(f"interrupted after {len(history)} steps: saving to {output}", file=sys.stderr)
    student.save_pretrained(output / "student")
    tokenizer.save_pretrained(output / "student")
    evaluations = {"before": before and before.as_dict(), "after": after and after.as_dict()}
    (output / "evaluation.json").write_text(json.dumps(evaluations, indent=2) + "\n")
    if history:
        plot(history, output / "curves.png", before, after)
    return Result(output, history, before, after, interrupted)


def _fitting(prompts: list[str], roller: Roller) -> list[str]:
    limit = roller.config.max_prompt_tokens
    lengths = map(len, render(roller.tokenizer, prompts, roller.config.plain_template))
    kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= limit]
    if not kept:
        raise XTokMapError(f"every prompt is longer than max_prompt_tokens={limit} student tokens")
    if len(kept) < len(prompts):
        warnings.warn(f"{len(prompts) - len(kept)} prompts longer than {limit} tokens are left out", stacklevel=3)
    return kept


def _shuffled(n: int, generator: torch.Generator) -> Iterator[int]:
    """Every index once in random order, and again."""
    while True:
        yield from torch.randperm(n, generator=generator).tolist()


def _metrics(step: int, rollouts: Rollouts, found: dict[str, Any], seconds: float) -> dict[str, Any]:
    tokens = sum(rollouts.lengths)
    kl, error = ratio_with_error(found["nats"].tolist(), found["bytes"].tolist())
    figures = {name: float(value) for name, value in found["figures"].items()}
    scored = int(figures.pop("scored"))
    nonfinite = int(figures.pop("nonfinite"))
    return {
        "step": step,
        "kl_per_byte": kl,
        "kl_error": error,
        "loss": float(found["loss"]),
        "grad_norm": float(found["grad_norm"]),
        "skipped_updates": found["skipped"],
        "coverage": coverage_shares(coverage_counts(rollouts.index).tolist(), tokens),
        "scored": scored / max(tokens, 1),
        "nonfinite_tokens": nonfinite,
        **{name: value / max(scored, 1) for name, value in figures.items()},
        "response_length": tokens / len(rollouts.lengths),
        "completed": sum(rollouts.completed) / len(rollouts.completed),
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "time": {name: round(value, 6) for name, value in rollouts.seconds.items()},
    }


def _evaluation_line(name: str, evaluation: Evaluation) -> str:
    kl, error = evaluation.kl_per_byte
    return (
        f"{name}: reverse KL {kl:.4f} +- {error:.4f} nats/byte, {evaluation.length:.1f} tokens, "
        f"{evaluation.completed:.0%} completed"
    )


class _Clock:
    """Wall time of a step's parts; on a GPU each part waits for its kernels, so that the split is true."""

    def __init__(self, device: torch.device, seconds: dict[str, float] | None = None) -> None:
        self.device = device
        self.seconds: dict[str, float] = {} if seconds is None else seconds

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class _Progress:
    """A rich progress bar on a terminal, one plain line a step otherwise."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.bar: Any = None

    def __enter__(self) -> _Progress:
        if sys.stdout.isatty():
            with suppress(ImportError):
                from rich import progress as rich

                columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn())
                self.bar = rich.Progress(*columns, rich.TimeElapsedColumn(), rich.TimeRemainingColumn())
                self.bar.start()
                self.task = self.bar.add_task("distilling", total=self.steps)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.console.print(text, highlight=False)
        else:
            print(text, flush=True)

    def step(self, m: dict[str, Any]) -> None:
        text = f"KL {m['kl_per_byte']:.3f} +- {m['kl_error']:.3f} nats/byte"
        if self.bar is not None:
            self.bar.update(self.task, advance=1, description=text)
            return
        split = " ".join(f"{name} {value:.2f}" for name, value in m["time"].items())
        print(
            f"step {m['step']}/{self.steps}  {text}  scored {m['scored']:.1%}  "
            f"length {m['response_length']:.0f}  completed {m['completed']:.0%}  grad {m['grad_norm']:.2f}  "
            f"{m['tokens_per_second']:.0f} tokens/s  [{split} s]",
            flush=True,
        )


def plot(
    history: list[dict[str, Any]], path: Path, before: Evaluation | None = None, after: Evaluation | None = None
) -> None:
    """The curves of a run as a PNG; needs matplotlib, without which a warning says so."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        warnings.warn("no curves.png: matplotlib is not installed", stacklevel=2)
        return
    steps = [m["step"] for m in history]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    kl, error = ([m[name] for m in history] for name in ("kl_per_byte", "kl_error"))
    low, high = ([k + sign * e for k, e in zip(kl, error, strict=True)] for sign in (-1, 1))
    axes[0, 0].plot(steps, kl, color="C0", label="training samples")
    axes[0, 0].fill_between(steps, low, high, color="C0", alpha=0.2, linewidth=0)
    for evaluation, at, label in ((before, 0, "held-out"), (after, steps[-1], None)):
        if evaluation is not None:
            value, bar = evaluation.kl_per_byte
            axes[0, 0].errorbar([at], [value], [bar], fmt="o", color="C3", capsize=3, label=label)
    axes[0, 0].set(title="Reverse KL to the teacher", ylabel="nats per byte", xlabel="step")
    axes[0, 0].legend()
    axes[0, 1].plot(steps, [m["response_length"] for m in history], color="C1", label="tokens")
    axes[0, 1].set(title="Responses", ylabel="mean length, tokens", xlabel="step", ylim=(0, None))
    share = axes[0, 1].twinx()
    share.plot(steps, [m["completed"] for m in history], color="C2", label="completed")
    share.set(ylabel="share completed", ylim=(0, 1))
    lines = [*axes[0, 1].get_lines(), *share.get_lines()]
    axes[0, 1].legend(lines, [line.get_label() for line in lines])
    names = [name for name in history[0]["coverage"] if any(m["coverage"][name] > 0 for m in history)]
    stack = [[max(0.0, m["coverage"][name]) for m in history] for name in names]
    axes[1, 0].stackplot(steps, stack, labels=[name.lower() for name in names])
    axes[1, 0].set(title="Response tokens by kind of chunk", ylabel="share", xlabel="step", ylim=(0, 1))
    axes[1, 0].legend(loc="lower left", fontsize="small")
    parts = list(history[0]["time"])
    axes[1, 1].stackplot(steps, [[m["time"][name] for m in history] for name in parts], labels=parts)
    axes[1, 1].set(title="Time of a step", ylabel="seconds", xlabel="step")
    axes[1, 1].legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)

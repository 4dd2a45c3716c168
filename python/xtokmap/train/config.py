"""What a run depends on."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

from xtokmap._core import XTokMapError
from xtokmap.chat import PLAIN_TEMPLATE
from xtokmap.files import check_name
from xtokmap.losses.table import LOSSES, LossRule, LossSettings
from xtokmap.teachers.client import KEY_VARIABLE, PROTOCOLS, check_url
from xtokmap.train.support.track import TRACKERS

#: Whose samples, and what becomes of them; see `Config.method`.
METHODS = ("opd", "kd", "sft")


#: Losses that learn from a teacher's logprobs; what needs none is `method="sft"`.
_TAUGHT = tuple(name for name, rule in LOSSES.items() if rule.teacher != "nothing")


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
    teacher_url: str = _doc(
        "",
        "http://host:port of a server that has the teacher, which is not loaded then: of `teacher` only the tokenizer "
        f"is read. Its key, where it wants one, is taken from the environment ({KEY_VARIABLE})",
    )
    teacher_protocol: str = _doc("auto", f"of the server: auto (whichever answers), {', '.join(PROTOCOLS)}")
    teacher_model: str = _doc("", "the name under which the server has the teacher; empty: the only one that it has")
    teacher_topk: int = _doc(20, "likeliest tokens of every row to ask a server for; 0: none (vLLM: --max-logprobs)")
    teacher_concurrency: int = _doc(16, "most requests to the server at a time")
    teacher_timeout: float = _doc(60.0, "seconds for one request to the server")
    teacher_retries: int = _doc(5, "further attempts where a request fails and that may change, with growing pauses")
    teacher_failures: int = _doc(3, "batches in a row that the server may fail for good, before the run is ended")
    overlap: bool = _doc(
        False,
        "with teacher_url: sample the next batch while the server scores this one, update while it scores the next; "
        "samples are one update old then, and their own logprobs correct for it",
    )
    prompts: str = _doc(
        "",
        "prompts: .jsonl, .parquet or a folder of a data set with `prompt` or `messages` (and `tools`, "
        "`chat_template_kwargs`, `split`: train, heldout), or .txt, one a line",
    )
    output: str = _doc("runs/opd", "folder for the student, metrics.jsonl, report.html and config.json")
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
    lora_rank: int = _doc(
        0, "train an adapter of this rank (needs peft) and leave the student as it is; 0: train it all"
    )
    lora_alpha: float = _doc(32.0, "the adapter's product is scaled by lora_alpha / lora_rank")
    lora_targets: str = _doc(
        "all-linear", "modules that get an adapter, parted by commas; all-linear: all but the head"
    )
    method: str = _doc(
        "opd",
        "opd: the student's samples, on-policy distillation; kd: the teacher's samples, with the same losses of whole "
        "distributions; sft: the teacher's samples, imitated token by token",
    )
    loss: str = _doc(
        "auto",
        "auto (transfer_kl; of a server: cover, prior without top k), or one of "
        + ", ".join(_TAUGHT)
        + " (the paper: prior)",
    )
    beta: float = _doc(1.0, "of transfer_kl and byte_kl: 1 reverse KL, 0 forward, between them Jensen-Shannon")
    clamp: float = _doc(10.0, "largest absolute advantage (the paper: 10)")
    max_chunk_tokens: int = _doc(6, "chunks with more tokens on a side are unscored, 0: no limit (the paper: 6)")
    score_stop: bool = _doc(True, "score ends of turns, and measure them; a base teacher does not know when to stop")
    score_markers: bool = _doc(True, "score markers of thoughts and tool calls, and measure them")
    foreign: str = _doc("omit", "thoughts and calls for which the teacher has no format: omit, or score them as text")
    clip_low: float = _doc(0.2, "PPO's lower clip (the paper: 0.2)")
    clip_high: float = _doc(0.28, "PPO's upper clip (the paper: 0.28)")
    clip_dual: float = _doc(10.0, "PPO's dual clip (the paper: 10)")
    aggregate: str = _doc("response", "mean of the loss over `response` tokens (the paper) or `scored` tokens")
    plain_template: str = _doc(PLAIN_TEMPLATE, "prompt format for a model without a chat template")
    eval_samples: int = _doc(1, "samples for each held-out prompt, before and after; 0: no evaluation")
    shard: bool = _doc(
        False, "with several processes: part the student's layers and their optimizer among them (FSDP2), float32"
    )
    save_every: int = _doc(50, "steps between checkpoints, one more at the end; 0: none at all")
    keep_checkpoints: int = _doc(2, "how many of the last checkpoints to keep, each 12 bytes a weight")
    resume: bool = _doc(False, "go on from the last whole checkpoint in the output folder, if there is one")
    report_every: int = _doc(
        10, "steps after which report.html and samples.jsonl are written again; 0: at the end only"
    )
    track: str = _doc("", "also send every step's figures to a tracker: trackio or wandb")
    seed: int = _doc(0, "of samples and shuffling")
    device: str = _doc("auto", "auto (cuda, mps, cpu), or a torch device")
    dtype: str = _doc(
        "auto", "auto (bfloat16 on cuda, float32 elsewhere), float32, bfloat16 or float16; updates are float32"
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            self._check_kind(f.name, getattr(self, f.name), type(f.default))
        counts = ("steps", "batch_size", "max_new_tokens", "updates", "micro_batch", "max_prompt_tokens")
        for name in (*counts, "keep_checkpoints", "teacher_concurrency"):
            if getattr(self, name) < 1:
                raise XTokMapError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("temperature", "learning_rate", "grad_clip", "clamp", "teacher_timeout", "lora_alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise XTokMapError(f"{name}={getattr(self, name)}: must be positive and finite")
        amounts = ("warmup_steps", "weight_decay", "max_chunk_tokens", "eval_samples", "clip_low", "clip_high")
        more = ("save_every", "report_every", "lora_rank", "teacher_topk", "teacher_retries", "teacher_failures")
        for name in (*amounts, *more):
            if not 0 <= getattr(self, name) < math.inf:
                raise XTokMapError(f"{name}={getattr(self, name)}: must be finite and not negative")
        if not 1 < self.clip_dual < math.inf:
            raise XTokMapError(f"clip_dual={self.clip_dual}: must be more than 1 and finite")
        if not -(2**63) <= self.seed < 2**63:
            raise XTokMapError(f"seed={self.seed}: must fit into 64 bits")
        if self.method not in METHODS:
            raise XTokMapError(f"method={self.method!r}: use one of {', '.join(METHODS)}")
        if self.loss not in ("auto", *_TAUGHT):
            raise XTokMapError(f"loss={self.loss!r}: use one of auto, {', '.join(_TAUGHT)}")
        if self.teacher_protocol not in ("auto", *PROTOCOLS):
            raise XTokMapError(f"teacher_protocol={self.teacher_protocol!r}: use one of auto, {', '.join(PROTOCOLS)}")
        if self.teacher_url:
            check_url(self.teacher_url)
            if self.method != "opd":
                raise XTokMapError(
                    f"method={self.method!r} with teacher_url: a served teacher scores and does not sample; use "
                    "method='opd', or load the teacher here"
                )
            if self.loss_rule.teacher == "rows":
                raise XTokMapError(
                    f"loss={self.rule!r} with teacher_url: a served teacher gives no whole rows; use 'cover' (with top "
                    "k) or a credit of logprobs alone, as 'prior', or load the teacher here"
                )
            if self.loss_rule.teacher == "top" and not self.teacher_topk:
                raise XTokMapError(
                    f"loss={self.rule!r} with teacher_topk=0: it needs rows; ask for some, or use 'prior'"
                )
        elif self.overlap:
            raise XTokMapError(
                "overlap=True without teacher_url: a teacher that is loaded here computes where the student does, and "
                "there is nothing to wait for; serve it, or leave overlap out"
            )
        if self.method == "kd" and self.loss_rule.on_policy:
            raise XTokMapError(
                f"loss={self.loss!r} with method='kd': a policy gradient needs the student's own samples; use one of "
                f"{', '.join(name for name in _TAUGHT if not LOSSES[name].on_policy)}, or method='opd'"
            )
        if self.track not in ("", *TRACKERS):
            raise XTokMapError(f"track={self.track!r}: use one of {', '.join(TRACKERS)}, or nothing")
        if not 0 <= self.beta <= 1:
            raise XTokMapError(f"beta={self.beta}: must lie between 0 and 1")
        if self.foreign not in ("omit", "text"):
            raise XTokMapError(f"foreign={self.foreign!r}: use 'omit' or 'text'")
        if self.aggregate not in ("response", "scored"):
            raise XTokMapError(f"aggregate={self.aggregate!r}: use 'response' or 'scored'")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise XTokMapError(f"dtype={self.dtype!r}: use auto, float32, bfloat16 or float16")
        if "{prompt}" not in self.plain_template:
            raise XTokMapError(f"plain_template={self.plain_template!r} must contain {{prompt}}")

    def _check_kind(self, name: str, value: Any, kind: type) -> None:
        if kind is str and isinstance(value, os.PathLike):
            value = os.fspath(value)
            object.__setattr__(self, name, value)
        taken = (int, float) if kind is float else kind
        if not isinstance(value, taken) or (isinstance(value, bool) and kind is not bool):
            raise XTokMapError(f"{name}={value!r}: must be of type {kind.__name__}, not {type(value).__name__}")
        if isinstance(value, str):
            check_name(value, f"{name}={value!r}")

    @property
    def rule(self) -> str:
        """The name of the loss itself: `imitation` for method sft; `auto` is the one that asks most of what there is.

        That is transfer_kl of whole rows, cover of a server's top k, and prior of its logprobs.
        """
        if self.method == "sft":
            return "imitation"
        if self.loss == "auto" and self.teacher_url:
            return "cover" if self.teacher_topk else "prior"
        return "transfer_kl" if self.loss == "auto" else self.loss

    @property
    def loss_rule(self) -> LossRule:
        """What that loss asks for."""
        return LOSSES[self.rule]

    @property
    def loss_settings(self) -> LossSettings:
        """What the losses take."""
        return LossSettings(**{f.name: getattr(self, f.name) for f in fields(LossSettings)})

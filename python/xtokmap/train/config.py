"""What a run depends on."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from xtokmap._core import XTokMapError
from xtokmap.chat import PLAIN_TEMPLATE
from xtokmap.files import check_name
from xtokmap.losses.rule import LossRule, LossSettings
from xtokmap.losses.table import LOSSES
from xtokmap.teachers.client import KEY_VARIABLE, PROTOCOLS, check_url
from xtokmap.teachers.remote import ROWS
from xtokmap.train.several import FIRST, named_teachers, shares_by_domain
from xtokmap.train.support.track import TRACKERS

#: The environment variable with the API key of the student's server.
SAMPLER_KEY = "XTOKMAP_SAMPLER_KEY"

#: Whose samples, and what becomes of them; see `Config.method`.
METHODS = ("opd", "kd", "sft")

#: How the learning rate ends; see `Config.decay`.
DECAYS = ("none", "linear", "cosine")

#: Losses that learn from a teacher's logprobs; what needs none is `method="sft"`.
_TAUGHT = tuple(name for name, rule in LOSSES.items() if rule.teacher != "nothing")

#: The loss that asks most of what a server gives.
AUTO = {"hidden": "transfer_kl", "sums": "cover", "top": "cover", "none": "prior"}


def _ways(rule: LossRule) -> tuple[str, ...]:
    """Which of a server's rows a loss can be computed from; the cheapest first that lose nothing."""
    if rule.teacher == "rows":
        return ("hidden",)
    if rule.teacher == "top":
        return ("hidden", "top") if rule.keep else ("sums", "hidden", "top")
    return ("none", "top", "sums", "hidden")


#: Names of fields, what their numbers must be, and how to say it.
_NUMBERS: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (
        (
            *("steps", "batch_size", "max_new_tokens", "updates", "micro_batch", "max_prompt_tokens"),
            *("keep_checkpoints", "teacher_concurrency", "sampler_every", "sampler_concurrency"),
        ),
        lambda x: x >= 1,
        "be at least 1",
    ),
    (
        (
            *("temperature", "learning_rate", "grad_clip", "clamp", "lora_alpha"),
            *("teacher_timeout", "sampler_timeout"),
        ),
        lambda x: 0 < x < math.inf,
        "be positive and finite",
    ),
    (
        (
            *(
                "warmup_steps",
                "weight_decay",
                "stop_bridge",
                "anchor",
                "max_chunk_tokens",
                "eval_samples",
                "clip_low",
                "clip_high",
            ),
            *("save_every", "report_every", "lora_rank", "teacher_topk", "teacher_retries", "teacher_failures"),
            "teacher_patience",
        ),
        lambda x: 0 <= x < math.inf,
        "be finite and not negative",
    ),
    (("clip_dual",), lambda x: 1 < x < math.inf, "be more than 1 and finite"),
    (("seed",), lambda x: -(2**63) <= x < 2**63, "fit into 64 bits"),
    (("beta",), lambda x: 0 <= x <= 1, "lie between 0 and 1"),
)

#: What the fields that name something may name.
_NAMES = {
    "method": METHODS,
    "loss": ("auto", *_TAUGHT),
    "teacher_protocol": ("auto", *PROTOCOLS),
    "teacher_rows": ("auto", *ROWS),
    "track": ("", *TRACKERS),
    "decay": DECAYS,
    "foreign": ("omit", "text"),
    "aggregate": ("response", "scored"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}


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
        "http://host:port of a server that has the teacher; then only the tokenizer of `teacher` is loaded. A key, if "
        f"the server needs one, comes from the environment ({KEY_VARIABLE})",
    )
    teacher_protocol: str = _doc("auto", f"of the server: auto (the one that answers), {', '.join(PROTOCOLS)}")
    teacher_model: str = _doc("", "the name under which the server has the teacher; empty: the only one that it has")
    teacher_rows: str = _doc(
        "auto",
        "how much of the server's rows to ask for: hidden (states, of which whole rows are made here with the output "
        "head of `teacher`), sums (what cover needs, exact), top (the likeliest tokens), none; auto: the most that the "
        "server gives and the loss can use",
    )
    teacher_states_url: str = _doc(
        "", "http://host:port of the server that gives the hidden states, if it is another one (vLLM's pooling runner)"
    )
    teacher_topk: int = _doc(20, "likeliest tokens of every row to ask a server for; 0: none (vLLM: --max-logprobs)")
    teacher_concurrency: int = _doc(16, "most requests to the server at a time")
    teacher_timeout: float = _doc(60.0, "seconds for one request to the server")
    teacher_retries: int = _doc(
        5, "further attempts after a failed request that may still succeed, with growing pauses"
    )
    teacher_patience: float = _doc(
        300.0, "seconds to wait for a server that is not there (not started yet, or killed and started again)"
    )
    teacher_failures: int = _doc(3, "batches in a row that the server may fail on before the run ends")
    more_teachers: str = _doc(
        "",
        "teachers beside the first: NAME=MODEL, or NAME=MODEL@http://host:port of one that is served, parted by "
        "commas; each of any family. The first is called teacher, and is the one that health and samples show",
    )
    domains: str = _doc(
        "",
        "how much the teachers count by a prompt's `domain`, parted by semicolons: 'math: NAME; chat: teacher=1 "
        "NAME=3'; in a domain that is not named all count the same",
    )
    overlap: bool = _doc(
        False,
        "with teacher_url: sample the next batch while the server scores this one, update while it scores the next; "
        "samples are one update old then, and their own logprobs correct for it",
    )
    sampler_url: str = _doc(
        "",
        "http://host:port of a vLLM server (VLLM_SERVER_DEV_MODE=1) that samples the student's answers, and is given "
        f"the student's weights; empty: they are sampled here. Its key is taken from the environment ({SAMPLER_KEY})",
    )
    sampler_folder: str = _doc("", "for these weights, seen by both under this name; empty: `sampler` in `output`")
    sampler_every: int = _doc(1, "updates after which the server is given the weights again")
    sampler_concurrency: int = _doc(64, "most answers that are sampled there at a time")
    sampler_timeout: float = _doc(600.0, "seconds for one answer, and for the weights")
    prompts: str = _doc(
        "",
        "prompts: .jsonl, .parquet or a folder of a data set with `prompt` or `messages` (and `tools`, "
        "`chat_template_kwargs`, `split`: train, heldout), or .txt, one a line",
    )
    output: str = _doc("runs/opd", "folder for the student, metrics.jsonl, report.html and config.json")
    steps: int = _doc(100, "of the run; each samples a batch and learns from it")
    batch_size: int = _doc(32, "prompts a step, one sample each (the paper: 128)")
    max_prompt_tokens: int = _doc(1024, "longer prompts are left out, with a warning (the paper: 1024)")
    max_new_tokens: int = _doc(256, "longest response, in student tokens (the paper: 16384)")
    temperature: float = _doc(1.0, "of the student's samples (the paper: 1, top-p 1)")
    updates: int = _doc(1, "optimizer steps on each batch of samples (the paper: 1)")
    micro_batch: int = _doc(8, "samples in one forward pass; changes memory and speed, not the result")
    learning_rate: float = _doc(1e-6, "AdamW's (the paper: 1e-6)")
    warmup_steps: int = _doc(10, "steps over which the learning rate rises to its value (the paper: 10)")
    decay: str = _doc(
        "none", "of the learning rate after the warm-up, down to nothing at the last step: none, linear or cosine"
    )
    weight_decay: float = _doc(0.01, "AdamW's (the paper: 0.01)")
    grad_clip: float = _doc(1.0, "largest gradient norm (the paper: 1)")
    anchor: float = _doc(
        0.0,
        "weight of the student's KL to what it was before the run, which keeps it from drifting; 0: none. It costs a "
        "pass of that model over the samples and the heads' share of an update",
    )
    lora_rank: int = _doc(
        0, "train an adapter of this rank (needs peft) and leave the student's weights as they are; 0: train them all"
    )
    lora_alpha: float = _doc(32.0, "the adapter's product is scaled by lora_alpha / lora_rank")
    lora_targets: str = _doc(
        "all-linear", "modules that get an adapter, separated by commas; all-linear: all but the head"
    )
    method: str = _doc(
        "opd",
        "opd: the student's samples, on-policy distillation; kd: the teacher's samples, with the same losses of whole "
        "distributions; sft: the teacher's samples, imitated token by token",
    )
    loss: str = _doc(
        "auto",
        "auto (transfer_kl; of a server what its rows allow: transfer_kl, cover, prior), or one of "
        + ", ".join(_TAUGHT)
        + " (the paper: prior)",
    )
    beta: float = _doc(1.0, "of transfer_kl and byte_kl: 1 reverse KL, 0 forward, between them Jensen-Shannon")
    stop_bridge: float = _doc(
        0.0,
        "of transfer_kl and byte_kl: weight of a further forward KL of whether the turn ends here, for a student that "
        "hardly ever ends one: a reverse KL teaches it that slowly",
    )
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
        False, "with several processes: shard the student's layers and their optimizer over them (FSDP2), float32"
    )
    save_every: int = _doc(50, "steps between checkpoints, one more at the end; 0: none at all")
    keep_checkpoints: int = _doc(2, "how many of the last checkpoints to keep, each 12 bytes a weight")
    resume: bool = _doc(False, "resume from the last whole checkpoint in the output folder, if there is one")
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
        self._check_numbers()
        self._check_names()
        if self.teacher_url:
            self._check_served()
        elif self.overlap:
            raise XTokMapError(
                "overlap=True without teacher_url: a teacher that is loaded here computes where the student does, and "
                "there is nothing to wait for; serve it, or leave overlap out"
            )
        if self.sampler_url:
            self._check_sampler()
        if self.method == "kd" and self.loss_rule.on_policy:
            raise XTokMapError(
                f"loss={self.loss!r} with method='kd': a policy gradient needs the student's own samples; use one of "
                f"{', '.join(name for name in _TAUGHT if not LOSSES[name].on_policy)}, or method='opd'"
            )
        names = (FIRST, *named_teachers(self.more_teachers))
        shares_by_domain(self.domains, names)
        if len(names) > 1 and self.method != "opd":
            raise XTokMapError(f"method={self.method!r} with more_teachers: only the student's own samples are scored")
        if self.domains and len(names) == 1:
            raise XTokMapError("domains without more_teachers: one teacher counts everywhere")
        if self.anchor and self.shard:
            raise XTokMapError("anchor with shard: what the student was is not sharded; leave one of them out")

    def _check_numbers(self) -> None:
        for names, fits, what in _NUMBERS:
            for name in names:
                if not fits(getattr(self, name)):
                    raise XTokMapError(f"{name}={getattr(self, name)}: must {what}")

    def _check_names(self) -> None:
        for name, known in _NAMES.items():
            if getattr(self, name) not in known:
                others = ", ".join(filter(None, known)) + (", or nothing" if "" in known else "")
                raise XTokMapError(f"{name}={getattr(self, name)!r}: use one of {others}")
        if "{prompt}" not in self.plain_template:
            raise XTokMapError(f"plain_template={self.plain_template!r} must contain {{prompt}}")

    def _check_served(self) -> None:
        """What a served teacher allows."""
        check_url(self.teacher_url)
        if self.teacher_states_url:
            check_url(self.teacher_states_url, "teacher_states_url")
        if self.method != "opd":
            raise XTokMapError(
                f"method={self.method!r} with teacher_url: a served teacher scores and does not sample; use "
                "method='opd', or load the teacher here"
            )
        if not self.teacher_ways:
            enough = ", ".join(_ways(self.loss_rule))
            topk = " (and teacher_topk=0 asks for no top k)" if not self.teacher_topk else ""
            raise XTokMapError(
                f"loss={self.rule!r} with teacher_rows={self.teacher_rows!r}{topk}: it needs more of the teacher's "
                f"rows, one of {enough}; or use 'prior'"
            )

    def _check_sampler(self) -> None:
        check_url(self.sampler_url, "sampler_url", SAMPLER_KEY)
        if self.method != "opd":
            raise XTokMapError(f"method={self.method!r} with sampler_url: only the student samples there")
        if self.lora_rank:
            raise XTokMapError(
                "lora_rank with sampler_url: the server is given whole weights, and an adapter is not merged into "
                "them yet; train all weights (lora_rank=0), or sample here"
            )

    def _check_kind(self, name: str, value: Any, kind: type) -> None:
        if kind is str and isinstance(value, os.PathLike):
            value = os.fspath(value)
            object.__setattr__(self, name, value)
        taken = (int, float) if kind is float else kind
        if not isinstance(value, taken) or (isinstance(value, bool) and kind is not bool):
            raise XTokMapError(f"{name}={value!r}: must be of type {kind.__name__}, not {type(value).__name__}")
        if isinstance(value, str):
            check_name(value, f"{name}={value!r}")

    def rate(self, step: int) -> float:
        """The share of `learning_rate` with which a step is made, counted from 0."""
        if step < self.warmup_steps or self.decay == "none":
            return min(1.0, (step + 1) / max(1, self.warmup_steps))
        done = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2

    @property
    def rule(self) -> str:
        """The name of the loss itself: `imitation` for method sft; `auto` is the one that asks most of what there is.

        That is transfer_kl of whole rows; of a server, what its rows allow (`AUTO`), which a run finds out.
        """
        if self.method == "sft":
            return "imitation"
        if self.loss == "auto" and self.teacher_url:
            return AUTO.get(self.teacher_rows, AUTO["top" if self.teacher_topk else "none"])
        return "transfer_kl" if self.loss == "auto" else self.loss

    @property
    def teacher_ways(self) -> tuple[str, ...]:
        """What of a server's rows is worth asking for, the best first; of `teacher_rows` alone, where that is set."""
        ways = tuple(ROWS) if self.loss == "auto" else _ways(self.loss_rule)
        asked = ways if self.teacher_rows == "auto" else (self.teacher_rows,)
        return tuple(way for way in asked if way in ways and (self.teacher_topk or way != "top"))

    @property
    def loss_rule(self) -> LossRule:
        """What that loss asks for."""
        return LOSSES[self.rule]

    @property
    def loss_settings(self) -> LossSettings:
        """What the losses take."""
        return LossSettings(**{f.name: getattr(self, f.name) for f in fields(LossSettings)})

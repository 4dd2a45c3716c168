"""TRL's `DistillationTrainer` with a teacher of any family.

    from xtokmap.integrations.trl import DistillationTrainer  # instead of trl's
    trainer = DistillationTrainer(model=..., teacher_model=..., args=..., train_dataset=...)

Rollouts (vLLM's, too), buffering, PEFT, gradient accumulation, accelerate, checkpoints and logs are TRL's. Of it two
private methods are overridden: after a generation batch the teacher scores it, and in every micro-batch's loss `Pair`
takes the place of TRL's divergence. What the teacher said of a row goes with that row through TRL's shuffle and split.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import AutoTokenizer

from xtokmap._core import XTokMapError
from xtokmap.integrations.versions import Hook, check_hooks, unsupported
from xtokmap.losses.measured import means
from xtokmap.losses.rule import LossRule
from xtokmap.teachers.local import LocalTeacher, Teacher
from xtokmap.teachers.remote import ServerTeacher
from xtokmap.torch.completions import body_and_head, headed, padded_places
from xtokmap.torch.logits import Logits
from xtokmap.torch.mixture import View, entropies, shares
from xtokmap.torch.pair import Pair
from xtokmap.train.config import AUTO
from xtokmap.train.support.health import entropy_sum

_KNOWN = "1.16.*"
try:
    from trl import DistillationTrainer as _DistillationTrainer
    from trl.trainer.utils import create_model_from_path
except (ImportError, AttributeError) as error:
    if find_spec("trl") is None:
        raise ImportError("this needs TRL: pip install 'xtokmap[trl]' (Python 3.11 or later)", name="trl") from None
    raise unsupported("trl", _KNOWN, f"it has no DistillationTrainer as known here ({error})") from error

__all__ = ["DistillationTrainer"]

check_hooks(
    "trl",
    _KNOWN,
    (
        Hook(_DistillationTrainer, "_generate_and_score_completions", "self inputs"),
        Hook(_DistillationTrainer, "_compute_loss", "self unwrapped_student inputs num_items_in_batch"),
        Hook(_DistillationTrainer, "compute_loss", "self model inputs return_outputs num_items_in_batch"),
        Hook(_DistillationTrainer, "log", "self logs start_time"),
        Hook(
            _DistillationTrainer,
            "_get_last_hidden_state",
            "self unwrapped_model input_ids attention_mask logits_to_keep",
            overridden=False,
        ),
    ),
)

#: How much a teacher counts: a number, or one for each row of the data set, 0 where it is not asked.
Weight: TypeAlias = "float | Callable[[Mapping[str, Any]], float]"

#: Beside `prompt_ids` and `completion_ids`: a list of a `_Row` for each row, shuffled and split by TRL as they are.
_ROWS = "xtokmap_rows"


class DistillationTrainer(_DistillationTrainer):  # type: ignore[misc]
    """As `trl.DistillationTrainer`, for a teacher with any tokenizer.

    All that is not named here is TRL's argument, and means what it means there. The teacher is told a conversation by
    its own chat template, with `args.chat_template_kwargs`; a prompt that is plain text is plain text to it, too. Of a
    row with `messages` and no `prompt`, what comes before the last answer is asked. `args.beta` is that of the loss,
    and `args.temperature` that of the student's distribution; the teacher's stays what it is.

    Logged beside TRL's figures, over all processes: `PairLoss.metrics` (`kl_per_byte`, `scored`, `coverage/ONE_TO_ONE`
    and so on); of several teachers with `teacher_0/` and so on before them.

    Args:
        model: the student.
        teacher_model: a hub id or path, a model (whole on each process' device, never trained), a `LocalTeacher`, a
            `ServerTeacher`, or a list of (one of these, its weight): a number, or a function from a row of the data set
            to one, such as `lambda row: row["domain"] == "code"`.
        args: TRL's `DistillationConfig`.
        teacher_processing_class: the tokenizer of a teacher that is a model, or a list of them, one a teacher; None:
            the one that lies where the model is from.
        loss: a name of `xtokmap.losses.LOSSES` or a `LossRule`; None: transfer_kl, or of a server what its rows allow
            (transfer_kl, cover, prior).
        loss_settings: of `LossSettings`: clamp, score_stop, ...; and `foreign`, see `Pair`.

    Raises:
        XTokMapError: a teacher that is none, tools, a processor for images, an unknown loss or setting.
        TeacherError: a server that must not be a teacher.
    """

    _tag_names = ["trl", "distillation", "xtokmap"]  # noqa: RUF012  # TRL's own

    def __init__(
        self,
        model: Any,
        teacher_model: Any,
        args: Any = None,
        *more: Any,
        teacher_processing_class: Any = None,
        loss: str | LossRule | None = None,
        loss_settings: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        # Without a teacher TRL asks for no shared vocabulary; it does so itself where the teacher is a server.
        super().__init__(model, None, args, *more, **options)
        if self.tools:
            raise XTokMapError("tools: calls and answers inside a completion are not rendered for the teacher yet")
        if self._is_vlm:
            raise XTokMapError("the teacher is told texts alone: pass processing_class=processor.tokenizer")
        settings = {"beta": self.beta, **(loss_settings or {})}
        if "aggregate" in settings:
            raise XTokMapError("aggregate: TRL divides by all tokens of the completions; leave it out")
        several = isinstance(teacher_model, list | tuple)
        given = teacher_model if several else [(teacher_model, 1.0)]
        tokenizers = teacher_processing_class if several else [teacher_processing_class]
        self._teachers: list[tuple[Teacher, Weight, Pair]] = []
        for k, one in enumerate(given):
            if not isinstance(one, tuple) or len(one) != 2:
                raise XTokMapError(f"teacher_model[{k}]: expected (teacher, weight), got {type(one).__name__}")
            teacher = self._teacher(one[0], tokenizers[k] if tokenizers else None)
            rule = loss or _default_loss(teacher)
            pair = Pair(self._tokenizer, teacher.tokenizer, rule, plain_template=teacher.plain_template, **settings)
            self._teachers.append((teacher, one[1], pair))
        #: Of the last micro-batch, in this process; and over all processes, since the figures were last logged.
        self._found: list[dict[str, Tensor]] = []
        self._sums: dict[str, list[dict[str, Tensor]]] = {"train": [], "eval": []}

    def _teacher(self, given: Any, tokenizer: Any) -> Teacher:
        if isinstance(given, ServerTeacher):
            if (unknown := given.self_test()) is not None:
                warnings.warn(f"{given.client.url}: {unknown}", stacklevel=3)
            return given
        if isinstance(given, LocalTeacher):
            return given
        args = self.args
        options: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
        if args.teacher_model_revision is not None:
            options["revision"] = args.teacher_model_revision
        if isinstance(given, str):
            source = given
            given = create_model_from_path(
                source, **{"device_map": None, **options, **(args.teacher_model_init_kwargs or {})}
            )
        elif hasattr(given, "get_output_embeddings"):
            source = given.config._name_or_path
        else:
            raise XTokMapError(
                f"teacher_model is {type(given).__name__}: expected a hub id or path, a causal language model, a "
                "LocalTeacher, a ServerTeacher, or a list of (one of these, weight)"
            )
        if tokenizer is None:
            if not source:
                raise XTokMapError("the teacher model is from nowhere: pass its tokenizer as teacher_processing_class")
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if getattr(given, "hf_device_map", None) is None:
            given = given.to(self.accelerator.device)
        return LocalTeacher(given, tokenizer, micro_batch=args.per_device_train_batch_size)

    # ---- TRL's hooks ---------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's generation batch, and what the teachers think of each of its rows."""
        inputs = [{**row, "prompt": _asked(row)} for row in inputs]
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        sides = [
            [row[flags].tolist() for row, flags in zip(output[f"{name}_ids"].cpu(), mask.cpu().bool(), strict=True)]
            for name, mask in (("prompt", output["prompt_mask"]), ("completion", output["completion_mask"]))
        ]
        scored = [self._scored(*teacher, inputs, *sides) for teacher in self._teachers]
        output[_ROWS] = [_Row(scored, b, ids) for b, ids in enumerate(sides[1])]
        return output

    def _scored(
        self,
        teacher: Teacher,
        weight: Weight,
        pair: Pair,
        inputs: list[dict[str, Any]],
        prompts: list[list[int]],
        completions: list[list[int]],
    ) -> View:
        weights = [float(weight(row) if callable(weight) else weight) for row in inputs]
        # A teacher that nobody asks scores one row, so that there are figures of it in every process.
        rows = [b for b, w in enumerate(weights) if w] or [0]
        asked = [inputs[b]["prompt"] for b in rows]
        if isinstance(asked[0], str):
            theirs = teacher.tokenizer(asked).input_ids
        else:
            theirs = teacher.render([{"messages": p, "chat_template_kwargs": self.chat_template_kwargs} for p in asked])
        batch = pair.prepare(
            ([prompts[b] for b in rows], theirs), [completions[b] for b in rows], device=self.accelerator.device
        )
        return View(pair, batch, pair.scores(teacher, batch), weights, {b: k for k, b in enumerate(rows)})

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, sum of the student's entropies and number of tokens, of a micro-batch in this process."""
        rows: list[_Row] = inputs[_ROWS]
        student = self._student_rows(unwrapped_student, inputs, [row.ids for row in rows])
        tokens = inputs["completion_mask"].sum()
        denominator = tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        total = student.rows[:0].sum()  # there is a gradient, if of nothing
        lengths = [len(row.ids) for row in rows]
        views = rows[0].scored
        sums: list[dict[str, Tensor]] = [{} for _ in views]
        numbers = [row.number for row in rows]
        found = list(shares(views, student, numbers, lengths=lengths, denominator=denominator))
        for share in found:
            total = total + share.weight * share.found.loss
            own = sums[views.index(share.view)]
            for name, value in share.found.sums.items():
                own[name] = own.get(name, 0) + value.sum()
        self._found = sums
        entropy, places = entropy_sum(student, 1, entropies(found, sum(lengths)))
        return total, entropy, places

    def _student_rows(self, model: Any, inputs: dict[str, Any], completions: list[list[int]]) -> Logits:
        """The student's rows that score the completions' tokens, flat: hidden states and the head where it has them."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        width = inputs["completion_ids"].shape[1]
        at = padded_places(completions, width).to(ids.device)
        body, head = body_and_head(model)
        if body is None:
            last = {"logits_to_keep": width + 1} if "logits_to_keep" in self.model_kwarg_keys else {}
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **last).logits[:, -width - 1 : -1]
            return Logits(logits.flatten(0, 1).index_select(0, at), temperature=self.temperature)
        hidden = self._get_last_hidden_state(model, ids, mask, width)
        return headed(model, head, hidden.flatten(0, 1).index_select(0, at), self.temperature)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's, and the figures summed up over the processes: not inside the loss, where DDP or FSDP is at work."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        sums = self._sums["train" if self.model.training else "eval"]
        sums += [{} for _ in self._found[len(sums) :]]
        for total, own in zip(sums, self._found, strict=True):
            names = sorted(own)
            together = self.accelerator.reduce(torch.stack([own[name].double() for name in names]), "sum")
            for name, value in zip(names, together, strict=True):
                total[name] = total.get(name, 0) + value
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the figures since the last time."""
        mode = "train" if self.model.training else "eval"
        for k, sums in enumerate(self._sums[mode]):
            prefix = f"teacher_{k}/" if len(self._teachers) > 1 else ""
            for name, value in means(sums).items():
                self._metrics[mode][prefix + name].append(value.item())
        self._sums[mode] = []
        super().log(logs, start_time)


class _Row:
    """One row of a generation batch. A plain object: wrappers of models look into tuples, dicts and dataclasses."""

    def __init__(self, scored: list[View], number: int, ids: list[int]) -> None:
        self.scored, self.number, self.ids = scored, number, ids


def _asked(row: Mapping[str, Any]) -> Any:
    """A row's prompt; of one with messages alone what comes before the last answer."""
    if row.get("prompt") is not None:
        return row["prompt"]
    messages = row.get("messages")
    if not messages:
        raise XTokMapError(f'a row of the data set has neither "prompt" nor "messages", but {", ".join(row)}')
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _default_loss(teacher: Teacher) -> str:
    """The loss that asks most of what a teacher gives; a server has said so in its self-test."""
    if not isinstance(teacher, ServerTeacher):
        return "transfer_kl"
    return AUTO["none" if teacher.rows == "top" and not teacher.topk else teacher.rows]

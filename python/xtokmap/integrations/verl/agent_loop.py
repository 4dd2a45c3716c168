"""Workers that ask a teacher of another family, and their manager for verl's older trainer (`trainer.use_v1=false`).

`transfer_queue` has them for the newer one.
"""

from __future__ import annotations

import inspect
from typing import Any

import ray
import verl
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import AgentLoopManager, AgentLoopWorker
from verl.utils import hf_tokenizer
from verl.utils.fs import copy_to_local

from xtokmap._core import XTokMapError
from xtokmap.chat import Prompt, render
from xtokmap.integrations.verl.columns import lay
from xtokmap.integrations.verl.plugin import LOSS_MODES
from xtokmap.torch.pair import Pair

__all__ = ["CrossFamily", "CrossFamilyManager", "CrossFamilyWorker"]

_HOOK = ["self", "output", "prompt_ids", "response_ids", "validate", "sample_kwargs"]
_found = list(inspect.signature(AgentLoopWorker._compute_teacher_logprobs).parameters)
if [name for name in _found if not name.startswith("_ray_")] != _HOOK:  # Ray adds to the methods of what it runs
    raise XTokMapError(
        f"verl {verl.__version__}: AgentLoopWorker._compute_teacher_logprobs takes {_found}, not {_HOOK}; this was "
        "written for verl 0.9: install that, or a newer xtokmap"
    )


class CrossFamily:
    """Mixed into a worker: the teacher is asked about the student's response as its own tokenizer has it.

    Both prompts are the sample's `raw_prompt` (messages), each side's in its own chat template. The response is
    retokenized, the teacher scores it, and each student token gets the sum of its chunk (`columns`).

    Raises:
        XTokMapError: at the start, a `loss_mode` that is none of `plugin.LOSS_MODES`, and tools; for a sample, a
            response with turns that the student did not write, or images, video or audio; a teacher's server that
            answers for other ids than it was asked for.
        UnsupportedTokenizerError: at the start, a tokenizer whose tokens' bytes cannot be known exactly.
    """

    # Of verl's worker.
    config: Any
    model_config: Any
    tokenizer: Any
    tools: Any
    distillation_enabled: bool
    teacher_key: str
    teacher_server_manager: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pairs: dict[str, Pair] = {}
        if not self.distillation_enabled:
            return
        mode = self.teacher_server_manager.distillation_loss_config.loss_mode
        if mode not in LOSS_MODES:
            raise XTokMapError(
                f"loss_mode={mode} compares tokens of one vocabulary; use one of {', '.join(LOSS_MODES)}"
            )
        if self.tools:
            raise XTokMapError("tools: a response with a tool's turns is not rendered for a teacher of another family")
        trust = self.model_config.trust_remote_code
        for key, teacher in self.teacher_server_manager.teacher_model_configs.items():
            tokenizer = hf_tokenizer(copy_to_local(teacher.model_path), trust_remote_code=trust)
            self._pairs[key] = Pair(self.tokenizer, tokenizer, loss=LOSS_MODES[mode])

    async def _compute_teacher_logprobs(
        self,
        output: Any,
        prompt_ids: list[int],
        response_ids: list[int],
        validate: bool,
        sample_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not self.distillation_enabled or validate:
            return
        if not all(output.response_mask):
            raise XTokMapError("a response with turns that the student did not write: single turns are retokenized")
        if any(value is not None and len(value) for value in (output.multi_modal_data or {}).values()):
            raise XTokMapError("images, video or audio cannot be put to a teacher of another family")
        sample = sample_kwargs or {}
        key: Any = sample.get(self.teacher_key)
        key = key.item() if hasattr(key, "item") else key  # of numpy
        pair = self._pairs[self.teacher_server_manager._resolve_teacher_key(key)]
        arguments = OmegaConf.to_container(OmegaConf.create(self.config.data.get("apply_chat_template_kwargs") or {}))
        asked = Prompt(list(sample["raw_prompt"]), chat_template_kwargs=arguments)
        teacher_prompts = render(pair.tokenizers[1], [asked], pair.plain_template)
        batch = pair.prepare(([prompt_ids], teacher_prompts), [response_ids])
        sequence = teacher_prompts[0] + batch.teacher_ids[0]
        answered, logprobs = await self.teacher_server_manager.compute_teacher_logprobs_single(
            sequence_ids=sequence, routing_key=key
        )
        # Row i scores token i + 1, and there is none behind the last.
        if answered[:-1, 0].tolist() != sequence[1:]:
            raise XTokMapError("the teacher's server answered for other ids than it was asked for")
        scored = logprobs[len(teacher_prompts[0]) - 1 : -1, 0]
        ids, sums = lay(batch.index, scored, len(prompt_ids), len(response_ids))
        output.extra_fields["teacher_ids"], output.extra_fields["teacher_logprobs"] = ids, sums


class CrossFamilyWorker(CrossFamily, AgentLoopWorker):  # type: ignore[misc]
    """verl's worker with a teacher of another family."""


class CrossFamilyManager(AgentLoopManager):  # type: ignore[misc]
    """verl's manager with such workers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(CrossFamilyWorker)

"""The workers of `agent_loop` for verl's newer trainer, where they put what they have into a TransferQueue."""

from __future__ import annotations

from typing import Any

import ray
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from xtokmap.integrations.verl.agent_loop import CrossFamily

__all__ = ["CrossFamilyManagerTQ", "CrossFamilyWorkerTQ"]

#: verl's class is an actor's already: the plain one under it.
_Plain: Any = AgentLoopWorkerTQ.__ray_metadata__.modified_class.__ray_actor_class__


class CrossFamilyWorkerTQ(CrossFamily, _Plain):  # type: ignore[misc]
    """verl's worker with a teacher of another family."""


class CrossFamilyManagerTQ(AgentLoopManagerTQ):  # type: ignore[misc]
    """verl's manager with such workers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # which sets verl's own
        self.agent_loop_workers_class = ray.remote(CrossFamilyWorkerTQ)

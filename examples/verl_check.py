"""Before a run of verl: `python examples/verl_check.py STUDENT TEACHER` (paths or hub ids).

verl keeps quiet about a plugin that it could not load. This says whether it knows the losses and whether its workers
are those that xtokmap was written for, how well the two tokenizers meet, and prints what the run is to be started with.
"""

import sys

from transformers import AutoTokenizer

from xtokmap.integrations.verl import agent_loop, plugin, transfer_queue  # raises where they do not fit this verl
from xtokmap.torch import Pair

TEXT = "The sky is blue; 3.14 * 2 = 6.28.\n\n    def naïve(x): return x  # 你好 🙂"


def check(student, teacher):
    from verl.trainer.distillation.losses import get_distillation_loss_settings

    known = [name for name in plugin.LOSS_MODES if get_distillation_loss_settings(name).use_estimator]
    pair = Pair(AutoTokenizer.from_pretrained(student), AutoTokenizer.from_pretrained(teacher), loss="prior")
    ids = pair.tokenizers[0].encode(TEXT, add_special_tokens=False)
    _, batch = pair.aligner.retokenize([ids])
    print(f"losses: {', '.join(known)}; workers: {agent_loop.CrossFamilyWorker.__name__}")
    print(f"coverage: {batch.coverage:.3f}, {batch.num_chunks} chunks of {len(ids)} tokens")
    manager = transfer_queue.CrossFamilyManagerTQ
    return {
        "+actor_rollout_ref.rollout.agent.agent_loop_manager_class": f"{manager.__module__}.{manager.__qualname__}",
        "distillation.enabled": "true",
        "distillation.teacher_models.teacher_model.model_path": teacher,
        "distillation.distillation_loss.loss_mode": "xtokmap_prior",
        "distillation.distillation_loss.loss_max_clamp": 10,
        "distillation.distillation_loss.use_policy_gradient": "true",
        "distillation.distillation_loss.use_task_rewards": "false",
    }


if __name__ == "__main__":
    print("python -m verl.trainer.main_ppo", *(f"{key}={value}" for key, value in check(*sys.argv[1:3]).items()))

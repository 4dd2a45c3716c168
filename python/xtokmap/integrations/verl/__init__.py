"""verl: a teacher of another family, in verl's own on-policy distillation.

    +actor_rollout_ref.rollout.agent.agent_loop_manager_class=
        xtokmap.integrations.verl.transfer_queue.CrossFamilyManagerTQ
    distillation.distillation_loss.loss_mode=xtokmap_prior
    distillation.distillation_loss.use_policy_gradient=true

`plugin` registers the losses (verl finds it by its entry point), `agent_loop` and `transfer_queue` ask the teacher, and
`columns` is how chunks travel from the one to the other. Nothing here is imported before it is asked for.
"""

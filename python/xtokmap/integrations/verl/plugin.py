"""The losses that verl finds by name, `loss_mode=xtokmap_prior` and so on; loaded by its entry point `verl.plugins`.

verl keeps quiet about a plugin that fails to load, and then does not know the name: `import
xtokmap.integrations.verl.plugin` says why.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from verl.trainer.distillation.losses import DistillationLossSettings, register_distillation_loss
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.padding import no_padding_2_padding

from xtokmap._core import XTokMapError
from xtokmap.integrations.verl.columns import read
from xtokmap.losses.credit import CREDITS, CreditRule, chunk_credit, chunk_gap

#: By `loss_mode`. `cover` needs the teacher's rows, which do not travel.
LOSS_MODES: dict[str, CreditRule] = {f"xtokmap_{credit}": credit for credit in CREDITS if credit != "cover"}


@register_distillation_loss(DistillationLossSettings(names=list(LOSS_MODES), use_estimator=True))  # type: ignore[untyped-decorator]
def credit_loss(
    config: Any, distillation_config: Any, model_output: dict[str, Any], data: Any
) -> tuple[Tensor, dict[str, Any]]:
    """Minus the advantages that `chunk_credit` gives to the response's tokens: float32 `[B, R]`, and metrics.

    verl makes a policy gradient of them, clamps them to +-`loss_max_clamp`, and averages over all response tokens, of
    which those without a signal count as 0.

    Raises:
        XTokMapError: without `use_policy_gradient`, or where another worker has asked the teacher.
    """
    settings = distillation_config.distillation_loss
    if not settings.use_policy_gradient:
        raise XTokMapError(
            f"loss_mode={settings.loss_mode}: credits are advantages, which nothing flows back through; set "
            "distillation.distillation_loss.use_policy_gradient=true"
        )
    logprobs = no_padding_2_padding(model_output["log_probs"], data).detach()
    mask = _padded(data["response_mask"], 0).bool()
    old = data.get("old_log_probs", None)
    sampled = logprobs if old is None else _padded(old, 0.0)
    ids, sums = (no_padding_2_padding(data[name], data) for name in ("teacher_ids", "teacher_logprobs"))
    teacher, index = read(ids, sums, mask)
    credit = LOSS_MODES[settings.loss_mode]
    given = chunk_credit(sampled, teacher, index, credit, clamp=settings.loss_max_clamp)
    nats, nbytes = chunk_gap(sampled, teacher, index)
    tokens = mask.sum().clamp(min=1)
    figures = {
        "kl_per_byte": nats.sum() / nbytes.sum().clamp(min=1),
        "scored": given.scored.sum() / tokens,
        "clamped": given.clamped.sum() / tokens,
        "abs_loss": given.advantages.abs().sum() / tokens,
    }
    metrics = {f"distillation/{name}": Metric(AggregationType.MEAN, value) for name, value in figures.items()}
    return -given.advantages, metrics


def _padded(x: Tensor, fill: float) -> Tensor:
    return x.to_padded_tensor(fill) if x.is_nested else x


__all__ = ["LOSS_MODES", "credit_loss"]

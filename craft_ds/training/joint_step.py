"""The retention step without a second gradient, for rules whose weights are known before the step.

Without projection the merged gradient is a·(g_t + w·g_r) with w = b/a, so that both losses can be added in
one accumulation: there is no copy of g_t, there are no products, and nothing is merged. Cosine and conflict,
which need both gradients, are then not measured.
"""

import math
from collections.abc import Iterable, Sequence

import torch

from craft_ds.algorithm.gradient_surgery import MergedGradient, clip_factor, weights_without_projection
from craft_ds.algorithm.gram import scale_, squared_norm
from craft_ds.algorithm.multiplier import StepMultiplier
from craft_ds.config.craft_config import CraftConfig
from craft_ds.engines.base import Batch, Engine, Loss
from craft_ds.policies.token_loss import token_loss
from craft_ds.training.train_step import (
    Batches,
    StepResult,
    accumulate,
    fp64,
    mean_retention_losses,
    measure,
    sum_together,
)


def joint_step(
    engine: Engine,
    *,
    task: Batches,
    anchors: Batches,
    anchor_tokens: int,
    constraint: Iterable[Batch] | None,
    multiplier: float | tuple[float, ...] | StepMultiplier,
    craft: CraftConfig,
    max_norm: float,
    anchor_loss: Loss = token_loss,
    extra: Sequence[float] = (),
) -> StepResult:
    """Take a retention step where `craft.adds_losses`. Collective: call on all ranks.

    Equal to `craft_ds.training.train_step.retention_step` up to rounding. It has one more all-reduce of two
    numbers: the token counts, which weight the anchors' loss and must be known before their backward pass.

    Args:
        engine: Holds the model and the optimizer.
        task: This rank's micro-batches of the task.
        anchors: This rank's micro-batches of the anchors that give the retention gradient.
        anchor_tokens: Their number of supervised tokens.
        constraint: As for `retention_step`.
        multiplier: λ, or λ of each task.
        craft: As for `retention_step`.
        max_norm: Maximum norm of the merged gradient; 0 or less: no clipping.
        anchor_loss: The retention loss; with one λ per task, its sums by task.
        extra: As for `retention_step`.

    Returns:
        The outcome, without a Gram triple; `merged` has no cosine.
    """
    assert not callable(multiplier), "λ is known before the step"
    if isinstance(multiplier, tuple):  # which weights the losses of the tasks
        weights, used, factor = multiplier, sum(multiplier) / len(multiplier), 1.0
    else:
        weights, used, factor = (), multiplier, multiplier
    a, b = weights_without_projection(factor, craft)
    task_sums = accumulate(engine, task, ends=False)
    ((tokens, r_tokens),) = sum_together(
        engine, torch.stack([task_sums.tokens, fp64(engine, [anchor_tokens]).sum()])
    )
    per_token, per_anchor_token = 1.0 / max(tokens, 1.0), 1.0 / max(r_tokens, 1.0)
    ratio = b / a * per_anchor_token / per_token
    anchor_sums = accumulate(engine, anchors, anchor_loss, weights, factor=ratio)
    gradient = engine.gradient()
    constraint_sums = anchor_sums if constraint is None else measure(engine, constraint, anchor_loss)
    product, (loss_sum,), measured, summed_extra = sum_together(
        engine,
        (squared_norm(gradient).to(engine.device) / engine.replicas)[None],
        task_sums.loss[None],
        torch.stack(constraint_sums).flatten(),
        fp64(engine, extra),
    )

    task_losses, retention_loss = mean_retention_losses(measured, len(weights))
    loss, norm = loss_sum * per_token, a * per_token * math.sqrt(max(product[0], 0.0))
    result = StepResult(
        loss,
        norm,
        math.isfinite(loss + (retention_loss or 0.0) + norm),
        int(tokens),
        tuple(summed_extra),
        retention_loss,
        merged=MergedGradient(a, b, conflict=False, cosine=math.nan, norm=norm),
        multiplier=used,
        task_multipliers=weights,
        task_losses=task_losses,
    )
    if not result.applied:
        engine.zero_grad()
        return result
    scale_(gradient, clip_factor(norm, max_norm) * a * per_token)
    engine.step()
    return result

"""The retention step without a second gradient, for rules whose weights are known before the step.

Without projection the merged gradient is a·(g_t + w·g_r) with w = b/a, so both losses accumulate in one
gradient. This saves the copy of g_t, the products and the merge. Cosine and conflict need both gradients and
are not measured.
"""

import math
from collections.abc import Iterable, Sequence

import torch

from craft_ds.algorithm.gradient_surgery import MergedGradient, clip_factor, weights_without_projection
from craft_ds.algorithm.gram import scale_, squared_norm
from craft_ds.algorithm.multiplier import StepMultiplier
from craft_ds.config.craft_config import CraftConfig
from craft_ds.engines.base import Batch, Engine, Loss
from craft_ds.engines.phase_timer import phase
from craft_ds.policies.device_copies import copy_to_device
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

    Equal to `craft_ds.training.train_step.retention_step` up to rounding. It has one more all-reduce, of the
    two token counts: they weight the anchors' loss and must be known before its backward pass. They stay on
    the device, so that the host does not wait.

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
    counts = torch.stack([task_sums.tokens, torch.full_like(task_sums.tokens, anchor_tokens)])
    all_tokens, all_anchor_tokens = engine.sum_over_ranks(counts).clamp(min=1.0)
    ratio = b / a * all_tokens / all_anchor_tokens
    anchor_sums = accumulate(engine, anchors, anchor_loss, weights, factor=ratio.float(), name="retention")
    gradient = engine.gradient()
    constraint_sums = anchor_sums if constraint is None else measure(engine, constraint, anchor_loss)
    with phase("clipping"):
        product = copy_to_device(squared_norm(gradient), engine.device) / engine.replicas
    (square, loss_sum, tokens), measured, summed_extra = sum_together(
        engine,
        torch.stack([product, *task_sums]),
        torch.stack(constraint_sums).flatten(),
        fp64(engine, extra),
    )

    task_losses, retention_loss = mean_retention_losses(measured, len(weights))
    per_token = 1.0 / max(tokens, 1.0)
    loss, norm = loss_sum * per_token, a * per_token * math.sqrt(square)
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
    with phase("clipping"):
        scale_(gradient, clip_factor(norm, max_norm) * a * per_token)
    with phase("optimizer"):
        engine.step()
    return result

"""The two kinds of optimizer step: a task step, and a retention step with its gradient surgery.

Each is one screen of the algorithm over an engine. Losses are sums over tokens; the division by the
global token count is a scalar that rides in the merge, so a step communicates, besides what the engine
moves, one all-reduce of at most nine numbers.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from craft_ds.algorithm.gradient_surgery import GramTriple, MergedGradient, clip_factor, merge
from craft_ds.algorithm.gram import gram, merge_, scale_, squared_norm
from craft_ds.config.configs import CraftConfig
from craft_ds.engines.base import Batch, Engine


class PassSums(NamedTuple):
    """What one pass over this rank's micro-batches saw: fp64 scalars on the device.

    Attributes:
        loss: Sum of the loss over tokens.
        tokens: Number of supervised tokens.
    """

    loss: Tensor
    tokens: Tensor


class StepResult(NamedTuple):
    """What a step saw, the same on all ranks.

    Attributes:
        loss: Mean task loss over all tokens of all ranks.
        grad_norm: Norm of the (merged) gradient before clipping.
        applied: False where something was not finite and nothing was changed.
        leave: Whether any rank was asked to leave.
    """

    loss: float
    grad_norm: float
    applied: bool
    leave: bool


class RetentionResult(NamedTuple):
    """What the retention half of a step saw, the same on all ranks.

    Attributes:
        loss: L_ret, the mean loss on the anchors that measure the constraint.
        triple: Gram triple of the two mean gradients.
        merge: How they were merged.
    """

    loss: float
    triple: GramTriple
    merge: MergedGradient


def accumulate(engine: Engine, batches: Iterable[Batch]) -> PassSums:
    """One complete pass: forward and backward over all micro-batches. Collective."""
    sums = PassSums(*torch.zeros(2, dtype=torch.float64, device=engine.device))
    pending = list(batches)
    while pending:
        loss = engine.forward(pending.pop(0))
        engine.backward(loss.total, last=not pending)
        sums = PassSums(sums.loss + loss.total.detach().double(), sums.tokens + loss.count.double())
    return sums


def measure(engine: Engine, batches: Iterable[Batch]) -> PassSums:
    """The same without gradients. Collective."""
    sums = PassSums(*torch.zeros(2, dtype=torch.float64, device=engine.device))
    for batch in batches:
        loss = engine.evaluate(batch)
        sums = PassSums(sums.loss + loss.total.double(), sums.tokens + loss.count.double())
    return sums


def task_step(engine: Engine, batches: Iterable[Batch], max_norm: float, leave: bool = False) -> StepResult:
    """A plain step on the task loss, clipped to `max_norm`. Collective: call on all ranks.

    Args:
        engine: Holds the model and the optimizer.
        batches: This rank's micro-batches.
        max_norm: Clip the gradient to this norm; 0 or less: do not.
        leave: Whether this rank was asked to leave; the others hear of it with the sums.
    """
    task = accumulate(engine, batches)
    # `to`: offloaded shards lie on the CPU while the sums of a pass lie on its device.
    product = squared_norm(engine.gradient()).to(engine.device) / engine.replicas
    tt, loss_sum, tokens, leaving = engine.sum_scalars(torch.stack([product, *task, _flag(engine, leave)]))
    to_mean = engine.world_size / max(tokens, 1.0)
    loss, norm = loss_sum / max(tokens, 1.0), to_mean * math.sqrt(max(tt, 0.0))
    if not math.isfinite(loss + norm):
        engine.zero_grad()
        return StepResult(loss, norm, applied=False, leave=leaving > 0)
    scale_(engine.gradient(), to_mean * clip_factor(norm, max_norm))
    engine.step()
    return StepResult(loss, norm, applied=True, leave=leaving > 0)


def retention_step(
    engine: Engine,
    batches: Iterable[Batch],
    anchors: Iterable[Batch],
    constraint: Iterable[Batch] | None,
    multiplier: float,
    craft: CraftConfig,
    max_norm: float,
    leave: bool = False,
) -> tuple[StepResult, RetentionResult]:
    """A step with a second backward pass on anchors and gradient surgery. Collective.

    Args:
        engine: Holds the model and the optimizer.
        batches: This rank's micro-batches of the task.
        anchors: This rank's micro-batches of anchors whose gradient is followed.
        constraint: This rank's micro-batches of anchors that measure L_ret; None: `anchors` do.
        multiplier: λ.
        craft: How to project and merge.
        max_norm: Clip the merged gradient to this norm; 0 or less: do not.
        leave: As for `task_step`.
    """
    task = accumulate(engine, batches)
    g_t = engine.take_gradient()
    retention = accumulate(engine, anchors)
    g_r = engine.gradient()
    constrained = retention if constraint is None else measure(engine, constraint)

    # Nine numbers, 72 bytes: all that surgery, logging and the dual step need to know of other ranks.
    products = gram(g_t, g_r).to(engine.device) / engine.replicas
    flag = _flag(engine, leave)
    scalars = torch.cat([products, torch.stack([*task, retention.tokens, *constrained, flag])])
    tt, tr, rr, loss_sum, tokens, r_tokens, c_loss_sum, c_tokens, leaving = engine.sum_scalars(scalars)

    task_mean = engine.world_size / max(tokens, 1.0)
    retention_mean = engine.world_size / max(r_tokens, 1.0)
    triple = GramTriple(tt, tr, rr).scaled(task_mean, retention_mean)
    merged = merge(triple, multiplier, craft)
    loss, retention_loss = loss_sum / max(tokens, 1.0), c_loss_sum / max(c_tokens, 1.0)
    seen = RetentionResult(retention_loss, triple, merged)
    if not (triple.is_finite and math.isfinite(loss + retention_loss)):
        engine.zero_grad()
        return StepResult(loss, merged.norm, applied=False, leave=leaving > 0), seen
    clip = clip_factor(merged.norm, max_norm)
    merge_(g_r, g_t, clip * merged.a * task_mean, clip * merged.b * retention_mean)
    engine.step()
    return StepResult(loss, merged.norm, applied=True, leave=leaving > 0), seen


def _flag(engine: Engine, value: bool) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64, device=engine.device)

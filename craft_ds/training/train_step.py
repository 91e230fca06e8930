"""The two kinds of optimizer step: a task step, and a retention step with gradient surgery.

Each reads like the algorithm over an engine. Losses and gradients are sums over tokens and ranks; the
division by the global token count is a scalar that is applied with the merge. So a step communicates,
besides what the engine moves, one all-reduce of at most ten numbers, and four more with a penalty.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from craft_ds.algorithm.gradient_surgery import MergedGradient, clip_factor, merge
from craft_ds.algorithm.gram import gram, merge_, scale_, squared_norm
from craft_ds.algorithm.gram_triple import GramTriple
from craft_ds.algorithm.multiplier import StepMultiplier
from craft_ds.algorithm.penalty import PenaltySums, QuadraticPenalty
from craft_ds.config.craft_config import CraftConfig
from craft_ds.engines.base import Batch, Engine, Loss
from craft_ds.policies.token_loss import token_loss


class TokenSums(NamedTuple):
    """Sums of one pass over this rank's micro-batches: fp64 scalars on the device.

    Attributes:
        loss: Sum of the loss over tokens.
        tokens: Number of supervised tokens.
    """

    loss: Tensor
    tokens: Tensor


class StepResult(NamedTuple):
    """Outcome of a step, the same on all ranks.

    Attributes:
        loss: Mean task loss over all tokens of all ranks, without the penalty.
        grad_norm: Norm of the (merged) gradient before clipping, with the penalty's.
        applied: False if a loss or gradient was non-finite and nothing was changed.
        tokens: Supervised task tokens of all ranks.
        extra: Sums over ranks of the extra scalars that the caller passed in.
        retention_loss: L_ret, the mean loss on the anchors that measure the constraint; None in a task step.
        triple: Gram triple of the two mean gradients; None in a task step. The penalty's is part of g_t.
        merged: Weights of the merged gradient; None in a task step.
        multiplier: λ as used in the step; None in a task step.
        penalty_loss: The penalty at the start of the step; 0 without one.
    """

    loss: float
    grad_norm: float
    applied: bool
    tokens: int = 0
    extra: tuple[float, ...] = ()
    retention_loss: float | None = None
    triple: GramTriple | None = None
    merged: MergedGradient | None = None
    multiplier: float | None = None
    penalty_loss: float = 0.0


def accumulate(engine: Engine, batches: Iterable[Batch], loss: Loss = token_loss) -> TokenSums:
    """Run one complete pass: forward and backward over all micro-batches. Collective."""
    sums = _no_tokens(engine)
    for batch, last in _mark_last(batches):
        found = engine.forward(batch, loss)
        engine.backward(found.total, last=last)
        sums = TokenSums(sums.loss + found.total.detach().double(), sums.tokens + found.count.double())
    return sums


def measure(engine: Engine, batches: Iterable[Batch], loss: Loss = token_loss) -> TokenSums:
    """Run forward over all micro-batches in eval mode, without gradients. Collective."""
    sums = _no_tokens(engine)
    for batch in batches:
        found = engine.evaluate(batch, loss)
        sums = TokenSums(sums.loss + found.total.double(), sums.tokens + found.count.double())
    return sums


def task_step(
    engine: Engine,
    batches: Iterable[Batch],
    max_norm: float,
    extra: Sequence[float] = (),
    penalty: QuadraticPenalty | None = None,
) -> StepResult:
    """Take a plain step on the task loss, clipped to `max_norm`. Collective: call on all ranks.

    Args:
        engine: Holds the model and the optimizer.
        batches: This rank's micro-batches.
        max_norm: Maximum norm of the gradient; 0 or less: no clipping.
        extra: Scalars of the caller to sum over ranks in the step's all-reduce; not interpreted here, and
            read after the last batch of the task.
        penalty: Is added to the task loss; None: no penalty.
    """
    task = accumulate(engine, batches)
    g_t = engine.gradient()
    # Offloaded shards are on the CPU while the sums of a pass are on the engine's device.
    product = squared_norm(g_t).to(engine.device) / engine.replicas
    local_penalty = _penalty_sums(engine, penalty, g_t)
    (tt, loss_sum, tokens), added, extras = _sum(engine, product, *task, penalty=local_penalty, extra=extra)

    per_token = 1.0 / max(tokens, 1.0)
    triple = added.scaled(per_token).added_to(GramTriple(tt, 0.0, 0.0).scaled(per_token, 0.0))
    loss, norm = loss_sum * per_token, triple.norm(1.0, 0.0)
    finite = math.isfinite(loss + norm)
    result = StepResult(loss, norm, finite, int(tokens), extras, penalty_loss=added.loss)
    if not result.applied:
        engine.zero_grad()
        return result
    clip = clip_factor(norm, max_norm)
    scale_(g_t, clip * per_token)
    if penalty is not None:
        penalty.add_gradient_(g_t, engine.masters(), clip)
    engine.step()
    return result


def retention_step(
    engine: Engine,
    *,
    task: Iterable[Batch],
    anchors: Iterable[Batch],
    constraint: Iterable[Batch] | None,
    multiplier: float | StepMultiplier,
    craft: CraftConfig,
    max_norm: float,
    anchor_loss: Loss = token_loss,
    extra: Sequence[float] = (),
    penalty: QuadraticPenalty | None = None,
) -> StepResult:
    """Take a step with a second backward pass on anchors and gradient surgery. Collective.

    Args:
        engine: Holds the model and the optimizer.
        task: This rank's micro-batches of the task.
        anchors: This rank's micro-batches of the anchors that give the retention gradient.
        constraint: This rank's micro-batches of the anchors that measure L_ret; None: `anchors` measure it.
        multiplier: λ, or how to compute it from the step's Gram triple and L_ret.
        craft: How to project and merge.
        max_norm: Maximum norm of the merged gradient; 0 or less: no clipping.
        anchor_loss: The retention loss.
        extra: As for `task_step`.
        penalty: As for `task_step`: surgery sees its gradient as part of g_t.
    """
    task_sums = accumulate(engine, task)
    g_t = engine.take_gradient()
    anchor_sums = accumulate(engine, anchors, anchor_loss)
    g_r = engine.gradient()
    constraint_sums = anchor_sums if constraint is None else measure(engine, constraint, anchor_loss)

    # All that surgery, logging and the dual step need from the other ranks: eight numbers and the extra ones.
    products = gram(g_t, g_r).to(engine.device) / engine.replicas
    scalars = (*products, *task_sums, anchor_sums.tokens, *constraint_sums)
    local_penalty = _penalty_sums(engine, penalty, g_t, g_r)
    sums, added, extras = _sum(engine, *scalars, penalty=local_penalty, extra=extra)
    tt, tr, rr, loss_sum, tokens, r_tokens, c_loss_sum, c_tokens = sums

    per_token, per_anchor_token = 1.0 / max(tokens, 1.0), 1.0 / max(r_tokens, 1.0)
    triple = GramTriple(tt, tr, rr).scaled(per_token, per_anchor_token)
    triple = added.scaled(per_token, per_anchor_token).added_to(triple)
    loss, retention_loss = loss_sum * per_token, c_loss_sum / max(c_tokens, 1.0)
    used = multiplier(triple, retention_loss) if callable(multiplier) else multiplier
    merged = merge(triple, used, craft)
    finite = triple.is_finite and math.isfinite(loss + retention_loss)
    result = StepResult(
        loss,
        merged.norm,
        finite,
        int(tokens),
        extras,
        retention_loss,
        triple,
        merged,
        used,
        added.loss,
    )
    if not result.applied:
        engine.zero_grad()
        return result
    clip = clip_factor(merged.norm, max_norm)
    merge_(g_r, g_t, clip * merged.a * per_token, clip * merged.b * per_anchor_token)
    if penalty is not None:
        penalty.add_gradient_(g_r, engine.masters(), clip * merged.a)
    engine.step()
    return result


def _no_tokens(engine: Engine) -> TokenSums:
    return TokenSums(*torch.zeros(2, dtype=torch.float64, device=engine.device))


def _penalty_sums(engine: Engine, penalty: QuadraticPenalty | None, *gradients: Sequence[Tensor]) -> Tensor:
    """Return this rank's part of the `PenaltySums`, fp64 on the device; empty without a penalty."""
    if penalty is None:
        return torch.zeros(0, dtype=torch.float64, device=engine.device)
    return penalty.sums(engine.masters(), *gradients).to(engine.device) / engine.replicas


def _sum(
    engine: Engine, *scalars: Tensor, penalty: Tensor, extra: Sequence[float]
) -> tuple[list[float], PenaltySums, tuple[float, ...]]:
    """Sum all scalars of a step over the ranks, in one all-reduce. Collective."""
    more = torch.tensor(extra, dtype=torch.float64, device=engine.device)
    summed = engine.sum_scalars(torch.cat([torch.stack(scalars), penalty, more]))
    first, second = len(scalars), len(scalars) + len(penalty)
    return summed[:first], PenaltySums(*summed[first:second]), tuple(summed[second:])


def _mark_last(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Yield each batch with whether it is the last, reading one batch ahead."""
    iterator = iter(batches)
    current = next(iterator, None)
    while current is not None:
        following = next(iterator, None)
        yield current, following is None
        current = following

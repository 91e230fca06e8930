"""The two kinds of optimizer step: a task step, and a retention step with gradient surgery.

Each reads like the algorithm over an engine. Losses and gradients are sums over tokens and ranks; the
division by the global token count is a scalar that is applied with the merge. So a step communicates,
besides what the engine moves, one all-reduce: ten numbers at most, three more per layer and two more per task
where surgery is by layer and λ by task, and four more with a penalty. The host waits for the device once, for
these numbers: they decide whether the step is skipped, and hold all that is logged.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import batched, islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from craft_ds.algorithm.gradient_surgery import MergedGradient, clip_factor, merge_layers, total_triple
from craft_ds.algorithm.gram import gram, merge_, scale_, squared_norm
from craft_ds.algorithm.gram_triple import GramTriple
from craft_ds.algorithm.layers import split_by_layer
from craft_ds.algorithm.multiplier import StepMultiplier
from craft_ds.algorithm.penalty import PenaltySums, QuadraticPenalty
from craft_ds.config.craft_config import CraftConfig
from craft_ds.engines.base import Batch, Engine, Loss
from craft_ds.engines.phase_timer import phase
from craft_ds.policies.device_copies import copy_to_device
from craft_ds.policies.token_loss import token_loss


class Batches(Protocol):
    """This rank's micro-batches of a pass: their number is known before they are read."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


class TokenSums(NamedTuple):
    """Sums of one pass over this rank's micro-batches: fp64 on the device, scalars or one entry per task.

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
        retention_loss: L_ret, the mean loss on the anchors that measure the constraint; None in a task step,
            and where no token was measured.
        triple: Gram triple of the two mean gradients; None in a task step, and where both losses accumulate
            in one gradient. The penalty's is part of g_t.
        merged: Weights of the merged gradient; None in a task step.
        multiplier: λ as used in the step, the mean of several; None in a task step.
        task_losses: With one λ per task: L_ret of each task, NaN for one without tokens in the step.
        task_multipliers: With one λ per task: λ of each.
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
    task_losses: tuple[float, ...] = ()
    task_multipliers: tuple[float, ...] = ()
    penalty_loss: float = 0.0


def accumulate(
    engine: Engine,
    batches: Batches,
    loss: Loss = token_loss,
    weights: Sequence[float] = (),
    *,
    factor: float | Tensor = 1.0,
    ends: bool = True,
    name: str = "task",
) -> TokenSums:
    """Run one complete pass: forward and backward over all micro-batches. Collective.

    Args:
        engine: Accumulates the gradient.
        batches: This rank's micro-batches.
        loss: The loss.
        weights: Weight of each task's loss in the gradient, where `loss` returns sums by task.
        factor: Weight of the loss in the gradient, a scalar; the returned sums are without it.
        ends: The gradient is complete after these micro-batches; False: another pass adds to it.
        name: Of the pass, in a profile.
    """
    sums, of_tasks = _no_tokens(engine), fp64(engine, weights)
    for number, batch in enumerate(batches, 1):
        with phase(f"{name}_forward"):
            found = engine.forward(batch, loss)
            total = (found.total * of_tasks.to(found.total.dtype)).sum() if weights else found.total
        with phase(f"{name}_backward"):
            engine.backward(total * factor, last=ends and number == len(batches))
        sums = TokenSums(sums.loss + found.total.detach().double(), sums.tokens + found.count.double())
    return sums


def measure(engine: Engine, batches: Iterable[Batch], loss: Loss = token_loss) -> TokenSums:
    """Run forward over all micro-batches in eval mode, without gradients. Collective."""
    sums = _no_tokens(engine)
    for batch in batches:
        with phase("constraint_forward"):
            found = engine.evaluate(batch, loss)
        sums = TokenSums(sums.loss + found.total.double(), sums.tokens + found.count.double())
    return sums


def task_step(
    engine: Engine,
    batches: Batches,
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
    with phase("clipping"):
        g_t = engine.gradient()
        # Offloaded shards are on the CPU while the sums of a pass are on the engine's device.
        product = copy_to_device(squared_norm(g_t), engine.device) / engine.replicas
    (tt, loss_sum, tokens), added, summed_extra = sum_together(
        engine, torch.stack([product, *task]), _penalty_sums(engine, penalty, g_t), fp64(engine, extra)
    )

    per_token, penalty_sums = 1.0 / max(tokens, 1.0), PenaltySums(*added)
    triple = penalty_sums.scaled(per_token).added_to(GramTriple(tt, 0.0, 0.0).scaled(per_token, 0.0))
    loss, norm = loss_sum * per_token, triple.norm(1.0, 0.0)
    finite = math.isfinite(loss + norm)
    result = StepResult(loss, norm, finite, int(tokens), tuple(summed_extra), penalty_loss=penalty_sums.loss)
    if not result.applied:
        engine.zero_grad()
        return result
    with phase("clipping"):
        clip = clip_factor(norm, max_norm)
        scale_(g_t, clip * per_token)
        if penalty is not None:
            penalty.add_gradient_(g_t, engine.masters(), clip)
    with phase("optimizer"):
        engine.step()
    return result


def retention_step(
    engine: Engine,
    *,
    task: Batches,
    anchors: Batches,
    constraint: Iterable[Batch] | None,
    multiplier: float | tuple[float, ...] | StepMultiplier,
    craft: CraftConfig,
    max_norm: float,
    anchor_loss: Loss = token_loss,
    retention_scale: float = 1.0,
    extra: Sequence[float] = (),
    penalty: QuadraticPenalty | None = None,
) -> StepResult:
    """Take a step with a second backward pass on anchors and gradient surgery. Collective.

    Args:
        engine: Holds the model and the optimizer.
        task: This rank's micro-batches of the task.
        anchors: This rank's micro-batches of the anchors that give the retention gradient.
        constraint: This rank's micro-batches of the anchors that measure L_ret; None: `anchors` measure it;
            empty: it is not measured.
        multiplier: λ; or λ of each task, which then weights the task's loss within the retention gradient; or
            how to compute it from the step's Gram triple and L_ret.
        craft: How to project and merge.
        max_norm: Maximum norm of the merged gradient; 0 or less: no clipping.
        anchor_loss: The retention loss; with one λ per task, its sums by task.
        retention_scale: Factor of what λ adds to the gradient, which clipping does not cancel (`merge`).
        extra: As for `task_step`.
        penalty: As for `task_step`: surgery sees its gradient as part of g_t.
    """
    weights = multiplier if isinstance(multiplier, tuple) else ()
    task_sums = accumulate(engine, task)
    with phase("surgery"):
        g_t = engine.take_gradient(craft.gradient_buffer)
    anchor_sums = accumulate(engine, anchors, anchor_loss, weights, name="retention")
    g_r = engine.gradient()
    t_layers, r_layers = (_layers(engine, gradient, craft) for gradient in (g_t, g_r))
    constraint_sums = anchor_sums if constraint is None else measure(engine, constraint, anchor_loss)
    with phase("surgery"):
        grams = torch.cat(
            [copy_to_device(gram(t, r), engine.device) for t, r in zip(t_layers, r_layers, strict=True)]
        )

    # All that surgery, logging and the dual step need from the other ranks: eight numbers and the extra ones,
    # and more with several layers or tasks, or a penalty.
    products, (loss_sum, tokens, r_tokens), measured, added, summed_extra = sum_together(
        engine,
        grams / engine.replicas,
        torch.stack([*task_sums, anchor_sums.tokens.sum()]),
        torch.stack(constraint_sums).flatten(),
        _penalty_sums(engine, penalty, g_t, g_r),
        fp64(engine, extra),
    )

    per_token, per_anchor_token = 1.0 / max(tokens, 1.0), 1.0 / max(r_tokens, 1.0)
    triples = [GramTriple(*row).scaled(per_token, per_anchor_token) for row in batched(products, 3)]
    penalty_sums = PenaltySums(*added)
    if penalty is not None:  # which requires surgery_scope=global: one triple
        triples = [penalty_sums.scaled(per_token, per_anchor_token).added_to(triples[0])]
    triple = total_triple(triples)
    task_losses, retention_loss = mean_retention_losses(measured, len(weights))
    loss = loss_sum * per_token
    used = multiplier(triple, retention_loss or 0.0) if callable(multiplier) else multiplier
    # With one λ per task, g_r is already weighted by them.
    merged, layers = merge_layers(triples, 1.0 if isinstance(used, tuple) else used, craft, retention_scale)
    result = StepResult(
        loss,
        merged.norm,
        triple.is_finite and math.isfinite(loss + (retention_loss or 0.0)),
        int(tokens),
        tuple(summed_extra),
        retention_loss,
        triple,
        merged,
        sum(used) / len(used) if isinstance(used, tuple) else used,
        task_multipliers=weights,
        task_losses=task_losses,
        penalty_loss=penalty_sums.loss,
    )
    if not result.applied:
        engine.zero_grad()
        return result
    with phase("surgery"):
        clip = clip_factor(merged.norm, max_norm)
        for t, r, layer in zip(t_layers, r_layers, layers, strict=True):
            merge_(r, t, clip * layer.a * per_token, clip * layer.b * per_anchor_token)
        if penalty is not None:
            penalty.add_gradient_(g_r, engine.masters(), clip * merged.a)
    with phase("optimizer"):
        engine.step()
    return result


def _layers(engine: Engine, gradient: Sequence[Tensor], craft: CraftConfig) -> list[Sequence[Tensor]]:
    """Return this rank's shards of a gradient by layer; all in one without `surgery_scope=layer`."""
    if craft.surgery_scope == "global":
        return [gradient]
    named = engine.module.policy.named_parameters()
    names = [name for name, parameter in named if parameter.requires_grad]
    return split_by_layer(names, engine.by_parameter(gradient))


def mean_retention_losses(sums: Sequence[float], tasks: int) -> tuple[tuple[float, ...], float | None]:
    """Return L_ret of each task and of all tokens together.

    Args:
        sums: Sums of the loss of each task, then their numbers of tokens; one entry each without tasks, or
            if nothing was measured.
        tasks: Number of tasks; 0: the loss is not by task.

    Returns:
        NaN for each task without tokens; and None without any.
    """
    losses, tokens = sums[: len(sums) // 2], sums[len(sums) // 2 :]
    if not sum(tokens):
        return (math.nan,) * tasks, None
    means = [total / count if count else math.nan for total, count in zip(losses, tokens, strict=True)]
    return tuple(means) if tasks else (), sum(losses) / sum(tokens)


def _no_tokens(engine: Engine) -> TokenSums:
    return TokenSums(*torch.zeros(2, dtype=torch.float64, device=engine.device))


def fp64(engine: Engine, values: Sequence[float]) -> Tensor:
    """Return values as a fp64 tensor on the engine's device, without waiting for it."""
    return copy_to_device(torch.tensor(values, dtype=torch.float64), engine.device)


def sum_together(engine: Engine, *parts: Tensor) -> list[list[float]]:
    """Sum several vectors over all ranks in one all-reduce. Collective."""
    with phase("all_reduce"):
        summed = iter(engine.sum_scalars(torch.cat(parts)))
    return [[*islice(summed, part.numel())] for part in parts]


def _penalty_sums(engine: Engine, penalty: QuadraticPenalty | None, *gradients: Sequence[Tensor]) -> Tensor:
    """Return this rank's part of the `PenaltySums`, fp64 on the device; empty without a penalty."""
    if penalty is None:
        return torch.zeros(0, dtype=torch.float64, device=engine.device)
    return copy_to_device(penalty.sums(engine.masters(), *gradients), engine.device) / engine.replicas

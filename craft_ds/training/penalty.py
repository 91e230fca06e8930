"""The penalty of a run: θ_0 and F as shards of the engine."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from craft_ds.algorithm.penalty import QuadraticPenalty
from craft_ds.anchors.cache_list import Anchors
from craft_ds.anchors.sampler import iter_split, to_policy_batch
from craft_ds.config.penalty import PenaltyConfig
from craft_ds.engines.base import Batch, Engine, ReadRange
from craft_ds.errors import UserError
from craft_ds.policies.token_loss import token_loss


def build_penalty(
    config: PenaltyConfig,
    engine: Engine,
    samples: Iterable[Batch],
    *,
    start: ReadRange | None,
    current: ReadRange,
) -> QuadraticPenalty | None:
    """Copy θ_0 from the engine's shards, and compute F for `ewc`. Collective: call on all ranks.

    F is not stored in checkpoints: a resumed run computes it again, from the same samples at the same θ_0.
    On another number of ranks or another engine it differs by rounding.

    Args:
        config: The validated flags.
        engine: Holds `current`.
        samples: For `ewc`: from `fisher_samples`.
        start: Reads θ_0 by name; None: it is `current`.
        current: Reads the present values of the engine by name.

    Returns:
        None without a penalty.

    Raises:
        UserError: F is non-finite.
    """
    if config.name == "none":
        return None
    if start is not None:
        engine.load_parameters(start)
    theta_0 = [master.clone() for master in engine.masters()]
    fisher = diagonal_fisher(engine, samples) if config.name == "ewc" else None
    if start is not None:
        engine.load_parameters(current)
    return QuadraticPenalty(config.weight, theta_0, fisher)


def diagonal_fisher(engine: Engine, samples: Iterable[Batch]) -> list[Tensor]:
    """Return the diagonal of the empirical Fisher information as fp32 shards. Collective.

    F = mean over samples of (∂ log p(y|x) / ∂θ)², where y are the action tokens recorded for the observation
    x, and −log p(y|x) is the sum, not the mean, of the token loss over one sample. The squares of single
    samples cannot be taken of a gradient that is already summed over ranks, so all ranks are given the same
    sample, and more ranks do not make it faster.

    Args:
        engine: Its parameters are not changed.
        samples: Batches of one sample, at least one, the same on all ranks.

    Raises:
        UserError: F is non-finite.
    """
    fisher = [torch.zeros_like(master) for master in engine.masters()]
    count = 0
    for sample in samples:
        torch.manual_seed(count)  # dropout, which must be the same in a resumed run
        # An engine sums over ranks.
        engine.backward(engine.forward(sample, token_loss).total / engine.world_size, last=True)
        for total, gradient in zip(fisher, engine.gradient(), strict=True):
            total.view(-1).addcmul_(gradient.view(-1), gradient.view(-1))
        engine.zero_grad()
        count += 1
    local = torch.zeros((), dtype=torch.float64, device=engine.device)
    for total in fisher:
        total.div_(count)
        local += total.double().sum().to(engine.device)
    (trace,) = engine.sum_scalars(local.reshape(1))
    if not math.isfinite(trace):
        raise UserError(
            "--penalty.name=ewc: the loss of an anchor has a non-finite gradient: check policy and anchors"
        )
    return fisher


def fisher_samples(cache: Anchors, count: int, device: torch.device) -> Iterator[Batch]:
    """Yield anchors of the training split one by one, evenly from all tasks, the same on all ranks.

    Args:
        cache: The anchors.
        count: Maximum number of anchors.
        device: Device of the batches.
    """
    for indices, _ in iter_split(cache, "train", batch_size=1, rank=0, world_size=1, limit=count):
        yield to_policy_batch(cache.read(indices), device)


def penalty_line(config: PenaltyConfig, cache: Anchors | None) -> str:
    """Return the line that describes the penalty at the start of a run."""
    anchors = ""
    if config.name == "ewc" and cache is not None:
        anchors = f", F of {min(config.fisher_samples, len(cache.splits['train']))} anchors"
    return f"✓ penalty: {config.name}, weight {config.weight:g}{anchors}"

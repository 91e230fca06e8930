"""Quadratic penalties on the distance from the policy that training started from, on local shards.

The loss is weight/2 · Σ F·(θ − θ_0)², elementwise over the trained parameters, with

- F = 1: L2-SP (Li et al. 2018, arXiv:1802.01483, eq. 2, without its term for new layers);
- F the diagonal of the empirical Fisher information on old data: elastic weight consolidation, EWC
  (Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3).

Its gradient is p = weight·F·(θ − θ_0). The mean task gradient that p is added to is known only once the
tokens of all ranks are counted, and the norm of the sum must be known for clipping. So the ranks sum
products with p beside those of the gradients, in the same all-reduce, and `PenaltySums` does the rest.

Nothing here communicates; p is computed block by block and never stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from craft_ds.algorithm.gram import blocks, dot, sum_products
from craft_ds.algorithm.gram_triple import GramTriple


class PenaltySums(NamedTuple):
    """Loss of the penalty and products with its gradient p; all zero without a penalty.

    Attributes:
        loss: weight/2 · Σ F·(θ − θ_0)².
        pp: <p, p>.
        tp: <g_t, p>, with the task gradient.
        rp: <g_r, p>, with the retention gradient.
    """

    loss: float = 0.0
    pp: float = 0.0
    tp: float = 0.0
    rp: float = 0.0

    def scaled(self, task: float, retention: float = 0.0) -> "PenaltySums":
        """Return the sums with task·g_t and retention·g_r instead of g_t and g_r; p itself is not scaled."""
        return PenaltySums(self.loss, self.pp, self.tp * task, self.rp * retention)

    def added_to(self, triple: GramTriple) -> GramTriple:
        """Return the Gram triple of (g_t + p, g_r), given that of (g_t, g_r).

        >>> PenaltySums(loss=0.5, pp=1.0, tp=2.0, rp=3.0).added_to(GramTriple(4.0, 5.0, 6.0))
        GramTriple(tt=9.0, tr=8.0, rr=6.0)
        """
        return GramTriple(triple.tt + 2.0 * self.tp + self.pp, triple.tr + self.rp, triple.rr)


@dataclass(frozen=True)
class QuadraticPenalty:
    """weight/2 · Σ F·(θ − θ_0)² on this rank's shards.

    Attributes:
        weight: Weight of the penalty.
        start: Shards of θ_0, in the order and sizes of the gradient's.
        fisher: Shards of F, likewise; None: 1.
    """

    weight: float
    start: Sequence[Tensor]
    fisher: Sequence[Tensor] | None = None

    def sums(self, masters: Sequence[Tensor], *gradients: Sequence[Tensor]) -> Tensor:
        """Return this rank's part of the loss, <p, p> and <g, p> for each gradient g.

        Args:
            masters: Shards of θ, in the order and sizes of the gradient's.
            *gradients: Shards of gradients.

        Returns:
            fp64, shape (2 + number of gradients,), on the shards' device.
        """
        products: list[list[Tensor]] = [[] for _ in range(2 + len(gradients))]
        fishers = [] if self.fisher is None else [self.fisher]
        for theta, theta_0, *rest in blocks(masters, self.start, *gradients, *fishers):
            distance = theta - theta_0
            p = self.weight * distance if self.fisher is None else self.weight * distance * rest.pop()
            for target, factor in zip(products, (0.5 * distance, p, *rest), strict=True):
                target.append(dot(factor, p))
        return torch.stack([sum_products(entries, masters) for entries in products])

    def add_gradient_(self, gradient: Sequence[Tensor], masters: Sequence[Tensor], factor: float) -> None:
        """Add factor·p to a gradient's shards, in place.

        Args:
            gradient: Contiguous shards.
            masters: As for `sums`.
            factor: Factor of p.
        """
        fishers = [] if self.fisher is None else [self.fisher]
        flat = [shard.view(-1) for shard in gradient]  # a copy would be lost
        for shard, theta, theta_0, *fisher in blocks(flat, masters, self.start, *fishers, cast=False):
            # The difference first: θ and θ_0 differ in their last digits only.
            distance = theta - theta_0
            if fisher:
                shard.addcmul_(distance, fisher[0], value=factor * self.weight)
            else:
                shard.add_(distance, alpha=factor * self.weight)

"""Anchors as the training loop wants them: micro-batches for the gradient and for the constraint."""

from collections.abc import Iterator

import torch

from craft_ds.anchors.cache import AnchorCache
from craft_ds.anchors.sampler import AnchorSampler, sweep, to_policy_batch
from craft_ds.config import CraftConfig
from craft_ds.engines.base import Batch


class AnchorStream:
    """This rank's anchors of any retention step.

    Anchors run in micro-batches no larger than the task's, so that a retention pass needs no more
    activation memory than a task pass.

    Args:
        cache: The anchors.
        craft: `anchor_batch_size`, `retention_freq`, `constraint_split`, `epsilon_relative` and
            `vision_features` are read.
        micro_batch_size: The task's micro-batch of a rank.
        device: Where batches belong.
        rank: This rank.
        world_size: Number of ranks.
        seed: Seed of the draw.

    Attributes:
        epsilon_unit: What ε counts in: 1, or with `epsilon_relative` the teacher's loss on the
            constraint's anchors.

    Raises:
        UserError: A split that is needed has fewer anchors than there are ranks.
    """

    def __init__(
        self,
        cache: AnchorCache,
        craft: CraftConfig,
        *,
        micro_batch_size: int,
        device: torch.device,
        rank: int,
        world_size: int,
        seed: int,
    ):
        self._cache, self._craft = cache, craft
        self._micro_batch_size, self._device = micro_batch_size, device
        self._rank, self._world_size = rank, world_size
        size = craft.anchor_batch_size
        self._gradient = AnchorSampler(cache, "train", size, rank, world_size, seed)
        self._constraint: AnchorSampler | None = None
        if craft.constraint_split == "heldout":
            self._constraint = AnchorSampler(cache, "heldout", size, rank, world_size, seed)
        teacher_loss = cache.teacher_loss[craft.constraint_split]["overall"]
        self.epsilon_unit: float = teacher_loss if craft.epsilon_relative else 1.0

    def gradient_batches(self, step: int) -> Iterator[Batch]:
        """Anchors whose gradient the retention step `step` follows."""
        return self._batches(self._gradient, step)

    def constraint_batches(self, step: int) -> Iterator[Batch] | None:
        """Anchors on which that step measures L_ret; None where the gradient's own anchors do."""
        return self._batches(self._constraint, step) if self._constraint else None

    def heldout_batches(self, limit: int) -> Iterator[tuple[Batch, bool]]:
        """Every held-out anchor once over all ranks (`limit` of them if above 0), and whether it counts."""
        chunks = sweep(
            self._cache, "heldout", self._micro_batch_size, self._rank, self._world_size, limit or None
        )
        for indices, counts in chunks:
            yield self._read(indices), counts

    def _batches(self, sampler: AnchorSampler, step: int) -> Iterator[Batch]:
        # Draws are counted in retention steps, so that an epoch of anchors leaves none out.
        indices = sampler.indices(step // self._craft.retention_freq)
        for start in range(0, len(indices), self._micro_batch_size):
            yield self._read(indices[start : start + self._micro_batch_size])

    def _read(self, indices: list[int]) -> Batch:
        return to_policy_batch(self._cache.read(indices, self._craft.vision_features), self._device)

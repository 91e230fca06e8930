"""Anchors of a step as a pure function of (seed, position), so that a resumed run needs the position alone.

One endless stream of anchors feeds all ranks. Position p of the stream belongs to task `p mod T` and is
draw `k = p // T` of that task; the draws of a task run through its anchors in a new order each epoch. A
retention step takes the next G positions, which `craft_ds.data.batch_partition` distributes over the ranks.
"""

import functools
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from craft_ds.anchors.cache_list import Anchors
from craft_ds.anchors.coverage import check_enough
from craft_ds.anchors.schema import ORIGIN_FIELDS
from craft_ds.anchors.selection import allocate_evenly
from craft_ds.data.batch_partition import StepPartition
from craft_ds.data.policy_input import images_to_float, to_device


class AnchorSampler:
    """Stateless, task-balanced draws of anchors.

    - Any two tasks are drawn equally often, up to one anchor, over any run of consecutive steps.
    - A task's anchors do not repeat within an epoch of that task, nor within one step (of all ranks
      together) where the task has as many anchors as the step draws from it.

    Args:
        cache: The anchors.
        split: "train" or "heldout".
        share: Partition of a retention step over the ranks; the order depends on its total alone.
        seed: Seed of the order.

    Raises:
        UserError: The split has fewer anchors than there are ranks.
    """

    def __init__(self, cache: Anchors, split: str, share: StepPartition, seed: int) -> None:
        members = cache.splits[split]
        check_enough(cache, split, share.world_size)
        self.seed = seed
        self.global_batch = share.total
        self._strata = _strata(cache, members)
        self._order = functools.lru_cache(maxsize=2 * len(self._strata))(self._epoch_order)

    def draw(self, positions: Iterable[int]) -> list[int]:
        """Return the anchors at these positions of the stream."""
        return [self._draw(position) for position in positions]

    def _draw(self, position: int) -> int:
        draw, stratum = divmod(position, len(self._strata))
        epoch, place = divmod(draw, len(self._strata[stratum]))
        return int(self._order(stratum, epoch)[place])

    def _epoch_order(self, stratum: int, epoch: int) -> np.ndarray:
        """Return the order of a task's anchors in an epoch.

        The anchors are split once into two halves and each epoch shuffles each half, so that a step that
        crosses into the next epoch cannot take an anchor twice. Steps too large for that keep one order.
        """
        order = np.random.default_rng((self.seed, stratum)).permutation(self._strata[stratum])
        half = len(order) // 2
        draws_per_step = -(-self.global_batch // len(self._strata))
        if draws_per_step <= half:
            shuffle = np.random.default_rng((self.seed, stratum, epoch + 1)).permutation
            order = np.concatenate([shuffle(order[:half]), shuffle(order[half:])])
        return order


def iter_split(
    cache: Anchors,
    split: str,
    batch_size: int,
    rank: int,
    world_size: int,
    limit: int | None = None,
) -> Iterator[tuple[list[int], bool]]:
    """Iterate once over a split, distributed over all ranks in the same number of batches per rank.

    Args:
        cache: The anchors.
        split: "train" or "heldout".
        batch_size: Maximum number of anchors per rank and batch.
        rank: This rank.
        world_size: Number of ranks.
        limit: Maximum number of anchors, balanced over the tasks and spread over each; None: all.

    Yields:
        Anchor indices of this rank, and True if they count. The last batch may be short. Where fewer anchors
        than ranks remain, a rank without one gets an anchor that does **not** count: it keeps the collectives
        of a sharded forward pass in step and must not enter the mean.
    """
    strata = _strata(cache, cache.splits[split])
    if limit is not None and limit < len(cache.splits[split]):
        shares = allocate_evenly(
            limit, np.array([len(stratum) for stratum in strata]), np.random.default_rng(0)
        )
        strata = [
            [stratum[i * len(stratum) // share] for i in range(share)]
            for stratum, share in zip(strata, shares, strict=True)
        ]
    order = _interleave(strata)
    for start in range(0, len(order), batch_size * world_size):
        step = order[start : start + batch_size * world_size]
        mine = np.array_split(step, world_size)[rank].tolist()
        yield (mine, True) if mine else (step[:1], False)


def to_policy_batch(anchors: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Turn stored anchors into the batch that the policy's preprocessor would return.

    Args:
        anchors: From `AnchorCache.read`.
        device: Device of the batch. Images are copied as uint8 and converted there.

    Returns:
        float32 images (B, C, H, W) in [0, 1], or vision features as they are stored, int64 tokens and bool
        masks (B, length), under the policy's own names, and the teacher's targets.
    """
    used = {name: tensor for name, tensor in anchors.items() if name not in ORIGIN_FIELDS}
    batch = images_to_float(to_device(used, device))
    return {name: value.long() if value.dtype == torch.int32 else value for name, value in batch.items()}


def _strata(cache: Anchors, members: list[int]) -> list[list[int]]:
    """Group the members by task; tasks without members are omitted."""
    by_task: dict[int, list[int]] = {}
    for index, task in zip(members, cache.task[members].tolist(), strict=True):
        by_task.setdefault(task, []).append(index)
    return [by_task[task] for task in sorted(by_task)]


def _interleave(strata: list[list[int]]) -> list[int]:
    """Return the first anchor of each task, then the second of each, and so on."""
    longest = max(map(len, strata), default=0)
    return [stratum[i] for i in range(longest) for stratum in strata if i < len(stratum)]

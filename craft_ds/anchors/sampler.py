"""Which anchors a step takes: a pure function of (seed, position), so nothing but a position is ever resumed.

One endless stream of anchors feeds all ranks. Position p of the stream belongs to task ``p mod T`` and is
draw ``k = p // T`` of that task; the draws of a task run through its anchors again and again, in a new order
each epoch. A retention step takes the next G positions, which `craft_ds.data.batch_partition` deals to the
ranks.
"""

import functools
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from lerobot.utils.constants import ACTION_TOKENS, OBS_LANGUAGE_TOKENS
from torch import Tensor

from craft_ds.anchors.cache import AnchorCache
from craft_ds.anchors.schema import ORIGIN_FIELDS
from craft_ds.anchors.selection import allocate_evenly
from craft_ds.data.batch_partition import StepPartition
from craft_ds.errors import UserError


class AnchorSampler:
    """Stateless, task-balanced draws of anchors.

    - Any two tasks are drawn equally often, up to one anchor, over any run of consecutive steps.
    - A task's anchors do not repeat within an epoch of that task, nor within one step (of all ranks
      together) where the task has as many anchors as the step draws from it.

    Args:
        cache: The anchors.
        split: "train" or "heldout".
        share: How a retention step is dealt to the ranks; the order depends on its total alone.
        seed: Seed of the order.

    Raises:
        UserError: The split has fewer anchors than there are ranks.
    """

    def __init__(self, cache: AnchorCache, split: str, share: StepPartition, seed: int) -> None:
        members = cache.splits[split]
        _check_enough(cache, split, share.world_size)
        self.seed = seed
        self.global_batch = share.total
        self._strata = _strata(cache, members)
        self._order = functools.lru_cache(maxsize=2 * len(self._strata))(self._epoch_order)

    def draw(self, positions: Iterable[int]) -> list[int]:
        """The anchors at these places of the stream."""
        return [self._draw(position) for position in positions]

    def _draw(self, position: int) -> int:
        draw, stratum = divmod(position, len(self._strata))
        epoch, place = divmod(draw, len(self._strata[stratum]))
        return int(self._order(stratum, epoch)[place])

    def _epoch_order(self, stratum: int, epoch: int) -> np.ndarray:
        """Order of a task's anchors in an epoch.

        The anchors are split once into two halves and each epoch shuffles the halves apart, so that a step
        that crosses into the next epoch cannot meet an anchor twice. Steps too large for that keep one order.
        """
        order = np.random.default_rng((self.seed, stratum)).permutation(self._strata[stratum])
        half = len(order) // 2
        draws_a_step = -(-self.global_batch // len(self._strata))
        if draws_a_step <= half:
            shuffle = np.random.default_rng((self.seed, stratum, epoch + 1)).permutation
            order = np.concatenate([shuffle(order[:half]), shuffle(order[half:])])
        return order


def iter_split(
    cache: AnchorCache,
    split: str,
    batch_size: int,
    rank: int,
    world_size: int,
    limit: int | None = None,
) -> Iterator[tuple[list[int], bool]]:
    """Visit every anchor of a split once over all ranks, in the same number of batches on each rank.

    Args:
        cache: The anchors.
        split: "train" or "heldout".
        batch_size: Anchors a rank and batch, at most.
        rank: This rank.
        world_size: Number of ranks.
        limit: Visit only so many anchors, balanced over the tasks and spread over each.

    Yields:
        Anchor indices of this rank, and whether they count. The last batch may be short, and where fewer
        anchors than ranks are left, ranks without one get an anchor that does **not** count: it keeps the
        collectives of a sharded forward pass in step and must be left out of the mean.
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
    """Turn stored anchors into the batch that the policy's preprocessor would give.

    Args:
        anchors: What `AnchorCache.read` gives.
        device: Where the batch goes. Images travel as uint8 and become float there.

    Returns:
        float32 images (B, C, H, W) in [0, 1], or vision features as they are stored, int64 tokens and bool
        masks (B, length), under the policy's own names.
    """
    batch = {}
    for name, tensor in anchors.items():
        if name in ORIGIN_FIELDS:
            continue
        value = tensor.to(device, non_blocking=True)
        if value.dtype == torch.uint8:
            value = value.to(torch.float32) / 255.0
        elif name in (OBS_LANGUAGE_TOKENS, ACTION_TOKENS):
            value = value.to(torch.int64)
        batch[name] = value
    return batch


def _check_enough(cache: AnchorCache, split: str, world_size: int) -> None:
    count = len(cache.splits[split])
    if count < world_size:
        raise UserError(
            f"anchor cache {cache.path} has {count} {split} anchors for {world_size} ranks: build a cache "
            "with more (scripts/build_anchor_cache.py --num_samples, --heldout_fraction) or start fewer ranks"
        )


def _strata(cache: AnchorCache, members: list[int]) -> list[list[int]]:
    """The members by task; tasks without any are left out."""
    by_task: dict[int, list[int]] = {}
    for index, task in zip(members, cache.task[members].tolist(), strict=True):
        by_task.setdefault(task, []).append(index)
    return [by_task[task] for task in sorted(by_task)]


def _interleave(strata: list[list[int]]) -> list[int]:
    """The first anchor of each task, then the second of each, and so on."""
    longest = max(map(len, strata), default=0)
    return [stratum[i] for i in range(longest) for stratum in strata if i < len(stratum)]

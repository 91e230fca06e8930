"""Task data: LeRobot data sets, sampled so that any world size sees the same samples in the same steps."""

import copy
import itertools
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from lerobot.datasets.factory import make_train_eval_datasets
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import HF_LEROBOT_HOME
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from craft_ds.config.train_config import TrainConfig
from craft_ds.data.batch_partition import StepPartition
from craft_ds.data.lerobot_dataset import check_dataset_root
from craft_ds.distributed.preemption import ignore_signals_in_worker
from craft_ds.errors import UserError


class StepSampler(Sampler[list[int]]):
    """Endless micro-batches of one rank: a pure function of (seed, position, rank).

    Each epoch is a random order of the data set. The epochs form one stream, and a step takes its next
    `share.total` samples. So the samples of a step depend on its position in the stream alone.

    Args:
        size: Samples in the data set.
        share: Partition of a step over ranks and micro-batches.
        rank: This rank.
        seed: Seed of the orders.
        first: Position in the stream of the first sample.
    """

    def __init__(self, size: int, share: StepPartition, rank: int, seed: int, first: int = 0):
        self.size, self._share, self._rank = size, share, rank
        self._seed, self._first = seed, first
        self._order = (-1, torch.empty(0, dtype=torch.int64))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield micro-batches from `first` on, endlessly."""
        return map(self.draw, self.positions())

    def positions(self) -> Iterator[range]:
        """Yield the positions of these micro-batches in the stream."""
        for first in itertools.count(self._first, self._share.total):
            for micro_batch in range(self._share.micro_batches):
                yield self._share.positions(first, self._rank, micro_batch)

    def draw(self, positions: Iterable[int]) -> list[int]:
        """Return the samples at these positions of the stream."""
        return [self._draw(position) for position in positions]

    def _draw(self, position: int) -> int:
        epoch, index = divmod(position, self.size)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(self.size, generator=generator)
        return int(self._order[1][index])


class _StreamDataset(Dataset[dict[str, Any]]):
    """A data set indexed by position in the stream.

    The random state depends on the position alone: image transforms are the same for any number of workers
    and ranks, and in a run that was interrupted.
    """

    def __init__(self, dataset: LeRobotDataset, sampler: StepSampler, seed: int):
        self._dataset, self._sampler, self._seed = dataset, sampler, seed

    def __getitem__(self, position: int) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            # A CPU generator uses 32 bits of its seed.
            torch.manual_seed(zlib.crc32(f"{self._seed} {position}".encode()))
            return self._dataset[self._sampler.draw([position])[0]]


def load_datasets(config: TrainConfig, world_size: int = 1) -> tuple[LeRobotDataset, LeRobotDataset | None]:
    """Load the training data set and, with `eval_freq`, the held-out one (last episodes of every task).

    Args:
        config: A validated configuration; not changed.
        world_size: Number of ranks.

    Raises:
        UserError: The data set cannot be opened, cannot be split or has fewer training
            samples than there are ranks.
    """
    root = Path(config.dataset.root or HF_LEROBOT_HOME / config.dataset.repo_id)
    if config.dataset.root is not None or root.exists():
        check_dataset_root(root, "--dataset.root")
    if not config.eval_freq:
        config = copy.copy(config)
        config.dataset = copy.copy(config.dataset)
        config.dataset.eval_split = 0.0
    try:
        train, heldout = make_train_eval_datasets(config)
    except Exception as error:  # the hub's client raises errors of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--dataset.repo_id={config.dataset.repo_id} cannot be opened: {reason}"
            + ("" if config.dataset.root else " (set --dataset.root for a local data set)")
        ) from error
    if len(train) < world_size:
        raise UserError(
            f"--dataset.repo_id={config.dataset.repo_id} has {len(train)} training samples for "
            f"{world_size} ranks: start fewer ranks"
        )
    return train, heldout


def check_processors(
    config: TrainConfig, dataset: LeRobotDataset, preprocessor: PolicyProcessorPipeline
) -> None:
    """Check that the policy's processors accept a sample of the data set.

    Raises:
        UserError: They do not.
    """
    try:
        preprocessor(images_to_float(default_collate([dataset[0]])))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--dataset.repo_id={config.dataset.repo_id} does not fit the policy's processors ({reason}): "
            "choose a data set with the policy's state and action"
        ) from error


def training_batches(
    config: TrainConfig, dataset: LeRobotDataset, sampler: StepSampler
) -> Iterator[dict[str, Any]]:
    """Return an endless iterator of raw micro-batches in a sampler's order."""
    return iter(_loader(config, _StreamDataset(dataset, sampler, config.seed or 0), sampler.positions()))


def heldout_batches(
    config: TrainConfig, dataset: LeRobotDataset, rank: int, world_size: int
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Iterate once over the held-out samples of all ranks, in the same number of batches per rank.

    With `max_eval_samples`, evenly spaced samples represent the data set.

    Yields:
        A raw batch, and True if it counts. Where fewer samples than ranks remain, a rank without one gets a
        sample that does not count, so that sharded forward passes stay in step.
    """
    stride = -(-len(dataset) // config.max_eval_samples) if config.max_eval_samples > 0 else 1
    order = list(range(0, len(dataset), stride))
    batches, counts = [], []
    for first in range(0, len(order), config.batch_size * world_size):
        mine = order[first : first + config.batch_size * world_size][rank::world_size]
        batches.append(mine or order[:1])
        counts.append(bool(mine))
    yield from zip(_loader(config, dataset, batches), counts, strict=True)


def _loader(config: TrainConfig, dataset: Dataset, batches: Any) -> DataLoader:
    workers: dict[str, Any] = {}
    if config.num_workers > 0:
        workers = {
            "worker_init_fn": ignore_signals_in_worker,
            "prefetch_factor": config.prefetch_factor,
            "multiprocessing_context": config.dataloader_multiprocessing_context,
        }
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=config.num_workers,
        pin_memory=torch.cuda.is_available(),
        **workers,
    )


def images_to_float(batch: dict[str, Any]) -> dict[str, Any]:
    """Turn uint8 images into float32 in [0, 1], as LeRobot's training loop does before its processors."""
    return {
        key: value.float() / 255.0 if isinstance(value, Tensor) and value.dtype == torch.uint8 else value
        for key, value in batch.items()
    }

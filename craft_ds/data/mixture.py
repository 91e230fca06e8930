"""Mixtures of data sets: which sample comes next, and what the data sets must share."""

import copy
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from craft_ds.config.train_config import TrainConfig
from craft_ds.data.batch_partition import StepPartition
from craft_ds.data.checked_samples import image_shape
from craft_ds.data.task_data import StepSampler
from craft_ds.errors import UserError


class MixtureSampler(StepSampler):
    """Endless micro-batches from several data sets with given shares: a function of (seed, position, rank).

    At each position one data set is drawn, with the probability of its share. The sample is the one that this
    data set's own shuffled stream has at the position, so that none repeats within an epoch of the data set.
    Indices count through the data sets one after the other.

    Args:
        sizes: Samples in each data set.
        weights: Share of each data set, up to a common factor.
        share: Partition of a step over ranks and micro-batches.
        rank: This rank.
        seed: Seed of the draws and of the orders.
        first: Position in the stream of the first sample.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        share: StepPartition,
        rank: int,
        seed: int,
        first: int = 0,
    ):
        super().__init__(sum(sizes), share, rank, seed, first)
        self._weights = torch.tensor(weights, dtype=torch.float64)
        self._streams = [StepSampler(size, share, rank, seed) for size in sizes]
        self._starts = [sum(sizes[:number]) for number in range(len(sizes))]

    def index_at(self, position: int) -> int:
        """Return the sample at a position of the stream."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"mixture {self._seed} {position}".encode()))
        number = int(torch.multinomial(self._weights, 1, generator=generator))
        return self._starts[number] + self._streams[number].index_at(position)


def dataset_configs(config: TrainConfig) -> list[TrainConfig]:
    """Return a view of a configuration for each of its data sets, which names that one alone.

    The views share everything else with the configuration.
    """
    views = []
    for source in config.datasets:
        view = copy.copy(config)
        view.dataset = copy.copy(config.dataset)
        for name in ("repo_id", "root", "episodes"):
            setattr(view.dataset, name, getattr(source, name))
        views.append(view)
    return views or [config]


def mixture_weights(config: TrainConfig) -> list[float] | None:
    """Return the shares of the data sets; None: every sample of all of them has the same."""
    weights = [source.weight for source in config.datasets if source.weight is not None]
    return weights or None


def check_same_features(datasets: Sequence[LeRobotDataset]) -> None:
    """Check that data sets have the same features in the same shapes, so that a batch can hold all of them.

    A camera may be stored as pictures in one and as video in another.

    Raises:
        UserError: They differ; names the data sets and the feature.
    """
    first, *others = datasets
    for other in others:
        wanted, found = _shapes(first), _shapes(other)
        for name in sorted(wanted.keys() ^ found.keys()):
            owner, lacking = (first, other) if name in wanted else (other, first)
            raise UserError(
                f"--datasets: {owner.repo_id} has {name}, which {lacking.repo_id} lacks: give all data sets "
                "the same features (lerobot-edit-dataset --operation.type remove_feature)"
            )
        for name, kind in wanted.items():
            if found[name] != kind:
                raise UserError(
                    f"--datasets: {name} is {_described(found[name])} in {other.repo_id}, but "
                    f"{_described(kind)} in {first.repo_id}: give all data sets the same features"
                )


def _shapes(dataset: LeRobotDataset) -> dict[str, tuple[str, tuple[int, ...]]]:
    def described(feature: dict[str, Any]) -> tuple[str, tuple[int, ...]]:
        if feature["dtype"] in ("image", "video"):
            return "picture", image_shape(feature)
        return str(feature["dtype"]), tuple(feature["shape"])

    return {name: described(feature) for name, feature in dataset.meta.features.items()}


def _described(feature: tuple[str, tuple[int, ...]]) -> str:
    kind, shape = feature
    return f"{kind} of shape {list(shape)}"

"""Task data: LeRobot data sets, sampled so that any world size sees the same samples in the same steps."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lerobot.datasets.factory import make_train_eval_datasets
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import ACTION, HF_LEROBOT_HOME, OBS_STATE
from torch.utils.data import Sampler, default_collate

from craft_ds.config.train_config import TrainConfig
from craft_ds.data.batch_partition import StepPartition
from craft_ds.data.checked_samples import BadSample, NamedSamples, Samples, sample_loader
from craft_ds.data.dataset_files import check_dataset_root, check_finished
from craft_ds.data.inline_tensors import with_tensors
from craft_ds.data.lerobot_dataset import opening_failed
from craft_ds.data.policy_input import (
    PolicyInput,
    check_picklable,
    keep_images_uint8,
    open_policy_input,
)
from craft_ds.data.replacement import CollateDrawn, RawBatch, ReplacingSamples
from craft_ds.data.task_texts import order_task_texts
from craft_ds.data.value_limits import value_limits
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
        return [self.index_at(position) for position in positions]

    def index_at(self, position: int) -> int:
        """Return the sample at a position of the stream."""
        epoch, index = divmod(position, self.size)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(self.size, generator=generator)
        return int(self._order[1][index])


def load_datasets(config: TrainConfig, world_size: int = 1) -> tuple[LeRobotDataset, LeRobotDataset | None]:
    """Load the training data set and, with `eval_split`, the held-out one (last episodes of every task).

    Args:
        config: A validated configuration; not changed.
        world_size: Number of ranks.

    Raises:
        UserError: The data set cannot be opened, cannot be split or has fewer training
            samples than there are ranks.
    """
    name = f"--dataset.repo_id={config.dataset.repo_id}"
    _refuse_lists(config.dataset.repo_id)
    if config.dataset.root is not None:
        check_dataset_root(config.dataset.root, "--dataset.root", config.dataset.episodes)
    elif (HF_LEROBOT_HOME / config.dataset.repo_id).exists():
        check_finished(HF_LEROBOT_HOME / config.dataset.repo_id, "--dataset.root")
    try:
        train, heldout = make_train_eval_datasets(config)
    except Exception as error:  # the hub's client raises errors of many types
        raise UserError(opening_failed(name, error, config.dataset.root, "--dataset.root")) from error
    for part in (train, heldout) if heldout is not None else (train,):
        order_task_texts(part)
        keep_images_uint8(part)
    if len(train) < world_size:
        raise UserError(
            f"--dataset.repo_id={config.dataset.repo_id} has {len(train)} training samples for "
            f"{world_size} ranks: start fewer ranks"
        )
    return train, heldout


def _refuse_lists(repo_id: str) -> None:
    """Refuse several data sets: LeRobot cannot train on them, and with a root would open the root alone."""
    if repo_id.lstrip().startswith(("[", "(")) or "," in repo_id:
        raise UserError(
            f"--dataset.repo_id={repo_id} names several data sets: give them as "
            "--datasets='[{repo_id: …, root: …}, …]', or merge them with "
            "lerobot-edit-dataset --operation.type merge --operation.repo_ids \"['…', '…']\" "
            "--new_repo_id … --new_root …"
        )


def check_samples(
    config: TrainConfig, train: LeRobotDataset, heldout: LeRobotDataset | None
) -> tuple[NamedSamples, NamedSamples | None, list[str]]:
    """Check states and actions of all frames, and return the data sets with checked samples.

    Pictures are checked when they are read.

    Returns:
        The training samples, the held-out ones, and a warning if frames are bad and will be replaced.

    Raises:
        UserError: A state or action is bad, and bad samples are errors.
    """
    used = {OBS_STATE, ACTION, *(config.policy.input_features or {})}
    vectors = [key for key in train.meta.features if config.rename_map.get(key, key) in used]
    limits = value_limits(train, config.outlier_factor, vectors)
    checked = [NamedSamples(part, limits, vectors) for part in (train, heldout) if part is not None]
    messages = []
    for samples in checked:
        errors, count = samples.bad_values()
        if not errors:
            continue
        if config.on_bad_sample == "error":
            others = f", and {count - 1} more bad frame{'s' * (count > 2)}" if count > 1 else ""
            raise UserError(advise(errors[0], others))
        messages.append(
            f"warning: {count} of {len(samples)} frames have a bad state or action and will be replaced "
            f"(--on_bad_sample=skip); the first: {errors[0]}"
        )
    return checked[0], checked[1] if heldout is not None else None, messages


def advise(error: BadSample, others: str = "") -> str:
    """Return the message of a bad sample with what to do.

    Args:
        error: The bad sample.
        others: Text about further ones.
    """
    return (
        f"{error}{others}: repair it, leave episode {error.episode} out of --dataset.episodes, or replace "
        "bad samples by --on_bad_sample=skip"
    )


def check_processors(
    config: TrainConfig, samples: NamedSamples, preprocessor: PolicyProcessorPipeline
) -> PolicyInput:
    """Check that the policy's processors accept a sample of the data set, where they will run.

    Args:
        config: A validated configuration.
        samples: Samples of the data set.
        preprocessor: The policy's preprocessor, on the CPU.

    Raises:
        UserError: They do not, or the sample is bad and bad samples are errors.
    """
    try:
        if config.on_bad_sample == "error":
            sample = samples[0]
        else:
            sample = ReplacingSamples(samples, config.seed or 0)[0].sample
    except BadSample as error:
        raise UserError(advise(error)) from error
    if config.num_workers > 0 and config.dataloader_multiprocessing_context != "fork":
        check_picklable(preprocessor)
    try:
        return open_policy_input(preprocessor, default_collate([sample]))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--dataset.repo_id={config.dataset.repo_id} does not fit the policy's processors ({reason}): "
            "choose a data set with the policy's state and action"
        ) from error


Process = Callable[[dict[str, Any]], dict[str, Any]]


def training_batches(
    config: TrainConfig, samples: Samples, sampler: StepSampler, process: Process = dict
) -> Iterator[RawBatch]:
    """Return an endless iterator of micro-batches in a sampler's order.

    Args:
        config: A validated configuration.
        samples: The data set.
        sampler: Order of the samples.
        process: Applied to collated samples in the workers, such as `PolicyInput.process`.
    """
    drawn = ReplacingSamples(samples, config.seed or 0, sampler.index_at)
    return _loader(config, drawn, sampler.positions(), process)


def heldout_batches(
    config: TrainConfig, samples: Samples, rank: int, world_size: int, process: Process = dict
) -> Iterator[tuple[RawBatch, bool]]:
    """Iterate once over the held-out samples of all ranks, in the same number of batches per rank.

    With `max_eval_samples`, evenly spaced samples represent the data set.

    Args:
        config: A validated configuration.
        samples: The held-out samples.
        rank: This rank.
        world_size: Number of ranks.
        process: As for `training_batches`.

    Yields:
        A batch, and True if it counts. Where fewer samples than ranks remain, a rank without one gets a
        sample that does not count, so that sharded forward passes stay in step.
    """
    stride = -(-len(samples) // config.max_eval_samples) if config.max_eval_samples > 0 else 1
    order = list(range(0, len(samples), stride))
    batches, counts = [], []
    for first in range(0, len(order), config.batch_size * world_size):
        mine = order[first : first + config.batch_size * world_size][rank::world_size]
        batches.append(mine or order[:1])
        counts.append(bool(mine))
    drawn = ReplacingSamples(samples, config.seed or 0)
    yield from zip(_loader(config, drawn, batches, process), counts, strict=True)


def _loader(
    config: TrainConfig, samples: ReplacingSamples, batches: Any, process: Process
) -> Iterator[RawBatch]:
    workers: dict[str, Any] = {}
    if config.num_workers > 0:
        workers = {
            "worker_init_fn": _start_worker,
            "prefetch_factor": config.prefetch_factor,
            "multiprocessing_context": config.dataloader_multiprocessing_context,
        }
    loader = sample_loader(
        samples,
        batches,
        collate_fn=CollateDrawn(process, config.seed or 0),
        num_workers=config.num_workers,
        pin_memory=torch.cuda.is_available(),
        **workers,
    )
    return (batch._replace(samples=with_tensors(batch.samples)) for batch in loader)


def _start_worker(worker: int) -> None:
    ignore_signals_in_worker(worker)
    # The workers are the parallelism: threads of the tokenizers in each of them would compete for the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

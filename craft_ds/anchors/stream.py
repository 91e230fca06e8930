"""Micro-batches of anchors for the retention gradient and for the constraint."""

import itertools
import logging
import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from craft_ds.anchors.augmentation import AnchorAugmentation
from craft_ds.anchors.cache_list import Anchors
from craft_ds.anchors.coverage import trained_tasks
from craft_ds.anchors.sampler import AnchorSampler, iter_split, to_policy_batch
from craft_ds.config.craft_config import CraftConfig
from craft_ds.data.batch_partition import StepPartition
from craft_ds.data.read_ahead import Counted, read_ahead
from craft_ds.engines.base import Batch, Loss
from craft_ds.engines.phase_timer import phase
from craft_ds.policies.pi0_fast.retention import RETENTION_LOSSES, TASK_INDEX, by_task

logger = logging.getLogger(__name__)


class _Wanted(NamedTuple):
    """A micro-batch of a retention step: its purpose, the step's position in the stream, and its number."""

    purpose: str
    first: int
    micro_batch: int


class AnchorStream:
    """The anchors of this rank in any retention step.

    Anchors are processed in micro-batches no larger than the task's, so that a retention pass needs no more
    activation memory than a task pass. A thread reads the next one while the current one trains.

    Args:
        cache: The anchors.
        craft: `constraint_freq`, `constraint_split`, `epsilon_relative`, `multiplier_scope`, `retention_loss`
            and `vision_features` are read.
        share: Partition of the anchors of a step over ranks and micro-batches.
        device: Device of the batches.
        rank: This rank.
        seed: Seed of the order.
        augment: Changes the images that give the gradient; those that measure the constraint stay as stored.

    Attributes:
        loss: The retention loss of a batch of anchors.
        step_loss: The same in a retention step: with `multiplier_scope=task`, by task.
        share: As given.
        epsilon_unit: Unit of ε: 1, or with `epsilon_relative` the teacher's loss on the
            constraint's anchors.
        heldout_epsilon_unit: The same for the held-out anchors, which evaluations measure; NaN without any.
        task_epsilon_units: The same for each task; empty without `multiplier_scope=task`.

    Raises:
        UserError: A required split has fewer anchors than there are ranks, or the anchors lack the targets of
            the retention loss.
    """

    def __init__(
        self,
        cache: Anchors,
        craft: CraftConfig,
        share: StepPartition,
        *,
        device: torch.device,
        rank: int,
        seed: int,
        augment: AnchorAugmentation | None = None,
    ):
        self._cache, self._vision_features = cache, craft.vision_features
        self._retention_loss, self._constraint_freq = craft.retention_loss, craft.constraint_freq
        self.loss: Loss = RETENTION_LOSSES[craft.retention_loss].loss
        self.share = share
        self._device, self._rank, self._augment = device, rank, augment
        self._ahead = read_ahead(iter(list[tuple[_Wanted, Batch]]()), device)
        self._seconds = 0.0
        self._gradient = AnchorSampler(cache, "train", share, seed)
        self._constraint: AnchorSampler | None = None
        if craft.constraint_split == "heldout":
            self._constraint = AnchorSampler(cache, "heldout", share, seed)
        if rank == 0:
            for split in ("train", craft.constraint_split):
                if share.total > len(cache.splits[split]):
                    logger.warning(
                        "A step draws %d anchors but the %s split of %s has %d: some repeat within a step.",
                        share.total,
                        split,
                        cache.path,
                        len(cache.splits[split]),
                    )
        losses, relative = cache.loss_of(craft.retention_loss), craft.epsilon_relative
        self._terms: list[int] = cache.term_counts(craft.retention_loss).tolist()
        teacher_loss = losses[craft.constraint_split]
        self.epsilon_unit: float = teacher_loss["overall"] if relative else 1.0
        self.heldout_epsilon_unit: float = (losses["heldout"]["overall"] or math.nan) if relative else 1.0
        self.step_loss, self.task_epsilon_units = self.loss, list[float]()
        self._task_index: Tensor | None = None
        if craft.multiplier_scope == "task":
            tasks = trained_tasks(cache)
            units = teacher_loss["by_task"] if craft.epsilon_relative else dict.fromkeys(tasks, 1.0)
            self.task_epsilon_units = [units[task] for task in tasks]
            self.step_loss = by_task(craft.retention_loss, len(tasks))
            self._task_index = torch.tensor([tasks.index(t) if t in tasks else -1 for t in cache.tasks])

    def gradient_batches(self, first: int) -> Counted[Batch]:
        """Return the anchors that give the gradient of a retention step.

        Args:
            first: Position of the step in the stream: the number of anchors drawn before it.
        """
        return self._batches("gradient", first)

    def tokens(self, first: int) -> int:
        """Return the number of terms of this rank's `gradient_batches`, by which the loss is divided."""
        ranges = [
            self.share.positions(first, self._rank, number) for number in range(self.share.micro_batches)
        ]
        return sum(self._terms[index] for part in ranges for index in self._gradient.draw(part))

    def constraint_batches(self, first: int) -> Counted[Batch] | tuple[()] | None:
        """Return the anchors that measure L_ret in that step.

        None where those of the gradient do; empty in the steps between those of `constraint_freq`.
        """
        if self._constraint is None:
            return None
        return self._batches("constraint", first) if "constraint" in self._purposes(first) else ()

    def close(self) -> None:
        """End the thread that reads ahead; the next step would start another."""
        self._ahead.close()

    def take_seconds(self) -> float:
        """Return the time spent waiting for anchors of retention steps since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def indices(self, first: int) -> dict[str, list[int]]:
        """Return the anchors of all ranks in that step, by purpose."""
        positions = range(first, first + self.share.total)
        samplers = self._samplers()
        return {purpose: samplers[purpose].draw(positions) for purpose in self._purposes(first)}

    def heldout_batches(self, micro_batch_size: int, limit: int) -> Iterator[tuple[Batch, bool]]:
        """Iterate once over the held-out anchors, at most `limit` if above 0; True marks those that count."""
        world_size = self.share.world_size
        chunks = iter_split(self._cache, "heldout", micro_batch_size, self._rank, world_size, limit or None)
        for indices, counts in chunks:
            yield self._read(indices), counts

    def _purposes(self, first: int) -> list[str]:
        """Return the purposes for which a retention step reads anchors, in the order of reading."""
        measures = first // self.share.total % self._constraint_freq == 0
        return [purpose for purpose in self._samplers() if purpose != "constraint" or measures]

    def _samplers(self) -> dict[str, AnchorSampler]:
        """Return the samplers by purpose, in the order of a retention step."""
        samplers = {"gradient": self._gradient, "constraint": self._constraint}
        return {purpose: sampler for purpose, sampler in samplers.items() if sampler is not None}

    def _batches(self, purpose: str, first: int) -> Counted[Batch]:
        return Counted(self.share.micro_batches, self._read_step(purpose, first))

    def _read_step(self, purpose: str, first: int) -> Iterator[Batch]:
        for micro_batch in range(self.share.micro_batches):
            started = time.perf_counter()
            with phase("data"):
                batch = self._next(_Wanted(purpose, first, micro_batch))
            self._seconds += time.perf_counter() - started
            yield batch

    def _next(self, wanted: _Wanted) -> Batch:
        found, batch = next(self._ahead, (None, {}))
        if found != wanted:  # the first step of this process
            self._ahead.close()
            self._ahead = read_ahead(self._read_from(wanted), self._device)
            _, batch = next(self._ahead)
        if wanted.purpose == "gradient" and self._augment is not None:  # draws random numbers: in this thread
            positions = self.share.positions(wanted.first, self._rank, wanted.micro_batch)
            self._augment(batch, self._cache.cameras, positions)
        return batch

    def _read_from(self, start: _Wanted) -> Iterator[tuple[_Wanted, Batch]]:
        """Read micro-batches in the order of retention steps, endlessly, from one of them on."""
        samplers = self._samplers()
        order = (
            _Wanted(purpose, first, micro_batch)
            for first in itertools.count(start.first, self.share.total)
            for purpose in self._purposes(first)
            for micro_batch in range(self.share.micro_batches)
        )
        for wanted in itertools.dropwhile(start.__ne__, order):
            positions = self.share.positions(wanted.first, self._rank, wanted.micro_batch)
            yield wanted, self._read(samplers[wanted.purpose].draw(positions))

    def _read(self, indices: list[int]) -> Batch:
        anchors = self._cache.read(indices, self._vision_features, self._retention_loss)
        if self._task_index is not None:
            anchors[TASK_INDEX] = self._task_index[anchors["task"].long()]
        return to_policy_batch(anchors, self._device)

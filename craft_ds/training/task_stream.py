"""The stream of task samples that a run trains on."""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from craft_ds.data.batch_partition import StepPartition
from craft_ds.data.checked_samples import BadSample
from craft_ds.data.read_ahead import Counted
from craft_ds.data.replacement import RawBatch
from craft_ds.data.task_data import StepSampler
from craft_ds.engines.base import Batch
from craft_ds.engines.phase_timer import phase


@dataclass
class TaskStream:
    """This rank's task samples, micro-batch by micro-batch.

    Attributes:
        batches: Micro-batches in training order, on the engine's device.
        partition: This rank's part of every step.
        sampler: Order of the samples.
        seconds: Time spent waiting for micro-batches, since the last `take_seconds`.
        bad: Bad samples met since the last `take_bad`.
    """

    batches: Generator[RawBatch]
    partition: StepPartition
    sampler: StepSampler
    seconds: float = 0.0
    bad: list[BadSample] = field(default_factory=list)

    def next_step(self, votes: list[float]) -> Counted[Batch]:
        """Return this rank's micro-batches of the next step.

        Args:
            votes: Its last entry is increased by the number of replaced samples, as they are read.
        """
        return Counted(self.partition.micro_batches, self._read_step(votes))

    def _read_step(self, votes: list[float]) -> Iterator[Batch]:
        for _ in range(self.partition.micro_batches):
            started = time.perf_counter()
            with phase("data"):
                read = next(self.batches)
            self.seconds += time.perf_counter() - started
            self.bad += read.bad
            votes[-1] += read.replaced
            yield read.samples

    def take_bad(self) -> list[BadSample]:
        """Return `bad` and clear it."""
        bad, self.bad = self.bad, []
        return bad

    def take_seconds(self) -> float:
        """Return `seconds` and reset it."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def close(self) -> None:
        """End the workers and the thread that read ahead."""
        self.batches.close()

    def indices(self, samples_seen: int) -> list[int]:
        """Return the indices of the samples of all ranks in the step that starts after `samples_seen`."""
        return self.sampler.draw(range(samples_seen, samples_seen + self.partition.total))

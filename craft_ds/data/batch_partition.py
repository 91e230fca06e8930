"""Partition of the samples of a step over ranks and micro-batches. Pure arithmetic.

A step takes the next `total` samples of one endless stream. Losses are sums over tokens, divided by the
global count, so the parts need not be equal: any number of ranks can share a step, and a run that resumes
with fewer ranks sees the same samples in the same steps.
"""

from typing import NamedTuple

from craft_ds.errors import UserError


class StepPartition(NamedTuple):
    """Parts of a step, one per rank and micro-batch, whose sizes differ by one sample at most.

    Attributes:
        total: Samples of a step.
        world_size: Number of ranks.
        micro_batches: Micro-batches of each rank.
    """

    total: int
    world_size: int
    micro_batches: int

    def positions(self, first: int, rank: int, micro_batch: int) -> range:
        """Return the positions in the stream of one part of the step that starts at `first`."""
        parts, part = self.world_size * self.micro_batches, micro_batch * self.world_size + rank
        return range(first + self.total * part // parts, first + self.total * (part + 1) // parts)


def partition_step(total: int, world_size: int, micro_batch_size: int, what: str) -> StepPartition:
    """Partition a step into micro-batches of about `micro_batch_size` samples, none of them empty.

    Args:
        total: Samples of a step over all ranks.
        world_size: Number of ranks.
        micro_batch_size: Samples per rank and micro-batch. Exceeded only where a smaller micro-batch would
            give a rank no sample.
        what: Name of the samples in the error message.

    Raises:
        UserError: There are more ranks than samples.
    """
    if total < world_size:
        raise UserError(
            f"a step takes {total} {what} over all ranks, too few for {world_size} ranks: start fewer ranks "
            "or raise --batch_size and --craft.anchor_batch_size"
        )
    wanted = -(-total // (world_size * micro_batch_size))
    return StepPartition(total, world_size, min(wanted, total // world_size))

"""How the samples of a step are dealt to ranks and micro-batches. Pure arithmetic.

A step takes the next `total` samples of one endless stream. Losses are sums over tokens, divided by the
global count, so the parts need not be equal: any number of ranks can share any step, and a run that goes on
with fewer ranks sees the same samples in the same steps.
"""

from typing import NamedTuple

from craft_ds.errors import UserError


class StepPartition(NamedTuple):
    """The parts of a step: one for each rank and micro-batch, which differ by one sample at most.

    Attributes:
        total: Samples of a step.
        world_size: Number of ranks.
        micro_batches: Micro-batches of each rank.
    """

    total: int
    world_size: int
    micro_batches: int

    def positions(self, first: int, rank: int, micro_batch: int) -> range:
        """Positions in the stream of one part of the step that begins at `first`."""
        parts, part = self.world_size * self.micro_batches, micro_batch * self.world_size + rank
        return range(first + self.total * part // parts, first + self.total * (part + 1) // parts)


def partition_step(total: int, world_size: int, micro_batch_size: int, what: str) -> StepPartition:
    """Deal a step out in micro-batches of about `micro_batch_size` samples, none of them empty.

    Args:
        total: Samples of a step over all ranks.
        world_size: Number of ranks.
        micro_batch_size: Samples a rank and micro-batch. Exceeded only where a smaller micro-batch would
            leave a rank without a sample.
        what: What the samples are, for the error.

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

"""Partition of a step: every sample once, no rank without a sample."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from craft_ds.data.batch_partition import partition_step
from craft_ds.errors import UserError

totals, world_sizes, sizes = st.integers(1, 200), st.integers(1, 16), st.integers(1, 20)


@given(totals, world_sizes, sizes, st.integers(0, 10**6))
def test_every_sample_is_dealt_once_and_no_part_is_empty(total, world_size, size, first):
    if total < world_size:
        return
    share = partition_step(total, world_size, size, "samples")
    parts = [
        share.positions(first, rank, micro_batch)
        for micro_batch in range(share.micro_batches)
        for rank in range(world_size)
    ]
    assert [position for part in parts for position in part] == list(range(first, first + total))
    lengths = {len(part) for part in parts}
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1


@given(totals, world_sizes, sizes)
def test_micro_batches_are_not_larger_than_asked(total, world_size, size):
    if total < world_size:
        return
    share = partition_step(total, world_size, size, "samples")
    largest = -(-total // (world_size * share.micro_batches))
    assert largest <= size or share.micro_batches == total // world_size


@pytest.mark.parametrize(("batch", "accumulation", "world_size"), [(2, 1, 1), (3, 2, 2), (4, 3, 3)])
def test_flags_that_divide_are_taken_as_they_are(batch, accumulation, world_size):
    share = partition_step(batch * accumulation * world_size, world_size, batch, "samples")
    assert share.micro_batches == accumulation
    assert len(share.positions(0, world_size - 1, accumulation - 1)) == batch


def test_more_ranks_than_samples():
    with pytest.raises(UserError, match="a step takes 2 anchors over all ranks, too few for 3 ranks"):
        partition_step(2, 3, 4, "anchors")

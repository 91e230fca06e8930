import tempfile
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lerobot.utils.constants import ACTION_TOKENS

from craft_ds.anchors.cache import AnchorCache
from craft_ds.anchors.sampler import AnchorSampler, iter_split, to_policy_batch
from craft_ds.data.batch_partition import partition_step
from craft_ds.errors import UserError
from craft_ds.testing.datasets import write_test_cache


class Tasks:
    """The part of a cache that the sampler reads: anchors of the given counts by task."""

    def __init__(self, counts):
        self.path = "cache"
        self.task = torch.tensor([task for task, count in enumerate(counts) for _ in range(count)])
        self.splits = {"train": list(range(len(self.task))), "heldout": []}


def draw(cache, batch_size, world_size, steps, seed=0):
    """Return the draws of all ranks together, by step."""
    share = partition_step(batch_size * world_size, world_size, batch_size, "anchors")
    sampler = AnchorSampler(cache, "train", share, seed)
    return [
        [i for rank in range(world_size) for i in sampler.draw(share.positions(step * share.total, rank, 0))]
        for step in steps
    ]


counts = st.lists(st.integers(1, 40), min_size=1, max_size=5)
batch_sizes, world_sizes, seeds = st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32)


@settings(max_examples=50, deadline=None)
@given(counts, batch_sizes, world_sizes, seeds, st.integers(0, 10**6))
def test_tasks_are_balanced_over_consecutive_steps(counts, batch_size, world_size, seed, start):
    cache = Tasks(counts)
    if sum(counts) < world_size:
        return
    steps = draw(cache, batch_size, world_size, range(start, start + len(counts)), seed)
    for step in steps:
        seen = Counter(cache.task[step].tolist())
        assert max(seen.values()) - min(seen[task] for task in range(len(counts))) <= 1
    everything = Counter(cache.task[list(chain(*steps))].tolist())
    assert set(everything.values()) == {batch_size * world_size}


@settings(max_examples=50, deadline=None)
@given(counts, batch_sizes, world_sizes, seeds)
def test_an_epoch_of_a_task_has_each_anchor_once(counts, batch_size, world_size, seed):
    cache = Tasks(counts)
    if sum(counts) < world_size:
        return
    longest = max(counts) * len(counts) // (batch_size * world_size) + 1
    stream = list(chain(*draw(cache, batch_size, world_size, range(2 * longest), seed)))
    for task, count in enumerate(counts):
        draws = [index for index in stream if cache.task[index] == task]
        for epoch in range(len(draws) // count):
            assert len(set(draws[epoch * count : (epoch + 1) * count])) == count


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(9, 40), min_size=1, max_size=4), world_sizes, seeds, st.integers(0, 1000))
def test_ranks_are_disjoint_at_every_step(counts, world_size, seed, step):
    batch_size = max(1, 9 * len(counts) // world_size)
    if batch_size * world_size > 9 * len(counts):
        return
    (drawn,) = draw(Tasks(counts), batch_size, world_size, [step], seed)
    assert len(set(drawn)) == len(drawn) == batch_size * world_size


@settings(max_examples=50, deadline=None)
@given(counts, seeds, st.integers(0, 1000))
def test_world_size_does_not_change_the_global_draw(counts, seed, step):
    if sum(counts) < 6:
        return
    cache = Tasks(counts)
    draws = [draw(cache, 6 // world, world, [step], seed) for world in (1, 2, 3, 6)]
    assert all(one == draws[0] for one in draws)


def test_epochs_and_seeds_differ():
    cache = Tasks([40])
    assert draw(cache, 40, 1, [0]) == draw(cache, 40, 1, [1])  # too large a step to reshuffle
    assert draw(cache, 20, 1, [0, 1]) != draw(cache, 20, 1, [2, 3])
    assert draw(cache, 10, 1, [0], seed=0) != draw(cache, 10, 1, [0], seed=1)


def test_order_of_the_calls_does_not_matter():
    cache = Tasks([7, 11, 3])
    sampler = AnchorSampler(cache, "train", partition_step(8, 2, 4, "anchors"), seed=3)
    forward = [sampler.draw(range(8 * step, 8 * step + 8)) for step in range(50)]
    backward = [sampler.draw(range(8 * step, 8 * step + 8)) for step in reversed(range(50))]
    assert forward == backward[::-1]


def test_more_ranks_than_anchors():
    with pytest.raises(UserError, match="2 train anchors for 3 ranks"):
        AnchorSampler(Tasks([1, 1]), "train", partition_step(3, 3, 1, "anchors"), seed=0)
    with pytest.raises(UserError, match="0 heldout anchors"):
        AnchorSampler(Tasks([4]), "heldout", partition_step(1, 1, 1, "anchors"), seed=0)


@settings(max_examples=50, deadline=None)
@given(counts, batch_sizes, world_sizes, st.none() | st.integers(1, 60))
def test_sweep_visits_everything_once_in_equal_batches(counts, batch_size, world_size, limit):
    cache = Tasks(counts)
    ranks = [
        list(iter_split(cache, "train", batch_size, rank, world_size, limit)) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(1 <= len(indices) <= batch_size for batches in ranks for indices, _ in batches)
    visited = [i for batches in ranks for indices, counts_too in batches if counts_too for i in indices]
    assert len(set(visited)) == len(visited)
    if limit is None:
        assert sorted(visited) == cache.splits["train"]
    else:
        assert len(visited) == min(limit, sum(counts))
        seen = Counter(cache.task[visited].tolist())
        full = [task for task, count in enumerate(counts) if seen[task] == count]
        others = [seen[task] for task in range(len(counts)) if task not in full]
        assert not others or max(others) - min(others) <= 1


def test_policy_batch():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        anchors = write_test_cache(path, [0, 1, 0, 1], [0, 1, 2, 3])
        cache = AnchorCache.open(path)
        sampler = AnchorSampler(cache, "train", partition_step(2, 1, 2, "anchors"), seed=0)
        read = cache.read(sampler.draw(range(2)))
        batch = to_policy_batch(read, "cpu")
    assert not {"task", "episode", "frame"} & batch.keys()
    rows = read["frame"].long()
    image = batch["observation.images.top"]
    assert image.dtype == torch.float32
    assert torch.equal(image, anchors["observation.images.top"][rows].float() / 255)
    assert batch[ACTION_TOKENS].dtype == torch.int64
    assert torch.equal(batch[ACTION_TOKENS], anchors[ACTION_TOKENS][rows].long())

"""Reading anchors ahead: the anchors of a step, each micro-batch once, at any start."""

import pytest
import torch

from craft_ds.anchors.cache import AnchorCache
from craft_ds.anchors.stream import AnchorStream
from craft_ds.config.craft_config import CraftConfig
from craft_ds.data.batch_partition import partition_step
from craft_ds.testing.datasets import write_test_cache

TOTAL = 6


@pytest.fixture
def cache(tmp_path):
    write_test_cache(tmp_path / "cache", [0, 1] * 12, list(range(24)), list(range(8)))
    return AnchorCache.open(tmp_path / "cache")


@pytest.fixture
def reads(cache, monkeypatch):
    """Anchors of each read, in order."""
    found, read = [], cache.read

    def note(indices, *rest):
        found.append(list(indices))
        return read(indices, *rest)

    monkeypatch.setattr(cache, "read", note)
    return found


def stream(cache, world_size=1, rank=0, **craft) -> AnchorStream:
    share = partition_step(TOTAL, world_size, 2, "anchors")
    settings = CraftConfig(enabled=True, anchor_cache_dir="cache", **craft)
    return AnchorStream(cache, settings, share, device=torch.device("cpu"), rank=rank, seed=3)


def take_step(one: AnchorStream, first: int) -> list[dict]:
    found = list(one.gradient_batches(first))
    assert len(found) == len(one.gradient_batches(first)) == one.share.micro_batches
    return found + list(one.constraint_batches(first) or [])


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], value) for key, value in other.items())


@pytest.mark.parametrize(
    "flags",
    [{}, {"constraint_freq": 3}, {"constraint_split": "train"}],
    ids=["heldout", "every third", "train"],
)
@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (3, 2)])
def test_each_micro_batch_is_read_once_and_one_ahead(cache, reads, flags, world_size, rank):
    one = stream(cache, world_size, rank, **flags)
    for first in range(0, 5 * TOTAL, TOTAL):
        take_step(one, first)
    wanted = []
    for first in range(0, 6 * TOTAL, TOTAL):
        for drawn in one.indices(first).values():
            for micro_batch in range(one.share.micro_batches):
                positions = one.share.positions(first, rank, micro_batch)
                wanted.append([drawn[position - first] for position in positions])
    one.close()
    purposes = [len(one.indices(first)) for first in range(0, 5 * TOTAL, TOTAL)]
    assert purposes == ([2, 1, 1, 2, 1] if "constraint_freq" in flags else 5 * [purposes[0]])
    done = one.share.micro_batches * sum(purposes)
    assert reads[:done] == wanted[:done]
    assert reads[done:] in ([], [wanted[done]])


def test_a_resumed_run_reads_the_same_anchors(cache):
    unbroken = stream(cache)
    expected = [take_step(unbroken, first) for first in range(0, 4 * TOTAL, TOTAL)]
    for start in (1, 3):
        resumed = stream(cache)
        for step in range(start, 4):
            assert_same(take_step(resumed, step * TOTAL), expected[step])


def test_any_step_can_be_asked_for(cache):
    one = stream(cache)
    for first in (12, 0, 0, 6, 30, 36):
        assert_same(take_step(one, first), take_step(stream(cache), first))
        assert [batch for batch, _ in one.heldout_batches(4, 0)]
    assert one.take_seconds() > 0
    assert one.take_seconds() == 0


def test_an_unreadable_anchor_is_an_error_of_its_step(cache, monkeypatch):
    one, read = stream(cache, constraint_split="train"), cache.read
    bad = one.indices(TOTAL)["gradient"][:2]

    def fail(indices, *rest):
        if list(indices) == bad:
            raise OSError("the disk is gone")
        return read(indices, *rest)

    monkeypatch.setattr(cache, "read", fail)
    assert bad not in [one.indices(0)["gradient"][at : at + 2] for at in (0, 2, 4)]
    assert len(take_step(one, 0)) == 3
    with pytest.raises(OSError, match="the disk is gone"):
        take_step(one, TOTAL)

"""Draws from several data sets with weights, and what the data sets must share."""

import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craft_ds.data.batch_partition import partition_step
from craft_ds.data.mixture import MixtureSampler, check_same_features
from craft_ds.data.task_data import StepSampler
from craft_ds.errors import UserError

small = st.integers(1, 4)
mixtures = st.lists(st.tuples(st.integers(1, 12), st.floats(0.05, 5.0)), min_size=1, max_size=4)


def sampler_of(mixture, batch, accumulation, rank, world, seed, start=0) -> MixtureSampler:
    share = partition_step(batch * accumulation * world, world, batch, "samples")
    sizes, weights = zip(*mixture, strict=True)
    return MixtureSampler(sizes, weights, share, rank, seed, start * share.total)


def stream_of(mixture, seed, count) -> list[int]:
    return sampler_of(mixture, count, 1, 0, 1, seed).draw(range(count))


@given(mixtures, small, small, small, st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_step_does_not_depend_on_the_ranks(mixture, batch, accumulation, world, seed):
    ranks = [
        list(itertools.islice(sampler_of(mixture, batch, accumulation, rank, world, seed), 3 * accumulation))
        for rank in range(world)
    ]
    taken = [index for parts in zip(*ranks, strict=True) for part in parts for index in part]
    assert taken == stream_of(mixture, seed, 3 * batch * accumulation * world)


@given(mixtures, small, small, st.integers(0, 5), st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_a_later_start_continues_the_stream(mixture, batch, world, seed, start):
    for rank in range(world):
        unbroken = list(itertools.islice(sampler_of(mixture, batch, 1, rank, world, seed), start + 3))
        resumed = list(itertools.islice(sampler_of(mixture, batch, 1, rank, world, seed, start), 3))
        assert resumed == unbroken[start:]


@given(mixtures, st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_sample_comes_once_at_most_in_an_epoch_of_its_data_set(mixture, seed):
    stream, start = stream_of(mixture, seed, 60), 0
    assert all(0 <= index < sum(size for size, _ in mixture) for index in stream)
    for size, _ in mixture:
        for first in range(0, 60, size):
            own = [index for index in stream[first : first + size] if start <= index < start + size]
            assert len(set(own)) == len(own)
        start += size


def test_shares_follow_the_weights_and_not_the_sizes():
    sizes, weights, count = (5, 50, 7), (6, 3, 1), 20_000
    stream = stream_of(list(zip(sizes, weights, strict=True)), 3, count)
    drawn, start = Counter(stream), 0
    for size, weight in zip(sizes, weights, strict=True):
        own, share = [drawn[index] for index in range(start, start + size)], weight / sum(weights)
        assert abs(sum(own) - share * count) < 4 * (share * (1 - share) * count) ** 0.5
        mean = sum(own) / size
        assert all(abs(often - mean) < 5 * mean**0.5 for often in own)  # equally often, but for chance
        start += size


def test_scale_of_the_weights_does_not_matter_and_the_seed_does():
    one, ten = [(9, 1.0), (4, 2.0)], [(9, 10.0), (4, 20.0)]
    assert stream_of(one, 0, 50) == stream_of(ten, 0, 50)
    assert stream_of(one, 0, 50) != stream_of(one, 1, 50)


def test_one_data_set_has_its_plain_order():
    share = partition_step(4, 1, 4, "samples")
    plain = StepSampler(11, share, 0, 2)
    assert stream_of([(11, 0.3)], 2, 40) == plain.draw(range(40))


def data_set(name, **features):
    shapes = {"action": (4,), "observation.images.top": (64, 64, 3), **features}
    kinds = {key: "video" if "images" in key and name == "video" else "float32" for key in shapes}
    kinds |= {key: "image" for key in shapes if "images" in key and name != "video"}
    entries = {
        key: {"dtype": kinds[key], "shape": shape} for key, shape in shapes.items() if shape is not None
    }
    return SimpleNamespace(repo_id=name, meta=SimpleNamespace(features=entries))


def test_data_sets_with_the_same_features_are_accepted():
    check_same_features([data_set("one")])
    check_same_features([data_set("one"), data_set("two"), data_set("video")])


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"extra": (2,)}, "--datasets: other has extra, which one lacks"),
        ({"action": None}, "--datasets: one has action, which other lacks"),
        ({"action": (5,)}, r"action is float32 of shape \[5\] in other, but float32 of shape \[4\] in one"),
        ({"observation.images.top": (32, 64, 3)}, r"picture of shape \[3, 32, 64\] in other"),
    ],
)
def test_other_features_are_named(features, message):
    with pytest.raises(UserError, match=message):
        check_same_features([data_set("one"), data_set("two"), data_set("other", **features)])

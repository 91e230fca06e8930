import copy
import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craft_ds.data import task_data
from craft_ds.data.batch_partition import partition_step
from craft_ds.data.checked_samples import NamedSamples
from craft_ds.data.lerobot_dataset import check_features
from craft_ds.data.policy_input import images_to_float
from craft_ds.data.task_data import (
    StepSampler,
    check_processors,
    heldout_batches,
    load_datasets,
    training_batches,
)
from craft_ds.errors import UserError
from craft_ds.policies.loading import load_processors
from craft_ds.testing.datasets import make_test_dataset


@pytest.fixture
def config(data_config):
    return data_config


def load(config):
    config.validate()
    return load_datasets(config)


# --- the draw -------------------------------------------------------------------------------------------

sizes = st.integers(1, 40)
small = st.integers(1, 4)


def take(sampler: StepSampler, count: int) -> list[list[int]]:
    return list(itertools.islice(sampler, count))


def sampler_of(size, batch, accumulation, rank, world, seed, start=0) -> StepSampler:
    share = partition_step(batch * accumulation * world, world, batch, "samples")
    return StepSampler(size, share, rank, seed, start * share.total)


def steps_of(size, batch, accumulation, world, seed, steps, start=0) -> list[list[int]]:
    """All samples of each step, over all ranks and micro-batches, in the order of the stream."""
    ranks = [
        take(sampler_of(size, batch, accumulation, rank, world, seed, start), steps * accumulation)
        for rank in range(world)
    ]
    micro_batches = [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
    return [
        list(itertools.chain(*micro_batches[step * accumulation : (step + 1) * accumulation]))
        for step in range(steps)
    ]


@given(sizes, small, small, small, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_epoch_takes_each_sample_once(size, batch, accumulation, world, seed):
    steps = -(-2 * size // (batch * accumulation * world))
    stream = list(itertools.chain(*steps_of(size, batch, accumulation, world, seed, steps)))
    assert sorted(stream[:size]) == sorted(stream[size : 2 * size]) == list(range(size))


@given(sizes, small, small, small, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_within_a_step_nothing_repeats_but_at_an_epochs_end(size, batch, accumulation, world, seed):
    """Ranks draw different samples: all samples of a step within an epoch differ."""
    for number, step in enumerate(steps_of(size, batch, accumulation, world, seed, 4)):
        first = number * len(step)
        into_epoch = [first // size == position // size for position in range(first, first + len(step))]
        same_epoch = [sample for sample, same in zip(step, into_epoch, strict=True) if same]
        assert len(set(same_epoch)) == len(same_epoch)


@given(sizes, small, small, small, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_step_depends_on_the_global_batch_alone(size, batch, accumulation, world, seed):
    divided = steps_of(size, batch, accumulation, world, seed, 3)
    alone = steps_of(size, batch * accumulation * world, 1, 1, seed, 3)
    assert divided == alone


@given(sizes, small, small, small, st.integers(0, 5), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_a_later_start_continues_the_stream(size, batch, accumulation, world, seed, start):
    for rank in range(world):
        unbroken = take(sampler_of(size, batch, accumulation, rank, world, seed), (start + 3) * accumulation)
        resumed = take(sampler_of(size, batch, accumulation, rank, world, seed, start), 3 * accumulation)
        assert resumed == unbroken[start * accumulation :]


def test_epochs_and_seeds_have_other_orders():
    stream = steps_of(50, 50, 1, 1, 0, 2)
    assert stream[0] != stream[1]
    assert steps_of(50, 50, 1, 1, 1, 1) != stream[:1]


def test_iterating_again_starts_again():
    sampler = sampler_of(7, 2, 1, 0, 1, 0)
    assert take(sampler, 9) == take(sampler, 9)


# --- LeRobot data sets ----------------------------------------------------------------------------------


def test_the_loader_gives_the_samplers_frames(config):
    train, heldout = load(config)
    assert heldout is None
    assert len(train) == 80
    for rank in range(2):
        sampler = sampler_of(80, 2, 1, rank, 2, 3, start=3)
        batches = training_batches(config, NamedSamples(train), sampler)
        found = [next(batches).samples["index"].tolist() for _ in range(3)]
        assert found == take(sampler, 3)


def test_workers_change_nothing(config):
    train, _ = load(config)
    sampler = sampler_of(80, 2, 1, 0, 1, 3)
    plain = training_batches(config, NamedSamples(train), sampler)
    config.num_workers, config.dataloader_multiprocessing_context = 1, "fork"
    with_worker = training_batches(config, NamedSamples(train), sampler)
    for _ in range(3):
        expected, found = next(plain).samples, next(with_worker).samples
        assert torch.equal(found["index"], expected["index"])
        assert torch.equal(found["observation.images.top"], expected["observation.images.top"])


def test_more_ranks_than_samples_are_refused(config):
    config.validate()
    load_datasets(config, world_size=80)
    with pytest.raises(UserError, match=r"80 training samples for 81 ranks"):
        load_datasets(config, world_size=81)


def test_the_held_out_part_shares_no_episode(config):
    config.eval_freq, config.dataset.eval_split = 1, 0.25
    train, heldout = load(config)
    episodes = [set(part.hf_dataset["episode_index"]) for part in (train, heldout)]
    episodes = [{int(episode) for episode in part} for part in episodes]
    assert [len(part) for part in episodes] == [3, 1]
    assert not episodes[0] & episodes[1]


def test_a_split_is_held_out_without_evaluation_too(config):
    assert load(copy.deepcopy(config))[1] is None
    config.dataset.eval_split = 0.25
    train, heldout = load(config)
    assert (len(train), len(heldout)) == (60, 20)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("limit", [0, 1, 7, 100])
def test_every_held_out_sample_counts_once(config, monkeypatch, world, limit):
    monkeypatch.setattr(task_data, "_loader", lambda config, dataset, batches, process: batches)
    config.max_eval_samples = limit
    for size in (1, 5, 13):
        ranks = [list(heldout_batches(config, range(size), rank, world)) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        assert all(batch and len(batch) <= 2 for batches in ranks for batch, _ in batches)
        counted = Counter(
            index for batches in ranks for batch, counts in batches if counts for index in batch
        )
        assert set(counted.values()) == {1}
        if limit == 0 or limit >= size:
            assert sorted(counted) == list(range(size))
        else:
            assert 1 <= len(counted) <= limit


def test_held_out_batches_are_read(config):
    config.eval_freq, config.dataset.eval_split = 1, 0.25
    _, heldout = load(config)
    batches = heldout_batches(config, NamedSamples(heldout), 0, 1)
    seen = [int(i) for batch, _ in batches for i in batch.samples["frame_index"]]
    assert sorted(seen) == list(range(20))


def test_uint8_images_become_fractions():
    batch = {"image": torch.tensor([0, 51, 255], dtype=torch.uint8), "x": torch.ones(2), "task": ["a"]}
    converted = images_to_float(batch)
    assert torch.equal(converted["image"], torch.tensor([0.0, 0.2, 1.0]))
    assert converted["x"] is batch["x"]
    assert converted["task"] == ["a"]


# --- what does not fit ----------------------------------------------------------------------------------


def test_a_missing_root_is_named(config, tmp_path):
    config.dataset.root = str(tmp_path / "none")
    with pytest.raises(UserError, match=r"--dataset.root=.*none holds no LeRobot data set"):
        load(config)


def test_a_data_set_that_was_not_finalised_is_named(config, inputs, tmp_path):
    import shutil

    root = tmp_path / "cut"
    shutil.copytree(inputs.new, root)
    for file in (root / "meta" / "episodes").rglob("*.parquet"):
        file.unlink()
    config.dataset.root = str(root)
    with pytest.raises(UserError, match=r"--dataset.root=.* was not finalised .*finalize\(\)"):
        load(config)


def test_a_hub_that_does_not_answer_is_one_line(config, tmp_path, monkeypatch):
    def unreachable(*_: object) -> None:
        raise ConnectionError("name not known\nsecond line")

    monkeypatch.setattr(task_data, "make_train_eval_datasets", unreachable)
    monkeypatch.setattr(task_data, "HF_LEROBOT_HOME", tmp_path)
    config.dataset.root = None
    with pytest.raises(UserError, match=r"^--dataset.repo_id=craft-ds/test cannot be opened: name not known"):
        load(config)


@pytest.mark.parametrize("episodes", [[99], [0, 99]])
def test_an_episode_that_is_not_there_is_named(config, episodes):
    config.dataset.episodes = episodes
    with pytest.raises(
        UserError, match=r"^--dataset.episodes names episode 99, but .* has 4 episodes, 0 to 3$"
    ):
        load(config)


@pytest.mark.parametrize("entries", [{"state_dim": 6}, {"action_dim": 6}, {"state_dim": 3}])
def test_another_robots_data_is_refused_by_feature(config, tmp_path, entries):
    root = make_test_dataset(tmp_path / "six", tasks=1, episodes_per_task=1, frames=3, **entries)
    config.dataset.root = str(root)
    ((argument, width),) = entries.items()
    name = {"state_dim": "observation.state", "action_dim": "action"}[argument]
    preprocessor, _ = load_processors(config.policy, config.policy.pretrained_path)
    train, _ = load(config)
    with pytest.raises(UserError, match=rf"{name} has {width} entries \(x0, x1, .*\), the policy takes 4: "):
        check_features(train.meta, config.policy, preprocessor)


def test_what_the_processors_refuse_is_one_line(config):
    preprocessor, _ = load_processors(config.policy, config.policy.pretrained_path)
    train, _ = load(copy.deepcopy(config))
    check_processors(config, NamedSamples(train), preprocessor)

    def refuse(_: object) -> None:
        raise RuntimeError("The size of tensor a (6) must match\nand more")

    with pytest.raises(
        UserError, match=r"does not fit the policy's processors \(The size .*match\)"
    ) as raised:
        check_processors(config, NamedSamples(train), refuse)
    assert "\n" not in str(raised.value)

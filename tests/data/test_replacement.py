"""Replacements of bad samples: functions of seed and position alone."""

import itertools

import pytest
import torch
from torch.utils.data import get_worker_info

from craft_ds.config.train_config import TrainConfig
from craft_ds.data.batch_partition import partition_step
from craft_ds.data.checked_samples import BadSample, NamedSamples
from craft_ds.data.replacement import PROBES, ReplacingSamples
from craft_ds.data.task_data import StepSampler, heldout_batches, training_batches
from craft_ds.testing.damaged_samples import damage, open_test_dataset
from craft_ds.testing.datasets import make_test_dataset

BAD = {(0, 3), (1, 0), (1, 7)}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """24 samples of 2 episodes, 3 of them bad for different reasons."""
    root = make_test_dataset(tmp_path_factory.mktemp("bad") / "data", 2, 1, frames=12)
    for name, place in zip(("cut picture", "nan action", "small picture"), sorted(BAD), strict=True):
        damage(root, name, *place)
    return NamedSamples(open_test_dataset(root, 1))


def stream(samples, *, world: int = 1, workers: int = 0, first: int = 0, steps: int = 12):
    """Samples of each step of 4, over all ranks, and the bad ones that were replaced."""
    config = TrainConfig.__new__(TrainConfig)
    config.seed, config.num_workers, config.prefetch_factor = 7, workers, 2
    config.dataloader_multiprocessing_context = "fork"
    found, bad = [[] for _ in range(steps)], []
    for rank in range(world):
        sampler = StepSampler(len(samples), partition_step(4, world, 4, "samples"), rank, 7, first * 4)
        for step, raw in enumerate(itertools.islice(training_batches(config, samples, sampler), steps)):
            found[step] += zip(
                raw.samples["episode_index"].tolist(), raw.samples["frame_index"].tolist(), strict=True
            )
            bad += [(error.episode, error.frame) for error in raw.bad]
            assert raw.replaced <= len(raw.bad)
    return found, bad


def test_good_samples_stay_and_bad_ones_do_not_train(samples):
    found, bad = stream(samples)
    sampler = StepSampler(24, partition_step(4, 1, 4, "samples"), 0, 7)
    drawn = [samples.place(index) for index in sampler.draw(range(48))]
    trained = list(itertools.chain(*found))
    assert not BAD & set(trained)
    replaced = [position for position, place in enumerate(drawn) if place in BAD]
    assert len(replaced) == 6  # two epochs
    assert [trained[p] for p in range(48) if p not in replaced] == [
        drawn[p] for p in range(48) if p not in replaced
    ]
    assert set(bad) == BAD


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_ranks_trains_the_same_samples(samples, world):
    assert stream(samples, world=world)[0] == stream(samples)[0]


def test_any_number_of_workers_trains_the_same_samples(samples):
    assert stream(samples, workers=2) == stream(samples)


@pytest.mark.parametrize("first", [1, 5, 11])
def test_a_resumed_run_trains_the_same_samples(samples, first):
    assert stream(samples, first=first, steps=12 - first)[0] == stream(samples)[0][first:]


def test_another_seed_has_other_replacements(samples):
    one, other = (list(ReplacingSamples(samples, seed).candidates(3)) for seed in (1, 2))
    assert one[0] == other[0] == 3
    assert len(one) == 1 + PROBES
    assert one[1:] != other[1:]


def test_the_random_state_is_that_of_the_position(samples, monkeypatch):
    """Transforms of a replacement draw the same numbers as those of a sample that was good at once."""

    class Drawing(NamedSamples):
        def __getitem__(self, index):
            value = torch.rand(())
            if index == 3:
                raise BadSample("me/set", 0, 3, "it is bad")
            return {"drawn": value}

    replacing = ReplacingSamples(Drawing(samples.dataset), 7)
    good = ReplacingSamples(Drawing(samples.dataset), 7, index_at=lambda _: 4)
    assert replacing[3].sample["drawn"] == good[3].sample["drawn"]
    assert [len(replacing[3].bad), len(good[3].bad)] == [1, 0]
    assert get_worker_info() is None


def test_a_data_set_without_good_samples_is_an_error(samples, monkeypatch):
    def fail(self, index):
        raise BadSample("me/set", 0, index, "it is bad")

    monkeypatch.setattr(NamedSamples, "__getitem__", fail)
    with pytest.raises(
        BadSample, match=r"frame 3: it is bad \(and 100 samples drawn instead of it are bad too"
    ):
        ReplacingSamples(samples, 7)[3]


@pytest.mark.parametrize("world", [1, 2])
def test_held_out_samples_are_replaced_alike(samples, world):
    config = TrainConfig.__new__(TrainConfig)
    config.seed, config.num_workers, config.max_eval_samples, config.batch_size = 7, 0, 0, 4
    seen, replaced = [], 0
    for rank in range(world):
        for raw, counts in heldout_batches(config, samples, rank, world):
            if counts:
                seen += raw.samples["index"].tolist()
                replaced += raw.replaced
    assert len(seen) == 24
    assert replaced == 3
    assert sorted(seen) == sorted(
        int(ReplacingSamples(samples, 7)[index].sample["index"]) for index in range(24)
    )

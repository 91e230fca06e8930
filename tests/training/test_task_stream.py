"""The stream of task samples: each sample of a step once, also read ahead and at a later start."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from craft_ds.data.checked_samples import NamedSamples
from craft_ds.data.task_data import check_processors, load_datasets
from craft_ds.policies.loading import load_processors
from craft_ds.training.build import _open_tasks
from craft_ds.training.task_stream import TaskStream

PER_STEP = 6
"""Samples of a step: with micro-batches of 2, three of one rank."""


@pytest.fixture
def open_stream(inputs, data_config):
    config = data_config
    config.dataloader_multiprocessing_context = "fork"
    config.validate()
    preprocessor, _ = load_processors(config.policy, inputs.policy)
    samples = NamedSamples(load_datasets(config)[0])
    task_input = check_processors(config, samples, preprocessor)
    part = SimpleNamespace(samples=samples)

    def open_stream(workers: int, first_step: int, world_size: int = 1, rank: int = 0) -> TaskStream:
        config.num_workers = workers
        return _open_tasks(
            config,
            SimpleNamespace(samples=samples, parts=[part]),
            task_input,
            SimpleNamespace(device=torch.device("cpu"), rank=rank, world_size=world_size),
            SimpleNamespace(samples_per_step=PER_STEP, samples_seen=first_step * PER_STEP),
        )

    return open_stream


def take_steps(stream: TaskStream, steps: int) -> list[list[list[int]]]:
    """Samples of each micro-batch of each step."""
    found = []
    for _ in range(steps):
        batches = stream.next_step([0.0])
        assert len(batches) == stream.partition.micro_batches
        found.append([batch["index"].tolist() for batch in batches])
    stream.close()
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_leaves_no_sample_out_and_repeats_none(open_stream, workers):
    """What was read ahead when a run stopped is read again by the run that resumes."""
    stopped_after, steps = 5, 13  # 78 of 80 samples: one epoch
    first = take_steps(open_stream(workers, 0), stopped_after)
    resumed = take_steps(open_stream(workers, stopped_after), steps - stopped_after)
    wanted = open_stream(0, 0)
    for number, step in enumerate(first + resumed):
        assert [len(micro_batch) for micro_batch in step] == [2, 2, 2]
        assert [*chain(*step)] == wanted.indices(number * PER_STEP)
    seen = [sample for step in first + resumed for sample in chain(*step)]
    assert len(seen) == len(set(seen)) == steps * PER_STEP


def test_ranks_share_a_step_also_when_another_number_resumes(open_stream):
    alone = take_steps(open_stream(0, 0), 4)
    for world_size in (2, 3):
        ranks = [take_steps(open_stream(1, 2, world_size, rank), 2) for rank in range(world_size)]
        for step in range(2):
            together = sorted(sample for rank in ranks for part in rank[step] for sample in part)
            assert together == sorted(chain(*alone[2 + step]))


def test_images_are_floats_and_waiting_is_timed(open_stream):
    stream = open_stream(0, 0)
    for batch in stream.next_step([0.0]):
        image = batch["observation.images.top"]
        assert image.dtype == torch.float32
        assert 0 <= image.min() < image.max() <= 1
    assert stream.take_seconds() > 0
    assert stream.take_seconds() == 0

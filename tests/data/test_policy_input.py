"""The policy's input: the same bits with images as bytes, in workers and at a later start."""

import copy
import itertools
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, NormalizationMode
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.processor import NormalizerProcessorStep, ObservationProcessorStep
from torch.utils.data import default_collate

from craft_ds.data.batch_partition import partition_step
from craft_ds.data.checked_samples import NamedSamples
from craft_ds.data.inline_tensors import with_inline_tensors, with_tensors
from craft_ds.data.policy_input import (
    check_picklable,
    images_to_float,
    keep_images_uint8,
    open_policy_input,
    to_device,
)
from craft_ds.data.task_data import StepSampler, check_processors, training_batches
from craft_ds.errors import UserError
from craft_ds.policies.loading import load_policy_config, load_processors

CAMERA = "observation.images.top"
CPU = torch.device("cpu")


@dataclass
class Noise(ObservationProcessorStep):
    """Adds noise to the state."""

    def observation(self, observation):
        state = observation["observation.state"]
        return observation | {"observation.state": state + torch.rand_like(state)}

    def transform_features(self, features):
        return features


@dataclass
class Halved(ObservationProcessorStep):
    """Halves images, also those of bytes."""

    def observation(self, observation):
        return observation | {CAMERA: observation[CAMERA] / 2}

    def transform_features(self, features):
        return features


@dataclass
class FloatsOnly(ObservationProcessorStep):
    """Refuses images of bytes."""

    def observation(self, observation):
        assert observation[CAMERA].is_floating_point()
        return observation

    def transform_features(self, features):
        return features


@pytest.fixture
def config(data_config):
    data_config.dataloader_multiprocessing_context = "fork"
    return data_config


@pytest.fixture
def preprocessor(inputs):
    return load_processors(load_policy_config(inputs.policy), inputs.policy)[0]


@pytest.fixture
def dataset(inputs):
    chunk = {"action": [step / 10 for step in range(8)]}
    return LeRobotDataset("craft-ds/test", root=inputs.new, delta_timestamps=chunk)


def normalising_images():
    features = load_features()
    statistics = {CAMERA: {"mean": [[[0.4]]] * 3, "std": [[[0.3]]] * 3}}
    return NormalizerProcessorStep(features, {FeatureType.VISUAL: NormalizationMode.MEAN_STD}, statistics)


def load_features():
    from lerobot.configs import PolicyFeature

    return {CAMERA: PolicyFeature(FeatureType.VISUAL, (3, 64, 64))}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in other.items():
        if isinstance(value, torch.Tensor):
            assert one[key].dtype == value.dtype
            assert torch.equal(one[key], value), key


def test_every_byte_has_the_value_of_a_division():
    every = torch.arange(256, dtype=torch.uint8)
    found = images_to_float({"image": every, "x": torch.ones(2), "task": ["a"]})
    assert torch.equal(found["image"], every.float() / 255.0)
    assert every[-1] == 255
    assert (found["x"].dtype, found["task"]) == (torch.float32, ["a"])


def test_stored_pictures_stay_bytes_of_the_same_value(dataset):
    rows = [3, 40]
    expected = [dataset[row] for row in rows]
    keep_images_uint8(dataset)
    for row, want in zip(rows, expected, strict=True):
        found = dataset[row]
        assert found[CAMERA].dtype == torch.uint8
        assert list(found) == list(want)
        assert_same(images_to_float(found), want)
    assert pickle.loads(pickle.dumps(dataset.hf_dataset))[3][CAMERA].dtype == torch.uint8


def test_image_transforms_see_what_they_saw(inputs):
    seen = []

    def transform(image):
        seen.append(image.dtype)
        return image

    dataset = LeRobotDataset("craft-ds/test", root=inputs.new, image_transforms=transform)
    keep_images_uint8(dataset)
    assert dataset[0][CAMERA].dtype == torch.float32
    assert seen == [torch.float32]


@pytest.mark.parametrize(
    ("step", "bytes_pass"),
    [(None, True), (Noise, True), (Halved, False), (FloatsOnly, False), (normalising_images, False)],
)
def test_images_pass_as_bytes_where_that_changes_nothing(dataset, preprocessor, step, bytes_pass):
    if step is not None:
        preprocessor.steps = [*preprocessor.steps, step()]
    expected_steps = copy.deepcopy(preprocessor)
    keep_images_uint8(dataset)
    batch = default_collate([dataset[0], dataset[30]])
    task_input = open_policy_input(preprocessor, batch)
    assert task_input.bytes_pass == bytes_pass
    torch.manual_seed(1)
    processed = task_input.process(batch)
    assert (processed[CAMERA].dtype == torch.uint8) == bytes_pass
    torch.manual_seed(1)
    expected = expected_steps(images_to_float(batch))
    assert_same(task_input.to_device(processed, CPU), expected)


def test_trying_draws_no_numbers_of_the_run(dataset, preprocessor):
    keep_images_uint8(dataset)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    open_policy_input(preprocessor, default_collate([dataset[0]]))
    assert torch.equal(torch.rand(3), expected)


def test_processors_that_workers_cannot_get_are_named(config, dataset, preprocessor):
    check_picklable(preprocessor)
    preprocessor.to_output = lambda transition: transition
    config.num_workers, config.dataloader_multiprocessing_context = 2, "spawn"
    with pytest.raises(UserError, match=r"cannot be sent to data-loader workers .*=fork or --num_workers=0"):
        check_processors(config, NamedSamples(dataset), preprocessor)
    config.num_workers = 0
    check_processors(config, NamedSamples(dataset), preprocessor)


def batches(config, dataset, preprocessor, first, steps):
    """Batches of 2 steps of 3 micro-batches each, and the next random number of the training process."""
    samples = NamedSamples(dataset)
    task_input = open_policy_input(preprocessor, default_collate([samples[0]]))
    sampler = StepSampler(80, partition_step(6, 1, 2, "samples"), 0, 3, first)
    read = training_batches(config, samples, sampler, task_input.process)
    torch.manual_seed(9)
    found = [
        task_input.to_device(batch.samples, CPU) | {"drawn": torch.rand(2)}
        for batch in itertools.islice(read, 3 * steps)
    ]
    return found


def test_random_processors_give_the_same_anywhere(config, dataset, preprocessor):
    preprocessor.steps = [*preprocessor.steps, Noise()]
    alone = batches(config, dataset, preprocessor, 0, 3)
    config.num_workers = 2
    for found, expected in zip(batches(config, dataset, preprocessor, 0, 3), alone, strict=True):
        assert_same(found, expected)
    for found, expected in zip(batches(config, dataset, preprocessor, 6, 2), alone[3:], strict=True):
        assert_same(found, expected | {"drawn": found["drawn"]})
    states = [batch["observation.state"] for batch in alone]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(states, 2))


def test_an_error_of_the_processors_is_itself(config, dataset, preprocessor):
    @dataclass
    class Refusing(FloatsOnly):
        def observation(self, observation):
            raise UserError("no such state")

    sampler = StepSampler(80, partition_step(2, 1, 2, "samples"), 0, 3)
    preprocessor.steps = [*preprocessor.steps, Refusing()]
    for workers in (0, 1):
        config.num_workers = workers
        reading = training_batches(config, NamedSamples(dataset), sampler, preprocessor)
        with pytest.raises(UserError, match=r"^no such state$"):
            next(reading)


def test_inline_tensors_come_back():
    batch = {
        "small": torch.arange(6).view(2, 3).t(),
        "mask": torch.tensor([True, False]),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "large": torch.zeros(1 << 16, dtype=torch.uint8),
        "array": np.ones(2),
        "task": ["a"],
    }
    sent = with_inline_tensors(batch)
    assert [isinstance(value, torch.Tensor) for value in sent.values()] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    found = with_tensors(pickle.loads(pickle.dumps(sent)))
    assert_same(found, batch)
    assert type(found["array"]) is np.ndarray
    assert sent["large"] is batch["large"]


def test_a_batch_moves_with_all_that_is_no_tensor():
    moved = to_device({"x": torch.ones(2), "task": ["a"], "done": False}, "cpu")
    assert torch.equal(moved.pop("x"), torch.ones(2))
    assert moved == {"task": ["a"], "done": False}

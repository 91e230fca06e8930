"""Augmented images of anchors."""

import pytest
import torch
from lerobot.transforms import ImageTransformConfig, ImageTransformsConfig

from craft_ds.anchors.augmentation import AnchorAugmentation
from craft_ds.anchors.cache import AnchorCache
from craft_ds.anchors.stream import AnchorStream
from craft_ds.config.craft_config import CraftConfig
from craft_ds.data.batch_partition import partition_step
from craft_ds.errors import UserError
from craft_ds.testing.datasets import write_test_cache

CAMERA = "observation.images.top"


@pytest.fixture
def cache(tmp_path):
    write_test_cache(tmp_path / "cache", [0, 1] * 6, list(range(12)), [0, 1, 2, 3])
    return AnchorCache.open(tmp_path / "cache")


def stream(cache, augmented=True, world_size=1, rank=0, seed=0):
    augment = AnchorAugmentation(ImageTransformsConfig(), seed) if augmented else None
    share = partition_step(6, world_size, 2, "anchors")
    craft = CraftConfig(enabled=True, anchor_cache_dir="cache")
    return AnchorStream(
        cache, craft, share, device=torch.device("cpu"), rank=rank, seed=seed, augment=augment
    )


def images(batches):
    return torch.cat([batch[CAMERA] for batch in batches])


def step_of(streams, first):
    """Return the images of a step in the order of the stream, and their positions."""
    places = {}
    for one in streams:
        batches = list(one.gradient_batches(first))
        for micro_batch, batch in enumerate(batches):
            positions = one.share.positions(first, one._rank, micro_batch)
            places |= dict(zip(positions, batch[CAMERA], strict=True))
    return [places[position] for position in sorted(places)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_images_depend_on_seed_and_position_alone(cache, world_size):
    one = step_of([stream(cache)], 12)
    torch.rand(7)
    ranks = step_of([stream(cache, world_size=world_size, rank=rank) for rank in range(world_size)], 12)
    assert all(torch.equal(a, b) for a, b in zip(one, ranks, strict=True))
    other = step_of([stream(cache, seed=1)], 12)
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_anchor_looks_different_each_time_and_stays_an_image(cache):
    augmented, plain = stream(cache), stream(cache, augmented=False)
    steps = [images(augmented.gradient_batches(first)) for first in (0, 24)]
    stored = [images(plain.gradient_batches(first)) for first in (0, 24)]
    for found, expected in zip(steps, stored, strict=True):
        assert found.shape == expected.shape
        assert found.dtype == torch.float32
        assert 0 <= found.min() <= found.max() <= 1
        assert all(not torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    drawn = [augmented.indices(first)["gradient"] for first in (0, 24)]
    again = [(i, j) for i, a in enumerate(drawn[0]) for j, b in enumerate(drawn[1]) if a == b]
    assert again
    assert all(not torch.equal(steps[0][i], steps[1][j]) for i, j in again)


def test_constraint_and_held_out_images_stay_as_stored(cache):
    augmented, plain = stream(cache), stream(cache, augmented=False)
    assert torch.equal(images(augmented.constraint_batches(6)), images(plain.constraint_batches(6)))
    one, other = ([batch for batch, _ in each.heldout_batches(4, 0)] for each in (augmented, plain))
    assert torch.equal(images(one), images(other))


def test_the_generators_of_the_run_are_left_alone(cache):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(stream(cache).gradient_batches(0))
    assert torch.equal(torch.rand(3), expected)


def test_cameras_are_transformed_separately():
    augment = AnchorAugmentation(ImageTransformsConfig(), seed=0)
    image = torch.rand(1, 3, 8, 8)
    batch = {"a": image.clone(), "b": image.clone(), "tokens": torch.ones(1, 2)}
    augment(batch, ["a", "b"], [0])
    assert not torch.equal(batch["a"], batch["b"])
    assert torch.equal(batch["tokens"], torch.ones(1, 2))


def test_unusable_transforms_are_named():
    with pytest.raises(UserError, match=r"--dataset\.image_transforms\.tfs cannot be used: .*Warp"):
        AnchorAugmentation(ImageTransformsConfig(tfs={"warp": ImageTransformConfig(type="Warp")}), 0)
    with pytest.raises(UserError, match=r"--craft\.anchor_augmentation=lerobot has no effect"):
        AnchorAugmentation(ImageTransformsConfig(max_num_transforms=0), 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_features": True}, "does not read"),
        ({"constraint_split": "train"}, "measure the constraint on changed images"),
        ({"anchor_augmentation": "flip"}, "--craft.anchor_augmentation=flip"),
    ],
)
def test_combinations_without_sense_are_refused(changes, words):
    values = {"enabled": True, "anchor_cache_dir": "cache", "anchor_augmentation": "lerobot"} | changes
    with pytest.raises(UserError, match=words):
        CraftConfig(**values).validate()
    CraftConfig(enabled=True, anchor_cache_dir="cache", anchor_augmentation="lerobot").validate()

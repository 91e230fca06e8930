import numpy as np
import pytest
import torch

from craft_ds.policies.loading import load_policy, load_policy_config
from craft_ds.policies.pi0_fast.vision import image_tokens
from craft_ds.testing.policies import make_test_policy_dir
from craft_ds.worlds.base import CAMERA, IMAGE_SIZE
from craft_ds.worlds.vision_pretraining import Scenes, pretrain_vision


@pytest.fixture
def policy(tmp_path):
    make_test_policy_dir(tmp_path / "policy")
    return load_policy(load_policy_config(tmp_path / "policy"), tmp_path / "policy")


def squares(count, colour, rng):
    """Scenes with one square, whose position is that of its centre; the second thing is absent."""
    images = np.zeros((count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    positions = np.full((count, 2, 3), np.nan, dtype=np.float32)
    for image, position in zip(images, positions, strict=True):
        x, y = rng.integers(0, IMAGE_SIZE - 24, 2)
        image[y : y + 24, x : x + 24] = colour
        position[0] = (x / IMAGE_SIZE - 0.5) * 0.4, (y / IMAGE_SIZE - 0.5) * 0.4, 0.0
    return Scenes(images, positions)


def spread_explained(policy, scenes):
    """Share of the positions' variance that a linear readout of the mean token explains."""
    with torch.no_grad():
        images = torch.from_numpy(scenes.images).permute(0, 3, 1, 2).float() / 255
        tokens = image_tokens(policy, {CAMERA: images})[0].mean(dim=1).double().numpy()
    inputs = np.c_[tokens, np.ones(len(tokens))]
    targets = scenes.positions[:, 0, :2].astype(float)
    fit, held_out = slice(0, None, 2), slice(1, None, 2)
    readout = np.linalg.lstsq(inputs[fit], targets[fit], rcond=1e-6)[0]
    return (
        1
        - ((inputs[held_out] @ readout - targets[held_out]) ** 2).sum()
        / ((targets[held_out] - targets[held_out].mean(0)) ** 2).sum()
    )


def test_the_mean_token_comes_to_show_positions(policy):
    rng = np.random.default_rng(0)
    scenes = [squares(400, (200, 40, 40), rng), squares(400, (40, 200, 40), rng)]
    decoder = policy.model.paligemma_with_expert.paligemma.model.language_model
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    random_state = torch.get_rng_state()
    fresh = squares(600, (200, 40, 40), rng)
    assert spread_explained(policy, fresh) < 0.8
    pretrain_vision(policy, scenes, steps=300, seed=0)
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
    assert spread_explained(policy, fresh) > 0.95

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from craft_ds.world import make_world
from craft_ds.world.base import CAMERA, STATE, scene_seed
from craft_ds.world.blocks import _COLOURS
from craft_ds.world.evaluation import evaluate


class FindsColours:
    """A policy for the blocks that looks for colours; it counts what it is asked."""

    def __init__(self, known):
        self.known = known
        self.config = SimpleNamespace(validate_action_token_prefix=True)
        self.batch_sizes = []
        self.strict_seen = False

    def eval(self):
        return self

    def predict_action_chunk(self, batch):
        self.batch_sizes.append(len(batch[STATE]))
        self.strict_seen |= self.config.validate_action_token_prefix
        places = [
            self.find(image, state, text)
            for image, state, text in zip(batch[CAMERA], batch[STATE], batch["task"], strict=True)
        ]
        return torch.stack(places)[:, None].expand(-1, 8, -1)

    def find(self, image, state, text):
        colour = text.split()[2]
        shown = np.argwhere(((image * 255).round().permute(1, 2, 0).numpy() == _COLOURS[colour]).all(-1))
        if colour not in self.known or not len(shown):
            return state
        return torch.from_numpy(shown.mean(0)[::-1] / 63).float()


def run(policy, episodes=6, seed=0):
    world = make_world("blocks")
    return evaluate(
        policy, lambda batch: batch, lambda chunk: chunk, world, world.tasks("all"), episodes, seed
    )


def test_a_policy_that_knows_some_colours_succeeds_at_those():
    policy = FindsColours({"red", "green", "blue"})
    assert run(policy) == {"reach-red": 1.0, "reach-green": 1.0, "reach-blue": 1.0, "reach-yellow": 0.0}


def test_episodes_share_a_call_and_leave_it_when_they_succeed():
    policy = FindsColours({"red", "green", "blue"})
    run(policy)
    assert policy.batch_sizes[0] == 6
    chunks = 48 // 8
    assert policy.batch_sizes[-chunks:] == [6] * chunks  # the unknown colour runs to the horizon
    assert len(policy.batch_sizes) < 4 * chunks


def test_a_forgetful_policy_may_fail_but_not_raise_and_gets_its_strictness_back():
    policy = FindsColours({"red"})
    run(policy, episodes=1)
    assert not policy.strict_seen
    assert policy.config.validate_action_token_prefix


@pytest.mark.parametrize("seed", [0, 7])
def test_the_scenes_are_those_of_the_evaluation_seed(seed):
    seen = []
    policy = FindsColours(set())
    policy.find = lambda image, state, text: seen.append(state) or state
    run(policy, episodes=2, seed=seed)
    world = make_world("blocks")
    for episode in range(2):
        world.reset("reach-red", scene_seed(seed, episode, evaluation=True))
        np.testing.assert_array_equal(seen[episode].numpy(), world.observe().state)

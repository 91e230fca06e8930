import numpy as np
import pytest

from craft_ds.errors import UserError
from craft_ds.worlds import make_world
from craft_ds.worlds.recording import disturbances, record_episode


class Recorded:
    """The blocks, with the actions that were executed, and scenes that only a straight path solves."""

    def __init__(self, reach=float("inf"), unlucky=0):
        self.world = make_world("blocks")
        self.executed = []
        self.resets = 0
        self.unlucky = unlucky

    def __getattr__(self, name):
        return getattr(self.world, name)

    def reset(self, task, seed):
        self.resets += 1
        self.executed.append([])
        self.world.reset(task, seed)

    def step(self, action):
        self.executed[-1].append(action)
        self.world.step(action)

    @property
    def success(self):
        return self.world.success and self.resets > self.unlucky


def test_the_recorded_actions_are_the_experts_and_those_executed_are_disturbed():
    world = Recorded()
    episode = record_episode(world, "reach-red", 3, noise=0.1, drift=0.5)
    world.world.reset("reach-red", 3)
    np.testing.assert_array_equal(episode.actions[0], world.expert())
    assert np.abs(np.array(world.executed[0]) - episode.actions).max() > 0.05
    still = Recorded()
    episode = record_episode(still, "reach-red", 3, noise=0.0)
    np.testing.assert_array_equal(np.array(still.executed[0]), episode.actions)


def test_other_noise_is_drawn_where_the_expert_fails():
    world = Recorded(unlucky=2)
    record_episode(world, "reach-red", 3)
    assert world.resets == 3
    assert not np.array_equal(world.executed[0][0], world.executed[1][0])
    with pytest.raises(UserError, match="reach-red"):
        record_episode(Recorded(unlucky=100), "reach-red", 3)


def test_drifts_last_some_steps_and_spare_the_gripper():
    world = make_world("blocks")
    world.action_range = ((-2.0,) * 4, (2.0,) * 4)
    world.action_names = ("x", "y", "z", "gripper_effort")
    stream = disturbances(world, np.random.default_rng(0), noise=0.0, drift=1.5)
    offsets = np.array([next(stream) for _ in range(4000)])
    assert (offsets[:, 3] == 0).all()
    assert 2.9 < np.abs(offsets).max() <= 3.0  # 1.5 of half a range of 4
    drifting = offsets.any(axis=1)
    assert 0.1 < drifting.mean() < 0.3
    starts = np.flatnonzero(np.abs(np.diff(offsets, axis=0)).any(axis=1)) + 1
    lengths = np.diff(starts)[drifting[starts[:-1]]]
    assert set(lengths) == set(range(3, 9))
    quiet = disturbances(world, np.random.default_rng(0), noise=0.0, drift=0.0)
    assert not np.array([next(quiet) for _ in range(100)]).any()

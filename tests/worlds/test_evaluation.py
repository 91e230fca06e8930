import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import craft_ds.worlds.evaluation
from craft_ds.worlds import make_world
from craft_ds.worlds.base import CAMERA, STATE, scene_seed
from craft_ds.worlds.blocks import _COLOURS
from craft_ds.worlds.evaluation import ClosedLoopPolicy, evaluate


class FindsColours:
    """Policy for the blocks that finds colours in the image and records its calls."""

    def __init__(self, known):
        self.known = known
        self.batch_sizes = []
        self.scenes = []

    def __call__(self, batch):
        self.batch_sizes.append(len(batch[STATE]))
        self.scenes.append((batch["task"][0], batch[STATE].tolist()))
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


def run(policy, episodes=6, seed=0, rank=0, world_size=1):
    world = make_world("blocks")
    return evaluate(
        ClosedLoopPolicy(policy, lambda batch: batch, lambda chunk: chunk),
        world,
        world.tasks("all"),
        episodes=episodes,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )


def run_on_ranks(monkeypatch, world_size, make_policy, episodes):
    """Run one thread per rank; a rank with one exchange more than another would break the barrier."""
    values, barrier, rank_of = (
        [None] * world_size,
        threading.Barrier(world_size, timeout=60),
        threading.local(),
    )

    def gather(value):
        values[rank_of.rank] = value
        barrier.wait()
        gathered = list(values)
        barrier.wait()
        return gathered

    def one_rank(rank):
        rank_of.rank, policy = rank, make_policy()
        return run(policy, episodes, rank=rank, world_size=world_size), policy

    monkeypatch.setattr(craft_ds.worlds.evaluation, "gather_objects", gather)
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(one_rank, range(world_size)))


def test_a_policy_succeeds_at_the_colours_it_knows():
    policy = FindsColours({"red", "green", "blue"})
    assert run(policy) == {"reach-red": 1.0, "reach-green": 1.0, "reach-blue": 1.0, "reach-yellow": 0.0}


def test_episodes_share_calls_until_they_succeed():
    policy = FindsColours({"red", "green", "blue"})
    run(policy)
    assert policy.batch_sizes[0] == 6
    chunks = 48 // 8
    assert policy.batch_sizes[-chunks:] == [6] * chunks  # the unknown colour runs to the horizon
    assert len(policy.batch_sizes) < 4 * chunks


class FindsUpperHalf(FindsColours):
    """Finds blocks only in the upper half of the image: of the first four episodes only the third."""

    def find(self, image, state, text):
        place = super().find(image, state, text)
        return place if place[1] < 0.5 else state


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_scenes_and_success_do_not_depend_on_the_ranks(monkeypatch, world_size):
    def make_policy():
        return FindsUpperHalf({"red", "green", "blue", "yellow"})

    alone = make_policy()
    expected = run(alone, episodes=4)
    assert set(expected.values()) == {0.25}
    ranks = run_on_ranks(monkeypatch, world_size, make_policy, episodes=4)
    assert [success for success, _ in ranks] == [expected] * world_size
    # The ranks of a sharded policy must call it together, even after their episodes have ended.
    calls = [len(policy.batch_sizes) for _, policy in ranks]
    assert calls == [len(alone.batch_sizes)] * world_size
    first = [policy.scenes[0] for _, policy in ranks]
    states = [state for _, seen in first[: min(4, world_size)] for state in seen]
    assert sorted(states) == sorted(alone.scenes[0][1])


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

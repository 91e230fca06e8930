"""The expert at work: episodes as arrays, recorded by several processes at once.

Kept apart from what writes them down, so that the recording processes need not import LeRobot.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from multiprocessing import get_context
from typing import NamedTuple, Protocol

import numpy as np

from craft_ds.worlds import make_world
from craft_ds.worlds.base import Observation, World

NOISE = 0.15
"""Standard deviation of the push on the executed action, as a share of half the action range."""

Job = tuple[str, int]
"""A task and the seed of its scene."""


class Episode(NamedTuple):
    """One demonstration: uint8 (T, H, W, 3) images, float32 (T, S) states and (T, A) clean actions."""

    images: np.ndarray
    states: np.ndarray
    actions: np.ndarray


class Recorder(Protocol):
    """Yields the episodes of the jobs it is given, in their order."""

    def __call__(self, jobs: Sequence[Job], /) -> Iterator[Episode]:
        """Record the jobs."""


def record_episode(world: World, task: str, seed: int) -> Episode:
    """Let the expert solve one scene of ``task``.

    The expert is pushed: noise is added to what is executed but not to what is recorded, so the episode
    also shows how to come back (DART, Laskey et al. 2017, arXiv:1703.09327).

    Raises:
        RuntimeError: if it fails within the world's horizon.
    """
    rng = np.random.default_rng(seed)
    low, high = np.array(world.action_range)
    observations: list[Observation] = []
    actions: list[np.ndarray] = []
    world.reset(task, seed)
    while not world.success:
        if len(actions) == world.horizon:
            raise RuntimeError(f"the expert fails {task} with seed {seed}")
        observations.append(world.observe())
        actions.append(world.expert())
        world.step(actions[-1] + NOISE * rng.standard_normal(len(low)) * (high - low) / 2)
    return Episode(
        np.stack([observation.image for observation in observations]),
        np.stack([observation.state for observation in observations]),
        np.stack(actions),
    )


@contextmanager
def recorder(world: str, processes: int) -> Iterator[Recorder]:
    """Give a :class:`Recorder` for a world; what it yields does not depend on ``processes``."""
    record = partial(_record_job, world)
    if processes == 1:
        yield partial(map, record)
        return
    # Spawned, not forked: a GL context does not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield partial(pool.map, record)


def _record_job(world: str, job: Job) -> Episode:
    task, seed = job
    return record_episode(_world_of(world, task), task, seed)


@cache
def _world_of(name: str, task: str) -> World:
    """Return a world kept for one task: changing the task would load its scene again."""
    return make_world(name)

"""Record episodes of the scripted expert as arrays, in several processes at once.

Separate from `craft_ds.worlds.demonstrations`, so that the recording processes do not import LeRobot.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from typing import NamedTuple, Protocol

import numpy as np

from craft_ds.worlds import make_world
from craft_ds.worlds.base import Observation, World

NOISE = 0.15
"""Standard deviation of the noise on the executed action, as a share of half the action range."""


@dataclass(frozen=True)
class Recipe:
    """Parameters that determine the demonstrations.

    Attributes:
        world: Name of the world.
        episodes_per_task: Episodes of each task.
        seed: Seed of scenes and noise.
        version: Raised when the same parameters give other demonstrations.
    """

    world: str
    episodes_per_task: int = 40
    seed: int = 0
    version: int = 1


Job = tuple[str, int]
"""A task and the seed of its scene."""


class Episode(NamedTuple):
    """One demonstration: uint8 (T, H, W, 3) images, float32 (T, S) states and (T, A) clean actions."""

    images: np.ndarray
    states: np.ndarray
    actions: np.ndarray


class Recorder(Protocol):
    """Function that yields the episodes of jobs, in the order of the jobs."""

    def __call__(self, jobs: Sequence[Job], /) -> Iterator[Episode]:
        """Record the jobs."""


def record_episode(world: World, task: str, seed: int) -> Episode:
    """Record the expert solving one scene of `task`.

    Noise is added to the executed actions but not to the recorded ones, so that the episode also shows how
    to recover (DART, Laskey et al. 2017, arXiv:1703.09327).

    Raises:
        RuntimeError: The expert does not solve the scene within the world's horizon.
    """
    rng = np.random.default_rng(seed)
    low, high = np.array(world.action_range)
    observations: list[Observation] = []
    actions: list[np.ndarray] = []
    world.reset(task, seed)
    while not world.success:
        if len(actions) == world.horizon:
            raise RuntimeError(f"the expert does not solve {task} with seed {seed} in {world.horizon} steps")
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
    """Yield a `Recorder` for a world; its episodes do not depend on `processes`."""
    record = partial(_record_job, world)
    if processes == 1:
        yield partial(map, record)
        return
    # Spawned, not forked: a GL context does not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield partial(pool.map, record)


def _record_job(world: str, job: Job) -> Episode:
    task, seed = job
    return record_episode(_world_for_task(world, task), task, seed)


@cache
def _world_for_task(name: str, task: str) -> World:
    """Return a world that is reused for one task: changing the task would load its scene again."""
    return make_world(name)

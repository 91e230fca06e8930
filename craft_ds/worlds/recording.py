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

from craft_ds.errors import UserError
from craft_ds.worlds import make_world
from craft_ds.worlds.base import Observation, World

_ATTEMPTS = 20
_DRIFT_STARTS = 0.04  # probability per step
_DRIFT_STEPS = (3, 9)


@dataclass(frozen=True)
class Recipe:
    """Parameters that determine the demonstrations.

    Attributes:
        world: Name of the world.
        episodes_per_task: Episodes of each task.
        seed: Seed of scenes and noise.
        version: Raised when the same parameters give other demonstrations.
        tasks: Tasks to write a data set each; empty: one data set of the old tasks and one of the new.
        noise: Standard deviation of the noise on the executed action, as a share of half the action range.
        drift: Largest push off the expert's path, as a share of half the action range: now and then, the
            same random offset is added to all movements of 3 to 8 steps. 0: none.
    """

    world: str
    episodes_per_task: int = 40
    seed: int = 0
    version: int = 1
    tasks: tuple[str, ...] = ()
    noise: float = 0.15
    drift: float = 0.0


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


def record_episode(world: World, task: str, seed: int, *, noise: float = 0.15, drift: float = 0.0) -> Episode:
    """Record the expert solving one scene of `task`.

    Noise is added to the executed actions but not to the recorded ones, so that the episode also shows how
    to recover (DART, Laskey et al. 2017, arXiv:1703.09327). If the noise prevents the expert from solving the
    scene, new noise is drawn.

    Args:
        world: The world to record in.
        task: One of its tasks.
        seed: Seed of the scene and of the noise.
        noise: See `Recipe`.
        drift: See `Recipe`.

    Raises:
        UserError: The expert does not solve the scene within the world's horizon in 20 attempts.
    """
    for attempt in range(_ATTEMPTS):
        rng = np.random.default_rng([seed, attempt] if attempt else seed)
        pushes = disturbances(world, rng, noise, drift)
        observations: list[Observation] = []
        actions: list[np.ndarray] = []
        world.reset(task, seed)
        while not world.success and len(actions) < world.horizon:
            observations.append(world.observe())
            actions.append(world.expert())
            world.step(actions[-1] + next(pushes))
        if world.success:
            return Episode(
                np.stack([observation.image for observation in observations]),
                np.stack([observation.state for observation in observations]),
                np.stack(actions),
            )
    raise UserError(
        f"the expert does not solve {task} with seed {seed} in {world.horizon} steps, {_ATTEMPTS} attempts: "
        "lower --noise and --drift"
    )


def disturbances(world: World, rng: np.random.Generator, noise: float, drift: float) -> Iterator[np.ndarray]:
    """Yield what is added to the executed action of each step, (action dimensions,)."""
    low, high = np.array(world.action_range)
    half = (high - low) / 2
    # An offset of the gripper would drop what it holds.
    moves = np.array([not name.startswith("gripper") for name in world.action_names])
    offset: np.ndarray = np.zeros(len(low))
    steps = 0
    while True:
        if drift and steps == 0:
            starts = rng.random() < _DRIFT_STARTS
            offset = moves * drift * rng.uniform(-1, 1, len(low)) * starts
            steps = int(rng.integers(*_DRIFT_STEPS)) if starts else 1
        steps -= 1
        yield (noise * rng.standard_normal(len(low)) + offset) * half


@contextmanager
def recorder(recipe: Recipe, processes: int) -> Iterator[Recorder]:
    """Yield a `Recorder` for a recipe; its episodes do not depend on `processes`."""
    record = partial(_record_job, recipe)
    if processes == 1:
        yield partial(map, record)
        return
    # Spawned, not forked: a GL context does not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield partial(pool.map, record)


def _record_job(recipe: Recipe, job: Job) -> Episode:
    task, seed = job
    world = _world_for_task(recipe.world, task)
    return record_episode(world, task, seed, noise=recipe.noise, drift=recipe.drift)


@cache
def _world_for_task(name: str, task: str) -> World:
    """Return a world that is reused for one task: changing the task would load its scene again."""
    return make_world(name)

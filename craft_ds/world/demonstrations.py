"""Demonstrations of a world's scripted expert, written as LeRobot v3 data sets.

While it demonstrates, the expert is pushed: noise is added to what is executed but not to what is recorded,
so the data also shows how to come back (DART, Laskey et al. 2017, arXiv:1703.09327).
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from tqdm import tqdm

from craft_ds.errors import UserError
from craft_ds.world import make_world
from craft_ds.world.base import ACTION, CAMERA, IMAGE_SIZE, STATE, World, scene_seed

NOISE = 0.15
"""Standard deviation of the push, as a share of half the action range."""

_RECIPE = "world.json"


@dataclass(frozen=True)
class Recipe:
    """What decides every byte of the demonstrations.

    Attributes:
        world: Name of the world.
        episodes_per_task: Episodes of each task.
        seed: Seed of scenes and noise.
        version: To be raised when the same parameters give other demonstrations.
    """

    world: str
    episodes_per_task: int = 40
    seed: int = 0
    version: int = 1


class Episode(NamedTuple):
    """One demonstration: uint8 (T, H, W, 3) images, float32 (T, S) states and (T, A) clean actions."""

    images: np.ndarray
    states: np.ndarray
    actions: np.ndarray


def record_episode(world: World, task: str, seed: int) -> Episode:
    """Let the expert solve one scene of ``task``.

    Raises:
        RuntimeError: if it fails within the world's horizon.
    """
    rng = np.random.default_rng(seed)
    low, high = np.array(world.action_range)
    observations, actions = [], []
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


def write_demonstrations(recipe: Recipe, output_dir: str | Path, processes: int = 2) -> tuple[Path, Path]:
    """Write the old tasks' data set to ``output_dir/old`` and the new tasks' to ``output_dir/new``.

    The data depends on ``recipe`` alone, not on ``processes``. It is made under a temporary name and renamed
    when it is whole; a whole one that was made by the same recipe is kept.

    Args:
        recipe: What to demonstrate.
        output_dir: The directory to make.
        processes: Processes that simulate and render.

    Returns:
        The two data sets' directories.

    Raises:
        UserError: if ``output_dir`` exists and holds anything else.
    """
    output_dir = Path(output_dir)
    data_sets = output_dir / "old", output_dir / "new"
    if output_dir.exists():
        if read_recipe(output_dir) != recipe:
            raise UserError(f"--output_dir {output_dir} exists and is not {recipe}: name another or remove it")
        return data_sets
    making = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.tmp")
    making.mkdir(parents=True)
    try:
        for which in ("old", "new"):
            _write_data_set(recipe, which, making / which, processes)
        (making / _RECIPE).write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")
        making.rename(output_dir)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return data_sets


def read_recipe(directory: str | Path) -> Recipe | None:
    """Return the recipe of the demonstrations in ``directory``, or None when it holds no whole ones."""
    try:
        return Recipe(**json.loads((Path(directory) / _RECIPE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write_data_set(recipe: Recipe, which: str, root: Path, processes: int) -> None:
    world = make_world(recipe.world)
    # Episodes of the tasks take turns, so that any run of episodes holds all of them.
    jobs = [
        (task, scene_seed(recipe.seed, episode, evaluation=False))
        for episode in range(recipe.episodes_per_task)
        for task in world.tasks(which)
    ]
    # Naming the video backend keeps LeRobot from probing torchcodec, which complains at length without FFmpeg.
    data_set = LeRobotDataset.create(
        f"craft-ds/{recipe.world}-{which}",
        fps=world.fps,
        features=_features(world),
        root=root,
        use_videos=False,
        video_backend="pyav",
    )
    episodes = _record_all(recipe.world, jobs, processes)
    bar = tqdm(zip(jobs, episodes, strict=True), total=len(jobs), desc=f"{which} tasks", unit="episode")
    for (task, _), episode in bar:
        for image, state, action in zip(*episode, strict=True):
            data_set.add_frame({CAMERA: image, STATE: state, ACTION: action, "task": world.task_text(task)})
        data_set.save_episode()
    data_set.finalize()


def _features(world: World) -> dict[str, dict[str, Any]]:
    image = {"dtype": "image", "shape": (IMAGE_SIZE, IMAGE_SIZE, 3), "names": ["height", "width", "channels"]}
    vectors = {
        key: {"dtype": "float32", "shape": (len(names),), "names": list(names)}
        for key, names in ((STATE, world.state_names), (ACTION, world.action_names))
    }
    return {CAMERA: image, **vectors}


def _record_all(world: str, jobs: Iterable[tuple[str, int]], processes: int) -> Iterator[Episode]:
    """Yield the episodes in the order of ``jobs``, however many processes make them."""
    record = partial(_record_job, world)
    if processes == 1:
        yield from map(record, jobs)
        return
    # Spawned, not forked: a GL context does not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(record, jobs)


def _record_job(world: str, job: tuple[str, int]) -> Episode:
    task, seed = job
    return record_episode(_world_of(world, task), task, seed)


@cache
def _world_of(name: str, task: str) -> World:
    """Return a world kept for one task: changing the task would load its scene again."""
    return make_world(name)

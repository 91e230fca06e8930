"""Demonstrations of a world's scripted expert as LeRobot v3 data sets."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from tqdm import tqdm

from craft_ds.errors import UserError
from craft_ds.tensor_io.filesystem import atomic_directory
from craft_ds.worlds import make_world
from craft_ds.worlds.base import ACTION, CAMERA, IMAGE_SIZE, STATE, World, scene_seed
from craft_ds.worlds.recording import Episode, Recipe, Recorder, recorder
from craft_ds.worlds.tasks import TASKS

_RECIPE_FILE = "world.json"


def write_demonstrations(recipe: Recipe, output_dir: str | Path, processes: int = 2) -> tuple[Path, ...]:
    """Write the old tasks' data set to `output_dir/old` and the new tasks' to `output_dir/new`.

    A recipe that names tasks gives one data set for each of them, `output_dir/TASK`.

    The data depends only on `recipe`, not on `processes`. It is written under a temporary name and renamed
    when complete; an existing complete one with the same recipe is reused.

    Args:
        recipe: World, tasks, number of episodes, disturbances and seed.
        output_dir: The directory to create.
        processes: Processes that simulate and render.

    Returns:
        The directories of the data sets.

    Raises:
        UserError: The world has no such task, or `output_dir` exists and holds anything else.
    """
    output_dir = Path(output_dir)
    sets = data_sets_of(recipe)
    if output_dir.exists():
        if read_recipe(output_dir) != recipe:
            raise UserError(f"--output_dir {output_dir} exists and does not hold {recipe}: choose another")
        return tuple(output_dir / name for name in sets)
    hidden = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.tmp")
    with atomic_directory(output_dir, hidden) as temporary:
        temporary.mkdir(parents=True)
        with recorder(recipe, processes) as record:
            for name, tasks in sets.items():
                _write_data_set(recipe, tasks, temporary / name, record)
        (temporary / _RECIPE_FILE).write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")
    return tuple(output_dir / name for name in sets)


def read_recipe(directory: str | Path) -> Recipe | None:
    """Return the recipe of the demonstrations in `directory`, or None if there are no complete ones."""
    try:
        fields = json.loads((Path(directory) / _RECIPE_FILE).read_text(encoding="utf-8"))
        return Recipe(**{**fields, "tasks": tuple(fields.get("tasks", ()))})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def open_demonstrations(root: str | Path, chunk_size: int) -> LeRobotDataset:
    """Open a data set whose frames carry their next `chunk_size` actions, (chunk_size, A).

    Raises:
        UserError: `root` does not hold a complete data set.
    """
    root = Path(root)
    info = root / "meta" / "info.json"
    if not info.is_file() or not any(root.glob("meta/episodes/**/*.parquet")):
        raise UserError(
            f"{root} is not a complete LeRobot v3 data set: record one with `craft-ds worlds record`"
        )
    fps = json.loads(info.read_text(encoding="utf-8"))["fps"]
    return LeRobotDataset(
        f"craft-ds/{root.name}",
        root=root,
        delta_timestamps={ACTION: [step / fps for step in range(chunk_size)]},
        video_backend="pyav",
    )


def data_sets_of(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """Return the tasks of each data set, by the name of its directory."""
    splits = TASKS[recipe.world]
    if unknown := [task for task in recipe.tasks if task not in splits.old + splits.new]:
        known = ", ".join(splits.old + splits.new)
        raise UserError(f"--tasks: {recipe.world} has no task {unknown[0]}; choose among {known}")
    return {task: (task,) for task in recipe.tasks} or splits._asdict()


def _write_data_set(recipe: Recipe, tasks: tuple[str, ...], root: Path, record: Recorder) -> None:
    world = make_world(recipe.world)
    # Episodes of the tasks alternate, so that any range of consecutive episodes holds all tasks.
    jobs = [
        (task, scene_seed(recipe.seed, episode, evaluation=False))
        for episode in range(recipe.episodes_per_task)
        for task in tasks
    ]
    data_set = create_data_set(world, f"craft-ds/{recipe.world}-{root.name}", root)
    bar = tqdm(zip(jobs, record(jobs), strict=True), total=len(jobs), desc=root.name, unit="episode")
    for (task, _), episode in bar:
        add_episode(data_set, episode, world.task_text(task))
    data_set.finalize()


def create_data_set(world: World, repo_id: str, root: Path) -> LeRobotDataset:
    """Create an empty data set for a world's episodes; the caller finalizes it."""
    datasets.disable_progress_bars()  # one bar per episode would hide ours
    # Naming the video backend keeps LeRobot from probing torchcodec, which logs pages without FFmpeg.
    return LeRobotDataset.create(
        repo_id,
        fps=world.fps,
        features=_features(world),
        root=root,
        use_videos=False,
        video_backend="pyav",
    )


def add_episode(data_set: LeRobotDataset, episode: Episode, text: str) -> None:
    """Append an episode with its instruction to a data set."""
    for image, state, action in zip(*episode, strict=True):
        data_set.add_frame({CAMERA: image, STATE: state, ACTION: action, "task": text})
    data_set.save_episode()


def _features(world: World) -> dict[str, dict[str, Any]]:
    image = {"dtype": "image", "shape": (IMAGE_SIZE, IMAGE_SIZE, 3), "names": ["height", "width", "channels"]}
    vectors = {
        key: {"dtype": "float32", "shape": (len(names),), "names": list(names)}
        for key, names in ((STATE, world.state_names), (ACTION, world.action_names))
    }
    return {CAMERA: image, **vectors}

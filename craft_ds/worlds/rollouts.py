"""Record a policy's own episodes as a LeRobot data set, for tasks whose original data is gone."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from craft_ds.errors import UserError
from craft_ds.tensor_io.filesystem import atomic_directory
from craft_ds.worlds.base import Observation, World, scene_seed
from craft_ds.worlds.demonstrations import add_episode, create_data_set
from craft_ds.worlds.evaluation import ClosedLoopPolicy
from craft_ds.worlds.recording import Episode

ROLLOUTS_FILE = "rollouts.json"
"""File in the data set that says which policy made it."""
_LOCKSTEP = 16
"""Scenes of a task that run at once."""


def write_rollouts(
    policy: ClosedLoopPolicy,
    world: World,
    tasks: Sequence[str],
    output_dir: Path,
    *,
    scenes: int,
    seed: int,
    name: str,
    keep_failures: bool = False,
) -> dict[str, int]:
    """Write the episodes of a policy that solve their scene to a data set in `output_dir`.

    The scenes are those of the expert's demonstrations with the same seed. An episode holds an image and the
    executed action of every step, although the policy sees one image per chunk.

    Args:
        policy: The policy and its processors.
        world: The world.
        tasks: Tasks to run.
        output_dir: The directory to create.
        scenes: Scenes per task.
        seed: Seed of the scenes.
        name: The policy's name in the record.
        keep_failures: Also write episodes that do not solve their scene.

    Returns:
        Solved scenes by task.

    Raises:
        UserError: `output_dir` exists, or a task would have no episode.
    """
    solved = dict.fromkeys(tasks, 0)
    hidden = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.tmp")
    with atomic_directory(output_dir, hidden) as temporary:
        data_set = create_data_set(world, f"craft-ds/{world.name}-rollouts", temporary)
        try:
            for first in range(0, scenes, _LOCKSTEP):
                numbers = range(first, min(first + _LOCKSTEP, scenes))
                seeds = [scene_seed(seed, number, evaluation=False) for number in numbers]
                by_task = [run_episodes(policy, world, task, seeds) for task in tasks]
                # Episodes of the tasks alternate, as in demonstrations.
                for episodes in zip(*by_task, strict=True):
                    for task, (episode, success) in zip(tasks, episodes, strict=True):
                        solved[task] += success
                        if success or keep_failures:
                            add_episode(data_set, episode, world.task_text(task))
        finally:
            data_set.finalize()  # else its end would write into the deleted directory
        if unsolved := [task for task, count in solved.items() if not count and not keep_failures]:
            raise UserError(
                f"{name} solves none of {scenes} scenes of {unsolved[0]}, which would have no episode: "
                "choose --tasks that it knows, or add --keep_failures"
            )
        record = {
            "policy": name,
            "world": world.name,
            "seed": seed,
            "scenes": scenes,
            "solved": solved,
            "failures": keep_failures,
        }
        (temporary / ROLLOUTS_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return solved


def run_episodes(
    policy: ClosedLoopPolicy, world: World, task: str, seeds: Sequence[int]
) -> list[tuple[Episode, bool]]:
    """Run a policy in scenes of a task in lockstep; return each episode, and True if it solves its scene.

    Args:
        policy: The policy and its processors.
        world: The world.
        task: The task.
        seeds: Seeds of the scenes.
    """
    low, high = (np.array(bound, dtype=np.float32) for bound in world.action_range)
    worlds = [world.fork() for _ in seeds]
    for one, seed in zip(worlds, seeds, strict=True):
        one.reset(task, seed)
    seen: list[list[Observation]] = [[] for _ in seeds]
    done: list[list[np.ndarray]] = [[] for _ in seeds]
    for start in range(0, world.horizon, world.chunk_size):
        running = [number for number, one in enumerate(worlds) if not one.success]
        if not running:
            break
        first = [worlds[number].observe() for number in running]
        chunks = policy(first, world.task_text(task))[:, : world.horizon - start]
        for number, observation, chunk in zip(running, first, chunks, strict=True):
            for step, action in enumerate(np.clip(chunk, low, high)):
                seen[number].append(worlds[number].observe() if step else observation)
                done[number].append(action.astype(np.float32))
                worlds[number].step(action)
                if worlds[number].success:
                    break
    return [
        (
            Episode(
                np.stack([observation.image for observation in observations]),
                np.stack([observation.state for observation in observations]),
                np.stack(actions),
            ),
            one.success,
        )
        for one, observations, actions in zip(worlds, seen, done, strict=True)
    ]

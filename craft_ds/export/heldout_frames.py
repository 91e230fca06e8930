"""Frames of held-out episodes of the new task, for the loss of an exported policy."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lerobot.configs import PreTrainedConfig
from lerobot.configs.train import TRAIN_CONFIG_NAME
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from craft_ds.checkpoints import read_states
from craft_ds.data.fingerprint import dataset_fingerprint
from craft_ds.errors import UserError
from craft_ds.export.comparison_samples import MICRO_BATCH, open_frames
from craft_ds.policies.token_loss import Batch


def heldout_frames(
    checkpoint: Path, config: PreTrainedConfig, repo_id: str, root: str | None, limit: int, device: str
) -> Callable[[], Iterator[Batch]]:
    """Return a function that reads the frames of held-out episodes, as batches of the policy.

    Of the data set that the run was trained on, these are the episodes that it held out; of any other data
    set, all episodes.

    Args:
        checkpoint: A checkpoint of the run.
        config: Configuration of its policy.
        repo_id: The data set.
        root: Its local directory; None: LeRobot's cache, then the hub.
        limit: Largest number of frames, evenly spaced; 0: all.
        device: Device of the batches.

    Raises:
        UserError: The data set cannot be opened or does not fit the policy, or the run held out none of it.
    """
    run = json.loads((checkpoint / TRAIN_CONFIG_NAME).read_text())
    samples, read = open_frames(run, checkpoint, config, repo_id, root, device)
    columns = samples.dataset.hf_dataset.data
    episode = columns.column("episode_index").to_pylist()
    rows = list(range(len(episode)))
    trained = _trained_on(checkpoint, run, samples.dataset)
    if trained is not None:
        task_of: dict[int, int] = {}
        for number, task in zip(episode, columns.column("task_index").to_pylist(), strict=True):
            task_of.setdefault(number, task)
        used = trained["episodes"] or list(task_of)
        kept = heldout_episodes({number: task_of[number] for number in used}, run["dataset"]["eval_split"])
        if not kept:
            raise UserError(
                f"--dataset_repo_id={repo_id} is the data set that {checkpoint} was trained on, and none of "
                "its episodes was held out: give other demonstrations, or train with --dataset.eval_split"
            )
        rows = [row for row in rows if episode[row] in kept]
    rows = rows[:: math.ceil(len(rows) / limit)] if limit else rows

    def batches() -> Iterator[Batch]:
        for start in range(0, len(rows), MICRO_BATCH):
            yield read(rows[start : start + MICRO_BATCH])

    return batches


def _trained_on(checkpoint: Path, run: dict[str, Any], dataset: LeRobotDataset) -> dict[str, Any] | None:
    """Return the run's entry of this data set, wherever it lies; None if it was not trained on it."""
    _, state = read_states(checkpoint)
    recorded = state.get("dataset_fingerprint")
    sources = run.get("datasets") or [run["dataset"]]
    if not recorded:  # in checkpoints of older versions
        return next((source for source in sources if source["repo_id"] == dataset.repo_id), None)
    found = dataset_fingerprint(dataset)["meta"]
    for source in sources:
        name = f"{source['repo_id']}/meta" if run.get("datasets") else "meta"
        if recorded.get(name) == found:
            return dict(source)
    return None


def heldout_episodes(task_of: Mapping[int, int], share: float) -> set[int]:
    """Return the episodes that LeRobot holds out: the last of every task, ⌈n·share⌉ of n.

    Args:
        task_of: Task of each episode, in the order of training.
        share: `--dataset.eval_split`.
    """
    by_task: dict[int, list[int]] = {}
    for number, task in task_of.items():
        by_task.setdefault(task, []).append(number)
    return {number for episodes in by_task.values() for number in _last(episodes, share)}


def _last(episodes: Sequence[int], share: float) -> Sequence[int]:
    return episodes[len(episodes) - math.ceil(len(episodes) * share) :]

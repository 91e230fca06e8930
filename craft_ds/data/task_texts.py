"""Task texts of a data set, by the index that its frames have.

LeRobot takes the text of a frame from the row of `meta/tasks.parquet` whose position is the frame's
`task_index`; it ignores the file's own column `task_index`. Where the rows are in another order, every frame
would train with the text of another task.
"""

from typing import Any

import numpy as np
import pandas as pd
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from craft_ds.errors import UserError

UNUSED = ""
"""Text of an index that no frame has."""


def order_task_texts(dataset: LeRobotDataset) -> None:
    """Order the texts of an open data set by their index, so that LeRobot's position is the index.

    Raises:
        UserError: An index has no text or two, or an episode's frames have other texts than its metadata.
    """
    name, tasks = f"data set {dataset.repo_id}", dataset.meta.tasks
    if tasks is None or not len(tasks):
        raise UserError(f"{name} has no task texts: meta/tasks.parquet is empty, or info.json counts 0 tasks")
    if "task_index" not in tasks.columns or not all(isinstance(text, str) for text in tasks.index):
        raise UserError(
            f"{name}: meta/tasks.parquet has no texts as its index with a column task_index: write it with "
            "LeRobot"
        )
    texts: dict[int, str] = {}
    for text, index in zip(tasks.index, tasks["task_index"], strict=True):
        if index in texts:
            raise UserError(
                f"{name}: meta/tasks.parquet gives task_index {index} to both {texts[int(index)]!r} and "
                f"{text!r}"
            )
        texts[int(index)] = text
    columns = dataset.hf_dataset.data
    used = _pairs(columns.column("episode_index").to_numpy(), columns.column("task_index").to_numpy())
    if unknown := sorted({index for _, index in used} - texts.keys()):
        raise UserError(
            f"{name}: frames have task_index {unknown[0]}, for which meta/tasks.parquet has no text"
        )
    _check_episodes(name, used, texts, dataset.meta.episodes["tasks"])
    if min(texts) < 0:
        raise UserError(f"{name}: meta/tasks.parquet has the negative task_index {min(texts)}")
    rows = range(max(texts) + 1)
    dataset.meta.tasks = pd.DataFrame(
        {"task_index": list(rows)}, index=pd.Index([texts.get(row, UNUSED) for row in rows], name="task")
    )


def _pairs(episodes: np.ndarray, indices: np.ndarray) -> set[tuple[int, int]]:
    """Return the distinct pairs of episode and task index."""
    pairs = np.unique(np.stack([episodes, indices], axis=1), axis=0)
    return {(int(episode), int(index)) for episode, index in pairs}


def _check_episodes(name: str, used: set[tuple[int, int]], texts: dict[int, str], named: Any) -> None:
    """Check that every episode's frames have the texts that its metadata name."""
    of_episode: dict[int, set[str]] = {}
    for episode, index in used:
        of_episode.setdefault(episode, set()).add(texts[index])
    for episode, found in sorted(of_episode.items()):
        expected = set(named[episode] or ())
        if expected and not found <= expected:
            wrong = sorted(found - expected)[0]
            raise UserError(
                f"{name}: meta/tasks.parquet gives the frames of episode {episode} the task {wrong!r}, "
                f"meta/episodes names {sorted(expected)[0]!r}: restore the file that is wrong"
            )

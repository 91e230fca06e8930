"""Tabular fields of a LeRobot data set as arrays; images and videos are not read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import HF_LEROBOT_HOME

from craft_ds.data.lerobot_dataset import check_dataset_root
from craft_ds.errors import UserError, one_line

_PLACES = 3
_ORIGIN = ("episode_index", "frame_index", "task_index")


@dataclass(frozen=True)
class TabularData:
    """The tabular fields of N frames, episode after episode.

    Attributes:
        fields: float32 or float64 (N, width) by feature.
        episode: Episode of each frame (N,).
        frame: Index of each frame in its episode (N,).
        task: Task of each frame (N,).
    """

    fields: dict[str, np.ndarray]
    episode: np.ndarray
    frame: np.ndarray
    task: np.ndarray

    def __len__(self) -> int:
        return len(self.episode)

    def chunks(self, rows: np.ndarray, offsets: Sequence[int]) -> np.ndarray:
        """Return the frames of action chunks; those beyond an episode's ends repeat its end, as LeRobot pads.

        Args:
            rows: First frames (n,).
            offsets: Distances of the T steps of a chunk, in frames.

        Returns:
            int64 (n, T).
        """
        starts = np.flatnonzero(np.diff(self.episode, prepend=self.episode[:1] - 1))
        first = starts[np.searchsorted(starts, rows, side="right") - 1]
        last = np.append(starts[1:], len(self))[np.searchsorted(starts, rows, side="right") - 1] - 1
        return np.clip(rows[:, None] + np.asarray(offsets)[None], first[:, None], last[:, None])

    def non_finite(self, key: str) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Return the number of frames with NaN or Inf, and the (episode, frame) of the first few."""
        rows = np.flatnonzero(~np.isfinite(self.fields[key]).all(axis=1))
        places = [(int(self.episode[row]), int(self.frame[row])) for row in rows[:_PLACES]]
        return len(rows), tuple(places)


def open_tabular(name: str, root: str | Path | None) -> LeRobotDataset:
    """Open a data set of any features to read its tabular fields.

    Args:
        name: Hub id, or any name if `root` is given.
        root: Local folder; None: LeRobot's cache, then the hub.

    Raises:
        UserError: There is no finished data set.
    """
    local = Path(root) if root is not None else HF_LEROBOT_HOME / name
    if root is not None or local.exists():
        check_dataset_root(local)
    try:
        # LeRobot probes torchcodec unless a backend is named.
        return LeRobotDataset(name, root=root, video_backend="pyav")
    except Exception as error:
        reason = one_line(error)
        raise UserError(f"data set {name} cannot be opened ({reason}): check --dataset_root") from error


def read_tabular(dataset: LeRobotDataset, keys: Sequence[str]) -> TabularData:
    """Read fields of all frames of a data set, of the selected episodes where some are selected.

    Args:
        dataset: The data set.
        keys: Numeric features of one dimension at most; they must exist.
    """
    frames: Any = dataset.hf_dataset.select_columns([*keys, *_ORIGIN]).with_format("arrow")
    table = frames[:]
    origin = {name: table.column(name).to_numpy() for name in _ORIGIN}
    return TabularData(
        fields={key: _matrix(table.column(key)) for key in keys},
        episode=origin["episode_index"],
        frame=origin["frame_index"],
        task=origin["task_index"],
    )


def feature_names(feature: dict[str, Any]) -> tuple[str, ...] | None:
    """Return the names of a feature's entries; None where it has none or not one per entry.

    Args:
        feature: Entry of `meta/info.json`. LeRobot stores names as a list, or as lists by a group's name.
    """
    names = feature.get("names")
    if isinstance(names, dict):
        groups = [group if isinstance(group, list) else [group] for group in names.values()]
        names = [name for group in groups for name in group]
    if not isinstance(names, (list, tuple)) or len(names) != feature["shape"][0]:
        return None
    return tuple(map(str, names))


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of numbers, or of lists of equal length, as floating-point (N, width)."""
    values, rows = column.combine_chunks(), len(column)
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks)
    while not pa.types.is_primitive(values.type):
        values = values.flatten()
    flat = values.to_numpy(zero_copy_only=False)
    flat = flat if flat.dtype in (np.float32, np.float64) else flat.astype(np.float64)
    return flat.reshape(rows, -1)

"""Limits of state and action: an entry far outside of what the data set holds is a fault of recording.

The limits come from the frames themselves, not from `meta/stats.json`, whose extremes contain the fault.
They catch single frames (a glitch of an encoder, another unit for a moment). Data that as a whole lie outside
of the policy's statistics are not a matter of single samples.
"""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

_MAX_ROWS = 100_000


class Range(NamedTuple):
    """Range of a feature's entries: that of the central 90 % of frames, and the limits around it.

    Attributes:
        usual: Shape (2, entries), lower and upper end.
        limits: Shape (2, entries), lower and upper limit; infinite where the feature never moves.
    """

    usual: Tensor
    limits: Tensor


class ValueLimits(dict[str, Range]):
    """Ranges of vectors by their names."""

    def contain(self, key: str, value: Tensor) -> Tensor:
        """Return, for every entry of a vector or chunk, True if it is within the limits."""
        if key not in self:
            return torch.ones_like(value, dtype=torch.bool)
        lower, upper = self[key].limits
        return (value >= lower) & (value <= upper)

    def describe(self, key: str, entry: int) -> str:
        """Return the usual range of an entry in words."""
        lower, upper = self[key].usual[:, entry].tolist()
        return f"the usual {lower:.6g} to {upper:.6g}"


def value_limits(
    dataset: LeRobotDataset, factor: float, vectors: Collection[str] = (OBS_STATE, ACTION)
) -> ValueLimits:
    """Return the limits of a data set's states and actions.

    An entry may lie `factor` times its range outside of its range, which holds the central 90 % of frames.
    Entries of one feature are in similar units, so an entry that hardly moves, like a gripper that rarely
    opens, gets the widest range among them.

    Args:
        dataset: The data set; at most 100,000 of its frames, evenly spread, are read.
        factor: Ranges that an entry may lie outside; 0: there are no limits.
        vectors: Names of the vectors in the data set.
    """
    limits = ValueLimits()
    for key in vectors if factor > 0 else ():
        feature = dataset.meta.features.get(key)
        if feature is None or feature["dtype"] in ("image", "video") or len(feature["shape"]) != 1:
            continue
        values = column(dataset, key)
        values = values[:: -(-len(values) // _MAX_ROWS) or 1]
        values = values[np.isfinite(values).all(axis=1)]
        if not len(values):
            continue
        # Recorded values at both ends, not interpolated ones, which a glitch would move in a short data set.
        lower = np.quantile(values, 0.05, axis=0, method="higher")
        upper = np.quantile(values, 0.95, axis=0, method="lower")
        upper = np.maximum(lower, upper)
        width = (upper - lower).max()
        margin = factor * width if width > 0 else np.inf
        limits[key] = Range(
            torch.from_numpy(np.stack([lower, upper])),
            torch.from_numpy(np.stack([lower - margin, upper + margin])),
        )
    return limits


def column(dataset: LeRobotDataset, key: str) -> np.ndarray:
    """Return a numerical column of the data set, fp64 of shape (frames, entries); NaN where there is none."""
    return rows_of(dataset.hf_dataset.data.column(key))


def rows_of(values: pa.ChunkedArray) -> np.ndarray:
    """Return a numerical column as fp64 of shape (rows, entries); NaN where there is no value."""
    parts = [_flatten(chunk) for chunk in values.chunks if len(chunk)]
    return np.concatenate(parts) if parts else np.empty((0, 1))


def _flatten(chunk: pa.Array) -> np.ndarray:
    rows = len(chunk)
    if chunk.null_count:
        vectors = chunk.to_pylist()
        width = max((np.size(vector) for vector in vectors if vector is not None), default=1)
        filled = [np.full(width, np.nan) if vector is None else vector for vector in vectors]
        return np.array(filled, dtype=np.float64).reshape(rows, -1)
    while pa.types.is_list(chunk.type) or pa.types.is_fixed_size_list(chunk.type):
        chunk = chunk.flatten()
    return chunk.to_numpy(zero_copy_only=False).astype(np.float64).reshape(rows, -1)

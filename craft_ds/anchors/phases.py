"""Motion phases of recorded episodes, found in states and actions alone.

A phase begins where a gripper opens or closes, and where the speed of the robot changes its level: the change
points of a piecewise constant speed, by binary segmentation (Scott & Knott 1974). Equal shares of a memory by
phase are those of PHASER (arXiv:2606.03598), which finds its phases in other ways.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

_OPEN, _CLOSED = 0.4, 0.6
"""Shares of a gripper's range below and above which it has changed; between them it keeps its position."""
_LEAST_SHARE = 0.15
"""Share of the squared deviation of an episode's speed that a change point must remove."""
_LEAST_FRAMES = 3
"""Frames of the shortest level of speed."""


def motion_phases(
    state: np.ndarray, action: np.ndarray, episode: np.ndarray, task: np.ndarray, gripper: Sequence[int]
) -> np.ndarray:
    """Number the motion phases of each episode, from 0.

    The n-th phases of all episodes of a task count as one phase of the task. Further phases
    than the task's median episode has get the number of its last, since few episodes have them.

    Args:
        state: States (F, S), episode after episode, in any units.
        action: Actions (F, A).
        episode: Episode of each frame (F,).
        task: Task of each frame (F,). A task that begins within an episode begins with its phase 0.
        gripper: Dimensions of the action that move grippers.

    Returns:
        int64 (F,).
    """
    deviation = state.std(axis=0)
    scaled = state / np.where(deviation > 0, deviation, 1.0)
    opening = action[:, list(gripper)]
    low, span = opening.min(axis=0), np.ptp(opening, axis=0)
    share = (opening - low) / np.where(span > 0, span, 1.0)
    begins = np.flatnonzero((np.diff(episode) != 0) | (np.diff(task) != 0)) + 1
    phase = np.zeros(len(episode), dtype=np.int64)
    runs = np.split(np.arange(len(episode)), begins)
    for run in runs:
        speed = np.linalg.norm(np.diff(scaled[run], axis=0, append=scaled[run[-1:]]), axis=1)
        speed[-1:] = speed[-2:-1] or 0.0  # nothing follows the last frame
        phase[run] = episode_phases(speed, share[run])
    for one in np.unique(task):
        counts = [int(phase[run[-1]]) for run in runs if task[run[0]] == one]
        of_task = task == one
        phase[of_task] = np.minimum(phase[of_task], int(np.median(counts)))
    return phase


def episode_phases(speed: np.ndarray, gripper: np.ndarray) -> np.ndarray:
    """Number the phases of one episode, from 0.

    Args:
        speed: Speed of each frame (T,).
        gripper: Position of each gripper as a share of its range (T, G).

    Returns:
        int64 (T,), non-decreasing.
    """
    changes = np.flatnonzero(np.diff(_closed(gripper), axis=0).any(axis=1)) + 1
    bounds = [0, *changes.tolist(), len(speed)]
    least = _LEAST_SHARE * float(np.square(speed - speed.mean()).sum())
    starts = np.zeros(len(speed), dtype=np.int64)
    starts[changes] = 1
    for first, end in pairwise(bounds):
        starts[_change_points(speed, first, end, least)] = 1
    return starts.cumsum()


def _closed(gripper: np.ndarray) -> np.ndarray:
    """Return True where a gripper is above the middle of its range, with hysteresis: bool (T, G)."""
    known = (gripper < _OPEN) | (gripper > _CLOSED)
    known[:1] = True
    latest = np.maximum.accumulate(np.where(known, np.arange(len(gripper))[:, None], 0), axis=0)
    return np.take_along_axis(gripper, latest, axis=0) > 0.5


def _change_points(speed: np.ndarray, first: int, end: int, least: float) -> list[int]:
    """Return the frames in [first, end) at which the mean speed changes.

    Args:
        speed: Speed of each frame (T,).
        first: First frame of the segment.
        end: Frame behind it.
        least: Squared deviation that a change point must remove.
    """
    length = end - first
    if length < 2 * _LEAST_FRAMES:
        return []
    segment = speed[first:end] - speed[first:end].mean()
    before = np.arange(_LEAST_FRAMES, length - _LEAST_FRAMES + 1)
    # Two means s/n and -s/(N - n) instead of one of 0 remove s²/n + s²/(N - n).
    gain = np.square(segment.cumsum()[before - 1]) * length / (before * (length - before))
    best = int(gain.argmax())
    if gain[best] <= max(least, 1e-12):
        return []
    middle = first + int(before[best])
    return [
        *_change_points(speed, first, middle, least),
        middle,
        *_change_points(speed, middle, end, least),
    ]

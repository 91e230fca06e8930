"""Selection of anchor frames: balanced over tasks and motion phases, over and split by episodes."""

from typing import NamedTuple

import numpy as np


class AnchorSelection(NamedTuple):
    """Frames selected from a data set, ordered by split (train first), task, episode and frame.

    Attributes:
        frames: Index of each anchor in the data set, (N,).
        task: Task of each anchor, (N,).
        heldout: True for frames of held-out episodes, bool (N,).
        heldout_episodes: All held-out episodes, sorted, including those without a selected frame.
    """

    frames: np.ndarray
    task: np.ndarray
    heldout: np.ndarray
    heldout_episodes: list[int]


def select_anchors(
    task: np.ndarray,
    episode: np.ndarray,
    num_samples: int,
    heldout_fraction: float,
    seed: int,
    *,
    phase: np.ndarray | None = None,
    instructions: int = 0,
) -> AnchorSelection:
    """Select frames without replacement.

    Tasks get equal shares of `num_samples`, and the episodes of a task get equal shares of the task's frames.
    Frames that a short task or episode lacks are taken from the others. A task of which any frame is selected
    has one outside of the held-out episodes, and with two or more also one inside, where it has frames there.

    Args:
        task: Task of each frame, (F,).
        episode: Episode of each frame, (F,).
        num_samples: Frames to select, at most F, or F for each instruction.
        heldout_fraction: Fraction of each task's episodes to hold out, in [0, 1). Every task keeps an episode
            that is not held out. With two or more, at least one is held out (unless the fraction is 0), if
            every other task in that episode keeps another.
        seed: Seed of the selection.
        phase: Motion phase of each frame, (F,): the phases of a task and split get equal shares of its
            frames, and the episodes equal shares of those. None: frames are drawn uniformly.
        instructions: Number of instructions to select frames for; they take the place of the tasks, and each
            may have any frame. 0: frames belong to their own tasks.
    """
    heldout_episodes = _hold_out(task, episode, heldout_fraction, seed)
    source = np.arange(len(task))
    if instructions:
        task = np.repeat(np.arange(instructions), len(source))
        source = np.tile(source, instructions)
        episode = episode[source]
        phase = None if phase is None else phase[source]
    rng = np.random.default_rng((seed, 1))
    tasks, frames_of_task = np.unique(task, return_counts=True)
    parts = []
    for one_task, share in zip(tasks, allocate_evenly(num_samples, frames_of_task, rng), strict=True):
        by_episode = _groups(np.flatnonzero(task == one_task), episode)
        counts = allocate_evenly(int(share), np.array([len(frames) for frames in by_episode]), rng)
        heldout = np.isin([episode[frames[0]] for frames in by_episode], heldout_episodes)
        _cover_splits(counts, heldout)
        if phase is not None:
            by_episode, counts = _by_phase(by_episode, counts, heldout, phase, episode, rng)
        for frames, count in zip(by_episode, counts, strict=True):
            parts.append(rng.choice(frames, size=count, replace=False))
    selected = np.concatenate(parts)
    heldout = np.isin(episode[selected], heldout_episodes)
    order = np.lexsort((selected, episode[selected], task[selected], heldout))
    selected = selected[order]
    return AnchorSelection(source[selected], task[selected], heldout[order], heldout_episodes)


def _groups(frames: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Group frames by label, in the order of the labels.

    Args:
        frames: Indices of frames, ascending.
        labels: Label of every frame of the data set.
    """
    frames = frames[np.argsort(labels[frames], kind="stable")]
    _, sizes = np.unique(labels[frames], return_counts=True)
    return np.split(frames, np.cumsum(sizes)[:-1])


def _by_phase(
    by_episode: list[np.ndarray],
    counts: np.ndarray,
    heldout: np.ndarray,
    phase: np.ndarray,
    episode: np.ndarray,
    rng: np.random.Generator,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Distribute the anchors of each split of a task equally over its phases, then over their episodes.

    Args:
        by_episode: Frames of the task, by episode.
        counts: Anchors of each episode in a uniform selection, (n,): their sums by split are kept.
        heldout: True where the episode is held out, (n,).
        phase: Phase of every frame of the data set.
        episode: Episode of every frame.
        rng: Chooses the phases and episodes that get a remainder.

    Returns:
        Frames by split, phase and episode, and the number of anchors of each.
    """
    groups: list[np.ndarray] = []
    shares: list[int] = []
    for split in (~heldout, heldout):
        if not split.any():
            continue
        frames = np.sort(np.concatenate([by_episode[number] for number in np.flatnonzero(split)]))
        phases = _groups(frames, phase)
        totals = allocate_evenly(int(counts[split].sum()), np.array([len(one) for one in phases]), rng)
        for one, total in zip(phases, totals, strict=True):
            episodes = _groups(one, episode)
            groups += episodes
            shares += allocate_evenly(int(total), np.array([len(part) for part in episodes]), rng).tolist()
    return groups, np.array(shares)


def allocate_evenly(total: int, capacities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Divide `total` as equally as the capacities allow; random entries get the remainder.

    Args:
        total: At most the sum of the capacities.
        capacities: Upper bound of each share, (n,).
        rng: Chooses the entries that get the remainder.
    """
    shares = np.zeros_like(capacities)
    while left := total - int(shares.sum()):
        (free,) = np.nonzero(shares < capacities)
        if left < len(free):
            shares[rng.choice(free, size=left, replace=False)] += 1
        else:
            shares[free] += np.minimum(left // len(free), capacities[free] - shares[free])
    return shares


def _cover_splits(counts: np.ndarray, heldout: np.ndarray) -> None:
    """Move one of a task's few frames to a split that would have none, in place: to training first.

    Args:
        counts: Frames to select from each episode of the task, (n,).
        heldout: True where the episode is held out, (n,).
    """
    for split, least in ((~heldout, 1), (heldout, 2)):
        if split.any() and not counts[split].any() and counts.sum() >= least:
            counts[np.argmax(counts)] -= 1
            counts[np.argmax(split)] += 1


def _hold_out(task: np.ndarray, episode: np.ndarray, fraction: float, seed: int) -> list[int]:
    """Choose episodes to hold out. An episode with several tasks counts for the task of its first frame."""
    episodes, first = np.unique(episode, return_index=True)
    rng = np.random.default_rng((seed, 0))
    heldout: set[int] = set()
    for one_task in np.unique(task[first]):
        candidates = episodes[task[first] == one_task]
        wanted = max(round(fraction * len(candidates)), 1) if fraction > 0 else 0
        count = min(wanted, len(candidates) - 1)
        heldout |= set(rng.choice(candidates, size=count, replace=False).tolist())
    if fraction > 0:
        _cover_tasks([set(np.unique(episode[task == one]).tolist()) for one in np.unique(task)], heldout)
    return sorted(heldout)


def _cover_tasks(episodes_of_tasks: list[set[int]], heldout: set[int]) -> None:
    """Change the held-out episodes where tasks that share episodes would have none in a split, in place.

    Args:
        episodes_of_tasks: Episodes in which each task has frames.
        heldout: The held-out episodes.
    """
    for episodes in episodes_of_tasks:
        if episodes <= heldout:
            heldout.remove(min(episodes))
    for episodes in episodes_of_tasks:
        if episodes & heldout:
            continue
        free = (
            one for one in sorted(episodes) if all(others - heldout != {one} for others in episodes_of_tasks)
        )
        if (one := next(free, None)) is not None:
            heldout.add(one)

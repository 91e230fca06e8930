"""The data sets of a mixture: `--datasets`. Imports neither torch nor LeRobot."""

import math
from dataclasses import dataclass
from typing import Any

from craft_ds.config.checks import require


@dataclass
class DatasetSource:
    """One data set of a mixture: an entry of `--datasets`."""

    repo_id: str
    """Hub id, or any name if `root` is given; different in every entry."""
    root: str | None = None
    """Local directory; none: LeRobot's cache, then the hub."""
    weight: float | None = None
    """Share of the samples, up to a common factor; none in all entries: shares by number of frames."""
    episodes: list[int] | None = None
    """Episodes to use; none: all."""


def check_datasets(sources: list[DatasetSource]) -> None:
    """Check the entries of `--datasets`.

    Raises:
        UserError: Names the entry and what to do.
    """
    names = [source.repo_id for source in sources]
    for name in names:
        require(bool(name), "--datasets: an entry has an empty repo_id: give it a name")
        require(names.count(name) == 1, f"--datasets names {name} twice: give each entry its own repo_id")
    weights = {source.repo_id: source.weight for source in sources}
    given = [weight for weight in weights.values() if weight is not None]
    require(
        len(given) in (0, len(sources)), "--datasets: give every entry a weight, or none for shares by frames"
    )
    for name, weight in weights.items():
        require(
            weight is None or 0.0 < weight < math.inf,
            f"--datasets: the weight {weight} of {name} must be finite and greater than 0",
        )


def resolve_datasets(dataset: Any, sources: list[DatasetSource], *, resume: bool) -> None:
    """Check which data are named; with a mixture, set `dataset.repo_id` to the joint name.

    Args:
        dataset: LeRobot's `--dataset.*`.
        sources: `--datasets`.
        resume: A resumed run compares the names with those of its checkpoint later.

    Raises:
        UserError: No data are named, or data are named twice.
    """
    check_datasets(sources)
    if not sources:
        require(bool(dataset.repo_id), "--dataset.repo_id is missing: name the data set of the new task")
        return
    joint = "+".join(source.repo_id for source in sources)
    require(
        resume or dataset.repo_id in ("", joint),
        f"--dataset.repo_id={dataset.repo_id} and --datasets both name data: omit one of them",
    )
    for name in ("root", "episodes", "revision"):
        value = getattr(dataset, name)
        instead = "" if name == "revision" else f", or give {name} in the entries"
        require(value is None, f"--dataset.{name}={value} has no effect with --datasets: omit it{instead}")
    dataset.repo_id = joint

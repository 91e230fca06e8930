"""Names of the embedded worlds and of their tasks, importable without simulators and numpy."""

from collections.abc import Sequence
from typing import NamedTuple

from craft_ds.errors import UserError


class TaskSplit(NamedTuple):
    """Tasks of a world.

    Attributes:
        old: Tasks that the shipped teacher knows; for `cw10`, which ships none, tasks of its start policy.
        new: Tasks that fine-tuning adds.
    """

    old: tuple[str, ...]
    new: tuple[str, ...]


CW10 = (
    "hammer-v3",
    "push-wall-v3",
    "faucet-close-v3",
    "push-back-v3",
    "stick-pull-v3",
    "handle-press-side-v3",
    "push-v3",
    "shelf-place-v3",
    "window-close-v3",
    "peg-unplug-side-v3",
)
"""The ten tasks of Continual World in its order (Wołczyk et al. 2021, arXiv:2105.10919)."""
CW5 = CW10[:5]

TASKS = {
    "metaworld": TaskSplit(
        old=("button-press-topdown-v3", "drawer-close-v3", "handle-press-side-v3"), new=("faucet-close-v3",)
    ),
    "blocks": TaskSplit(old=("reach-red", "reach-green", "reach-blue"), new=("reach-yellow",)),
    "cw10": TaskSplit(
        old=(
            "reach-v3",
            "pick-place-v3",
            "drawer-open-v3",
            "button-press-topdown-v3",
            "window-open-v3",
            "faucet-open-v3",
        ),
        new=CW10,
    ),
}
WORLDS = tuple(TASKS)
WITH_TEACHER = ("metaworld", "blocks")
"""Worlds whose teacher is shipped."""
RENDERED = ("metaworld", "cw10")
"""Worlds that need MuJoCo and OpenGL."""


def tasks_of(world: str, asked: Sequence[str]) -> list[str]:
    """Return the tasks that `--tasks` names: those of a split, or single ones.

    Raises:
        UserError: The world has no such task.
    """
    known = TASKS[world]
    splits = {"all": [*known.old, *known.new], "old": [*known.old], "new": [*known.new]}
    if len(asked) == 1 and asked[0] in splits:
        return splits[asked[0]]
    for task in asked:
        if task not in splits["all"]:
            raise UserError(
                f"--tasks {task}: {world} has no such task; choose all, old, new, or among "
                f"{', '.join(splits['all'])}"
            )
    return list(dict.fromkeys(asked))

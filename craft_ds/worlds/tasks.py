"""Names of the embedded worlds and of their tasks, importable without simulators and numpy."""

from typing import NamedTuple


class TaskSplit(NamedTuple):
    """Tasks of a world.

    Attributes:
        old: Tasks that the shipped teacher knows.
        new: Tasks that fine-tuning adds.
    """

    old: tuple[str, ...]
    new: tuple[str, ...]


TASKS = {
    "metaworld": TaskSplit(
        old=("button-press-topdown-v3", "drawer-close-v3", "handle-press-side-v3"), new=("faucet-close-v3",)
    ),
    "blocks": TaskSplit(old=("reach-red", "reach-green", "reach-blue"), new=("reach-yellow",)),
}
WORLDS = tuple(TASKS)

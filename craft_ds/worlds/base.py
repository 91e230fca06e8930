"""What a world is: a few robot tasks with an image, a state, a scripted expert and a success flag.

Two worlds implement it: Meta-World on MuJoCo (:mod:`craft_ds.worlds.metaworld`) and coloured blocks in
numpy (:mod:`craft_ds.worlds.blocks`). A world holds one running episode; :meth:`World.fork` gives another
one to step beside it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

IMAGE_SIZE = 64
CAMERA = "observation.images.top"
STATE = "observation.state"
ACTION = "action"


def scene_seed(seed: int, episode: int, *, evaluation: bool) -> int:
    """Return the seed of one episode's scene; demonstrations (odd) and evaluations (even) never share one."""
    return 2 * (10_000 * seed + episode) + (not evaluation)


@dataclass(frozen=True)
class Observation:
    """What a policy sees.

    Attributes:
        image: uint8 (IMAGE_SIZE, IMAGE_SIZE, 3), RGB.
        state: float32 (state dimensions,), in the world's own units.
    """

    image: np.ndarray
    state: np.ndarray


class World(ABC):
    """One running episode of one of the world's tasks.

    Everything random in an episode follows from the seed given to :meth:`reset`. Nothing is rendered
    before :meth:`observe` asks for it: a policy that acts in chunks needs one image a chunk.
    """

    name: ClassVar[str]
    old_tasks: ClassVar[tuple[str, ...]]
    """The tasks that the teacher knows."""
    new_tasks: ClassVar[tuple[str, ...]]
    """The tasks that fine-tuning adds."""
    state_names: ClassVar[tuple[str, ...]]
    action_names: ClassVar[tuple[str, ...]]
    chunk_size: ClassVar[int] = 8
    """Actions that a policy predicts, and executes, at once."""
    state_range: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]]
    """Lowest and highest state of the robot, whatever the task: what a policy's normalisation spans."""
    action_range: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]]
    """Lowest and highest action."""
    horizon: ClassVar[int]
    """Steps after which an episode has failed."""
    fps: ClassVar[int]

    @classmethod
    def tasks(cls, which: str) -> tuple[str, ...]:
        """Return the tasks of ``which``: ``"old"``, ``"new"`` or ``"all"``."""
        return {"old": cls.old_tasks, "new": cls.new_tasks, "all": cls.old_tasks + cls.new_tasks}[which]

    @classmethod
    @abstractmethod
    def task_text(cls, task: str) -> str:
        """Return the instruction that the policy is given for ``task``."""

    @classmethod
    @abstractmethod
    def texts(cls) -> list[str]:
        """Return every instruction that this world could give; a text tokenizer is trained on them."""

    @classmethod
    def fork(cls) -> Self:
        """Return another world of the same kind, with an episode of its own."""
        return cls()

    @abstractmethod
    def reset(self, task: str, seed: int) -> None:
        """Start an episode of ``task`` whose goal and scene follow from ``seed``."""

    @abstractmethod
    def observe(self) -> Observation:
        """Render and return what the policy sees now."""

    @abstractmethod
    def step(self, action: np.ndarray) -> None:
        """Execute one action, float (action dimensions,); parts outside the action range are clipped."""

    @abstractmethod
    def expert(self) -> np.ndarray:
        """Return the scripted expert's action for the present state, float32 (action dimensions,)."""

    @property
    @abstractmethod
    def success(self) -> bool:
        """Whether the present state solves the task."""

"""Interface of a world: a few robot tasks with an image, a state, a scripted expert and a success flag.

Two worlds implement it: Meta-World on MuJoCo (`craft_ds.worlds.metaworld`) and coloured blocks in numpy
(`craft_ds.worlds.blocks`). A world holds one running episode; `World.fork` returns another one that can be
stepped beside it.
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
    """Return the seed of an episode's scene; demonstrations (odd) and evaluations (even) never share one."""
    return 2 * (10_000 * seed + episode) + (not evaluation)


@dataclass(frozen=True)
class Observation:
    """Input of a policy.

    Attributes:
        image: uint8 (IMAGE_SIZE, IMAGE_SIZE, 3), RGB.
        state: float32 (state dimensions,), in the world's own units.
    """

    image: np.ndarray
    state: np.ndarray


class World(ABC):
    """One running episode of one of the world's tasks.

    The seed given to `reset` determines everything random in an episode. Only `observe` renders: a policy
    that acts in chunks needs one image per chunk.
    """

    name: ClassVar[str]
    old_tasks: ClassVar[tuple[str, ...]]
    """Tasks that the teacher knows."""
    new_tasks: ClassVar[tuple[str, ...]]
    """Tasks that fine-tuning adds."""
    state_names: ClassVar[tuple[str, ...]]
    action_names: ClassVar[tuple[str, ...]]
    chunk_size: ClassVar[int] = 8
    """Actions per prediction of a policy, all of them executed."""
    state_range: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]]
    """Lowest and highest state of the robot in any task: the range of a policy's normalisation."""
    action_range: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]]
    """Lowest and highest action."""
    horizon: ClassVar[int]
    """Steps after which an episode counts as failed."""
    fps: ClassVar[int]

    @classmethod
    def tasks(cls, split: str) -> tuple[str, ...]:
        """Return the tasks of a split: `"old"`, `"new"` or `"all"`."""
        return {"old": cls.old_tasks, "new": cls.new_tasks, "all": cls.old_tasks + cls.new_tasks}[split]

    @classmethod
    @abstractmethod
    def task_text(cls, task: str) -> str:
        """Return the instruction given to the policy for `task`."""

    @classmethod
    @abstractmethod
    def texts(cls) -> list[str]:
        """Return all instructions of this world, to train a text tokenizer on."""

    @classmethod
    def fork(cls) -> Self:
        """Return another world of the same class, with its own episode."""
        return cls()

    @abstractmethod
    def reset(self, task: str, seed: int) -> None:
        """Start an episode of `task`; `seed` determines its goal and scene."""

    @abstractmethod
    def observe(self) -> Observation:
        """Render and return the current observation."""

    @abstractmethod
    def step(self, action: np.ndarray) -> None:
        """Execute one action, float (action dimensions,), clipped to the action range."""

    @abstractmethod
    def expert(self) -> np.ndarray:
        """Return the scripted expert's action for the current state, float32 (action dimensions,)."""

    @property
    @abstractmethod
    def success(self) -> bool:
        """True if the current state solves the task."""

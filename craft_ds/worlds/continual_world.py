"""Continual World's ten tasks by imitation: Meta-World scenes seen by a camera that follows the hand.

Differences from `MetaWorld`, each needed for imitation on 64×64 images: the camera moves with the hand, so
that a policy sees where things are relative to its gripper; an image is the mean of 2×2 rendered pixels; the
scripted experts know the goal; and every scene is one that the expert solves.
"""

from typing import Any, override

import numpy as np

from craft_ds.worlds.base import IMAGE_SIZE
from craft_ds.worlds.metaworld import MetaWorld, free_camera
from craft_ds.worlds.tasks import TASKS

_SUPERSAMPLING = 2
_AZIMUTH, _ELEVATION, _DISTANCE = 180.0, -50.0, 0.8  # degrees, degrees, m
_MAX_REDRAWS = 20


class ContinualWorld(MetaWorld):
    """The tasks of Continual World (Wołczyk et al. 2021, arXiv:2105.10919) with new ones before them.

    The old tasks are outside of the ten: a start policy that was pretrained on them knows the robot, the
    camera and the tokens, and none of the sequence.
    """

    name = "cw10"
    old_tasks, new_tasks = TASKS["cw10"]
    state_range = ((-0.3, 0.35, 0.04, 0.0), (0.4, 0.95, 0.5, 1.0))
    horizon = 200

    _render_size = _SUPERSAMPLING * IMAGE_SIZE
    _shows_goal = True
    _renderers: dict[str, Any] = {}  # noqa: RUF012  (as in MetaWorld, at another size)
    _redraws: dict[tuple[str, int], int] = {}  # noqa: RUF012  (of the scenes that were tried so far)

    @override
    def reset(self, task: str, seed: int) -> None:
        """Start an episode in a scene that the expert solves; the scene is redrawn until it does.

        Raises:
            RuntimeError: The expert solves none of the first 20 scenes.
        """
        for redraw in range(self._redraws.get((task, seed), 0), _MAX_REDRAWS):
            scene = seed + redraw * 1_000_000
            super().reset(task, scene)
            if (task, seed) in self._redraws:
                return
            if self._expert_solves():
                self._redraws[task, seed] = redraw
                super().reset(task, scene)
                return
        raise RuntimeError(f"the expert solves no scene of {task} with seed {seed} in {self.horizon} steps")

    @override
    def positions(self) -> np.ndarray:
        """Return the positions of two objects and of the goal; an absent object is NaN."""
        # Raw observations hold hand, gripper, object, its quaternion, second object, its quaternion, …, goal.
        things = np.stack([self._raw[4:7], self._raw[11:14], self._raw[-3:]])
        things[~things.any(axis=1)] = np.nan
        return (things - self._raw[:3]).astype(np.float32)

    def _expert_solves(self) -> bool:
        for _ in range(self.horizon):
            self.step(self.expert())
            if self.success:
                return True
        return False

    @override
    def _camera(self) -> Any:
        return free_camera(self._raw[:3], _AZIMUTH, _ELEVATION, _DISTANCE)

    @override
    def _image(self, pixels: np.ndarray) -> np.ndarray:
        blocks = pixels.reshape(IMAGE_SIZE, _SUPERSAMPLING, IMAGE_SIZE, _SUPERSAMPLING, 3)
        return blocks.mean(axis=(1, 3)).astype(np.uint8)

"""Continual World's ten tasks by imitation: Meta-World scenes with the objects' positions in the state.

Differences from `MetaWorld`: as in Continual World, the state holds the positions of two objects, and here
that of the goal too, which the scripted experts need; and every scene is one that the expert solves.
"""

from typing import Any, override

import numpy as np

from craft_ds.worlds.metaworld import MetaWorld
from craft_ds.worlds.tasks import TASKS

_MAX_REDRAWS = 20
_REACH = 0.3
"""Largest coordinate (m) of a position in the state. The experts' commands saturate at 0.1 m, and a policy
reads a state in 256 bins: of this range, they are 2.3 mm wide."""


class ContinualWorld(MetaWorld):
    """The tasks of Continual World (Wołczyk et al. 2021, arXiv:2105.10919) with new ones before them.

    The old tasks are outside of the ten: a start policy that was pretrained on them knows the robot, the
    camera and the tokens, and none of the sequence.

    The state is the hand's position (m) and the gripper's opening (0 to 1), as in `MetaWorld`, then the
    positions (m) of the objects and of the goal relative to the hand.
    """

    name = "cw10"
    old_tasks, new_tasks = TASKS["cw10"]
    state_names = (
        *MetaWorld.state_names,
        *(f"{thing}_{axis}" for thing in ("object", "second_object", "goal") for axis in "xyz"),
    )
    state_range = ((-0.3, 0.35, 0.04, 0.0, *[-_REACH] * 9), (0.4, 0.95, 0.5, 1.0, *[_REACH] * 9))
    horizon = 200

    _shows_goal = True
    _renderers: dict[str, Any] = {}  # noqa: RUF012  (as in MetaWorld, of these models)
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
    def _state(self) -> np.ndarray:
        """Return the hand, the gripper, and the positions of two objects and the goal relative to the hand.

        Positions are clipped to `_REACH`; an absent object is at its lower end.
        """
        # Raw observations hold hand, gripper, object, its quaternion, second object, its quaternion, …, goal.
        things = np.stack([self._raw[4:7], self._raw[11:14], self._raw[-3:]])
        relative = np.where(things.any(axis=1, keepdims=True), things - self._raw[:3], -_REACH)
        return np.concatenate([super()._state(), relative.clip(-_REACH, _REACH).ravel()], dtype=np.float32)

    def _expert_solves(self) -> bool:
        for _ in range(self.horizon):
            self.step(self.expert())
            if self.success:
                return True
        return False

"""Four Meta-World tasks (Yu et al. 2019, arXiv:1910.10897) in MuJoCo, with small off-screen images.

LeRobot's own environment for them renders 480×480 at every step; this one renders 64×64 without shadows,
reflections and multisampling, and only when asked to: about ten times as many steps per second.
"""

import atexit
import json
import os
import sys
import warnings
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar, override

import numpy as np

from craft_ds.worlds.base import IMAGE_SIZE, Observation, World
from craft_ds.worlds.tasks import TASKS

if sys.platform == "linux":  # MuJoCo selects its GL library on import; EGL needs no display
    os.environ.setdefault("MUJOCO_GL", "egl")

import metaworld.policies
import mujoco
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

# The experts deliberately command more than the actuators allow: their actions are clipped here.
warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high", module="metaworld")

_CAMERA = "corner2"
_CAMERA_POSITION = (0.75, 0.075, 0.7)  # as LeRobot's environment moves it


@cache
def _lerobot_tables() -> dict[str, dict[str, str]]:
    """Return LeRobot's tables of task texts and experts, without importing its environments (5 s)."""
    return json.loads((files("lerobot") / "envs" / "metaworld_config.json").read_text(encoding="utf-8"))


class MetaWorld(World):
    """Sawyer arm tasks; the state is the hand's position (m) and the gripper's opening (0 to 1).

    An action is a step of the hand (x, y, z; 1 means 1 cm) and the gripper's effort, each in [-1, 1].
    """

    name = "metaworld"
    old_tasks, new_tasks = TASKS["metaworld"]
    state_names: ClassVar[tuple[str, ...]] = ("hand_x", "hand_y", "hand_z", "gripper_opening")
    action_names = ("hand_dx", "hand_dy", "hand_dz", "gripper_effort")
    state_range: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]] = (
        (-0.3, 0.35, 0.05, 0.0),
        (0.3, 0.95, 0.45, 1.0),
    )
    action_range = ((-1.0,) * 4, (1.0,) * 4)
    horizon = 160
    fps = 80

    _shows_goal = False
    """True if the expert reads the goal's position and the first image shows it; off in this class, whose
    shipped teacher was trained without."""
    _renderers: dict[str, mujoco.Renderer] = {}  # noqa: RUF012  (all episodes of a task share a GL context)

    def __init__(self) -> None:
        self._task = ""
        self._env: Any = None
        self._policy: Any = None
        self._raw = np.zeros(39)
        self._success = False

    @override
    @classmethod
    def task_text(cls, task: str) -> str:
        return _lerobot_tables()["TASK_DESCRIPTIONS"][task]

    @override
    @classmethod
    def texts(cls) -> list[str]:
        return list(_lerobot_tables()["TASK_DESCRIPTIONS"].values())

    @override
    def reset(self, task: str, seed: int) -> None:
        if task != self._task:
            self._task, self._env = task, _build_environment(task, self._shows_goal)
            self._policy = getattr(metaworld.policies, _lerobot_tables()["TASK_POLICY_MAPPING"][task])()
        self._env.seed(seed)
        self._raw, _ = self._env.reset()
        if self._shows_goal:
            # The environment moves the goal's marker last: the first image would show the episode before.
            mujoco.mj_kinematics(self._env.model, self._env.data)
        self._success = False

    @override
    def observe(self) -> Observation:
        model, data = self._env.model, self._env.data
        if self._task not in self._renderers:
            self._renderers[self._task] = _build_renderer(model)
        renderer = self._renderers[self._task]
        # Not Renderer.update_scene: it reads the goal from the model that the renderer was built for.
        camera = mujoco.MjvCamera()
        camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        camera.fixedcamid = model.camera(_CAMERA).id
        mujoco.mjv_updateScene(
            model, data, mujoco.MjvOption(), None, camera, mujoco.mjtCatBit.mjCAT_ALL, renderer.scene
        )
        image = np.ascontiguousarray(renderer.render()[::-1, ::-1])  # this camera is mounted upside down
        return Observation(image, self._state())

    def _state(self) -> np.ndarray:
        """Return the state of an observation, float32 (state dimensions,)."""
        return self._raw[:4].astype(np.float32)

    @override
    def step(self, action: np.ndarray) -> None:
        self._raw, _, _, _, info = self._env.step(np.clip(action, -1.0, 1.0).astype(np.float32))
        self._success = bool(info["success"])

    @override
    def expert(self) -> np.ndarray:
        return np.clip(self._policy.get_action(self._raw), -1.0, 1.0).astype(np.float32)

    @override
    @property
    def success(self) -> bool:
        return self._success


def _build_environment(task: str, shows_goal: bool) -> Any:
    env = ALL_V3_ENVIRONMENTS[task]()
    if shows_goal:
        env._partially_observable = False
        del env.sawyer_observation_space  # cached with the goal's bounds at zero, to which steps are clipped
    # Not set_task, which would set one of 50 fixed goals: the seed determines the goal.
    env._set_task_called = True
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    env.model.cam_pos[env.model.camera(_CAMERA).id] = _CAMERA_POSITION
    env.model.vis.quality.offsamples = 0
    return env


def _build_renderer(model: mujoco.MjModel) -> mujoco.Renderer:
    renderer = mujoco.Renderer(model, IMAGE_SIZE, IMAGE_SIZE)
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
    atexit.register(renderer.close)  # registered after MuJoCo's own EGL teardown, so it runs before it
    return renderer

"""Coloured blocks on a table, in numpy: for tests and for machines without GL, not for reported results.

A hand moves to the commanded position at a limited speed; the task names the colour to reach.
"""

from typing import override

import numpy as np

from craft_ds.worlds.base import IMAGE_SIZE, Observation, World
from craft_ds.worlds.tasks import TASKS

_COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 210, 40),
}
_TABLE = (120, 105, 90)
_HAND = (255, 255, 255)
_HALF_BLOCK = 6  # pixels
_HALF_HAND = 2
_SPEED = 0.05  # table widths per step
_REACH = 0.09  # table widths: about half a block's side
_MIN_START_DISTANCE = 0.25  # table widths between the hand and its block
_GRID = 4
_MARGIN = 0.12


class Blocks(World):
    """One to four blocks of different colours on a 4×4 grid; reach the one that the task names.

    The other blocks move to other cells at every step: a short episode then shows many scenes, and a policy
    learns from the number of scenes.

    Positions are (x, y) in table widths, from (0, 0) at the image's upper left to (1, 1). The state is the
    hand's position and the action the position to move to.
    """

    name = "blocks"
    old_tasks, new_tasks = TASKS["blocks"]
    state_names = ("hand_x", "hand_y")
    action_names = ("target_x", "target_y")
    state_range = ((0.0, 0.0), (1.0, 1.0))
    action_range = ((0.0, 0.0), (1.0, 1.0))
    horizon = 48
    fps = 10

    def __init__(self) -> None:
        self._colour = ""
        self._rng = np.random.default_rng()
        self._colours: list[str] = []  # those on the table, the task's first
        self._cells: np.ndarray = np.arange(_GRID**2)  # the blocks are in the first ones
        self._hand: np.ndarray = np.zeros(2)
        self._setpoint: np.ndarray = np.zeros(2)

    @override
    @classmethod
    def task_text(cls, task: str) -> str:
        return f"Reach the {task.removeprefix('reach-')} block"

    @override
    @classmethod
    def texts(cls) -> list[str]:
        return [cls.task_text(task) for task in cls.tasks("all")]

    @override
    def reset(self, task: str, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        colour = task.removeprefix("reach-")
        others = self._rng.permutation([other for other in _COLOURS if other != colour])
        self._colours = [colour, *others[: self._rng.integers(len(others) + 1)]]
        self._cells = self._rng.permutation(_GRID**2)
        self._hand = self.expert()
        while np.linalg.norm(self._hand - self.expert()) < _MIN_START_DISTANCE:
            self._hand = self._rng.uniform(_MARGIN, 1 - _MARGIN, size=2)
        self._setpoint = self._hand

    @override
    def observe(self) -> Observation:
        image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), _TABLE, dtype=np.uint8)
        for colour, cell in zip(self._colours, self._cells, strict=False):
            _fill(image, _centre(cell), _HALF_BLOCK, _COLOURS[colour])
        _fill(image, self._hand, _HALF_HAND, _HAND)
        return Observation(image, self._hand.astype(np.float32))

    @override
    def step(self, action: np.ndarray) -> None:
        self._setpoint = np.clip(np.asarray(action, dtype=np.float64), 0.0, 1.0)
        offset = self._setpoint - self._hand
        self._hand = self._hand + offset * min(1.0, _SPEED / max(float(np.linalg.norm(offset)), 1e-9))
        self._cells[1:] = self._rng.permutation(self._cells[1:])

    @override
    def expert(self) -> np.ndarray:
        return _centre(self._cells[0]).astype(np.float32)

    @override
    @property
    def success(self) -> bool:
        """True if the hand is at the block and was commanded to be: passing over it does not count."""
        target = _centre(self._cells[0])
        return all(np.linalg.norm(position - target) < _REACH for position in (self._hand, self._setpoint))


def _centre(cell: int) -> np.ndarray:
    """Return the position of a cell's centre."""
    return (np.array(divmod(cell, _GRID)) + 0.5) / _GRID


def _fill(image: np.ndarray, centre: np.ndarray, half: int, colour: tuple[int, int, int]) -> None:
    x, y = np.round(centre * (IMAGE_SIZE - 1)).astype(int)
    image[max(y - half, 0) : y + half + 1, max(x - half, 0) : x + half + 1] = colour

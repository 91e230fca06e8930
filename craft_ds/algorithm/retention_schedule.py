"""Interval between retention steps: K, or adaptive between K and a maximum. No tensors, no ranks."""

from typing import Any

from craft_ds.algorithm.multiplier import is_step
from craft_ds.config.craft_config import CraftConfig


def next_interval(interval: int, slack: bool | None, config: CraftConfig) -> int:
    """Return the number of steps from a retention step to the next.

    With `retention_freq_max`, the interval doubles up to it while the constraint is slack (L_ret ≤ ε), and is
    `retention_freq` again after a violation. Without, it is always `retention_freq`.

    Args:
        interval: Steps from the last retention step to this one.
        slack: The constraint holds in this step; None: it was not measured, and an adaptive interval stays.
        config: `retention_freq` and `retention_freq_max` are read.
    """
    if slack is None and config.retention_freq_max:
        return interval
    if not (slack and config.retention_freq_max):
        return config.retention_freq
    return min(2 * interval, config.retention_freq_max)


class RetentionSchedule:
    """Retention steps of a run: the first step, and each sets the interval to the next.

    What it depends on is the same on all ranks, so that all ranks take the same steps.

    Attributes:
        interval: Steps from the last retention step to the next.
        next_step: The next retention step, counted from 0.
    """

    def __init__(self, config: CraftConfig):
        self.config = config
        self.interval = config.retention_freq
        self.next_step = 0

    def due(self, step: int) -> bool:
        """Return True if this is a retention step."""
        return step >= self.next_step

    def retention_scale(self, step: int) -> float:
        """Return the factor of the retention part in a retention step (`--craft.retention_scale`).

        With `freq`, the number of steps since the last retention step, this one included: the factors of a
        run add up to its steps. The first step has factor 1.
        """
        if self.config.retention_scale == "none":
            return 1.0
        return float(min(step - (self.next_step - self.interval), step + 1))

    def advance(self, step: int, *, slack: bool | None) -> None:
        """Set the next retention step after a retention step, skipped ones included.

        Args:
            step: The retention step.
            slack: The step was applied and its constraint holds; None: it was not measured.
        """
        self.interval = next_interval(self.interval, slack, self.config)
        self.next_step = step + self.interval

    def state_dict(self) -> dict[str, Any]:
        """Return plain Python values."""
        return {"interval": self.interval, "next_step": self.next_step}

    def load_state_dict(self, state: dict[str, Any] | None, step: int) -> None:
        """Continue at a step; an interval above the present maximum is shortened.

        Args:
            state: From `state_dict`; None in checkpoints of older versions.
            step: Steps done.

        Raises:
            ValueError: The state is not one that a run can have.
        """
        freq = self.config.retention_freq
        # Before adaptive intervals, and after a baseline, retention steps are the multiples of K.
        interval, next_step = freq, -(-step // freq) * freq
        if state is not None:
            if not isinstance(state, dict) or state.keys() != {"interval", "next_step"}:
                raise ValueError(f"retention_schedule={state!r}")
            if not all(is_step(value) for value in state.values()):
                raise ValueError(f"retention_schedule={state!r}")
            if state["interval"] < 1 or state["next_step"] > step + state["interval"]:
                raise ValueError(f"retention_schedule={state!r} after {step} steps")
            if state["next_step"] >= step:
                interval, next_step = state["interval"], state["next_step"]
        self.interval = min(interval, max(freq, self.config.retention_freq_max))
        self.next_step = next_step - (interval - self.interval)

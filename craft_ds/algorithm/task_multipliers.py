"""One multiplier per old task in one backward pass (`--craft.multiplier_scope=task`). No tensors, no ranks.

With T old tasks the problem has T constraints, L_i(θ) ≤ ε_i, each with a multiplier λ_i. The anchors of task
i enter the retention loss with weight λ_i: g_r is the gradient of Σ_i λ_i·S_i / N, with S_i the task's loss
summed over its tokens and N the tokens of all anchors. With all λ_i = λ that is λ times the gradient of the
mean loss. The merge then uses g_t + 1·g_r.
"""

import math
from collections.abc import Sequence
from typing import Any

from craft_ds.algorithm.multiplier import DualState, RetentionRecord, next_multiplier
from craft_ds.config.craft_config import CraftConfig

_COLUMNS = ("lambda", "epsilon", "retention_loss")


class TaskDualState(DualState):
    """λ of every old task, and their history.

    Attributes:
        tasks: The tasks' texts.
        multipliers: λ_i for the next retention step, in the order of `tasks`; `multiplier` is their mean.
        smoothed_violations: ξ_i of νPI; 0 with other rules.
    """

    def __init__(self, config: CraftConfig, tasks: Sequence[str]):
        super().__init__(config)
        self.tasks = list(tasks)
        self.multipliers = [config.initial_lambda] * len(tasks)
        self.smoothed_violations = [0.0] * len(tasks)

    def in_step(self, epsilon: float) -> tuple[float, ...]:
        """Return λ_i of the next retention step."""
        return tuple(self.multipliers)

    def ascend(self, record: RetentionRecord) -> None:
        """Append the record of a retention step and update each λ_i whose task was measured in it."""
        self.history.append(record)
        for position, task in enumerate(record.tasks):
            if not math.isnan(task.retention_loss):
                self.multipliers[position], self.smoothed_violations[position] = next_multiplier(
                    self.multipliers[position],
                    self.smoothed_violations[position],
                    task.retention_loss - task.epsilon,
                    self.config,
                )
        self._average()

    def _average(self) -> None:
        """Set what a state with a single λ has to the means over tasks."""
        # A mean is rounded: it may exceed the largest by one unit in the last place.
        self.multiplier = min(sum(self.multipliers) / len(self.multipliers), max(self.multipliers))
        self.smoothed_violation = sum(self.smoothed_violations) / len(self.smoothed_violations)

    def state_dict(self) -> dict[str, Any]:
        """Return plain Python values, readable by `torch.load(weights_only=True)`."""
        numbers = zip(self.multipliers, self.smoothed_violations, strict=True)
        return {**super().state_dict(), "tasks": dict(zip(self.tasks, map(list, numbers), strict=True))}

    def load_state_dict(self, state: dict[str, Any], lambda_max: float = math.inf) -> None:
        """Restore a state from `state_dict`, with its tasks; λ_i is clipped to the present `lambda_max`.

        A state with a single λ is continued with this λ for every task.

        Raises:
            ValueError: The state is not one that a run can have.
        """
        super().load_state_dict(state, lambda_max)
        if "tasks" not in state:
            self.multipliers = [self.multiplier] * len(self.tasks)
            self.smoothed_violations = [self.smoothed_violation] * len(self.tasks)
            return
        tasks = state["tasks"]
        if not isinstance(tasks, dict) or not tasks or not all(isinstance(task, str) for task in tasks):
            raise ValueError(f"tasks={tasks!r}")
        for numbers in tasks.values():
            if not (isinstance(numbers, list) and len(numbers) == 2):
                raise ValueError(f"tasks={tasks!r}")
            if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
                raise ValueError(f"tasks={tasks!r}")
            if not 0.0 <= numbers[0] <= lambda_max:
                raise ValueError(f"λ of a task is {numbers[0]!r} of at most {lambda_max!r}")
        if any(len(record.tasks) not in (0, len(tasks)) for record in self.history):
            raise ValueError(f"its history is not of {len(tasks)} tasks")
        self.tasks = list(tasks)
        fixed = self.config.initial_lambda if self.config.multiplier == "fixed" else None
        self.multipliers = [
            min(value, self.config.lambda_max) if fixed is None else fixed for value, _ in tasks.values()
        ]
        self.smoothed_violations = [smoothed for _, smoothed in tasks.values()]
        self._average()

    def _task_columns(self) -> list[str]:
        return [f"{name}/{task}" for task in self.tasks for name in _COLUMNS]

    def _task_values(self, record: RetentionRecord) -> list[float]:
        if not record.tasks:  # of steps with a single λ, before the flag changed
            return [math.nan] * len(self._task_columns())
        return [value for task in record.tasks for value in (task.lambda_, task.epsilon, task.retention_loss)]


def make_dual_state(config: CraftConfig, tasks: Sequence[str] = ()) -> DualState:
    """Return the state of λ as `multiplier_scope` asks.

    Args:
        config: The flags.
        tasks: Texts of the old tasks; read with `multiplier_scope=task`.
    """
    return (
        TaskDualState(config, tasks)
        if config.enabled and config.multiplier_scope == "task"
        else DualState(config)
    )

"""Dual side of CRaFT: the schedule of ε, the dual ascent on λ, and their history. No tensors, no ranks.

Other rules for λ are in `craft_ds.algorithm.dual_rules`, one λ per task is in
`craft_ds.algorithm.task_multipliers`.

CRaFT minimises L_task(θ) subject to L_ret(θ) ≤ ε(t). The Lagrangian is L_task + λ·(L_ret − ε) with
λ ≥ 0; gradient descent on θ and projected gradient ascent on λ look for its saddle point
(Boyd & Vandenberghe, Convex Optimization, ch. 5).
"""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from craft_ds.algorithm.dual_rules import NuPiStep, dynamic_barrier, nupi
from craft_ds.algorithm.gram_triple import GramTriple
from craft_ds.config.craft_config import CraftConfig

StepMultiplier = Callable[[GramTriple, float], float]
"""Computes λ of a step from its Gram triple and L_ret."""


def epsilon_at(step: int, total_steps: int, config: CraftConfig) -> float:
    """Return the constraint threshold ε(t), in units of the retention loss.

    With p = min(t / T, 1) and T = `epsilon_decay_steps` (0: all training steps), ε falls from s =
    `epsilon_start` at t = 0 to e = `epsilon_end` at t = T and stays there:
    `linear` s + (e − s)·p, `cosine` s + (e − s)·(1 − cos πp)/2, `exponential` s·(e/s)^p.

    Args:
        step: Optimizer steps taken so far, t.
        total_steps: Optimizer steps of the complete run.
        config: Its epsilon fields are read.
    """
    start, end = config.epsilon_start, config.epsilon_end
    progress = min(step / max(1, config.epsilon_decay_steps or total_steps), 1.0)
    if progress == 1.0:
        return end
    match config.epsilon_schedule:
        case "linear":
            return start + (end - start) * progress
        case "cosine":
            return start + (end - start) * 0.5 * (1.0 - math.cos(math.pi * progress))
        case "exponential":
            return start * (end / start) ** progress
        case kind:
            raise ValueError(f"unknown epsilon_schedule {kind!r}")


def ascend(multiplier: float, retention_loss: float, epsilon: float, config: CraftConfig) -> float:
    """Take one step of projected dual ascent: λ ← clip(λ + lambda_lr·(L_ret − ε), 0, lambda_max).

    Warning:
        Do not measure L_ret on the anchors that give the retention gradient: a policy memorises a few
        hundred anchors, and λ then falls to zero while the old tasks are forgotten. See `constraint_split`.
    """
    return max(0.0, min(config.lambda_max, multiplier + config.lambda_lr * (retention_loss - epsilon)))


def next_multiplier(
    multiplier: float, smoothed_violation: float, violation: float, config: CraftConfig
) -> NuPiStep:
    """Return λ and ξ after a retention step, by `config.multiplier`.

    Args:
        multiplier: λ as used in the step.
        smoothed_violation: ξ of νPI; other rules leave it alone.
        violation: L_ret − ε.
        config: The rule and its options.

    Raises:
        ValueError: The rule is unknown.
    """
    match config.multiplier:
        case "ascent":
            return NuPiStep(ascend(multiplier, violation, 0.0, config), smoothed_violation)
        case "nupi":
            return nupi(multiplier, smoothed_violation, violation, config)
        case "dynamic_barrier":
            return NuPiStep(multiplier, smoothed_violation)
        case "fixed":
            return NuPiStep(config.initial_lambda, smoothed_violation)
        case rule:
            raise ValueError(f"unknown multiplier {rule!r}")


def is_step(value: object) -> bool:
    """Return True for an integer that can count the steps of a run."""
    return type(value) is int and 0 <= value < 1 << 62


@dataclass(frozen=True)
class TaskRecord:
    """Record of one old task in a retention step, with one λ per task; NaN for the loss: not measured."""

    lambda_: float
    epsilon: float
    retention_loss: float


@dataclass(frozen=True)
class RetentionRecord:
    """Record of one retention step; a row of `lambda_history.csv`.

    `lambda_` is λ as used in the step, before the dual step (the CSV's column is `lambda`);
    `retention_weight` is b/a, the weight of g_r relative to g_t in the merged gradient; `dot` is <g_t, g_r>;
    `removed` is the share of ‖g_t‖² that the projection removed, `conflict_share` that of the layers in
    conflict. With one λ per task, `lambda_` is their mean and `tasks` has a record for each. What was not
    measured is NaN: `retention_loss` between the steps of `constraint_freq`, `cos` and `dot` where both
    losses accumulate in one gradient.
    """

    step: int
    lambda_: float
    epsilon: float
    retention_loss: float
    conflict: bool
    cos: float
    retention_weight: float
    dot: float
    removed: float = 0.0  # checkpoints of older versions have neither this nor what follows
    conflict_share: float = 0.0
    tasks: tuple[TaskRecord, ...] = ()

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "RetentionRecord":
        """Return the record that `asdict` described.

        Raises:
            TypeError: It has other fields.
            ValueError: A field is not a number.
        """
        tasks = tuple(TaskRecord(**task) for task in row.get("tasks", ()))
        record = cls(**{**row, "tasks": tasks})
        numbers = [value for part in (record, *tasks) for value in vars(part).values() if value is not tasks]
        if not all(isinstance(value, int | float) for value in numbers):
            raise ValueError("a record has non-numbers")
        return record

    @property
    def slack(self) -> bool | None:
        """True if L_ret ≤ ε; with one λ per task, for every task that was measured. None: nothing was."""
        if math.isnan(self.retention_loss):
            return None
        measured = [task for task in self.tasks if not math.isnan(task.retention_loss)]
        if measured:
            return all(task.retention_loss <= task.epsilon for task in measured)
        return self.retention_loss <= self.epsilon


def conflict_metrics(records: Sequence[RetentionRecord]) -> dict[str, float]:
    """Return the means over retention steps that the log shows; none without a step.

    `craft/conflict_rate` is the share of steps with a conflict, `craft/mean_grad_cos` the mean cosine and
    `craft/removed_energy` the mean share of ‖g_t‖² that the projection removed. Steps without a cosine are
    left out.
    """
    records = [record for record in records if not math.isnan(record.cos)]
    if not records:
        return {}
    return {
        "craft/conflict_rate": sum(record.conflict for record in records) / len(records),
        "craft/mean_grad_cos": math.fsum(record.cos for record in records) / len(records),
        "craft/removed_energy": math.fsum(record.removed for record in records) / len(records),
    }


class DualState:
    """λ and its history: the state of CRaFT that a checkpoint stores besides the model.

    Attributes:
        multiplier: λ for the next retention step; with `dynamic_barrier` that of the last one.
        smoothed_violation: ξ of νPI; 0 with other rules.
        history: One record per retention step, in order.
    """

    def __init__(self, config: CraftConfig):
        self.config = config
        self.multiplier = config.initial_lambda
        self.smoothed_violation = 0.0
        self.history: list[RetentionRecord] = []

    def in_step(self, epsilon: float) -> float | tuple[float, ...] | StepMultiplier:
        """Return λ of the next retention step (one per task where there are several), or how to compute it.

        Args:
            epsilon: ε of the step, in units of the retention loss.
        """
        if self.config.multiplier != "dynamic_barrier":
            return self.multiplier
        return lambda triple, retention_loss: dynamic_barrier(triple, retention_loss - epsilon, self.config)

    def ascend(self, record: RetentionRecord) -> None:
        """Append the record of a retention step; if L_ret was measured, update λ by `config.multiplier`."""
        self.history.append(record)
        if math.isnan(record.retention_loss):
            return
        self.multiplier, self.smoothed_violation = next_multiplier(
            record.lambda_ if self.config.multiplier == "dynamic_barrier" else self.multiplier,
            self.smoothed_violation,
            record.retention_loss - record.epsilon,
            self.config,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return plain Python values, readable by `torch.load(weights_only=True)`."""
        return {
            "multiplier": self.multiplier,
            "smoothed_violation": self.smoothed_violation,
            "history": [asdict(record) for record in self.history],
        }

    def load_state_dict(self, state: dict[str, Any], lambda_max: float = math.inf) -> None:
        """Restore a state from `state_dict`; λ is clipped to the present `lambda_max`.

        Args:
            state: From `state_dict`.
            lambda_max: Upper bound of λ in the run that saved it.

        Raises:
            ValueError: The state is not one that a run can have.
        """
        try:
            multiplier, history = (
                state["multiplier"],
                [RetentionRecord.from_dict(row) for row in state["history"]],
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a state of λ and its history: {error}") from None
        smoothed = state.get("smoothed_violation", 0.0)  # checkpoints of older versions do not have it
        if not isinstance(smoothed, int | float) or not math.isfinite(smoothed):
            raise ValueError(f"smoothed_violation={smoothed!r} is not a finite number")
        if not isinstance(multiplier, int | float) or not 0 <= multiplier < math.inf:
            raise ValueError(f"not a state of λ and its history: λ is {multiplier!r}")
        steps = [record.step for record in history]
        if multiplier > lambda_max or steps != sorted({*steps}) or not all(is_step(step) for step in steps):
            raise ValueError(f"λ is {multiplier!r} of at most {lambda_max!r}, or its history is out of order")
        self.multiplier, self.history = min(multiplier, self.config.lambda_max), history
        self.smoothed_violation = float(smoothed)
        if self.config.multiplier == "fixed":
            self.multiplier = self.config.initial_lambda

    def write_csv(self, path: Path) -> None:
        """Write `lambda_history.csv`: a header and one row per retention step."""
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            names = [field.name for field in fields(RetentionRecord) if field.name != "tasks"]
            writer.writerow([*(name.rstrip("_") for name in names), *self._task_columns()])
            for record in self.history:
                row = [getattr(record, name) for name in names]
                values = [int(value) if isinstance(value, bool) else value for value in row]
                writer.writerow([*values, *self._task_values(record)])

    def _task_columns(self) -> list[str]:
        return []

    def _task_values(self, record: RetentionRecord) -> list[float]:
        return []

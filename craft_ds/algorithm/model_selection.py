"""Choice of a checkpoint by its evaluations, and early stop: pure functions of records, without tensors.

The best checkpoint solves min L_task subject to L_ret ≤ ε on held-out data, over the evaluated steps.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation on held-out data during training.

    Attributes:
        step: Optimizer steps done.
        task_loss: Mean loss per token on held-out episodes of the new task.
        retention_loss: L_ret on held-out anchors; None: the baseline, which has no constraint.
        epsilon: ε at that step, in the unit of L_ret; None for the baseline.
    """

    step: int
    task_loss: float
    retention_loss: float | None = None
    epsilon: float | None = None

    @property
    def violation(self) -> float:
        """max(0, L_ret − ε): 0 if the constraint is satisfied, and for the baseline."""
        if self.retention_loss is None or self.epsilon is None:
            return 0.0
        return self.retention_loss - self.epsilon if self.retention_loss > self.epsilon else 0.0

    @property
    def is_finite(self) -> bool:
        """True if every loss was measured."""
        losses = (self.task_loss, self.retention_loss, self.epsilon)
        return all(loss is None or math.isfinite(loss) for loss in losses)

    def describe(self) -> str:
        """Return the losses for the log."""
        shown = f"task loss {self.task_loss:.4g}"
        if self.retention_loss is None:
            return shown
        sign = ">" if self.violation else "≤"
        shown += f", L_ret {self.retention_loss:.4g} {sign} ε {self.epsilon:.4g}"
        return (
            f"{shown}: no checkpoint satisfies the constraint, this one is nearest to it"
            if self.violation
            else shown
        )


def best_record(records: Iterable[EvalRecord]) -> EvalRecord | None:
    """Return the record of the best checkpoint; None if no record is finite.

    The best has the lowest task loss among those with L_ret ≤ ε at their step. If there is none, it is the
    one with the smallest L_ret − ε. Ties go to the lower task loss, then to the earlier step. The order is
    total, so that only the best so far must be kept to compare with a new one.
    """
    finite = (record for record in records if record.is_finite)
    return min(finite, key=lambda record: (record.violation, record.task_loss, record.step), default=None)


def evaluations_since_best(records: Sequence[EvalRecord]) -> int:
    """Return the number of evaluations since the lowest task loss; non-finite losses count as infinite."""
    losses = [record.task_loss if math.isfinite(record.task_loss) else math.inf for record in records]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def is_stalled(records: Sequence[EvalRecord], patience: int) -> bool:
    """Return True if the task loss did not improve on its best in the last `patience` evaluations.

    Args:
        records: All evaluations of the run, in order.
        patience: Number of evaluations; 0: never.
    """
    return 0 < patience <= evaluations_since_best(records)


def describe_stall(records: Sequence[EvalRecord]) -> str:
    """Return how long the task loss has not improved, for the log."""
    since = evaluations_since_best(records)
    best = records[-1 - since]
    lowest = f"{best.task_loss:.4g} at step {best.step}"
    return f"the held-out task loss did not improve in {since} evaluations on {lowest}"

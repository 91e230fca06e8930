"""Choice of the teacher's share α in interpolated weights from losses on held-out data. No tensors."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class AlphaLosses(NamedTuple):
    """Losses of (1 − α)·fine-tuned + α·teacher.

    Attributes:
        alpha: Share of the teacher.
        anchor_loss: Mean retention loss on held-out anchors.
        task_loss: Mean loss per token on held-out episodes of the new task; None: not measured.
    """

    alpha: float
    anchor_loss: float
    task_loss: float | None = None


def choose_alpha(rows: Sequence[AlphaLosses], epsilon: float) -> AlphaLosses | None:
    """Return the row to export; None if no row has an anchor loss of at most ε.

    Among those it is the one with the lowest task loss, or the smallest α where no task loss was measured.
    Ties go to the smaller α.

    Args:
        rows: One per α, all with a task loss or none.
        epsilon: ε, in the unit of the anchor loss.
    """
    within = [
        row
        for row in rows
        if row.anchor_loss <= epsilon and (row.task_loss is None or math.isfinite(row.task_loss))
    ]
    return min(within, key=lambda row: (row.task_loss or 0.0, row.alpha), default=None)


def table_line(row: AlphaLosses) -> str:
    """Return a line under `TABLE_HEAD`."""
    task = "-" if row.task_loss is None else f"{row.task_loss:.4f}"
    return f"{row.alpha:5.2f}  {row.anchor_loss:11.4f}  {task:>9}"


TABLE_HEAD = "alpha  anchor loss  task loss"

"""What a result says: success on earlier and on new tasks, what was forgotten, losses."""

from collections.abc import Callable
from statistics import fmean
from typing import Any

from craft_ds.algorithm.continual_metrics import nbt

Result = dict[str, Any]


def score(result: Result) -> float:
    """Return the mean success on all tasks after the last stage, those of the start policy included."""
    return fmean(result["success"]["R"][-1])


def earlier(result: Result) -> float:
    """Return the mean success after the last stage on the tasks that were learned before it."""
    return fmean(_blocks(result)[-1][:-1])


def new(result: Result) -> float:
    """Return the mean success on the tasks of each stage right after it."""
    blocks = _blocks(result)
    return fmean(blocks[i][i] for i in range(_first_stage(result), len(blocks)))


def forgotten(result: Result) -> float:
    """Return LIBERO's NBT; what the start policy knew counts as the first task."""
    return nbt(_blocks(result))


def loss_increase(result: Result) -> float:
    """Return how much the held-out loss on earlier tasks rose since they were learned, in nats per token."""
    matrix = _with_start(result["loss"]["R"], result)
    return fmean(matrix[-1][k] - matrix[k][k] for k in range(len(matrix) - 1))


MEASURES: dict[str, Callable[[Result], float]] = {
    "all tasks": score,
    "earlier tasks": earlier,
    "new tasks": new,
    "NBT": forgotten,
    "loss of earlier tasks": loss_increase,
}
"""Measures by the heads of their columns."""


def measurable(name: str, result: Result) -> bool:
    """Return True if a result has a measure: joint training has no earlier tasks, nor a held-out loss."""
    if name == "loss of earlier tasks" and result["loss"] is None:
        return False
    return name == "all tasks" or result["cell"]["method"] != "joint"


def _first_stage(result: Result) -> int:
    return 1 if result["settings"]["keeps"] else 0


def _blocks(result: Result) -> list[list[float]]:
    """Return the square matrix of means over the tasks of a stage; the start policy's tasks are the first."""
    sizes = [len(stage["tasks"]) for stage in result["settings"]["stages"]]
    sizes = [size for size in (len(result["settings"]["keeps"]), *sizes) if size]
    rows = _with_start(result["success"]["R"], result)
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    return [[fmean(row[end - size : end]) for end, size in zip(ends, sizes, strict=True)] for row in rows]


def _with_start(rows: list[list[float]], result: Result) -> list[list[float]]:
    """Return the rows of a matrix from the first task on: the start's, if it knows tasks."""
    return rows if _first_stage(result) else rows[1:]

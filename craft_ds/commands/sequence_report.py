"""The results of a sequence: R[i, j], the result on task j after stage i, and the metrics of it."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from craft_ds.algorithm.continual_metrics import (
    auc,
    final_average,
    forgetting,
    forward_transfer,
    fwt,
    nbt,
)
from craft_ds.commands.sequence_plan import START, SequencePlan
from craft_ds.commands.sequence_plot import plot_matrix
from craft_ds.commands.sequence_steps import FINAL, evaluation_file, run_directory
from craft_ds.errors import UserError
from craft_ds.tensor_io.filesystem import atomic_file


class Column(NamedTuple):
    """One measured task, and the stage that teaches it; 0: the start policy knows it."""

    task: str
    stage: int


def write_report(plan: SequencePlan, last: int) -> list[dict[str, Any]]:
    """Write the results up to a stage as JSON, CSV and a picture, and return them.

    `success.*` has a column per task of the world, `loss.*` one per held-out data set.

    Args:
        plan: A validated plan.
        last: The last stage that was measured; 0: the start policy.

    Raises:
        UserError: A result or a reference cannot be read.
    """
    rows = [_read(evaluation_file(plan, number)) for number in range(last + 1)]
    reports = []
    for measure, columns in _columns(plan).items():
        report = _summarise(plan, measure, columns, [_row(row, measure, columns) for row in rows])
        output = Path(plan.output_dir)
        with atomic_file(output / f"{measure}.json") as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        with atomic_file(output / f"{measure}.csv") as temporary:
            _write_csv(report, temporary)
        with atomic_file(output / f"{measure}.png") as temporary:
            plot_matrix(report, temporary)
        reports.append(report)
    return reports


def summary_lines(report: dict[str, Any]) -> list[str]:
    """Return the matrix and its metrics as text."""
    lines = [f"{report['measure']} after each stage:"]
    lines.append(" " * 16 + "".join(f"{task[:18]:>20s}" for task in report["tasks"]))
    for name, values in zip(report["rows"], report["R"], strict=True):
        lines.append(f"{name[:16]:16s}" + "".join(f"{value:20.3f}" for value in values))
    return [*lines, *(f"{name} {value:.3f}" for name, value in report["metrics"].items())]


def stage_matrix(columns: Sequence[Column], rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the square matrix of `craft_ds.algorithm.continual_metrics`: means over the tasks of a stage.

    Args:
        columns: The measured tasks.
        rows: Their results, from the start policy's on.
    """
    stages = range(1, len(rows))
    return [[_mean_of_stage(columns, rows[number], stage) for stage in stages] for number in stages]


def _summarise(
    plan: SequencePlan, measure: str, columns: list[Column], rows: list[list[float]]
) -> dict[str, Any]:
    matrix, curves = stage_matrix(columns, rows), _curves(plan, measure, columns, rows)
    metrics: dict[str, float] = {}
    if matrix:
        sign = 1.0 if measure == "success" else -1.0
        metrics = {
            "SR": final_average(matrix),
            "FWT": fwt(curves),
            "NBT": sign * nbt(matrix),
            "AUC": auc(matrix, curves),
            "forgetting": sign * forgetting(matrix),
        }
        if any(column.stage == 0 for column in columns):
            before, after = (_mean_of_stage(columns, row, 0) for row in (rows[0], rows[-1]))
            metrics |= {"start_tasks": after, "start_forgetting": sign * (before - after)}
        if plan.evaluation.references and measure == "success":
            references = [_reference(path) for path in plan.evaluation.references[: len(curves)]]
            try:
                metrics["forward_transfer"] = forward_transfer(curves, references)
            except ValueError as error:
                raise UserError(f"evaluation.references: {error}: leave them out") from error
    return {
        "measure": measure,
        "tasks": [column.task for column in columns],
        "stage_of_task": [column.stage for column in columns],
        "rows": [START, *(stage.name for stage in plan.stages[: len(rows) - 1])],
        "R": rows,
        "curves": curves,
        "metrics": metrics,
    }


def _columns(plan: SequencePlan) -> dict[str, list[Column]]:
    """Return the columns of each measure of the plan."""
    columns: dict[str, list[Column]] = {"success": [], "loss": []}
    for number, part in enumerate(plan.parts().values()):
        columns["success"] += [Column(task, number) for task in part.tasks]
        if part.heldout is not None:
            columns["loss"].append(Column(plan.stages[number - 1].name if number else START, number))
    return {measure: found for measure, found in columns.items() if found}


def _row(result: dict[str, Any], measure: str, columns: list[Column]) -> list[float]:
    if measure == "success":
        return [result["success"][column.task] for column in columns]
    return [data_set["loss"] for data_set in result["datasets"]]


def _curves(
    plan: SequencePlan, measure: str, columns: list[Column], rows: list[list[float]]
) -> list[list[float]]:
    """Return the results on each stage's own tasks at its checkpoints.

    Without evaluations in training, the end of the stage is the only one.
    """
    curves = []
    for stage in range(1, len(rows)):
        before, after = (_mean_of_stage(columns, rows[number], stage) for number in (stage - 1, stage))
        if measure == "success" and plan.evaluation.every:
            curves.append([before, *_during(plan, stage), after])
        else:
            curves.append([after])
    return curves


def _during(plan: SequencePlan, number: int) -> list[float]:
    """Return the mean success on a stage's tasks that its run has logged, up to the last step."""
    run, tasks = run_directory(plan, number), plan.stages[number - 1].tasks
    last = _read(run / FINAL / "manifest.json")["step"]
    logged = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    keys = [f"eval/success/{task}" for task in tasks]
    return [fmean(row[key] for key in keys) for row in logged if keys[0] in row and 0 < row["step"] < last]


def _reference(path: str) -> list[float]:
    curves: list[list[float]] = _read(Path(path) / "success.json").get("curves", [])
    if len(curves) != 1:
        raise UserError(f"evaluation.references: {path} is not a sequence of one stage")
    return curves[0]


def _mean_of_stage(columns: Sequence[Column], row: Sequence[float], stage: int) -> float:
    return fmean(value for column, value in zip(columns, row, strict=True) if column.stage == stage)


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it and start the command again") from error
    return content


def _write_csv(report: dict[str, Any], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["after", *report["tasks"]])
        writer.writerows([name, *row] for name, row in zip(report["rows"], report["R"], strict=True))

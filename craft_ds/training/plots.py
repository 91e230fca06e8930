"""Figures: how λ, ε and the retention loss went in one run, and what the demo's runs kept and learnt.

Colours are Okabe and Ito's, which stay apart for colour-blind readers and in grey print.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: training machines have no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8C8C8C"
METHODS = {
    "teacher": ("before fine-tuning", GREY),
    "baseline": ("baseline", ORANGE),
    "craft": ("CRaFT", BLUE),
    "lora_baseline": ("LoRA baseline", RED),
    "lora_craft": ("LoRA CRaFT", GREEN),
}
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def plot_lambda_analysis(history_csv: Path, out_png: Path) -> None:
    """Draw λ, ε, and the retention loss against its constraint, from a run's ``lambda_history.csv``.

    Ticks on the floor of the third panel mark the retention steps whose gradients conflicted.

    Args:
        history_csv: At least the columns ``step,lambda,epsilon,retention_loss,conflict``, one row a
            retention step. A file with a header alone gives empty panels.
        out_png: The picture to write.
    """
    with Path(history_csv).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    steps, multiplier, epsilon, loss, conflict = (
        np.array([float(row[name]) for row in rows])
        for name in ("step", "lambda", "epsilon", "retention_loss", "conflict")
    )
    conflicts = steps[conflict > 0]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
        axes[0].plot(steps, multiplier, color=BLUE, linewidth=1.8)
        axes[0].set(title="Multiplier λ", ylabel="λ", ylim=(0, None))
        axes[1].plot(steps, epsilon, color=RED, linewidth=1.8)
        axes[1].set(title="Threshold ε", ylabel="ε", ylim=(0, None))
        axes[2].plot(steps, loss, color=BLUE, linewidth=0.8, alpha=0.35)
        axes[2].plot(steps, _smooth(loss), color=BLUE, linewidth=1.8, label="retention loss")
        axes[2].plot(steps, epsilon, color=RED, linewidth=1.8, linestyle="--", label="constraint ε")
        if len(conflicts):
            # x in steps, y in axes fractions: a row of ticks on the floor of the panel, whatever its scale
            axes[2].plot(
                conflicts,
                np.full(len(conflicts), 0.02),
                "|",
                color=GREY,
                markersize=8,
                transform=axes[2].get_xaxis_transform(),
                label=f"conflict ({len(conflicts)} of {len(steps)})",
            )
        axes[2].set(title="Retention loss vs constraint", ylabel="loss", ylim=(0, None))
        # Below the panels: inside, it would hide a part of some run's curve.
        figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower right", ncols=3)
        for panel in axes:
            panel.set_xlabel("step")
        _save(figure, out_png)


def plot_demo(summary: Mapping[str, Any], out_png: Path) -> None:
    """Draw success and loss a task, for the teacher, the baseline and CRaFT, and both with LoRA.

    Bars are means over seeds; every seed is a dot, so that the spread is seen and not inferred.

    Args:
        summary: ``outputs/demo/summary.json``: ``old_tasks``, ``new_tasks`` (names) and ``rows``, each with
            ``method`` (a key of `METHODS`), ``seed``, ``success`` and ``loss`` by task.
        out_png: The picture to write.
    """
    tasks = [*summary["old_tasks"], *summary["new_tasks"]]
    bars = len({row["method"] for row in summary["rows"]})
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(12 + 2.5 * max(0, bars - 3), 4.2), layout="constrained")
        for panel, measure in zip(axes, ("success", "loss"), strict=True):
            _grouped_bars(panel, summary["rows"], measure, tasks, old=len(summary["old_tasks"]))
        axes[0].set(title="Success of the rollouts (higher is better)", ylabel="success rate", ylim=(0, 1.15))
        axes[0].set_yticks(np.linspace(0, 1, 6))
        axes[1].set(title="Loss on the demonstrations (lower is better)", ylabel="loss (nats per token)")
        legend = axes[0].get_legend_handles_labels()
        figure.legend(*legend, loc="outside lower center", ncols=len(METHODS) + 1)
        _save(figure, out_png)


def _grouped_bars(
    panel: Axes, rows: Sequence[Mapping[str, Any]], measure: str, tasks: Sequence[str], old: int
) -> None:
    """One group of bars a task, one bar a method, one dot a seed; a rule parts old tasks from new ones."""
    # A gap after the old tasks: what must be kept stands apart from what must be learnt.
    centres = np.arange(len(tasks)) + 0.35 * (np.arange(len(tasks)) >= old)
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        label, colour = METHODS[method]
        values = np.array([[row[measure][task] for task in tasks] for row in rows if row["method"] == method])
        positions = centres + (index - (len(methods) - 1) / 2) * width
        panel.bar(positions, values.mean(axis=0), width * 0.92, color=colour, label=label)
        for x, mean, highest in zip(positions, values.mean(axis=0), values.max(axis=0), strict=True):
            panel.annotate(
                f"{mean:.2f}", (x, highest), (0, 5), textcoords="offset points", ha="center", fontsize=8.5
            )
        if len(values) > 1:
            offsets = np.linspace(-0.25, 0.25, len(values)) * width
            panel.scatter(
                positions + offsets[:, None],
                values,
                s=14,
                color="white",
                edgecolors="black",
                linewidths=0.8,
                zorder=3,
                clip_on=False,
                label="one seed" if index == len(methods) - 1 else None,
            )
    panel.set_ylim(0, panel.get_ylim()[1] * 1.1)  # room for the words "old tasks" and "new task"
    panel.set_xticks(centres, [_two_lines(task) for task in tasks])
    panel.tick_params(axis="x", length=0)
    panel.grid(axis="x", visible=False)
    if 0 < old < len(tasks):
        rule = (centres[old - 1] + centres[old]) / 2
        panel.axvline(rule, color="#B0B0B0", linewidth=1, linestyle=":")
        for x, name, side in ((rule - 0.06, "old tasks", "right"), (rule + 0.06, "new task", "left")):
            panel.text(
                x, 0.99, name, transform=panel.get_xaxis_transform(), ha=side, va="top", style="italic"
            )


def _two_lines(task: str) -> str:
    """Break a task's name near its middle (``button-press-topdown-v3`` -> ``button press`` / ``topdown``)."""
    words = task.removesuffix("-v3").replace("-", " ").replace("_", " ").split()
    middle = (len(words) + 1) // 2
    return "\n".join(" ".join(part) for part in (words[:middle], words[middle:]) if part)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a twentieth of the run (the ends use what there is), so that the trend is seen."""
    width = max(1, len(values) // 20)
    if width == 1:
        return values
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def _save(figure: plt.Figure, out_png: Path) -> None:
    """Write the figure and free it: pyplot keeps figures until they are closed."""
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png)
    plt.close(figure)

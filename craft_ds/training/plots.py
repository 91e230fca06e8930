"""Figure of one run: λ, ε and the retention loss by step.

Colours are Okabe and Ito's, which stay apart for colour-blind readers and in grey print.
"""

import csv
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: training machines have no display

import matplotlib.pyplot as plt
import numpy as np

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8C8C8C"
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

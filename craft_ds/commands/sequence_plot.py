"""Heat map of a sequence: the result on every task after every stage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: training machines have no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from craft_ds.training.plots import STYLE

_TITLES = {
    "success": "Success (higher is better)",
    "loss": "Loss per token (lower is better)",
}


def plot_matrix(report: Mapping[str, Any], out_png: Path) -> None:
    """Draw R[i, j]: a row per stage, a column per task; frames mark the tasks that a stage teaches.

    Args:
        report: `measure`, `tasks`, `stage_of_task`, `rows` and `R`, as in `success.json` and `loss.json`.
        out_png: The picture to write.
    """
    values, success = np.array(report["R"]), report["measure"] == "success"
    rows, columns = values.shape
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(figsize=(3.2 + 1.1 * columns, 1.8 + 0.5 * rows), layout="constrained")
        image = axes.imshow(values, cmap="viridis" if success else "viridis_r", aspect="auto")
        if success:
            image.set_clim(0.0, 1.0)
        for (row, column), value in np.ndenumerate(values):
            shade = np.dot(image.cmap(image.norm(value))[:3], (0.299, 0.587, 0.114))
            colour = "black" if shade > 0.5 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
            if row == report["stage_of_task"][column]:
                corner = (column - 0.47, row - 0.47)
                axes.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, edgecolor="red", linewidth=2))
        axes.set_xticks(range(columns), report["tasks"], rotation=30, ha="right")
        axes.set_yticks(range(rows), report["rows"])
        axes.set(title=_TITLES[report["measure"]], xlabel="task", ylabel="after stage")
        figure.colorbar(image)
        figure.savefig(out_png, format="png")
        plt.close(figure)

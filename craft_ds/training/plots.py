"""Figure of one run: losses, λ, the gradients' cosine and the seconds per step.

The colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

import csv
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: training machines have no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
GREY = "#8C8C8C"
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
LEGEND_STYLE: Any = {"fontsize": 10, "handlelength": 1.5, "columnspacing": 1.2}


def plot_lambda_analysis(
    history_csv: Path, out_png: Path, *, metrics_jsonl: Path | None = None, teacher_loss: float | None = None
) -> None:
    """Draw a CRaFT run in four panels: losses, λ, the gradients' cosine, seconds per step.

    Thin lines and dots are single values, thick lines their running median. A panel's scale follows the bulk
    of its values, so that a few extreme ones may lie outside.

    Args:
        history_csv: `lambda_history.csv`, one row per retention step.
        out_png: The picture to write.
        metrics_jsonl: The run's `metrics.jsonl`, for the task loss and the times; None or missing: not drawn.
        teacher_loss: L0, the teacher's own loss on the anchors that measure the constraint; None: not drawn.
    """
    history = _read_history(history_csv)
    logged = _read_metrics(metrics_jsonl)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, 2, figsize=(12, 7.5), sharex=True)
        figure.set_layout_engine("constrained", wspace=0.05)
        _draw_losses(panels[0, 0], history, logged, teacher_loss)
        _draw_multiplier(panels[0, 1], history)
        _draw_cosine(panels[1, 0], history)
        _draw_seconds(panels[1, 1], logged)
        for panel in panels.flat:
            panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            if panel.lines or panel.collections:
                # Above the panel: inside, it would cover a part of some run's curve.
                panel.legend(
                    loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2, **LEGEND_STYLE
                )
            else:
                panel.text(0.5, 0.5, "nothing logged", ha="center", color=GREY, transform=panel.transAxes)
        for panel in panels[1]:
            panel.set_xlabel("optimizer step")
        _save(figure, out_png)


def _read_history(path: Path) -> dict[str, np.ndarray]:
    """Return the columns of `lambda_history.csv` by name."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    return {name: np.array([float(row[name]) for row in rows]) for name in reader.fieldnames or ()}


def _read_metrics(path: Path | None) -> dict[str, np.ndarray]:
    """Return step, task loss and times of the logged training steps; NaN for what a row lacks."""
    rows: list[dict[str, Any]] = []
    if path is not None and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # a line that a full disk cut off
                continue
    rows = [row for row in rows if "train/loss" in row]
    return {
        name: np.array([math.nan if row.get(name) is None else float(row[name]) for row in rows])
        for name in ("step", "train/loss", "time/step_s", "time/data_s")
    }


def _draw_losses(
    panel: Axes, history: dict[str, np.ndarray], logged: dict[str, np.ndarray], teacher_loss: float | None
) -> None:
    panel.set_title("Loss of the new task and of the old tasks", pad=24)
    panel.set_ylabel("loss (nats per action token)")
    retention, epsilon = history["retention_loss"], history["epsilon"]
    _draw_curve(panel, logged["step"], logged["train/loss"], ORANGE, "new task")
    measured = ~np.isnan(retention)
    _draw_curve(panel, history["step"][measured], retention[measured], BLUE, "old tasks")
    if len(epsilon):
        panel.plot(history["step"], epsilon, color=RED, linewidth=1.8, linestyle="--", label="ε")
        if teacher_loss is not None:
            label = f"L0 = {teacher_loss:.3g}"
            panel.axhline(teacher_loss, color=GREY, linewidth=1.8, linestyle=":", label=label)
    levels = [] if teacher_loss is None else [teacher_loss]
    low, high = _bulk(logged["train/loss"], retention, epsilon, levels)
    if low > 0 and high > 10 * low:
        panel.set_yscale("log")
        panel.set_ylim(low / 1.15, high * 1.15)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_locator(NullLocator())
    else:
        margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        panel.set_ylim(low - margin, high + margin)


def _draw_multiplier(panel: Axes, history: dict[str, np.ndarray]) -> None:
    panel.set_title("Multiplier λ and weight of the retention gradient", pad=24)
    panel.set_ylabel("λ, b/a (no unit)")
    weight = history["retention_weight"]
    _draw_curve(panel, history["step"], weight, GREEN, "b/a, relative to the task gradient")
    if len(weight):
        panel.plot(history["step"], history["lambda"], color=BLUE, linewidth=1.8, label="λ")
    _, high = _bulk(weight, history["lambda"], [0.0])
    panel.set_ylim(0, 1.08 * high or 1.0)


def _draw_cosine(panel: Axes, history: dict[str, np.ndarray]) -> None:
    panel.set_title("Cosine of task and retention gradient", pad=24)
    panel.set_ylabel("cosine")
    steps, cosine, conflict = history["step"], history["cos"], history["conflict"] > 0
    measured = ~np.isnan(cosine)  # NaN where both losses accumulate in one gradient
    steps, cosine, conflict = steps[measured], cosine[measured], conflict[measured]
    if len(steps):
        panel.axhline(0, color=GREY, linewidth=1)
        panel.plot(steps[~conflict], cosine[~conflict], ".", color=BLUE, alpha=0.5, label="no conflict")
        label = f"conflict ({conflict.sum()} of {len(steps)})"
        panel.plot(steps[conflict], cosine[conflict], "x", color=RED, markersize=5, label=label)
        panel.plot(steps, _smooth(cosine), color="black", linewidth=1.4, label="running median")
    low, high = _bulk(cosine, [-0.1, 0.1])
    limit = min(1.05, 1.2 * max(-low, high))
    panel.set_ylim(-limit, limit)


def _draw_seconds(panel: Axes, logged: dict[str, np.ndarray]) -> None:
    panel.set_title("Time per step", pad=24)
    panel.set_ylabel("seconds")
    _draw_curve(panel, logged["step"], logged["time/step_s"], BLUE, "step")
    _draw_curve(panel, logged["step"], logged["time/data_s"], ORANGE, "waiting for data")
    _, high = _bulk(logged["time/step_s"], [0.0])
    panel.set_ylim(0, 1.2 * high or 1.0)


def _draw_curve(panel: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    """Draw single values thinly and their running median over them; nothing if there are none."""
    if not np.isfinite(values).any():
        return
    marker = "." if len(values) < 20 else None
    smooth = _smooth(values)
    if smooth is not values:
        panel.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
    panel.plot(steps, smooth, color=color, linewidth=1.8, marker=marker, label=label)


def _bulk(*series: np.ndarray | Sequence[float]) -> tuple[float, float]:
    """Return the range of several series without the extreme percent at either end of each."""
    finite = [values[np.isfinite(values)] for values in map(np.asarray, series)]
    ranges = [np.quantile(values, (0.01, 0.99)) for values in finite if len(values)]
    if not ranges:
        return 0.0, 1.0
    return float(min(low for low, _ in ranges)), float(max(high for _, high in ranges))


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the running median of the finite values over a twentieth of the run, narrower at the ends."""
    width = len(values) // 20
    if width < 2:
        return values
    finite = np.where(np.isfinite(values), values, math.nan)
    padded = np.pad(finite, (width // 2, (width - 1) // 2), constant_values=math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", RuntimeWarning
        )  # a window without values gives NaN, a gap in the line
        return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1)


def _save(figure: plt.Figure, out_png: Path) -> None:
    """Write the figure and free it: pyplot keeps figures until they are closed."""
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png)
    plt.close(figure)

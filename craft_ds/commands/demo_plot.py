"""Figure of the demo: success and loss by task, before fine-tuning and after each method."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # before pyplot: training machines have no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from craft_ds.training.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, STYLE

METHODS = {
    "teacher": ("before fine-tuning", GREY),
    "baseline": ("baseline", ORANGE),
    "replay": ("replay", PURPLE),
    "craft": ("CRaFT", BLUE),
    "lora_baseline": ("LoRA baseline", RED),
    "lora_craft": ("LoRA CRaFT", GREEN),
}
NORMAL_QUANTILE = 1.959964
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t by degrees of freedom, from 1; beyond the last, the normal quantile."""
_INCHES_PER_BAR = 0.23
_GAP = 0.6  # between the groups of two tasks, in bars
_HEADING = 1.1  # height of a heading, in bars


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a success rate (Wilson 1927, doi:10.2307/2276774).

    Args:
        successes: Episodes that succeeded.
        trials: Episodes, at least 1.
    """
    rate, z = successes / trials, NORMAL_QUANTILE
    centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % Student t interval of a mean; of a single value, that value twice."""
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return mean, mean
    quantile = T_QUANTILES[count - 2] if count - 2 < len(T_QUANTILES) else NORMAL_QUANTILE
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(count)
    return mean - half, mean + half


def plot_demo(summary: Mapping[str, Any], out_png: Path) -> None:
    """Draw success and loss by task, before fine-tuning and after each method.

    Bars are means over seeds, dots the seeds. Success has Wilson intervals over the episodes of all seeds,
    loss t intervals over seeds.

    Args:
        summary: `summary.json` of the demo: `old_tasks`, `new_tasks` (names), `episodes` (per task, policy
            and seed) and `rows`, each with `method` (a key of `METHODS`), `seed`, and `success` and `loss` by
            task.
        out_png: The picture to write.
    """
    layout = _lay_out(summary)
    height = 1.7 + _INCHES_PER_BAR * layout.height
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(12, height), sharey=True, layout="constrained")
        for panel, measure in zip(axes, ("success", "loss"), strict=True):
            _draw_bars(panel, summary, measure, layout)
        axes[0].set(title="Success rate (higher is better)", xlim=(0, 1.005))
        axes[1].set(title="Loss on held-out demonstrations (lower is better)", xlabel="nats per token")
        axes[0].set(xlabel="share of episodes", xticks=np.linspace(0, 1, 6))
        _label_tasks(axes[0], layout)
        # The legend lies above the panels and the caption below, where no bar can be.
        marks = axes[0].get_legend_handles_labels()
        first = len(marks[0]) - len(layout.methods)  # matplotlib lists lines and dots before bars
        entries = [mark[first:] + mark[:first] for mark in marks]
        figure.legend(*entries, loc="outside upper center", ncols=len(entries[0]), columnspacing=1.3)
        figure.supxlabel(_caption(summary), fontsize=9, color="#505050")
        _save(figure, out_png)


class _Layout(NamedTuple):
    """Vertical positions, in bars from the top.

    Attributes:
        methods: Keys of `METHODS` that were run, in its order.
        tasks: Position of each task's first bar.
        headings: Position of each heading.
        height: Position of the lower edge.
    """

    methods: list[str]
    tasks: dict[str, float]
    headings: dict[str, float]
    height: float


def _lay_out(summary: Mapping[str, Any]) -> _Layout:
    run = {row["method"] for row in summary["rows"]}
    methods = [method for method in METHODS if method in run]
    tasks, headings, position = {}, {}, 0.0
    for heading, names in (("old tasks", summary["old_tasks"]), ("new task", summary["new_tasks"])):
        if not names:
            continue
        headings[heading if len(names) == 1 or heading == "old tasks" else "new tasks"] = position
        position += _HEADING
        for task in names:
            tasks[task] = position
            position += len(methods) + _GAP
    return _Layout(methods, tasks, headings, position)


def _draw_bars(panel: Axes, summary: Mapping[str, Any], measure: str, layout: _Layout) -> None:
    """Draw a bar per task and method with its interval, a dot per seed, and its value at the right."""
    tasks = list(layout.tasks)
    seeds = max(sum(row["method"] == method for row in summary["rows"]) for method in layout.methods)
    for index, method in enumerate(layout.methods):
        label, colour = METHODS[method]
        rows = [row for row in summary["rows"] if row["method"] == method]
        values = np.array([[row[measure][task] for task in tasks] for row in rows])
        means, positions = values.mean(axis=0), np.array(list(layout.tasks.values())) + index
        panel.barh(positions, means, 0.86, color=colour, label=label)
        if measure == "success":
            trials = summary["episodes"] * len(rows)
            intervals = np.array([wilson_interval(mean * trials, trials) for mean in means])
        else:
            intervals = np.array([t_interval(column) for column in values.T])
        interval_label = "95 % interval" if index == 0 else ""
        panel.hlines(positions, *intervals.T, color="black", linewidth=1.2, label=interval_label)
        if len(rows) > 1:
            offsets = np.linspace(-0.22, 0.22, len(rows))
            panel.scatter(
                values,
                positions + offsets[:, None],
                s=13,
                color="white",
                edgecolors="black",
                linewidths=0.7,
                zorder=3,
                clip_on=False,
            )
        for position, mean in zip(positions, means, strict=True):
            # x in axes fractions: a column beside the panel, which no bar, dot or interval reaches
            panel.text(
                1.02,
                position,
                f"{mean:.2f}",
                transform=panel.get_yaxis_transform(),
                va="center",
                fontsize=9,
            )
    if seeds > 1:
        panel.scatter([], [], s=13, color="white", edgecolors="black", linewidths=0.7, label="one seed")
    panel.set_ylim(layout.height, -0.6)
    panel.set_xlim(0, None)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="y", visible=False)


def _label_tasks(panel: Axes, layout: _Layout) -> None:
    middle = (len(layout.methods) - 1) / 2
    positions = [position + middle for position in layout.tasks.values()]
    panel.set_yticks(positions, [_two_lines(task) for task in layout.tasks])
    for heading, position in layout.headings.items():
        panel.text(
            -0.01,
            position,
            heading,
            transform=panel.get_yaxis_transform(),
            ha="right",
            va="center",
            style="italic",
            weight="bold",
        )


def _caption(summary: Mapping[str, Any]) -> str:
    seeds = {method: sum(row["method"] == method for row in summary["rows"]) for method in METHODS}
    most, episodes = max(seeds.values()), summary["episodes"]
    trained = f"{episodes} episodes × {most} seed{'s' if most > 1 else ''}"
    text = f"95 % intervals. Success: Wilson, over {trained} per bar"
    if seeds["teacher"] and most > 1:
        text += f" ({episodes} episodes before fine-tuning)"
    text += ", as if all episodes were independent."
    if most > 1:
        return text + "\nLoss: Student's t, over seeds; one policy before fine-tuning has none."
    return text + " With one seed, the spread between fine-tuning runs is not covered."


def _two_lines(task: str) -> str:
    """Break a task's name near its middle (`button-press-topdown-v3` → `button press` / `topdown`)."""
    words = task.removesuffix("-v3").replace("-", " ").replace("_", " ").split()
    middle = (len(words) + 1) // 2
    return "\n".join(" ".join(part) for part in (words[:middle], words[middle:]) if part)


def _save(figure: Figure, out_png: Path) -> None:
    """Write the figure and free it: pyplot keeps figures until they are closed."""
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png)
    plt.close(figure)

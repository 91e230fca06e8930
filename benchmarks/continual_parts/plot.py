"""Plots of a tier: success on new against success on earlier tasks."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

from continual_parts.measures import MEASURES, Result
from continual_parts.methods import METHODS
from continual_parts.report import by_seed, mean_interval, reported

_AXES = ("new tasks", "earlier tasks")


def plot_tier(tier: str, results: Sequence[Result], path: Path) -> None:
    """Write a picture: the reported methods with intervals, and all settings of those tuned over λ."""
    figure, (methods, curves) = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True)
    groups = {group: found for group, found in reported(tier, results).items() if group[0] != "joint"}
    markers = dict(zip(sorted({budget for _, budget in groups}), "os^Dv", strict=False))
    colours = dict(zip(dict.fromkeys(name for name, _ in groups), plt.get_cmap("tab20").colors, strict=False))
    for (name, budget), found in groups.items():
        x, y = (mean_interval(list(by_seed(found, MEASURES[axis]).values())) for axis in _AXES)
        label = f"{name}, {budget}" if budget else name
        methods.errorbar(
            x[0],
            y[0],
            xerr=x[1],
            yerr=y[1],
            fmt=markers[budget],
            color=colours[name],
            label=label,
            elinewidth=0.6,
        )
    methods.set_title("Reported seeds, 95 % intervals", fontsize=10)
    methods.legend(fontsize=6, ncols=2)
    for (family, budget), points in _tuned(results).items():
        line = "-" if budget == max(b for _, b in _tuned(results)) else "--"
        xs, ys, weights = zip(*points, strict=True)
        curves.plot(
            xs,
            ys,
            line,
            marker="o",
            color="C0" if family == "kl" else "C1",
            label=f"{family}, {budget} stored",
        )
        for x, y, weight in zip(xs, ys, weights, strict=True):
            curves.annotate(f"λ={weight:g}", (x, y), fontsize=7, textcoords="offset points", xytext=(4, 4))
    curves.set_title("Tuning seeds: settings of λ", fontsize=10)
    if curves.lines:
        curves.legend(fontsize=7)
    for axes in (methods, curves):
        axes.set_xlabel("success on new tasks, after their stage")
        axes.grid(alpha=0.3)
    methods.set_ylabel("success on earlier tasks, at the end")
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def _tuned(results: Sequence[Result]) -> dict[tuple[str, int], list[tuple[float, float, float]]]:
    """Return new success, earlier success and λ of each setting that stores samples, by family and budget."""
    found: dict[tuple[str, int], dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        cell = result["cell"]
        if cell["purpose"] == "tuning" and cell["budget"]:
            found[METHODS[cell["method"]].family, cell["budget"]][cell["method"]].append(result)
    return {
        key: sorted(
            (
                (
                    fmean(map(MEASURES[_AXES[0]], runs)),
                    fmean(map(MEASURES[_AXES[1]], runs)),
                    float(METHODS[name].train["craft.initial_lambda"]),
                )
                for name, runs in settings.items()
            ),
            key=lambda point: point[2],
        )
        for key, settings in found.items()
    }

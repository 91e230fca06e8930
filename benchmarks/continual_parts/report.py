"""Tables of the benchmark: means over seeds with 95 % intervals, and differences from replay."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from continual_parts.cells import cells
from continual_parts.methods import METHODS

METRICS = {"SR": "final success", "NBT": "NBT", "FWT": "FWT", "start_tasks": "tasks of the start"}
Result = dict[str, Any]
Group = tuple[str, int]
"""A method and its stored samples per task."""


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % interval by Student's t; NaN for a single value."""
    if len(values) < 2:
        return fmean(values), math.nan
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return fmean(values), quantile * stdev(values) / math.sqrt(len(values))


def score(result: Result) -> float:
    """Return the mean success on all tasks after the last stage, those of the start policy included."""
    return fmean(result["success"]["R"][-1])


def chosen_settings(tier: str, results: Sequence[Result]) -> dict[Group, str]:
    """Return the method with the highest mean score in tuning, by family and budget.

    A family of which a tuning cell is missing is left out: its settings cannot be compared yet.
    """
    scores: dict[Group, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        cell = result["cell"]
        if cell["purpose"] == "tuning":
            scores[METHODS[cell["method"]].family, cell["budget"]][cell["method"]].append(score(result))
    wanted: dict[Group, int] = defaultdict(int)
    for one in cells(tier, ("tuning",)):
        wanted[METHODS[one.method].family, one.budget] += 1
    return {
        family: max(methods, key=lambda name: fmean(methods[name]))
        for family, methods in scores.items()
        if sum(map(len, methods.values())) == wanted[family]
    }


def by_seed(results: Sequence[Result], value: Callable[[Result], float]) -> dict[int, float]:
    """Return a value of each training seed: the mean over orders, which share scenes and anchors' seeds."""
    found: dict[int, list[float]] = defaultdict(list)
    for result in results:
        found[result["cell"]["seed"]].append(value(result))
    return {seed: fmean(values) for seed, values in found.items()}


def report_lines(tier: str, results: Sequence[Result]) -> list[str]:
    """Return the lines of the report in Markdown."""
    chosen = chosen_settings(tier, results)
    groups: dict[Group, list[Result]] = defaultdict(list)
    for result in results:
        cell = result["cell"]
        setting = chosen.get((METHODS[cell["method"]].family, cell["budget"]), cell["method"])
        if cell["purpose"] == "report" and setting == cell["method"]:
            groups[cell["method"], cell["budget"]].append(result)
    if not groups:
        return [f"{tier}: no results yet"]
    metrics = [
        name for name in METRICS if any(name in r["success"]["metrics"] for g in groups.values() for r in g)
    ]
    lines = [
        f"| method | stored per task | runs | all tasks | {' | '.join(METRICS[name] for name in metrics)} | "
        "all tasks, minus replay |",
        "|---" * (5 + len(metrics)) + "|",
    ]
    for (method, budget), found in groups.items():
        shown = [method, str(budget) if budget else "–", str(len(found)), _shown(by_seed(found, score))]
        shown += [_shown(by_seed(found, lambda r, n=name: r["success"]["metrics"][n])) for name in metrics]
        lines.append(f"| {' | '.join([*shown, _against_replay(method, budget, groups)])} |")
    for (family, budget), method in sorted(chosen.items()):
        lines.append(f"\nTuning chose {method} for {family} with {budget} stored samples per task.")
    waiting = {(METHODS[one.method].family, one.budget) for one in cells(tier, ("tuning",))} - chosen.keys()
    for family, budget in sorted(waiting):
        lines.append(f"\nTuning of {family} with {budget} stored samples per task is incomplete.")
    return lines


def _against_replay(method: str, budget: int, groups: dict[Group, list[Result]]) -> str:
    """Return the mean difference from replay with as many samples, paired by seed.

    Empty while tuning has not chosen one setting of replay.
    """
    replays = [key for key in groups if METHODS[key[0]].family == "replay" and key[1] == budget]
    if len(replays) != 1 or METHODS[method].family == "replay":
        return ""
    own, replay = by_seed(groups[method, budget], score), by_seed(groups[replays[0]], score)
    pairs = {seed: own[seed] - replay[seed] for seed in own.keys() & replay.keys()}
    return _shown(pairs, sign="+") if pairs else ""


def _shown(values: dict[int, float], sign: str = "") -> str:
    mean, half = mean_interval(list(values.values()))
    return f"{mean:{sign}.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")

"""Tables of the benchmark: means over seeds and orders with 95 % intervals, and differences from replay."""

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from continual_parts.methods import METHODS

METRICS = {"SR": "final success", "NBT": "NBT", "FWT": "FWT", "start_tasks": "tasks of the start"}
Result = dict[str, Any]


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % interval by Student's t; NaN for a single value."""
    if len(values) < 2:
        return fmean(values), math.nan
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return fmean(values), quantile * stdev(values) / math.sqrt(len(values))


def chosen_settings(results: Sequence[Result]) -> dict[tuple[str, int], str]:
    """Return, for each family and budget, the method with the highest score in tuning.

    The score is the mean of what the sequence ends with: success on all of its tasks, those of the start
    policy included.
    """
    scores: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        cell = result["cell"]
        if cell["purpose"] == "tuning" and (family := METHODS[cell["method"]].family):
            scores[family, cell["budget"]][cell["method"]].append(score(result))
    return {key: max(methods, key=lambda name: fmean(methods[name])) for key, methods in scores.items()}


def score(result: Result) -> float:
    """Return the mean success on all tasks after the last stage."""
    return fmean(result["success"]["R"][-1])


def report_lines(tier: str, results: Sequence[Result]) -> list[str]:
    """Return the lines of the report in Markdown."""
    chosen = chosen_settings(results)
    groups: dict[tuple[str, int], list[Result]] = defaultdict(list)
    for result in results:
        cell = result["cell"]
        family = METHODS[cell["method"]].family
        if (
            cell["purpose"] == "report"
            and chosen.get((family, cell["budget"]), cell["method"]) == cell["method"]
        ):
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
        cells = [method, str(budget) if budget else "–", str(len(found)), _shown([score(r) for r in found])]
        cells += [_shown([r["success"]["metrics"][name] for r in found]) for name in metrics]
        lines.append(f"| {' | '.join([*cells, _against_replay(method, budget, found, groups)])} |")
    for (family, budget), method in sorted(chosen.items()):
        lines.append(f"\nTuning chose {method} for {family} with {budget} stored samples per task.")
    return lines


def _against_replay(
    method: str, budget: int, found: list[Result], groups: dict[tuple[str, int], list[Result]]
) -> str:
    """Return the mean paired difference from replay with the same seeds, orders, scenes and samples."""
    replay = {
        (r["cell"]["order"], r["cell"]["seed"]): score(r)
        for (name, stored), group in groups.items()
        if METHODS[name].family == "replay" and stored == budget
        for r in group
    }
    if METHODS[method].family == "replay":
        return ""
    pairs = [
        score(r) - replay[key] for r in found if (key := (r["cell"]["order"], r["cell"]["seed"])) in replay
    ]
    return _shown(pairs, sign="+") if pairs else ""


def _shown(values: Sequence[float], sign: str = "") -> str:
    mean, half = mean_interval(values)
    return f"{mean:{sign}.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")

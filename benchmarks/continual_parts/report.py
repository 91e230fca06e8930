"""Tables of the benchmark: means over seeds with 95 % intervals, and differences from replay."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

from scipy import stats

from continual_parts.cells import cells
from continual_parts.measures import MEASURES, Result, measurable, score
from continual_parts.methods import METHODS

Group = tuple[str, int]
"""A method and its stored samples per task."""


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % interval by Student's t; NaN for a single value."""
    if len(values) < 2:
        return fmean(values), math.nan
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return fmean(values), quantile * stdev(values) / math.sqrt(len(values))


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


def reported(tier: str, results: Sequence[Result]) -> dict[Group, list[Result]]:
    """Return the results to report by method and stored samples: of a family, what tuning chose."""
    chosen = chosen_settings(tier, results)
    groups: dict[Group, list[Result]] = defaultdict(list)
    for one in cells(tier, ("report",)):  # in the order of the methods
        groups[one.method, one.budget] = []
    for result in results:
        cell = result["cell"]
        setting = chosen.get((METHODS[cell["method"]].family, cell["budget"]), cell["method"])
        if cell["purpose"] == "report" and setting == cell["method"]:
            groups[cell["method"], cell["budget"]].append(result)
    return {group: found for group, found in groups.items() if found}


def find_group(groups: dict[Group, list[Result]], name: str, budget: int) -> Group | None:
    """Return the group of a method, or of a family, with as many stored samples.

    None without results, and while tuning has not chosen one setting of the family.
    """
    found = [key for key in groups if name in (key[0], METHODS[key[0]].family) and key[1] == budget]
    return found[0] if len(found) == 1 else None


def paired(
    own: Sequence[Result], other: Sequence[Result], value: Callable[[Result], float]
) -> dict[int, float]:
    """Return the differences of a value by seed."""
    mine, theirs = by_seed(own, value), by_seed(other, value)
    return {seed: mine[seed] - theirs[seed] for seed in mine.keys() & theirs.keys()}


def report_lines(tier: str, results: Sequence[Result]) -> list[str]:
    """Return the table of the report and what tuning chose, in Markdown."""
    groups = reported(tier, results)
    if not groups:
        return [f"{tier}: no results yet"]
    heads = ["method", "stored per task", "runs", *MEASURES, "all tasks, minus replay", "NBT, minus replay"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (method, budget), found in groups.items():
        row = [method, str(budget) if budget else "–", str(len(found))]
        for name, value in MEASURES.items():
            row.append(shown(by_seed(found, value)) if measurable(name, found[0]) else "–")
        replay = find_group(groups, "replay", budget)
        for name in ("all tasks", "NBT"):
            compared = replay is not None and replay[0] != method
            differences = paired(found, groups[replay], MEASURES[name]) if compared and replay else {}
            row.append(shown(differences, sign="+") if differences else "")
        lines.append(f"| {' | '.join(row)} |")
    chosen = chosen_settings(tier, results)
    for (family, budget), method in sorted(chosen.items()):
        lines.append(f"\nTuning chose {method} for {family}{_with(budget)}.")
    waiting = {(METHODS[one.method].family, one.budget) for one in cells(tier, ("tuning",))} - chosen.keys()
    for family, budget in sorted(waiting):
        lines.append(f"\nTuning of {family}{_with(budget)} is incomplete.")
    return lines


def shown(values: dict[int, float], sign: str = "") -> str:
    """Return a mean with its interval as text."""
    mean, half = mean_interval(list(values.values()))
    return f"{mean:{sign}.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")


def _with(budget: int) -> str:
    return f" with {budget} stored samples per task" if budget else ""

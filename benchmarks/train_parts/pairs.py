"""Timing of actions in turn, so that a change of the machine's speed meets all of them."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Ratio(NamedTuple):
    """Geometric mean of the ratios of paired times, and half of its 95 % interval."""

    mean: float
    half: float


def in_turn(
    actions: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    warm_up: int = 2,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Return the seconds of each action in each repeat; every other repeat runs them in reverse.

    Args:
        actions: The actions by name.
        repeats: Timed repeats.
        warm_up: Repeats before them.
        before: Runs before each action and is not timed, such as a barrier.
    """
    found: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(-warm_up, repeats):
        order = list(actions) if repeat % 2 else list(reversed(actions))
        for name in order:
            before()
            started = time.perf_counter()
            actions[name]()
            if repeat >= 0:
                found[name].append(time.perf_counter() - started)
    return found


def ratio(numerator: list[float], denominator: list[float]) -> Ratio:
    """Return the ratio of times that were measured in pairs."""
    logs = [math.log(n / d) for n, d in zip(numerator, denominator, strict=True)]
    spread = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    mean = math.exp(statistics.fmean(logs))
    return Ratio(mean, mean * 1.96 * spread)

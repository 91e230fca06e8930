"""A policy's normalisation: its mode and statistics, and the steps that apply it to tabular fields."""

from typing import Any

import numpy as np
from lerobot.configs import NormalizationMode
from lerobot.processor import NormalizerProcessorStep, PolicyProcessorPipeline, RelativeActionsProcessorStep

from craft_ds.policies.statistics import NEEDED

Limits = tuple[np.ndarray, np.ndarray]
"""The raw values that a normalisation maps to -1 and to 1, float64 (width,) each."""

_BOUNDS = {mode: names for mode, names in NEEDED.items() if mode is not NormalizationMode.MEAN_STD}


def has_relative_actions(preprocessor: PolicyProcessorPipeline) -> bool:
    """Return True if the policy's actions are differences to the state."""
    return any(isinstance(step, RelativeActionsProcessorStep) and step.enabled for step in preprocessor.steps)


def normalise(
    preprocessor: PolicyProcessorPipeline, batch: dict[str, Any], *, only_relative: bool = False
) -> dict[str, Any]:
    """Run the steps of a preprocessor that change the numbers of states and actions.

    Args:
        preprocessor: The policy's preprocessor.
        batch: float32 states (B, width) and actions (B, T, width), by their names in the policy.
        only_relative: Make actions relative to the state where the policy does, without normalisation.
    """
    transition = preprocessor.to_transition(batch)
    for step in preprocessor.steps:
        if isinstance(step, RelativeActionsProcessorStep) or (
            isinstance(step, NormalizerProcessorStep) and not only_relative
        ):
            transition = step(transition)
    return preprocessor.to_output(transition)


def normalisation_of(
    preprocessor: PolicyProcessorPipeline, key: str
) -> tuple[NormalizationMode, dict[str, np.ndarray]]:
    """Return the mode of a feature and its statistics, float64 (width,) by name; empty where there are none.

    Args:
        preprocessor: The policy's preprocessor.
        key: The feature's name in the policy.
    """
    for step in preprocessor.steps:
        if isinstance(step, NormalizerProcessorStep) and key in step.features:
            mode = step.norm_map.get(step.features[key].type, NormalizationMode.IDENTITY)
            stats = (step.stats or {}).get(key) or {}
            return mode, {
                name: np.atleast_1d(np.asarray(value, dtype=np.float64)) for name, value in stats.items()
            }
    return NormalizationMode.IDENTITY, {}


def limits_of(mode: NormalizationMode, stats: dict[str, np.ndarray]) -> Limits | None:
    """Return the limits of a normalisation; None if it changes nothing or lacks its statistics."""
    if mode is NormalizationMode.MEAN_STD and {"mean", "std"} <= stats.keys():
        return stats["mean"] - stats["std"], stats["mean"] + stats["std"]
    names = _BOUNDS.get(mode)
    if names is None or not stats.keys() >= set(names):
        return None
    return stats[names[0]], stats[names[1]]


def own_limits(mode: NormalizationMode, values: np.ndarray) -> tuple[float, float] | None:
    """Return the limits that a column's own statistics would have; None with IDENTITY.

    Args:
        mode: The normalisation's mode.
        values: Finite values (N,).
    """
    if mode is NormalizationMode.MEAN_STD:
        return float(values.mean() - values.std()), float(values.mean() + values.std())
    if mode is NormalizationMode.MIN_MAX:
        return float(values.min()), float(values.max())
    if mode not in _BOUNDS:
        return None
    low = 0.01 if mode is NormalizationMode.QUANTILES else 0.1
    first, last = np.quantile(values, (low, 1 - low))
    return float(first), float(last)

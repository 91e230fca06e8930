"""Description of what a preprocessor does to the values of a sample, to store it and to compare two.

Only what can change a token or a pixel is described. Two preprocessors that differ in device, tokenizer
folders, names in the data set (`rename_map`), unused statistics or the order of keys have equal descriptions.
The tokenizers themselves are compared by `craft_ds.policies.loading.tokenizer_fingerprint`.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lerobot.configs import FeatureType, NormalizationMode
from lerobot.processor import (
    ActionTokenizerProcessorStep,
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyProcessorPipeline,
    RelativeActionsProcessorStep,
    RenameObservationsProcessorStep,
)
from lerobot.utils.constants import ACTION

from craft_ds.errors import UserError
from craft_ds.policies.statistics import NEEDED
from craft_ds.tensor_io.filesystem import file_sha256

STATISTICS = {mode.value: names for mode, names in NEEDED.items()}
"""Statistics that each normalisation mode reads, by the mode's name."""
_TOLERANCE = 1e-5
"""Difference of two statistics, in units of the dimension's width, that moves no value to another bin but by
chance: a state has 256 bins."""


class Difference(NamedTuple):
    """A difference of two preprocessors.

    Attributes:
        what: The entry that differs, such as "max of action[2]".
        cached: Its value in the first one.
        wanted: Its value in the second one.
    """

    what: str
    cached: Any
    wanted: Any


def describe_preprocessor(preprocessor: PolicyProcessorPipeline) -> list[dict[str, Any]]:
    """Describe each step that can change a token or a pixel, as JSON values.

    Args:
        preprocessor: A policy's preprocessor as it is used, with the statistics in effect.

    Returns:
        One entry per step, in order, with the step's kind under `step`. That of the normaliser has
        `features`: for each normalised feature its `mode`, `eps` and the statistics that the mode uses.

    Raises:
        UserError: The normaliser lacks a statistic that its mode needs, or has a non-finite one.
    """
    described = []
    for step in preprocessor.steps:
        match step:
            case RenameObservationsProcessorStep() | AddBatchDimensionProcessorStep():
                continue
            case NormalizerProcessorStep():
                entry: dict[str, Any] = {"step": "normalizer", "features": _normalized_features(step)}
            case RelativeActionsProcessorStep() if not step.enabled:
                continue
            case RelativeActionsProcessorStep():
                names = step.action_names if step.exclude_joints else None
                absolute = sorted(step.exclude_joints) if names else []
                entry = {"step": "relative_actions", "exclude_joints": absolute, "action_names": names}
            case ActionTokenizerProcessorStep():
                # LeRobot's own `get_config` omits the offset.
                entry = {
                    "step": "action_tokenizer",
                    "max_action_tokens": step.max_action_tokens,
                    "fast_skip_tokens": step.fast_skip_tokens,
                }
            case DeviceProcessorStep() if step.float_dtype is None:
                continue
            case DeviceProcessorStep():
                entry = {"step": "float_dtype", "dtype": str(step.float_dtype)}
            case _:
                entry = {"step": type(step).__name__, **without_tokenizer_names(step.get_config())}
        described.append(json.loads(json.dumps(entry, default=str)))
    return described


def first_difference(
    cached: list[dict[str, Any]],
    wanted: list[dict[str, Any]],
    dimensions: dict[str, list[str]] | None = None,
) -> Difference | None:
    """Return the first difference of two descriptions that can change a token; None: there is none.

    Args:
        cached: Description of the preprocessor that made the anchors.
        wanted: Description of the trained policy's preprocessor.
        dimensions: Names of the dimensions of some features, for the message.
    """
    steps = [[entry["step"] for entry in entries] for entries in (cached, wanted)]
    if steps[0] != steps[1]:
        return Difference("processor steps", *(", ".join(names) or "none" for names in steps))
    for one, other in zip(cached, wanted, strict=True):
        if one["step"] == "normalizer":
            difference = _normalization_difference(one["features"], other["features"], dimensions or {})
            if difference:
                return difference
            continue
        for key in sorted({*one, *other}):
            if one.get(key) != other.get(key):
                return Difference(f"{key} of processor step {one['step']}", one.get(key), other.get(key))
    return None


def _normalized_features(step: NormalizerProcessorStep) -> dict[str, dict[str, Any]]:
    """Return mode and statistics of each feature that a normaliser changes."""
    types = {key: feature.type for key, feature in step.features.items()}
    allowed = step.normalize_observation_keys
    kept = {
        key: kind
        for key, kind in types.items()
        if kind != FeatureType.ACTION and (allowed is None or key in allowed)
    }
    statistics = step.state_dict()
    known = {name.rpartition(".")[0] for name in statistics}
    described = {}
    # LeRobot normalises actions whether they are in `features` or not.
    for key, kind in {**kept, ACTION: FeatureType.ACTION}.items():
        mode = step.norm_map.get(kind, NormalizationMode.IDENTITY)
        if mode == NormalizationMode.IDENTITY or key not in known:
            continue
        names = STATISTICS[mode.value]
        for name in names:
            if f"{key}.{name}" not in statistics or not statistics[f"{key}.{name}"].isfinite().all():
                raise UserError(
                    f"the preprocessor normalises {key} by {mode.value}, but its statistic {name} is missing "
                    "or non-finite: give the policy complete statistics"
                )
        values = torch.broadcast_tensors(*(statistics[f"{key}.{name}"].double() for name in names))
        described[key] = {"mode": mode.value, "eps": step.eps} | {
            name: value.flatten().tolist() for name, value in zip(names, values, strict=True)
        }
    return described


def _normalization_difference(
    cached: dict[str, Any], wanted: dict[str, Any], dimensions: dict[str, list[str]]
) -> Difference | None:
    for key in sorted({*cached, *wanted}):
        one, other = cached.get(key), wanted.get(key)
        modes = [entry["mode"] if entry else "none" for entry in (one, other)]
        if one is None or other is None or modes[0] != modes[1]:
            return Difference(f"normalisation of {key}", *modes)
        low, high = STATISTICS[one["mode"]]
        if len(one[low]) != len(other[low]):
            return Difference(f"number of dimensions of {key}", len(one[low]), len(other[low]))
        widths = [_widths(one), _widths(other)]
        for name in (low, high):
            for index, (a, b) in enumerate(zip(one[name], other[name], strict=True)):
                if abs(a - b) > _TOLERANCE * abs(widths[0][index]):
                    named = f"{key}[{index}]"
                    if index < len(dimensions.get(key, ())):
                        named += f" ({dimensions[key][index]})"
                    return Difference(f"{name} of {named}", f"{a:.6g}", f"{b:.6g}")
        if any(abs(a - b) > _TOLERANCE * abs(a) for a, b in zip(*widths, strict=True)):
            return Difference(f"eps of the normalisation of {key}", one["eps"], other["eps"])
    return None


def _widths(entry: dict[str, Any]) -> list[float]:
    """Return the divisor of each dimension, as LeRobot's normaliser computes it."""
    low, high = (entry[name] for name in STATISTICS[entry["mode"]])
    if entry["mode"] == "MEAN_STD":
        return [std + entry["eps"] for std in high]
    return [(b - a) or entry["eps"] for a, b in zip(low, high, strict=True)]


def processor_sha256(file: Path) -> str:
    """Hash a processor's file; a .json without its tokenizer names, which may be local paths."""
    if file.suffix != ".json":
        return file_sha256(file)
    content = without_tokenizer_names(json.loads(file.read_text(encoding="utf-8")))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def without_tokenizer_names(content: Any) -> Any:
    """Return JSON content without the names of tokenizers, which may be local paths."""
    if isinstance(content, dict):
        kept = {key: value for key, value in content.items() if not key.endswith("tokenizer_name")}
        return {key: without_tokenizer_names(value) for key, value in kept.items()}
    if isinstance(content, list):
        return [without_tokenizer_names(value) for value in content]
    return content

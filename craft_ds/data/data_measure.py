"""Measure how a data set fits a policy's frozen processors, before any model is built.

The tabular fields of all frames are read, and the images of a few; a sample of action chunks and prompts
goes through the policy's tokenizers and back. `data_verdicts` judges the numbers, `data_report_text` prints
them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from lerobot.configs import FeatureType, NormalizationMode, PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.pi0_fast.processor_pi0_fast import (
    Pi0FastPrepareStateAndLanguageTokenizerProcessorStep,
)
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import (
    ActionTokenizerProcessorStep,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
)
from lerobot.utils.constants import ACTION, OBS_STATE

from craft_ds.config.data_report import DataReportConfig
from craft_ds.data.data_report import CameraReport, DataReport, DimensionReport, FieldReport
from craft_ds.data.image_samples import sample_images
from craft_ds.data.lerobot_dataset import camera_keys
from craft_ds.data.normalisation import (
    has_relative_actions,
    limits_of,
    normalisation_of,
    normalise,
    own_limits,
)
from craft_ds.data.tabular import TabularData, feature_names, read_tabular
from craft_ds.data.token_samples import TokenSample, sample_tokens

TOLERANCE = 1e-3
"""Distance from [-1, 1], in normalised units, up to which a value does not clip: rounding errors of fp32."""

# Statistics of large data sets are merged from those of episodes, in fp32.
_SLACK = 1e-3
# Steps that spell the state in 256 bins of [-1, 1]: what lies outside is clipped.
_BINNING = (Pi0FastPrepareStateAndLanguageTokenizerProcessorStep, Pi05PrepareStateTokenizerProcessorStep)


class _Reader(NamedTuple):
    """The policy, as far as it reads states and actions."""

    config: PreTrainedConfig
    preprocessor: PolicyProcessorPipeline
    options: DataReportConfig

    def clips(self, key: str) -> bool:
        """Return True if the policy cannot represent what lies outside of [-1, 1] after normalisation."""
        if key == ACTION:  # diffusion limits its actions
            return bool(getattr(self.config, "clip_sample", False))
        return key == OBS_STATE and any(isinstance(step, _BINNING) for step in self.preprocessor.steps)

    def spelled_width(self, key: str) -> int | None:
        """Return the width of actions that are spelled with tokens; None for other features."""
        spells = any(isinstance(step, ActionTokenizerProcessorStep) for step in self.preprocessor.steps)
        feature = (self.config.output_features or {}).get(key)
        return feature.shape[0] if spells and feature is not None else None


def measure_dataset(
    dataset: LeRobotDataset,
    name: str,
    config: PreTrainedConfig,
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
    options: DataReportConfig,
) -> DataReport:
    """Measure a data set.

    Args:
        dataset: A data set of any features.
        name: What messages call it.
        config: The policy's configuration.
        preprocessor: The policy's preprocessor on the CPU; its rename step is the run's.
        postprocessor: Its postprocessor.
        options: How much to sample.
    """
    features = dataset.meta.features
    keys = _tabular_keys(config, preprocessor)
    present = [key for key in keys if key in features]
    table = read_tabular(dataset, present)
    rows = _evenly(len(table), options.frames)
    reader = _Reader(config, preprocessor, options)
    fields = [
        _measure_field(table, rows, key, policy_key, dataset.meta, reader)
        for key, policy_key in keys.items()
        if key in present
    ]
    tokens = TokenSample()
    if len(present) == len(keys) and all(map(_fits, fields)):
        tokens = sample_tokens(
            table, dataset.meta.tasks, keys, config, preprocessor, postprocessor, options.samples
        )
    if tokens.errors:
        fields = [_with_errors(field, tokens) if keys[field.key] == ACTION else field for field in fields]
    return DataReport(
        name=name,
        fps=float(dataset.meta.fps),
        episodes=int(dataset.num_episodes),
        frames=len(table),
        measured=len(rows),
        tasks=() if dataset.meta.tasks is None else tuple(map(str, dataset.meta.tasks.index)),
        fields=tuple(fields),
        missing=tuple(key for key in keys if key not in features),
        cameras=_cameras(dataset, config, preprocessor),
        tokens=tokens,
        images=sample_images(dataset, table, options.images),
    )


def _fits(field: FieldReport) -> bool:
    return field.statistics == "ok" and field.policy_width in (None, 1, len(field.dimensions))


def _tabular_keys(config: PreTrainedConfig, preprocessor: PolicyProcessorPipeline) -> dict[str, str]:
    """Map the names of states and actions in the data set to those in the policy."""
    kinds = (FeatureType.STATE, FeatureType.ENV)
    states = [key for key, feature in (config.input_features or {}).items() if feature.type in kinds]
    actions = [
        key for key, feature in (config.output_features or {}).items() if feature.type is FeatureType.ACTION
    ]
    names = {key: key for key in [*(states or [OBS_STATE]), *(actions or [ACTION])]}
    for step in preprocessor.steps:
        if isinstance(step, RenameObservationsProcessorStep):
            names.update({new: old for old, new in step.rename_map.items() if new in names})
    return {old: new for new, old in names.items()}


def _evenly(count: int, most: int) -> np.ndarray:
    """Return at most `most` evenly spaced indices below `count`."""
    return np.arange(0, count, max(1, -(-count // most)))


def _measure_field(
    table: TabularData, rows: np.ndarray, key: str, policy_key: str, meta: Any, reader: _Reader
) -> FieldReport:
    """Measure a state or action.

    Args:
        table: The data set's tabular fields.
        rows: Frames that shares are taken from.
        key: Its name in the data set.
        policy_key: Its name in the policy.
        meta: The data set's metadata.
        reader: The policy.
    """
    width = table.fields[key].shape[1]
    names = feature_names(meta.features[key])
    named = names is not None and len(names) == width
    labels = names if names is not None and named else [str(index) for index in range(width)]
    mode, stats = normalisation_of(reader.preprocessor, policy_key)
    limits = limits_of(mode, stats)
    policy_width = reader.spelled_width(policy_key) if limits is None else len(limits[0])
    statistics = "missing" if limits is None and mode is not NormalizationMode.IDENTITY else "ok"
    if limits is not None and not all(np.isfinite(bound).all() for bound in limits):
        limits, statistics = None, "non-finite"
    raw, scaled = table.fields[key][rows].astype(np.float64), None
    if limits is not None and policy_width in (1, width):
        raw, scaled = _scale(table, rows, key, policy_key, reader)
        limits = np.broadcast_to(limits[0], width), np.broadcast_to(limits[1], width)
    elif mode is NormalizationMode.IDENTITY:
        scaled = raw
    far = reader.options.far * (3.0 if mode is NormalizationMode.MEAN_STD else 1.0)
    dimensions = []
    for index in range(width):
        finite = np.isfinite(raw[:, index])
        column = raw[finite, index]
        dimensions.append(
            _measure_dimension(
                labels[index],
                column if len(column) else np.zeros(1),
                None if scaled is None or not len(column) else scaled[finite, index],
                None if scaled is None or limits is None else (limits[0][index], limits[1][index]),
                mode,
                far,
            )
        )
    count, places = table.non_finite(key)
    return FieldReport(
        key=key,
        mode=mode.value,
        clips=reader.clips(policy_key),
        named=named,
        policy_width=policy_width,
        statistics=statistics,
        stale=_stale(table.fields[key], labels, (getattr(meta, "stats", None) or {}).get(key) or {}),
        non_finite=count,
        non_finite_at=places,
        dimensions=tuple(dimensions),
    )


def _stale(values: np.ndarray, labels: Sequence[str], stats: dict[str, Any]) -> tuple[str, ...]:
    """Return the entries whose finite values exceed the range in the data set's own statistics."""
    if not {"min", "max"} <= stats.keys() or np.size(stats["min"]) != values.shape[1]:
        return ()
    low, high = np.ravel(stats["min"]), np.ravel(stats["max"])
    finite = np.ma.masked_invalid(values)
    slack = _SLACK * np.maximum(high - low, np.maximum(np.abs(low), np.abs(high))) + 1e-9
    beyond = (finite.min(axis=0) < low - slack) | (finite.max(axis=0) > high + slack)
    return tuple(label for label, exceeds in zip(labels, np.ma.filled(beyond, False), strict=True) if exceeds)


def _measure_dimension(
    name: str,
    values: np.ndarray,
    scaled: np.ndarray | None,
    limits: tuple[float, float] | None,
    mode: NormalizationMode,
    far: float,
) -> DimensionReport:
    """Measure one dimension.

    Args:
        name: Its name.
        values: Finite values (N,).
        scaled: The values after the policy's normalisation; None if they cannot be normalised.
        limits: Raw values that become -1 and 1; None without statistics.
        mode: Normalisation mode.
        far: Normalised distance from 0 beyond which a value is far outside.
    """
    own = own_limits(mode, values)
    clipped_own = far_own = 0.0
    if own is not None and limits is not None:
        low, high = own
        centred = 0.0 if high == low else (2 * values - low - high) / (high - low)
        clipped_own, far_own = _share(centred, 1 + TOLERANCE), _share(centred, far)
    dead = limits is not None and bool(limits[0] == limits[1])
    return DimensionReport(
        name=name,
        min=float(values.min()),
        max=float(values.max()),
        mean=float(values.mean()),
        std=float(values.std()),
        low=None if limits is None else float(limits[0]),
        high=None if limits is None else float(limits[1]),
        clipped=0.0 if scaled is None else _share(scaled, 1 + TOLERANCE),
        clipped_own=clipped_own,
        far=0.0 if scaled is None or limits is None else _share(scaled, far),
        far_own=far_own,
        dead=dead,
        dead_own=own is not None and own[0] == own[1],
        moved=float(np.abs(values - limits[0]).max()) if dead and limits is not None else 0.0,
    )


def _share(scaled: np.ndarray | float, limit: float) -> float:
    return float((np.abs(scaled) > limit).mean())


def _scale(
    table: TabularData,
    rows: np.ndarray,
    key: str,
    policy_key: str,
    reader: _Reader,
) -> tuple[np.ndarray, np.ndarray]:
    """Return values before and after normalisation, (N, width) each; of chunks if actions are relative."""
    batch: dict[str, Any] = {}
    if policy_key != ACTION:
        batch[policy_key] = _tensor(table.fields[key][rows])
    elif has_relative_actions(reader.preprocessor) and OBS_STATE in table.fields:
        # Differences grow along a chunk; fewer chunks give as many values.
        offsets = reader.config.action_delta_indices or [0]
        rows = rows[:: len(offsets)]
        batch[OBS_STATE] = _tensor(table.fields[OBS_STATE][rows])
        batch[ACTION] = _tensor(table.fields[key][table.chunks(rows, offsets)])
    else:
        batch[ACTION] = _tensor(table.fields[key][rows][:, None])
    before, after = (
        normalise(reader.preprocessor, batch, only_relative=only)[policy_key].double().numpy()
        for only in (True, False)
    )
    return before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1])


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _with_errors(field: FieldReport, tokens: TokenSample) -> FieldReport:
    dimensions = [
        replace(dimension, error=one.error, relative_error=one.relative, saturated=one.saturated)
        for dimension, one in zip(field.dimensions, tokens.errors, strict=True)
    ]
    return replace(field, dimensions=tuple(dimensions))


def _cameras(
    dataset: LeRobotDataset, config: PreTrainedConfig, preprocessor: PolicyProcessorPipeline
) -> tuple[CameraReport, ...]:
    features = dataset.meta.features
    in_policy = {
        (old if old in features or new not in features else new): new
        for new, old in camera_keys(config, preprocessor).items()
    }
    reports = []
    for name in [*dataset.meta.camera_keys, *(name for name in in_policy if name not in features)]:
        policy_name = in_policy.get(name)
        channels_first = config.input_features[policy_name].shape if policy_name else None
        reports.append(
            CameraReport(
                name=name,
                shape=tuple(features[name]["shape"]) if name in features else None,
                policy_name=policy_name,
                policy_shape=(*channels_first[1:], channels_first[0]) if channels_first else None,
            )
        )
    return tuple(reports)

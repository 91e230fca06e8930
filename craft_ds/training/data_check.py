"""Check the data of a run against the policy's processors, before the policy is built."""

from collections.abc import Sequence
from typing import Any

from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import ACTION, OBS_STATE

from craft_ds.anchors.cache import AnchorCache
from craft_ds.anchors.cache_list import Anchors
from craft_ds.config.train_config import TrainConfig
from craft_ds.data.data_measure import measure_dataset
from craft_ds.data.data_report import DataReport
from craft_ds.data.data_report_text import summary
from craft_ds.data.data_verdicts import Finding, compare_fps, compare_names, enforce, judge
from craft_ds.data.tabular import feature_names


def check_data(
    config: TrainConfig,
    dataset: LeRobotDataset,
    processors: tuple[PolicyProcessorPipeline, PolicyProcessorPipeline],
    anchors: Anchors | None,
) -> list[str]:
    """Measure and judge the training data; return the lines that the run prints.

    Args:
        config: A validated configuration.
        dataset: The training data set.
        processors: The policy's preprocessor, with the run's `rename_map`, and its postprocessor; on the CPU.
        anchors: The anchors; None for the baseline.

    Raises:
        UserError: With `--data_check=error`, training on this data cannot be right.
    """
    if config.data_check == "off":
        return []
    report = measure_dataset(dataset, config.dataset.repo_id, config.policy, *processors, config.data_report)
    skips = config.on_bad_sample == "skip"
    findings = judge(report, config.data_report, skips_bad_samples=skips)
    for cache in anchors.parts if anchors else []:
        findings += _compare_with_anchors(report, cache)
    lines = enforce(findings, config.data_check)
    return [f"{'✓ ' if not findings else ''}{summary(report)}", *lines]


def compare_datasets(config: TrainConfig, datasets: Sequence[LeRobotDataset]) -> list[str]:
    """Compare frame rates and names of the entries of a mixture's data sets; return the lines to print.

    Raises:
        UserError: With `--data_check=error`, their actions have other names.
    """
    if config.data_check == "off":
        return []
    first, *others = datasets
    findings = []
    for other in others:
        if other.fps != first.fps:
            findings.append(compare_fps(other.repo_id, other.fps, first.repo_id, first.fps))
        for key in (OBS_STATE, ACTION):
            wanted, found = (_entry_names(dataset.meta.features.get(key)) for dataset in (first, other))
            if wanted and found and wanted != found:
                findings.append(compare_names(other.repo_id, key, found, first.repo_id, wanted))
    return enforce(findings, config.data_check)


def _entry_names(feature: Any) -> tuple[str, ...] | None:
    """Return the names of a feature's entries, where it has them."""
    return feature_names(feature) if feature and feature.get("names") else None


def _compare_with_anchors(report: DataReport, cache: AnchorCache) -> list[Finding]:
    """Compare frame rate and action names with those of the anchors' data set, where the cache has them."""
    old: dict[str, Any] = cache.metadata["dataset"]
    name = f"the anchors' data set {old.get('repo_id', '')}".strip()
    findings = []
    fps = old.get("fps")
    if isinstance(fps, (int, float)) and fps > 0 and fps != report.fps:
        findings.append(compare_fps(report.name, report.fps, name, float(fps)))
    features = old.get("features")
    for field in report.fields:
        stored = features.get(field.key) if isinstance(features, dict) else None
        names = _stored_names(stored)
        found = [dimension.name for dimension in field.dimensions]
        if names is not None and field.named and list(names) != found:
            findings.append(compare_names(report.name, field.key, found, name, names))
    return findings


def _stored_names(stored: Any) -> tuple[str, ...] | None:
    """Return the names of a feature in a cache's metadata: a list of them, or an entry as LeRobot has it."""
    if isinstance(stored, list):
        return tuple(map(str, stored))
    if isinstance(stored, dict) and stored.get("names") and stored.get("shape"):
        return feature_names(stored)
    return None

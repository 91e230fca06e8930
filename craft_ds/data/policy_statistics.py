"""Write a policy with the statistics of data sets: base policies on the hub have none of their own."""

import copy
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.configs import PreTrainedConfig
from lerobot.datasets.compute_stats import aggregate_stats
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.constants import ACTION, OBS_STATE
from lerobot.utils.feature_utils import dataset_to_policy_features

from craft_ds.data.lerobot_dataset import check_dataset_root
from craft_ds.errors import UserError, one_line
from craft_ds.policies.changes import policy_changes, policy_edits
from craft_ds.policies.directory import POSTPROCESSOR, PREPROCESSOR, copy_policy_files
from craft_ds.policies.loading import load_policy_config, load_processors, resolve_policy_path
from craft_ds.policies.statistics import adopt_widths, check_needed, check_statistics
from craft_ds.policies.weights import WEIGHTS_INDEX, weight_files
from craft_ds.tensor_io.filesystem import atomic_directory

Statistics = dict[str, dict[str, np.ndarray]]
_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def joint_statistics(datasets: Sequence[LeRobotDataset], rename_map: dict[str, str]) -> Statistics:
    """Return the statistics of several data sets taken as one.

    State and action are computed from all frames. LeRobot's own aggregation averages quantiles, which are
    then not those of the joint data; it is used for the other features.

    Args:
        datasets: The data sets, all with the same state and action.
        rename_map: Names of observations in the data sets, with those in the policy.

    Raises:
        UserError: A feature has another width in another data set.
    """
    renamed = [
        {rename_map.get(name, name): _as_arrays(entries) for name, entries in dataset.meta.stats.items()}
        for dataset in datasets
    ]
    computed = (OBS_STATE, ACTION)
    statistics: Statistics = dict(
        aggregate_stats([{key: one[key] for key in one if key not in computed} for one in renamed])
    )
    for name in computed:
        columns = [_column(dataset, rename_map, name) for dataset in datasets]
        widths = sorted({column.shape[1] for column in columns})
        if len(widths) > 1:
            raise UserError(
                f"{name} has {' and '.join(map(str, widths))} entries in different data sets: statistics can "
                "only be shared by data sets of one robot"
            )
        statistics[name] = _describe(np.concatenate(columns))
    return statistics


def _as_arrays(entries: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return statistics as arrays: LeRobot replaces those of pictures by ImageNet's, as tensors."""
    return {name: np.asarray(value) for name, value in entries.items()}


def write_policy_with_statistics(
    policy_path: str,
    datasets: Sequence[tuple[str, str | None]],
    output: Path,
    *,
    rename_map: dict[str, str] | None = None,
    replace: bool = False,
) -> str:
    """Write a copy of a policy whose processors have the statistics of data sets.

    The widths of state and action in its configuration become those of the data, where the policy pads
    vectors. Weight files are hard links to the originals where the file system allows it.

    Args:
        policy_path: A policy directory or a hub id.
        datasets: Id and local folder (or None) of each data set: those of the old tasks and the new ones.
        output: The directory to create; must not exist.
        rename_map: Names of observations in the data sets, with those in the policy.
        replace: Replace statistics that the policy already has. It then no longer does what it learnt.

    Returns:
        A description of the result, for the log.

    Raises:
        UserError: The policy has statistics already, a data set cannot be opened or lacks a statistic, or the
            output exists.
    """
    if output.exists():
        raise UserError(f"--output_dir={output} exists already: choose another or move it away")
    directory = resolve_policy_path(policy_path)
    source = load_policy_config(directory)
    files = [*weight_files(directory), directory / WEIGHTS_INDEX]
    has_processors = all((directory / name).is_file() for name in (PREPROCESSOR, POSTPROCESSOR))
    if has_processors and not replace:
        _refuse_statistics(source, directory)
    opened = [_open(repo_id, root) for repo_id, root in datasets]
    statistics = joint_statistics(opened, rename_map or {})
    config = copy.deepcopy(source)
    features = dataset_to_policy_features(opened[0].meta.features)
    adopt_widths(config, {(rename_map or {}).get(name, name): entry for name, entry in features.items()})
    check_needed(config, statistics, f"data set {datasets[0][0]}")
    if has_processors:
        changes = policy_changes(config, source, rename_map=rename_map, statistics=statistics)
        processors = load_processors(config, directory, changes=changes)
    else:
        changes = policy_changes(config, source)
        processors = make_pre_post_processors(config, dataset_stats=statistics)
    check_statistics(output, config, *processors)
    with atomic_directory(output) as temporary:
        if not has_processors:
            for processor in processors:
                processor.save_pretrained(temporary)
        copy_policy_files(directory, temporary, output, policy_edits(changes, *processors))
        for file in files:
            if file.is_file():
                _link_or_copy(file, temporary / file.name)
    frames = sum(dataset.num_frames for dataset in opened)
    return f"statistics of {frames} frames in {len(opened)} data set{'s' if len(opened) > 1 else ''}"


def _refuse_statistics(config: PreTrainedConfig, directory: Path) -> None:
    try:
        check_statistics(directory, config, *load_processors(config, directory))
    except UserError:
        return
    raise UserError(
        f"policy {directory} has statistics already, and does what it learnt with them only: train with it "
        "as it is, or replace them by --replace"
    )


def _open(repo_id: str, root: str | None) -> LeRobotDataset:
    if root is not None:
        check_dataset_root(root)
    try:
        meta = LeRobotDatasetMetadata(repo_id, root=root)
        for name in (OBS_STATE, ACTION):
            if name not in meta.features:
                raise UserError(f"data set {repo_id} has no {name}: choose a data set of a robot")
        return LeRobotDataset(repo_id, root=root, video_backend=None if meta.video_keys else "pyav")
    except UserError:
        raise
    except Exception as error:  # the hub's client raises errors of many types
        raise UserError(
            f"data set {repo_id} cannot be opened ({one_line(error)}): give its local folder by "
            "--dataset_root"
        ) from error


def _column(dataset: LeRobotDataset, rename_map: dict[str, str], name: str) -> np.ndarray:
    old = next((old for old, new in rename_map.items() if new == name), name)
    if old not in dataset.meta.features:
        old = name
    values = np.array(dataset.hf_dataset.data.column(old).to_pylist(), dtype=np.float64)
    return values.reshape(len(values), -1)


def _describe(values: np.ndarray) -> dict[str, np.ndarray]:
    if not np.isfinite(values).all():
        raise UserError(
            "a data set has non-finite states or actions: `craft-ds data-report` names the frames"
        )
    return {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
        "count": np.array([len(values)]),
        **{name: np.quantile(values, share, axis=0) for name, share in _QUANTILES.items()},
    }


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)

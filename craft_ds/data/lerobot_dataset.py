"""Open a LeRobot data set for a policy, with clear errors where those of LeRobot mislead."""

from collections.abc import Collection
from pathlib import Path

from lerobot.configs import PreTrainedConfig
from lerobot.datasets.dataset_metadata import CODEBASE_VERSION, LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.utils import CompatibilityError
from lerobot.processor import PolicyProcessorPipeline, RenameObservationsProcessorStep
from lerobot.utils.constants import HF_LEROBOT_HOME

from craft_ds.data.dataset_files import check_dataset_root, check_finished
from craft_ds.data.feature_checks import check_pictures, check_vectors
from craft_ds.data.task_texts import order_task_texts
from craft_ds.errors import UserError, one_line
from craft_ds.policies.loading import policy_cameras


def camera_keys(
    config: PreTrainedConfig,
    preprocessor: PolicyProcessorPipeline,
    available: Collection[str] | None = None,
) -> dict[str, str]:
    """Map each camera of a policy to its name in the data set, before the processors rename it.

    Args:
        config: The policy's configuration.
        preprocessor: The policy's preprocessor, which may rename observations.
        available: Cameras of the data set; those of the policy that it lacks are left out. None: the names
            that the preprocessor renames.

    Raises:
        UserError: Two cameras of the data set get the same name.
    """
    new_names = rename_map(preprocessor)
    cameras = policy_cameras(config)
    if available is None:
        old_names = {new: old for old, new in new_names.items()}
        return {key: old_names.get(key, key) for key in cameras}
    found = {}
    for key in cameras:
        candidates = [name for name in available if new_names.get(name, name) == key]
        if len(candidates) > 1:
            raise UserError(
                f"the data set has {' and '.join(candidates)}, which both become {key}: give a --rename_map "
                "that names one camera of the data set for each of the policy's"
            )
        if candidates:
            found[key] = candidates[0]
    return found


def rename_map(preprocessor: PolicyProcessorPipeline) -> dict[str, str]:
    """Return the new names of the observations that a preprocessor renames, by name in the data set."""
    names: dict[str, str] = {}
    for step in preprocessor.steps:
        if isinstance(step, RenameObservationsProcessorStep):
            names |= step.rename_map
    return names


def open_dataset(
    repo_id: str,
    root: str | Path | None,
    config: PreTrainedConfig,
    preprocessor: PolicyProcessorPipeline,
    allow_missing_cameras: bool = False,
) -> LeRobotDataset:
    """Open a data set with the action chunks that a policy trains on; LeRobot pads the ends of episodes.

    Args:
        repo_id: Hub id, or any name if `root` is given.
        root: Local folder; None: LeRobot's cache, then the hub.
        config: The policy's configuration.
        preprocessor: The policy's preprocessor.
        allow_missing_cameras: Accept a data set without some of the cameras, which the policy then masks.

    Raises:
        UserError: There is no finished data set, or it lacks the policy's cameras, state or action.
    """
    if root is not None:
        check_dataset_root(root)
    elif (HF_LEROBOT_HOME / repo_id).exists():
        check_finished(HF_LEROBOT_HOME / repo_id)
    try:
        meta = LeRobotDatasetMetadata(repo_id, root=root)
        check_features(meta, config, preprocessor, allow_missing_cameras)
        # LeRobot probes torchcodec unless a backend is named, and prints pages when FFmpeg is missing.
        backend = None if meta.video_keys else "pyav"
        dataset = LeRobotDataset(
            repo_id,
            root=root,
            delta_timestamps=resolve_delta_timestamps(config, meta),
            video_backend=backend,
        )
        order_task_texts(dataset)
        return dataset
    except UserError:
        raise
    except Exception as error:
        raise UserError(opening_failed(f"data set {repo_id}", error, root, "--dataset_root")) from error


def check_features(
    meta: LeRobotDatasetMetadata,
    config: PreTrainedConfig,
    preprocessor: PolicyProcessorPipeline,
    allow_missing_cameras: bool = False,
    named: str = "",
) -> None:
    """Check that a data set has what a policy reads.

    Args:
        meta: The data set's metadata.
        config: The policy's configuration.
        preprocessor: The policy's preprocessor, which may rename cameras.
        allow_missing_cameras: Accept a data set without some of the cameras, which the policy then masks.
        named: The data set in the error message; empty: its id.

    Raises:
        UserError: The data set lacks a camera, state or action, or has them in another size.
    """
    named = named or f"data set {meta.repo_id}"
    found = camera_keys(config, preprocessor, meta.camera_keys)
    missing = [name for name in policy_cameras(config) if name not in found]
    if allow_missing_cameras and missing and not hasattr(config, "empty_cameras"):
        raise UserError(
            f"--allow_missing_cameras: a policy of type {config.type} cannot mask cameras: omit it"
        )
    if missing and not (allow_missing_cameras and found):
        raise UserError(
            f"{named} lacks the policy's camera {', '.join(missing)} (it has "
            f"{', '.join(meta.camera_keys) or 'none'}): map the names by --rename_map, choose a matching "
            "data set, or mask what is missing by --allow_missing_cameras"
        )
    renamed = rename_map(preprocessor)
    check_vectors(named, meta.features, config, renamed)
    check_pictures(named, meta.features, config, renamed)


def opening_failed(name: str, error: Exception, root: str | Path | None, flag: str) -> str:
    """Return the message of a data set that LeRobot cannot open.

    Args:
        name: The data set in the message.
        error: LeRobot's or the hub's error.
        root: The local folder; None: it was looked for on the hub.
        flag: Name of the flag that gives a local folder.
    """
    if isinstance(error, CompatibilityError):  # a page of Markdown that starts with an empty line
        return (
            f"{name} is on the hub in another format than {CODEBASE_VERSION} ({one_line(error, 120)}…): "
            "convert it with python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=…"
        )
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = one_line(lines[0] if lines else type(error).__name__)
    if root is not None:
        return f"{name} in {root} cannot be opened: {reason}; check its files, or copy it anew"
    return f"{name} cannot be opened: {reason} (set {flag} for a local data set)"

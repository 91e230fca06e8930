"""Open a LeRobot data set for a policy, with clear errors where those of LeRobot mislead."""

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


def camera_keys(config: PreTrainedConfig, preprocessor: PolicyProcessorPipeline) -> dict[str, str]:
    """Map each camera of a policy to its name in the data set, before the processors rename it."""
    names = {key: key for key in policy_cameras(config)}
    for step in preprocessor.steps:
        if isinstance(step, RenameObservationsProcessorStep):
            names.update({new: old for old, new in step.rename_map.items() if new in names})
    return names


def open_dataset(
    repo_id: str,
    root: str | Path | None,
    config: PreTrainedConfig,
    preprocessor: PolicyProcessorPipeline,
) -> LeRobotDataset:
    """Open a data set with the action chunks that a policy trains on; LeRobot pads the ends of episodes.

    Args:
        repo_id: Hub id, or any name if `root` is given.
        root: Local folder; None: LeRobot's cache, then the hub.
        config: The policy's configuration.
        preprocessor: The policy's preprocessor.

    Raises:
        UserError: There is no finished data set, or it lacks the policy's cameras, state or action.
    """
    if root is not None:
        check_dataset_root(root)
    elif (HF_LEROBOT_HOME / repo_id).exists():
        check_finished(HF_LEROBOT_HOME / repo_id)
    try:
        meta = LeRobotDatasetMetadata(repo_id, root=root)
        _check_features(meta, config, preprocessor)
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


def _check_features(
    meta: LeRobotDatasetMetadata, config: PreTrainedConfig, preprocessor: PolicyProcessorPipeline
) -> None:
    missing = sorted(set(camera_keys(config, preprocessor).values()) - set(meta.camera_keys))
    if missing:
        raise UserError(
            f"data set {meta.repo_id} lacks cameras of the policy: {', '.join(missing)}; "
            f"it has {', '.join(meta.camera_keys) or 'none'}"
        )
    check_vectors(f"data set {meta.repo_id}", meta.features, config)
    check_pictures(f"data set {meta.repo_id}", meta.features, config)


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

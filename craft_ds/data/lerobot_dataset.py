"""Open a LeRobot data set for a policy, with clear errors where those of LeRobot mislead.

LeRobot looks on the hub for a data set that is missing or unfinished here, and reports the hub's failure.
"""

from collections.abc import Collection
from pathlib import Path

from lerobot.configs import PreTrainedConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.processor import PolicyProcessorPipeline, RenameObservationsProcessorStep
from lerobot.utils.constants import ACTION, HF_LEROBOT_HOME, OBS_STATE

from craft_ds.errors import UserError
from craft_ds.policies.loading import policy_cameras

_PARQUET_END = b"PAR1"


def check_dataset_root(root: str | Path, flag: str = "--dataset_root") -> None:
    """Check that a folder holds a finished LeRobot v3 data set.

    Args:
        root: The data set's folder.
        flag: Name of the flag in the error message.

    Raises:
        UserError: There is no data set, or its recording was not finalised.
    """
    root = Path(root)
    if not (root / "meta" / "info.json").is_file():
        raise UserError(f"{flag}={root} holds no LeRobot data set: {root / 'meta' / 'info.json'} is missing")
    for folder in (root / "meta" / "episodes", root / "data"):
        files = sorted(folder.glob("*/*.parquet"))
        broken = [file for file in files if not _parquet_is_complete(file)]
        if broken or not files:
            what = f"{broken[0]} is cut off" if broken else f"{folder} holds no parquet file"
            raise UserError(
                f"{flag}={root} was not finalised ({what}): the program that records it must "
                "end with dataset.finalize()"
            )


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
    new_names: dict[str, str] = {}
    for step in preprocessor.steps:
        if isinstance(step, RenameObservationsProcessorStep):
            new_names |= step.rename_map
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
    local = Path(root) if root is not None else HF_LEROBOT_HOME / repo_id
    if root is not None or local.exists():
        check_dataset_root(local)
    try:
        meta = LeRobotDatasetMetadata(repo_id, root=root)
        check_features(meta, config, preprocessor, allow_missing_cameras)
        # LeRobot probes torchcodec unless a backend is named, and prints pages when FFmpeg is missing.
        backend = None if meta.video_keys else "pyav"
        return LeRobotDataset(
            repo_id,
            root=root,
            delta_timestamps=resolve_delta_timestamps(config, meta),
            video_backend=backend,
        )
    except UserError:
        raise
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"data set {repo_id} cannot be opened ({first_line}): give its local folder by --dataset_root"
        ) from error


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
        UserError: The data set lacks a camera, state or action.
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
    for key in (OBS_STATE, ACTION):
        if key not in meta.features:
            raise UserError(f"{named} has no {key}, which the policy needs")


def _parquet_is_complete(file: Path) -> bool:
    """Return True if a file ends with parquet's magic bytes, which are written last."""
    with open(file, "rb") as stream:
        stream.seek(0, 2)
        if stream.tell() < 2 * len(_PARQUET_END):
            return False
        stream.seek(-len(_PARQUET_END), 2)
        return stream.read() == _PARQUET_END

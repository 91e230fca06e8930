"""Options of a build, and the metadata of a cache that is known before its first shard is written.

The same plan gives the same bytes, so an interrupted build or an existing cache is compared with it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lerobot.configs import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from craft_ds.anchors.cache import FORMAT, VERSION
from craft_ds.anchors.preprocessing import (
    describe_preprocessor,
    processor_sha256,
    without_tokenizer_names,
)
from craft_ds.anchors.schema import DTYPES, TARGETS
from craft_ds.anchors.selection import AnchorSelection
from craft_ds.errors import UserError, one_line
from craft_ds.lora.adapters import ADAPTER_WEIGHTS, weights_directory
from craft_ds.policies.directory import CONFIG
from craft_ds.policies.loading import policy_cameras, tokenizer_fingerprint
from craft_ds.policies.weights import weight_files
from craft_ds.tensor_io.filesystem import file_sha256
from craft_ds.tensor_io.safe_json import read_object
from craft_ds.worlds.rollouts import ROLLOUTS_FILE

_NOT_IN_OLD_CACHES = ("preprocessing", "chunk_size", "fps", "features", "task_frames")


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build, with the names and defaults of the command line's flags.

    Attributes:
        dataset_repo_id: The old tasks' data set.
        policy_path: The teacher: a policy directory, or a hub id.
        output_dir: Directory of the new cache.
        dataset_root: Local folder of the data set; None looks in LeRobot's cache and on the hub.
        num_samples: Number of anchors.
        batch_size: Anchors processed at once.
        num_workers: Processes that read the data set.
        heldout_fraction: Fraction of each task's episodes whose anchors are never trained on.
        seed: Seed of the selection.
        device: Device on which the teacher computes its own loss.
        shard_size: Anchors per file.
        image_size: "dataset" stores images as recorded (exact), "model" as the policy resizes them (smaller,
            rounded to 8 bits).
        vision_features: Also store the output of the teacher's vision tower in fp16. Training with the same
            tower frozen can then skip the tower.
        rename_map: Names of observations in the data set, mapped to the policy's; replaces the map of the
            teacher's own preprocessor. None: the teacher's own map.
        allow_missing_cameras: Accept a data set that lacks cameras of the policy: the policy masks them.
        targets: Also store the teacher's targets of these retention losses.
        selection: "uniform" draws the frames of a task evenly over its episodes, "phases" also evenly over
            its motion phases.
        gripper: For "phases": names or indices of the action's dimensions that move grippers, or `none`;
            empty: those whose name contains "grip", else the last.
        instructions: Texts of old tasks without data. The data set then gives observations only, and the
            teacher's greedy tokens under each instruction are the anchors' actions.

    Raises:
        UserError: A value is out of range.
    """

    dataset_repo_id: str
    policy_path: str
    output_dir: str
    dataset_root: str | None = None
    num_samples: int = 1000
    batch_size: int = 16
    num_workers: int = 4
    heldout_fraction: float = 0.2
    seed: int = 0
    device: str = "cpu"
    shard_size: int = 256
    image_size: str = "dataset"
    vision_features: bool = False
    rename_map: dict[str, str] | None = None
    allow_missing_cameras: bool = False
    targets: Sequence[str] = ()
    selection: str = "uniform"
    gripper: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        least = {"num_samples": 1, "batch_size": 1, "num_workers": 0, "seed": 0, "shard_size": 1}
        for flag, value in asdict(self).items():
            if flag in least and value < least[flag]:
                raise UserError(f"--{flag}={value} must be at least {least[flag]}")
        if not 0 <= self.heldout_fraction < 1:
            raise UserError(f"--heldout_fraction={self.heldout_fraction} must lie in [0, 1)")
        if self.image_size not in ("dataset", "model"):
            raise UserError(f"--image_size={self.image_size} must be dataset or model")
        for target in self.targets:
            if target not in TARGETS:
                raise UserError(f"--targets={target}: choose from {', '.join(TARGETS)}")
        for flag in ("targets", "gripper", "instructions"):
            given = list(getattr(self, flag))
            if again := next((one for one in given if given.count(one) > 1), None):
                raise UserError(f"--{flag} names {again} more than once: remove one")
        if self.selection not in ("uniform", "phases"):
            raise UserError(f"--selection={self.selection} must be uniform or phases")
        if self.gripper and self.selection != "phases":
            raise UserError("--gripper has no effect without --selection=phases: add it, or omit --gripper")
        if not all(text.strip() for text in self.instructions):
            raise UserError("--instructions: a text is empty")


class Teacher(NamedTuple):
    """The policy whose behaviour the anchors preserve.

    Attributes:
        directory: Its local folder.
        config: Its configuration.
        vision_fingerprint: Fingerprint of its vision tower where features are stored, else None.
        preprocessor: Its preprocessor.
    """

    directory: Path
    config: PreTrainedConfig
    vision_fingerprint: str | None
    preprocessor: PolicyProcessorPipeline


def make_plan(
    options: BuildOptions,
    teacher: Teacher,
    dataset: LeRobotDataset,
    selection: AnchorSelection,
    entries: dict[str, Any],
    example: dict[str, Tensor],
) -> dict[str, Any]:
    """Return the metadata of a cache without its shards and the teacher's loss, as JSON values.

    Args:
        options: Options of the build.
        teacher: The teacher.
        dataset: The old data set.
        selection: The frames selected from it.
        entries: What the metadata record of the selection (`craft_ds.anchors.choose_frames`).
        example: An encoded batch, for the names, types and shapes of the fields.

    Raises:
        UserError: The teacher's normaliser has incomplete statistics.
    """
    directory, config, vision_fingerprint, preprocessor = teacher
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    episodes = dataset.hf_dataset.data.column("episode_index").to_numpy()[selection.frames]
    optional: dict[str, Any] = {}
    if vision_fingerprint is not None:
        optional["vision_features"] = {"fingerprint": vision_fingerprint}
    if missing := [camera for camera in policy_cameras(config) if camera not in example]:
        optional["missing_cameras"] = missing
    asked: dict[str, Any] = {} if options.rename_map is None else {"rename_map": options.rename_map}
    if options.targets:
        asked["targets"] = sorted(options.targets)
    if options.selection != "uniform":
        asked |= {"selection": options.selection, "gripper": sorted(options.gripper)}
    if options.instructions:
        asked["instructions"] = list(options.instructions)
    return {
        "format": FORMAT,
        "version": VERSION,
        "request": {
            name: getattr(options, name)
            for name in ("num_samples", "heldout_fraction", "seed", "shard_size", "image_size")
        }
        | asked,
        "teacher": {
            "path": options.policy_path,
            "type": config.type,
            "config": without_tokenizer_names(json.loads((directory / CONFIG).read_text(encoding="utf-8"))),
            "weights_sha256": _weights_sha256(directory),
        },
        "dataset": {
            "repo_id": options.dataset_repo_id,
            "root": options.dataset_root,
            "revision": dataset.revision,
            "meta_sha256": _joint_sha256(dataset.root, sorted((dataset.root / "meta").rglob("*.*"))),
            "fps": dataset.meta.fps,
            "features": {
                key: {"shape": list(feature["shape"]), "names": feature.get("names")}
                for key, feature in dataset.meta.features.items()
                if key in (OBS_STATE, ACTION)
            },
            **entries,
            **_rollouts(dataset.root),
            "episodes": {
                "train": np.unique(episodes[~selection.heldout]).tolist(),
                "heldout": selection.heldout_episodes,
            },
        },
        "processors": {
            file.name: processor_sha256(file) for file in sorted(directory.glob("policy_*processor*"))
        },
        "preprocessing": describe_preprocessor(preprocessor),
        "chunk_size": config.chunk_size,
        "tokenizer": tokenizer_fingerprint(config),
        "cameras": [camera for camera in policy_cameras(config) if camera in example],
        **optional,
        "fields": {
            name: {"dtype": dtypes[tensor.dtype], "shape": list(tensor.shape[1:])}
            for name, tensor in example.items()
        },
        "num_samples": options.num_samples,
    }


def check_plan_matches(plan: dict[str, Any], existing: dict[str, Any], complaint: str) -> None:
    """Check that an existing build or cache has this plan.

    Args:
        plan: The plan of this build.
        existing: The stored plan or metadata.
        complaint: Start of the error message.

    Raises:
        UserError: The two differ; the message names one difference.
    """
    for name, wanted in plan.items():
        found = existing.get(name)
        if found is None and name in _NOT_IN_OLD_CACHES:
            continue
        if name == "dataset" and isinstance(found, dict):
            wanted = {key: wanted[key] for key in wanted if key in found or key not in _NOT_IN_OLD_CACHES}
        if found == wanted:
            continue
        if isinstance(wanted, dict) and isinstance(found, dict):
            name = f"{name}.{next(key for key in [*wanted, *found] if wanted.get(key) != found.get(key))}"
        raise UserError(f"{complaint}: its {name} differs")


def _rollouts(root: Path) -> dict[str, Any]:
    """Return which policy made a data set, if `craft-ds worlds record` wrote one of rollouts.

    Raises:
        UserError: The file is damaged.
    """
    file = root / ROLLOUTS_FILE
    if not file.is_file():
        return {}
    try:
        record = read_object(file)
        known = {name: record[name] for name in ("policy", "world", "seed", "scenes", "failures")}
        solved = {task: record["solved"][task] for task in record["solved"]}
        if len(solved) > 1000 or not all(
            _is_short(value) for value in (*known.values(), *solved, *solved.values())
        ):
            raise ValueError("an entry is neither a short text nor a number")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({one_line(error)}): restore it, or remove it") from error
    return {"rollouts": {**known, "solved": solved}}


def _is_short(value: object) -> bool:
    return isinstance(value, str | int) and len(str(value)) < 1000


def _weights_sha256(teacher: Path) -> str:
    base = weights_directory(teacher)
    base_sha256 = _joint_sha256(base, weight_files(base))
    if base == teacher:
        return base_sha256
    adapters = file_sha256(teacher / ADAPTER_WEIGHTS)
    return hashlib.sha256(f"{base_sha256} {adapters}".encode()).hexdigest()


def _joint_sha256(root: Path, files: list[Path]) -> str:
    lines = [f"{file.relative_to(root)} {file_sha256(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()

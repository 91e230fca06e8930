"""What is to be built: the options, and all of a cache's metadata that is known before its first shard.

The same plan gives the same bytes; so it is what an interrupted build or an existing cache is compared with.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.configs import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch import Tensor

from craft_ds.anchors.cache import FORMAT, VERSION, file_sha256
from craft_ds.anchors.schema import DTYPES
from craft_ds.anchors.selection import AnchorSelection
from craft_ds.errors import UserError
from craft_ds.lora.adapters import ADAPTER_WEIGHTS, weights_directory
from craft_ds.policies.directory import CONFIG
from craft_ds.policies.loading import policy_cameras, tokenizer_fingerprint
from craft_ds.policies.weights import weight_files


@dataclass(frozen=True)
class BuildOptions:
    """What to build, with the names and defaults of the command line's flags.

    Attributes:
        dataset_repo_id: The old tasks' data set.
        policy_path: The teacher: a policy directory, or a hub id.
        output_dir: The cache to make.
        dataset_root: Local folder of the data set; None looks in LeRobot's cache and on the hub.
        num_samples: Number of anchors.
        batch_size: Anchors processed at once.
        num_workers: Processes that read the data set.
        heldout_fraction: Part of each task's episodes whose anchors are never trained on.
        seed: Seed of the draw.
        device: Where the teacher computes its own loss.
        shard_size: Anchors a file.
        image_size: "dataset" stores images as recorded (exact), "model" as the policy resizes them (smaller,
            rounded to 8 bits).
        vision_features: Also store what the teacher's vision tower makes of the images, in fp16: training
            with the same tower frozen can then skip it.

    Raises:
        UserError: A value out of range.
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

    def __post_init__(self) -> None:
        least = {"num_samples": 1, "batch_size": 1, "num_workers": 0, "seed": 0, "shard_size": 1}
        for flag, value in asdict(self).items():
            if flag in least and value < least[flag]:
                raise UserError(f"--{flag}={value} must be at least {least[flag]}")
        if not 0 <= self.heldout_fraction < 1:
            raise UserError(f"--heldout_fraction={self.heldout_fraction} must lie in [0, 1)")
        if self.image_size not in ("dataset", "model"):
            raise UserError(f"--image_size={self.image_size} must be dataset or model")


def make_plan(
    options: BuildOptions,
    teacher: Path,
    config: PreTrainedConfig,
    dataset: LeRobotDataset,
    draw: AnchorSelection,
    example: dict[str, Tensor],
    vision_fingerprint: str | None = None,
) -> dict[str, Any]:
    """The metadata of a cache without its shards and the teacher's loss, as JSON values.

    Args:
        options: What to build.
        teacher: The policy's local folder.
        config: The policy's configuration.
        dataset: The old data set.
        draw: The frames drawn from it.
        example: An encoded batch, for the names, types and shapes of the fields.
        vision_fingerprint: Of the tower whose features are stored; None: none are.
    """
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    episodes = dataset.hf_dataset.data.column("episode_index").to_numpy()[draw.rows]
    vision = {} if vision_fingerprint is None else {"vision_features": {"fingerprint": vision_fingerprint}}
    return {
        "format": FORMAT,
        "version": VERSION,
        "request": {
            name: getattr(options, name)
            for name in ("num_samples", "heldout_fraction", "seed", "shard_size", "image_size")
        },
        "teacher": {
            "path": options.policy_path,
            "type": config.type,
            "config": _without_tokenizer_names(json.loads((teacher / CONFIG).read_text(encoding="utf-8"))),
            "weights_sha256": _weights_sha256(teacher),
        },
        "dataset": {
            "repo_id": options.dataset_repo_id,
            "root": options.dataset_root,
            "revision": dataset.revision,
            "meta_sha256": _joint_sha256(dataset.root, sorted((dataset.root / "meta").rglob("*.*"))),
            "tasks": list(dataset.meta.tasks.sort_values("task_index").index),
            "episodes": {
                "train": np.unique(episodes[~draw.heldout]).tolist(),
                "heldout": draw.heldout_episodes,
            },
        },
        "processors": {
            file.name: _processor_sha256(file) for file in sorted(teacher.glob("policy_*processor*"))
        },
        "tokenizer": tokenizer_fingerprint(config),
        "cameras": policy_cameras(config),
        **vision,
        "fields": {
            name: {"dtype": dtypes[tensor.dtype], "shape": list(tensor.shape[1:])}
            for name, tensor in example.items()
        },
        "num_samples": options.num_samples,
    }


def check_same(plan: dict[str, Any], there: dict[str, Any], complaint: str) -> None:
    """Check that what is there was built, or begun, by this plan.

    Raises:
        UserError: It was not; the message begins with the complaint and names a difference.
    """
    for name, wanted in plan.items():
        found = there.get(name)
        if found == wanted:
            continue
        if isinstance(wanted, dict) and isinstance(found, dict):
            name = f"{name}.{next(key for key in [*wanted, *found] if wanted.get(key) != found.get(key))}"
        raise UserError(f"{complaint}: its {name} differs")


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


def _processor_sha256(file: Path) -> str:
    """Hash of a processor's file; of a .json without tokenizer names, which may be a machine's paths."""
    if file.suffix != ".json":
        return file_sha256(file)
    content = _without_tokenizer_names(json.loads(file.read_text(encoding="utf-8")))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _without_tokenizer_names(content: Any) -> Any:
    if isinstance(content, dict):
        kept = {key: value for key, value in content.items() if not key.endswith("tokenizer_name")}
        return {key: _without_tokenizer_names(value) for key, value in kept.items()}
    if isinstance(content, list):
        return [_without_tokenizer_names(value) for value in content]
    return content

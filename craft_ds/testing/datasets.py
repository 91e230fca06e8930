"""A small LeRobot v3 image data set, and a hand-written anchor cache, for tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import (
    ACTION,
    ACTION_TOKEN_MASK,
    ACTION_TOKENS,
    OBS_IMAGES,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
    OBS_STATE,
)
from safetensors.torch import save_file
from torch import Tensor

from craft_ds.anchors.cache import (
    FORMAT,
    METADATA_FILE,
    SPLITS,
    VERSION,
    file_sha256,
    metadata_sha256,
    shard_name,
)
from craft_ds.anchors.schema import DTYPES

TASK_TEXTS = ("press the red button", "close the drawer", "turn the dial", "lift the lid")


def make_test_dataset(
    root: str | Path,
    tasks: int = 2,
    episodes_per_task: int = 3,
    frames: int = 20,
    cameras: Sequence[str] = ("top",),
    seed: int = 0,
    *,
    repo_id: str = "craft-ds/test",
    image_size: tuple[int, int] = (64, 64),
    state_dim: int = 4,
    action_dim: int = 4,
    scale: float = 1.0,
    fps: int = 10,
    episodes: int | None = None,
) -> Path:
    """Write a data set of `tasks * episodes_per_task` episodes and return its root.

    Episodes of the tasks alternate. States and actions are sine waves in [-1, 1] whose frequency depends
    on the task, so a policy can learn something from them.

    Args:
        root: Directory to create; it must not exist.
        tasks: Number of tasks, at most 4.
        episodes_per_task: Episodes of each task.
        frames: Frames an episode.
        cameras: Camera names; the features are ``observation.images.<name>``.
        seed: Seed of pictures and phases.
        repo_id: Identifier written into the data set.
        image_size: Height and width in pixels.
        state_dim: Entries of ``observation.state``.
        action_dim: Entries of ``action``.
        scale: Factor of states and actions.
        fps: Frames per second.
        episodes: Number of episodes, if not all tasks have the same number.

    Returns:
        ``root`` as a path.
    """
    root = Path(root)
    rng = np.random.default_rng(seed)
    features = {f"{OBS_IMAGES}.{name}": _feature("image", (*image_size, 3)) for name in cameras}
    features[OBS_STATE] = _feature("float32", (state_dim,))
    features[ACTION] = _feature("float32", (action_dim,))
    # Naming the video backend keeps LeRobot from probing torchcodec, which prints pages without FFmpeg.
    dataset = LeRobotDataset.create(
        repo_id, fps=fps, features=features, root=root, use_videos=False, video_backend="pyav"
    )
    for episode in range(episodes or tasks * episodes_per_task):
        task = episode % tasks
        phase = rng.uniform(0, 2 * np.pi, size=max(state_dim, action_dim))
        for frame in range(frames):
            wave = scale * np.sin(phase + 0.2 * (task + 1) * frame)
            step = {
                f"{OBS_IMAGES}.{name}": rng.integers(0, 256, size=(*image_size, 3), dtype=np.uint8)
                for name in cameras
            }
            step[OBS_STATE] = wave[:state_dim].astype(np.float32)
            step[ACTION] = (0.8 * wave[:action_dim]).astype(np.float32)
            dataset.add_frame({**step, "task": TASK_TEXTS[task]})
        dataset.save_episode()
    dataset.finalize()
    return root


def write_test_cache(
    path: Path,
    task: Sequence[int],
    episode: Sequence[int],
    heldout_episodes: Sequence[int] = (),
    shard_size: int = 4,
) -> dict[str, Tensor]:
    """Write a valid cache of random anchors with one camera (3, 4, 6), without policy or data set.

    Args:
        path: Directory to create.
        task: Task of each anchor.
        episode: Episode of each anchor.
        heldout_episodes: The held-out episodes.
        shard_size: Anchors a shard.

    Returns:
        The stored fields of all anchors.
    """
    rng = torch.Generator().manual_seed(0)
    n = len(task)
    anchors = {
        f"{OBS_IMAGES}.top": torch.randint(0, 256, (n, 3, 4, 6), generator=rng, dtype=torch.uint8),
        OBS_LANGUAGE_TOKENS: torch.randint(0, 99, (n, 5), generator=rng, dtype=torch.int32),
        OBS_LANGUAGE_ATTENTION_MASK: torch.arange(5) < torch.randint(1, 6, (n, 1), generator=rng),
        ACTION_TOKENS: torch.randint(0, 99, (n, 7), generator=rng, dtype=torch.int32),
        ACTION_TOKEN_MASK: torch.arange(7) < torch.randint(1, 8, (n, 1), generator=rng),
        "task": torch.tensor(task, dtype=torch.int32),
        "episode": torch.tensor(episode, dtype=torch.int32),
        "frame": torch.arange(n, dtype=torch.int32),
    }
    path.mkdir(parents=True)
    shards = []
    for number, start in enumerate(range(0, n, shard_size)):
        shard = {name: tensor[start : start + shard_size].clone() for name, tensor in anchors.items()}
        file = path / shard_name(number)
        save_file(shard, file)
        shards.append(
            {"samples": len(shard["task"]), "bytes": file.stat().st_size, "sha256": file_sha256(file)}
        )
    names = {dtype: name for name, dtype in DTYPES.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "request": {"shard_size": shard_size, "image_size": "dataset"},
        "teacher": {"path": "teacher"},
        "dataset": {
            "fps": 10,
            "features": {ACTION: {"shape": [2], "names": ["x0", "x1"]}},
            "tasks": list(TASK_TEXTS[: max(task, default=0) + 1]),
            "task_frames": np.bincount(task).tolist(),
            "episodes": {"heldout": list(heldout_episodes)},
        },
        "cameras": [f"{OBS_IMAGES}.top"],
        "processors": {"policy_preprocessor.json": "0" * 64},
        "preprocessing": [
            {
                "step": "normalizer",
                "features": {ACTION: {"mode": "MIN_MAX", "eps": 1e-8, "min": [0.0, 0.0], "max": [1.0, 2.0]}},
            }
        ],
        "chunk_size": 8,
        "tokenizer": "0123456789abcdef",
        "fields": {
            name: {"dtype": names[tensor.dtype], "shape": list(tensor.shape[1:])}
            for name, tensor in anchors.items()
        },
        "num_samples": n,
        "teacher_loss": {split: {"overall": 1.0, "by_task": {}, "tokens": n} for split in (*SPLITS, "all")},
        "shards": shards,
    }
    (path / METADATA_FILE).write_text(json.dumps({**metadata, "sha256": metadata_sha256(metadata)}))
    return anchors


def edit_metadata(path: Path, **changes: Any) -> None:
    """Change entries of a cache's metadata and update its checksum."""
    metadata = {**json.loads((path / METADATA_FILE).read_text()), **changes}
    metadata.pop("sha256", None)
    (path / METADATA_FILE).write_text(json.dumps({**metadata, "sha256": metadata_sha256(metadata)}))


def _feature(dtype: str, shape: tuple[int, ...]) -> dict:
    names = ["height", "width", "channels"] if dtype == "image" else [f"x{i}" for i in range(shape[0])]
    return {"dtype": dtype, "shape": shape, "names": names}

"""A small LeRobot v3 image data set for tests: random pictures, smooth actions, a few tasks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

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
) -> Path:
    """Write a data set of ``tasks * episodes_per_task`` episodes and return its root.

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
        repo_id, fps=10, features=features, root=root, use_videos=False, video_backend="pyav"
    )
    for episode in range(tasks * episodes_per_task):
        task = episode % tasks
        phase = rng.uniform(0, 2 * np.pi, size=max(state_dim, action_dim))
        for frame in range(frames):
            wave = np.sin(phase + 0.2 * (task + 1) * frame)
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


def _feature(dtype: str, shape: tuple[int, ...]) -> dict:
    names = ["height", "width", "channels"] if dtype == "image" else [f"x{i}" for i in range(shape[0])]
    return {"dtype": dtype, "shape": shape, "names": names}

"""Helpers of the tests that build anchor caches."""

import json
from pathlib import Path

import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from craft_ds.anchors.build import build_anchor_cache
from craft_ds.cli import run_command
from craft_ds.errors import UserError

SCRIPT = Path(__file__).parents[2] / "scripts" / "build_anchor_cache.py"


class Killed(BaseException):
    """Stands for the process's end: the build has no handlers that could tidy up behind it."""


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def refuses(options, *words):
    with pytest.raises(UserError) as caught:
        build_anchor_cache(options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


def make_dataset(root, episodes, cameras=("top", "side1"), bad=None):
    """Write a data set whose episodes are lists of task texts, one per frame.

    `bad` maps (episode, frame) to changes of the frame.
    """
    image = {"dtype": "image", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}
    names = {"motors": ["shoulder", "elbow", "wrist", "gripper"]}
    vector = {"dtype": "float32", "shape": (4,), "names": names}
    features = {f"observation.images.{name}": image for name in cameras}
    features |= {"observation.state": vector, "action": vector}
    dataset = LeRobotDataset.create(
        "craft-ds/test", fps=10, features=features, root=root, use_videos=False, video_backend="pyav"
    )
    rng = np.random.default_rng(0)
    for number, texts in enumerate(episodes):
        for frame, text in enumerate(texts):
            dataset.add_frame(
                {
                    **{
                        f"observation.images.{name}": rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                        for name in cameras
                    },
                    "observation.state": rng.uniform(-0.4, 0.4, 4).astype(np.float32),
                    "action": rng.uniform(-0.4, 0.4, 4).astype(np.float32),
                    "task": text,
                    **(bad or {}).get((number, frame), {}),
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return root


def edit_processor(directory, change):
    """Change the configurations of a saved preprocessor's steps, given by the steps' names."""
    file = directory / "policy_preprocessor.json"
    pipeline = json.loads(file.read_text())
    change({step["registry_name"]: step["config"] for step in pipeline["steps"]})
    file.write_text(json.dumps(pipeline))


def run_script(monkeypatch, *arguments):
    """Run `craft-ds anchors` in this process; return its exit code."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        run_command("anchors", arguments)
    except SystemExit as ended:
        return ended.code
    return 0

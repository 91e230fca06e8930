"""Situations of users: data, policies, anchors and flags, each with the verdict that craft-ds must give.

`right`: the run trains, and perfect tokens decode by the saved policy to the recorded actions.
`refused`: one line that names the flag or file, exit status 2, no output directory.
`warned`: the run trains and prints a warning.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors.torch import load_file, save_file

from craft_ds.testing.damaged_samples import damage, rewrite_column
from craft_ds.testing.datasets import make_test_dataset
from craft_ds.testing.policies import make_test_policy_dir

TOP, SIDE, FRONT = (f"observation.images.{name}" for name in ("top", "side1", "front"))
RENAME = "--rename_map=" + json.dumps({FRONT: TOP})


class Lab:
    """Inputs of one situation, which may be copied and changed."""

    def __init__(self, inputs: Any, path: Path):
        self.inputs, self.path = inputs, path
        self.data_root, self.policy_dir = inputs.new, inputs.policy

    def data(self, **options: Any) -> str:
        """Make a small data set of one task."""
        defaults = {"tasks": 1, "episodes_per_task": 2, "frames": 12, "seed": 5}
        self.data_root = make_test_dataset(self.path / "data", **(defaults | options))
        return f"--dataset.root={self.data_root}"

    def copied_data(self, change: Callable[[Path], object]) -> str:
        """Copy the data set and change its files."""
        self.data_root = shutil.copytree(self.inputs.new, self.path / "data")
        change(self.data_root)
        return f"--dataset.root={self.data_root}"

    def edited_info(self, **changes: Any) -> str:
        return self.copied_data(lambda root: edit_json(root / "meta" / "info.json", changes))

    def damaged_data(self, name: str) -> str:
        return self.copied_data(lambda root: damage(root, name, 1, 5))

    def policy(self, cameras: int = 1) -> str:
        self.policy_dir = make_test_policy_dir(self.path / "policy", cameras=cameras)
        return f"--policy.path={self.policy_dir}"

    def copied_policy(self, change: Callable[[Path], object]) -> str:
        self.policy_dir = shutil.copytree(self.inputs.policy, self.path / "policy")
        change(self.policy_dir)
        return f"--policy.path={self.policy_dir}"

    def statistics(self, change: Callable[[str, Any], Any]) -> str:
        """Copy the policy and change its statistics; None removes one."""

        def apply(policy: Path) -> None:
            for file in policy.glob("policy_*processor*.safetensors"):
                state = {name: change(name, value) for name, value in load_file(file).items()}
                save_file({name: value for name, value in state.items() if value is not None}, file)

        return self.copied_policy(apply)

    def renaming_policy(self) -> str:
        """A policy whose own preprocessor renames a camera."""

        def rename(policy: Path) -> None:
            file = policy / "policy_preprocessor.json"
            content = json.loads(file.read_text())
            step = next(s for s in content["steps"] if s["registry_name"] == "rename_observations_processor")
            step["config"]["rename_map"] = {FRONT: TOP}
            file.write_text(json.dumps(content))

        return self.copied_policy(rename)

    def anchors(self, data: Path | None = None, **options: Any) -> list[str]:
        """Build anchors of the policy in use, and return the flags of a CRaFT run."""
        defaults = {"dataset_root": str(data or self.inputs.old), "policy_path": str(self.policy_dir)}
        defaults |= {"num_samples": 12, "batch_size": 4}
        return craft_flags(self.inputs.build_anchors(self.path / "anchors", **(defaults | options)))


def craft_flags(cache: Path) -> list[str]:
    return [
        "--craft.enabled=true",
        f"--craft.anchor_cache_dir={cache}",
        "--craft.anchor_batch_size=2",
        "--craft.retention_freq=1",
    ]


def edit_json(file: Path, changes: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rename_action(root: Path, names: list[str]) -> None:
    file = root / "meta" / "info.json"
    content = json.loads(file.read_text())
    content["features"]["action"]["names"] = names
    file.write_text(json.dumps(content))


def drop_column(root: Path, name: str) -> None:
    file = root / "meta" / "info.json"
    content = json.loads(file.read_text())
    del content["features"][name]
    file.write_text(json.dumps(content))
    (table,) = (root / "data").rglob("*.parquet")
    pq.write_table(pq.read_table(table).drop_columns([name]), table)


def scale_column(root: Path, name: str, entry: int, change: Callable[[float], float]) -> None:
    """Change one entry of a column; the statistics of the data set stay as they were recorded."""
    (file,) = (root / "data").rglob("*.parquet")
    values = np.array(pq.read_table(file)[name].to_pylist(), dtype=np.float32)
    values[:, entry] = [change(value) for value in values[:, entry]]
    rewrite_column(root, name, values.tolist())


def two_names(lab: Lab) -> list[str]:
    return [lab.data(cameras=("top", "front")), RENAME]


def other_statistics(lab: Lab) -> list[str]:
    flags = craft_flags(lab.inputs.anchors)
    return [lab.statistics(lambda name, value: value * 2), *flags]


def old_names(lab: Lab) -> list[str]:
    """Old and new data whose actions have the same names in another order."""
    old = shutil.copytree(lab.inputs.old, lab.path / "old")
    rename_action(old, ["pan", "lift", "elbow", "gripper"])
    flags = lab.anchors(old)
    return [*flags, lab.copied_data(lambda root: rename_action(root, ["lift", "pan", "elbow", "gripper"]))]


def faster_data(lab: Lab) -> list[str]:
    """New data at another rate than the old."""
    return [*lab.anchors(), lab.data(fps=20)]


def single_episode_anchors(lab: Lab) -> list[str]:
    old = make_test_dataset(lab.path / "old", tasks=2, episodes_per_task=1, frames=12)
    return lab.anchors(old)


def partly_measured_anchors(lab: Lab) -> list[str]:
    """One task with two episodes, one with a single episode, which cannot be held out."""
    old = make_test_dataset(lab.path / "old", tasks=2, episodes_per_task=2, frames=12, episodes=3)
    return lab.anchors(old)


def pretrained_path(lab: Lab) -> list[str]:
    return [f"--policy.pretrained_path={lab.inputs.policy}", "--policy.type=tiny_pi0_fast"]


def named(name: str) -> Callable[[Lab], list[str]]:
    """Data in a directory of this name."""

    def flags(lab: Lab) -> list[str]:
        lab.data_root = shutil.copytree(lab.inputs.new, lab.path / name)
        return [f"--dataset.root={lab.data_root}"]

    return flags


def nan_in_skip(lab: Lab) -> list[str]:
    return [lab.damaged_data("nan action"), "--on_bad_sample=skip", "--steps=20"]


@dataclass(frozen=True)
class Situation:
    """What a user gives, the verdict, and words of the message."""

    name: str
    verdict: str
    flags: Callable[[Lab], list[str]]
    says: tuple[str, ...] = ()


def _plain(*flags: str) -> Callable[[Lab], list[str]]:
    return lambda lab: list(flags)


def _right(name: str, flags: Callable[[Lab], list[str]]) -> Situation:
    return Situation(name, "right", flags)


def _refused(name: str, flags: Callable[[Lab], list[str]], *says: str) -> Situation:
    return Situation(name, "refused", flags, says)


def _warned(name: str, flags: Callable[[Lab], list[str]], *says: str) -> Situation:
    return Situation(name, "warned", flags, says)


_CHUNK_OF_4 = ("--policy.chunk_size=4", "--policy.n_action_steps=4")
_IDENTITY = '{"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "IDENTITY"}'
_QUANTILES = '{"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "QUANTILES"}'
_OWN = "--normalization=dataset"

SITUATIONS = [
    # --- flags -------------------------------------------------------------------------------------------
    _right("no flags", _plain()),
    _right("shorter chunks", _plain(*_CHUNK_OF_4)),
    _right("chunks of 6", _plain("--policy.chunk_size=6", "--policy.n_action_steps=6")),
    _right("other token offset", _plain("--policy.fast_skip_tokens=32")),
    _right("room for more tokens", _plain("--policy.max_action_tokens=64", "--policy.max_decoding_steps=64")),
    _right("longer prompts", _plain("--policy.tokenizer_max_length=100")),
    _right("raw actions", _plain(f"--policy.normalization_mapping={_IDENTITY}")),
    _right("one empty camera", _plain("--policy.empty_cameras=1")),
    _right("sampling at inference", _plain("--policy.temperature=0.7")),
    _right("nothing pushed", _plain("--policy.push_to_hub=false")),
    _right("pretrained_path", pretrained_path),
    _right("split without evaluation", _plain("--dataset.eval_split=0.25")),
    _right("images as uint8", _plain("--dataset.return_uint8=true")),
    _refused(
        "fewer steps than the chunk", _plain("--policy.n_action_steps=4"), "n_action_steps=4", "chunk_size=8"
    ),
    _refused("automatic mixed precision", _plain("--policy.use_amp=true"), "--engine.dtype=bfloat16"),
    _refused("push", _plain("--policy.push_to_hub=true"), "--policy.push_to_hub=true", "hf upload"),
    _refused("repository alone", _plain("--policy.repo_id=me/p"), "--policy.repo_id=me/p", "hf upload"),
    _refused(
        "evaluation in an environment", _plain("--env_eval_freq=5"), "--env_eval_freq=5", "--world.name"
    ),
    _refused("episodes of an evaluation", _plain("--eval.n_episodes=5"), "--eval.n_episodes=5"),
    _refused("workers that end", _plain("--persistent_workers=false"), "--persistent_workers=false"),
    _refused("dtype of the policy", _plain("--policy.dtype=bfloat16"), "--engine.dtype=bfloat16"),
    _refused("compiled model", _plain("--policy.compile_model=true"), "--policy.compile_model=true"),
    _refused("relative actions", _plain("--policy.use_relative_actions=true"), "use_relative_actions=true"),
    _refused(
        "other tokenizer", _plain("--policy.text_tokenizer_name=a/b"), "--policy.text_tokenizer_name=a/b"
    ),
    _refused("learning rate of 0", _plain("--policy.optimizer_lr=0"), "--policy.optimizer_lr=0"),
    _refused("another type", _plain("--policy.type=act"), "--policy.type=act", "tiny_pi0_fast"),
    _refused(
        "two statistics at once", _plain("--dataset.use_imagenet_stats=false"), "use_imagenet_stats", _OWN
    ),
    # --- statistics --------------------------------------------------------------------------------------
    _right("degrees with own statistics", lambda lab: [lab.data(scale=90.0), _OWN]),
    _right(
        "another robot with own statistics",
        lambda lab: [lab.data(state_dim=5, action_dim=6), _OWN, "--policy.max_action_tokens=64"],
    ),
    _warned(
        "quantiles of the data",
        lambda lab: [lab.data(), _OWN, f"--policy.normalization_mapping={_QUANTILES}"],
        "exceed what the action tokens can say",
    ),
    _refused(
        "quantiles that are missing", _plain(f"--policy.normalization_mapping={_QUANTILES}"), "q01, q99", _OWN
    ),
    _refused("no statistics", lambda lab: [lab.statistics(lambda name, value: None)], "no statistics", _OWN),
    _refused(
        "no maximum of the action",
        lambda lab: [lab.statistics(lambda name, value: None if name == "action.max" else value)],
        "no statistics (max) of action",
    ),
    _refused(
        "statistics of another robot",
        lambda lab: [lab.statistics(lambda name, value: value[:3].contiguous())],
        "statistics of 3 entries",
    ),
    _refused("degrees", lambda lab: [lab.data(scale=90.0)], "data set", "--normalization=dataset"),
    _refused(
        "gripper of 0 to 100",
        lambda lab: [lab.copied_data(lambda root: scale_column(root, "action", 3, lambda v: 50 * v + 50))],
        "action",
    ),
    _refused(
        "a joint that never moved",
        lambda lab: [
            lab.statistics(lambda name, value: value.index_fill(0, value.new_tensor([1]).long(), 0.0))
        ],
        "observation.state",
    ),
    # --- values ------------------------------------------------------------------------------------------
    _refused("NaN in a state", lambda lab: [lab.damaged_data("nan state")], "episode 1", "frame 5"),
    _refused("Inf in an action", lambda lab: [lab.damaged_data("infinite action")], "episode 1", "frame 5"),
    _warned("NaN that is skipped", nan_in_skip, "episode 1"),
    _refused(
        "a cut picture",
        lambda lab: [lab.damaged_data("cut picture"), "--steps=80"],
        "episode 1, frame 5",
        "cannot be read",
    ),
    _refused("chunks that are cut", _plain("--policy.max_action_tokens=6"), "max_action_tokens"),
    _refused("prompts that are cut", _plain("--policy.tokenizer_max_length=12"), "tokenizer_max_length"),
    # --- data sets ---------------------------------------------------------------------------------------
    _right("one episode", lambda lab: [lab.data(episodes_per_task=1, frames=20)]),
    _right("another rate", lambda lab: [lab.data(fps=30)]),
    _right("pictures of another size", lambda lab: [lab.data(image_size=(48, 96))]),
    _right("a blank and a hash in the path", named("my data #1")),
    _right("a colon in the path", named("data: new")),
    _refused("another robot", lambda lab: [lab.data(action_dim=6)], "action has 6 entries", _OWN),
    _refused("fewer states", lambda lab: [lab.data(state_dim=3)], "observation.state has 3 entries"),
    _refused(
        "no action", lambda lab: [lab.copied_data(lambda root: drop_column(root, "action"))], "no action"
    ),
    _refused("an old format", lambda lab: [lab.edited_info(codebase_version="v2.1")], "v2.1", "convert"),
    _refused(
        "a data file that is gone",
        lambda lab: [lab.copied_data(lambda root: next((root / "data").rglob("*.parquet")).unlink())],
        "--dataset.root",
    ),
    _refused("episodes that are not there", _plain("--dataset.episodes=[0,9]"), "--dataset.episodes", "9"),
    _refused("several data sets", _plain("--dataset.repo_id=[a/b,c/d]"), "--dataset.repo_id"),
    _refused("no folder", _plain("--dataset.root=/nowhere"), "--dataset.root=/nowhere"),
    _warned(
        "more held out than promised", _plain("--eval_freq=1", "--max_eval_samples=2"), "warning", "held out"
    ),
    # --- cameras -----------------------------------------------------------------------------------------
    _right("renamed by the flag", lambda lab: [lab.data(cameras=("front",)), RENAME]),
    _right("renamed by the policy", lambda lab: [lab.renaming_policy(), lab.data(cameras=("front",))]),
    _right("named already", lambda lab: [lab.renaming_policy()]),
    _right("a camera too many", lambda lab: [lab.data(cameras=("top", "other"))]),
    _warned(
        "masked camera", lambda lab: [lab.policy(cameras=2), "--allow_missing_cameras=true"], SIDE, "missing"
    ),
    _refused("missing camera", lambda lab: [lab.policy(cameras=2)], SIDE, "--allow_missing_cameras"),
    _refused(
        "no camera",
        lambda lab: [lab.data(cameras=("a",)), "--allow_missing_cameras=true"],
        TOP,
        "--rename_map",
    ),
    _refused("two cameras of one name", two_names, FRONT, TOP, "--rename_map"),
    # --- anchors -----------------------------------------------------------------------------------------
    _warned(
        "an ε that cannot be met",
        lambda lab: craft_flags(lab.inputs.anchors),
        "never be met",
        "epsilon_relative",
    ),
    _refused("anchors of other statistics", other_statistics, "min of action[0]", "-2.2 in the policy"),
    _refused(
        "anchors of other chunks",
        lambda lab: [*craft_flags(lab.inputs.anchors), *_CHUNK_OF_4],
        "chunk_size 8 in the cache, 4 in the policy",
    ),
    _refused(
        "anchors and own statistics",
        lambda lab: [*craft_flags(lab.inputs.anchors), _OWN],
        "does not fit the policy",
    ),
    _refused("anchors of other names", old_names, "action", "pan", "lift"),
    _warned("anchors at another rate", faster_data, "20 fps", "10"),
    _refused(
        "nothing held out", single_episode_anchors, "--craft.constraint_split=train", "--heldout_fraction"
    ),
    _warned("a task that is not measured", partly_measured_anchors, "no held-out anchors"),
]

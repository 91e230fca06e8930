"""Runs with other statistics, renamed or missing cameras, and paths: what is saved is what trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import ACTION
from runs import losses
from safetensors.torch import load_file
from torch.utils.data import default_collate

from craft_ds.data.batch_partition import StepPartition
from craft_ds.data.policy_input import images_to_float
from craft_ds.data.task_data import StepSampler
from craft_ds.policies.loading import load_policy, load_policy_config, load_processors
from craft_ds.testing.datasets import make_test_dataset
from craft_ds.testing.perfect_tokens import decode_perfect_tokens
from craft_ds.testing.policies import make_test_policy_dir

pytestmark = pytest.mark.slow

FRONT = '{"observation.images.front": "observation.images.top"}'


@pytest.fixture(scope="module")
def degrees(tmp_path_factory):
    """A data set whose state and action are far outside the policy's statistics."""
    return make_test_dataset(
        tmp_path_factory.mktemp("degrees") / "data", tasks=1, episodes_per_task=3, scale=90.0, seed=3
    )


def test_statistics_of_the_data_set_train_and_are_saved(train, inputs, degrees, tmp_path):
    final = tmp_path / "run" / "final"
    assert train(tmp_path / "run", f"--dataset.root={degrees}", "--normalization=dataset").status == 0
    dataset = LeRobotDataset("craft-ds/test", root=degrees, video_backend="pyav")
    state = load_file(next(final.glob("policy_postprocessor*.safetensors")))
    np.testing.assert_allclose(state["action.max"], dataset.meta.stats["action"]["max"], rtol=1e-6)
    found, recorded = decode_perfect_tokens(final, degrees)
    assert (found - recorded).abs().mean() < 0.1 * 90
    resumed = ["--resume=true", "--steps=5", f"--output_dir={tmp_path / 'on'}"]
    assert train(None, f"--config_path={final}/train_config.json", *resumed).status == 0
    again = load_file(next((tmp_path / "on" / "final").glob("policy_postprocessor*.safetensors")))
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_a_data_set_of_another_width_trains_with_its_own(train, tmp_path):
    six = make_test_dataset(tmp_path / "six", tasks=1, episodes_per_task=2, state_dim=5, action_dim=6)
    flags = [f"--dataset.root={six}", "--normalization=dataset", "--policy.max_action_tokens=64"]
    assert train(tmp_path / "run", *flags).status == 0
    final = tmp_path / "run" / "final"
    config = json.loads((final / "config.json").read_text())
    assert config["output_features"]["action"]["shape"] == [6]
    assert config["input_features"]["observation.state"]["shape"] == [5]
    found, recorded = decode_perfect_tokens(final, six)
    assert found.shape == recorded.shape
    assert (found - recorded).abs().mean() < 0.1


def test_the_statistics_cannot_change_within_a_run(train, tmp_path):
    train(tmp_path / "run")
    config = f"--config_path={tmp_path}/run/final/train_config.json"
    flags = ["--resume=true", "--steps=5", f"--output_dir={tmp_path / 'on'}", "--normalization=dataset"]
    ended = train(None, config, *flags)
    assert ended.status == 2
    assert "--normalization=dataset, but the checkpoint was trained with policy" in ended.errors


@pytest.mark.distributed
def test_two_ranks_save_what_one_does(train, inputs, degrees, fork_server, tmp_path):
    flags = [f"--dataset.root={degrees}", "--normalization=dataset", "--steps=2", f"--rename_map={FRONT}"]
    flags += ["--policy.chunk_size=4", "--policy.n_action_steps=4"]
    assert train(tmp_path / "one", *flags, "--batch_size=4").status == 0
    fork_server.run([*inputs.flags(tmp_path / "two"), *flags, "--engine=fsdp"], 2).check()
    for file in ("config.json", "policy_preprocessor.json", "policy_postprocessor.json"):
        one, two = ((tmp_path / name / "final" / file).read_text() for name in ("one", "two"))
        assert two.replace(str(tmp_path / "two"), "") == one.replace(str(tmp_path / "one"), "")
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)


# --- cameras --------------------------------------------------------------------------------------------


def test_a_renamed_camera_is_saved_with_the_policy(train, refuses, tmp_path):
    front = make_test_dataset(tmp_path / "front", tasks=1, episodes_per_task=4, cameras=("front",), seed=5)
    data = f"--dataset.root={front}"
    line = refuses(tmp_path / "run", data)
    assert "lacks the policy's camera observation.images.top" in line
    assert "--rename_map" in line
    assert train(tmp_path / "run", data, f"--rename_map={FRONT}").status == 0
    policy = f"--policy.path={tmp_path / 'run' / 'final'}"
    # The saved policy renames by itself, and accepts data that has the policy's name already.
    assert train(tmp_path / "renamed", data, policy).status == 0
    assert train(tmp_path / "named", policy).status == 0
    assert losses(tmp_path / "renamed") == pytest.approx(losses(tmp_path / "named"), rel=1e-6)


def test_a_missing_camera_is_masked_on_request(train, refuses, inputs, tmp_path):
    policy = make_test_policy_dir(tmp_path / "policy", cameras=2)
    flag = f"--policy.path={policy}"
    line = refuses(tmp_path / "run", flag)
    assert "camera observation.images.side1" in line
    assert "--allow_missing_cameras" in line
    assert train(tmp_path / "run", flag, "--allow_missing_cameras=true", "--steps=1").status == 0
    config = load_policy_config(policy)
    pre, _ = load_processors(config, policy)
    chunk = {ACTION: [step / 10 for step in range(config.chunk_size)]}
    dataset = LeRobotDataset("craft-ds/test", root=inputs.new, delta_timestamps=chunk, video_backend="pyav")
    rows = StepSampler(len(dataset), StepPartition(2, 1, 1), 0, 1000).draw(range(2))
    batch = pre(images_to_float(default_collate([dataset[row] for row in rows])))
    loss, _ = load_policy(config, policy).forward(batch)  # LeRobot's own
    assert losses(tmp_path / "run") == [pytest.approx(loss.item(), rel=1e-5)]


# --- directories ------------------------------------------------------------------------------------------


def test_a_run_resumes_from_another_directory(train, inputs, tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    (tmp_path / "a" / "data").symlink_to(inputs.new)
    assert train(Path("runs/x"), "--dataset.root=data", "--steps=2", "--save_freq=1").status == 0
    monkeypatch.chdir(tmp_path / "b")
    run = tmp_path / "a" / "runs" / "x"
    resume = [f"--config_path={run}/step_000001/train_config.json", "--resume=true"]
    assert train(None, *resume, "--output_dir=elsewhere").status == 0
    assert (tmp_path / "b" / "elsewhere" / "final").is_dir()
    (run / "final").rename(tmp_path / "a" / "old")
    assert train(None, *resume).status == 0
    assert (run / "final").is_dir()
    assert not (tmp_path / "b" / "runs").exists()

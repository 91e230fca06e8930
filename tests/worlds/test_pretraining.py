import json
import math

import pytest
import torch
from safetensors.torch import load_file

from craft_ds.cli import run_command
from craft_ds.policies.loading import load_policy, load_policy_config, load_processors
from craft_ds.worlds import make_world
from craft_ds.worlds.base import ACTION, STATE
from craft_ds.worlds.demonstrations import Recipe, write_demonstrations
from craft_ds.worlds.evaluation import demonstration_loss
from craft_ds.worlds.pretraining import pretrain, robot_bounds


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Demonstrations of the blocks and a teacher trained on them for a few steps."""
    root = tmp_path_factory.mktemp("teacher")
    old, _ = write_demonstrations(Recipe("blocks", episodes_per_task=3), root / "data", processes=1)
    pretrain(make_world("blocks"), old, root / "teacher", steps=30, seed=0)
    return root


def test_the_directory_is_a_trained_policy_in_half_precision(made):
    config = load_policy_config(made / "teacher")
    assert config.type == "tiny_pi0_fast"
    policy, (preprocessor, _) = (
        load_policy(config, made / "teacher"),
        load_processors(config, made / "teacher"),
    )
    weights = load_file(made / "teacher" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert sum(value.nbytes for value in weights.values()) < 2.1e6
    losses = demonstration_loss(policy, preprocessor, made / "data" / "old")
    world = make_world("blocks")
    assert set(losses) == {world.task_text(task) for task in world.old_tasks}
    for loss in losses.values():
        assert loss < 0.8 * math.log(config.vocab_size)  # chance


def test_stored_paths_are_relative(made):
    for file in (made / "teacher").glob("*.json"):
        assert str(made) not in file.read_text(), file


def test_the_bounds_are_those_of_the_robot():
    bounds = robot_bounds(make_world("blocks"))
    assert set(bounds) == {STATE, ACTION}
    assert bounds[ACTION]["max"].tolist() == [1.0, 1.0]


def test_eval_writes_success_and_loss_by_task(made, monkeypatch, capsys):
    flags = ["--world", "blocks", "--episodes", "1", "--data_root", str(made / "data")]
    output = made / "eval" / "result.json"
    run_command("eval", [f"--policy.path={made / 'teacher'}", *flags, "--output", str(output)])
    result = json.loads(output.read_text())
    assert set(result["success"]) == set(result["loss"]) == set(make_world("blocks").tasks("all"))
    printed = capsys.readouterr().out
    assert all(task in printed for task in result["success"])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--policy.path=nowhere"], "nowhere"),
        (["--policy.path=x", "--data_root=nowhere"], "--data_root nowhere"),
        (["--policy.path=x", "--episodes=0"], "--episodes"),
    ],
)
def test_eval_names_the_bad_flag(flags, named, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command("eval", ["--world=blocks", *flags])
    assert ended.value.code == 2
    assert named in capsys.readouterr().err

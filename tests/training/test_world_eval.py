"""The flags `--world.*`, and evaluation without effect on training."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

import craft_ds.training.world_eval
import craft_ds.worlds
from craft_ds.errors import UserError
from craft_ds.policies.loading import load_policy_config
from craft_ds.testing.policies import make_test_policy_dir
from craft_ds.training.world_eval import WorldEvalConfig, check_world, evaluate_in_world

TEACHER = Path(craft_ds.worlds.__file__).parent / "assets" / "blocks_teacher"


@pytest.mark.parametrize(
    ("config", "eval_freq", "message"),
    [
        (
            WorldEvalConfig(name="marbles"),
            5,
            "--world.name=marbles is unknown: choose one of",
        ),
        (WorldEvalConfig(tasks=["reach-red"]), 5, "--world.tasks needs --world.name"),
        (WorldEvalConfig(name="blocks", episodes=0), 5, "--world.episodes=0 must be at least 1"),
        (WorldEvalConfig(name="blocks", seed=-1), 5, "--world.seed=-1 must not be negative"),
        (WorldEvalConfig(name="blocks"), 0, "--world.name=blocks is evaluated every --eval_freq steps"),
    ],
)
def test_contradictory_world_flags_are_refused(config, eval_freq, message):
    with pytest.raises(UserError, match=message):
        config.validate(eval_freq)


def test_no_world_is_no_evaluation():
    config = WorldEvalConfig()
    config.validate(eval_freq=0)
    check_world(config, load_policy_config(TEACHER))
    assert evaluate_in_world(config, None, None, None, 0, 1) == {}


def test_a_world_needs_the_tasks_and_a_policy_made_for_it(tmp_path):
    teacher = load_policy_config(TEACHER)
    check_world(WorldEvalConfig(name="blocks", tasks=["reach-blue"]), teacher)
    with pytest.raises(UserError, match=r"--world.tasks: blocks has no task reach-pink: choose among"):
        check_world(WorldEvalConfig(name="blocks", tasks=["reach-pink"]), teacher)
    other = load_policy_config(make_test_policy_dir(tmp_path / "four"))
    with pytest.raises(UserError, match=r"has 2 numbers in observation\.state, but the policy has \[4\]"):
        check_world(WorldEvalConfig(name="blocks"), other)
    other = load_policy_config(make_test_policy_dir(tmp_path / "two_cameras", cameras=2))
    with pytest.raises(UserError, match=r"but the policy uses"):
        check_world(WorldEvalConfig(name="blocks"), other)


def test_missing_rendering_is_reported_once_per_node(metaworld, monkeypatch, set_launch):
    teacher = load_policy_config(TEACHER.with_name("metaworld_teacher"))
    monkeypatch.setattr(craft_ds.training.world_eval, "gl_problem", lambda: "no EGL here: install it")
    with pytest.raises(UserError, match=r"--world.name=metaworld: no EGL here: install it"):
        check_world(WorldEvalConfig(name="metaworld"), teacher)
    set_launch(1, 2)
    check_world(WorldEvalConfig(name="metaworld"), teacher)


def test_an_evaluation_restores_every_generator():
    def act(batch):
        random.random(), np.random.random(), torch.rand(1)
        return torch.zeros(len(batch["task"]), 8, 2)

    def draws():
        return random.random(), np.random.random(), torch.rand(1).item()

    def seed():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)

    seed()
    expected = draws()
    seed()
    config = WorldEvalConfig(name="blocks", tasks=["reach-red", "reach-yellow"], episodes=2)
    success = evaluate_in_world(config, act, lambda batch: batch, lambda chunk: chunk, 0, 1)
    assert success == {"eval/success/reach-red": 0.0, "eval/success/reach-yellow": 0.0}
    assert draws() == expected

import os
import subprocess
import sys

import numpy as np
import pytest

from craft_ds.cli import run_command
from craft_ds.worlds import make_world
from craft_ds.worlds.demonstrations import open_demonstrations, read_recipe
from craft_ds.worlds.tasks import CW5, CW10, TASKS

# pytest resets the filter that the module sets.
pytestmark = pytest.mark.filterwarnings(r"ignore:Constant\(s\) may be too high")


@pytest.fixture
def world(metaworld):
    return make_world("cw10")


def test_the_start_policy_knows_none_of_the_ten_tasks():
    assert TASKS["cw10"].new == CW10
    assert CW10[:5] == CW5
    assert not set(TASKS["cw10"].old) & set(CW10)


def test_a_fresh_process_renders_it(metaworld):
    program = """
from craft_ds.worlds import make_world
world = make_world("cw10")
world.reset("reach-v3", 0)
assert world.observe().image.std() > 10
"""
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("task", ["push-v3", "push-back-v3"])
def test_the_expert_solves_every_scene(world, task):
    """Without the goal it solves none of the first task; with it three quarters of those of the second."""
    for seed in range(4):
        world.reset(task, seed)
        assert not world.success
        assert world._expert_solves()


def test_a_redrawn_scene_is_remembered_and_the_same_in_every_world(world, monkeypatch):
    monkeypatch.setattr(type(world), "_redraws", {})
    solves = iter([False, False, True])
    monkeypatch.setattr(type(world), "_expert_solves", lambda _: next(solves))
    world.reset("push-v3", 4)
    assert world._redraws == {("push-v3", 4): 2}
    state = world.observe().state
    again = make_world("cw10")
    again.reset("push-v3", 4)  # asks no expert: `solves` has ended
    np.testing.assert_array_equal(again.observe().state, state)
    np.testing.assert_array_equal(again.observe().image, world.observe().image)
    monkeypatch.setattr(type(world), "_redraws", {})
    monkeypatch.setattr(type(world), "_expert_solves", lambda _: False)
    with pytest.raises(RuntimeError, match="push-v3"):
        world.reset("push-v3", 4)


def test_the_state_holds_positions_relative_to_the_hand(world):
    world.reset("stick-pull-v3", 0)
    raw, state = world._raw, world.observe().state
    assert state.shape == (len(world.state_names),) == (13,)
    np.testing.assert_allclose(state[:4], raw[:4], atol=1e-6)
    stick, box, goal = state[4:].reshape(3, 3)
    np.testing.assert_allclose(goal, (world._env._target_pos - raw[:3]).clip(-0.3, 0.3), atol=1e-6)
    np.testing.assert_allclose(stick, raw[4:7] - raw[:3], atol=1e-6)
    for _ in range(5):
        world.step(np.array([0.0, 1.0, 0.0, 0.0]))
    moved = world.observe().state
    assert moved[5] < state[5] - 0.01  # the hand comes closer
    assert moved[8] != box[1]


def test_an_absent_object_is_where_no_other_is(world):
    world.reset("push-v3", 0)
    assert (world.observe().state[7:10] == np.float32(-0.3)).all()


def test_recording_by_task_writes_a_data_set_each(metaworld, tmp_path, capsys):
    flags = ["--world", "cw10", "--episodes_per_task", "1", "--processes", "1", "--drift", "1.0"]
    tasks = ["handle-press-side-v3", "faucet-close-v3"]
    run_command("worlds", ["record", *flags, "--output_dir", str(tmp_path / "data"), "--tasks", *tasks])
    assert read_recipe(tmp_path / "data").tasks == tuple(tasks)
    world = make_world("cw10")
    for task in tasks:
        data_set = open_demonstrations(tmp_path / "data" / task, world.chunk_size)
        assert data_set.num_episodes == 1
        assert data_set[0]["task"] == world.task_text(task)
        low, high = np.float32(world.state_range)
        states = np.array(data_set.hf_dataset["observation.state"])
        assert (states >= low).all()
        assert (states <= high).all()

import os
import subprocess
import sys

import numpy as np
import pytest

from craft_ds.cli import run_command
from craft_ds.worlds import make_world
from craft_ds.worlds.base import IMAGE_SIZE
from craft_ds.worlds.demonstrations import open_demonstrations, read_recipe
from craft_ds.worlds.tasks import CW5, CW10, TASKS
from craft_ds.worlds.vision_pretraining import record_scenes

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
    goal = world.positions()[-1]
    again = make_world("cw10")
    again.reset("push-v3", 4)  # asks no expert: `solves` has ended
    np.testing.assert_array_equal(again.positions()[-1], goal)
    np.testing.assert_array_equal(again.observe().image, world.observe().image)
    monkeypatch.setattr(type(world), "_redraws", {})
    monkeypatch.setattr(type(world), "_expert_solves", lambda _: False)
    with pytest.raises(RuntimeError, match="push-v3"):
        world.reset("push-v3", 4)


def test_the_camera_follows_the_hand(world):
    """The hand stays where it is in the image, and the goal's green sphere moves against it."""
    world.reset("push-v3", 2)
    places = []
    for _ in range(2):
        image = world.observe().image.astype(int)
        assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        red, green, blue = image.transpose(2, 0, 1)
        goal = np.argwhere((green > 150) & (red < 120) & (blue < 120)).mean(axis=0)
        hand = np.argwhere((green > 110) & (blue > 110) & (red < 90)).mean(axis=0)  # one finger is cyan
        places.append((hand, goal, world.positions()[-1, :2]))
        for _ in range(8):
            world.step(np.array([0.0, 1.0, 0.0, 0.0]))
    (hand, goal, position), (later_hand, later_goal, later_position) = places
    assert np.abs(hand - later_hand).max() < 2
    assert later_position[1] < position[1] - 0.03
    assert later_goal[1] < goal[1] - 3  # the hand moved to the right


def test_positions_are_relative_to_the_hand(world):
    world.reset("stick-pull-v3", 0)
    stick, object_, goal = world.positions()
    np.testing.assert_allclose(goal, world._env._target_pos - world._raw[:3], atol=1e-6)
    assert not np.isnan([stick, object_]).any()
    world.reset("push-v3", 0)
    assert np.isnan(world.positions()[1]).all()


def test_scenes_show_their_task(metaworld):
    one, other = record_scenes("cw10", ["push-v3", "reach-v3"], count=5, seed=3, processes=1)
    assert one.images.shape == (5, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert one.positions.shape == other.positions.shape == (5, 3, 3)
    assert len(np.unique(one.images, axis=0)) == 5
    again = record_scenes("cw10", ["push-v3"], count=5, seed=3, processes=1)[0]
    np.testing.assert_array_equal(again.images, one.images)


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
        low, high = world.state_range
        states = np.array(data_set.hf_dataset["observation.state"])
        assert (states >= low).all()
        assert (states <= high).all()

import numpy as np
import pytest

from craft_ds.worlds import make_world
from craft_ds.worlds.base import IMAGE_SIZE, scene_seed
from craft_ds.worlds.blocks import Blocks


@pytest.mark.parametrize("task", Blocks.tasks("all"))
def test_the_expert_solves_every_scene_within_the_horizon(task):
    world = make_world("blocks")
    for seed in range(50):
        world.reset(task, seed)
        assert not world.success
        for _ in range(world.horizon):
            world.step(world.expert())
        assert world.success


def test_a_seed_determines_the_scene():
    one, other = Blocks(), Blocks()
    other.reset("reach-blue", 3)
    other.step(other.expert())
    one.reset("reach-red", 7)
    other.reset("reach-red", 7)
    np.testing.assert_array_equal(one.observe().image, other.observe().image)
    np.testing.assert_array_equal(one.observe().state, other.observe().state)
    other.reset("reach-red", 8)
    assert (one.observe().image != other.observe().image).any()


def test_the_image_shows_hand_and_target_at_their_positions():
    world = Blocks()
    for seed in range(20):
        world.reset("reach-green", seed)
        observation = world.observe()
        assert observation.image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        assert observation.image.dtype == np.uint8
        x, y = np.round(observation.state * (IMAGE_SIZE - 1)).astype(int)
        assert tuple(observation.image[y, x]) == (255, 255, 255)
        green = np.argwhere((observation.image == (40, 190, 60)).all(-1))
        if np.abs(observation.state - world.expert()).max() > 0.2:  # the hand does not cover the block
            centre = green.mean(0)[::-1] / (IMAGE_SIZE - 1)
            np.testing.assert_allclose(centre, world.expert(), atol=0.01)


def test_the_hand_has_a_speed_limit_and_stays_on_the_table():
    world = Blocks()
    world.reset("reach-red", 0)
    before = world.observe().state
    world.step(np.array([5.0, -5.0]))
    after = world.observe().state
    assert 0 < np.linalg.norm(after - before) < 0.051
    for _ in range(60):
        world.step(np.array([5.0, -5.0]))
    np.testing.assert_allclose(world.observe().state, [1.0, 0.0], atol=1e-6)


def test_passing_over_the_block_is_not_a_success():
    world = Blocks()
    world.reset("reach-red", 1)
    start, target = world.observe().state, world.expert()
    beyond = np.clip(target + 0.3 * (target - start) / np.linalg.norm(target - start), 0, 1)
    for _ in range(world.horizon):
        world.step(beyond)
        assert not world.success


def test_all_tasks_are_the_disjoint_old_and_new_ones():
    assert not set(Blocks.old_tasks) & set(Blocks.new_tasks)
    assert Blocks.tasks("all") == Blocks.tasks("old") + Blocks.tasks("new")
    assert {Blocks.task_text(task) for task in Blocks.tasks("all")} <= set(Blocks.texts())


def test_demonstrations_and_evaluations_share_no_scene():
    demonstrations = {scene_seed(seed, i, evaluation=False) for seed in (0, 1, 1000) for i in range(200)}
    evaluations = {scene_seed(seed, i, evaluation=True) for seed in (0, 1, 1000) for i in range(200)}
    assert not demonstrations & evaluations
    assert len(demonstrations) == len(evaluations) == 600

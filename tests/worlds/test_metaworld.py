import numpy as np
import pytest

from craft_ds.worlds.base import IMAGE_SIZE
from craft_ds.worlds.recording import record_episode

# pytest resets the filter that the module sets.
pytestmark = pytest.mark.filterwarnings(r"ignore:Constant\(s\) may be too high")

TASKS = ("button-press-topdown-v3", "drawer-close-v3", "handle-press-side-v3", "faucet-close-v3")


@pytest.mark.parametrize("task", TASKS)
def test_the_noisy_expert_stays_within_the_robots_ranges(metaworld, task):
    world = metaworld()
    rng = np.random.default_rng(0)
    for seed in range(5):
        world.reset(task, seed)
        states, actions = [], []
        while not world.success:
            assert len(actions) < world.horizon
            states.append(world._raw[:4])
            actions.append(world.expert())
            world.step(actions[-1] + rng.normal(0, 0.15, 4))
        for values, (low, high) in ((states, world.state_range), (actions, world.action_range)):
            assert (np.min(values, axis=0) >= low).all()
            assert (np.max(values, axis=0) <= high).all()


def test_a_seed_determines_the_scene(metaworld):
    fresh, used = metaworld(), metaworld()
    used.reset(TASKS[1], 5)
    for _ in range(30):
        used.step(used.expert())
    fresh.reset(TASKS[1], 9)
    used.reset(TASKS[1], 9)
    for _ in range(20):
        np.testing.assert_array_equal(fresh.observe().state, used.observe().state)
        fresh.step(fresh.expert())
        used.step(used.expert())
    np.testing.assert_array_equal(fresh.observe().image, used.observe().image)


def test_parallel_episodes_have_separate_scenes(metaworld):
    one, other = metaworld(), metaworld()
    one.reset(TASKS[0], 1)
    alone = one.observe().image
    other.reset(TASKS[0], 2)
    assert (other.observe().image != alone).mean() > 0.01
    np.testing.assert_array_equal(one.observe().image, alone)
    assert len(metaworld._renderers) == len(set(metaworld._renderers))


def test_the_picture_is_upright_with_the_robot_on_the_left(metaworld):
    world = metaworld()
    world.reset(TASKS[0], 0)
    image = world.observe().image
    assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert image.dtype == np.uint8
    red, green, blue = image.astype(int).transpose(2, 0, 1)
    robot = np.argwhere((red > 100) & (green < 60) & (blue < 60))
    assert len(robot) > 50
    assert robot[:, 1].mean() < 0.4 * IMAGE_SIZE
    grey_wall, brown_table = (part.mean((0, 1)) for part in (image[:16, -16:], image[-16:, -32:-16]))
    assert np.ptp(grey_wall) < 10
    assert brown_table[0] - brown_table[2] > 25


def test_stepping_renders_nothing(metaworld, monkeypatch):
    def fail(*_):
        raise AssertionError("rendered")

    monkeypatch.setattr("craft_ds.worlds.metaworld._build_renderer", fail)
    monkeypatch.setattr(metaworld, "_renderers", {})
    world = metaworld()
    world.reset(TASKS[2], 0)
    while not world.success:
        world.step(world.expert())


def test_a_recorded_episode_shows_the_clean_expert(metaworld):
    episode = record_episode(metaworld(), TASKS[2], seed=3)
    length = len(episode.actions)
    assert episode.images.shape == (length, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert episode.states.shape == episode.actions.shape == (length, 4)
    world = metaworld()
    world.reset(TASKS[2], 3)
    np.testing.assert_array_equal(episode.actions[0], world.expert())
    again = record_episode(world, TASKS[2], seed=3)
    for first, second in zip(episode, again, strict=True):
        np.testing.assert_array_equal(first, second)


def test_the_texts_are_lerobots(metaworld):
    texts = metaworld.texts()
    assert len(texts) == 50
    assert {metaworld.task_text(task) for task in TASKS} <= set(texts)

"""`craft-ds worlds record --policy.path`: a policy's own episodes, and anchors made of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluation import FindsColours, FindsUpperHalf

import craft_ds.worlds
from craft_ds.anchors.build import BuildOptions, build_anchor_cache
from craft_ds.anchors.build_plan import _rollouts
from craft_ds.anchors.cache import AnchorCache
from craft_ds.cli import run_command
from craft_ds.errors import UserError
from craft_ds.worlds import make_world
from craft_ds.worlds.base import ACTION, CAMERA, STATE, scene_seed
from craft_ds.worlds.demonstrations import open_demonstrations
from craft_ds.worlds.evaluation import ClosedLoopPolicy
from craft_ds.worlds.rollouts import ROLLOUTS_FILE, run_episodes, write_rollouts

TEACHER = Path(craft_ds.worlds.__file__).parent / "assets" / "blocks_teacher"


def closed_loop(known, policy=FindsColours):
    return ClosedLoopPolicy(policy(known), lambda batch: batch, lambda chunk: chunk)


def write(output, policy, tasks, scenes, **options):
    world = make_world("blocks")
    return write_rollouts(policy, world, tasks, output, scenes=scenes, seed=0, name="finder", **options)


def test_an_episode_replays_to_its_images_and_success():
    world = make_world("blocks")
    seeds = [scene_seed(0, number, evaluation=False) for number in range(3)]
    for episode, success in run_episodes(closed_loop({"red"}), world, "reach-red", seeds):
        assert success
        seed = seeds.pop(0)
        world.reset("reach-red", seed)
        for image, state, action in zip(*episode, strict=True):
            assert not world.success
            observation = world.observe()
            np.testing.assert_array_equal(observation.image, image)
            np.testing.assert_array_equal(observation.state, state)
            world.step(action)
        assert world.success


def test_episodes_that_fail_end_at_the_horizon():
    world = make_world("blocks")
    ((episode, success),) = run_episodes(closed_loop(set()), world, "reach-red", [1])
    assert not success
    assert len(episode.actions) == len(episode.images) == world.horizon


def test_the_data_set_holds_the_solved_scenes_of_alternating_tasks(tmp_path):
    tasks = ("reach-red", "reach-green")
    solved = write(tmp_path / "data", closed_loop({"red", "green"}), tasks, scenes=18)
    assert solved == {"reach-red": 18, "reach-green": 18}
    data_set = open_demonstrations(tmp_path / "data", 8)
    assert data_set.num_episodes == 36
    world = make_world("blocks")
    texts = [data_set.meta.episodes["tasks"][number] for number in range(4)]
    assert texts == [[world.task_text(task)] for task in (*tasks, *tasks)]
    ((episode, _),) = run_episodes(
        closed_loop({"red"}), world, "reach-red", [scene_seed(0, 0, evaluation=False)]
    )
    sample = data_set[0]
    image = (sample[CAMERA] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(image, episode.images[0])
    np.testing.assert_array_equal(sample[STATE].numpy(), episode.states[0])
    np.testing.assert_array_equal(sample[ACTION].numpy()[: len(episode.actions)], episode.actions[:8])


def test_failures_are_kept_on_demand_alone(tmp_path):
    some = closed_loop({"red"}, FindsUpperHalf)
    solved = write(tmp_path / "solved", some, ("reach-red",), scenes=5)
    assert 0 < solved["reach-red"] < 5
    assert open_demonstrations(tmp_path / "solved", 8).num_episodes == solved["reach-red"]
    assert write(tmp_path / "all", some, ("reach-red",), scenes=5, keep_failures=True) == solved
    assert open_demonstrations(tmp_path / "all", 8).num_episodes == 5


def test_a_task_without_episodes_is_an_error(tmp_path):
    with pytest.raises(UserError, match="solves none of 2 scenes of reach-blue"):
        write(tmp_path / "data", closed_loop({"red"}), ("reach-red", "reach-blue"), scenes=2)
    assert not list(tmp_path.iterdir())


def test_anchors_of_the_teachers_own_episodes(tmp_path, capsys):
    """From the command that records to the metadata of the cache."""
    output = tmp_path / "rollouts"
    flags = ["--world", "blocks", f"--policy.path={TEACHER}", "--episodes_per_task", "3"]
    run_command("worlds", ["record", *flags, "--output_dir", str(output)])
    record = json.loads((output / "rollouts.json").read_text())
    assert "reach-red: " in capsys.readouterr().out
    assert record["policy"] == str(TEACHER)
    assert all(1 <= count <= 3 for count in record["solved"].values())
    assert open_demonstrations(output, 8).num_episodes == sum(record["solved"].values())
    build_anchor_cache(
        BuildOptions(
            dataset_repo_id="craft-ds/blocks-rollouts",
            dataset_root=str(output),
            policy_path=str(TEACHER),
            output_dir=str(tmp_path / "cache"),
            num_samples=9,
            num_workers=0,
        )
    )
    cache = AnchorCache.open(tmp_path / "cache")
    world = make_world("blocks")
    assert cache.tasks == [world.task_text(task) for task in world.old_tasks]
    assert cache.metadata["dataset"]["rollouts"] == record

    for content in (
        "{",
        "[]",
        json.dumps(record | {"policy": "x" * 5000}),
        json.dumps(record | {"solved": 3}),
    ):
        (output / ROLLOUTS_FILE).write_text(content)
        with pytest.raises(UserError, match="is damaged"):
            _rollouts(output)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--keep_failures"], "--keep_failures has no effect without --policy.path"),
        (["--policy.path=a", "--processes", "3"], "--processes has no effect with --policy.path"),
        (["--policy.path=a", "--noise", "0"], "--noise has no effect with --policy.path"),
        (["--tasks", "reach-pink"], "blocks has no task reach-pink"),
    ],
)
def test_flags_without_an_effect_are_refused(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command("worlds", ["record", "--world", "blocks", f"--output_dir={tmp_path / 'data'}", *flags])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err

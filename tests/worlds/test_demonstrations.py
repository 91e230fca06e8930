import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from craft_ds.cli import run_command
from craft_ds.errors import UserError
from craft_ds.worlds import make_world
from craft_ds.worlds.base import ACTION, CAMERA, STATE, scene_seed
from craft_ds.worlds.demonstrations import Recipe, open_demonstrations, read_recipe, write_demonstrations
from craft_ds.worlds.recording import record_episode

RECIPE = Recipe("blocks", episodes_per_task=2)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    return write_demonstrations(RECIPE, tmp_path_factory.mktemp("world") / "data", processes=1)


def test_the_data_set_holds_the_experts_episodes(demonstrations):
    world = make_world("blocks")
    for root, tasks in zip(demonstrations, (world.old_tasks, world.new_tasks), strict=True):
        data_set = open_demonstrations(root, world.chunk_size)
        assert data_set.num_episodes == 2 * len(tasks)
        start = 0
        for index in range(data_set.num_episodes):
            task = tasks[index % len(tasks)]  # the tasks alternate
            seed = scene_seed(RECIPE.seed, index // len(tasks), evaluation=False)
            episode = record_episode(world, task, seed)
            sample = data_set[start]
            assert sample["task"] == world.task_text(task)
            assert sample[CAMERA].dtype == sample[STATE].dtype == sample[ACTION].dtype == torch.float32
            image = (sample[CAMERA] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(image, episode.images[0])
            np.testing.assert_array_equal(sample[STATE].numpy(), episode.states[0])
            chunk = episode.actions[: world.chunk_size]
            assert sample[ACTION].shape == (world.chunk_size, 2)
            np.testing.assert_array_equal(sample[ACTION].numpy()[: len(chunk)], chunk)
            start += len(episode.actions)
        assert start == data_set.num_frames


def test_the_data_do_not_depend_on_the_number_of_processes(demonstrations, tmp_path):
    parallel = write_demonstrations(RECIPE, tmp_path / "data", processes=2)
    for one, other in zip(demonstrations, parallel, strict=True):
        files = sorted(path.relative_to(one) for path in one.rglob("*.parquet"))
        assert files
        for file in files:
            # The tables, not the bytes: the files' metadata has a random fingerprint.
            assert pq.read_table(one / file).equals(pq.read_table(other / file)), file


def test_a_complete_set_is_reused_and_another_refused(demonstrations):
    directory = demonstrations[0].parent
    assert read_recipe(directory) == RECIPE
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert write_demonstrations(RECIPE, directory) == demonstrations
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
    with pytest.raises(UserError, match="--output_dir"):
        write_demonstrations(Recipe("blocks", episodes_per_task=3), directory)


def test_an_interrupted_recording_leaves_no_files(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("craft_ds.worlds.demonstrations.LeRobotDataset.save_episode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_demonstrations(RECIPE, tmp_path / "data", processes=1)
    assert not list(tmp_path.iterdir())


def test_a_directory_without_a_data_set_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        open_demonstrations(tmp_path, 8)


@pytest.mark.parametrize(
    "flags",
    [["--world", "blocks", "--episodes_per_task", "0"], ["--world", "moon"]],
)
def test_bad_flags_exit_with_one_line_and_status_2(flags, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command("worlds", ["record", *flags, "--output_dir", str(tmp_path / "data")])
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "data").exists()

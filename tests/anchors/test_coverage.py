"""Every old task is trained on and, where that is possible, measured; where it is not, a line says so."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from builds import make_dataset, refuses, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from craft_ds.anchors.build import build_anchor_cache
from craft_ds.anchors.cache import AnchorCache
from craft_ds.anchors.coverage import (
    check_coverage,
    check_task_constraints,
    count_by_task,
    coverage_table,
    coverage_warnings,
    trained_tasks,
)
from craft_ds.anchors.selection import select_anchors
from craft_ds.anchors.stream import AnchorStream
from craft_ds.config.craft_config import CraftConfig
from craft_ds.data.batch_partition import partition_step
from craft_ds.errors import UserError
from craft_ds.testing.datasets import edit_metadata, write_test_cache

# Episodes as lists of the tasks of their frames.
data_sets = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=8), min_size=1, max_size=7)


@settings(max_examples=300, deadline=None)
@given(data_sets, st.floats(0, 1), st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.9]), st.integers(0, 50))
def test_every_task_is_covered_as_far_as_it_can_be(episodes, part, fraction, seed):
    task = np.array([one for episode in episodes for one in episode])
    episode = np.repeat(np.arange(len(episodes)), [len(one) for one in episodes])
    count = max(int(part * len(task)), 1)
    selection = select_anchors(task, episode, count, fraction, seed)
    assert len(set(selection.frames.tolist())) == count

    heldout = set(selection.heldout_episodes)
    trained = {one: {e for e, tasks in enumerate(episodes) if one in tasks} - heldout for one in set(task)}
    assert all(trained.values())
    assert fraction > 0 or not heldout
    selected = Counter(zip(task[selection.frames].tolist(), selection.heldout.tolist(), strict=True))
    for one in set(task.tolist()):
        total = selected[one, True] + selected[one, False]
        held = {e for e, tasks in enumerate(episodes) if one in tasks} & heldout
        assert selected[one, False] or not total
        assert selected[one, True] or not held or total < 2
        if fraction > 0 and not held:
            # To hold out any of its episodes would take some task's last one from training.
            for candidate in trained[one]:
                assert any(left == {candidate} for left in trained.values())


def counts(cache):
    return {text: numbers for text, *numbers in zip(cache.tasks, *count_by_task(cache).values(), strict=True)}


def test_tasks_that_change_within_an_episode(options, tmp_path):
    """By its first frame every episode is one of "open": "close" must be covered nevertheless."""
    episodes = [["open"] * 3 + ["close"] * 3, ["open"] * 6, ["open"] * 6, ["open"] * 2 + ["close"] * 4]
    data = make_dataset(tmp_path / "data", episodes)
    for seed in range(3):
        output = tmp_path / f"cache{seed}"
        build_anchor_cache(options(output, dataset_root=str(data), num_samples=8, seed=seed))
        cache = AnchorCache.open(output)
        assert sum(counts(cache)["open"]) == sum(counts(cache)["close"]) == 4
        assert all(number for numbers in counts(cache).values() for number in numbers)
        check_coverage(cache, "heldout", 1)
        assert coverage_warnings(cache, "heldout") == []


def test_a_task_of_one_episode_is_trained_and_named(options, data, tmp_path, monkeypatch, capsys, teacher):
    data = make_dataset(tmp_path / "data", [["open"] * 4, ["open"] * 4, ["close"] * 4])
    output = tmp_path / "cache"
    flags = [f"--dataset_root={data}", f"--policy_path={teacher}", "--num_samples=8", "--num_workers=0"]
    assert run_script(monkeypatch, "--dataset_repo_id=me/data", f"--output_dir={output}", *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["task", "train", "heldout", "L0"]
    assert lines[2].split()[:3] == ["'open'", "2", "2"]
    assert lines[3].split()[:3] == ["'close'", "4", "0"]
    assert "no held-out anchors of task 'close'" in lines[4]
    cache = AnchorCache.open(output)
    check_coverage(cache, "heldout", 1)
    assert coverage_warnings(cache, "train") == []
    (warning,) = coverage_warnings(cache, "heldout")
    assert "task 'close', which the constraint does not measure" in warning
    assert "--craft.constraint_split=train" in warning


def test_no_heldout_anchors_at_all(options, tmp_path):
    data = make_dataset(tmp_path / "data", [["open"] * 4, ["close"] * 4])
    build_anchor_cache(options(tmp_path / "cache", dataset_root=str(data), num_samples=4))
    cache = AnchorCache.open(tmp_path / "cache")
    assert coverage_warnings(cache, "train") == []
    (warning,) = coverage_warnings(cache, "heldout")
    assert "no anchors are held out: train with --craft.constraint_split=train" in warning
    with pytest.raises(UserError) as caught:
        check_coverage(cache, "heldout", 1)
    for word in (
        "0 heldout anchors",
        "--craft.constraint_split=train",
        "--heldout_fraction",
        str(cache.path),
    ):
        assert word in str(caught.value)
    check_coverage(cache, "train", 1)
    with pytest.raises(UserError, match="4 train anchors for 5 ranks"):
        check_coverage(cache, "train", 5)


@pytest.mark.usefixtures("no_policy")
def test_fewer_anchors_than_tasks(options, tmp_path):
    refuses(options(tmp_path / "out", num_samples=1), "--num_samples=1", "2 tasks of craft-ds/test")


@pytest.mark.parametrize("frames", [None, [4, 4, 4]])
def test_a_task_without_training_anchors_is_an_error(tmp_path, frames):
    """As caches of craft-ds 0.1 may have, where tasks shared episodes or anchors were few."""
    write_test_cache(tmp_path / "cache", [0, 1, 2, 2], [0, 1, 2, 3], heldout_episodes=[1])
    cache = AnchorCache.open(tmp_path / "cache")
    cache.metadata["dataset"]["task_frames"] = frames
    assert count_by_task(cache) == {"train": [1, 0, 2], "heldout": [0, 1, 0]}
    with pytest.raises(UserError, match="no training anchors of task 'close the drawer'") as caught:
        check_coverage(cache, "heldout", 1)
    assert "--num_samples" in str(caught.value)


def test_a_task_without_frames_needs_no_anchors(tmp_path):
    write_test_cache(tmp_path / "cache", [0, 0, 2, 2], [0, 1, 2, 3], heldout_episodes=[1, 3])
    dataset = AnchorCache.open(tmp_path / "cache").metadata["dataset"] | {"task_frames": [2, 0, 2]}
    edit_metadata(tmp_path / "cache", dataset=dataset)
    cache = AnchorCache.open(tmp_path / "cache")
    check_coverage(cache, "heldout", 1)
    assert coverage_warnings(cache, "heldout") == []
    assert coverage_table(cache)[2].split() == ["'close", "the", "drawer'", "0", "0", "-"]


def test_every_tasks_constraint_must_be_measurable(tmp_path):
    write_test_cache(tmp_path / "cache", [0, 0, 2, 2], [0, 1, 2, 3], heldout_episodes=[1])
    cache = AnchorCache.open(tmp_path / "cache")
    check_task_constraints(cache, CraftConfig())
    by_task = CraftConfig(multiplier_scope="task")
    with pytest.raises(
        UserError, match=r"--craft.multiplier_scope=task.* no heldout anchors of task"
    ) as caught:
        check_task_constraints(cache, by_task)
    assert repr(cache.tasks[2]) in str(caught.value)
    assert repr(cache.tasks[0]) not in str(caught.value)
    check_task_constraints(cache, replace(by_task, constraint_split="train"))
    with pytest.raises(UserError, match=r"--craft.epsilon_relative=true.* no teacher's loss of tasks"):
        check_task_constraints(cache, replace(by_task, constraint_split="train", epsilon_relative=True))


def test_the_stream_gives_each_anchor_its_task_and_each_task_its_unit(tmp_path):
    write_test_cache(tmp_path / "cache", [0, 0, 2, 2, 2], [0, 1, 2, 3, 3], heldout_episodes=[1, 3])
    losses = AnchorCache.open(tmp_path / "cache").metadata["teacher_loss"]
    tasks = AnchorCache.open(tmp_path / "cache").tasks
    losses["heldout"]["by_task"] = {tasks[0]: 0.5, tasks[2]: 2.0}
    edit_metadata(tmp_path / "cache", teacher_loss=losses)
    cache = AnchorCache.open(tmp_path / "cache")
    craft = CraftConfig(multiplier_scope="task", epsilon_relative=True)
    check_task_constraints(cache, craft)
    assert trained_tasks(cache) == [tasks[0], tasks[2]]  # the task between them has no anchors
    share = partition_step(4, 1, 2, "anchors")
    streams = {
        scope: AnchorStream(
            cache, replace(craft, multiplier_scope=scope), share, device=torch.device("cpu"), rank=0, seed=0
        )
        for scope in ("task", "global")
    }
    assert streams["task"].task_epsilon_units == [0.5, 2.0]
    assert streams["task"].step_loss is not streams["task"].loss
    assert streams["global"].task_epsilon_units == []
    assert streams["global"].step_loss is streams["global"].loss
    for batches in (streams["task"].gradient_batches(0), streams["task"].constraint_batches(4)):
        assert [batch["task_index"].tolist() for batch in batches] == [[0, 1], [0, 1]]
    assert "task_index" not in next(iter(streams["global"].gradient_batches(0)))


def test_a_teachers_loss_by_task_must_be_a_number(tmp_path):
    write_test_cache(tmp_path / "cache", [0, 0], [0, 1])
    losses = AnchorCache.open(tmp_path / "cache").metadata["teacher_loss"]
    for bad in ("0.5", float("nan"), -1.0, None):
        losses["heldout"]["by_task"] = {"open the drawer": bad}
        edit_metadata(tmp_path / "cache", teacher_loss=losses)
        with pytest.raises(UserError, match=r"teacher_loss|metadata"):
            AnchorCache.open(tmp_path / "cache")


@pytest.mark.filterwarnings("ignore:invalid value")  # LeRobot computes the data set's statistics
@pytest.mark.parametrize("key", ["observation.state", "action"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_non_finite_value_is_named(options, tmp_path, key, value):
    bad = {(1, 2): {key: np.array([0, value, 0, 0], np.float32)}}
    data = make_dataset(tmp_path / "data", [["open"] * 4] * 2, bad=bad)
    refuses(
        options(tmp_path / "out", dataset_root=str(data), num_samples=8, heldout_fraction=0.0),
        "data set craft-ds/test, episode 1, frame",
        f"{key}[1] is {value}",
    )

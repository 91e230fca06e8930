"""Motion phases, and anchors in equal shares of them."""

import json
from collections import Counter

import numpy as np
import pytest
from builds import refuses, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from craft_ds.anchors.build import build_anchor_cache
from craft_ds.anchors.cache import AnchorCache
from craft_ds.anchors.choose_frames import find_grippers
from craft_ds.anchors.phases import episode_phases, motion_phases
from craft_ds.anchors.selection import select_anchors
from craft_ds.errors import UserError


def steps(*levels):
    """Return values that keep each level for a number of frames."""
    return np.concatenate([np.full(frames, float(level)) for level, frames in levels])


def test_phases_begin_where_the_speed_or_a_gripper_changes():
    speed = steps((1, 20), (0.1, 10), (0.8, 15)) + np.random.default_rng(0).normal(0, 0.03, 45)
    gripper = steps((0, 25), (1, 20))[:, None]
    assert np.flatnonzero(np.diff(episode_phases(speed, gripper))).tolist() == [19, 24, 29]
    assert not episode_phases(np.full(30, 0.7), np.zeros((30, 0))).any()
    assert episode_phases(np.zeros(1), np.zeros((1, 2))).tolist() == [0]


def test_a_gripper_that_hesitates_has_not_changed():
    gripper = steps((0, 5), (0.55, 5), (0.45, 5), (0.9, 5), (0.45, 5), (0.1, 5))[:, None]
    phases = episode_phases(np.ones(30), gripper)
    assert np.flatnonzero(np.diff(phases)).tolist() == [14, 24]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_units_do_not_matter_and_tasks_begin_at_zero(scale):
    path = np.cumsum(steps((1, 10), (0.1, 10), (1, 10), (0.1, 10)))
    state = np.stack([scale * path, np.zeros(40)], axis=1)
    action = np.stack([np.zeros(40), scale * steps((0, 10), (1, 30))], axis=1)
    episode, task = np.zeros(40, dtype=int), np.repeat([4, 7], 20)
    phases = motion_phases(state, action, episode, task, gripper=[1])
    assert phases[task == 4].tolist() == [0] * 10 + [1] * 10  # the gripper moves
    assert phases[task == 7].tolist() == [0] * 9 + [1] * 11  # the speed changes


def test_further_phases_of_few_episodes_count_as_the_last():
    one = steps((1, 10), (0.1, 10))
    many = steps((1, 5), (0.1, 5), (1, 5), (0.1, 5))
    state = np.concatenate([np.cumsum(part) for part in (one, one, many)])[:, None]
    episode, task = np.repeat([0, 1, 2], 20), np.zeros(60, dtype=int)
    phases = motion_phases(state, np.zeros((60, 1)), episode, task, gripper=[])
    assert phases.max() == 1
    assert (phases[50:] == 1).all()


def test_phases_get_equal_shares_in_each_split():
    """Ten percent of the frames are of phase 1: uniform draws follow that, phases do not."""
    episode = np.repeat(np.arange(10), 100)
    task, phase = episode % 2, (np.arange(1000) % 100 >= 90).astype(int)
    uniform = select_anchors(task, episode, 80, 0.2, seed=0)
    balanced = select_anchors(task, episode, 80, 0.2, seed=0, phase=phase)
    assert phase[uniform.frames].sum() < 20
    assert balanced.heldout_episodes == uniform.heldout_episodes
    for one in (0, 1):
        for split in (False, True):
            of_cell = (balanced.task == one) & (balanced.heldout == split)
            counts = Counter(phase[balanced.frames[of_cell]])
            assert counts[0] == counts[1] == ((uniform.task == one) & (uniform.heldout == split)).sum() / 2
    per_episode = Counter(episode[balanced.frames[(balanced.task == 0) & ~balanced.heldout]])
    assert max(per_episode.values()) - min(per_episode.values()) <= 2


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(1, 4), st.floats(0, 1), st.integers(0, 100))
def test_selection_by_phase_is_without_repeats_and_deterministic(episodes, length, phases, part, seed):
    rng = np.random.default_rng(seed)
    episode = np.repeat(np.arange(episodes), length)
    task, phase = episode % 2, rng.integers(0, phases, len(episode))
    count = max(1, int(part * len(task)))
    first, again = (select_anchors(task, episode, count, 0.3, seed, phase=phase) for _ in range(2))
    assert len(set(first.frames.tolist())) == count
    assert first.frames.tolist() == again.frames.tolist()
    assert np.array_equal(first.task, task[first.frames])
    assert np.array_equal(first.heldout, np.isin(episode[first.frames], first.heldout_episodes))


def test_grippers_are_found_by_name_or_index():
    names = ("left_grip", "x", "Gripper_right", "y")
    assert find_grippers((), names) == [0, 2]
    assert find_grippers((), ("a", "b")) == [1]
    assert find_grippers(("y", "1"), names) == [1, 3]
    assert find_grippers(("none",), names) == []
    with pytest.raises(UserError, match="--gripper hand: the actions have the dimensions a, b"):
        find_grippers(("hand",), ("a", "b"))


def test_a_build_by_phase_records_what_it_did(options, data, teacher, tmp_path, monkeypatch, capsys):
    flags = ["--dataset_repo_id=craft-ds/test", f"--dataset_root={data}", f"--policy_path={teacher}"]
    flags += [f"--output_dir={tmp_path / 'cache'}", "--num_samples=22", "--num_workers=0", "--shard_size=6"]
    assert run_script(monkeypatch, *flags, "--selection=phases", "--gripper", "x1", "x3") == 0
    metadata = json.loads((tmp_path / "cache" / "metadata.json").read_text())
    assert metadata["request"]["selection"] == "phases"
    assert metadata["request"]["gripper"] == ["x1", "x3"]
    phases = metadata["dataset"]["phases"]
    assert phases["gripper"] == ["x1", "x3"]
    assert [sum(counts) for counts in phases["anchors"]] == [11, 11]
    assert max(len(counts) for counts in phases["anchors"]) > 1
    assert f"'press the red button': {' '.join(map(str, phases['anchors'][0]))}" in capsys.readouterr().out
    assert len(AnchorCache.open(tmp_path / "cache")) == 22
    same = options(tmp_path / "cache", selection="phases", gripper=("x1", "x3"))
    assert not build_anchor_cache(same)
    refuses(options(tmp_path / "cache"), "another anchor cache", "request.selection differs")


@pytest.mark.usefixtures("no_policy")
def test_unusable_flags_are_refused(options, tmp_path):
    with pytest.raises(UserError, match="--gripper has no effect without --selection=phases"):
        options(tmp_path / "cache", gripper=("x0",))
    with pytest.raises(UserError, match="--selection=random must be uniform or phases"):
        options(tmp_path / "cache", selection="random")
    refuses(options(tmp_path / "cache", selection="phases", gripper=("hand",)), "--gripper hand", "x0, x1")

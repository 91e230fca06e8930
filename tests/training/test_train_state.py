"""Counters of a run and the size of its steps."""

import math
from types import SimpleNamespace

import pytest

from craft_ds.algorithm.model_selection import EvalRecord
from craft_ds.algorithm.multiplier import DualState, RetentionRecord
from craft_ds.algorithm.task_multipliers import make_dual_state
from craft_ds.config.configs import EngineConfig
from craft_ds.config.craft_config import CraftConfig
from craft_ds.errors import UserError
from craft_ds.training.restore import SavedRun, build_state
from craft_ds.training.start_policy import StartPolicy
from craft_ds.training.train_state import Progress, TrainState
from craft_ds.training.train_step import StepResult


def applied(loss):
    return StepResult(loss, 1.0, applied=True)


SKIPPED = StepResult(math.nan, math.nan, applied=False)


@pytest.fixture
def progress():
    progress = Progress()
    progress.set_step_size(3, 2, 4, world_size=2)
    return progress


def test_a_step_moves_both_places(progress):
    assert (progress.samples_per_step, progress.anchors_per_step) == (12, 8)
    progress.advance(applied(2.0), retention=True)
    progress.advance(applied(4.0), retention=False)
    assert (progress.step, progress.samples_seen, progress.anchors_seen) == (2, 24, 8)
    assert progress.take_mean_loss() == 3.0
    assert math.isnan(progress.take_mean_loss())


def test_a_skipped_step_is_counted_and_has_no_loss(progress):
    for result in (SKIPPED, SKIPPED, applied(1.0), SKIPPED):
        progress.advance(result, retention=True)
    assert (progress.step, progress.skipped, progress.skipped_in_a_row) == (4, 3, 1)
    assert progress.samples_seen == 48
    assert progress.take_mean_loss() == 1.0


def test_step_size_depends_on_flags_not_on_ranks(progress):
    progress.set_step_size(3, 2, 4, world_size=5)
    assert (progress.samples_per_step, progress.anchors_per_step) == (12, 8)
    progress.set_step_size(4, 2, 4, world_size=5)
    assert (progress.samples_per_step, progress.anchors_per_step) == (40, 20)


def test_state_round_trip(progress):
    progress.advance(applied(2.0), retention=True)
    progress.latest["craft/lambda"] = 0.5
    assert Progress.from_state_dict(progress.state_dict()) == progress


@pytest.mark.parametrize(
    "odd", [{"step": -1}, {"step": True}, {"samples_seen": 1.5}, {"losses": None}, {"latest": []}]
)
def test_a_malformed_state_is_refused(progress, odd):
    with pytest.raises(ValueError, match=next(iter(odd))):
        Progress.from_state_dict(progress.state_dict() | odd)
    with pytest.raises(TypeError):
        Progress.from_state_dict({"nonsense": 1})


def test_train_state_round_trip_with_the_keys_of_the_file(progress):
    progress.advance(applied(2.0), retention=True)
    hashes = {"meta": "0", "data": "1"}
    dual, evaluations = (
        DualState(CraftConfig(initial_lambda=0.25)),
        [EvalRecord(0, 0.5), EvalRecord(1, 0.4, 0.3, 0.2)],
    )
    state = TrainState(progress, dual, 40, {"wandb": "run-1"}, hashes, evaluations)
    state.start = StartPolicy("/a/policy", "", "0f", 3)
    saved = state.state_dict()
    assert saved.keys() == {
        *(
            "multiplier",
            "smoothed_violation",
            "history",
            "progress",
            "retention_schedule",
            "dataset_samples",
            "tracker_run_ids",
            "dataset_fingerprint",
            "evaluations",
            "start",
        )
    }

    restored = TrainState(Progress(), DualState(CraftConfig()))
    restored.load_state_dict(saved)
    assert restored.progress == progress
    assert restored.dual.multiplier == 0.25
    assert (restored.dataset_samples, restored.tracker_run_ids) == (40, {"wandb": "run-1"})
    assert restored.dataset_fingerprint == hashes
    assert restored.evaluations == evaluations
    assert restored.start == state.start
    del saved["start"]  # as in checkpoints of older versions
    restored.load_state_dict(saved)
    assert restored.start is None


@pytest.mark.parametrize("change", [{"seed": "3"}, {"path": 1}, {"more": 1}])
def test_a_malformed_start_is_refused(change):
    state = StartPolicy("/a/policy", "", "0f", 3).state_dict()
    with pytest.raises((TypeError, ValueError)):
        StartPolicy.from_state_dict(state | change)


def test_the_retention_schedule_is_part_of_the_state():
    config = CraftConfig(enabled=True, anchor_cache_dir="a", retention_freq=2, retention_freq_max=16)
    state = TrainState(Progress(step=7), DualState(config), 40)
    state.schedule.advance(6, slack=True)
    restored = TrainState(Progress(), DualState(config))
    restored.load_state_dict(state.state_dict())
    assert (restored.schedule.interval, restored.schedule.next_step) == (4, 10)
    saved = state.state_dict()
    del saved["retention_schedule"]
    restored.load_state_dict(saved)
    assert (restored.schedule.interval, restored.schedule.next_step) == (2, 8)
    with pytest.raises(ValueError, match="retention_schedule"):
        restored.load_state_dict(saved | {"retention_schedule": {"interval": 4, "next_step": 12}})


@pytest.mark.parametrize("tasks", [["a", "b", "c"], ["a"], ["b", "a"]])
def test_a_run_resumes_with_the_tasks_of_its_lambdas(tmp_path, tasks):
    craft = CraftConfig(enabled=True, anchor_cache_dir="anchors", multiplier_scope="task")
    config = SimpleNamespace(
        craft=craft,
        checkpoint_path=tmp_path,
        batch_size=1,
        gradient_accumulation_steps=1,
        engine=EngineConfig("single"),
    )
    state = TrainState(Progress(step=3), make_dual_state(craft, ["a", "b"]), 40)
    saved = SavedRun({"craft": {"enabled": True, "lambda_max": 10.0}}, None, state.state_dict(), 3)
    restored = build_state(config, saved, 40, {}, 1, ["a", "b"])
    assert restored.dual.state_dict() == state.dual.state_dict()
    with pytest.raises(UserError, match=r"--craft.anchor_cache_dir=anchors.*λ of 2 tasks 'a', 'b'"):
        build_state(config, saved, 40, {}, 1, tasks)


def test_a_state_without_new_entries_is_of_an_older_version(progress):
    saved = TrainState(progress, DualState(CraftConfig()), 40).state_dict()
    del saved["dataset_fingerprint"], saved["evaluations"]
    del saved["progress"]["bad_samples"]
    restored = TrainState(Progress(), DualState(CraftConfig()))
    restored.load_state_dict(saved)
    assert (restored.dataset_fingerprint, restored.evaluations, restored.progress.bad_samples) == ({}, [], 0)


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1}],
        [{"step": 1, "task_loss": 0.5, "extra": 1}],
        [{"step": 1, "task_loss": "0.5"}],
        [{"step": 1, "task_loss": True}],
        [{"step": 1, "task_loss": 0.5, "retention_loss": 0.5}],
        [{"step": 1, "task_loss": 0.5, "retention_loss": [0.5], "epsilon": 0.5}],
        [{"step": -1, "task_loss": 0.5}],
        [{"step": 1.0, "task_loss": 0.5}],
        [{"step": 1, "task_loss": 0.5}, {"step": 1, "task_loss": 0.5}],
        [{"step": 2, "task_loss": 0.5}],  # after one step
        ["1"],
        5,
    ],
)
def test_evaluations_that_no_run_has_are_refused(progress, rows):
    saved = saved_state(progress) | {"evaluations": rows}
    with pytest.raises((ValueError, TypeError)):
        TrainState(Progress(), DualState(CraftConfig())).load_state_dict(saved)


@pytest.mark.parametrize("value", [None, "text", {"meta": 1}, {1: "text"}])
def test_a_damaged_fingerprint_is_refused(progress, value):
    saved = TrainState(progress, DualState(CraftConfig()), 40).state_dict()
    with pytest.raises(ValueError, match="dataset_fingerprint="):
        TrainState(Progress(), DualState(CraftConfig())).load_state_dict(
            saved | {"dataset_fingerprint": value}
        )


@pytest.mark.parametrize("missing", ["multiplier", "history", "progress", "dataset_samples"])
def test_an_incomplete_train_state_is_refused(progress, missing):
    state = TrainState(progress, DualState(CraftConfig()), 40)
    saved = state.state_dict()
    del saved[missing]
    with pytest.raises((KeyError, ValueError), match=missing):
        state.load_state_dict(saved)


def test_a_state_from_before_log_to_keeps_its_wandb_run(progress):
    saved = TrainState(progress, DualState(CraftConfig()), 40).state_dict()
    del saved["tracker_run_ids"]
    restored = TrainState(Progress(), DualState(CraftConfig()))
    restored.load_state_dict(saved | {"wandb_run_id": "run-1"})
    assert restored.tracker_run_ids == {"wandb": "run-1"}
    for nothing in ({}, {"wandb_run_id": None}):
        restored.load_state_dict(saved | nothing)
        assert restored.tracker_run_ids == {}


@pytest.mark.parametrize("odd", [["run-1"], {"wandb": 1}, {1: "run-1"}, "run-1"])
def test_malformed_tracker_run_ids_are_refused(progress, odd):
    state = TrainState(progress, DualState(CraftConfig()), 40)
    with pytest.raises(ValueError, match="tracker_run_ids"):
        state.load_state_dict(state.state_dict() | {"tracker_run_ids": odd})


def saved_state(progress):
    progress.advance(applied(2.0), retention=True)
    return TrainState(progress, DualState(CraftConfig()), 40).state_dict()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("multiplier",), 10.5),
        (("multiplier",), float("inf")),
        (("multiplier",), -1.0),
        (("progress", "step"), 1 << 70),
        (("progress", "samples_seen"), -1),
        (("progress", "skipped"), 5),
        (("progress", "skipped_in_a_row"), 1),
        (("progress", "asked"), [2, "1", 0]),
        (("progress", "losses"), ["a"]),
        (("progress", "latest"), {"craft/lambda": [1]}),
    ],
)
def test_values_that_no_run_has_are_refused(progress, path, value):
    saved = saved_state(progress)
    entry = saved
    for name in path[:-1]:
        entry = entry[name]
    entry[path[-1]] = value
    with pytest.raises((ValueError, TypeError)):
        TrainState(Progress(), DualState(CraftConfig())).load_state_dict(saved, lambda_max=10.0)


@pytest.mark.parametrize("steps", [[2, 1], [1, 1], [-1], [1.5], [1 << 63]])
def test_a_history_out_of_order_is_refused(progress, steps):
    saved = saved_state(progress)
    record = {"lambda_": 1.0, "epsilon": 0.5, "retention_loss": 0.6, "conflict": False, "cos": 0.0}
    record |= {"retention_weight": 1.0, "dot": 0.0}
    saved["history"] = [{"step": step, **record} for step in steps]
    with pytest.raises(ValueError, match=r"λ|history"):
        TrainState(Progress(), DualState(CraftConfig())).load_state_dict(saved)


def test_a_lower_bound_of_lambda_clips_it(progress):
    saved = saved_state(progress) | {"multiplier": 8.0}
    state = TrainState(Progress(), DualState(CraftConfig(lambda_max=5.0)))
    state.load_state_dict(saved, lambda_max=10.0)
    assert state.dual.multiplier == 5.0


def test_conflicts_are_counted_since_the_last_line(progress):
    rows = [RetentionRecord(step, 1.0, 1.0, 0.5, step == 2, -0.1 * step, 1.0, 0.0) for step in (1, 2, 3)]
    counted = Progress()
    assert counted.take_conflict_metrics(rows[:2])["craft/conflict_rate"] == 0.5
    assert counted.take_conflict_metrics(rows)["craft/mean_grad_cos"] == pytest.approx(-0.3)
    assert counted.take_conflict_metrics(rows) == {}


def test_counted_conflicts_survive_a_checkpoint_and_older_ones_start_at_the_end():
    state = TrainState(Progress(step=4), DualState(CraftConfig()), 40)
    for step in (1, 2):
        state.dual.ascend(RetentionRecord(step, 1.0, 1.0, 0.5, True, -0.5, 1.0, 0.0))
    state.progress.take_conflict_metrics(state.dual.history[:1])
    saved = state.state_dict()
    restored = TrainState(Progress(), DualState(CraftConfig()))
    restored.load_state_dict(saved)
    assert restored.progress.retention_logged == 1
    del saved["progress"]["retention_logged"]
    restored.load_state_dict(saved)
    assert restored.progress.retention_logged == 2
    saved["progress"]["retention_logged"] = 3
    with pytest.raises(ValueError, match="retention_logged=3"):
        restored.load_state_dict(saved)

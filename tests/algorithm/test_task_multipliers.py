"""One λ per task: each follows its own constraint by the chosen rule."""

import csv
import math

import pytest
import torch

from craft_ds.algorithm.multiplier import DualState, RetentionRecord, TaskRecord
from craft_ds.algorithm.task_multipliers import TaskDualState, make_dual_state
from craft_ds.config.craft_config import CraftConfig

TASKS = ["close the drawer", "press, then turn"]
LOSSES = [(1.2, 0.3), (0.9, 0.8), (1.4, math.nan), (0.7, 0.2)]


def record(step: int, losses, epsilons=(0.5, 1.0), multipliers=(1.0, 1.0)) -> RetentionRecord:
    tasks = tuple(map(TaskRecord, multipliers, epsilons, losses))
    return RetentionRecord(step, 1.0, 0.7, 0.8, False, 0.1, 1.0, 0.0, tasks=tasks)


def config(**changes) -> CraftConfig:
    return CraftConfig(**{"enabled": True, "multiplier_scope": "task", "lambda_lr": 0.1, **changes})


@pytest.mark.parametrize("rule", ["ascent", "nupi", "fixed"])
def test_each_task_follows_its_own_constraint(rule):
    """As a state of its own that sees the steps in which the task was measured."""
    fields = config(multiplier=rule, nupi_nu=0.5, nupi_kp=3.0)
    state, alone = make_dual_state(fields, TASKS), [DualState(fields) for _ in TASKS]
    for step, losses in enumerate(LOSSES):
        state.ascend(record(step, losses))
        for one, loss, epsilon in zip(alone, losses, (0.5, 1.0), strict=True):
            if not math.isnan(loss):
                one.ascend(RetentionRecord(step, 1.0, epsilon, loss, False, 0.0, 1.0, 0.0))
    assert state.in_step(0.5) == tuple(one.multiplier for one in alone)
    assert state.multiplier == pytest.approx(sum(state.in_step(0.5)) / 2)
    assert len(state.history) == len(LOSSES)
    if rule != "fixed":
        assert state.multipliers[0] > 1.0 > state.multipliers[1]


def test_the_scope_decides_the_state():
    assert type(make_dual_state(CraftConfig(enabled=True), TASKS)) is DualState
    assert type(make_dual_state(config(enabled=False), TASKS)) is DualState


@pytest.mark.parametrize("rule", ["ascent", "nupi", "fixed"])
def test_resuming_continues_exactly(tmp_path, rule):
    fields = config(multiplier=rule, nupi_nu=0.5, nupi_kp=3.0)
    whole, first = TaskDualState(fields, TASKS), TaskDualState(fields, TASKS)
    for step, losses in enumerate(LOSSES):
        if step == 2:
            torch.save(first.state_dict(), tmp_path / "state.pt")
            first = TaskDualState(fields, TASKS)
            first.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for state in (whole, first):
            state.ascend(record(step, losses))
    assert repr(first.state_dict()) == repr(whole.state_dict())  # NaN is unequal to itself
    assert first.history[:2] == whole.history[:2]


def test_a_single_lambda_becomes_that_of_every_task():
    before = DualState(CraftConfig(initial_lambda=3.0))
    before.ascend(RetentionRecord(1, 3.0, 0.5, 0.5, False, 0.0, 1.0, 0.0))
    state = TaskDualState(config(), TASKS)
    state.load_state_dict(before.state_dict())
    assert state.multipliers == [3.0, 3.0]
    back = DualState(CraftConfig())
    state.ascend(record(2, (0.5, 1.0)))
    back.load_state_dict(state.state_dict())
    assert (back.multiplier, len(back.history)) == (3.0, 2)


def test_a_lower_bound_clips_every_lambda():
    state = TaskDualState(config(), TASKS)
    state.multipliers = [4.0, 9.0]
    restored = TaskDualState(config(lambda_max=5.0), TASKS)
    restored.load_state_dict(state.state_dict(), 10.0)
    assert restored.multipliers == [4.0, 5.0]


@pytest.mark.parametrize(
    "tasks",
    [
        None,
        {},
        [1.0],
        {1: [1.0, 0.0]},
        {"a": 1.0},
        {"a": [1.0]},
        {"a": [1.0, "0"]},
        {"a": [-1.0, 0.0]},
        {"a": [11.0, 0.0]},
        {"a": [math.nan, 0.0]},
        {"a": [1.0, math.inf]},
        {"a": [1.0, 0.0]},  # its history has two tasks
    ],
)
def test_a_state_that_no_run_has_is_refused(tasks):
    state = TaskDualState(config(), TASKS)
    state.ascend(record(1, (0.5, 1.0)))
    with pytest.raises(ValueError, match=r"tasks|λ"):
        state.load_state_dict(state.state_dict() | {"tasks": tasks}, lambda_max=10.0)


def test_a_damaged_record_is_refused():
    state = TaskDualState(config(), TASKS)
    state.ascend(record(1, (0.5, 1.0)))
    for damage in ({"lambda_": "1"}, {"epsilon": None}, {"more": 1.0}):
        saved = state.state_dict()
        saved["history"][0]["tasks"][0].update(damage)
        with pytest.raises(ValueError, match="history"):
            state.load_state_dict(saved)


def test_slack_means_every_measured_task():
    assert record(1, (0.4, 0.9)).slack
    assert not record(1, (0.4, 1.1)).slack
    assert record(1, (0.4, math.nan)).slack
    assert not record(1, (math.nan, math.nan)).slack  # then the mean decides: 0.8 > 0.7


def test_the_csv_has_columns_for_every_task(tmp_path):
    state = TaskDualState(config(), TASKS)
    state.history.append(RetentionRecord(0, 3.0, 0.5, 0.5, True, 0.0, 1.0, 0.0))  # of a single λ
    state.ascend(record(5, (0.6, math.nan), multipliers=(1.0, 2.0)))
    state.write_csv(tmp_path / "history.csv")
    with (tmp_path / "history.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["lambda"], first["conflict"], first["lambda/close the drawer"]) == ("3.0", "1", "nan")
    assert [second[f"{name}/press, then turn"] for name in ("lambda", "epsilon", "retention_loss")] == [
        "2.0",
        "1.0",
        "nan",
    ]
    assert float(second["retention_loss/close the drawer"]) == 0.6

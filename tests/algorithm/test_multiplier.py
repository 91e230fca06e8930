import csv
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craft_ds.algorithm.gradient_surgery import GramTriple, merge
from craft_ds.algorithm.multiplier import DualState, RetentionRecord, ascend, epsilon_at
from craft_ds.config.craft_config import CraftConfig

settings.register_profile("patient", deadline=None)  # a busy machine is not a failure
settings.load_profile("patient")

SCHEDULES = ["linear", "cosine", "exponential"]
schedules = st.sampled_from(SCHEDULES)
positive = st.floats(1e-3, 10)


def config(**fields: object) -> CraftConfig:
    return CraftConfig(**fields)


def record(step: int, loss: float, epsilon: float, multiplier: float = 1.0) -> RetentionRecord:
    return RetentionRecord(step, multiplier, epsilon, loss, step % 2 == 0, -0.25, 1.5, -0.5)


@pytest.mark.parametrize(
    ("schedule", "quarter", "half"),
    [
        ("linear", 0.775, 0.55),
        ("cosine", 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 0.55),
        ("exponential", 0.1**0.25, math.sqrt(0.1)),
    ],
)
def test_epsilon_by_hand(schedule, quarter, half):
    fields = config(epsilon_schedule=schedule)  # the default range: 1.0 to 0.1
    assert [epsilon_at(step, 100, fields) for step in (0, 25, 50)] == pytest.approx([1.0, quarter, half])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("decay_steps", "reached"), [(0, 100), (40, 40), (1, 1)])
def test_epsilon_reaches_its_end_on_the_step_asked_for(schedule, decay_steps, reached):
    fields = config(epsilon_schedule=schedule, epsilon_decay_steps=decay_steps)
    assert epsilon_at(reached - 1, 100, fields) > 0.1
    assert epsilon_at(reached, 100, fields) == 0.1
    assert epsilon_at(10_000, 100, fields) == 0.1


@given(schedules, positive, positive, st.integers(1, 500), st.booleans())
def test_epsilon_falls_from_one_end_to_the_other(schedule, one, other, steps, explicit):
    start, end = max(one, other), min(one, other)
    fields = config(
        epsilon_schedule=schedule,
        epsilon_start=start,
        epsilon_end=end,
        epsilon_decay_steps=steps if explicit else 0,
    )
    values = [epsilon_at(step, 10 * steps if explicit else steps, fields) for step in range(steps + 2)]
    assert values[0] == pytest.approx(start, rel=1e-15)
    assert values[-2:] == [end, end]
    slack = 1e-12 * start
    assert all(later <= earlier + slack for earlier, later in pairwise(values))
    assert all(end - slack <= value <= start + slack for value in values)


@given(schedules, positive)
def test_constant_epsilon(schedule, value):
    fields = config(epsilon_schedule=schedule, epsilon_start=value, epsilon_end=value)
    assert [epsilon_at(step, 7, fields) for step in range(9)] == pytest.approx([value] * 9)


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="epsilon_schedule"):
        epsilon_at(1, 10, config(epsilon_schedule="zigzag"))


def test_ascent_by_hand():
    fields = config(lambda_lr=0.1, lambda_max=2.0)
    assert ascend(1.0, 0.8, 0.5, fields) == pytest.approx(1.03)  # violated: λ rises
    assert ascend(1.0, 0.3, 0.5, fields) == pytest.approx(0.98)  # kept with room: λ falls
    assert ascend(1.0, 0.5, 0.5, fields) == 1.0
    assert ascend(0.01, 0.0, 0.5, fields) == 0.0
    assert ascend(1.99, 9.0, 0.5, fields) == 2.0


@given(
    st.floats(0, 10),
    st.floats(0, 1e6),
    st.floats(0, 1e6),
    st.floats(0, 100),
    st.floats(10, 20),
)
def test_multiplier_stays_within_bounds_and_moves_the_right_way(multiplier, loss, epsilon, rate, highest):
    after = ascend(multiplier, loss, epsilon, config(lambda_lr=rate, lambda_max=highest))
    assert 0.0 <= after <= highest
    if loss >= epsilon:
        assert after >= multiplier
    if loss <= epsilon:
        assert after <= multiplier


def test_state_moves_the_multiplier_and_keeps_the_history():
    state = DualState(config(initial_lambda=2.0, lambda_lr=0.5))
    assert (state.multiplier, state.history) == (2.0, [])
    records = [record(5, 1.0, 0.6), record(10, 0.2, 0.5)]
    for one in records:
        state.ascend(one)
    assert state.multiplier == pytest.approx(2.0 + 0.2 - 0.15)
    assert state.history == records


@pytest.mark.parametrize("rule", ["ascent", "nupi", "fixed"])
def test_an_unmeasured_step_moves_nothing(rule):
    fields = {"initial_lambda": 2.0, "lambda_lr": 0.5, "multiplier": rule, "nupi_nu": 0.5}
    every, some = DualState(config(**fields)), DualState(config(**fields))
    for step, loss in enumerate([1.0, math.nan, math.nan, 0.3, math.nan]):
        one = record(step, loss, 0.6)
        assert one.slack == (None if math.isnan(loss) else loss <= 0.6)
        some.ascend(one)
        if not math.isnan(loss):
            every.ascend(one)
    assert (some.multiplier, some.smoothed_violation) == (every.multiplier, every.smoothed_violation)
    assert len(some.history) == 5
    again = DualState(config(**fields))
    again.load_state_dict(some.state_dict())
    assert repr(again.state_dict()) == repr(some.state_dict())


def test_state_survives_a_checkpoint(tmp_path):
    state = DualState(config())
    for step in range(4):
        state.ascend(record(step, 1.0 / 3.0, 0.1))
    torch.save(state.state_dict(), tmp_path / "craft_state.pt")
    restored = DualState(config(initial_lambda=7.0))
    restored.load_state_dict(torch.load(tmp_path / "craft_state.pt", weights_only=True))
    assert restored.multiplier == state.multiplier
    assert restored.history == state.history
    for one in (state, restored):
        one.ascend(record(4, 0.7, 0.1))
    assert restored.multiplier == state.multiplier


def test_saved_state_does_not_follow_later_steps():
    state = DualState(config())
    state.ascend(record(0, 1.0, 0.1))
    saved = state.state_dict()
    state.ascend(record(1, 1.0, 0.1))
    assert len(saved["history"]) == 1


def test_csv_has_the_documented_columns(tmp_path):
    state = DualState(config())
    state.ascend(record(0, 0.5, 1.0))
    state.ascend(record(5, 0.25, 0.9, multiplier=0.995))
    state.write_csv(tmp_path / "lambda_history.csv")
    with (tmp_path / "lambda_history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "step",
        "lambda",
        "epsilon",
        "retention_loss",
        "conflict",
        "cos",
        "retention_weight",
        "dot",
        "removed",
        "conflict_share",
    ]
    assert [float(value) for value in rows[1].values()] == [5, 0.995, 0.9, 0.25, 0, -0.25, 1.5, -0.5, 0, 0]
    assert rows[0]["conflict"] == "1"


def solve(fields: CraftConfig, task: np.ndarray, old: np.ndarray, rate: float, steps: int) -> tuple:
    """Minimise ½‖θ − task‖² subject to ½‖θ − old‖² ≤ ε with the package's own rules.

    Returns:
        (θ, λ), both averaged over the last half of the steps.
    """
    state = DualState(fields)
    theta = np.zeros_like(task)
    thetas, multipliers = [], []
    for step in range(steps):
        g_t, g_r = theta - task, theta - old
        multiplier, epsilon = state.multiplier, epsilon_at(step, steps, fields)
        result = merge(GramTriple(g_t @ g_t, g_t @ g_r, g_r @ g_r), multiplier, fields)
        state.ascend(
            RetentionRecord(
                step,
                multiplier,
                epsilon,
                0.5 * float(g_r @ g_r),
                result.conflict,
                result.cosine,
                result.b / result.a,
                float(g_t @ g_r),
            )
        )
        theta = theta - rate * (result.a * g_t + result.b * g_r)
        thetas.append(theta)
        multipliers.append(multiplier)
    return np.mean(thetas[steps // 2 :], axis=0), float(np.mean(multipliers[steps // 2 :]))


TASK, OLD = np.array([3.0, 4.0]), np.array([0.0, 0.0])  # distance 5


def test_convergence():
    """Active constraint: θ* lies on the segment at distance r = √(2ε) from `old`, and λ* = (5 − r)/r.

    Stationarity, (θ − task) + λ(θ − old) = 0, gives θ − old = (task − old)/(1 + λ); its length is r. Here
    ε = 2, so r = 2, λ* = 1.5 and θ* = (1.2, 1.6).
    """
    fields = config(
        initial_lambda=0.0,
        lambda_lr=0.05,
        epsilon_start=4.0,
        epsilon_end=2.0,
        epsilon_decay_steps=500,
        use_grad_projection=False,
    )
    theta, multiplier = solve(fields, TASK, OLD, rate=0.05, steps=4000)
    np.testing.assert_allclose(theta, [1.2, 1.6], rtol=1e-4)
    assert multiplier == pytest.approx(1.5, rel=1e-4)


def test_convergence_of_a_slack_constraint():
    """Where the task's own optimum keeps the constraint, λ* = 0 and nothing is given up."""
    fields = config(
        initial_lambda=2.0, lambda_lr=0.05, epsilon_start=20.0, epsilon_end=20.0, use_grad_projection=False
    )
    theta, multiplier = solve(fields, TASK, OLD, rate=0.05, steps=4000)
    np.testing.assert_allclose(theta, TASK, rtol=1e-6)
    assert multiplier == 0.0


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 20.0])
def test_convergence_with_projection_keeps_the_constraint(epsilon):
    """Projection only adds retention weight (−tr/rr > 0): the constraint holds, with no more than λ*."""
    fields = config(initial_lambda=0.0, lambda_lr=0.05, epsilon_start=epsilon, epsilon_end=epsilon)
    theta, multiplier = solve(fields, TASK, OLD, rate=0.05, steps=4000)
    assert 0.5 * float((theta - OLD) @ (theta - OLD)) <= epsilon * (1 + 1e-3)
    assert 0.0 <= multiplier <= max(0.0, 5.0 / math.sqrt(2.0 * epsilon) - 1.0)

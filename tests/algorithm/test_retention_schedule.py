"""When retention steps are due, and for how many steps each stands."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craft_ds.algorithm.gradient_surgery import clip_factor, merge
from craft_ds.algorithm.gram_triple import GramTriple
from craft_ds.algorithm.retention_schedule import RetentionSchedule, next_interval
from craft_ds.config.craft_config import CraftConfig


def config(freq: int, highest: int = 0, scale: str = "freq", **changes) -> CraftConfig:
    return CraftConfig(retention_freq=freq, retention_freq_max=highest, retention_scale=scale, **changes)


def run(schedule: RetentionSchedule, steps: range, slack) -> list[tuple[int, float]]:
    """Return the retention steps with their factors."""
    taken = []
    for step in steps:
        if schedule.due(step):
            taken.append((step, schedule.retention_scale(step)))
            schedule.advance(step, slack=slack(step))
    return taken


@pytest.mark.parametrize("freq", [1, 2, 5])
def test_without_a_maximum_every_kth_step_is_due(freq):
    taken = run(RetentionSchedule(config(freq)), range(21), lambda step: step % 2 == 0)
    assert [step for step, _ in taken] == list(range(0, 21, freq))
    assert [scale for _, scale in taken] == [1.0, *[float(freq)] * (len(taken) - 1)]


def test_no_scale_without_the_flag():
    assert [scale for _, scale in run(RetentionSchedule(config(3, 0, "none")), range(9), lambda _: True)] == [
        1.0
    ] * 3


def test_the_interval_doubles_while_slack_and_returns_after_a_violation():
    assert [next_interval(interval, True, config(3, 20)) for interval in (3, 6, 12, 20)] == [6, 12, 20, 20]
    taken = run(RetentionSchedule(config(3, 20)), range(60), lambda step: step != 18)
    assert [step for step, _ in taken] == [0, 6, 18, 21, 27, 39, 59]
    assert [scale for _, scale in taken] == [1, 6, 12, 3, 6, 12, 20]


def test_an_unmeasured_step_leaves_the_interval():
    assert [next_interval(interval, None, config(3, 20)) for interval in (3, 6, 20)] == [3, 6, 20]
    assert next_interval(3, None, config(3, 0)) == 3
    slack = {0: True, 6: None, 12: True, 24: None, 36: False}
    taken = run(RetentionSchedule(config(3, 20)), range(40), slack.get)
    assert [step for step, _ in taken] == [0, 6, 12, 24, 36, 39]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(0, 20), st.sets(st.integers(0, 100)), st.integers(0, 99))
def test_the_factors_add_up_to_the_steps_and_resuming_is_exact(freq, more, violated, stop):
    fields = config(freq, freq + more if more else 0)
    taken = run(RetentionSchedule(fields), range(100), lambda step: step not in violated)
    for position, (step, _) in enumerate(taken):
        assert sum(scale for _, scale in taken[: position + 1]) == step + 1
    intervals = [later - earlier for (earlier, _), (later, _) in pairwise(taken)]
    assert all(freq <= interval <= max(freq, fields.retention_freq_max) for interval in intervals)

    first = RetentionSchedule(fields)
    before = run(first, range(stop), lambda step: step not in violated)
    resumed = RetentionSchedule(fields)
    resumed.load_state_dict(first.state_dict(), stop)
    assert before + run(resumed, range(stop, 100), lambda step: step not in violated) == taken


@pytest.mark.parametrize("step", [0, 1, 4, 5, 6])
@pytest.mark.parametrize("state", [None, {"interval": 5, "next_step": 0}])
def test_older_checkpoints_and_baselines_continue_at_multiples_of_k(step, state):
    schedule = RetentionSchedule(config(5))
    schedule.load_state_dict(state, step)
    first = -(-step // 5) * 5
    assert [found for found, _ in run(schedule, range(step, 20), lambda _: True)] == list(range(first, 20, 5))


def test_a_lower_maximum_shortens_the_interval():
    schedule = RetentionSchedule(config(2, 4))
    schedule.load_state_dict({"interval": 16, "next_step": 48}, 33)  # the last retention step was 32
    assert (schedule.interval, schedule.next_step) == (4, 36)
    schedule = RetentionSchedule(config(2))
    schedule.load_state_dict({"interval": 16, "next_step": 48}, 40)
    assert schedule.due(40)
    assert schedule.retention_scale(40) == 8.0


@pytest.mark.parametrize(
    "state",
    [
        {},
        [],
        {"interval": 0, "next_step": 3},
        {"interval": 2, "next_step": 6},
        {"interval": 2.0, "next_step": 3},
        {"interval": 2, "next_step": -1},
        {"interval": True, "next_step": 3},
    ],
)
def test_a_state_that_no_run_has_is_refused(state):
    with pytest.raises(ValueError, match="retention_schedule"):
        RetentionSchedule(config(2)).load_state_dict(state, 3)


TASK, OLD = torch.tensor([3.0, 4.0]), torch.tensor([2.0, -1.0])


def train(freq: int, multiplier: float, max_norm: float, old=OLD, **changes) -> tuple[float, float]:
    """Take 12 SGD steps with constant gradients; return the sum of the updates' task and retention parts."""
    fields = config(freq, scale="freq" if freq > 1 else "none", use_grad_projection=False, **changes)
    schedule, parts = RetentionSchedule(fields), torch.zeros(2)
    triple = GramTriple(*(float(x @ y) for x, y in ((TASK, TASK), (TASK, old), (old, old))))
    for step in range(13):
        a, b, norm = 1.0, 0.0, float(TASK.norm())
        if schedule.due(step):
            a, b, _, _, norm, *_ = merge(triple, multiplier, fields, schedule.retention_scale(step))
            schedule.advance(step, slack=False)
        parts += clip_factor(norm, max_norm) * torch.tensor([a, b])
    return parts[0].item(), parts[1].item()


@pytest.mark.parametrize("freq", [2, 3, 4, 6])
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 100.0])
def test_the_retention_part_is_that_of_every_step(freq, max_norm):
    """The sum of b over the steps does not depend on K, clipped or not."""
    _, every = train(1, 0.8, max_norm)
    _, rarely = train(freq, 0.8, max_norm)
    assert rarely == pytest.approx(every, rel=1e-6)


@pytest.mark.parametrize("freq", [2, 4, 6])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_the_mean_retention_weight_is_lambda_under_clipping(freq, max_norm):
    """Where retention steps are clipped as task steps are: ‖g_t + λ·g_r‖ = ‖g_t‖."""
    multiplier = 0.8
    old = torch.tensor([-1.5, 0.5])
    old = old * (-2.0 * float(TASK @ old) / (multiplier * float(old @ old)))
    assert (TASK + multiplier * old).norm() == pytest.approx(5.0)
    task, retention = train(freq, multiplier, max_norm, old)
    assert retention / task == pytest.approx(multiplier, rel=1e-5)


def test_without_the_scale_clipping_cancels_a_larger_lambda():
    """What the scale is for: K·λ instead, clipped like any step, has a mean weight below λ."""
    fields = config(4, use_grad_projection=False)
    triple = GramTriple(25.0, 2.0, 5.0)
    plain, scaled = merge(triple, 4 * 0.8, fields), merge(triple, 0.8, fields, 4.0)
    assert (plain.a, plain.b) == pytest.approx((scaled.a, scaled.b))
    assert clip_factor(plain.norm, 1.0) * plain.b < 0.8 * clip_factor(scaled.norm, 1.0) * scaled.b


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (1.0, 3 * 0.5 + 0.5)),  # the projection, −tr/rr = 0.5, is not multiplied
        ({"projection_mode": "task_priority"}, (1.0, 3 * 0.5 + 0.5)),
        ({"merging": "pcgrad"}, (1.0 + 3 * 0.5 * 1.0, 3 * 0.5 + 0.5)),
        ({"merging": "upgrad"}, (0.5 * (1.0 + 3 * 0.5 * 1.0), 0.5 * (3 * 0.5 + 0.5))),
    ],
)
def test_only_what_lambda_adds_is_multiplied(changes, expected):
    triple, fields = GramTriple(2.0, -2.0, 4.0), CraftConfig(conflict_threshold=0.0, **changes)
    scaled, plain = merge(triple, 0.5, fields, 3.0), merge(triple, 0.5, fields)
    assert (scaled.a, scaled.b) == pytest.approx(expected)
    assert scaled.norm == plain.norm
    assert scaled._replace(a=plain.a, b=plain.b) == plain


def test_task_priority_bounds_lambda_before_the_scale():
    fields = CraftConfig(projection_mode="task_priority")
    assert merge(GramTriple(1.0, 0.0, 1.0), 5.0, fields, 3.0).b == 3.0

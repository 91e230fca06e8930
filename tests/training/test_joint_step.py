"""The step with both losses in one gradient, against the retention step with two."""

import math

import pytest
import torch
from test_train_step import LR, START, by_two_tasks, craft, engine, moved, tokens, weights

from craft_ds.config.craft_config import CraftConfig
from craft_ds.training.joint_step import joint_step
from craft_ds.training.train_step import retention_step

TASK = [tokens((3.0, 1.0)), tokens((1.0, -2.0), (0.5, 0.0), (0.0, 4.0))]
ANCHORS = [tokens((-2.0, 1.0), (0.0, 1.0)), tokens((1.5, 5.0))]


def plain(**fields):
    return craft(use_grad_projection=False, **fields)


def joint(one, **changes):
    given = {"task": TASK, "anchors": ANCHORS, "anchor_tokens": 3, "constraint": None, "multiplier": 0.7}
    return joint_step(one, **{**given, "craft": plain(), "max_norm": 0.0, **changes})


def apart(one, **changes):
    given = {"task": TASK, "anchors": ANCHORS, "constraint": None, "multiplier": 0.7}
    return retention_step(one, **{**given, "craft": plain(), "max_norm": 0.0, **changes})


def test_by_hand():
    """g_t = (4.5, 3) / 4, g_r = (-0.5, 7) / 3, λ = 0.7."""
    one = engine()
    result = joint(one, extra=[2.0])
    merged = 4.5 / 4 - 0.7 * 0.5 / 3, 3 / 4 + 0.7 * 7 / 3
    assert weights(one) == moved(*merged)
    assert result.grad_norm == pytest.approx(math.hypot(*merged))
    assert (result.merged.a, result.merged.b, result.multiplier) == (1.0, 0.7, 0.7)
    assert (result.tokens, result.extra, result.applied) == (4, (2.0,), True)
    assert math.isnan(result.merged.cosine)
    assert result.triple is None


@pytest.mark.parametrize("mode", ["weighted", "equal", "task_priority"])
@pytest.mark.parametrize("max_norm", [0.0, 0.5])
@pytest.mark.parametrize("multiplier", [0.0, 0.7, 2.5])
@pytest.mark.parametrize("constraint", [None, [tokens((5.0, 0.0))]])
def test_equal_to_two_gradients(mode, max_norm, multiplier, constraint):
    same = {
        "craft": plain(projection_mode=mode),
        "max_norm": max_norm,
        "multiplier": multiplier,
        "constraint": constraint,
    }
    one, other = engine(), engine()
    found, expected = joint(one, **same), apart(other, **same)
    assert weights(one) == pytest.approx(weights(other), rel=1e-6)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
    assert (found.loss, found.retention_loss) == pytest.approx((expected.loss, expected.retention_loss))
    assert found.merged[:2] == pytest.approx(expected.merged[:2])


def test_one_multiplier_for_each_task():
    batches = {
        "anchors": [
            {**tokens((-2.0, 1.0), (0.0, 1.0)), "task_index": torch.tensor([0, 1])},
            {**tokens((1.5, 5.0)), "task_index": torch.tensor([0])},
        ],
        "multiplier": (0.4, 3.0),
        "anchor_loss": by_two_tasks,
        "craft": plain(multiplier_scope="task"),
    }
    one, other = engine(), engine()
    found, expected = joint(one, **batches), apart(other, **batches)
    assert weights(one) == pytest.approx(weights(other), rel=1e-6)
    assert found.task_losses == pytest.approx(expected.task_losses)
    assert (found.task_multipliers, found.multiplier) == ((0.4, 3.0), pytest.approx(1.7))


@pytest.mark.parametrize("step", [joint, apart])
@pytest.mark.parametrize("by_tasks", [False, True])
def test_without_a_measurement_the_step_is_the_same(step, by_tasks):
    batches = {}
    if by_tasks:
        batches = {
            "anchors": [
                {**tokens((-2.0, 1.0), (0.0, 1.0), (1.5, 5.0)), "task_index": torch.tensor([0, 1, 0])}
            ],
            "multiplier": (0.4, 3.0),
            "anchor_loss": by_two_tasks,
            "craft": plain(multiplier_scope="task"),
        }
    one, other = engine(), engine()
    found, expected = step(one, **batches, constraint=()), step(other, **batches)
    assert weights(one) == weights(other)
    assert (found.applied, found.retention_loss) == (True, None)
    assert expected.retention_loss is not None
    assert len(found.task_losses) == len(expected.task_losses)
    assert all(map(math.isnan, found.task_losses))


@pytest.mark.parametrize("where", ["task", "anchors", "constraint"])
def test_a_non_finite_loss_changes_nothing(where):
    one = engine()
    bad = {where: [tokens((math.nan, 1.0))]} | ({"anchor_tokens": 1} if where == "anchors" else {})
    assert not joint(one, **bad).applied
    assert weights(one) == list(START)
    assert joint(one).applied
    other = engine()
    joint(other)
    assert weights(one) == weights(other)


def test_no_anchor_has_a_token():
    one = engine()
    result = joint(one, anchors=[tokens()], anchor_tokens=0)
    assert result.applied
    assert weights(one) == pytest.approx([START[0] - LR * 4.5 / 4, START[1] - LR * 3 / 4])


@pytest.mark.parametrize(
    ("changes", "adds"),
    [
        ({}, False),
        ({"use_grad_projection": False}, True),
        ({"use_grad_projection": False, "multiplier": "fixed"}, True),
        ({"use_grad_projection": False, "multiplier": "nupi"}, True),
        ({"use_grad_projection": False, "multiplier_scope": "task"}, True),
        ({"use_grad_projection": False, "projection_mode": "equal"}, True),
        ({"use_grad_projection": False, "multiplier": "dynamic_barrier"}, False),
        ({"use_grad_projection": False, "retention_scale": "freq"}, False),
        ({"merging": "pcgrad"}, False),
        ({"merging": "mgda"}, False),
    ],
)
def test_when_the_losses_are_added(changes, adds):
    config = CraftConfig(enabled=True, anchor_cache_dir="cache", **changes)
    config.validate()
    assert config.adds_losses == adds

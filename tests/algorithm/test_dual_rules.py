"""νPI against Cooper, the dynamic barrier against its definition, and the state of both."""

import math
import random

import numpy as np
import pytest
import torch
from cooper.optim import nuPI
from cooper.optim.torch_optimizers.nupi_optimizer import nuPIInitType
from hypothesis import given
from hypothesis import strategies as st

from craft_ds.algorithm.dual_rules import dynamic_barrier
from craft_ds.algorithm.gram_triple import GramTriple
from craft_ds.algorithm.multiplier import DualState, RetentionRecord, conflict_metrics
from craft_ds.config.craft_config import CraftConfig


def record(step: int, violation: float, multiplier: float = 1.0, **changes) -> RetentionRecord:
    values = {"conflict": False, "cos": 0.0, "retention_weight": 1.0, "dot": 0.0} | changes
    return RetentionRecord(step, multiplier, 0.5, 0.5 + violation, **values)


def violations(seed: int, count: int = 50) -> list[float]:
    generator = random.Random(seed)
    return [generator.gauss(0.0, 1.0) for _ in range(count)]


@pytest.mark.parametrize(("kp", "ki"), [(1.0, 1.0), (0.0, 1.0), (5.0, 0.0), (10.0, 0.3)])
@pytest.mark.parametrize("nu", [-0.5, 0.0, 0.9])
@pytest.mark.parametrize("bounded", [False, True])
def test_nupi_is_coopers(nu, kp, ki, bounded):
    highest = 0.4 if bounded else 1e9
    config = CraftConfig(
        multiplier="nupi",
        nupi_nu=nu,
        nupi_kp=kp,
        nupi_ki=ki,
        initial_lambda=0.2 if bounded else 100.0,
        lambda_lr=0.2,
        lambda_max=highest,
    )
    state = DualState(config)
    reference = torch.nn.Parameter(torch.tensor([config.initial_lambda], dtype=torch.float64))
    gains = [torch.tensor([value], dtype=torch.float64) for value in (kp, ki)]
    optimizer = nuPI(
        [reference],
        lr=0.2,
        Kp=gains[0],
        Ki=gains[1],
        ema_nu=nu,
        init_type=nuPIInitType.ZEROS,
        maximize=True,
    )
    seen = set()
    for step, violation in enumerate(violations(0)):
        state.ascend(record(step, violation))
        reference.grad = torch.tensor([violation], dtype=torch.float64)
        optimizer.step()
        reference.data.clamp_(0.0, highest)
        assert state.multiplier == pytest.approx(float(reference), rel=1e-6, abs=1e-9)
        seen.add(state.multiplier)
    assert len(seen) > 2
    assert (0.0 in seen or highest in seen) == bounded


def test_nupi_without_proportional_gain_is_ascent():
    states = [DualState(CraftConfig(multiplier=rule, nupi_kp=0.0)) for rule in ("nupi", "ascent")]
    for step, violation in enumerate(violations(1)):
        for state in states:
            state.ascend(record(step, violation))
    assert states[0].multiplier == pytest.approx(states[1].multiplier)


vectors = st.lists(st.floats(-100, 100), min_size=3, max_size=3).map(np.array)


@given(vectors, vectors.filter(lambda g: np.linalg.norm(g) > 0.1), st.floats(-5, 5), st.floats(0, 10))
def test_dynamic_barrier_is_the_smallest_multiplier_that_keeps_its_barrier(g_t, g_r, violation, beta):
    config = CraftConfig(barrier_beta=beta, lambda_max=1e12)
    triple = GramTriple(*(float(value) for value in (g_t @ g_t, g_t @ g_r, g_r @ g_r)))
    multiplier = dynamic_barrier(triple, violation, config)
    progress = float((g_t + multiplier * g_r) @ g_r)
    # A product of long vectors that cancel is only as exact as its largest terms.
    slack = 1e-9 * (abs(triple.tr) + beta * abs(violation)) + 1e-14 * math.sqrt(triple.tt * triple.rr)
    assert progress >= beta * violation - slack
    assert multiplier == 0.0 or progress == pytest.approx(beta * violation, rel=1e-9, abs=slack)


def test_dynamic_barrier_is_bounded_and_never_raises():
    config = CraftConfig(lambda_max=3.0)
    assert dynamic_barrier(GramTriple(1.0, -1e9, 1e-9), 1.0, config) == 3.0
    assert dynamic_barrier(GramTriple(1.0, 0.0, 5e-324), 1e300, config) == 3.0
    assert dynamic_barrier(GramTriple(1.0, 0.0, 0.0), 1.0, config) == 0.0
    for bad in (math.nan, math.inf):
        for triple, violation in ((GramTriple(1.0, bad, 1.0), 1.0), (GramTriple(1.0, 1.0, 1.0), bad)):
            assert math.isfinite(dynamic_barrier(triple, violation, config))


def test_the_barrier_enters_the_step_and_the_record():
    state = DualState(CraftConfig(multiplier="dynamic_barrier", barrier_beta=2.0))
    compute = state.in_step(epsilon=0.25)
    assert callable(compute)
    used = compute(GramTriple(1.0, -1.0, 4.0), 0.75)
    assert used == pytest.approx((2.0 * 0.5 + 1.0) / 4.0)
    state.ascend(record(0, 0.5, multiplier=used))
    assert state.multiplier == used


def test_fixed_never_moves():
    state = DualState(CraftConfig(multiplier="fixed", initial_lambda=2.5))
    for step, violation in enumerate(violations(2)):
        assert state.in_step(0.5) == 2.5
        state.ascend(record(step, violation))
    assert state.multiplier == 2.5


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="multiplier"):
        DualState(CraftConfig(multiplier="guess")).ascend(record(0, 1.0))


@pytest.mark.parametrize("rule", ["ascent", "nupi", "fixed", "dynamic_barrier"])
def test_resuming_continues_exactly(tmp_path, rule):
    config = CraftConfig(multiplier=rule, nupi_nu=0.5, nupi_kp=3.0)
    whole, first = DualState(config), DualState(config)
    for step, violation in enumerate(violations(3)):
        if step == 20:
            torch.save(first.state_dict(), tmp_path / "state.pt")
            first = DualState(config)
            first.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for state in (whole, first):
            state.ascend(record(step, violation, multiplier=0.1 * step))
    assert first.state_dict() == whole.state_dict()


def test_states_of_older_versions_load():
    state = DualState(CraftConfig(multiplier="nupi"))
    state.ascend(record(1, 0.3))
    saved = state.state_dict()
    del saved["smoothed_violation"]
    del saved["history"][0]["removed"]
    restored = DualState(CraftConfig(multiplier="nupi"))
    restored.load_state_dict(saved)
    assert (restored.multiplier, restored.smoothed_violation) == (state.multiplier, 0.0)
    assert restored.history == state.history


@pytest.mark.parametrize("bad", [math.nan, math.inf, "1", None, [1.0]])
def test_a_state_with_a_bad_moving_average_is_refused(bad):
    state = DualState(CraftConfig())
    with pytest.raises(ValueError, match="smoothed_violation"):
        state.load_state_dict(state.state_dict() | {"smoothed_violation": bad})


def test_conflict_metrics_are_means_over_the_steps():
    steps = [
        record(1, 0.0, conflict=True, cos=-0.5, removed=0.25),
        record(2, 0.0, cos=0.3),
        record(3, 0.0, conflict=True, cos=-0.7, removed=0.49),
    ]
    assert conflict_metrics([]) == {}
    assert conflict_metrics(steps) == pytest.approx(
        {"craft/conflict_rate": 2 / 3, "craft/mean_grad_cos": -0.3, "craft/removed_energy": 0.74 / 3}
    )

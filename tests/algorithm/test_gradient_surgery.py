import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from craft_ds.algorithm.gradient_surgery import GramTriple, clip_factor, merge
from craft_ds.config.craft_config import CraftConfig

settings.register_profile("patient", deadline=None)  # a busy machine is not a failure
settings.load_profile("patient")

MODES = ["weighted", "equal", "task_priority"]
NAN, INF = math.nan, math.inf

# Gradients of five entries; the scales of real ones span many decades.
components = st.floats(-10, 10).map(lambda x: 0.0 if abs(x) < 1e-6 else x)
vectors = arrays(np.float64, 5, elements=components)
scales = st.floats(-6, 6).map(lambda exponent: 10.0**exponent)
multipliers = st.floats(0, 10)
modes = st.sampled_from(MODES)


def gram(g_t: np.ndarray, g_r: np.ndarray) -> GramTriple:
    return GramTriple(float(g_t @ g_t), float(g_t @ g_r), float(g_r @ g_r))


def config(mode: str = "weighted", *, project: bool = True, threshold: float = -0.1) -> CraftConfig:
    return CraftConfig(projection_mode=mode, use_grad_projection=project, conflict_threshold=threshold)


# By hand: g_t = (3, 0), g_r = (-1, 1): tt = 9, tr = -3, rr = 2, cos = -3/sqrt(18) = -0.7071: a conflict.
# Projected: g_t + 1.5·g_r = (1.5, 1.5).
OPPOSED = GramTriple(9.0, -3.0, 2.0)


@pytest.mark.parametrize(
    ("mode", "multiplier", "project", "a", "b", "merged"),
    [
        ("weighted", 2.0, True, 1.0, 3.5, (-0.5, 3.5)),
        ("weighted", 2.0, False, 1.0, 2.0, (1.0, 2.0)),
        ("weighted", 0.0, True, 1.0, 1.5, (1.5, 1.5)),
        ("weighted", 0.0, False, 1.0, 0.0, (3.0, 0.0)),
        ("equal", 2.0, True, 0.5, 1.25, (0.25, 1.25)),
        ("equal", 2.0, False, 0.5, 0.5, (1.0, 0.5)),
        ("task_priority", 2.0, True, 1.0, 2.5, (0.5, 2.5)),
        ("task_priority", 2.0, False, 1.0, 1.0, (2.0, 1.0)),
        ("task_priority", 0.25, True, 1.0, 1.75, (1.25, 1.75)),
        ("task_priority", 0.25, False, 1.0, 0.25, (2.75, 0.25)),
    ],
)
def test_by_hand(mode, multiplier, project, a, b, merged):
    result = merge(OPPOSED, multiplier, config(mode, project=project))
    assert (result.a, result.b) == pytest.approx((a, b))
    assert result.conflict
    assert result.cosine == pytest.approx(-1 / math.sqrt(2))
    assert result.norm == pytest.approx(math.hypot(*merged))


@pytest.mark.parametrize(("mode", "weights"), zip(MODES, [(1, 2), (0.5, 0.5), (1, 1)], strict=True))
def test_agreeing_gradients_are_not_projected(mode, weights):
    result = merge(GramTriple(9.0, 3.0, 2.0), 2.0, config(mode))
    assert not result.conflict
    assert (result.a, result.b) == weights


def test_threshold_is_a_cosine_and_exclusive():
    # The dot product is far below the threshold, the cosine (-0.05) is not.
    mild = GramTriple(1e4, -5e2, 1e4)
    assert not merge(mild, 1.0, config(threshold=-0.1)).conflict
    assert merge(mild, 1.0, config(threshold=-0.04)).conflict
    # The dot product is far above the threshold, the cosine is -1.
    assert merge(GramTriple(1e-8, -1e-8, 1e-8), 1.0, config(threshold=-0.1)).conflict
    assert not merge(GramTriple(1.0, -0.5, 1.0), 1.0, config(threshold=-0.5)).conflict


def test_positive_threshold_projects_agreeing_gradients():
    result = merge(GramTriple(4.0, 1.0, 1.0), 0.0, config(threshold=0.9))
    assert result.conflict
    assert (result.a, result.b) == (1.0, -1.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threshold", [-0.1, 0.5])  # at 0.5 a cosine of 0 counts as a conflict
def test_zero_gradients(mode, threshold):
    for triple, norm_of in [
        (GramTriple(0.0, 0.0, 4.0), lambda a, b: 2.0 * abs(b)),
        (GramTriple(4.0, 0.0, 0.0), lambda a, b: 2.0 * abs(a)),
        (GramTriple(0.0, 0.0, 0.0), lambda a, b: 0.0),
    ]:
        result = merge(triple, 2.0, config(mode, threshold=threshold))
        assert result.cosine == 0.0
        assert math.isfinite(result.a)
        assert math.isfinite(result.b)
        assert result.norm == norm_of(result.a, result.b)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "triple",
    [
        GramTriple(NAN, 1.0, 1.0),
        GramTriple(1.0, NAN, 1.0),
        GramTriple(1.0, 1.0, NAN),
        GramTriple(INF, 1.0, 1.0),
        GramTriple(1.0, -INF, 1.0),
        GramTriple(1.0, NAN, INF),
        GramTriple(NAN, NAN, NAN),
    ],
)
def test_non_finite_triples_are_recognised_and_never_raise(mode, triple):
    assert not triple.is_finite
    assert math.isnan(triple.cosine)
    result = merge(triple, 1.0, config(mode))
    assert not result.conflict, "nothing is known of the angle"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_non_finite_gradients_have_no_finite_norm(mode, bad):
    """A norm of 0 in place of NaN would pass for a vanished gradient."""
    for triple in (GramTriple(bad, NAN, 1.0), GramTriple(1.0, NAN, bad)):
        assert not math.isfinite(merge(triple, 1.0, config(mode)).norm)


def test_large_and_small_gradients_keep_their_cosine():
    assert GramTriple(1e200, -1e200, 1e200).cosine == pytest.approx(-1.0)
    assert GramTriple(1e-300, -1e-300, 1e-300).cosine == pytest.approx(-1.0)
    assert GramTriple(4.0, -1e-30, 1e-40).is_finite


def test_rounding_cannot_leave_the_domain():
    assert GramTriple(1.0, -1.0 - 1e-9, 1.0).cosine == -1.0
    assert GramTriple(1.0, 1.0 + 1e-9, 1.0).cosine == 1.0
    assert GramTriple(1.0, -1.0 - 1e-12, 1.0).norm(1.0, 1.0) == 0.0


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="projection_mode"):
        merge(OPPOSED, 1.0, CraftConfig(projection_mode="sideways"))


def test_clip_factor_by_hand():
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(4.0, 1.0) == pytest.approx(0.25, rel=1e-6)
    assert clip_factor(0.0, 1.0) == 1.0
    for off in (0.0, -1.0):
        assert clip_factor(1e9, off) == 1.0


@given(vectors, st.floats(1e-3, 100))
def test_clip_factor_is_torchs(gradient, max_norm):
    parameter = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    parameter.grad = torch.from_numpy(gradient.copy())
    norm = float(torch.nn.utils.clip_grad_norm_([parameter], max_norm))
    np.testing.assert_allclose(gradient * clip_factor(norm, max_norm), parameter.grad.numpy(), rtol=1e-12)


@given(vectors, vectors, multipliers, modes, st.booleans())
def test_norm_is_that_of_the_merged_vector(g_t, g_r, multiplier, mode, project):
    result = merge(gram(g_t, g_r), multiplier, config(mode, project=project))
    merged = result.a * g_t + result.b * g_r
    # Near a cancellation the square root halves the digits: the bound is absolute, in units of the terms.
    size = np.linalg.norm(result.a * g_t) + np.linalg.norm(result.b * g_r)
    assert result.norm == pytest.approx(np.linalg.norm(merged), rel=1e-9, abs=1e-7 * size)


@given(vectors, vectors, multipliers, modes)
@example(np.array([3.0, 0, 0, 0, 0]), np.array([-1.0, 1, 0, 0, 0]), 0.0, "weighted")
def test_projected_task_gradient_is_orthogonal(g_t, g_r, multiplier, mode):
    """What is left of the merged gradient without its λ·g_r (in `equal`: ½·g_r) is orthogonal to g_r."""
    result = merge(gram(g_t, g_r), multiplier, config(mode))
    assume(result.conflict)
    kept = {"weighted": multiplier, "equal": 0.5, "task_priority": min(multiplier, 1.0)}[mode]
    projected = result.a * g_t + (result.b - kept) * g_r
    assert abs(projected @ g_r) <= 1e-9 * np.linalg.norm(g_t) * np.linalg.norm(g_r) * (1 + kept)


@given(vectors, vectors, multipliers, modes)
@example(np.array([3.0, 0, 0, 0, 0]), np.array([-1.0, 1, 0, 0, 0]), 0.0, "weighted")
def test_merged_gradient_never_conflicts_when_projecting(g_t, g_r, multiplier, mode):
    """A step against the merged gradient never raises the retention loss to first order (threshold 0)."""
    result = merge(gram(g_t, g_r), multiplier, config(mode, threshold=0.0))
    merged = result.a * g_t + result.b * g_r
    assert merged @ g_r >= -1e-9 * np.linalg.norm(g_t) * np.linalg.norm(g_r)


def test_without_projection_it_may_conflict():
    triple = gram(np.array([3.0, 0.0]), np.array([-1.0, 1.0]))
    result = merge(triple, 0.0, config(project=False))
    assert result.a * triple.tr + result.b * triple.rr < 0


@given(vectors, vectors, scales, scales, multipliers, modes, st.booleans())
def test_conflict_and_cosine_do_not_depend_on_scale(g_t, g_r, scale_t, scale_r, multiplier, mode, project):
    triple = gram(g_t, g_r)
    assume(abs(triple.cosine + 0.1) > 1e-9)
    scaled = triple.scaled(scale_t, scale_r)
    assert scaled == pytest.approx(gram(scale_t * g_t, scale_r * g_r), rel=1e-9, abs=1e-20)
    before = merge(triple, multiplier, config(mode, project=project))
    after = merge(scaled, multiplier, config(mode, project=project))
    assert after.cosine == pytest.approx(before.cosine, abs=1e-9)
    assert after.conflict == before.conflict


@given(vectors, vectors, scales, multipliers, modes, st.booleans())
def test_scaling_both_gradients_scales_the_result(g_t, g_r, scale, multiplier, mode, project):
    """A loss scale on both passes changes no weight, and the norm by itself."""
    triple = gram(g_t, g_r)
    assume(abs(triple.cosine + 0.1) > 1e-9)
    before = merge(triple, multiplier, config(mode, project=project))
    after = merge(triple.scaled(scale, scale), multiplier, config(mode, project=project))
    assert (after.a, after.b) == pytest.approx((before.a, before.b), rel=1e-9)
    size = abs(before.a) * math.sqrt(triple.tt) + abs(before.b) * math.sqrt(triple.rr)
    assert after.norm == pytest.approx(scale * before.norm, rel=1e-6, abs=1e-7 * scale * size)


@given(vectors, vectors, multipliers, modes)
def test_projection_changes_nothing_without_conflict(g_t, g_r, multiplier, mode):
    triple = gram(g_t, g_r)
    assume(triple.cosine >= -0.1)
    assert merge(triple, multiplier, config(mode)) == merge(triple, multiplier, config(mode, project=False))


@given(vectors, vectors, multipliers, multipliers, modes, st.booleans())
def test_more_multiplier_never_follows_the_retention_less(g_t, g_r, low, high, mode, project):
    low, high = sorted((low, high))
    triple = gram(g_t, g_r)
    weights = [merge(triple, multiplier, config(mode, project=project)).b for multiplier in (low, high)]
    assert weights[0] <= weights[1]

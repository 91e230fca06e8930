"""The merging rules against TorchJD on matrices, and against definitions where TorchJD's tolerances end."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchjd.aggregation import MGDA, CAGrad, PCGrad, UPGrad
from torchjd.linalg import QuadprogProjector

from craft_ds.algorithm.gradient_surgery import GramTriple, merge
from craft_ds.algorithm.merging import agem, cagrad, merging_weights, mgda, pcgrad, upgrad
from craft_ds.config.craft_config import CraftConfig

RULES = ["pcgrad", "agem", "cagrad", "mgda", "upgrad"]
UNSCALED = [(1.0, 1.0), (3.0, 0.5)]
EXTREME = [*UNSCALED, (1e-6, 1e6), (1e6, 1e-6), (1e-6, 1e-6), (1e6, 1e6)]


def pairs(seed: int, norms: list[tuple[float, float]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Conflicting, aligned, orthogonal, opposed, equal and random gradients of the given norms."""
    rng = np.random.default_rng(seed)
    unit = [vector / np.linalg.norm(vector) for vector in rng.standard_normal((2, 6))]
    x = unit[0]
    y = unit[1] - (unit[1] @ x) * x
    y /= np.linalg.norm(y)
    cosines = [-0.99, -0.6, -0.1, 0.0, 0.3, 0.95, *rng.uniform(-1, 1, 4)]
    directions = [(x, c * x + math.sqrt(1 - c * c) * y) for c in cosines] + [(x, x)]
    return [(s * t, q * r) for t, r in directions for s, q in norms]


def triple_of(g_t: np.ndarray, g_r: np.ndarray) -> GramTriple:
    return GramTriple(float(g_t @ g_t), float(g_t @ g_r), float(g_r @ g_r))


def assert_merged(
    weights: tuple[float, float], g_t: np.ndarray, g_r: np.ndarray, expected: np.ndarray
) -> None:
    merged = weights[0] * g_t + weights[1] * g_r
    size = max(np.linalg.norm(expected), 1e-9 * min(np.linalg.norm(g_t), np.linalg.norm(g_r)))
    assert np.linalg.norm(merged - expected) <= 1e-6 * size


def aggregate(aggregator, g_t: np.ndarray, g_r: np.ndarray) -> np.ndarray:
    return aggregator(torch.from_numpy(np.stack([g_t, g_r]))).numpy()


@pytest.mark.parametrize("multiplier", [1.0, 0.0, 0.3, 7.0])
@pytest.mark.parametrize("seed", range(3))
def test_pcgrad_is_torchjds(seed, multiplier):
    for g_t, g_r in pairs(seed, EXTREME):
        # TorchJD has no weight of a task. Its two projected gradients come apart on scaled rows: s + λ·(…).
        weights = pcgrad(triple_of(g_t, g_r), multiplier)
        if multiplier == 0.0:
            expected = g_t - min(0.0, g_t @ g_r) / (g_r @ g_r) * g_r
        else:
            expected = aggregate(PCGrad(), g_t, multiplier * g_r)
        assert_merged(weights, g_t, g_r, expected)


@pytest.mark.parametrize("multiplier", [1.0, 0.0, 0.3, 7.0])
@pytest.mark.parametrize("seed", range(3))
def test_upgrad_is_torchjds(seed, multiplier):
    """A dual cone depends on directions only, so TorchJD gets unit rows: it regularises small ones away."""
    projector = QuadprogProjector(norm_eps=1e-14, reg_eps=1e-12)
    for g_t, g_r in pairs(seed, EXTREME):
        norms = np.array([np.linalg.norm(g_t), np.linalg.norm(g_r)])
        preference = torch.from_numpy(0.5 * norms * np.array([1.0, multiplier]))
        rows = g_t / norms[0], g_r / norms[1]
        expected = aggregate(UPGrad(preference, projector=projector), *rows)
        assert_merged(upgrad(triple_of(g_t, g_r), multiplier), g_t, g_r, expected)
    g_t, g_r = pairs(seed, UNSCALED)[0]
    default = aggregate(UPGrad(projector=projector), g_t, multiplier * g_r) if multiplier else None
    if default is not None:
        assert_merged(upgrad(triple_of(g_t, g_r), multiplier), g_t, g_r, default)


@pytest.mark.parametrize("seed", range(3))
def test_mgda_is_torchjds(seed):
    for g_t, g_r in pairs(seed, EXTREME):
        expected = aggregate(MGDA(epsilon=1e-15, max_iters=1000), g_t, g_r)
        assert_merged(mgda(triple_of(g_t, g_r)), g_t, g_r, expected)


@pytest.mark.parametrize("c", [0.0, 0.4, 0.9, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_cagrad_is_torchjds(seed, c):
    """TorchJD solves by an interior-point method to about 1e-8 of the cost, so to 1e-4 of the weights."""
    for g_t, g_r in pairs(seed, UNSCALED)[:-2]:
        expected = aggregate(CAGrad(c, norm_eps=1e-10), g_t, g_r)
        a, b = cagrad(triple_of(g_t, g_r), 1.0, c)
        assert np.linalg.norm(a * g_t + b * g_r - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("multiplier", [1.0, 0.0, 0.3, 7.0])
@pytest.mark.parametrize("c", [0.1, 0.5, 0.9, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_cagrad_solves_its_own_problem(seed, c, multiplier):
    """It is the vector within c·‖g_0‖ of g_0 with the best worse progress: none around it is better."""
    for g_t, g_r in pairs(seed, EXTREME)[: -len(EXTREME)]:
        norms = np.linalg.norm(g_t), np.linalg.norm(g_r)
        mean = 0.5 * (g_t + multiplier * g_r)
        radius = c * np.linalg.norm(mean)
        a, b = cagrad(triple_of(g_t, g_r), multiplier, c)
        merged = a * g_t + b * g_r
        assert np.linalg.norm(merged - mean) == pytest.approx(radius, rel=1e-6)

        # Duality: the worse progress equals the minimum over w of <g_w, g_0> + r·‖g_w‖, found by bisection,
        # in a variable that keeps the digits of both weights.
        def dual(share, g_t=g_t, g_r=g_r, norms=norms, mean=mean, radius=radius):
            weights = np.array([share * norms[1], (1 - share) * norms[0]])
            mixture = np.stack([g_t, g_r]).T @ (weights / weights.sum())
            return mixture @ mean + radius * np.linalg.norm(mixture)

        low, high = 0.0, 1.0
        for _ in range(200):
            left, right = low + (high - low) / 3, high - (high - low) / 3
            low, high = (low, right) if dual(left) <= dual(right) else (left, high)
        best = min(dual(0.5 * (low + high)), dual(0.0), dual(1.0))
        worse = min(g_t @ merged, g_r @ merged)
        rounding = np.linalg.norm(merged) * (1e-9 * min(norms) + 1e-14 * max(norms))
        assert worse == pytest.approx(best, rel=1e-6, abs=rounding)


@pytest.mark.parametrize("seed", range(3))
def test_agem_is_the_nearest_vector_without_conflict(seed):
    for g_t, g_r in pairs(seed, EXTREME):
        a, b = agem(triple_of(g_t, g_r))
        assert a == 1.0
        if g_t @ g_r >= 0:
            assert b == 0.0
        else:
            expected = g_t - (g_t @ g_r) / (g_r @ g_r) * g_r
            assert_merged((a, b), g_t, g_r, expected)


@pytest.mark.parametrize("rule", RULES)
def test_zero_gradients(rule):
    config = CraftConfig(merging=rule)
    for triple in (GramTriple(4.0, 0.0, 0.0), GramTriple(0.0, 0.0, 4.0), GramTriple(0.0, 0.0, 0.0)):
        a, b = merging_weights(triple, 1.0, config)
        rows = np.array([math.sqrt(triple.tt), 0.0]), np.array([0.0, math.sqrt(triple.rr)])
        aggregators = {
            "pcgrad": PCGrad(),
            "mgda": MGDA(),
            "cagrad": CAGrad(0.5),
            "upgrad": UPGrad(projector=QuadprogProjector()),
        }
        expected = rows[0] if rule == "agem" else aggregate(aggregators[rule], *rows)
        np.testing.assert_allclose(a * rows[0] + b * rows[1], expected, atol=1e-9)


def test_cagrad_of_opposed_gradients_by_hand():
    """g_0 = 0.5 and r = 0.25: the retention gradient improves least, so the result moves to its side."""
    a, b = cagrad(GramTriple(9.0, -6.0, 4.0), 1.0, 0.5)
    assert a * 3.0 - b * 2.0 == pytest.approx(0.25)


@pytest.mark.parametrize("rule", ["pcgrad", "agem", "mgda", "upgrad"])
def test_opposed_gradients(rule):
    g_t, g_r = np.array([3.0, 0.0]), np.array([-2.0, 0.0])
    result = merge(triple_of(g_t, g_r), 1.0, CraftConfig(merging=rule))
    assert np.linalg.norm(result.a * g_t + result.b * g_r) == pytest.approx(0.0, abs=1e-12)
    assert result.conflict


# Gradients are fp32, whose squares do not underflow in fp64.
vectors = st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=4).map(np.array)


@given(vectors, vectors, st.floats(0, 10), st.sampled_from(["pcgrad", "agem", "mgda", "upgrad"]))
def test_the_merged_gradient_never_raises_the_retention_loss(g_t, g_r, multiplier, rule):
    a, b = merging_weights(triple_of(g_t, g_r), multiplier, CraftConfig(merging=rule))
    size = (abs(a) * np.linalg.norm(g_t) + abs(b) * np.linalg.norm(g_r)) * np.linalg.norm(g_r)
    assert (a * g_t + b * g_r) @ g_r >= -1e-9 * size


@given(vectors, vectors, st.floats(0, 10), st.sampled_from(RULES))
def test_merge_reports_norm_and_removed_share(g_t, g_r, multiplier, rule):
    triple = triple_of(g_t, g_r)
    result = merge(triple, multiplier, CraftConfig(merging=rule))
    assert (result.a, result.b) == merging_weights(triple, multiplier, CraftConfig(merging=rule))
    projected = rule in ("pcgrad", "agem", "upgrad") and triple.cosine < 0
    assert result.removed == pytest.approx(triple.cosine**2 if projected else 0.0)


@pytest.mark.parametrize("rule", RULES)
def test_non_finite_triples_never_raise(rule):
    for bad in (math.nan, math.inf):
        for triple in (GramTriple(bad, 1.0, 1.0), GramTriple(1.0, bad, 1.0), GramTriple(1.0, 1.0, bad)):
            result = merge(triple, 1.0, CraftConfig(merging=rule))
            assert not math.isfinite(result.norm)
            assert not result.conflict


def test_the_guides_rule_reports_what_it_removes():
    opposed = GramTriple(9.0, -3.0, 2.0)
    assert merge(opposed, 1.0, CraftConfig()).removed == pytest.approx(0.5)
    assert merge(opposed, 1.0, CraftConfig(use_grad_projection=False)).removed == 0.0
    assert merge(opposed, 1.0, CraftConfig(conflict_threshold=-0.9)).removed == 0.0


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="merging"):
        merge(GramTriple(1.0, 0.0, 1.0), 1.0, CraftConfig(merging="sum"))

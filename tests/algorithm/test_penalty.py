"""Quadratic penalties on shards, against autograd and fp64."""

import pytest
import torch
from torch import Tensor

from craft_ds.algorithm.gram import CPU_BLOCK
from craft_ds.algorithm.gram_triple import GramTriple
from craft_ds.algorithm.penalty import PenaltySums, QuadraticPenalty

SIZES = ((3, 5), (1,), (CPU_BLOCK + 7,), (0,))
WEIGHT = 0.7


def tensors(seed: int, scale: float = 1.0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(size, generator=rng) for size in SIZES]


def fishers(name: str) -> list[Tensor] | None:
    return [tensor.square() for tensor in tensors(9)] if name == "ewc" else None


def by_autograd(theta: list[Tensor], theta_0: list[Tensor], fisher: list[Tensor] | None):
    """Return loss and gradient in fp64."""
    leaves = [tensor.double().requires_grad_() for tensor in theta]
    weights = fisher or [torch.ones_like(tensor) for tensor in theta]
    loss = sum(
        (WEIGHT / 2 * f.double() * (leaf - start.double()).square()).sum()
        for leaf, start, f in zip(leaves, theta_0, weights, strict=True)
    )
    return loss.item(), torch.autograd.grad(loss, leaves)


def product(x: list[Tensor], y: list[Tensor]) -> float:
    return sum((a.double() * b.double()).sum().item() for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("name", ["l2", "ewc"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_sums_are_those_of_autograd(name, count):
    theta_0, fisher = tensors(0), fishers(name)
    theta = [start + step for start, step in zip(theta_0, tensors(1, 0.01), strict=True)]
    gradients = [tensors(2 + number) for number in range(count)]
    loss, p = by_autograd(theta, theta_0, fisher)
    found = QuadraticPenalty(WEIGHT, theta_0, fisher).sums(theta, *gradients)
    assert found.dtype == torch.float64
    expected = [loss, product(p, p), *(product(p, gradient) for gradient in gradients)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["l2", "ewc"])
def test_the_gradient_is_added_in_place(name):
    theta_0, fisher, gradient = tensors(0), fishers(name), tensors(2)
    theta = [start + step for start, step in zip(theta_0, tensors(1, 0.01), strict=True)]
    _, p = by_autograd(theta, theta_0, fisher)
    expected = [g.double() + 0.3 * part for g, part in zip(gradient, p, strict=True)]
    QuadraticPenalty(WEIGHT, theta_0, fisher).add_gradient_(gradient, theta, 0.3)
    for found, wanted in zip(gradient, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-7)


def test_small_distances_keep_their_digits():
    """In one fp32 sum g + c·θ − c·θ_0, a distance in the last digits of θ would be lost."""
    start, gradient = torch.full((4,), 1000.0), torch.zeros(4)
    theta = torch.nextafter(start, torch.tensor(2000.0))
    QuadraticPenalty(3.3, [start]).add_gradient_([gradient], [theta], 1.0)
    torch.testing.assert_close(gradient, 3.3 * (theta - start), rtol=1e-6, atol=0.0)


def test_a_gradient_that_cannot_be_viewed_is_refused():
    shard = torch.zeros(4, 6).t()
    with pytest.raises(RuntimeError, match="view"):
        QuadraticPenalty(1.0, [torch.zeros(6, 4)]).add_gradient_([shard], [torch.ones(6, 4)], 1.0)


def test_the_triple_of_the_sum_follows_from_the_sums():
    theta_0, theta, g_t, g_r = (tensors(seed) for seed in range(4))
    penalty = QuadraticPenalty(WEIGHT, theta_0)
    sums = PenaltySums(*penalty.sums(theta, g_t, g_r).tolist())
    a, b = 0.5, 2.0
    triple = GramTriple(product(g_t, g_t), product(g_t, g_r), product(g_r, g_r)).scaled(a, b)
    _, p = by_autograd(theta, theta_0, None)
    total = [a * g.double() + part for g, part in zip(g_t, p, strict=True)]
    scaled = [b * g.double() for g in g_r]
    expected = (product(total, total), product(total, scaled), product(scaled, scaled))
    assert sums.scaled(a, b).added_to(triple) == pytest.approx(expected, rel=1e-6)


def test_no_penalty_changes_nothing():
    triple = GramTriple(1.0, 2.0, 3.0)
    assert PenaltySums().scaled(0.5, 0.5).added_to(triple) == triple

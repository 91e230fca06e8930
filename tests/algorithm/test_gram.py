import math

import pytest
import torch

from craft_ds.algorithm.gram import CPU_BLOCK, gram, merge_, scale_, squared_norm


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(task, retention):
    """The triple in fp64 over everything at once."""
    t, r = (torch.cat([part.double().flatten() for part in parts]) for parts in (task, retention))
    return [float(t @ t), float(t @ r), float(r @ r)]


def assert_triple(found, task, retention, tolerance=1e-6):
    assert found.dtype == torch.float64
    assert found.shape == (3,)
    tt, tr, rr = exact(task, retention)
    assert found[0].item() == pytest.approx(tt, rel=tolerance)
    assert found[1].item() == pytest.approx(tr, abs=tolerance * math.sqrt(tt * rr))
    assert found[2].item() == pytest.approx(rr, rel=tolerance)


def test_gram_by_hand():
    task, retention = (
        [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])],
        [torch.tensor([4.0, -5.0]), torch.ones(1, 1)],
    )
    assert gram(task, retention).tolist() == [14.0, -3.0, 42.0]


def test_gram_of_uneven_shards():
    shapes = [(7, 5), (3,), (1,), (13, 11), (0,)]
    task = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    retention = [random(*shape, seed=i + 50) for i, shape in enumerate(shapes)]
    assert_triple(gram(task, retention), task, retention)


@pytest.mark.parametrize("numel", [CPU_BLOCK - 1, CPU_BLOCK, CPU_BLOCK + 1, 3 * CPU_BLOCK + 17])
def test_gram_across_blocks(numel):
    task, retention = [random(numel, seed=1)], [random(numel, seed=2)]
    assert_triple(gram(task, retention), task, retention)


def test_gram_keeps_its_digits_over_many_elements():
    """One fp32 dot over a sum that grows this far is off by more than 1e-5."""
    task = [torch.full((1 << 23,), 0.1) + random(1 << 23, seed=3) * 1e-3]
    retention = [torch.full((1 << 23,), 0.3)]
    assert_triple(gram(task, retention), task, retention)


def test_gram_of_non_contiguous_shards():
    task, retention = [random(300, 400, seed=1).T], [random(800, 300, seed=2)[::2]]
    assert not task[0].is_contiguous()
    assert not retention[0].is_contiguous()
    assert_triple(gram(task, retention), task, retention)


def test_gram_of_bf16_shards_sums_in_higher_precision():
    task = [random(100_000, seed=1, dtype=torch.bfloat16)]
    retention = [random(100_000, seed=2, dtype=torch.bfloat16)]
    assert_triple(gram(task, retention), task, retention)


def test_nothing_to_sum_is_zero():
    assert gram([], []).tolist() == [0.0, 0.0, 0.0]
    assert squared_norm([]).item() == 0.0
    assert squared_norm([]).dtype == torch.float64
    merge_([], [], 1.0, 1.0)
    scale_([], 2.0)


def test_squared_norm_is_the_triple_s_diagonal():
    parts = [random(3 * CPU_BLOCK + 17, seed=1), random(7, 5, seed=2)]
    assert squared_norm(parts).item() == pytest.approx(gram(parts, parts)[0].item(), rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(value):
    task, retention = [random(10, seed=1)], [random(10, seed=2)]
    task[0][3] = value
    tt, tr, rr = gram(task, retention).tolist()
    assert not math.isfinite(tt)
    assert not math.isfinite(tr)
    assert math.isfinite(rr)


def test_shards_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        gram([torch.ones(3)], [])
    with pytest.raises((ValueError, RuntimeError)):
        gram([torch.ones(3)], [torch.ones(4)])


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.7), (0.5, 0.5), (1.0, 0.0), (1.0, -0.3), (0.25, 1.0)])
def test_merge(a, b):
    task, retention = [random(7, 5, seed=1), random(3, seed=2)], [random(7, 5, seed=3), random(3, seed=4)]
    expected = [a * t.double() + b * r.double() for t, r in zip(task, retention, strict=True)]
    kept = [t.clone() for t in task]
    pointers = [r.data_ptr() for r in retention]
    merge_(retention, task, a, b)
    for found, wanted, pointer in zip(retention, expected, pointers, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
        assert found.data_ptr() == pointer
    assert all(torch.equal(t, k) for t, k in zip(task, kept, strict=True))


def test_scale():
    parts = [torch.tensor([1.0, -2.0]), torch.tensor([[4.0]])]
    scale_(parts, 0.5)
    assert [part.tolist() for part in parts] == [[0.5, -1.0], [[2.0]]]


def test_scale_by_one_does_not_touch_the_memory(monkeypatch):
    monkeypatch.setattr(torch, "_foreach_mul_", lambda *_: pytest.fail("a pass for nothing"))
    scale_([torch.ones(3)], 1.0)

"""Copies of gradient shards: shapes, places, and what the mathematics makes of them."""

import pytest
import torch

from craft_ds.algorithm.flat_runs import flat_runs
from craft_ds.algorithm.gram import gram, merge_
from craft_ds.algorithm.penalty import QuadraticPenalty
from craft_ds.engines.gradient_buffer import buffered

SHAPES = [(7, 5), (0, 5), (3,), (), (1,), (13, 11)]


def shards(seed: int, *, neighbours: bool = False) -> list[torch.Tensor]:
    """Shards of several shapes, some without elements; neighbours in one storage, or each on its own."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) for shape in SHAPES]
    if not neighbours:
        return made
    flat = torch.cat([tensor.flatten() for tensor in made])
    parts = flat.split([tensor.numel() for tensor in made])
    return [part.view(tensor.shape) for part, tensor in zip(parts, made, strict=True)]


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize(("buffer", "dtype"), [("bf16", torch.bfloat16), ("cpu", torch.float32)])
def test_copies(buffer, dtype, neighbours):
    originals = shards(1, neighbours=neighbours)
    copies = buffered(originals, buffer)
    for copy, original in zip(copies, originals, strict=True):
        assert copy.shape == original.shape
        assert copy.dtype == dtype
        assert torch.equal(copy, original.to(dtype))
    expected = [original.to(dtype).clone() for original in originals]
    for original in originals:
        original.zero_()
    assert all(map(torch.equal, copies, expected))
    assert len(list(flat_runs(copies))) == 1


def test_the_device_buffer_is_the_shards_themselves():
    originals = shards(1)
    assert all(
        copy is original for copy, original in zip(buffered(originals, "device"), originals, strict=True)
    )


@pytest.mark.parametrize("buffer", ["device", "bf16", "cpu"])
def test_no_shards(buffer):
    assert buffered([], buffer) == []


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("buffer", ["bf16", "cpu"])
def test_triple_and_merge_of_a_copy(buffer, neighbours):
    task, retention = shards(1), shards(2, neighbours=neighbours)
    copies = buffered(task, buffer)
    same = [copy.float() for copy in copies]  # fp32 shards of the very values
    torch.testing.assert_close(gram(copies, retention), gram(same, retention), rtol=1e-6, atol=1e-5)
    expected = [0.5 * t + 2.0 * r for t, r in zip(same, retention, strict=True)]
    merge_(retention, copies, 0.5, 2.0)
    for merged, exact in zip(retention, expected, strict=True):
        assert merged.dtype == torch.float32
        torch.testing.assert_close(merged, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("buffer", ["bf16", "cpu"])
def test_a_penalty_reads_a_copy(buffer):
    masters, start, task, retention = (shards(seed) for seed in range(4))
    copies = buffered(task, buffer)
    penalty = QuadraticPenalty(0.3, start)
    found = penalty.sums(masters, copies, retention)
    expected = penalty.sums(masters, [copy.float() for copy in copies], retention)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)

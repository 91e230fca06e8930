import itertools
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from craft_ds.algorithm import kernels
from craft_ds.algorithm.flat_runs import flat_runs
from craft_ds.algorithm.gram import gram, merge_, squared_norm

GRAM = sys.modules["craft_ds.algorithm.gram"]  # the package has a function of this name


def cut(storage: torch.Tensor, sizes: list[int], gaps: list[int]) -> list[torch.Tensor]:
    """Return tensors that lie in a storage one after the other, with gaps before them."""
    tensors, at = [], 0
    for size, gap in zip(sizes, gaps, strict=True):
        tensors.append(storage[at + gap : at + gap + size])
        at += gap + size
    return tensors


sizes = st.lists(st.integers(0, 9), min_size=1, max_size=8)


@given(sizes=sizes, data=st.data())
def test_runs_have_every_element_once_and_break_at_gaps(sizes, data):
    lists = []
    for seed in range(2):
        gaps = data.draw(st.lists(st.integers(0, 1), min_size=len(sizes), max_size=len(sizes)))
        storage = torch.randn(200, generator=torch.Generator().manual_seed(seed))
        lists.append((cut(storage, sizes, gaps), gaps))
    (task, task_gaps), (retention, retention_gaps) = lists
    runs = list(flat_runs(task, retention))
    for position, tensors in enumerate((task, retention)):
        assert torch.equal(torch.cat([run[position] for run in runs] or [torch.empty(0)]), torch.cat(tensors))
    kept = [i for i, size in enumerate(sizes) if size]
    between = itertools.pairwise(kept)
    breaks = sum(
        any(task_gaps[j] or retention_gaps[j] for j in range(before + 1, after + 1))
        for before, after in between
    )
    assert len(runs) == (breaks + 1 if kept else 0)


def test_a_unit_of_shaped_neighbours_is_one_run_and_a_write_reaches_them():
    storage = torch.arange(10.0)
    neighbours = [storage[:6].view(2, 3), storage[6:10].view(2, 2)]
    [(run,)] = flat_runs(neighbours)
    run.zero_()
    assert not storage.any()


def test_tensors_of_two_storages_or_dtypes_are_two_runs():
    assert len(list(flat_runs([torch.ones(2), torch.ones(2)]))) == 2
    storage = torch.zeros(4)
    other = storage[2:].view(torch.int32)
    assert len(list(flat_runs([storage[:2], other]))) == 2


@pytest.fixture
def uncompiled(monkeypatch):
    """The kernels' own code on the CPU, in parts of 5 elements."""
    monkeypatch.setattr(kernels, "_MAX_ELEMENTS", 5)
    monkeypatch.setattr(GRAM, "compiled_kernels", lambda device: kernels.Kernels(lambda function: function))


def test_kernels_compute_what_eager_code_computes(uncompiled, monkeypatch):
    storage = torch.randn(2, 60, generator=torch.Generator().manual_seed(3))
    sizes, gaps = [7, 0, 12, 1, 20], [0, 0, 1, 0, 0]
    task, retention = (cut(row, sizes, gaps) for row in storage)
    found = gram(task, retention), squared_norm(task)
    merged = [tensor.clone() for tensor in retention]
    merge_(merged, task, 0.25, -3.0)
    monkeypatch.setattr(GRAM, "compiled_kernels", lambda device: None)
    torch.testing.assert_close(found[0], gram(task, retention), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], squared_norm(task), rtol=1e-6, atol=1e-6)
    merge_(retention, task, 0.25, -3.0)
    for one, other in zip(merged, retention, strict=True):
        torch.testing.assert_close(one, other)


def test_kernels_of_no_elements(uncompiled):
    nothing = [torch.empty(0)]
    assert gram(nothing, nothing).tolist() == [0.0, 0.0, 0.0]
    assert squared_norm(nothing).item() == 0.0
    merge_(nothing, nothing, 1.0, 1.0)


def test_eager_code_is_used_where_nothing_compiles(caplog, monkeypatch):
    def fail(function, **options):
        raise RuntimeError("no C compiler\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    kernels.compiled_kernels.cache_clear()
    assert kernels.compiled_kernels(torch.device("cuda")) is None
    kernels.compiled_kernels.cache_clear()
    assert "no C compiler" in caplog.text
    assert "and more" not in caplog.text
    assert kernels.compiled_kernels(torch.device("cpu")) is None

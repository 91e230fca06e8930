import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from craft_ds.algorithm.flat_runs import flat_runs


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


def test_a_transposed_tensor_is_a_run_of_its_own():
    storage = torch.arange(12.0)
    tensors = [storage[:6].view(2, 3).T, storage[6:]]
    runs = [run for (run,) in flat_runs(tensors)]
    assert [run.tolist() for run in runs] == [[0, 3, 1, 4, 2, 5], [6, 7, 8, 9, 10, 11]]

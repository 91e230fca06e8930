import doctest

import torch

from craft_ds.memory_planner import tensor_memory
from craft_ds.memory_planner.tensor_memory import MemoryCounter


def test_the_example():
    assert doctest.testmod(tensor_memory).failed == 0
    assert doctest.testmod(tensor_memory).attempted > 0


def test_earlier_tensors_do_not_count():
    x = torch.zeros(1000)
    with MemoryCounter() as memory:
        y = x.view(10, 100)[2:]
        x.add_(1.0)
        y.detach().mul_(2.0)
    assert (memory.live, memory.peak, memory.largest) == (0, 0, 0)


def test_the_peak_counts_tensors_alive_together():
    with MemoryCounter() as memory:
        for _ in range(5):
            x = torch.zeros(100)
        del x
        y = torch.zeros(10)
        z = y[:3]
        del y
    assert memory.live == z.untyped_storage().nbytes() == 40
    assert memory.peak == 800  # a new x is made before the old one goes
    assert memory.largest == 400


def test_a_backward_pass_counts():
    w = torch.ones(100, requires_grad=True)
    with MemoryCounter() as memory:
        w.exp().sum().backward()  # keeps exp(w) until its gradient is there
    assert memory.live == w.grad.numel() * 4
    assert memory.peak >= 800


def test_counters_nest():
    with MemoryCounter() as outer:
        a = torch.zeros(10)
        with MemoryCounter() as inner:
            b = torch.zeros(20)
        c = torch.zeros(30)
    assert inner.live == b.numel() * 4
    assert outer.live == (a.numel() + b.numel() + c.numel()) * 4

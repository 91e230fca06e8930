"""Named phases of a step."""

import time

import pytest
import torch
from torch.profiler import profile

from craft_ds.engines.phase_timer import PhaseTimer, phase


def test_a_phase_without_a_timer_leaves_no_trace():
    with profile(acc_events=True) as recorded, phase("data"):
        torch.ones(1)
    assert "data" not in {event.key for event in recorded.key_averages()}


def test_seconds_are_summed_while_the_timer_runs():
    timer = PhaseTimer(torch.device("cpu"))
    timer.start()
    for name in ("data", "optimizer", "data"):
        with phase(name):
            time.sleep(0.01)
    timer.stop()
    with phase("optimizer"):
        time.sleep(0.05)
    seconds = timer.seconds()
    assert list(seconds) == ["data", "optimizer"]
    assert seconds["data"] > 0.02
    assert seconds["optimizer"] > 0.01


def test_an_error_ends_its_phase():
    timer = PhaseTimer(torch.device("cpu"))
    timer.start()
    try:
        with pytest.raises(ValueError, match="of the step"), phase("data"):
            raise ValueError("of the step")
    finally:
        timer.stop()
    with phase("data"):
        pass
    assert timer.seconds() == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times events of a CUDA stream")
def test_cuda_phases_are_those_of_the_stream():
    device = torch.device("cuda")
    timer = PhaseTimer(device)
    values = torch.ones(4096, 4096, device=device)
    timer.start()
    with phase("task_forward"):
        for _ in range(50):
            values = values @ values
    with phase("optimizer"):
        pass
    timer.stop()
    seconds = timer.seconds()
    assert seconds["task_forward"] > 1e-3 > seconds["optimizer"]

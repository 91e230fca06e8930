"""The phases of a training step: their names in a profiler's trace, and their seconds while a timer runs."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import record_function

_running: "PhaseTimer | None" = None


def phase(name: str) -> AbstractContextManager[None]:
    """Name what runs inside; does nothing unless a `PhaseTimer` runs. Phases are not nested."""
    return nullcontext() if _running is None else _running.timing(name)


class PhaseTimer:
    """Sums the seconds of each phase between `start` and `stop`.

    On CUDA, where the host only enqueues work, they are those of the device's current stream: time in which
    it computes for a phase, or waits for the host in it. At most one timer runs at a time.

    Args:
        device: Device of training.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._host: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Time the phases from now on."""
        global _running
        _running = self

    def stop(self) -> None:
        """Time no more phases."""
        global _running
        _running = None

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add the time inside to a phase, and name it in a profiler's trace."""
        with record_function(name):
            if self._device.type == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                yield
                end.record()
                self._events.append((name, begin, end))
            else:
                started = time.perf_counter()
                yield
                self._host[name] += time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        """Return the sum of each phase that ran, in the order of their first run. Waits for the device."""
        seconds = dict(self._host)
        if self._events:
            torch.cuda.synchronize(self._device)
        for name, begin, end in self._events:
            seconds[name] = seconds.get(name, 0.0) + begin.elapsed_time(end) / 1000
        return seconds

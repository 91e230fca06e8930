"""Time, memory, kernels and synchronisations of an action on the device, which may be the CPU."""

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from harness import default_device
from torch.profiler import ProfilerActivity, profile


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(action: Callable[[], Any], repeats: int, warm_up: int = 2) -> float:
    """Return the median seconds of an action, the device's work included."""
    times = []
    for repeat in range(-warm_up, repeats):
        synchronize()
        started = time.perf_counter()
        action()
        synchronize()
        if repeat >= 0:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def peak_bytes(action: Callable[[], Any]) -> int:
    """Return the device's peak of allocated memory during an action; 0 on the CPU."""
    if not torch.cuda.is_available():
        action()
        return 0
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    action()
    synchronize()
    return torch.cuda.max_memory_allocated()


def allocated_bytes() -> int:
    """Return the device's allocated memory; 0 on the CPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def launches(action: Callable[[], Any]) -> dict[str, Any]:
    """Count the kernels and copies that an action launches, and how often the host waits for the device.

    With the seconds of the kernels that take the longest.

    On the CPU, the number of operators stands for that of kernels, so that the code runs there too.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    synchronize()
    with profile(activities=activities) as profiler:
        action()
        synchronize()
    on_device = [
        event
        for event in profiler.events()
        if event.device_type != torch.autograd.DeviceType.CPU and not event.is_user_annotation
    ]
    copies = [event for event in on_device if event.name.startswith(("Memcpy", "Memset"))]
    kernels = len(on_device) - len(copies) if torch.cuda.is_available() else len(profiler.events())
    totals: dict[str, float] = {}
    for event in on_device:
        totals[event.name] = totals.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e6
    slowest = sorted(totals.items(), key=lambda item: -item[1])[:12]
    return {
        "kernels": kernels,
        "copies": len(copies),
        "synchronisations": _synchronisations(action),
        "device_s": sum(totals.values()),
        "slowest": {name[:90]: value for name, value in slowest},
    }


def _synchronisations(action: Callable[[], Any]) -> int:
    if default_device().type == "cpu":
        action()
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Not the mode's own warning about itself, once per process.
    return sum("called a synchronizing" in str(warning.message) for warning in caught)

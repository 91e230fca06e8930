"""The card: bytes per second of a large copy, and operations per second of a large matrix product."""

from functools import partial
from typing import Any

import torch
from harness import default_device, hardware

from gpu_parts.timing import seconds


def run(small: bool) -> dict[str, Any]:
    """Measure the two ceilings that the other parts are compared with."""
    device = default_device()
    source = torch.randn(1 << 20 if small else 1 << 30, device=device)
    copy = seconds(partial(torch.empty_like(source).copy_, source), repeats=10)
    result: dict[str, Any] = {"copy_bytes_per_s": 2 * source.nbytes / copy}
    del source
    width = 128 if small else 8192
    kinds = {
        "bfloat16": (torch.bfloat16, False),
        "tf32": (torch.float32, True),
        "float32": (torch.float32, False),
    }
    for name, (dtype, tf32) in kinds.items():
        if device.type == "cuda" or name == "float32":
            torch.backends.cuda.matmul.allow_tf32 = tf32
            left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
            product = seconds(partial(torch.matmul, left, right), repeats=10)
            result[f"{name}_flop_per_s"] = 2 * width**3 / product
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return result | {
        "name": properties.name if properties else "CPU",
        "memory_bytes": properties.total_memory if properties else 0,
        "host": hardware(),
    }


def table(result: dict[str, Any]) -> list[str]:
    """Return the lines of the table."""
    rates = ", ".join(
        f"{name.removesuffix('_flop_per_s')} {value / 1e12:.1f} TFLOP/s"
        for name, value in result.items()
        if name.endswith("_flop_per_s")
    )
    return [
        f"{result['name']}, {result['memory_bytes'] / 2**30:.1f} GiB; a copy moves "
        f"{result['copy_bytes_per_s'] / 1e9:.0f} GB/s; {rates}"
    ]

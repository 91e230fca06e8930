"""Gradient surgery against its floor: 20 bytes per element at the bandwidth of a large copy.

The triple reads two gradients (8 bytes), the merge reads two and writes one (12 bytes).
"""

from functools import partial
from typing import Any

import torch
from harness import default_device
from torch import Tensor

from craft_ds.algorithm.gram import gram, merge_
from gpu_parts.timing import launches, seconds

PARAMETERS, UNITS = 603, 48
"""Parameters of pi0_fast, and its FSDP2 units, whose gradients lie in one storage each."""
_LIMIT = 1e-6


def run(small: bool) -> dict[str, Any]:
    """Time triple and merge on one flat shard, on units of neighbouring tensors, and on separate tensors."""
    rows = []
    parameters, units = (20, 4) if small else (PARAMETERS, UNITS)
    for size in [1 << 18] if small else [50_000_000, 500_000_000]:
        task, retention = (torch.randn(size, device=default_device()) for _ in range(2))
        bandwidth = 2 * task.nbytes / seconds(task.clone, repeats=10)
        layouts = {"one": (1, 1), "units": (parameters, units), "separate": (parameters, parameters)}
        for layout, (tensors, storages) in layouts.items():
            gradients = [_cut(gradient, tensors, storages) for gradient in (task, retention)]
            rows.append({"elements": size, "layout": layout, **_measure(*gradients, bandwidth)})
            del gradients
    return {"rows": rows, "ok": all(row["error"] <= _LIMIT for row in rows)}


def _cut(gradient: Tensor, tensors: int, storages: int) -> list[Tensor]:
    """Return a gradient as tensors, about as many as asked; those of a storage follow each other there."""
    parts = [part.clone() for part in gradient.split(-(-gradient.numel() // storages))]
    per_part = -(-tensors // storages)
    return [tensor for part in parts for tensor in part.split(-(-part.numel() // per_part))]


def _measure(g_t: list[Tensor], g_r: list[Tensor], bandwidth: float) -> dict[str, Any]:
    elements = sum(part.numel() for part in g_t)
    exact = sum(torch.dot(part.double(), part.double()).item() for part in g_t)
    error = abs(gram(g_t, g_r)[0].item() / exact - 1)
    triple = seconds(partial(gram, g_t, g_r), repeats=10)
    merge = seconds(partial(merge_, g_r, g_t, 1e-9, 1.0 - 1e-9), repeats=10)

    def both() -> None:
        gram(g_t, g_r)
        merge_(g_r, g_t, 1e-9, 1.0 - 1e-9)

    return {
        "tensors": len(g_t),
        "triple_s": triple,
        "merge_s": merge,
        "triple_in_floors": triple * bandwidth / (8 * elements),
        "merge_in_floors": merge * bandwidth / (12 * elements),
        "in_floors": (triple + merge) * bandwidth / (20 * elements),
        "error": error,
        "launches": launches(both),
    }


def table(result: dict[str, Any]) -> list[str]:
    """Return the lines of the table."""
    lines = [
        "Surgery against its floor of 20 bytes per element; times as multiples of the floor in brackets",
        "",
        "| elements | tensors | triple ms | merge ms | together | error of the triple | kernels |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        tensors = f"{row['tensors']}, {row['layout']}" if row["tensors"] > 1 else "1"
        lines.append(
            f"| {row['elements'] / 1e6:.1f} M | {tensors} | {1e3 * row['triple_s']:.2f} "
            f"({row['triple_in_floors']:.2f}) | {1e3 * row['merge_s']:.2f} ({row['merge_in_floors']:.2f}) | "
            f"({row['in_floors']:.2f}) | {row['error']:.0e} | "
            f"{row['launches']['kernels']} |"
        )
    return lines

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
    for size in [1 << 18] if small else [50_000_000, 500_000_000]:
        task, retention = (torch.randn(size, device=default_device()) for _ in range(2))
        bandwidth = 2 * task.nbytes / seconds(task.clone, repeats=10)
        for layout, cut in (("one", _whole), ("units", _units), ("separate", _separate)):
            gradients = cut(task), cut(retention)
            rows.append({"elements": size, "layout": layout, **_measure(*gradients, bandwidth)})
            del gradients
    return {"rows": rows, "ok": all(row["error"] <= _LIMIT for row in rows)}


def _whole(gradient: Tensor) -> list[Tensor]:
    return [gradient]


def _units(gradient: Tensor) -> list[Tensor]:
    """Return as many tensors as pi0_fast has parameters; those of a unit follow each other in one storage."""
    units = [part.clone() for part in gradient.split(-(-gradient.numel() // UNITS))]
    per_unit = -(-PARAMETERS // UNITS)
    return [tensor for unit in units for tensor in unit.split(-(-unit.numel() // per_unit))]


def _separate(gradient: Tensor) -> list[Tensor]:
    return [part.clone() for part in gradient.split(-(-gradient.numel() // PARAMETERS))]


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

"""Operations on lists of local gradient shards, independent of the engine.

A shard is this rank's part of the gradient: a tensor of any shape, usually fp32. Nothing here communicates:
the caller sums the local results over ranks in one collective.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from craft_ds.algorithm.flat_runs import flat_runs

# One fp32 dot product over a billion elements has an error of 1e-3. Blocks that fit into the cache, summed in
# fp64, have an error of 2e-7 and read each gradient once for all three products.
CPU_BLOCK = 1 << 16
# On an accelerator a kernel launch costs more than the cache saves, and its dot is a tree reduction.
DEVICE_BLOCK = 1 << 26


def blocks(*lists: Sequence[Tensor], cast: bool = True) -> Iterator[tuple[Tensor, ...]]:
    """Yield the elements of lists of tensors block by block, 1-D, so that temporaries stay small.

    Args:
        *lists: Tensors in the same order and sizes, on one device or some of them in host memory.
        cast: Return fp32 blocks on the accelerator, if any tensor is on one; otherwise the blocks are views
            of contiguous tensors.
    """
    for run in flat_runs(*lists):
        device = next((tensor.device for tensor in run if tensor.device.type != "cpu"), run[0].device)
        size = CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK
        for block in zip(*(tensor.split(size) for tensor in run), strict=True):
            # Here, so that shards in bf16 or in host memory need no complete copy.
            yield tuple(_fp32(part, device) for part in block) if cast else block


def _fp32(part: Tensor, device: torch.device) -> Tensor:
    return part.to(device, torch.float32, non_blocking=True)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Return the dot product of two blocks."""
    # BLAS on the CPU sums sequentially: error 3e-5 on a block of equal signs. `sum` is pairwise.
    return (x * y).sum() if x.device.type == "cpu" else torch.dot(x, y)


def sum_products(products: list[Tensor], like: Sequence[Tensor]) -> Tensor:
    """Return the sum of the blocks' products: fp64 scalar on the device of the tensors `like`."""
    if not products:
        device = like[0].device if like else None
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(products).double().sum()


def gram(task: Sequence[Tensor], retention: Sequence[Tensor]) -> Tensor:
    """Return this rank's part of the Gram triple (tt, tr, rr): fp64, shape (3,), on the shards' device.

    Args:
        task: Shards of g_t; may be in bf16 or in host memory (`craft_ds.engines.gradient_buffer`).
        retention: Shards of g_r, in the same order and shapes.
    """
    products: tuple[list[Tensor], ...] = ([], [], [])
    for t, r in blocks(task, retention):
        for target, (x, y) in zip(products, ((t, t), (t, r), (r, r)), strict=True):
            target.append(dot(x, y))
    return torch.stack([sum_products(entries, retention) for entries in products])


def squared_norm(shards: Sequence[Tensor]) -> Tensor:
    """Return this rank's part of ‖g‖²: fp64 scalar tensor on the shards' device."""
    return sum_products([dot(x, x) for (x,) in blocks(shards)], shards)


def merge_(retention: Sequence[Tensor], task: Sequence[Tensor], a: float, b: float) -> None:
    """Merge in place: g_r ← a·g_t + b·g_r.

    The retention shards are overwritten, since they are where the engine's optimizer reads gradients. The
    task's may be in bf16 or in host memory; the latter are copied to the device block by block.
    """
    retention, task = _in_place(retention, task)
    scale_(retention, b)
    if not retention:
        return
    if retention[0].device == task[0].device:
        torch._foreach_add_(retention, task, alpha=a)
        return
    for r, t in blocks(retention, task, cast=False):
        r.add_(t.to(r.device, non_blocking=True), alpha=a)


def scale_(shards: Sequence[Tensor], factor: float) -> None:
    """Multiply every shard by a factor, in place."""
    (shards,) = _in_place(shards)
    if shards and factor != 1.0:
        torch._foreach_mul_(shards, factor)


def _in_place(*lists: Sequence[Tensor]) -> Sequence[list[Tensor]]:
    """Return views that together have the elements of the lists: as few as possible."""
    if all(tensor.is_contiguous() for tensors in lists for tensor in tensors):
        runs = list(flat_runs(*lists))
        return [[run[i] for run in runs] for i in range(len(lists))]
    return [list(tensors) for tensors in lists]

"""Operations on lists of local gradient shards, independent of the engine.

A shard is this rank's part of the gradient: a tensor of any shape, usually fp32. Nothing here communicates:
the caller sums the local results over ranks in one collective. On an accelerator each operation is one
compiled kernel that reads the gradients once, where kernels can be compiled.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from craft_ds.algorithm.flat_runs import flat_runs
from craft_ds.algorithm.kernels import Kernels, compiled_kernels

# One fp32 dot product over a billion elements has an error of 1e-3. Blocks that fit into the cache, summed in
# fp64, have an error of 2e-7 and read each gradient once for all three products.
CPU_BLOCK = 1 << 16
# On an accelerator a kernel launch costs more than the cache saves, and its dot is a tree reduction.
DEVICE_BLOCK = 1 << 26


def _kernels(*lists: Sequence[Tensor]) -> Kernels | None:
    if not lists[0] or not all(tensor.is_contiguous() for tensors in lists for tensor in tensors):
        return None
    return compiled_kernels(lists[0][0].device)


def _blocks(*lists: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    for tensors in zip(*lists, strict=True):
        size = CPU_BLOCK if tensors[0].device.type == "cpu" else DEVICE_BLOCK
        # Block by block, so that bf16 shards need no complete fp32 copy.
        yield from zip(
            *(map(Tensor.float, tensor.reshape(-1).split(size)) for tensor in tensors), strict=True
        )


def _dot(x: Tensor, y: Tensor) -> Tensor:
    # BLAS on the CPU sums sequentially: error 3e-5 on a block of equal signs. `sum` is pairwise.
    return (x * y).sum() if x.device.type == "cpu" else torch.dot(x, y)


def _sum(products: list[Tensor], like: Sequence[Tensor]) -> Tensor:
    if not products:
        device = like[0].device if like else None
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(products).double().sum()


def gram(task: Sequence[Tensor], retention: Sequence[Tensor]) -> Tensor:
    """Return this rank's part of the Gram triple (tt, tr, rr): fp64, shape (3,), on the shards' device.

    Args:
        task: Shards of g_t.
        retention: Shards of g_r, in the same order and shapes.
    """
    if kernels := _kernels(task, retention):
        triples = [kernels.triple(t, r) for t, r in flat_runs(task, retention)]
        return torch.stack(triples).sum(dim=0) if triples else task[0].new_zeros(3, dtype=torch.float64)
    products: tuple[list[Tensor], ...] = ([], [], [])
    for t, r in _blocks(task, retention):
        for target, (x, y) in zip(products, ((t, t), (t, r), (r, r)), strict=True):
            target.append(_dot(x, y))
    return torch.stack([_sum(entries, task) for entries in products])


def squared_norm(shards: Sequence[Tensor]) -> Tensor:
    """Return this rank's part of ‖g‖²: fp64 scalar tensor on the shards' device."""
    if kernels := _kernels(shards):
        return _sum([kernels.squared_norm(x) for (x,) in flat_runs(shards)], shards)
    return _sum([_dot(x, x) for (x,) in _blocks(shards)], shards)


def merge_(retention: Sequence[Tensor], task: Sequence[Tensor], a: float, b: float) -> None:
    """Merge in place and without a temporary: g_r ← a·g_t + b·g_r.

    The retention shards are overwritten, since they are where the engine's optimizer reads gradients.
    """
    if kernels := _kernels(task, retention):
        for t, r in flat_runs(task, retention):
            kernels.merge_(r, t, a, b)
        return
    scale_(retention, b)
    if retention:
        torch._foreach_add_(list(retention), list(task), alpha=a)


def scale_(shards: Sequence[Tensor], factor: float) -> None:
    """Multiply every shard by a factor, in place."""
    if shards and factor != 1.0:
        torch._foreach_mul_(list(shards), factor)

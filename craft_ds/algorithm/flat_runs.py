"""Views over neighbouring tensors of one storage, so that a kernel is launched once for all of them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def flat_runs(*lists: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield 1-D views of the elements of lists of tensors, in order.

    Tensors that follow each other in their storage, in all lists alike, give one view: FSDP2 reduces the
    gradients of a unit into one storage, and pi0_fast has 603 tensors in 48 units. Tensors without elements
    give nothing.

    Args:
        lists: Lists of tensors with the same numbers of elements. One that is not contiguous gives a copy.

    Raises:
        ValueError: The lists, or tensors at the same place, have different sizes.
    """
    run: list[tuple[Tensor, ...]] = []
    for shaped in zip(*lists, strict=True):
        if all(tensor.numel() == 0 for tensor in shaped):
            continue
        tensors = tuple(tensor.reshape(-1) for tensor in shaped)
        if len({tensor.numel() for tensor in tensors}) > 1:
            raise ValueError(f"tensors of different sizes: {[tuple(tensor.shape) for tensor in shaped]}")
        if run and not all(map(_follows, tensors, run[-1])):
            yield _views(run)
            run = []
        run.append(tensors)
    if run:
        yield _views(run)


def _follows(tensor: Tensor, before: Tensor) -> bool:
    """Return True if a tensor begins where another one ends."""
    return (
        tensor.dtype == before.dtype
        and tensor.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()
        and tensor.storage_offset() == before.storage_offset() + before.numel()
    )


def _views(run: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    size = sum(tensors[0].numel() for tensors in run)
    return tuple(torch.as_strided(first, (size,), (1,)) for first in run[0])

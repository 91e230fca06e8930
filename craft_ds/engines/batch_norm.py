"""Batch normalisation on several ranks: each normalises its own samples; the running statistics are averaged.

Without averaging, every rank would evaluate with other statistics, a checkpoint would hold those of rank 0
only, and a resumed run would differ from an uninterrupted one.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norm_warning(policy: nn.Module, world_size: int) -> str | None:
    """Return a warning where the number of ranks changes the loss, else None.

    Args:
        policy: The policy.
        world_size: Number of ranks.
    """
    layers = sum(isinstance(module, _BatchNorm) for module in policy.modules())
    if world_size == 1 or not layers:
        return None
    return (
        f"{layers} batch normalisations use the statistics of each rank's own samples, so the loss depends "
        "on --batch_size and the number of ranks; their running statistics are averaged over the ranks after "
        "every step"
    )


@torch.no_grad()
def average_running_statistics_(module: nn.Module) -> None:
    """Average the running means and variances over all ranks, in one all-reduce if there are any. Collective.

    Args:
        module: The policy; the buffers of its batch normalisations are changed in place.
    """
    buffers: list[Tensor] = [
        buffer
        for part in module.modules()
        if isinstance(part, _BatchNorm)
        for buffer in (part.running_mean, part.running_var)
        if buffer is not None
    ]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten().float() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, values in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(values.view_as(buffer))

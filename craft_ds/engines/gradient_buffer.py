"""Where g_t is kept while the second pass of a retention step runs (`--craft.gradient_buffer`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from craft_ds.algorithm.flat_runs import flat_runs
from craft_ds.config.craft_config import GradientBuffer


def buffered(shards: Sequence[Tensor], buffer: GradientBuffer) -> list[Tensor]:
    """Return copies of gradient shards in a buffer, of the same shapes; with `device` the shards themselves.

    The copies follow each other in one storage, so that few kernels read them.

    Args:
        shards: fp32 shards on one device.
        buffer: `bf16`: rounded to the nearest bfloat16, on the shards' device. `cpu`: in host memory, pinned
            if the shards are on an accelerator; the copy runs in its stream.
    """
    if buffer == "device" or not shards:
        return list(shards)
    device = shards[0].device
    dtype, place = (torch.bfloat16, device) if buffer == "bf16" else (torch.float32, torch.device("cpu"))
    sizes = [shard.numel() for shard in shards]
    flat = torch.empty(sum(sizes), dtype=dtype, device=place, pin_memory=place != device)
    start = 0
    for (run,) in flat_runs(shards):
        flat[start : start + run.numel()].copy_(run, non_blocking=True)
        start += run.numel()
    return [part.view(shard.shape) for part, shard in zip(flat.split(sizes), shards, strict=True)]

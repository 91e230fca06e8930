"""Moments of any optimizer by parameter, as checkpoints hold them: fp32, flat, and by name."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from craft_ds.engines.compact_adam import CompactAdam, local_shard
from craft_ds.tensor_io.tensor_file import ReadRange, fill_


def read_moments(
    optimizer: torch.optim.Optimizer, parameter: Tensor, start: int = 0, numel: int | None = None
) -> Mapping[str, Tensor]:
    """Return the moments of a range of a parameter's local shard; empty before the first step.

    They are views, or for `CompactAdam` computed when they are looked up.

    Args:
        optimizer: The optimizer.
        parameter: One of its parameters, possibly a DTensor.
        start: First element.
        numel: Number of elements; None: all.
    """
    numel = local_shard(parameter).numel() if numel is None else numel
    if isinstance(optimizer, CompactAdam):
        return optimizer.moments(parameter, start, numel)
    return {
        key: local_shard(values).reshape(-1).narrow(0, start, numel)
        for key, values in optimizer.state.get(parameter, {}).items()
        if torch.is_tensor(values) and key != "step" and values.shape == parameter.shape
    }


class Part(NamedTuple):
    """A range of a local shard, and what it is a part of.

    Attributes:
        name: Name of the parameter in the policy.
        start: Offset of the range in the flattened parameter.
        offset: Offset of the range in the local shard.
        numel: Number of elements.
    """

    name: str
    start: int
    offset: int
    numel: int


@torch.no_grad()
def load_moments(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    parts: Sequence[Part],
    read: ReadRange,
    keys: Sequence[str],
    step: Tensor | int,
) -> None:
    """Create the state of a parameter that the first step would create, and read its moments.

    Args:
        optimizer: The optimizer.
        parameter: One of its parameters, possibly a DTensor.
        parts: Ranges of its local shard; moments are zero elsewhere.
        read: Reads `<part name>.<key>`.
        keys: Names of the moments.
        step: The optimizer's step count, in the form that the optimizer keeps.

    Raises:
        ValueError: The optimizer has other moments.
    """

    def moment(key: str) -> Tensor:
        values = torch.zeros_like(parameter)
        flat = local_shard(values).view(-1)
        for part in parts:
            fill_(flat.narrow(0, part.offset, part.numel), read, f"{part.name}.{key}", part.start)
        return values

    if isinstance(optimizer, CompactAdam):
        optimizer.set_moments(parameter, keys, lambda key: local_shard(moment(key)).view(-1), int(step))
    else:
        optimizer.state[parameter].update(step=step, **{key: moment(key) for key in keys})

"""What a checkpoint holds of the engine: which tensors, under which names, and which rank has which part."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from craft_ds.distributed.collectives import gather_objects
from craft_ds.engines.base import Engine, Shard
from craft_ds.lora.adapters import Adapters
from craft_ds.policies.weights import unique_tensors
from craft_ds.tensor_io.tensor_file import TensorSpec


class StoredParameter(NamedTuple):
    """What the files hold of a parameter: its name there, its global shape, names of its optimizer state."""

    stored_name: str
    shape: tuple[int, ...]
    keys: tuple[str, ...]

    @property
    def weight(self) -> TensorSpec:
        """The parameter in the weights' file."""
        return TensorSpec(self.stored_name, self.shape, torch.float32)

    @property
    def moments(self) -> list[TensorSpec]:
        """Its optimizer state in the optimizer's file."""
        return [TensorSpec(f"{self.stored_name}.{key}", self.shape, torch.float32) for key in self.keys]


@dataclass(frozen=True)
class ShardPlan:
    """Parameters and optimizer state of one rank, to be written with those of the others.

    Attributes:
        shards: Yields this rank's parts, afresh at each call.
        layout: Every parameter of all ranks that is written, by its name in the policy.
        buffers: What the weights' file holds besides (main rank only).
        steps: The optimizer's own step count.
        adapters: What trains, if not the policy's own weights: only they are written.
    """

    shards: Callable[[], Iterable[Shard]]
    layout: Mapping[str, StoredParameter]
    buffers: Mapping[str, Tensor]
    steps: int
    adapters: Adapters | None

    def on_host(self, memory: dict[str, Tensor]) -> "ShardPlan":
        """The same in host memory of its own, which training does not change.

        Args:
            memory: Takes this rank's whole share. Given again it is filled again: to touch new memory takes
                longer than to copy.
        """

        def copy(name: str, values: Tensor) -> Tensor:
            if name not in memory or memory[name].shape != values.shape:
                memory[name] = torch.empty(values.shape, dtype=torch.float32, pin_memory=values.is_cuda)
            return memory[name].copy_(values.detach())

        copies = [
            replace(
                shard,
                master=copy(shard.name, shard.master),
                state={key: copy(f"{shard.name}.{key}", values) for key, values in shard.state.items()},
            )
            for shard in self.shards()
        ]
        buffers = {name: values.clone() for name, values in self.buffers.items()}
        return replace(self, shards=lambda: copies, buffers=buffers)


def plan_shards(engine: Engine, adapters: Adapters | None) -> ShardPlan:
    """Views of all that is written. Collective: call on all ranks.

    Args:
        engine: Holds parameters and optimizer state.
        adapters: What trains, if not the policy's own weights.

    Raises:
        RuntimeError: The ranks do not hold every element exactly once: a file of theirs would have a hole.
    """

    def shards() -> Iterable[Shard]:
        return engine.shards(frozen=adapters is None)

    mine = {
        shard.name: (
            StoredParameter(
                adapters.keys[shard.name] if adapters else shard.name, shard.shape, tuple(shard.state)
            ),
            (shard.start, shard.master.numel()),
        )
        for shard in shards()
    }
    layout: dict[str, StoredParameter] = {}
    parts: dict[str, list[tuple[int, int]]] = {}
    for part in gather_objects(mine):
        for name, (stored, place) in part.items():
            if layout.setdefault(name, stored) != stored:
                raise RuntimeError(f"the ranks disagree on what {name} is: {layout[name]} and {stored}")
            parts.setdefault(name, []).append(place)
    for name, stored in layout.items():
        end = 0
        for start, numel in sorted(parts[name]):
            if start != end:
                break
            end += numel
        if end != math.prod(stored.shape):
            raise RuntimeError(f"the ranks do not hold {name} exactly once: {sorted(parts[name])}")

    policy = engine.module.policy
    rest: dict[str, Tensor] = {}
    if adapters is None and engine.rank == 0:
        tensors = unique_tensors(policy).items()
        rest = {name: tensor.detach().cpu() for name, tensor in tensors if name not in layout}
    steps = [int(state["step"]) for state in engine.optimizer.state.values() if "step" in state]
    return ShardPlan(shards, layout, rest, max(steps, default=0), adapters)

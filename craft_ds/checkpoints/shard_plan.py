"""Plan of a checkpoint's tensors: their names in the files, their shapes and the parts each rank holds."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from craft_ds.distributed.collectives import gather_objects
from craft_ds.engines.base import Engine, Shard
from craft_ds.lora.adapters import Adapters
from craft_ds.policies.weights import unique_tensors
from craft_ds.tensor_io.tensor_file import TensorSpec

EMA = "ema"
"""Name of the moving average of the weights (`--ema_decay`) among a parameter's optimizer state."""


class StoredParameter(NamedTuple):
    """A parameter in the files: its name there, its global shape and the names of its optimizer state."""

    stored_name: str
    shape: tuple[int, ...]
    keys: tuple[str, ...]

    @property
    def weight(self) -> TensorSpec:
        """The parameter's entry in the weights file."""
        return TensorSpec(self.stored_name, self.shape, torch.float32)

    @property
    def moments(self) -> list[TensorSpec]:
        """The entries of its optimizer state in the optimizer file."""
        return [TensorSpec(f"{self.stored_name}.{key}", self.shape, torch.float32) for key in self.keys]


@dataclass(frozen=True)
class ShardPlan:
    """Parameters and optimizer state that one rank writes.

    Attributes:
        shards: Returns a new iterator over this rank's shards at each call.
        layout: Every written parameter of all ranks, by its name in the policy.
        buffers: Further tensors of the weights file (rank 0 only).
        steps: The optimizer's own step count.
        adapters: The trained adapters, which alone are written; None for full training.
    """

    shards: Callable[[], Iterable[Shard]]
    layout: Mapping[str, StoredParameter]
    buffers: Mapping[str, Tensor]
    steps: int
    adapters: Adapters | None

    def on_host(self, memory: dict[str, Tensor]) -> "ShardPlan":
        """Return a copy in host memory, which training does not change.

        Args:
            memory: Holds the copies by name; reused if passed again, as allocating takes longer than copying.
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


def plan_shards(engine: Engine, adapters: Adapters | None, average: Mapping[str, Tensor]) -> ShardPlan:
    """Plan which tensors each rank writes, as views of the engine's. Collective: call on all ranks.

    Args:
        engine: Holds parameters and optimizer state.
        adapters: The trained adapters; None for full training.
        average: This rank's parts of the weights' average, flat, by parameter; empty: there is none.

    Raises:
        RuntimeError: The ranks do not hold every element exactly once, so the file would have gaps.
    """

    def shards() -> Iterator[Shard]:
        for shard in engine.shards(frozen=adapters is None):
            if shard.name in average:
                yield replace(shard, state={**shard.state, EMA: average[shard.name]})
            else:
                yield shard

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
                raise RuntimeError(f"the ranks disagree on {name}: {layout[name]} and {stored}")
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

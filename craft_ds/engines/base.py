"""The engine protocol: what the training loop needs of an engine. No engine contains the loop."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from craft_ds.config.craft_config import GradientBuffer
from craft_ds.policies.token_loss import Loss, PolicyWithLoss, TokenLoss, token_loss
from craft_ds.tensor_io.tensor_file import ReadRange, fill_

__all__ = ["Batch", "Engine", "Loss", "ReadRange", "Shard", "fill_"]

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Shard:
    """This rank's part of one parameter, with its optimizer state.

    Attributes:
        name: Fully qualified name as in the policy's `state_dict`.
        shape: Global shape of the parameter.
        start: Offset of the part in the flattened parameter, in elements.
        master: The part itself, 1-D; fp32 if it trains, also where forward and backward run in bf16.
        state: Optimizer state of the same shape, by name (`exp_avg`, …); empty before the first step.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    master: Tensor
    state: Mapping[str, Tensor]


class Engine(Protocol):
    """A model, an optimizer and the ranks that share them.

    An engine is built from a `PolicyWithLoss` whose parameters may be on the meta device (buffers are real),
    a `ReadRange` of its parameters and persistent buffers, and a function that builds the optimizer after
    the parameters are sharded. Each rank reads only the part it keeps.

    Gradients: losses are *sums* over tokens, and an engine's gradient is the sum over ranks of the gradient
        of each rank's accumulated loss. The gradient of the global mean is therefore `gradient()` divided by
        the global token count; the step applies that factor with the merge, so that ranks with unequal token
        counts need no collective before the backward pass.

    Attributes:
        module: The unsharded view of the model (`PolicyWithLoss`).
        optimizer: The torch optimizer whose `param_groups` hold the learning rate.
        device: Device of the batches.
        rank: This process among `world_size`.
        world_size: Number of processes.
        replicas: Number of ranks that hold the same shard of a gradient (1 without hybrid sharding): sums
            over all ranks of products of local shards count each element this often.
    """

    module: PolicyWithLoss
    optimizer: torch.optim.Optimizer
    device: torch.device
    rank: int
    world_size: int
    replicas: int

    def forward(self, batch: Batch, loss: Loss = token_loss) -> TokenLoss:
        """Return the loss of this rank's micro-batch. Collective: call on all ranks, with the same `loss`.

        `loss` gets the very tensors of the batch, since masks keep what `on_host` returns.
        """
        ...

    def evaluate(self, batch: Batch, loss: Loss = token_loss) -> TokenLoss:
        """Run `forward` without gradients, in eval mode. Collective: call on all ranks."""
        ...

    def act(self, batch: Batch) -> Tensor:
        """Return the policy's greedy action chunk, shape (B, chunk, action width), before its postprocessor.

        Collective: call on all ranks, equally often; each has its own observations.
        """
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient; `last` marks the last micro-batch of a pass. Collective."""
        ...

    def gradient(self) -> Sequence[Tensor]:
        """Return views of the accumulated local shards, which `step` uses; zero for unused parameters."""
        ...

    def take_gradient(self, buffer: GradientBuffer = "device") -> Sequence[Tensor]:
        """Return the accumulated shards and leave the engine empty, ready for a second pass.

        Args:
            buffer: Where the returned shards are kept.
        """
        ...

    def by_parameter(self, gradient: Sequence[Tensor]) -> Sequence[tuple[str, Tensor]]:
        """Return this rank's parts of a gradient with the names of their parameters, as views.

        Together the ranks have each element once (`replicas` times), without padding.

        Args:
            gradient: From `gradient` or `take_gradient`.
        """
        ...

    def masters(self) -> Sequence[Tensor]:
        """Return views of the trained parameters' local fp32 shards, in the order and sizes of `gradient`.

        Padding, which no parameter has elements in, is zero, as in the gradient.
        """
        ...

    def step(self) -> None:
        """Update the parameters from the current `gradient()`, then clear it. Collective."""
        ...

    def zero_grad(self) -> None:
        """Clear the accumulated gradient without a step."""
        ...

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum a small fp64 tensor over all ranks in exactly one collective; it stays on the device."""
        ...

    def sum_scalars(self, values: Tensor) -> list[float]:
        """Return the values of `sum_over_ranks` on the host."""
        ...

    def shards(self, *, frozen: bool = True) -> Iterator[Shard]:
        """Yield this rank's part of every parameter: together the ranks yield each element exactly once.

        Args:
            frozen: Also yield frozen parameters.
        """
        ...

    def load_parameters(self, read: ReadRange) -> None:
        """Set this rank's part of every parameter, read by name. Collective: call on all ranks."""
        ...

    def load_optimizer(self, read: ReadRange, keys: Sequence[str], steps: int) -> None:
        """Set the optimizer state of every trainable parameter.

        Args:
            read: Reads `<parameter name>.<key>`.
            keys: State names, such as `exp_avg`.
            steps: The optimizer's step count.
        """
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...

    def close(self) -> None:
        """Release model and optimizer, but not the process group. Collective: call on all ranks."""
        ...

"""One process without sharding: the reference that every sharded engine is compared with."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from craft_ds.engines.base import Batch, ReadRange, Shard, fill_
from craft_ds.engines.fused_adam import fuse_
from craft_ds.engines.grad_shards import GradShards
from craft_ds.engines.optimizer_state import Part, load_moments, read_moments
from craft_ds.policies.meta_init import materialize_
from craft_ds.policies.pi0_fast.generation import action_chunk
from craft_ds.policies.token_loss import Loss, PolicyWithLoss, TokenLoss, token_loss
from craft_ds.policies.weights import unique_tensors


class SingleEngine(GradShards):
    """Plain PyTorch. Trainable parameters and moments are fp32; bf16 is autocast around the forward pass.

    Args:
        module: The policy with its loss; parameters may be on the meta device.
        read: Reads its parameters and persistent buffers by range.
        build_optimizer: Builds the optimizer of the policy's parameters.
        device: Device of training.
        dtype: `torch.float32` or `torch.bfloat16`.
    """

    rank = 0
    world_size = 1
    replicas = 1

    def __init__(
        self,
        module: PolicyWithLoss,
        read: ReadRange,
        build_optimizer: Callable[[], torch.optim.Optimizer],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        for parameter in module.parameters():
            if not parameter.requires_grad:  # no master weights: stored in forward's dtype
                parameter.data = parameter.to(dtype)
        materialize_(module, device)
        self.module = module
        self.device = device
        self._dtype = dtype
        self._trainable = [p for p in module.parameters() if p.requires_grad]
        with torch.no_grad():
            for name, tensor in unique_tensors(module.policy).items():
                fill_(tensor.view(-1), read, name, 0)
        self.optimizer = fuse_(build_optimizer())

    def forward(self, batch: Batch, loss: Loss = token_loss) -> TokenLoss:
        """Return the loss of one micro-batch."""
        self.module.train()
        with self._autocast():
            return self.module(batch, call=loss)

    @torch.no_grad()
    def evaluate(self, batch: Batch, loss: Loss = token_loss) -> TokenLoss:
        """Return the loss of one micro-batch without gradients, in eval mode."""
        self.module.eval()
        with self._autocast():
            return self.module(batch, call=loss)

    @torch.no_grad()
    def act(self, batch: Batch) -> Tensor:
        """Return the greedy action chunk for observations."""
        self.module.eval()
        with self._autocast():
            return self.module(batch, call=action_chunk).float()

    def _autocast(self):
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self._dtype)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient."""
        loss.backward()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Return the values: there are no other ranks."""
        return values

    def sum_scalars(self, values: Tensor) -> list[float]:
        """Copy the values to the host."""
        return values.tolist()

    def shards(self, *, frozen: bool = True) -> Iterator[Shard]:
        """Yield every parameter."""
        for name, parameter in self.module.policy.named_parameters():
            if not (frozen or parameter.requires_grad):
                continue
            state = read_moments(self.optimizer, parameter)
            yield Shard(name, tuple(parameter.shape), 0, parameter.detach().reshape(-1), state)

    @torch.no_grad()
    def load_parameters(self, read: ReadRange) -> None:
        """Set every parameter."""
        for name, parameter in self.module.policy.named_parameters():
            fill_(parameter.view(-1), read, name, 0)

    def load_optimizer(self, read: ReadRange, keys: Sequence[str], steps: int) -> None:
        """Set the optimizer state of every trainable parameter."""
        for name, parameter in self.module.policy.named_parameters():
            if parameter.requires_grad:
                step = torch.tensor(float(steps), device=parameter.device)
                parts = [Part(name, 0, 0, parameter.numel())]
                load_moments(self.optimizer, parameter, parts, read, keys, step)

    def barrier(self) -> None:
        """Do nothing: there are no other ranks."""

    def close(self) -> None:
        """Do nothing."""

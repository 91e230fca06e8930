"""One process, no sharding: the reference that every sharded engine is proven against."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from craft_ds.engines.base import Batch, ReadRange, Shard, fill_
from craft_ds.policies.meta_init import materialize_
from craft_ds.policies.pi0_fast.generation import action_chunk
from craft_ds.policies.token_loss import PolicyWithLoss, TokenLoss
from craft_ds.policies.weights import unique_tensors


class SingleEngine:
    """Plain PyTorch. Trainable parameters and moments are fp32; bf16 is autocast around the forward pass.

    Args:
        module: The policy with its loss; parameters may lie on the meta device.
        read: Reads its parameters and persistent buffers by range.
        build_optimizer: Makes the optimizer of the policy's parameters.
        device: Where to train.
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
            if not parameter.requires_grad:  # no master to protect: kept as forward reads it
                parameter.data = parameter.to(dtype)
        materialize_(module, device)
        self.module = module
        self.device = device
        self._dtype = dtype
        self._trainable = [p for p in module.parameters() if p.requires_grad]
        with torch.no_grad():
            for name, tensor in unique_tensors(module.policy).items():
                fill_(tensor.view(-1), read, name, 0)
        self.optimizer = build_optimizer()

    def forward(self, batch: Batch) -> TokenLoss:
        """Loss of one micro-batch."""
        self.module.train()
        with self._autocast():
            return self.module(batch)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> TokenLoss:
        """Loss of one micro-batch without gradients, in eval mode."""
        self.module.eval()
        with self._autocast():
            return self.module(batch)

    @torch.no_grad()
    def act(self, batch: Batch) -> Tensor:
        """The greedy action chunk for observations."""
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

    def gradient(self) -> Sequence[Tensor]:
        """The parameters' `.grad`, made zero where a pass did not touch one."""
        gradients = []
        for parameter in self._trainable:
            # A missing gradient counts as zero, so that decay and moments move as they do when sharded.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        return gradients

    def take_gradient(self) -> Sequence[Tensor]:
        """Hand over the `.grad` tensors themselves: no copy."""
        gradients = self.gradient()
        self.zero_grad()
        return gradients

    def step(self) -> None:
        """One optimizer step."""
        self.optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Set every `.grad` to None."""
        self.optimizer.zero_grad(set_to_none=True)

    def sum_scalars(self, values: Tensor) -> list[float]:
        """Bring the values to the host."""
        return values.tolist()

    def shards(self, *, frozen: bool = True) -> Iterator[Shard]:
        """Every parameter, whole."""
        for name, parameter in self.module.policy.named_parameters():
            if not (frozen or parameter.requires_grad):
                continue
            state = {
                key: value.detach().reshape(-1)
                for key, value in self.optimizer.state.get(parameter, {}).items()
                if torch.is_tensor(value) and key != "step"
            }
            yield Shard(name, tuple(parameter.shape), 0, parameter.detach().reshape(-1), state)

    @torch.no_grad()
    def load_parameters(self, read: ReadRange) -> None:
        """Set every parameter."""
        for name, parameter in self.module.policy.named_parameters():
            fill_(parameter.view(-1), read, name, 0)

    @torch.no_grad()
    def load_optimizer(self, read: ReadRange, keys: Sequence[str], steps: int) -> None:
        """Set the optimizer state of every trainable parameter."""
        for name, parameter in self.module.policy.named_parameters():
            if parameter.requires_grad:
                state = self.optimizer.state[parameter]
                state["step"] = torch.tensor(float(steps))
                for key in keys:
                    state[key] = torch.empty_like(parameter)
                    fill_(state[key].view(-1), read, f"{name}.{key}", 0)

    def barrier(self) -> None:
        """Nobody to wait for."""

    def close(self) -> None:
        """Nothing to leave."""

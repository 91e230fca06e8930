"""Gradients that accumulate in the parameters' `.grad`: the part common to SingleEngine and FsdpEngine."""

from collections.abc import Sequence

import torch
from torch import Tensor

from craft_ds.config.craft_config import GradientBuffer
from craft_ds.engines.gradient_buffer import buffered
from craft_ds.policies.token_loss import PolicyWithLoss


class GradShards:
    """Access to the gradient of an engine whose optimizer reads `.grad`.

    Attributes:
        module: The policy with its loss.
        optimizer: The optimizer of the trainable parameters.
    """

    module: PolicyWithLoss
    optimizer: torch.optim.Optimizer
    _trainable: Sequence[torch.nn.Parameter]

    def _local(self, tensor: Tensor) -> Tensor:
        """Return this rank's part of a parameter or gradient, without a copy."""
        return tensor

    def gradient(self) -> Sequence[Tensor]:
        """Return this rank's part of every `.grad`; zero for parameters that the pass did not use."""
        gradients = []
        for parameter in self._trainable:
            # A missing gradient counts as zero, so that decay and moments move as in the sharded engines.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(self._local(parameter.grad))
        return gradients

    def take_gradient(self, buffer: GradientBuffer = "device") -> Sequence[Tensor]:
        """Return the `.grad` tensors themselves, without a copy, or copies in a buffer; clear them."""
        gradients = buffered(self.gradient(), buffer)
        self.zero_grad()
        return gradients

    def by_parameter(self, gradient: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """Return the parts of a gradient with the names of their parameters."""
        named = self.module.policy.named_parameters()
        names = (name for name, parameter in named if parameter.requires_grad)
        return list(zip(names, gradient, strict=True))

    def masters(self) -> Sequence[Tensor]:
        """Return this rank's part of every trained parameter."""
        return [self._local(parameter).detach() for parameter in self._trainable]

    def step(self) -> None:
        """Take one optimizer step; nothing is communicated."""
        self.optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Set every `.grad` to None."""
        self.optimizer.zero_grad(set_to_none=True)

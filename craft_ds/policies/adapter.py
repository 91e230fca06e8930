"""The loss of a policy as a sum and a count, so that gradients can be weighted by token across ranks.

A mean of per-rank means is not the mean over all tokens: ranks with short samples would weigh too much. The
trainer therefore divides the summed loss by the count of *all* ranks.
"""

from functools import singledispatch
from typing import NamedTuple

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn

Batch = dict[str, Tensor]


class TokenLoss(NamedTuple):
    """A loss that can be averaged over any set of batches.

    Attributes:
        total: Sum of the loss over the supervised tokens; fp32 scalar that carries the graph.
        count: How many tokens were supervised; fp32 scalar on the same device, without a graph.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


@singledispatch
def token_loss(policy: PreTrainedPolicy, batch: Batch) -> TokenLoss:
    """The loss of one batch.

    Policies without an adapter of their own count samples: their mean loss times the batch size.

    Args:
        policy: Any LeRobot policy.
        batch: A policy batch, as the policy's preprocessor gives it.
    """
    mean, _ = policy.forward(batch)
    samples = next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))
    return TokenLoss(mean.float() * samples, torch.full((), float(samples), device=mean.device))


class PolicyWithLoss(nn.Module):
    """The module that engines wrap: its ``forward`` is the loss, so that root hooks of sharding fire.

    Attributes:
        policy: The policy; parameters are named ``policy.<name in the policy>``.
    """

    def __init__(self, policy: PreTrainedPolicy):
        super().__init__()
        self.policy = policy

    def forward(self, batch: Batch) -> TokenLoss:
        """As ``token_loss``."""
        return token_loss(self.policy, batch)

"""Loss of a policy as a sum and a count, so that gradients are weighted by token across ranks.

A mean of per-rank means is not the mean over all tokens: short samples would weigh too much. The trainer
therefore divides the summed loss by the count of *all* ranks.
"""

from collections.abc import Callable
from functools import singledispatch
from typing import Any, NamedTuple

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn

Batch = dict[str, Tensor]


class TokenLoss(NamedTuple):
    """A loss that can be averaged over any set of batches.

    Attributes:
        total: Sum of the loss over the supervised tokens; fp32 scalar that carries the graph.
        count: Number of supervised tokens; fp32 scalar on the same device, without a graph.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


@singledispatch
def token_loss(policy: PreTrainedPolicy, batch: Batch) -> TokenLoss:
    """Compute the loss of one batch.

    Policy types without a registered function count samples: mean loss times batch size.

    Args:
        policy: Any LeRobot policy.
        batch: A policy batch from the policy's preprocessor.
    """
    mean, _ = policy.forward(batch)
    samples = next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))
    return TokenLoss(mean.float() * samples, torch.full((), float(samples), device=mean.device))


class PolicyWithLoss(nn.Module):
    """The module that engines wrap. All uses of the policy go through `forward`, so that the root's
    sharding hooks fire.

    Attributes:
        policy: The policy; parameters are named `policy.<name in the policy>`.
    """

    def __init__(self, policy: PreTrainedPolicy):
        super().__init__()
        self.policy = policy

    def forward(self, batch: Batch, call: Callable[[PreTrainedPolicy, Batch], Any] = token_loss) -> Any:
        """Return the result of `call` on the policy and a batch.

        Args:
            batch: Input of `call`.
            call: `token_loss` by default; `craft_ds.policies.pi0_fast.generation.action_chunk` to act.
        """
        return call(self.policy, batch)

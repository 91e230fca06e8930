"""Loss of a policy as a sum and a count, so that gradients are weighted by token across ranks.

A mean of per-rank means is not the mean over all tokens: short samples would weigh too much. The trainer
therefore divides the summed loss by the count of *all* ranks.
"""

from collections.abc import Callable
from functools import singledispatch
from typing import Any, NamedTuple

import torch
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor, nn

Batch = dict[str, Tensor]
ACTION_IS_PAD = "action_is_pad"


class TokenLoss(NamedTuple):
    """A loss that can be averaged over any set of batches.

    Attributes:
        total: Sum of the loss over the supervised tokens; fp32 scalar that carries the graph.
        count: Number of supervised tokens; fp32 scalar on the same device, without a graph. For policies
            without tokens: what their own mean is taken over, samples or action steps that are not padding.

    A loss on anchors may return both by old task, (T,) each.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


Loss = Callable[[Any, Batch], TokenLoss]
"""A loss of a policy on a batch."""


@singledispatch
def token_loss(policy: PreTrainedPolicy, batch: Batch) -> TokenLoss:
    """Compute the loss of one batch.

    Policy types without a registered function count samples: mean loss times batch size. That is exact for
    losses that are a mean over samples of equal weight.

    Args:
        policy: Any LeRobot policy.
        batch: A policy batch from the policy's preprocessor.
    """
    samples = next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))
    mean, *_ = policy.forward(batch)
    return TokenLoss(mean.float() * samples, torch.full((), float(samples), device=mean.device))


@token_loss.register(ACTPolicy)
@token_loss.register(SmolVLAPolicy)
def _mean_over_valid_steps(policy: ACTPolicy | SmolVLAPolicy, batch: Batch) -> TokenLoss:
    """Weight a mean over the action steps within the episode by the number of these steps.

    ACT adds a mean over samples, the KL divergence, which is then weighted by these steps as well: its share
    of the gradient depends a little on the number of ranks where their padding differs.
    """
    if ACTION_IS_PAD not in batch:
        return token_loss.dispatch(PreTrainedPolicy)(policy, batch)
    count = (~batch[ACTION_IS_PAD]).sum().float()
    mean, *_ = policy.forward(batch)
    return TokenLoss(mean.float() * count, count)


@token_loss.register
def _diffusion_loss(policy: DiffusionPolicy, batch: Batch) -> TokenLoss:
    masked = policy.config.do_mask_loss_for_padding
    return (_mean_over_valid_steps if masked else token_loss.dispatch(PreTrainedPolicy))(policy, batch)


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

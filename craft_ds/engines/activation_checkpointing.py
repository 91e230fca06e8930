"""Activation checkpointing: store only the input of each layer and recompute the layer in the backward pass
(Chen et al. 2016).

Costs about a third more arithmetic; activations shrink to one hidden state per layer and the working set of
one layer.
"""

from functools import wraps

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import nn
from torch.utils.checkpoint import checkpoint

from craft_ds.errors import UserError
from craft_ds.policies.wrapping import checkpoint_units


def checkpoint_activations(policy: PreTrainedPolicy) -> None:
    """Recompute every layer's activations in the backward pass.

    Losses, gradients and parameter names do not change. Call it before the policy is sharded, in every
    engine.

    The recomputation runs a layer's `forward` *inside* the hooks that gather its parameters. Hugging Face's
    own flag (`--policy.gradient_checkpointing`) puts it around them, where FSDP2 in bf16 crashes.

    Args:
        policy: The policy; its `checkpoint_units` are modified in place.

    Raises:
        UserError: The policy has no `checkpoint_units`.
    """
    units = checkpoint_units(policy)
    if not units:
        raise UserError(
            f"--activation_checkpointing=full: no layers are known of {type(policy).__name__}; register them "
            "with craft_ds.policies.wrapping.checkpoint_units"
        )
    for unit in units:
        _checkpoint(unit)


def _checkpoint(unit: nn.Module) -> None:
    forward = unit.forward

    @wraps(forward)
    def recomputed(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Without `early_stop`, the recomputation would run the hook with which ZeRO-3 frees
        # the parameters of the module whose backward pass needs it.
        return checkpoint(forward, *args, use_reentrant=False, early_stop=True, **kwargs)

    unit.forward = recomputed  # type: ignore[method-assign]

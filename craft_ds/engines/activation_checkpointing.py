"""Activation checkpointing: keep the input of each layer instead of all that it computes, and compute the
layer again in the backward pass (Chen et al. 2016).

About a third more arithmetic; activations shrink to one hidden state a layer, and one layer's working set.
"""

from functools import wraps

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import nn
from torch.utils.checkpoint import checkpoint

from craft_ds.errors import UserError
from craft_ds.policies.wrapping import checkpoint_units


def checkpoint_activations(policy: PreTrainedPolicy) -> None:
    """Let every layer of a policy forget its activations until the backward pass.

    Losses and gradients stay the same numbers, names of parameters stay the same names. Call it before the
    policy is sharded, whatever the engine.

    The recomputation runs a layer's `forward` *inside* of the hooks that gather its parameters. Hugging
    Face's own flag (`--policy.gradient_checkpointing`) puts it around them, where FSDP2 in bf16 crashes.

    Args:
        policy: The policy; its `checkpoint_units` are changed in place.

    Raises:
        UserError: The policy has none.
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
        # `early_stop` matters: run to its end, the recomputation would pass the hook with which ZeRO-3 frees
        # the parameters of the very module whose backward pass has just asked for it.
        return checkpoint(forward, *args, use_reentrant=False, early_stop=True, **kwargs)

    unit.forward = recomputed  # type: ignore[method-assign]

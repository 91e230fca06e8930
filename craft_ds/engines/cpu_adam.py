"""DeepSpeed's Adam for optimizers that are offloaded to the CPU."""

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

from craft_ds.errors import UserError, one_line

_INSTEAD = 'write "zero_force_ds_cpu_optimizer": false into the --ds_config file to step with torch'
_HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")


def cpu_adam(optimizer: torch.optim.Optimizer) -> DeepSpeedCPUAdam:
    """DeepSpeed's vectorised Adam over the parameter groups of torch's Adam or AdamW.

    It is compiled when it is first used on a machine, which takes minutes. It computes 1 − β₂ in fp32, so
    that its second moments differ from torch's by 1.3e-5 of their value.

    Raises:
        UserError: It cannot stand in for this optimizer, or cannot be compiled.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        raise UserError(f"DeepSpeedCPUAdam cannot replace {type(optimizer).__name__}: {_INSTEAD}")
    for name in ("amsgrad", "maximize"):
        if any(group[name] for group in optimizer.param_groups):
            raise UserError(f"DeepSpeedCPUAdam has no {name}: {_INSTEAD}")
    groups = [{key: group[key] for key in ("params", *_HYPERPARAMETERS)} for group in optimizer.param_groups]
    try:
        return DeepSpeedCPUAdam(groups, adamw_mode=isinstance(optimizer, torch.optim.AdamW))
    except RuntimeError as error:
        reason = one_line(error.__cause__ or error)
        raise UserError(
            f"DeepSpeedCPUAdam needs g++ and ninja ({reason}): install them, or {_INSTEAD}"
        ) from error

"""Build a policy on the meta device: parameters without memory, buffers with values.

Buffers that are not stored with the weights (rotary frequencies, embedding scales, position ids) are computed
by the constructors, and would be lost if everything was built on the meta device.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from craft_ds.policies.replace_attribute import replace_attribute


def build_on_meta(config: PreTrainedConfig) -> PreTrainedPolicy:
    """Build a policy whose parameters take no memory, in evaluation mode.

    Args:
        config: From `load_policy_config`; not changed.
    """
    config = copy.copy(config)
    config.device = "meta"
    # Initial weights are not used; sampling them would take time and memory.
    with no_init_weights(), _parameters_on_meta():
        policy = get_policy_class(config.type)(config)
    return policy.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move parameters to the meta device as they are registered, and keep buffers on their device.

    Unlike accelerate's `init_empty_weights`, parameters that a constructor ties stay tied, and buffers that a
    constructor moves to the meta device are restored.
    """
    buffers: dict[tuple[nn.Module, str], Tensor | None] = {}
    register_parameter, register_buffer = nn.Module.register_parameter, nn.Module.register_buffer

    def parameter_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register_parameter(module, name, parameter)

    def recorded_buffer(module: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        register_buffer(module, name, tensor, persistent)
        buffers[module, name] = tensor

    with (
        replace_attribute(nn.Module, "register_parameter", parameter_on_meta),
        replace_attribute(nn.Module, "register_buffer", recorded_buffer),
    ):
        yield
    for (module, name), tensor in buffers.items():
        if tensor is not None and name in dict(module.named_buffers(recurse=False)):
            setattr(module, name, tensor)


def materialize_(module: nn.Module, device: torch.device | str) -> None:
    """Allocate parameters from the meta device on `device`, uninitialised, and move everything else there.

    Tied parameters stay tied.
    """
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_meta:
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, device=device)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                setattr(part, name, made[id(parameter)])
    module.to(device)

"""Build a policy on the meta device: parameters without memory, buffers with values.

Buffers that are not stored with the weights (rotary frequencies, embedding scales, position ids) are computed
by the constructors, and would be lost if everything was built on the meta device.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from transformers.initialization import no_init_weights

from craft_ds.policies.feed_forward import keep_gate_and_up_
from craft_ds.policies.last_layer import skip_unread_outputs_
from craft_ds.policies.replace_attribute import replace_attribute

# Fields of policies' configurations that make a constructor download weights, and their value for none.
_INITIAL_WEIGHTS = {"load_vlm_weights": False, "pretrained_backbone_weights": None}


def build_on_meta(config: PreTrainedConfig) -> PreTrainedPolicy:
    """Build a policy whose parameters take no memory, in evaluation mode.

    Its feed-forward layers keep less for the backward pass (`craft_ds.policies.feed_forward`), and the last
    layer of its decoder can be run for some outputs (`craft_ds.policies.last_layer`).

    Args:
        config: From `load_policy_config`; not changed.
    """
    config = copy.copy(config)
    given = {name: getattr(config, name) for name in _INITIAL_WEIGHTS if hasattr(config, name)}
    config.device = "meta"
    # Initial weights are not used; sampling or downloading them would take time and memory.
    for name in given:
        setattr(config, name, _INITIAL_WEIGHTS[name])
    with no_init_weights(), _parameters_on_meta(), _calls_on_meta():
        policy = get_policy_class(config.type)(config)
    for name, value in given.items():
        setattr(policy.config, name, value)
    keep_gate_and_up_(policy)
    skip_unread_outputs_(policy)
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


@contextmanager
def _calls_on_meta() -> Iterator[None]:
    """Run modules that a constructor calls, to learn the shape of their output, on the meta device.

    Their parameters are there already, but their buffers and inputs are not.
    """
    call = nn.Module.__call__
    outermost = True

    def on_meta(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal outermost
        if not outermost:
            return call(module, *args, **kwargs)
        state = {name: tensor.to("meta") for name, tensor in _named_tensors(module)}
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        outermost = False
        try:
            return functional_call(module, state, args, kwargs)
        finally:
            outermost = True

    with replace_attribute(nn.Module, "__call__", on_meta):
        yield


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


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

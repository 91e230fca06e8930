"""Layers compiled by `torch.compile`, one after the other and in place."""

import os
import shutil
import sysconfig
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from torch import nn

from craft_ds.errors import UserError
from craft_ds.policies.wrapping import checkpoint_units

_FLAG = "--engine.compile=true"


def check_compile(policy: PreTrainedConfig) -> None:
    """Check that a policy's layers can be compiled on this machine.

    Args:
        policy: The policy's configuration.

    Raises:
        UserError: They cannot.
    """
    if not isinstance(policy, PI0FastConfig):
        raise UserError(f"{_FLAG} compiles the layers of pi0_fast, not those of {policy.type}: omit it")
    # TorchInductor builds kernels for the CPU, and for CUDA Triton the code that launches them.
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"{_FLAG} needs a C++ compiler, and {compiler} is not installed: install g++, set CXX to another "
            "compiler, or omit the flag"
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise UserError(
            f"{_FLAG} needs Python's headers, and {headers}/Python.h does not exist: install them "
            "(python3-dev), or omit the flag"
        )


def refuse_zero3(ds_config: Mapping[str, Any]) -> None:
    """Check that DeepSpeed does not gather parameters inside of the layers.

    Args:
        ds_config: DeepSpeed's configuration.

    Raises:
        UserError: It is ZeRO-3.
    """
    if ds_config["zero_optimization"]["stage"] == 3:
        raise UserError(
            f"{_FLAG} does not work with ZeRO-3, which gathers parameters inside of layers: omit it, or use "
            "--engine=fsdp or --ds_config zero2"
        )


def compile_layers_(policy: nn.Module) -> None:
    """Compile the decoder and encoder layers of a pi0_fast for passes with gradients.

    Parameters and names do not change. Call it before the policy is sharded and before
    `checkpoint_activations`: the hooks with which an engine gathers a layer's parameters, and the
    recomputation, then run outside of the compiled code. Layers of one class share their code, for any length
    and number of samples; a single sample has code of its own.

    Passes without gradients run as they are: with a cache of keys, generation would compile for every step.

    Args:
        policy: The policy, which `check_compile` has accepted; its layers are modified in place.
    """
    for layer in checkpoint_units(policy):
        _compile(layer)


def _compile(layer: nn.Module) -> None:
    forward = layer.forward
    # `fullgraph`: rather an error than a layer that is compiled in part.
    compiled = torch.compile(forward, dynamic=True, fullgraph=True)

    @wraps(forward)
    def with_gradients(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)

    layer.forward = with_gradients  # type: ignore[method-assign]

"""FSDP2 wrapping: the device mesh, the units, and each rank's rows of a parameter."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from craft_ds.config.configs import FsdpConfig
from craft_ds.errors import UserError
from craft_ds.policies.token_loss import PolicyWithLoss
from craft_ds.policies.wrapping import ends_forward, only_looks_up, shard_units


def mesh_shape(options: FsdpConfig, world_size: int) -> tuple[int, int]:
    """Return the number of model replicas, and the number of ranks that share each.

    Raises:
        UserError: The two flags do not multiply to the number of processes.
    """
    replicate, shard = options.dp_replicate, options.dp_shard
    if shard == -1 and world_size % replicate == 0:
        shard = world_size // replicate
    if replicate * shard != world_size:
        product = f"--engine.fsdp.dp_replicate={replicate} times --engine.fsdp.dp_shard={shard}"
        if shard == -1:
            product = f"--engine.fsdp.dp_replicate={replicate} times any --engine.fsdp.dp_shard"
        raise UserError(
            f"{product} is not {world_size}, the number of processes: choose two factors of {world_size}"
        )
    return replicate, shard


def gathered_dtype(options: FsdpConfig, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of gathered parameters: that of forward and backward unless given."""
    return dtype if options.param_dtype == "auto" else getattr(torch, options.param_dtype)


def make_mesh(replicate: int, shard: int, device: torch.device) -> DeviceMesh:
    """Create the mesh: one row of shards, or one row per replica. Collective: call on all ranks."""
    if replicate == 1:
        return init_device_mesh(device.type, (shard,), mesh_dim_names=("dp_shard",))
    return init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard"))


def shard_(module: PolicyWithLoss, mesh: DeviceMesh, options: FsdpConfig, param_dtype: torch.dtype) -> None:
    """Replace every parameter by this rank's rows of it, unit by unit; parameters may be on the meta device.

    Trainable parameters stay fp32 (they are the master weights). Frozen ones have no master weights and are
    stored in the dtype in which they are gathered.

    Args:
        module: The policy with its loss.
        mesh: From `make_mesh`.
        options: Flags of FSDP2.
        param_dtype: Dtype of gathered parameters.

    Raises:
        UserError: A parameter is a scalar, which has no rows.
    """
    for name, parameter in module.policy.named_parameters():
        if parameter.ndim == 0:
            raise UserError(
                f"{name} is a scalar parameter, which FSDP2 cannot shard: use --ds_config (ZeRO), or give "
                "it the shape (1,)"
            )
        parameter.data = parameter.to(torch.float32 if parameter.requires_grad else param_dtype).contiguous()
    reduce_dtype = param_dtype if options.reduce_dtype == "auto" else getattr(torch, options.reduce_dtype)
    offload = (
        CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if options.cpu_offload else OffloadPolicy()
    )

    def shard(unit: nn.Module, *, cast_inputs: bool, reshard_after_forward: bool) -> None:
        fully_shard(
            unit,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=MixedPrecisionPolicy(param_dtype, reduce_dtype, cast_forward_inputs=cast_inputs),
            offload_policy=offload,
        )

    units = shard_units(module.policy)
    for unit in units:
        free = options.reshard_after_forward and not ends_forward(module.policy, unit)
        shard(unit, cast_inputs=True, reshard_after_forward=free)
        gather_for_parts_(unit)
        if only_looks_up(unit):
            assert isinstance(unit, FSDPModule)
            unit.set_unshard_in_backward(False)
    # What is needed first in backward, as the root's own parameters are, is not freed after forward: it would
    # be gathered twice. The batch is not cast: policies do that after their own preprocessing.
    shard(module, cast_inputs=False, reshard_after_forward=False)


def gather_for_parts_(unit: nn.Module) -> None:
    """Gather a unit when a part of it is called while the unit itself is not.

    FSDP2's hooks gather a unit when it is called. A policy may instead call the parts of a layer from outside
    and never the layer. Then the unit is gathered here and stays so until the backward pass, which costs
    memory, but is correct.

    Args:
        unit: A module that `fully_shard` was applied to.
    """
    assert isinstance(unit, FSDPModule)
    running = False

    def begin(*_: Any) -> None:
        nonlocal running
        running = True

    def end(*_: Any) -> None:
        nonlocal running
        running = False

    def gather(*_: Any) -> None:
        # Compiled code is that of the complete unit, which is gathered when it runs, also to recompute it.
        if not (torch.compiler.is_compiling() or running):
            unit.unshard()

    unit.register_forward_pre_hook(begin)
    unit.register_forward_hook(end, always_call=True)
    for part in unit.modules():
        if part is not unit and any(True for _ in part.parameters(recurse=False)):
            part.register_forward_pre_hook(gather)


def reshard_(module: nn.Module) -> None:
    """Free all gathered parameters after a forward pass that is not followed by a backward pass.

    Otherwise they take memory, and the next forward pass after an optimizer step would use the old values,
    since FSDP2 does not gather again what is already gathered.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a sharded tensor, without a copy."""
    assert isinstance(tensor, DTensor)
    return tensor._local_tensor.detach()


def rows(policy: nn.Module, shard_rank: int, shard_count: int) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Yield every parameter with the offset of this rank's rows in the flattened tensor, in elements.

    Rows are divided as by `torch.chunk`: ⌈rows / ranks⌉ to each rank until none are left.
    """
    for name, parameter in policy.named_parameters():
        count, width = parameter.shape[0], math.prod(parameter.shape[1:])
        yield name, parameter, min(shard_rank * -(-count // shard_count), count) * width

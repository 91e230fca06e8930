"""Access to DeepSpeed's ZeRO-3 by shard: construction without a complete model, and gradients."""

from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from craft_ds.config.craft_config import GradientBuffer
from craft_ds.engines.gradient_buffer import buffered
from craft_ds.engines.zero_shards import FrozenPart, Partition, ZeroShards
from craft_ds.tensor_io.tensor_file import ReadRange, fill_


class _EmptyPartitions(deepspeed.zero.Init):
    """`deepspeed.zero.Init` without its broadcast of every parameter from rank 0.

    Each rank reads its own values later.
    """

    def _zero_init_param(self, param: Any) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()


@torch.no_grad()
def partition_parameters_(module: nn.Module, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Replace every parameter, which may be on the meta device, by an empty partitioned one.

    One complete parameter at a time is allocated and freed; on a CPU its pages are never even touched.

    Args:
        module: The model; its parameters are new objects afterwards, and tied ones stay tied.
        config: DeepSpeed's configuration.
        dtype: Dtype of forward and backward.
    """
    # With a module without parameters this only reads the configuration and replaces
    # `functional.linear` by DeepSpeed's own, which does not keep gathered weights for the backward pass.
    init = _EmptyPartitions(module=nn.Module(), config_dict_or_path=config, dtype=dtype)
    partitioned: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, old in owner.named_parameters(recurse=False, remove_duplicate=False):
            if old not in partitioned:
                empty = torch.empty(old.shape, dtype=dtype, device=init.local_device)
                partitioned[old] = nn.Parameter(empty, old.requires_grad)
                del empty
                init._convert_to_zero_parameters([partitioned[old]])
            setattr(owner, name, partitioned[old])


class Zero3Shards(ZeroShards):
    """Access to a `DeepSpeedZeroOptimizer_Stage3` by shard.

    Gradients of all micro-batches accumulate in one flat buffer. With offload DeepSpeed copies it into the
    master weights' `.grad` at an accumulation boundary; here it is never told of one, so that `.grad` can
    hold the first pass's gradient while the buffer takes the second's.
    """

    _ATTRIBUTES = (
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "get_param_id",
        "grad_partitions_flat_buffer",
        "grad_position",
        "offload_optimizer",
        "optimizer",
        "persistent_parameters",
        "zero_grad",
        "_reassign_or_swap_out_partitioned_parameters",
    )

    def __init__(self, zero: Any, policy: nn.Module):
        super().__init__(zero, policy)
        self.offloaded = zero.offload_optimizer

    @property
    def masters(self) -> Sequence[Tensor]:
        """Flat fp32 master weights of this rank, one per sub-group."""
        return self._zero.fp32_partitioned_groups_flat

    @property
    def _groups(self) -> Sequence[Sequence[Any]]:
        return self._zero.fp16_groups

    def _find_partitions(self) -> Iterator[Partition]:
        for group in self._groups:
            for parameter in group:
                index, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
                start, numel = _own_range(parameter)
                name, shape = self._names[id(parameter)], tuple(parameter.ds_shape)
                yield Partition(name, shape, index, offset, start, numel)

    def boundary(self, last: bool) -> bool:
        """Return True for the last micro-batch; with offload, always False."""
        return last and not self.offloaded

    def gradient(self) -> list[Tensor]:
        """Return the flat buffer, split into the sub-groups; zero in the padding."""
        return list(self._zero.grad_partitions_flat_buffer.split([flat.numel() for flat in self.masters]))

    def take_gradient(self, buffer: GradientBuffer = "device") -> list[Tensor]:
        """Return a copy: with offload in the masters' unused `.grad`, otherwise in new memory."""
        if buffer != "device":
            taken = buffered(self.gradient(), buffer)
        elif self.offloaded:
            taken = self._into_masters()
        else:
            taken = [part.clone() for part in self.gradient()]
        self.clear_gradient()
        return taken

    def _into_masters(self) -> list[Tensor]:
        for target, gradient in zip(self._master_gradients, self.gradient(), strict=True):
            target.copy_(gradient)
        return self._master_gradients

    def clear_gradient(self) -> None:
        """Zero the buffer; DeepSpeed's `zero_grad` resets only the count of micro-batches."""
        self._zero.zero_grad(set_to_none=True)
        self._zero.grad_partitions_flat_buffer.zero_()

    def prepare_step(self) -> None:
        """Put the gradient where the step reads it: with offload the master weights' `.grad`."""
        if self.offloaded:
            self._into_masters()

    def copy_masters_to_params(self) -> None:
        """Copy the master weights into the partitions and gather the persistent ones. Collective."""
        for group in range(len(self._groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        persistent = self._zero.persistent_parameters
        if persistent:
            # These stay gathered; a gather does nothing while their old values are present.
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def frozen_parts(self) -> Iterator[FrozenPart]:
        """Yield this rank's partitions of the frozen parameters."""
        for name, parameter in self._frozen():
            start, numel = _own_range(parameter)
            if numel:
                values = parameter.ds_tensor.detach().reshape(-1)[:numel]
                yield FrozenPart(name, tuple(parameter.ds_shape), start, values)

    def load_frozen(self, read: ReadRange) -> None:
        """Set this rank's partitions of the frozen parameters."""
        for part in self.frozen_parts():
            fill_(part.values, read, part.name, part.start)


def _own_range(parameter: Any) -> tuple[int, int]:
    """Return start and length of this rank's partition of a flattened parameter, without padding."""
    size = parameter.ds_tensor.ds_numel
    start = parameter.ds_zero_partition_rank * size
    return start, min(size, max(0, parameter.ds_numel - start))

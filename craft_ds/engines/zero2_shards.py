"""Access to DeepSpeed's ZeRO-2 by shard: complete parameters, partitioned gradients and master weights."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from deepspeed.runtime import engine as deepspeed_engine
from torch import Tensor, nn

from craft_ds.config.craft_config import GradientBuffer
from craft_ds.engines.gradient_buffer import buffered
from craft_ds.engines.zero_shards import FrozenPart, Partition, ZeroShards
from craft_ds.policies.replace_attribute import replace_attribute
from craft_ds.tensor_io.tensor_file import ReadRange, fill_


def without_broadcast() -> AbstractContextManager:
    """Prevent `deepspeed.initialize` from broadcasting rank 0's model: each rank reads its own part."""
    return replace_attribute(deepspeed_engine.DeepSpeedEngine, "_broadcast_model", lambda engine: None)


class Zero2Shards(ZeroShards):
    """Access to a `DeepSpeedZeroOptimizer` of stage 2 by shard.

    All parameters of a group are stored consecutively in a flat tensor that is divided into equal ranges, one
    per rank; a rank has a range of some parameters, possibly none.

    Where the gradient accumulates depends on dtype and offload:

    - bf16: in a flat fp32 partition, which is recreated when it is None;
    - fp32: in a list of tensors, created at the end of an accumulation;
    - fp32 with offload: in one CPU buffer per parameter, as long as DeepSpeed never sees an accumulation
      boundary. At a boundary it would copy only the parameters that the *last* micro-batch used into the
      master weights' `.grad`.
    """

    _ATTRIBUTES = (
        "all_grad_tensors",
        "averaged_gradients",
        "cpu_offload",
        "get_param_id",
        "grad_partition_insertion_offset",
        "grad_start_offset",
        "micro_step_id",
        "optimizer",
        "partition_gradients",
        "partition_size",
        "round_robin_bit16_groups",
        "single_partition_of_fp32_groups",
        "update_lp_params",
        "zero_grad",
        "_get_compact_grad_partition_buffer",
        "_use_compact_grad_partition_buffer",
        "_wait_for_offload_copies",
    )

    def __init__(self, zero: Any, policy: nn.Module, rank: int, world_size: int):
        self._rank, self._world_size = rank, world_size
        super().__init__(zero, policy)
        self.offloaded = zero.cpu_offload
        self._compact = zero._use_compact_grad_partition_buffer(0)
        self._first_micro_step = zero.micro_step_id
        self._parameters = {self._names[id(p)]: p for group in self._groups for p in group}

    @property
    def masters(self) -> Sequence[Tensor]:
        """Flat fp32 master weights of this rank, one per parameter group of the optimizer."""
        return self._zero.single_partition_of_fp32_groups

    @property
    def _groups(self) -> Sequence[Sequence[Any]]:
        return self._zero.round_robin_bit16_groups

    def _find_partitions(self) -> Iterator[Partition]:
        for index, group in enumerate(self._groups):
            starts = self._zero.grad_start_offset[index][self._rank]
            offsets = self._zero.grad_partition_insertion_offset[index][self._rank]
            for parameter in group:
                key = self._zero.get_param_id(parameter)
                if key in starts:
                    start, offset = int(starts[key]), int(offsets[key])
                    numel = min(parameter.numel() - start, int(self._zero.partition_size[index]) - offset)
                    name, shape = self._names[id(parameter)], tuple(parameter.shape)
                    yield Partition(name, shape, index, offset, start, numel)

    def boundary(self, last: bool) -> bool:
        """Return True for the last micro-batch; with offload, always False."""
        return last and not self.offloaded

    def gradient(self) -> list[Tensor]:
        """Return the accumulated gradient (see the class docstring), in the order of the partitions."""
        zero = self._zero
        if self._compact:
            buffers = [zero._get_compact_grad_partition_buffer(i) for i in range(len(self._groups))]
            return [buffer.flat_partition for buffer in buffers]
        if self.offloaded:
            zero._wait_for_offload_copies()
            return [self._cpu_buffer(part) for part in self.partitions]
        return [gradient for i in range(len(self._groups)) for gradient in self._without_padding(i)]

    def _without_padding(self, group: int) -> Iterator[Tensor]:
        """Yield the gradients of a group's partitions; DeepSpeed's list also has zeros as padding."""
        starts = {part.offset for part in self.partitions if part.group == group}
        offset = 0
        for tensor in self._zero.averaged_gradients[group]:
            if tensor.numel() and offset in starts:
                yield tensor
            offset += tensor.numel()

    def aligned_masters(self) -> list[Tensor]:
        """Return views of the master weights in the order and sizes of `gradient`."""
        if self._compact:
            return super().aligned_masters()
        return [part.of(self.masters) for part in self.partitions]

    def _cpu_buffer(self, part: Partition) -> Tensor:
        parameter, buffers = self._parameters[part.name], self._zero.accumulated_grads_in_cpu
        key = self._zero.get_param_id(parameter)
        if key not in buffers:
            buffers[key] = torch.zeros(parameter.numel(), dtype=parameter.dtype)
        return buffers[key].narrow(0, part.start, part.numel)

    def take_gradient(self, buffer: GradientBuffer = "device") -> list[Tensor]:
        """Return the tensors themselves if DeepSpeed creates new ones; otherwise a copy in `.grad`."""
        keeps = self.offloaded and not self._compact and buffer == "device"
        taken = self._into_masters() if keeps else buffered(self.gradient(), buffer)
        self.clear_gradient()
        return taken

    def by_parameter(self, gradient: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """Return the parts with their names: `gradient` has one tensor per partition, or flat ones."""
        if self._compact:
            return super().by_parameter(gradient)
        return [(part.name, shard) for part, shard in zip(self.partitions, gradient, strict=True)]

    def _into_masters(self) -> list[Tensor]:
        flats = self._master_gradients
        targets = flats if self._compact else [part.of(flats) for part in self.partitions]
        for target, gradient in zip(targets, self.gradient(), strict=True):
            target.copy_(gradient)
        return targets

    def clear_gradient(self) -> None:
        """Release the accumulated tensors; zero those that DeepSpeed reuses."""
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        zero.micro_step_id = self._first_micro_step
        for group in range(len(self._groups)):
            zero.averaged_gradients[group] = None
            zero.all_grad_tensors[group] = None
        if self.offloaded:
            zero._wait_for_offload_copies()
            for buffer in zero.accumulated_grads_in_cpu.values():
                buffer.zero_()

    def prepare_step(self) -> None:
        """Put the gradient where the step reads it: with offload the master weights' `.grad`."""
        if self.offloaded:
            self._into_masters()

    def copy_masters_to_params(self) -> None:
        """Copy the master weights into the parameters and gather those of all ranks. Collective."""
        self._zero.update_lp_params()

    def frozen_parts(self) -> Iterator[FrozenPart]:
        """Yield one equal range per rank of each frozen parameter, although every rank holds all of it."""
        for name, parameter in self._frozen():
            size = -(-parameter.numel() // self._world_size)
            start = self._rank * size
            values = parameter.detach().reshape(-1)[start : start + size]
            if values.numel():
                yield FrozenPart(name, tuple(parameter.shape), start, values)

    def load_frozen(self, read: ReadRange) -> None:
        """Set the frozen parameters, completely on every rank."""
        for name, parameter in self._frozen():
            fill_(parameter.detach().view(-1), read, name, 0)

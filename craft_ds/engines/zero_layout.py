"""The one place that reaches into DeepSpeed: where ZeRO-3 keeps gradients, masters and moments.

DeepSpeed has public calls for one parameter's local gradient, none for the whole accumulated shard, for
emptying it between two backward passes, or for reading masters without a collective. What is used of
its inside was read in the sources of the versions below and is checked when the engine starts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

KNOWN_VERSIONS = "0.19.3 to 0.19.8"
_ATTRIBUTES = (
    "averaged_gradients",
    "fp16_groups",
    "fp32_partitioned_groups_flat",
    "get_param_id",
    "grad_partitions_flat_buffer",
    "grad_position",
    "micro_step_id",
    "optimizer",
    "persistent_parameters",
    "zero_grad",
    "_reassign_or_swap_out_partitioned_parameters",
)


class _EmptyPartitions(deepspeed.zero.Init):
    """`deepspeed.zero.Init` without its broadcast of every whole parameter from rank 0.

    The values come later, and each rank reads only its own.
    """

    def _zero_init_param(self, param: nn.Parameter) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()


@torch.no_grad()
def partition_parameters_(module: nn.Module, config: dict[str, Any]) -> None:
    """Replace every parameter, which may be on the meta device, by an empty partitioned one.

    One parameter at a time is allocated whole and freed; on a CPU not even that, since its pages are
    never written.

    Args:
        module: The model; its parameters are new objects afterwards, tied ones still the same.
        config: DeepSpeed's configuration.
    """
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
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


@dataclass(frozen=True)
class Partition:
    """Where a rank keeps its part of one trainable parameter.

    Attributes:
        parameter: The (partitioned) parameter.
        group: Index of the flat fp32 group that holds the part.
        offset: Offset of the part in that group, in elements.
        start: Offset of the part in the flattened parameter.
        numel: Elements of the part, without the padding that evens out the ranks.
    """

    parameter: Any  # DeepSpeed hangs its ds_ attributes on it
    group: int
    offset: int
    start: int
    numel: int


class Zero3Layout:
    """Access to a `DeepSpeedZeroOptimizer_Stage3` by shard.

    Args:
        zero: The ZeRO optimizer (`engine.optimizer`).
        rank: This rank.

    Raises:
        RuntimeError: This DeepSpeed lacks an attribute that the known versions have.
    """

    def __init__(self, zero: Any, rank: int):
        missing = [name for name in _ATTRIBUTES if not hasattr(zero, name)]
        if missing:
            from deepspeed import __version__

            raise RuntimeError(
                f"DeepSpeed {__version__} keeps its gradients in another way than the versions craft-ds "
                f"knows ({KNOWN_VERSIONS}): {type(zero).__name__} lacks {', '.join(missing)}"
            )
        self._zero = zero
        self.partitions: list[Partition] = []
        for group in zero.fp16_groups:
            for parameter in group:
                index, offset, size = zero.grad_position[zero.get_param_id(parameter)]
                start = rank * size
                numel = min(size, max(0, parameter.ds_numel - start))
                self.partitions.append(Partition(parameter, index, offset, start, numel))

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer that works on the flat fp32 groups."""
        return self._zero.optimizer

    @property
    def gradient(self) -> Tensor:
        """The accumulated shard of the whole gradient: one flat tensor, zero in the padding."""
        return self._zero.grad_partitions_flat_buffer

    def clear_gradient(self) -> None:
        """Empty the accumulator and let the next backward pass begin a new sum.

        `zero_grad` alone resets only the count of micro-batches. A parameter that the next pass does
        not touch would then keep the last pass's gradient.
        """
        self._zero.zero_grad(set_to_none=True)
        self.gradient.zero_()

    def master(self, partition: Partition) -> Tensor:
        """The fp32 master values of a partition: a 1-D view."""
        flat = self._zero.fp32_partitioned_groups_flat[partition.group]
        return flat.detach().narrow(0, partition.offset, partition.numel)

    def state(self, partition: Partition) -> dict[str, Tensor]:
        """The optimizer state of a partition: 1-D views by name; empty before the first step."""
        flat = self._zero.fp32_partitioned_groups_flat[partition.group]
        return {
            key: value.narrow(0, partition.offset, partition.numel)
            for key, value in self.optimizer.state.get(flat, {}).items()
            if torch.is_tensor(value) and value.shape == flat.shape
        }

    def create_state(self, keys: tuple[str, ...], steps: int) -> None:
        """Make the optimizer state that the first step would make, with zeros for values."""
        for flat in self._zero.fp32_partitioned_groups_flat:
            state = self.optimizer.state[flat]
            state["step"] = torch.tensor(float(steps))
            for key in keys:
                state[key] = torch.zeros_like(flat)

    def publish_masters(self) -> None:
        """Copy the masters into the parameters that forward uses. Collective: call on all ranks."""
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        persistent = self._zero.persistent_parameters
        if persistent:
            # These are kept whole; a gather does nothing while their old values are there.
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def frozen(self, module: nn.Module) -> Iterator[tuple[str, Any]]:
        """Parameters that the optimizer does not hold."""
        trainable = {id(partition.parameter) for partition in self.partitions}
        for name, parameter in module.named_parameters():
            if id(parameter) not in trainable:
                yield name, parameter

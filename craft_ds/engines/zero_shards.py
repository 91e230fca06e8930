"""Access to DeepSpeed's gradients, master weights and moments: the parts common to ZeRO-2 and ZeRO-3.

DeepSpeed has public calls for one parameter's local gradient under ZeRO-3, but none for the complete
accumulated shard, for emptying it between two backward passes, or for reading master weights without a
collective. The private attributes used were read in the sources of the versions below, are used in the
modules `zero*_shards` only, and are checked when the engine starts.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor, nn

from craft_ds.config.craft_config import GradientBuffer
from craft_ds.engines.optimizer_state import Part, load_moments, read_moments
from craft_ds.tensor_io.tensor_file import ReadRange, fill_

KNOWN_VERSIONS = "0.19.8"


@dataclass(frozen=True)
class Partition:
    """Position of a rank's part of one trainable parameter.

    Attributes:
        name: Name of the parameter in the policy.
        shape: Global shape of the parameter.
        group: Index of the flat fp32 group that contains the part.
        offset: Offset of the part in that group, in elements.
        start: Offset of the part in the flattened parameter.
        numel: Number of elements of the part, at least one, without padding.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    offset: int
    start: int
    numel: int

    def of(self, flats: Sequence[Tensor]) -> Tensor:
        """Return the part as a 1-D view, given one flat tensor per group."""
        return flats[self.group].detach().narrow(0, self.offset, self.numel)


@dataclass(frozen=True)
class FrozenPart:
    """This rank's part of a frozen parameter.

    Attributes:
        name: Name of the parameter in the policy.
        shape: Global shape of the parameter.
        start: Offset of the part in the flattened parameter.
        values: The part, 1-D, in forward's dtype.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor


class ZeroShards(ABC):
    """Access to a ZeRO optimizer by shard.

    Args:
        zero: The ZeRO optimizer (`engine.optimizer`).
        policy: The policy; its parameters belong to the optimizer or are frozen.

    Attributes:
        partitions: This rank's parts of all trainable parameters, in the order of the flat groups.
        offloaded: True if master weights and moments are on the CPU.

    Raises:
        RuntimeError: This DeepSpeed version lacks an attribute that the tested versions have.
    """

    _ATTRIBUTES: ClassVar[tuple[str, ...]]

    def __init__(self, zero: Any, policy: nn.Module):
        missing = [name for name in self._ATTRIBUTES if not hasattr(zero, name)]
        if missing:
            raise RuntimeError(
                f"DeepSpeed {deepspeed.__version__} stores its gradients differently from the version "
                f"craft-ds knows ({KNOWN_VERSIONS}): {type(zero).__name__} lacks {', '.join(missing)}"
            )
        self._zero = zero
        self._policy = policy
        self._names = {id(parameter): name for name, parameter in policy.named_parameters()}
        self.offloaded = False
        self.partitions = [part for part in self._find_partitions() if part.numel]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer of the flat fp32 groups."""
        return self._zero.optimizer

    @property
    @abstractmethod
    def masters(self) -> Sequence[Tensor]:
        """Flat fp32 master weights of this rank, one per group."""

    @property
    @abstractmethod
    def _groups(self) -> Sequence[Sequence[Any]]:
        """Return the trainable parameters of each flat group, in its order."""

    @abstractmethod
    def _find_partitions(self) -> Iterator[Partition]: ...

    @abstractmethod
    def boundary(self, last: bool) -> bool:
        """Return True if DeepSpeed is to treat this micro-batch as an accumulation boundary."""

    @abstractmethod
    def gradient(self) -> list[Tensor]:
        """Return views of this rank's accumulated gradient; zero for parameters that the pass did not use."""

    def aligned_masters(self) -> list[Tensor]:
        """Return views of the master weights in the order and sizes of `gradient`."""
        return [flat.detach() for flat in self.masters]

    @abstractmethod
    def take_gradient(self, buffer: GradientBuffer = "device") -> list[Tensor]:
        """Return the gradient in tensors like those of `gradient`, and clear the accumulator."""

    def by_parameter(self, gradient: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """Return views of the parts of a gradient with the names of their parameters, without padding.

        Args:
            gradient: From `gradient` or `take_gradient`: here one flat tensor per group.
        """
        return [(part.name, part.of(gradient)) for part in self.partitions]

    @abstractmethod
    def clear_gradient(self) -> None:
        """Clear the accumulator, so that the next backward pass starts a new sum.

        DeepSpeed alone would keep the last pass's gradient of a parameter that the next pass does not use.
        """

    @property
    def _master_gradients(self) -> list[Tensor]:
        """Return the gradients that an offloaded optimizer reads, of the masters' sizes."""
        gradients = [flat.grad for flat in self.masters]
        return [gradient for gradient in gradients if gradient is not None]

    @abstractmethod
    def prepare_step(self) -> None:
        """Move `gradient` to where DeepSpeed's step reads it."""

    @abstractmethod
    def copy_masters_to_params(self) -> None:
        """Copy the master weights into the parameters that forward uses. Collective: call on all ranks."""

    @abstractmethod
    def frozen_parts(self) -> Iterator[FrozenPart]:
        """Yield parts of the frozen parameters: together the ranks yield each element once."""

    @abstractmethod
    def load_frozen(self, read: ReadRange) -> None:
        """Set this rank's parts of the frozen parameters."""

    def load_masters(self, read: ReadRange) -> None:
        """Set this rank's master weights; `copy_masters_to_params` then updates the parameters.

        The padding between them, which DeepSpeed does not initialise, becomes zero.
        """
        for flat in self.masters:
            flat.zero_()
        for part in self.partitions:
            fill_(part.of(self.masters), read, part.name, part.start)

    def state(self, partition: Partition) -> Mapping[str, Tensor]:
        """Return the optimizer state of a partition: 1-D tensors by name; empty before the first step."""
        flat = self.masters[partition.group]
        return read_moments(self.optimizer, flat, partition.offset, partition.numel)

    def load_state(self, read: ReadRange, keys: Sequence[str], steps: int) -> None:
        """Create the optimizer state that the first step would create, and read its values."""
        counts_in_ints = isinstance(self.optimizer, DeepSpeedCPUAdam)
        for group, flat in enumerate(self.masters):
            step = steps if counts_in_ints else torch.tensor(float(steps), device=flat.device)
            parts = [
                Part(part.name, part.start, part.offset, part.numel)
                for part in self.partitions
                if part.group == group
            ]
            load_moments(self.optimizer, flat, parts, read, keys, step)

    def _frozen(self) -> Iterator[tuple[str, Any]]:
        held = {id(parameter) for group in self._groups for parameter in group}
        for name, parameter in self._policy.named_parameters():
            if id(parameter) not in held:
                yield name, parameter

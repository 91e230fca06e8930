"""Counter of the places where the host would wait for an accelerator, on a CPU.

The host runs ahead of an accelerator and waits where it needs a value, or where it copies without pinned
memory. Here every tensor counts as one on the device, except those that `HostWaits.copy_to_device` is given
and what is computed from these alone. Waits for a stream or an event, which name no tensor, are not seen.
"""

import sys
from collections import Counter
from contextlib import ExitStack
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from craft_ds.policies.device_copies import copy_to_device

# Operators whose result, or its shape, is a value of their input.
_READING = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
# Functions that copy to the host, which is not visible as an operator where the device is the CPU.
_TO_HOST = {"cpu", "numpy", "tolist"}
_CREATING = {"as_tensor", "tensor"}
_PLUMBING = (
    "torch._compile",
    "torch._dynamo",
    "torch._ops",
    "torch._tensor",
    "torch.utils._python_dispatch",
    __name__,
)


class Wait(NamedTuple):
    """A place where the host waits.

    Attributes:
        package: Top-level package of the code that asks for the value.
        place: Its module and line.
        name: The function or operator.
    """

    package: str
    place: str
    name: str


class HostWaits:
    """Count the waits of the host in this thread, and in backward passes that it starts, while entered.

    Attributes:
        seen: How often the host waited, by place.
    """

    def __init__(self) -> None:
        self.seen: Counter[Wait] = Counter()
        self._on_host: dict[int, StorageWeakRef] = {}

    def __enter__(self) -> Self:
        self._modes = ExitStack()
        self._modes.enter_context(_Functions(self))
        self._modes.enter_context(_Operators(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._modes.close()

    def copy_to_device(self, value: Tensor, device: torch.device | str) -> Tensor:
        """Do as the function of this name, for a tensor that counts as one on the host; in any thread."""
        self.keep_on_host(value)
        with _Functions(self):
            return copy_to_device(value, device)

    def take(self) -> dict[str, int]:
        """Return how often each package waited since the last call."""
        counts: Counter[str] = Counter()
        for wait, count in self.seen.items():
            counts[wait.package] += count
        self.seen.clear()
        return dict(counts)

    def keep_on_host(self, tensor: Tensor) -> None:
        """Count a tensor as one that the host has."""
        storage = StorageWeakRef(tensor.untyped_storage())  # keeps the address from being used again
        self._on_host[storage.cdata] = storage

    def forget(self, tensor: Tensor) -> None:
        """Count a tensor as one on the device."""
        self._on_host.pop(tensor.untyped_storage()._cdata, None)

    def is_on_host(self, tensor: Tensor) -> bool:
        """Return True for a tensor that the host has."""
        return tensor.untyped_storage()._cdata in self._on_host

    def add(self, name: str) -> None:
        """Count a wait of the calling code."""
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PLUMBING):
            frame = frame.f_back
        module = frame.f_globals.get("__name__", "?")
        self.seen[Wait(module.partition(".")[0], f"{module}:{frame.f_lineno}", name)] += 1


class _Functions(TorchFunctionMode):
    """Makes copies between host and device visible, which are not operators where both are the CPU."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, waits, name = kwargs or {}, self._waits, getattr(func, "__name__", "")
        result = func(*args, **kwargs)
        if name in _TO_HOST and not waits.is_on_host(args[0]):
            waits.add(name)
            if name == "cpu":
                result = result.clone()
                waits.keep_on_host(result)
        elif name == "to" and waits.is_on_host(args[0]) and _names_device(*args[1:], *kwargs.values()):
            if not kwargs.get("non_blocking"):
                waits.add("to")
            result = result.clone()
            waits.forget(result)
        elif name == "new_tensor" or (name in _CREATING and kwargs.get("device") is not None):
            waits.add(name)
        return result


def _names_device(*arguments: Any) -> bool:
    return any(isinstance(argument, torch.device | str) for argument in arguments)


class _Operators(TorchDispatchMode):
    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, waits = func(*args, **(kwargs or {})), self._waits
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_host, name = [waits.is_on_host(tensor) for tensor in tensors], func.overloadpacket.__name__
        if tensors and all(on_host):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    waits.keep_on_host(leaf)
        elif name in _READING or _has_mask(name, *args) or (any(on_host) and _copies(name, *args)):
            waits.add(name)
        return result


def _has_mask(name: str, *args: Any) -> bool:
    """Return True for an operator that is indexed by a mask, whose true entries it must count."""
    indices = args[1] if name in ("index", "index_put", "index_put_") else ()
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _copies(name: str, *args: Any) -> bool:
    return name == "copy_" and not any(args[2:])  # the third argument is `non_blocking`

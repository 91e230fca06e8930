"""Tensor memory, counted at the dispatcher: exact and machine-independent; excludes allocator overhead.

The resident memory of a process says little about a small model; this counts the bytes of its tensors.
"""

import weakref
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of the tensors created inside the context. Counters may be nested.

    A storage counts from the operator that creates it until it is freed. Memory that an operator uses
    internally is not counted, nor is a later resize of a storage.

    Attributes:
        live: Bytes alive now of tensors created inside.
        peak: Maximum of `live`.
        largest: Bytes of the largest tensor created inside.

    Example:
        >>> with MemoryCounter() as memory:
        ...     x = torch.zeros(100)
        ...     y = x.view(10, 10) + 1
        ...     del x
        >>> memory.live, memory.peak, memory.largest
        (400, 800, 400)
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._alive: dict[int, weakref.ref] = {}

    def __enter__(self) -> Self:
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if storage._cdata not in known and storage._cdata not in self._alive:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: weakref.ref) -> None:
            del self._alive[key]
            self.live -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size)

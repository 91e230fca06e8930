"""Memory of tensors, counted at the dispatcher: exact, the same on every machine, blind to allocators.

Resident memory of a process says little about a small model. This counts what tensors ask for.
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
    """Counts the bytes of the tensors born inside the context. Counters may be nested.

    A storage counts from the operator that makes it until nothing refers to it. What an operator uses
    internally is not seen, nor is a storage that is resized later.

    Attributes:
        live: Bytes alive now of what was born inside.
        peak: The largest that `live` has been.
        largest: Bytes of the largest single tensor born inside.

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
                self._born(storage)
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def died(_: weakref.ref) -> None:
            del self._alive[key]
            self.live -= size

        self._alive[key] = weakref.ref(storage, died)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size)

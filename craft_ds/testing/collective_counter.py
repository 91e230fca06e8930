"""Counter of collectives, as c10d operators at the dispatcher, for tests and benchmarks."""

from collections import Counter
from typing import Any, Self

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CollectiveCounter(TorchDispatchMode):
    """Counts collectives by (operator, bytes of their tensors)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def __enter__(self) -> Self:
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.seen[func.__name__, sum(t.numel() * t.element_size() for t in tensors)] += 1
        return func(*args, **(kwargs or {}))

"""Compiled kernels of surgery on accelerators, which read every gradient once.

torch has no operator for a Gram triple, nor for a·x + b·y in place: eager code reads the gradients twice and
more. Sums are in fp64: their error is that of the gradients' own rounding.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Below this the compiled code may count with 32 bits.
_MAX_ELEMENTS = 1 << 30


class Kernels:
    """Operations on 1-D gradient shards.

    Args:
        compiler: Compiles a function, such as `torch.compile`.
    """

    def __init__(self, compiler: Callable[[Callable[..., Any]], Callable[..., Any]]):
        self._triple, self._squared_norm = compiler(_triple), compiler(_squared_norm)
        self._merge_ = compiler(_merge_)

    def triple(self, t: Tensor, r: Tensor) -> Tensor:
        """Return (⟨t, t⟩, ⟨t, r⟩, ⟨r, r⟩): fp64, shape (3,)."""
        parts = [
            self._triple(*pair) for pair in zip(t.split(_MAX_ELEMENTS), r.split(_MAX_ELEMENTS), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)

    def squared_norm(self, x: Tensor) -> Tensor:
        """Return ⟨x, x⟩: fp64, a scalar tensor."""
        parts = [self._squared_norm(part) for part in x.split(_MAX_ELEMENTS)]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()

    def merge_(self, r: Tensor, t: Tensor, a: float, b: float) -> None:
        """Set r to a·t + b·r."""
        # Tensors, since a kernel would be compiled for each value of a number; `full` waits for no copy.
        weights = [torch.full((), value, dtype=torch.float32, device=r.device) for value in (a, b)]
        for r_part, t_part in zip(r.split(_MAX_ELEMENTS), t.split(_MAX_ELEMENTS), strict=True):
            self._merge_(r_part, t_part, *weights)


@functools.cache
def compiled_kernels(device: torch.device) -> Kernels | None:
    """Return the kernels of an accelerator; None on the CPU, or where nothing can be compiled."""
    if device.type != "cuda":
        return None
    try:
        kernels = Kernels(functools.partial(torch.compile, dynamic=True, fullgraph=True))
        probe = torch.ones(1 << 12, device=device)
        kernels.merge_(probe, probe.clone(), 0.5, 0.5)
        found = [*kernels.triple(probe, probe).tolist(), kernels.squared_norm(probe).item()]
    except Exception as error:  # of any part of a compiler: Triton, its driver, the machine's C compiler
        reason = str(error).strip().splitlines()
        logger.warning(
            "Gradient surgery runs without compiled kernels, which would read the gradients fewer times: %s",
            f"{type(error).__name__}: {reason[0] if reason else 'no reason given'}"[:300],
        )
        return None
    if found != [float(probe.numel())] * 4:
        logger.warning("Gradient surgery runs without compiled kernels: their results are wrong (%s)", found)
        return None
    return kernels


def _triple(t: Tensor, r: Tensor) -> Tensor:
    t, r = t.double(), r.double()
    return torch.stack([(t * t).sum(), (t * r).sum(), (r * r).sum()])


def _squared_norm(x: Tensor) -> Tensor:
    x = x.double()
    return (x * x).sum()


def _merge_(r: Tensor, t: Tensor, a: Tensor, b: Tensor) -> None:
    r.copy_(a * t + b * r)

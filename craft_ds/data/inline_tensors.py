"""Small tensors of a batch as bytes, on their way from a data-loader worker.

torch passes each tensor on by a file descriptor, which a thread of the worker hands over when it gets to run:
some milliseconds, for a batch of twenty tensors as long as a small step. Bytes go through the pipe at once.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_LARGE = 1 << 16
"""Bytes from which the copy through the pipe takes longer than a file descriptor."""


class _Inline(NamedTuple):
    array: np.ndarray


def with_inline_tensors(batch: dict[str, Any]) -> dict[str, Any]:
    """Replace the small tensors of a batch by what `with_tensors` turns back."""
    return {
        key: _Inline(value.numpy()) if isinstance(value, Tensor) and _is_small(value) else value
        for key, value in batch.items()
    }


def with_tensors(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch that `with_inline_tensors` was given."""
    return {
        key: torch.from_numpy(value.array) if isinstance(value, _Inline) else value
        for key, value in batch.items()
    }


def _is_small(value: Tensor) -> bool:
    # numpy has no bfloat16 and no float8.
    return value.nbytes < _LARGE and (value.dtype.itemsize > 2 or not value.is_floating_point())

"""Read and validate the header of a safetensors file.

Own code instead of safetensors' reader: that one accepts repeated names and maps the file into memory, and
these headers are read through a descriptor that stays open for ranges.
"""

import math
import os
import stat
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from craft_ds.tensor_io.safe_json import is_count, parse_object

_MOST_BYTES = 100_000_000
"""As in the reference implementation."""

_MOST_DIMENSIONS = 64


class Header(NamedTuple):
    """Contents of a header.

    Attributes:
        metadata: The `__metadata__` entry.
        entries: `dtype`, `shape` and `data_offsets` of each tensor.
        start: Offset of the tensors' bytes in the file.
    """

    metadata: dict[str, str]
    entries: dict[str, dict[str, Any]]
    start: int


def read_header(fd: int, dtypes: Mapping[str, torch.dtype]) -> Header:
    """Read the header of an open file and check that it describes the file to the byte.

    Args:
        fd: Descriptor of the file.
        dtypes: Supported dtypes by their names in the format.

    Raises:
        ValueError: The file is not a valid safetensors file; the message is the reason.
        OSError: The file cannot be read.
    """
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    room = found.st_size - 8 - length
    if not 0 < length <= _MOST_BYTES or room < 0:
        raise ValueError(f"it declares a header of {length} bytes, but the file has {found.st_size}")
    entries = parse_object(os.pread(fd, length, 8))
    metadata = entries.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise ValueError("its metadata values are not strings")
    spans = sorted(_span(name, entry, dtypes) for name, entry in entries.items())
    reached = 0
    for begin, end in spans:
        if begin != reached:
            raise ValueError(f"its tensors overlap or leave a gap at byte {min(begin, reached)}")
        reached = end
    if reached != room:
        raise ValueError(f"its tensors have {reached} bytes, but the file holds {room}")
    return Header(metadata, entries, 8 + length)


def _span(name: str, entry: Any, dtypes: Mapping[str, torch.dtype]) -> tuple[int, int]:
    """Return the byte range [begin, end) of a tensor, relative to the first tensor's."""
    what = repr(name[:100])
    if not isinstance(entry, dict):
        raise ValueError(f"{what} is not a tensor entry")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise ValueError(f"{what} has the unknown dtype {str(dtype)[:100]!r}")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or not all(map(is_count, shape)):
        raise ValueError(f"{what} has an invalid shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise ValueError(f"{what} has invalid offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtypes[dtype].itemsize:
        raise ValueError(f"the byte size of {what} does not match its shape")
    return begin, end

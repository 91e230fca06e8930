"""Read and validate the header of a safetensors file."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from craft_ds.errors import one_line
from craft_ds.tensor_io.safe_json import check_number_of_values, is_count, parse_object

_MOST_BYTES = 1 << 24
"""The reference implementation allows 100 MB, whose entries take a minute and a gigabyte to read.

An entry takes up to 500 bytes in a piece of a rank, which has each name twice, and 17 of the values that
`safe_json` counts: 23 000 entries fit. A policy of 3.45 billion parameters has 900, and its optimizer file
three times as many.
"""

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


def read_header(path: Path, fd: int, dtypes: Mapping[str, torch.dtype]) -> Header:
    """Read the header of an open file and check that it describes the file to the byte.

    safetensors' own reader checks the entries against the file. It accepts repeated names, of which two
    readers could choose different ones, and shapes that torch cannot represent; those are refused here.

    Args:
        path: The file.
        fd: Its descriptor. The header is read through it first: a disk error is then an `OSError`, not the
            signal that a memory map would cause.
        dtypes: Supported dtypes by their names in the format.

    Raises:
        ValueError: The file is not a valid safetensors file; the message is the reason.
        OSError: The file cannot be read.
    """
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if not 0 < length <= min(_MOST_BYTES, found.st_size - 8):
        raise ValueError(f"it declares a header of {length} bytes, but the file has {found.st_size}")
    text = os.pread(fd, length, 8)
    check_number_of_values(text)
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(one_line(error)) from None
    entries = parse_object(text)
    metadata = entries.pop("__metadata__", None) or {}
    for name, entry in entries.items():
        if entry["dtype"] not in dtypes:
            raise ValueError(f"{name[:100]!r} has the unsupported dtype {entry['dtype']}")
        if len(entry["shape"]) > _MOST_DIMENSIONS or not all(map(is_count, entry["shape"])):
            raise ValueError(f"{name[:100]!r} has an invalid shape")
    return Header(metadata, entries, 8 + length)

"""Safetensors files that all ranks write and read concurrently, each its own ranges.

The format (https://github.com/huggingface/safetensors) is a length, a JSON header and one contiguous
block of bytes per tensor. A shard is a range of a flattened tensor, and so a range of the file: no rank
gathers anything, and sharded and unsharded runs write identical files.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from craft_ds.tensor_io.filesystem import reserve
from craft_ds.tensor_io.header import read_header

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


ReadRange = Callable[[str, int, int], Tensor]
"""read(name, start, stop): elements [start, stop) of a flattened tensor, 1-D, any float dtype."""

_PIECE = 1 << 22


def fill_(part: Tensor, read: ReadRange, name: str, start: int) -> None:
    """Read a part of a flattened tensor into place, piece by piece, without a second copy in memory.

    Args:
        part: 1-D destination for elements [start, start + len(part)), of any dtype and on any device.
        read: Reads ranges by name.
        name: The tensor.
        start: Offset of the part in the flattened tensor, in elements.
    """
    for offset in range(0, part.numel(), _PIECE):
        piece = part[offset : offset + _PIECE]
        piece.copy_(read(name, start + offset, start + offset + piece.numel()))


class TensorSpec(NamedTuple):
    """Name, shape and dtype of a tensor in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def create_tensor_file(
    path: Path, specs: Iterable[TensorSpec], metadata: dict[str, str] | None = None
) -> None:
    """Create a file of its full size, with its header and without values. Call on one rank.

    Args:
        path: The new file.
        specs: Its tensors.
        metadata: Strings for the header's `__metadata__`.

    Raises:
        OSError: The disk is full or the directory is not writable.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    # The order of the reference implementation: larger items first, so that all stay aligned.
    for spec in sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name)):
        end = offset + math.prod(spec.shape) * spec.dtype.itemsize
        header[spec.name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        if offset:
            # Reserve the space of all ranks, so that a full disk is found before anything is written.
            reserve(file.fileno(), file.tell() + offset)


def write_tensor_file(
    path: Path, specs: Iterable[TensorSpec], read: ReadRange, metadata: dict[str, str] | None = None
) -> None:
    """Write a file piece by piece in bounded memory, and fsync it.

    Args:
        path: The new file.
        specs: Its tensors; their values are cast to these dtypes.
        read: Reads the values by range.
        metadata: Strings for the header's `__metadata__`.

    Raises:
        OSError: The disk is full or the directory is not writable.
    """
    specs = list(specs)
    create_tensor_file(path, specs, metadata)
    with TensorFile(path, writable=True) as file:
        for name, shape, _ in specs:
            count = math.prod(shape)
            for start in range(0, count, _PIECE):
                file.write(name, start, read(name, start, min(start + _PIECE, count)))
        file.sync()


class TensorFile:
    """A safetensors file whose tensors are read and written by range.

    Args:
        path: The file.
        writable: Open it for `write` too.

    Raises:
        ValueError: The file is not a valid safetensors file: its header does not describe it to the byte.
        OSError: The file does not exist or cannot be read.
    """

    def __init__(self, path: Path, *, writable: bool = False):
        # Without O_NONBLOCK, opening a named pipe would block.
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NONBLOCK
        try:
            self._fd = os.open(path, flags)
        except OSError as error:
            if error.errno in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
                raise ValueError(f"{path} is not a safetensors file ({error.strerror})") from None
            raise
        try:
            self.metadata, self._entries, self._start = read_header(path, self._fd, _DTYPES)
        except ValueError as error:
            os.close(self._fd)
            raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from None
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def specs(self) -> list[TensorSpec]:
        """Return name, shape and dtype of every tensor."""
        return [
            TensorSpec(name, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
            for name, entry in self._entries.items()
        ]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of a flattened tensor, 1-D, on the CPU.

        Raises:
            KeyError: The file has no such tensor.
            IndexError: The tensor has no such elements.
        """
        dtype, offset = self._locate(name, start, stop)
        count = (stop - start) * dtype.itemsize
        buffer = bytearray(count)
        _fully(lambda view, at: os.preadv(self._fd, [view], at), memoryview(buffer), offset)
        return torch.frombuffer(buffer, dtype=dtype) if count else torch.empty(0, dtype=dtype)

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Set elements [start, start + len(values)) of a flattened tensor.

        Args:
            name: The tensor.
            start: First element.
            values: 1-D, on any device; copied to the CPU and cast to the file's dtype piece by piece.

        Raises:
            KeyError: The file has no such tensor.
            IndexError: The tensor has no such elements.
        """
        dtype, offset = self._locate(name, start, start + values.numel())
        for piece in values.detach().split(_PIECE) if values.numel() else ():
            view = memoryview(piece.to("cpu", dtype).contiguous().view(torch.uint8).numpy())
            _fully(lambda part, at: os.pwrite(self._fd, part, at), view, offset)
            offset += len(view)

    def sync(self) -> None:
        """Flush written data to the disk."""
        os.fsync(self._fd)

    def _locate(self, name: str, start: int, stop: int) -> tuple[torch.dtype, int]:
        entry = self._entries[name]
        dtype, numel = _DTYPES[entry["dtype"]], math.prod(entry["shape"])
        if not 0 <= start <= stop <= numel:
            # The bytes beyond belong to the next tensor.
            raise IndexError(f"{name} has {numel} elements, not [{start}, {stop})")
        return dtype, self._start + entry["data_offsets"][0] + start * dtype.itemsize


def _fully(transfer: Any, view: memoryview, offset: int) -> None:
    """Repeat a positioned read or write until the full view is transferred: one call moves at most 2 GiB."""
    done = 0
    while done < len(view):
        moved = transfer(view[done:], offset + done)
        if moved == 0:
            raise OSError("unexpected end of file")
        done += moved

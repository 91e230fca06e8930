"""Durable file operations that the standard library lacks."""

import ctypes
import errno
import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Force a file, or the names in a directory, to the disk.

    Raises:
        OSError: The disk refuses.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve(descriptor: int, size: int) -> None:
    """Give an open file its size, and room on the disk where the file system can promise it.

    `os.posix_fallocate` would write into every block of the file where it cannot (NFS before version 4.2,
    many FUSE file systems), and all would travel twice.

    Raises:
        OSError: The disk or the quota has no room for it.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)  # Linux has it
    if fallocate is not None:
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        if fallocate(descriptor, 0, 0, size) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(number, os.strerror(number))
    os.ftruncate(descriptor, size)

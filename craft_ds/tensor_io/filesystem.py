"""Durable and atomic file operations."""

import ctypes
import errno
import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk.

    Raises:
        OSError: The disk fails.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve(descriptor: int, size: int) -> None:
    """Set the size of an open file, and allocate its disk space if the file system supports it.

    `os.posix_fallocate` writes into every block if it does not (NFS before version 4.2, many FUSE file
    systems), which would send all data twice.

    Raises:
        OSError: The disk or the quota has too little space.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)  # on Linux
    if fallocate is not None:
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        if fallocate(descriptor, 0, 0, size) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(number, os.strerror(number))
    os.ftruncate(descriptor, size)

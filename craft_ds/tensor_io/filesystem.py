"""Durable and atomic file operations."""

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from craft_ds.errors import UserError
from craft_ds.tensor_io.output_lock import locked_output

UNFINISHED = ".tmp"
"""Suffix of files and directories that are not complete yet."""


def unfinished_path(path: Path) -> Path:
    """Return the path beside a file or directory under which it is written until it is complete."""
    return path.with_name(path.name + UNFINISHED)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file that is complete whenever it exists: yield a temporary path, flush it and rename it.

    After an error the temporary file remains; the next attempt replaces it.

    Args:
        path: The file; an existing one is replaced.

    Raises:
        OSError: The disk is full or not writable.
    """
    temporary = unfinished_path(path)
    remove_node(temporary)
    yield temporary
    fsync(temporary)
    temporary.rename(path)


def remove_node(path: Path) -> None:
    """Delete whatever has this path, if anything: a file, a directory with its contents, or a link itself.

    Raises:
        OSError: It cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def no_temporary_files() -> Iterator[None]:
    """Remove the temporary files that a library makes meanwhile: LeRobot leaves one per configuration."""
    with tempfile.TemporaryDirectory() as directory:
        before, tempfile.tempdir = tempfile.tempdir, directory
        try:
            yield
        finally:
            tempfile.tempdir = before


def publish_directory(temporary: Path, directory: Path) -> None:
    """Flush everything in a directory and give it its final name, so that it appears complete.

    Raises:
        OSError: The disk is full or not writable.
    """
    for path in (*temporary.rglob("*"), temporary):
        fsync(path)
    temporary.rename(directory)
    fsync(directory.parent)


@contextlib.contextmanager
def atomic_directory(
    directory: Path, temporary: Path | None = None, *, flag: str = "--output_dir"
) -> Iterator[Path]:
    """Write a directory that is complete whenever it exists: yield a temporary path, then publish it.

    Leftovers under the temporary path are deleted first; after an error it is deleted too. The directory is
    locked meanwhile: a second writer would delete the first one's work.

    Args:
        directory: The directory; must not exist.
        temporary: Path until it is complete, which the caller creates; None: `unfinished_path`.
        flag: The flag that names the directory.

    Raises:
        OSError: The disk is full or not writable.
        UserError: The directory exists, or another process is writing it.
    """
    temporary = temporary or unfinished_path(directory)
    with locked_output(directory, flag=flag):
        if os.path.lexists(directory):  # another process may have finished it meanwhile
            raise UserError(f"{flag}={directory} exists already: choose another or move it away")
        remove_node(temporary)
        try:
            yield temporary
            publish_directory(temporary, directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


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


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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

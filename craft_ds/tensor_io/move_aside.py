"""Move what is in the way aside; nothing is deleted."""

import contextlib
import itertools
import os
import re
from pathlib import Path

from craft_ds.tensor_io.output_lock import LOCK_FILE

# The lock, and what a file system has in its root.
_NO_CONTENT = (LOCK_FILE, "lost+found")


def move_aside(path: Path) -> Path:
    """Rename a file or directory to a free name beside it.

    Returns:
        The new path.

    Raises:
        OSError: The parent directory is not writable.
    """
    target = _free_aside(path)
    path.rename(target)
    return target


def _free_aside(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.aside-{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def directory_contents(directory: Path) -> list[Path]:
    """Return what a directory holds, if it exists, besides a lock and what was moved aside in it.

    Raises:
        OSError: The directory cannot be read.
    """
    if not directory.is_dir():
        return []
    aside = re.compile(rf"{re.escape(directory.name)}\.aside-\d+")
    return sorted(
        path
        for path in directory.iterdir()
        if path.name not in _NO_CONTENT and not aside.fullmatch(path.name)
    )


def move_contents_aside(directory: Path) -> Path | None:
    """Empty a directory: move its contents into a new directory beside it; nothing is deleted.

    The new directory is inside it where nothing can be moved beside it: a mount point, a read-only parent.

    Returns:
        The new directory; None: there was nothing to move.

    Raises:
        OSError: The directory is not writable.
    """
    if not directory_contents(directory):
        return None
    try:
        return _move_contents(directory, _free_aside(directory))
    except OSError:
        return _move_contents(directory, _free_aside(directory / directory.name))


def _move_contents(directory: Path, target: Path) -> Path:
    target.mkdir()
    try:
        for path in directory_contents(directory):
            path.rename(target / path.name)
    except OSError:
        with contextlib.suppress(OSError):
            target.rmdir()
        raise
    return target

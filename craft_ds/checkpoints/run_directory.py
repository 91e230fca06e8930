"""Checkpoint directories of a run: their names, the newest, the `last` link and deletion of old ones."""

import contextlib
import errno
import itertools
import re
import shutil
from pathlib import Path

from craft_ds.checkpoints.manifest import read_manifest
from craft_ds.errors import UserError
from craft_ds.tensor_io.filesystem import UNFINISHED, fsync, unfinished_path

FINAL = "final"
LAST = "last"
_STEP = re.compile(r"step_\d{6,}")
# Object stores and some network file systems have no symbolic links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def step_directory(output_dir: Path, step: int) -> Path:
    """Return the directory of the checkpoint after `step` steps."""
    return output_dir / f"step_{step:06d}"


def checkpoint_directories(output_dir: Path) -> list[Path]:
    """Return every directory with a checkpoint's name, complete or not."""
    found = [path for path in output_dir.glob("step_*") if _STEP.fullmatch(path.name)]
    return [path for path in (*found, output_dir / FINAL) if path.is_dir() and not path.is_symlink()]


def complete_checkpoints(output_dir: Path) -> tuple[list[tuple[int, Path]], dict[Path, str]]:
    """Return the checkpoints of a run whose manifest matches their files by name and size.

    Returns:
        Step and directory of each, newest first; and the reason why each other directory is skipped.
    """
    complete, skipped = [], {}
    for path in checkpoint_directories(output_dir):
        try:
            complete.append((read_manifest(path)["step"], path))
        except UserError as error:
            skipped[path] = str(error)
    # `final` before the periodic checkpoint of the same step.
    return sorted(complete, key=lambda entry: (entry[0], entry[1].name == FINAL), reverse=True), skipped


def point_last_at(directory: Path) -> None:
    """Point the link `last` at a checkpoint, if the file system has symbolic links.

    Raises:
        OSError: The disk is full or not writable.
    """
    temporary = unfinished_path(directory.with_name(LAST))
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(directory.name)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return
        raise
    temporary.rename(directory.with_name(LAST))
    fsync(directory.parent)


def repair_last_link(directory: Path) -> None:
    """Point `last` at a run's final checkpoint, in case the run died between the two renames.

    Does nothing if the disk is not writable.
    """
    if directory.with_name(LAST).resolve() != directory.resolve():
        with contextlib.suppress(OSError):
            point_last_at(directory)


def prune(output_dir: Path, save_total_limit: int, keep_period: int) -> list[Path]:
    """Delete the oldest complete periodic checkpoints beyond a limit.

    Args:
        output_dir: The run's directory.
        save_total_limit: Number of newest periodic checkpoints to keep; 0: all.
        keep_period: Also keep checkpoints whose step is a multiple of it; 0: none.

    Returns:
        The deleted directories.

    Raises:
        OSError: A directory cannot be removed.
    """
    if not save_total_limit:
        return []
    complete, _ = complete_checkpoints(output_dir)
    periodic = [(step, path) for step, path in complete if path.name != FINAL]
    surplus = [
        path for step, path in periodic[save_total_limit:] if not (keep_period and step % keep_period == 0)
    ]
    for path in surplus:
        # Renamed first: an interrupted deletion must not leave half a checkpoint under its name.
        shutil.rmtree(path.rename(unfinished_path(path)))
    return surplus


def move_aside(path: Path) -> Path:
    """Rename a directory to a free name beside it; nothing is deleted.

    Returns:
        The new path.

    Raises:
        OSError: The parent directory is not writable.
    """
    for number in itertools.count(1):
        target = path.with_name(f"{path.name}.aside-{number}")
        if not target.exists():
            path.rename(target)
            return target
    raise AssertionError("unreachable")


def remove_unfinished(output_dir: Path) -> None:
    """Delete the temporary directories of interrupted saves and deletions.

    Raises:
        OSError: A directory cannot be removed.
    """
    for pattern in (f"step_*{UNFINISHED}", f"{FINAL}{UNFINISHED}"):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path)

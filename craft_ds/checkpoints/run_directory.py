"""The checkpoints in the directory of a run: their names, which is the newest, which may go."""

import contextlib
import errno
import itertools
import re
import shutil
from pathlib import Path

from craft_ds.checkpoints.manifest import read_manifest
from craft_ds.errors import UserError
from craft_ds.tensor_io.filesystem import fsync

FINAL = "final"
LAST = "last"
UNFINISHED = ".tmp"
_STEP = re.compile(r"step_\d{6,}")
# Object stores and some network file systems have no symbolic links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def step_directory(output_dir: Path, step: int) -> Path:
    """Directory of the checkpoint after `step` steps."""
    return output_dir / f"step_{step:06d}"


def checkpoint_directories(output_dir: Path) -> list[Path]:
    """Every directory with a checkpoint's name, whole or not."""
    found = [path for path in output_dir.glob("step_*") if _STEP.fullmatch(path.name)]
    return [path for path in (*found, output_dir / FINAL) if path.is_dir() and not path.is_symlink()]


def complete_checkpoints(output_dir: Path) -> tuple[list[tuple[int, Path]], dict[Path, str]]:
    """The checkpoints of a run whose manifest fits their files by name and size.

    Returns:
        Step and directory of each, the newest first; and why each other directory is none.
    """
    whole, skipped = [], {}
    for path in checkpoint_directories(output_dir):
        try:
            whole.append((read_manifest(path)["step"], path))
        except UserError as error:
            skipped[path] = str(error)
    # `final` before the periodic checkpoint of the same step.
    return sorted(whole, key=lambda entry: (entry[0], entry[1].name == FINAL), reverse=True), skipped


def point_last_at(directory: Path) -> None:
    """Let `last` mean this checkpoint, where the file system has symbolic links.

    Raises:
        OSError: The disk is full or not writable.
    """
    temporary = directory.with_name(f"{LAST}{UNFINISHED}")
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
    """Let `last` mean a run's final checkpoint: the run may have died between the two renames.

    Where the disk cannot be written nothing happens.
    """
    if directory.with_name(LAST).resolve() != directory.resolve():
        with contextlib.suppress(OSError):
            point_last_at(directory)


def prune(output_dir: Path, save_total_limit: int, keep_period: int) -> list[Path]:
    """Delete the oldest periodic checkpoints, once a newer one is known to be whole.

    Args:
        output_dir: The run's directory.
        save_total_limit: How many of the newest periodic checkpoints stay; 0: all.
        keep_period: Those whose step is a multiple of it stay in any case; 0: none does.

    Returns:
        What was deleted.

    Raises:
        OSError: A directory cannot be removed.
    """
    if not save_total_limit:
        return []
    whole, _ = complete_checkpoints(output_dir)
    periodic = [(step, path) for step, path in whole if path.name != FINAL]
    gone = [
        path for step, path in periodic[save_total_limit:] if not (keep_period and step % keep_period == 0)
    ]
    for path in gone:
        # Renamed first: a deletion that is cut off must not leave half a checkpoint under its name.
        doomed = path.with_name(path.name + UNFINISHED)
        path.rename(doomed)
        shutil.rmtree(doomed)
    return gone


def move_aside(path: Path) -> Path:
    """Give a directory that is in the way another name; nothing is deleted.

    Returns:
        Its new name.

    Raises:
        OSError: The directory above is not writable.
    """
    for number in itertools.count(1):
        target = path.with_name(f"{path.name}.aside-{number}")
        if not target.exists():
            path.rename(target)
            return target
    raise AssertionError("unreachable")


def remove_unfinished(output_dir: Path) -> None:
    """Delete what saves and deletions that were cut off have left.

    Raises:
        OSError: A directory cannot be removed.
    """
    for pattern in (f"step_*{UNFINISHED}", f"{FINAL}{UNFINISHED}"):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path)

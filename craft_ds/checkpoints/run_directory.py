"""Directory of a run: its checkpoints, the newest, the links `last` and `best`, and deletion of old ones."""

import contextlib
import errno
import logging
import os
import re
import shutil
from pathlib import Path

from craft_ds.checkpoints.manifest import read_manifest
from craft_ds.errors import UserError
from craft_ds.tensor_io.filesystem import UNFINISHED, fsync, remove_node, unfinished_path
from craft_ds.tensor_io.move_aside import move_aside

FINAL = "final"
LAST = "last"
BEST = "best"
LINKS = (LAST, BEST)
_STEP = re.compile(r"step_\d{6,}")
# Object stores and some network file systems have no symbolic links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

logger = logging.getLogger(__name__)


def step_directory(output_dir: Path, step: int) -> Path:
    """Return the directory of the checkpoint after `step` steps."""
    return output_dir / f"step_{step:06d}"


def checkpoint_directories(output_dir: Path) -> list[Path]:
    """Return every directory with a checkpoint's name, complete or not.

    A link's name is among them if it is a directory: tools that copy runs to or from object stores follow
    links.
    """
    return [path for path in _named(output_dir) if path.is_dir() and not path.is_symlink()]


def _named(output_dir: Path) -> list[Path]:
    found = [path for path in output_dir.glob("step_*") if _STEP.fullmatch(path.name)]
    return [*found, output_dir / FINAL, *(output_dir / name for name in LINKS)]


def complete_checkpoints(output_dir: Path) -> tuple[list[tuple[int, Path]], dict[Path, str]]:
    """Return the checkpoints of a run whose manifest matches their files by name and size.

    Returns:
        Step and directory of each, newest first; and the reason why each other directory is skipped.
    """
    complete = []
    skipped = {
        path: f"{path} is not a directory"
        for path in _named(output_dir)
        if os.path.lexists(path) and path.name not in LINKS and (path.is_symlink() or not path.is_dir())
    }
    for path in checkpoint_directories(output_dir):
        try:
            complete.append((read_manifest(path)["step"], path))
        except UserError as error:
            skipped[path] = str(error)
    # `final` before the periodic checkpoint of the same step.
    return sorted(complete, key=lambda entry: (entry[0], entry[1].name == FINAL), reverse=True), skipped


def point_last_at(directory: Path) -> None:
    """Point the link `last` at a checkpoint, as `point_link_at`."""
    point_link_at(directory.with_name(LAST), directory)


def point_link_at(link: Path, directory: Path) -> None:
    """Point a link at a checkpoint beside it, if the file system has symbolic links.

    Anything but a link with that name is moved aside, with a warning.

    Raises:
        OSError: The disk is full or not writable.
    """
    temporary = unfinished_path(link)
    remove_node(temporary)
    try:
        temporary.symlink_to(directory.name)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return
        raise
    if os.path.lexists(link) and not link.is_symlink():
        logger.warning("%s is not a link: renamed it to %s", link, move_aside(link))
    temporary.rename(link)
    fsync(directory.parent)


def replace_last_copy(output_dir: Path, verified: Path) -> tuple[Path, str | None]:
    """Make `last` a link again if it is a directory.

    Args:
        output_dir: The run's directory.
        verified: Its newest checkpoint, all of whose bytes were verified.

    Returns:
        The path of that checkpoint now, and a message about what was done, if anything.

    Raises:
        OSError: The directory is not writable.
    """
    last = output_dir / LAST
    if last.is_symlink() or not last.is_dir():
        return verified, None
    if verified == last:
        verified = step_directory(output_dir, read_manifest(last)["step"])
        message = f"{last} was a directory: renamed it to {last.rename(verified)}"
    elif read_manifest(last) == read_manifest(verified):  # with the checksums of all other files
        remove_node(last.rename(unfinished_path(last)))
        message = f"{last} was a copy of {verified.name}: replaced it by a link"
    else:
        message = f"{last} was a directory: renamed it to {move_aside(last)}"
    point_last_at(verified)
    return verified, message


def replace_best_copy(output_dir: Path) -> str | None:
    """Make `best` a link again if it is a directory.

    If no other checkpoint has its step, it is renamed to `step_<step>`.

    Returns:
        A message about what was done, if anything.

    Raises:
        OSError: The directory is not writable.
    """
    best = output_dir / BEST
    if best.is_symlink() or not best.is_dir():
        return None
    try:
        manifest = read_manifest(best)
    except UserError as error:
        return f"{error}: renamed {best} to {move_aside(best)}"
    complete, _ = complete_checkpoints(output_dir)
    of_step = [path for step, path in complete if step == manifest["step"] and path.name not in LINKS]
    same = next((path for path in of_step if read_manifest(path) == manifest), None)
    if same is not None:
        remove_node(best.rename(unfinished_path(best)))
        message = f"{best} was a copy of {same.name}: replaced it by a link"
    elif of_step or os.path.lexists(step_directory(output_dir, manifest["step"])):
        return f"{best} was a directory: renamed it to {move_aside(best)}"
    else:
        same = best.rename(step_directory(output_dir, manifest["step"]))
        message = f"{best} was a directory: renamed it to {same}"
    point_link_at(best, same)
    return message


def repair_last_link(directory: Path) -> None:
    """Point `last` at a run's final checkpoint, in case the run died between the two renames.

    Does nothing if the disk is not writable.
    """
    last = directory.with_name(LAST)
    if last.resolve() != directory.resolve() and (last.is_symlink() or not last.exists()):
        with contextlib.suppress(OSError):
            point_last_at(directory)


def prune(output_dir: Path, save_total_limit: int, keep_period: int, keep: Path | None = None) -> list[Path]:
    """Delete the oldest complete periodic checkpoints beyond a limit.

    Args:
        output_dir: The run's directory.
        save_total_limit: Number of newest periodic checkpoints to keep; 0: all.
        keep_period: Also keep checkpoints whose step is a multiple of it; 0: none.
        keep: Also keep this checkpoint. The target of the link `best` is always kept.

    Returns:
        The deleted directories.

    Raises:
        OSError: A directory cannot be removed.
    """
    if not save_total_limit:
        return []
    complete, _ = complete_checkpoints(output_dir)
    periodic = [(step, path) for step, path in complete if path.name not in (FINAL, *LINKS)]
    best = {keep and keep.name, (output_dir / BEST).resolve().name}
    surplus = [
        path
        for step, path in periodic[save_total_limit:]
        if path.name not in best and not (keep_period and step % keep_period == 0)
    ]
    for path in surplus:
        # Renamed first: an interrupted deletion must not leave half a checkpoint under its name.
        shutil.rmtree(path.rename(unfinished_path(path)))
    return surplus


def remove_unfinished(output_dir: Path) -> None:
    """Delete the temporary directories of interrupted saves and deletions, and anything else at their names.

    Raises:
        OSError: Something cannot be removed.
    """
    for pattern in (f"{name}{UNFINISHED}" for name in ("step_*", FINAL, *LINKS)):
        for path in output_dir.glob(pattern):
            remove_node(path)


def set_old_final_aside(output_dir: Path) -> Path | None:
    """Rename the final checkpoint of a run that was extended; call it when the new one is complete.

    Its new name is that of a periodic checkpoint of its step.

    Returns:
        Its path if that name was taken by a checkpoint of the same step: it may be deleted.

    Raises:
        OSError: The directory is not writable.
    """
    final = output_dir / FINAL
    if not final.is_dir():
        return None
    try:
        periodic = step_directory(output_dir, read_manifest(final)["step"])
        is_needless = periodic.is_dir() and bool(read_manifest(periodic))
    except UserError as error:
        logger.warning("%s: renamed %s to %s", error, final, move_aside(final))
        return None
    if is_needless:
        return final.rename(unfinished_path(periodic))
    final.rename(periodic)
    return None

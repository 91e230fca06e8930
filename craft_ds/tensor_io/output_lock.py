"""Lock of an output directory, so that two processes cannot write into it at once.

The lock is a record lock of the kernel: it ends with its process, however that ends, so that the file of a
killed process blocks nobody. Processes forked by the holder, such as those of a data loader, do not hold it.
The lock belongs to the process and ends when the process closes any descriptor of the file: within a
process, only this module opens it.
"""

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from craft_ds.errors import UserError

LOCK_FILE = ".craft-ds.lock"
"""Name of the lock file inside a directory."""

_JOB_IDS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "FLUX_JOB_ID", "KUBERNETES_JOB_NAME")
_POLL_S = 0.2
_ATTEMPTS = 100
_NAMELESS_S = 1.0

logger = logging.getLogger(__name__)
_held: set[Path] = set()


class NotWritableError(UserError):
    """The lock cannot be written, and so nothing else in that place."""


@contextlib.contextmanager
def locked_output(
    output: Path, *, flag: str = "--output_dir", inside: bool = False, wait_s: float = 0.0
) -> Iterator[None]:
    """Hold the lock of an output directory; its file names the holder and is deleted at the end.

    The lock is the file `.NAME.lock` beside the directory. Within a process it is re-entrant. A file system
    without locks gives a warning, and then nothing keeps a second process out.

    Args:
        output: The output directory, which need not exist.
        flag: The flag that names it.
        inside: Also lock `LOCK_FILE` inside a directory that exists. For a volume that several machines or
            containers mount, only that file is common to them, and the parent need not be writable. Not for
            directories that a builder renames to `output` when they are complete.
        wait_s: Seconds to wait for a holder that is about to end.

    Raises:
        NotWritableError: The lock cannot be written.
        UserError: Another process holds the lock.
    """
    directory = Path(os.path.realpath(output))
    if directory in _held:
        yield
        return
    described, deadline = f"{flag}={output}", time.monotonic() + wait_s
    with contextlib.ExitStack() as locks:
        within = inside and directory.is_dir()
        try:
            try:
                locks.enter_context(
                    _locked(directory.with_name(f".{directory.name}.lock"), described, deadline)
                )
            except OSError:
                if not within:
                    raise
            if within:
                locks.enter_context(_locked(directory / LOCK_FILE, described, deadline))
        except OSError as error:
            raise NotWritableError(f"{described} cannot be written: {error}") from error
        _held.add(directory)
        locks.callback(_held.discard, directory)
        yield


@contextlib.contextmanager
def _locked(path: Path, described: str, deadline: float) -> Iterator[None]:
    """Hold the lock on one file; create the directories above it, and remove them if they remain empty."""
    missing = [parent for parent in path.parents if not parent.exists()]
    descriptor = _lock(path, described, deadline)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):
            for parent in missing:
                parent.rmdir()


def _lock(path: Path, described: str, deadline: float) -> int:
    """Open and lock a file, and write this process's name into it; return its descriptor."""
    absent = 0
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # another holder has just removed the empty directory
            absent += 1
            if absent == _ATTEMPTS:
                raise
            continue
        locked, warning = True, None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            locked = False
        except OSError as error:  # ENOLCK, ENOTSUP, ENOSYS and others, by file system
            warning = error.strerror
        if locked and _is_at(descriptor, path):
            break
        # Else the previous holder has deleted the file after it was opened here.
        holder = _read_holder(descriptor)
        os.close(descriptor)
        if not locked:
            # A holder writes its name just after it has locked the file.
            if time.monotonic() >= deadline + (0.0 if holder else _NAMELESS_S):
                raise UserError(
                    f"{described} is in use by {holder or 'another process'}: wait until that has ended, or "
                    "choose another directory"
                )
            time.sleep(_POLL_S)
    if warning is not None:
        logger.warning(
            "%s cannot be locked (%s): nothing keeps a second process from writing there, so start none",
            described,
            warning,
        )
    with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (_this_process() + "\n").encode(), 0)
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _read_holder(descriptor: int) -> str:
    text = " ".join(os.pread(descriptor, 300, 0).decode(errors="replace").split())
    return "".join(filter(str.isprintable, text))


def _this_process() -> str:
    job = next((f", job {os.environ[name]} ({name})" for name in _JOB_IDS if os.environ.get(name)), "")
    now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()}{job}, started {now}"

"""Lock of an output directory, so that two builders cannot write the same anchor cache at once."""

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from craft_ds.errors import UserError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked_output(output: Path) -> Iterator[None]:
    """Hold the lock `.NAME.lock` beside an output directory; it ends with this process, however that ends.

    The file names the holder and is deleted at the end. Some network file systems have no locks; there, a
    warning says so.

    Args:
        output: The output directory, which need not exist.

    Raises:
        UserError: Another process holds the lock, or the lock cannot be written.
    """
    path = output.with_name(f".{output.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _lock(path, output)
    except OSError as error:
        raise UserError(f"--output_dir={output} cannot be written: {error}") from error
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(path: Path, output: Path) -> TextIO:
    """Open and lock the file, and write the holder's name into it."""
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  # closed by the caller
        try:
            # A record lock: workers forked by the data loader, which may outlive the builder, do not hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = " ".join(file.read(200).split()) or "another process"
            file.close()
            raise UserError(
                f"--output_dir={output} is being built by {holder}: wait until it has finished, or choose "
                "another directory"
            ) from None
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): do not start a second build of this cache", path, error.strerror
            )
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                break
        # The previous holder deleted the file after it was opened here.
        file.close()
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return file

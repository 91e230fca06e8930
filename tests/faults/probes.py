"""Small fault injectors that replace the training run, to test the harness itself."""

import os
import sys
import time
from pathlib import Path


def exit_with(status: int) -> None:
    """Exit the rank with a status."""
    sys.exit(status)


def hang() -> None:
    """Never return."""
    time.sleep(3600)


def change_files(directory: str) -> None:
    """Make most of the calls of a save on one file, and exit the rank."""
    run = Path(directory)
    (run / "a").mkdir()
    descriptor = os.open(run / "a" / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(descriptor, b"12345678", 0)
    os.fsync(descriptor)
    os.close(descriptor)
    (run / "a").rename(run / "b")
    (run / "b" / "file").read_bytes()
    (run.parent / "elsewhere").write_text("outside the directory")
    sys.exit(0)

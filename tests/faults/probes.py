"""Saboteurs that do something small in place of a training run, to see what the harness makes of it."""

import os
import sys
import time
from pathlib import Path


def leave(status: int) -> None:
    """End the rank with an exit status."""
    sys.exit(status)


def hang() -> None:
    """Never come back."""
    time.sleep(3600)


def change_files(directory: str) -> None:
    """Do most of what a save does, to one file, and end the rank."""
    run = Path(directory)
    (run / "a").mkdir()
    descriptor = os.open(run / "a" / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(descriptor, b"12345678", 0)
    os.fsync(descriptor)
    os.close(descriptor)
    (run / "a").rename(run / "b")
    (run / "b" / "file").read_bytes()
    (run.parent / "elsewhere").write_text("not in the directory")
    sys.exit(0)

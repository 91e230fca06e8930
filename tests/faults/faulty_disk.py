"""A disk that fails at the n-th thing that is asked of it: a shim over the calls by which Python writes."""

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from craft_ds.tensor_io import tensor_file

CALLS = (
    (os, "mkdir"),
    (os, "pwrite"),
    (tensor_file, "reserve"),
    (os, "fsync"),
    (os, "rename"),
    (os, "symlink"),
    (shutil, "copyfile"),
)


class FaultyDisk:
    """Counts what is asked of the disk, and fails one of it.

    Args:
        at: Which call fails, counted from 0; None: none does.
        fault: Name of an errno, or "short" for writes that take half of what they are given.

    Attributes:
        asked: Every call so far, by name.
    """

    def __init__(self, at: int | None = None, fault: str = "ENOSPC"):
        self._at, self.fault = at, fault
        self.asked: list[str] = []

    @contextmanager
    def in_place(self) -> Iterator["FaultyDisk"]:
        with pytest.MonkeyPatch.context() as patched:
            for module, name in CALLS:
                patched.setattr(module, name, self._wrap(name, getattr(module, name)))
            opens = self._wrap_open(builtins.open)
            patched.setattr(builtins, "open", opens)
            patched.setattr(io, "open", opens)  # pathlib's
            yield self

    def _wrap(self, name: str, call: Callable) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._is_due(name):
                if self.fault != "short":
                    raise self._error()
                if name == "pwrite":
                    descriptor, view, offset = args
                    return call(descriptor, view[: len(view) // 2], offset)
            return call(*args, **kwargs)

        return wrapped

    def _wrap_open(self, call: Callable) -> Callable:
        def wrapped(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            writes = isinstance(file, str | Path) and set(mode) & set("wax+")
            if writes and self._is_due("open") and self.fault != "short":
                raise self._error()
            return call(file, mode, *args, **kwargs)

        return wrapped

    @property
    def met(self) -> bool:
        """Whether the call that fails was made."""
        return self._at is not None and len(self.asked) > self._at

    @property
    def hit_mkdir(self) -> bool:
        """Whether it was about making a directory."""
        return self.met and self.asked[self._at] == "mkdir"

    def _is_due(self, name: str) -> bool:
        self.asked.append(name)
        return len(self.asked) - 1 == self._at

    def _error(self) -> OSError:
        number = getattr(errno, self.fault)
        return OSError(number, os.strerror(number))

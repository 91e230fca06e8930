"""A disk that fails at the n-th call: a shim over the functions by which Python writes."""

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
    """A disk that counts its calls and fails at one of them.

    Args:
        at: Number of the call that fails, from 0; None: no call fails.
        fault: Name of an errno, or "short" for a write of only half the bytes.

    Attributes:
        calls: Names of all calls so far.
    """

    def __init__(self, at: int | None = None, fault: str = "ENOSPC"):
        self._at, self.fault = at, fault
        self.calls: list[str] = []

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
    def failed(self) -> bool:
        """True if the failing call was made."""
        return self._at is not None and len(self.calls) > self._at

    @property
    def failed_mkdir(self) -> bool:
        """True if the failed call was to create a directory."""
        return self.failed and self.calls[self._at] == "mkdir"

    def _is_due(self, name: str) -> bool:
        self.calls.append(name)
        return len(self.calls) - 1 == self._at

    def _error(self) -> OSError:
        number = getattr(errno, self.fault)
        return OSError(number, os.strerror(number))

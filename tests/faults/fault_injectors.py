"""Fault injectors: patches of a rank, applied after the fork and before the training command starts."""

import builtins
import functools
import inspect
import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from craft_ds.data.task_data import StepSampler
from craft_ds.distributed.watchdog import RankWatchdog
from craft_ds.tensor_io import tensor_file
from craft_ds.training import build
from craft_ds.training.run import Run

# Functions that change a disk, and their argument that names the target: a path or an open file.
_CHANGES: tuple[tuple[Any, str, str], ...] = (
    (os, "mkdir", "path"),
    (os, "rename", "dst"),
    (os, "replace", "dst"),
    (os, "link", "dst"),
    (os, "symlink", "dst"),
    (os, "unlink", "path"),
    (os, "remove", "path"),
    (os, "rmdir", "path"),
    (os, "truncate", "path"),
    (os, "ftruncate", "fd"),
    (tensor_file, "reserve", "descriptor"),
    (os, "write", "fd"),
    (os, "pwrite", "fd"),
    (os, "pwritev", "fd"),
    (os, "fsync", "fd"),
    (os, "fdatasync", "fd"),
    (shutil, "copyfile", "dst"),
    (torch, "save", "f"),
    (builtins, "open", "file"),
    (io, "open", "file"),
    (os, "open", "path"),
)
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class _Watch:
    """Counter of the calls that change something below a directory; kills the process at one of them."""

    def __init__(self, directory: str, log: str, kill: dict[str, Any] | None):
        self._directory = Path(directory).resolve()
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._kill = kill or {"call": -1, "when": "never"}
        self._calls = 0
        self._lock = threading.Lock()
        self._inside = threading.local()
        self._write = os.write

    def around(self, name: str, original: Callable[..., Any], where: str) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            # `shutil.copyfile` opens files itself: count one change, not three.
            if getattr(self._inside, "call", False):
                return original(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            path = self._path(given.get(where), given.get("dir_fd"))
            if path is None or (name == "open" and not _opens_to_write(given)):
                return original(*args, **kwargs)
            with self._lock:
                here, self._calls = self._calls == self._kill["call"], self._calls + 1
                line = json.dumps({"op": name, "path": path, "call": self._calls - 1})
                self._write(self._log, line.encode() + b"\n")
            self._inside.call = True
            try:
                if here and self._kill["when"] == "before":
                    os.kill(os.getpid(), signal.SIGKILL)
                if here and self._kill["when"] == "middle":
                    if name == "pwrite":
                        original(given["fd"], given["buffer"][: len(given["buffer"]) // 2], given["offset"])
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)
            finally:
                if here:
                    os.kill(os.getpid(), signal.SIGKILL)
                self._inside.call = False

        return watched

    def _path(self, target: Any, dir_fd: int | None) -> str | None:
        """Return the changed path relative to the directory; None if it is outside."""
        if isinstance(target, int):
            path = _open_file(target)
        elif isinstance(target, (str, os.PathLike)):
            path = Path(_open_file(dir_fd) if dir_fd is not None else "", target)
            # Resolve the parent only: the call changes a link itself, not its target.
            path = path.parent.resolve() / path.name
        else:
            return None
        return str(path.relative_to(self._directory)) if path.is_relative_to(self._directory) else None


def _open_file(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def _opens_to_write(given: dict[str, Any]) -> bool:
    if "flags" in given:
        return bool(given["flags"] & _TO_WRITE)
    return any(letter in given.get("mode", "r") for letter in "wax+")


def watch_changes(directory: str, log: str, kill: dict[str, Any] | None = None) -> None:
    """Log every call that changes something below a directory, and kill the process at one of them.

    Calls inside C or Rust libraries are not seen; `torch.save` counts as one call.

    Args:
        directory: The run's directory.
        log: File for one JSON object per call: its number, the operation and the path.
        kill: Number of the `call` at which to kill the process, and `when`: before it, after it, or in the
            `middle` of the bytes it writes.
    """
    watch = _Watch(directory, log, kill)
    for module, name, where in _CHANGES:
        setattr(module, name, watch.around(name, getattr(module, name), where))


def kill_during_model_build() -> None:
    """Kill the rank while it builds the model, like the kernel on a machine without enough memory."""
    build.build_engine = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]


def shorten_heartbeat_interval() -> None:
    """Send heartbeats every half second, so that a test waits seconds for a diagnosis, not minutes."""
    RankWatchdog.__init__.__defaults__ = (0.5, None)  # type: ignore[misc]


def log_samples(log: str) -> None:
    """Log the samples a rank draws: one JSON list of [[position in the stream, sample]] per sample."""
    index_at = StepSampler.index_at

    def logged(self: StepSampler, position: int) -> int:
        sample = index_at(self, position)
        with open(log, "a") as file:
            file.write(json.dumps([[position, sample]]) + "\n")
        return sample

    StepSampler.index_at = logged  # type: ignore[method-assign]


def hold_at_step(step: int, until: str) -> None:
    """Stop after a step has been logged, until a file exists.

    Args:
        step: The step.
        until: Path of the file.
    """
    record = Run.record

    def recorded(run: Run, *args: Any, **kwargs: Any) -> None:
        record(run, *args, **kwargs)
        while run.progress.step == step and not Path(until).exists():
            run.watchdog.progress()
            time.sleep(0.05)

    Run.record = recorded

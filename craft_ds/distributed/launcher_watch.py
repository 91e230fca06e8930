"""Watch over the launcher: ranks end when it is gone, also if it was killed and could not end them.

A rank that trains on after its launcher keeps an accelerator and the output directory. The launcher is the
nearest ancestor that does not have this rank's variables; wrappers between it and the rank are watched too.
Parent processes are compared by their start times twice a second: a signal on the parent's death
(`PR_SET_PDEATHSIG`) would tell of the direct parent only, and also when merely the thread that started this
process ends. It is used for SIGCONT, which is harmless then, so that a stopped rank ends too.

Imports nothing heavy.
"""

import contextlib
import ctypes
import os
import select
import signal
import threading
import time
from pathlib import Path
from typing import NamedTuple

from craft_ds.distributed.env import read_launch, variables_of_this_rank
from craft_ds.errors import LOST_RANK_STATUS

SAVE_WITHIN_S = 600.0
"""Seconds that a rank has to save and exit after its launcher has ended."""
_POLL_S = 0.5
_PR_SET_PDEATHSIG = 1
_SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "fish", "busybox"}
_watching: set[int] = set()


class _Process(NamedTuple):
    """A process; its number may be used again after its end, but not with the same start time."""

    pid: int
    parent: int
    started: str
    name: str

    def runs(self) -> bool:
        """Return True until the process has ended."""
        now = _process(self.pid)
        return now is not None and now.started == self.started


def end_with_launcher() -> None:
    """End this process, with its state saved, soon after its launcher is gone; nothing without a launcher.

    The process receives SIGTERM, by which a run saves and exits (`craft_ds.distributed.preemption`), and ends
    in any case after `SAVE_WITHIN_S`. Idempotent.
    """
    if not read_launch().by_launcher or os.getpid() in _watching:
        return
    _watching.add(os.getpid())
    processes = launcher_processes()
    if not processes or _is_detached(processes[-1]):
        return
    with contextlib.suppress(OSError, AttributeError):  # not on Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
    threading.Thread(target=_watch, args=(processes,), name="launcher-watch", daemon=True).start()


def launcher_processes() -> list[_Process]:
    """Return this rank's wrappers and its launcher, from the parent on; empty if that cannot be known.

    In a container the launcher may be process 1, which ends all others with it.
    """
    found: list[_Process] = []
    own = variables_of_this_rank()
    process = _process(os.getppid())
    while process is not None and process.pid > 1:
        found.append(process)
        if not _environment(process.pid) & own:
            break
        process = _process(process.parent)
    # `deepspeed` starts a second process, which starts the ranks.
    if found and b"deepspeed.launcher.launch" in _read(found[-1].pid, "cmdline") and found[-1].parent > 0:
        parent = _process(found[-1].parent)
        if parent is None or _has_adopted(parent):
            found.append(_Process(0, 0, "", "deepspeed"))  # has ended already
        elif parent.pid > 1:
            found.append(parent)
    return found


def _has_adopted(parent: _Process) -> bool:
    """Return True if a child of DeepSpeed's launcher has this parent because the launcher has ended."""
    return (parent.pid == 1 or parent.name == "systemd") and b"deepspeed" not in _read(parent.pid, "cmdline")


def _is_detached(launcher: _Process) -> bool:
    """Return True if a shell started this rank to outlive it: by `nohup` or `setsid`."""
    if launcher.name not in _SHELLS:
        return False
    ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    try:
        return os.getsid(0) != os.getsid(launcher.pid) or (
            ignores_hangup and not _ignores_hangup(launcher.pid)
        )
    except ProcessLookupError:
        return ignores_hangup


def _ignores_hangup(pid: int) -> bool:
    for line in _read(pid, "status").splitlines():
        if line.startswith(b"SigIgn:"):
            return bool(int(line.split()[1], 16) & 1 << signal.SIGHUP - 1)
    return False


def _watch(processes: list[_Process]) -> None:
    while all(process.runs() for process in processes):
        time.sleep(_POLL_S)
    ended = next(process for process in processes if not process.runs())
    drop_unread_output()
    what = (
        f"the launcher of this rank ({ended.name}{f', process {ended.pid}' if ended.pid else ''}) has ended"
    )
    if read_launch().local_rank == 0:
        _write(f"{what}: this rank saves and exits")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SAVE_WITHIN_S)
    _write(f"error: {what}, and this rank did not save and exit in {SAVE_WITHIN_S:.0f} s")
    os._exit(LOST_RANK_STATUS)


def drop_unread_output() -> None:
    """Redirect output whose reader has ended to /dev/null: an error in printing must not prevent saving."""
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if any(events & (select.POLLERR | select.POLLNVAL) for _, events in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def _write(line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def _process(pid: int) -> _Process | None:
    """Return a process that has not ended, or None."""
    stat = _read(pid, "stat").decode(errors="replace")
    name, _, rest = stat.partition("(")[2].rpartition(")")
    fields = rest.split()
    if len(fields) < 20 or fields[0] in "ZX":
        return None
    return _Process(pid, int(fields[1]), fields[19], name)


def _environment(pid: int) -> set[tuple[str, str]]:
    """Return the variables with which a process started; empty if another user's."""
    entries = _read(pid, "environ").decode(errors="replace").split("\0")
    return {(name, value) for name, _, value in (entry.partition("=") for entry in entries)}


def _read(pid: int, file: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:
        return b""

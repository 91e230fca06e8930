"""A run that is asked to leave: by SIGTERM, by SIGUSR1, or because its time is over.

Schedulers give notice: Slurm by `--signal=USR1@120`, Kubernetes and spot machines by SIGTERM. The first
signal only asks; the loop finishes its step, saves and leaves. The second one ends the process at once; what
comes within a second of the first is the same notice, which launchers and schedulers send on more than one
way.
"""

import contextlib
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator

from craft_ds.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_SAME_NOTICE_S = 1.0
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(flag: str, text: str) -> float:
    """Seconds of `90`, `90s`, `30m`, `3.5h` or `2d`; infinite where nothing is given.

    Raises:
        UserError: Names the flag and what it must be.
    """
    if not text:
        return float("inf")
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if not matched or not float(matched[1]):
        raise UserError(f"{flag}={text}: a time is a number of seconds, or with a unit such as 30m, 3.5h, 2d")
    return float(matched[1]) * _SECONDS[matched[2]]


class Preemption:
    """Whether this rank was asked to leave. The ranks agree on it in the all-reduce of a step.

    Args:
        max_runtime: Seconds from now on.
    """

    def __init__(self, max_runtime: float = float("inf")):
        self._max_runtime = max_runtime
        self._deadline = time.monotonic() + max_runtime
        self._signal: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        """Whether to leave after this step."""
        return self._signal is not None or time.monotonic() > self._deadline

    @property
    def reason(self) -> str:
        """Why, for the log."""
        if self._signal is not None:
            return f"{self._signal.name} received"
        return "--max_runtime is over" if self.requested else "another rank was asked to leave"

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of the signals inside the context; outside of the main thread do nothing.

        A thread reads what Python's own C handler writes at once, so the second signal also ends a process
        whose main thread is stuck in a collective.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        listener, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        thread = threading.Thread(target=self._listen, args=(listener,), name="signals", daemon=True)
        # Python's handlers do nothing: they are there so that the signals' default, to end the process, is
        # not.
        before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        old = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        _listening.add(os.getpid())
        thread.start()
        try:
            yield
        finally:
            _listening.clear()
            signal.set_wakeup_fd(old)
            for number, handler in before.items():
                signal.signal(number, handler)
            # Ends the thread; to close it would not, where a forked process lives on that inherited it.
            wakeup.shutdown(socket.SHUT_RDWR)
            wakeup.close()
            thread.join()
            listener.close()

    def _listen(self, listener: socket.socket) -> None:
        first = 0.0
        while heard := listener.recv(1):
            if heard[0] not in SIGNALS:
                continue
            if self._signal is None:
                self._signal, first = signal.Signals(heard[0]), time.monotonic()
            elif time.monotonic() - first > _SAME_NOTICE_S:
                os._exit(128 + heard[0])


_listening: set[int] = set()


def _forget_in_child() -> None:
    """A forked process must not answer in its parent's name: it would write into the parent's socket."""
    if _listening and threading.current_thread() is threading.main_thread():
        _listening.clear()
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)


def ignore_in_worker(_worker: int) -> None:
    """A data loader's worker leaves with the run, not before: schedulers signal every process of a job."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

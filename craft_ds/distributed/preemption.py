"""Preemption: a run is asked to stop by SIGTERM, SIGUSR1, Ctrl-C (SIGINT), or because its time is over.

Schedulers give notice: Slurm by `--signal=USR1@120`, Kubernetes and spot machines by SIGTERM; users press
Ctrl-C. The first signal is a request: the loop finishes its step, saves and exits. A second signal ends the
process at once, with status 128 + its number. Signals within a second of the first belong to the same notice,
which launchers and schedulers forward on more than one way.

Before the first step of this process there is nothing to save: until then SIGINT raises `KeyboardInterrupt`,
and the other signals are noted.
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

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SAME_NOTICE_S = 1.0
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(flag: str, text: str) -> float:
    """Return the seconds of `90`, `90s`, `30m`, `3.5h` or `2d`; infinity for an empty text.

    Raises:
        UserError: The text is not a duration.
    """
    if not text:
        return float("inf")
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if not matched or not float(matched[1]):
        raise UserError(f"{flag}={text}: a time is a number of seconds, or with a unit such as 30m, 3.5h, 2d")
    return float(matched[1]) * _SECONDS[matched[2]]


class Preemption:
    """Request to stop, noted on this rank. The ranks agree on it in the all-reduce of a step.

    Args:
        max_runtime: Seconds from now until the run must stop.
    """

    def __init__(self, max_runtime: float = float("inf")):
        self._max_runtime = max_runtime
        self._deadline = time.monotonic() + max_runtime
        self._signal: signal.Signals | None = None
        self._defers_interrupts = False

    @property
    def requested(self) -> bool:
        """True if the run must stop after this step."""
        return self._signal is not None or time.monotonic() > self._deadline

    @property
    def interrupted(self) -> bool:
        """True if this rank was asked by SIGINT."""
        return self._signal == signal.SIGINT

    @property
    def reason(self) -> str:
        """Reason to stop, for the log."""
        if self._signal is not None:
            return f"{self._signal.name} received"
        return "--max_runtime is over" if self.requested else "another rank was asked to stop"

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals inside the context; does nothing outside of the main thread.

        A thread reads the signal numbers that Python's C handler writes immediately, so the second signal
        also ends a process whose main thread is stuck in a collective.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        listener, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        thread = threading.Thread(target=self._listen, args=(listener,), name="signals", daemon=True)
        # These handlers only replace the default action, which ends the process.
        before = {number: signal.signal(number, _do_nothing) for number in SIGNALS if number != signal.SIGINT}
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
            # Ends the thread, also while a forked process holds the inherited socket open.
            wakeup.shutdown(socket.SHUT_RDWR)
            wakeup.close()
            thread.join()
            listener.close()

    @contextlib.contextmanager
    def deferring_interrupts(self) -> Iterator[None]:
        """Note SIGINT like the other signals: inside the context there is something to save.

        For use inside `listening`; does nothing outside of the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, _do_nothing)
        self._defers_interrupts = True
        try:
            yield
        finally:
            self._defers_interrupts = False
            signal.signal(signal.SIGINT, before)

    def _listen(self, listener: socket.socket) -> None:
        first = 0.0
        while heard := listener.recv(1):
            if heard[0] not in SIGNALS or (heard[0] == signal.SIGINT and not self._defers_interrupts):
                continue
            if self._signal is None:
                self._signal, first = signal.Signals(heard[0]), time.monotonic()
            elif time.monotonic() - first > _SAME_NOTICE_S:
                os._exit(128 + heard[0])


def _do_nothing(*_: object) -> None:
    pass


_listening: set[int] = set()


def _forget_in_child() -> None:
    """Restore the defaults in a forked process, which would otherwise write into its parent's socket."""
    if _listening and threading.current_thread() is threading.main_thread():
        _listening.clear()
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            is_interrupt = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)


def ignore_signals_in_worker(_worker: int) -> None:
    """Ignore signals in a data loader's worker, which ends with the run: a signal may reach all processes."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

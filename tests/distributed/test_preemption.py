"""Requests to stop: signals to real processes, and the end of the run time."""

import os
import signal
import subprocess
import sys
import time

import pytest

from craft_ds.distributed.preemption import Preemption, parse_duration
from craft_ds.errors import UserError


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("3.5h", 12600), ("2d", 172800)]
)
def test_durations(text, seconds):
    assert parse_duration("--max_runtime", text) == seconds


def test_no_duration_is_no_end():
    assert parse_duration("--max_runtime", "") == float("inf")
    assert not Preemption().requested


@pytest.mark.parametrize("text", ["soon", "-3", "0", "3 hours", "1h30m", "m", "inf", "nan"])
def test_other_texts_are_refused(text):
    with pytest.raises(UserError, match=r"^--max_runtime=.*30m, 3.5h, 2d"):
        parse_duration("--max_runtime", text)


def test_the_time_is_over():
    preemption = Preemption(0.05)
    assert not preemption.requested
    time.sleep(0.1)
    assert preemption.requested
    assert preemption.reason == "--max_runtime is over"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_requests_a_stop(number):
    preemption = Preemption()
    with preemption.listening():
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 10
        while not preemption.requested and time.monotonic() < deadline:
            time.sleep(0.01)
    assert preemption.requested
    assert preemption.reason == f"{number.name} received"


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with Preemption().listening():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.fixture
def default_interrupts():
    """Handle SIGINT as in the foreground: a shell that starts the tests in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_interrupts")
def test_an_interrupt_is_noted_once_there_is_something_to_save():
    preemption = Preemption()
    with preemption.listening():
        with pytest.raises(KeyboardInterrupt):
            _interrupt_and_wait(preemption)
        assert not preemption.requested
        with preemption.deferring_interrupts():
            _interrupt_and_wait(preemption)
        assert preemption.interrupted
        assert preemption.reason == "SIGINT received"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _interrupt_and_wait(preemption):
    os.kill(os.getpid(), signal.SIGINT)
    deadline = time.monotonic() + 10
    while not preemption.requested and time.monotonic() < deadline:
        time.sleep(0.01)


STUCK = """
import ctypes
from craft_ds.distributed.preemption import Preemption
with Preemption().listening():
    print("ready", flush=True)
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # no signal ends this wait
"""
FORKED = """
import os, signal, time
from craft_ds.distributed.preemption import Preemption
preemption = Preemption()
with preemption.listening():
    child = os.fork()
    if child == 0:
        time.sleep(60)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM, status
    time.sleep(0.2)
    assert not preemption.requested
    child = os.fork()
    if child == 0:
        time.sleep(60)
os.kill(child, signal.SIGKILL)  # it was alive, and nobody waited for it
print("done", flush=True)
"""


def test_a_second_signal_ends_a_process_that_is_stuck_in_c():
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        for number in (signal.SIGTERM, signal.SIGUSR1):  # one notice
            process.send_signal(number)
        time.sleep(1.5)
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=10) == 128 + signal.SIGUSR1
        assert time.monotonic() - began < 5


def test_a_forked_process_has_default_handlers():
    ended = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr

"""Run the subcommands of craft-ds as processes, on one process or on the ranks of a launcher."""

import contextlib
import ctypes
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import NoReturn

from craft_ds.distributed.preemption import SIGNALS
from craft_ds.errors import PREEMPTED_STATUS, Preempted

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.2


def subcommand(*arguments: object) -> list[str]:
    """Return the command that runs `craft-ds` with these arguments."""
    return [sys.executable, "-m", "craft_ds", *map(str, arguments)]


def craft_ds(*arguments: object) -> None:
    """Run `craft-ds` with these arguments; see `call`."""
    call(subcommand(*arguments))


def training_command(engine: str, ranks: int) -> list[str]:
    """Return the command that starts `craft-ds train` on all ranks with an engine.

    Args:
        engine: `single` (one process), `fsdp`, or a DeepSpeed configuration: a file or a shipped name such
            as `zero3`.
        ranks: Number of ranks on this machine.
    """
    if engine == "single":
        return subcommand("train", "--engine=single")
    if engine == "fsdp":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*torchrun, f"--nproc-per-node={ranks}", "-m", "craft_ds", "train", "--engine=fsdp"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner"]  # what the command `deepspeed` runs
    ranks_flags = [f"--num_gpus={ranks}", f"--master_port={port}"]
    # Without --no_local_rank, the launcher writes --local_rank=… before the name of the command.
    module = ["--no_local_rank", "--module", "craft_ds"]
    return [*deepspeed, *ranks_flags, *module, "train", f"--ds_config={engine}"]


def call(command: Sequence[str]) -> None:
    """Run a command to its end.

    Signals that ask a training run to stop are forwarded to it, so that it saves and exits: SIGINT as itself,
    the others as SIGTERM, which every launcher passes on. If this process is killed, the command receives
    SIGTERM.

    Raises:
        Preempted: This process or the command was asked to stop.
        SystemExit: The command failed.
    """
    process = subprocess.Popen(command, preexec_fn=_end_with_parent)
    with _forwarded_signals(process) as received:
        status = process.wait()
    if received or status == PREEMPTED_STATUS:
        raise Preempted("stopped")
    if status:
        fail(f"a command failed with status {status} (its message is above): {shlex.join(command)}")


def call_side_by_side(commands: Iterable[tuple[str, Sequence[str]]], logs: Path, jobs: int) -> None:
    """Run commands to their ends, several at once, each with its output in a file.

    After a failure no further command starts. If this process is stopped, the commands receive SIGTERM.

    Args:
        commands: Names and commands. Each is taken when it can start: a launcher's port, which is part of a
            command, must not be chosen long before.
        logs: Directory for their output, `NAME.log`.
        jobs: How many run at once.

    Raises:
        SystemExit: A command failed; names its log.
    """
    waiting, running, failed = iter(commands), dict[str, subprocess.Popen[bytes]](), list[str]()
    try:
        while True:
            for name, command in islice(waiting, 0 if failed else jobs - len(running)):
                with (logs / f"{name}.log").open("wb") as log:
                    running[name] = subprocess.Popen(
                        command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent
                    )
            if not running:
                break
            time.sleep(_POLL_S)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                if running.pop(name).returncode:
                    failed.append(name)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    if failed:
        fail(f"{failed[0]} failed: see {logs / f'{failed[0]}.log'}")


def fail(message: str) -> NoReturn:
    """Print an error and exit with status 1."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(1)


@contextlib.contextmanager
def _forwarded_signals(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Forward the signals that ask to stop to a process; yield a list of those received."""
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    former = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):  # not on Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

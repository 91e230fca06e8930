"""Start several ranks of a program on this machine and wait for them: for tests and benchmarks.

Unlike `deepspeed` and `torchrun`, it has a deadline, after which it prints where each rank hangs.
"""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import IO, NamedTuple

import torch


class RankEnd(NamedTuple):
    """Exit status of one rank (negative: the signal that ended it) and its output."""

    status: int
    output: str


def run_ranks(
    command: Sequence[str],
    world_size: int,
    *,
    timeout: float,
    grace: float = 20.0,
    environment: Mapping[str, str] | None = None,
) -> list[RankEnd]:
    """Run a command as `world_size` ranks, with `torchrun`'s environment variables.

    Args:
        command: Program and arguments. It should call `faulthandler.register(signal.SIGUSR1)`: ranks that
            exceed the deadline print their stacks before they are killed.
        world_size: Number of ranks. Accelerators are hidden if there are fewer of them.
        timeout: Seconds after which ranks are killed.
        grace: Seconds that the other ranks have to exit after one has failed.
        environment: Additional environment variables.

    Returns:
        One entry per rank.
    """
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        **(environment or {}),
    }
    if torch.cuda.device_count() < world_size:
        shared["CUDA_VISIBLE_DEVICES"] = ""
    ranks: list[tuple[subprocess.Popen, IO[str]]] = []
    try:
        for rank in range(world_size):
            # A file, not a pipe: a rank that prints a lot must not block on its reader.
            output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the rank
            process = subprocess.Popen(
                command,
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            ranks.append((process, output))
        _wait([process for process, _ in ranks], timeout, grace)
    finally:
        for process, _ in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
    return [RankEnd(process.returncode, _read(output)) for process, output in ranks]


def _wait(processes: list[subprocess.Popen], timeout: float, grace: float) -> None:
    deadline = time.monotonic() + timeout
    failed = False
    while any(process.poll() is None for process in processes):
        if not failed and any(process.poll() for process in processes):
            failed = True
            deadline = min(deadline, time.monotonic() + grace)
        if time.monotonic() > deadline:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGUSR1)
            time.sleep(2.0)  # for the stacks
            return
        time.sleep(0.05)


def _read(output: IO[str]) -> str:
    with output:
        output.seek(0)
        return output.read()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

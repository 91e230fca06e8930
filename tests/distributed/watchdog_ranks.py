"""One rank of a run that all-reduces numbers until a fault is injected into one of the ranks.

Arguments: the fault (see `FAULTS`), its rank, timeout and interval of the watchdog, the output directory.
HOSTS names the host of each rank, separated by commas.
"""

import faulthandler
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from craft_ds.cli import exit_without_teardown, run_main
from craft_ds.distributed.watchdog import RankWatchdog

STEPS = 12


def sleep_forever():
    while True:
        time.sleep(1)


def wait_silently():
    """Wait for a key that a dead rank should write, as a new process group does: torch raises nothing."""
    distributed_c10d._get_default_store().get("never written")


def fail():
    raise KeyError("weight")


def exit_normally():
    watchdog.close()
    sys.exit()


def progress_slowly():
    """Be busy for longer than the timeout, with rare progress within it."""
    for _ in range(2):
        time.sleep(0.75 * float(timeout))
        watchdog.progress()


def stop_temporarily():
    """Be stopped in the middle of a step for longer than the timeout, then continue the step."""
    time.sleep(3 * float(interval))
    subprocess.Popen(["sh", "-c", f"sleep {1.2 * float(timeout)}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5 * float(timeout))


FAULTS = {
    "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "dies unseen": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stops": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleeps": sleep_forever,
    "fails": fail,
    "leaves": exit_normally,
}


def add_numbers():
    rank = dist.get_rank()
    for step in range(STEPS):
        if fault in FAULTS and step == 5 and rank == int(victim):
            print(f"at {time.monotonic()}", flush=True)
            FAULTS[fault]()
        if fault == "dies unseen" and step == 5:
            wait_silently()
        if fault == "slow" and step == 3 and rank == int(victim):
            progress_slowly()
        if fault == "slow" and step == 6:
            stop_temporarily()
        dist.all_reduce(torch.ones(1))
        watchdog.progress()
    time.sleep(rank * float(interval))


def run():
    with watchdog:
        add_numbers()
    print("finished")


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    fault, victim, timeout, interval, output_dir = sys.argv[1:]
    if "HOSTS" in os.environ:
        host = os.environ["HOSTS"].split(",")[int(os.environ["RANK"])]
        socket.gethostname = lambda: host
    dist.init_process_group("gloo")
    watchdog = RankWatchdog(float(timeout), float(interval), Path(output_dir))
    exit_without_teardown(lambda: run_main(run))

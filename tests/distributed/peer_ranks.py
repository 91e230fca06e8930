"""One rank of a run that only adds numbers until something happens to one of the ranks.

Arguments: what happens (see `HAPPENS`), to which rank, timeout and interval of the watch.
"""

import faulthandler
import os
import signal
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from craft_ds.cli import exit_without_teardown, run_main
from craft_ds.distributed.watchdog import RankWatchdog

STEPS = 12


def sleep_for_ever():
    while True:
        time.sleep(1)


def wait_unseen():
    """Wait for what a dead rank would have to write, as a new process group does: torch says nothing."""
    distributed_c10d._get_default_store().get("never written")


def fail():
    raise KeyError("weight")


def leave():
    watchdog.close()
    sys.exit()


def get_on_alone():
    """Be busy for longer than a rank may hang, with progress more often than that, but seldom."""
    for _ in range(2):
        time.sleep(0.75 * float(timeout))
        watchdog.progress()


def be_stopped_for_a_while():
    """Be stopped in the middle of a step for longer than a rank may hang, and go on with the step."""
    time.sleep(3 * float(interval))
    subprocess.Popen(["sh", "-c", f"sleep {1.2 * float(timeout)}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5 * float(timeout))


HAPPENS = {
    "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "dies unseen": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stops": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleeps": sleep_for_ever,
    "fails": fail,
    "leaves": leave,
}


def add_numbers():
    rank = dist.get_rank()
    for step in range(STEPS):
        if happens in HAPPENS and step == 5 and rank == int(victim):
            print(f"at {time.monotonic()}", flush=True)
            HAPPENS[happens]()
        if happens == "dies unseen" and step == 5:
            wait_unseen()
        if happens == "slow" and step == 3 and rank == int(victim):
            get_on_alone()
        if happens == "slow" and step == 6:
            be_stopped_for_a_while()
        dist.all_reduce(torch.ones(1))
        watchdog.progress()
    time.sleep(rank * float(interval))


def run():
    with watchdog:
        add_numbers()
    print("finished")


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    happens, victim, timeout, interval = sys.argv[1:]
    dist.init_process_group("gloo")
    watchdog = RankWatchdog(float(timeout), float(interval))
    exit_without_teardown(lambda: run_main(run))

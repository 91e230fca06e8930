"""A process ends when its launcher is gone, and only then: small processes, without training."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from craft_ds.distributed.env import REQUIRED
from craft_ds.distributed.launcher_watch import _Process, _process

PROGRAM = Path(__file__).with_name("watched_rank.py")
LAUNCH = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}
SET = " ".join(f"{name}={value}" for name, value in LAUNCH.items())
GOES_IN_S = 6.0
STAYS_S = 3.0

# Sets the variables and starts the rank, as the process between `deepspeed` and its ranks does.
DEEPSPEED = (
    "import os, subprocess, sys, time; time.sleep(float(sys.argv.pop(1))); "
    f"os.environ.update(dict(each.split('=') for each in '{SET}'.split())); subprocess.call(sys.argv[2:])"
)
# A shell script that starts one rank and waits; {rank} is the command of the rank.
ENDS = {
    "variables of the rank": f"{SET} {{rank}} & wait",
    "variables of the shell": f"export {SET}; {{rank}} & wait",
    "a wrapper around the rank": f"{SET} bash -c '{{rank}}; true' & wait",
    "nohup of all": f"trap '' HUP; {SET} {{rank}} & wait",
    "mpirun with a wrapper": f"OMPI_COMM_WORLD_RANK=0 bash -c 'export {SET}; {{rank}}; true' & wait",
    "deepspeed": f"{{python}} -c {shlex.quote(DEEPSPEED)} 0 deepspeed.launcher.launch {{rank}}; true",
}
STAYS = {
    "nohup": f"{SET} nohup {{rank}} & wait",
    "setsid": f"{SET} setsid {{rank}} & wait",
    "no launcher": "{rank} & wait",
    "left-over variables": "WORLD_SIZE=2 LOCAL_RANK=1 {rank} & wait",
}


def start(tmp_path: Path, script: str) -> tuple[subprocess.Popen, int]:
    """Start a script; return it and the process id of its rank, which watches its launcher or has ended."""
    file = tmp_path / "pid"
    rank = shlex.join([sys.executable, str(PROGRAM), str(file)])
    clean = {key: value for key, value in os.environ.items() if key not in REQUIRED}
    launcher = subprocess.Popen(
        ["bash", "-c", script.format(rank=rank, python=sys.executable)],
        env=clean,
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
        # As in a terminal, also where these tests themselves run under nohup.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 30
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    rank = int(file.read_text())
    while not file.with_suffix(".watches").exists() and _process(rank) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return launcher, rank


def ended_in(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if _process(pid) is None:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("name", ENDS)
def test_a_rank_ends_with_its_launcher(tmp_path, name):
    launcher, rank = start(tmp_path, ENDS[name])
    try:
        assert not ended_in(rank, 1.0)
    finally:
        launcher.kill()
        launcher.wait()
    assert ended_in(rank, GOES_IN_S)


@pytest.mark.parametrize("name", ["variables of the rank", "variables of the shell", "nohup of all"])
def test_a_stopped_rank_ends_with_its_launcher(tmp_path, name):
    launcher, rank = start(tmp_path, ENDS[name])
    os.kill(rank, signal.SIGSTOP)
    launcher.kill()
    launcher.wait()
    try:
        assert ended_in(rank, GOES_IN_S)
    finally:
        if _process(rank):
            os.kill(rank, signal.SIGKILL)


def test_a_rank_ends_whose_launcher_had_ended_before_it_started(tmp_path):
    """The second process of `deepspeed` starts ranks although the first is gone."""
    script = f"{{python}} -c {shlex.quote(DEEPSPEED)} 2 deepspeed.launcher.launch {{rank}} & exit"
    _, rank = start(tmp_path, script)
    assert ended_in(rank, GOES_IN_S)


@pytest.mark.parametrize("name", STAYS)
def test_a_detached_process_or_one_without_launcher_stays(tmp_path, name):
    launcher, rank = start(tmp_path, STAYS[name])
    try:
        launcher.kill()
        launcher.wait()
        assert not ended_in(rank, STAYS_S)
    finally:
        os.kill(rank, signal.SIGKILL)


def test_a_process_number_that_is_used_again_is_another_process():
    this = _process(os.getpid())
    assert this.runs()
    assert this.parent == os.getppid()
    assert not this._replace(started="0").runs()
    assert not _Process(2**22 + 1, 1, "0", "none").runs()


def test_a_zombie_has_ended():
    child = subprocess.Popen(["true"])
    assert ended_in(child.pid, 10)
    assert child.poll() == 0

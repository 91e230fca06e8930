"""How a command's process ends."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys, threading, time
from craft_ds.cli import exit_without_teardown, run_main
from craft_ds.errors import Preempted, RankLost, TrainingDiverged, UserError
atexit.register(lambda: print("the interpreter took its leave"))
threading.Thread(target=time.sleep, args=(60,)).start()  # nobody waits for it

def command():
    print("done, and not flushed", end="")
    {action}

exit_without_teardown({how})
"""
ENDS = {
    "pass": (0, ""),
    "raise UserError('no such file')": (2, "error: no such file\n"),
    "raise TrainingDiverged('up')": (1, "error: up\n"),
    "raise RankLost('rank 1 is gone', prints=True)": (69, "error: rank 1 is gone\n"),
    "raise RankLost('rank 1 is gone', prints=False)": (69, ""),
    "raise Preempted('SIGTERM received')": (75, "SIGTERM received\n"),
    "raise KeyboardInterrupt": (130, "interrupted\n"),
    "raise SystemExit('a word')": (1, ""),
}


def ended(action: str, how: str) -> subprocess.CompletedProcess:
    program = PROGRAM.format(action=action, how=how)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False
    )


@pytest.mark.parametrize("action", ENDS)
def test_every_end_has_its_status_and_at_most_one_line(action):
    process = ended(action, "lambda: run_main(command)")
    assert (process.returncode, process.stderr) == ENDS[action]
    assert process.stdout == "done, and not flushed"


def test_what_nobody_expected_has_a_traceback():
    process = ended("raise KeyError('weight')", "lambda: run_main(command)")
    assert process.returncode == 1
    assert "KeyError: 'weight'" in process.stderr
    assert "Traceback" in process.stderr

"""Exit status and output of a command's process."""

import os
import signal
import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys, threading, time
from craft_ds.cli import exit_without_teardown, run_main
from craft_ds.errors import Preempted, RankLost, TrainingDiverged, UserError
atexit.register(lambda: print("the interpreter was torn down"))
threading.Thread(target=time.sleep, args=(60,)).start()  # a thread that would delay the teardown

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
def test_every_end_has_its_status_and_one_line_at_most(action):
    process = ended(action, "lambda: run_main(command)")
    assert (process.returncode, process.stderr) == ENDS[action]
    assert process.stdout == "done, and not flushed"


def test_unexpected_error_has_a_traceback():
    process = ended("raise KeyError('weight')", "lambda: run_main(command)")
    assert process.returncode == 1
    assert "KeyError: 'weight'" in process.stderr
    assert "Traceback" in process.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_broken_pipe_ends_without_a_traceback(arguments, buffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", buffered)
    command = [sys.executable, "-m", "craft_ds", *arguments]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        process = subprocess.run(
            command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=50, check=False
        )
    assert (process.returncode, process.stderr) == (128 + signal.SIGPIPE, "")


def test_other_broken_pipes_have_a_traceback():
    process = ended("raise BrokenPipeError('a worker')", "lambda: run_main(command)")
    assert process.returncode == 1
    assert "BrokenPipeError: a worker" in process.stderr

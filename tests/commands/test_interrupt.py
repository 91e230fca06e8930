"""Ctrl-C in a real process: once saves and is resumable by the printed command, twice exits at once."""

import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def start(inputs, tmp_path):
    """Start `python -m craft_ds train` in `tmp_path / "run"`; killed after the test."""
    processes = []

    def run(*flags: str) -> subprocess.Popen:
        flags = (*inputs.flags(tmp_path / "run"), "--steps=100000", *flags)
        process = subprocess.Popen(
            [sys.executable, "-m", "craft_ds", "train", *flags],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell that starts this in the background ignores SIGINT, and so would the process.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.wait()


def wait_until(condition, process):
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_interrupt_saves_and_prints_a_working_command(start, tmp_path):
    process, log = start(), tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: log.exists() and log.read_text().count("\n") >= 3, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    found = re.search(r"SIGINT received: saved \S+step_(\d+); resume with: python (.*)\n", output)
    assert found, output
    step = int(found[1])
    assert (tmp_path / "run" / f"step_{step:06d}" / "manifest.json").exists()

    command = [sys.executable, *shlex.split(found[2]), f"--steps={step + 1}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"resuming from {tmp_path}/run/step_{step:06d}" in ended.stdout
    assert (tmp_path / "run" / "final" / "manifest.json").exists()


def test_a_second_interrupt_exits_at_once(start, tmp_path):
    process = start("--gradient_accumulation_steps=100000")
    wait_until(lambda: "✓ policy" in process.stdout.readline(), process)
    time.sleep(2)  # until the first step, which takes many minutes
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert "saved" not in process.stdout.read()
    assert not list((tmp_path / "run").glob("step_*"))


def test_an_interrupt_before_the_first_step_exits(start, tmp_path):
    process = start()
    loaded = Path(f"/proc/{process.pid}/maps")
    wait_until(lambda: "libtorch" in loaded.read_text(), process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert output.splitlines()[-1] == "interrupted"
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()

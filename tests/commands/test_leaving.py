"""Launchers for real: they are told to leave, or lose a rank, and the same command goes on."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import assert_same_bits, metrics

ROOT = Path(__file__).parents[2]
FLAGS = ["--engine=fsdp", "--resume=auto", "--save_freq=2"]


def torchrun(*arguments: object, program: object = "scripts/train_craft.py", **environment: str):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command += [str(part) for part in (*environment.pop("launcher", "").split(), program, *arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """An uninterrupted run of 6 steps on 2 ranks."""
    run = tmp_path_factory.mktemp("leaving") / "whole"
    process = torchrun(*inputs.flags(run), *inputs.craft_flags(), *FLAGS, "--steps=6")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return run


def untimed(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k[:4] not in ("time", "memo")} for row in metrics(run)]


def test_a_launcher_that_is_terminated_leaves_a_checkpoint_behind(inputs, tmp_path):
    run = tmp_path / "run"
    process = torchrun(*inputs.flags(run), *inputs.craft_flags(), *FLAGS, "--save_freq=0", "--steps=100000")
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (
        (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= 3
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    found = re.search(r"(SIGTERM received|another rank was asked to leave): saved (\S+step_(\d+));", output)
    assert found, output
    manifest = json.loads((Path(found[2]) / "manifest.json").read_text())
    assert manifest["step"] == int(found[3]) == metrics(run)[-1]["step"]
    assert "exitcode" not in output or "-9" not in output  # nobody had to be killed


def test_a_launcher_that_may_restart_goes_on_by_itself(inputs, whole, tmp_path):
    run = tmp_path / "run"
    process = torchrun(
        *inputs.flags(run),
        *inputs.craft_flags(),
        *FLAGS,
        "--steps=6",
        program=Path(__file__).with_name("dying_rank.py"),
        launcher="--max-restarts=1",
        DIES_AT="4",
        KILLED=str(tmp_path / "killed"),
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert (tmp_path / "killed").exists()
    assert f"going on from {run}/step_000004" in output
    assert_same_bits(run / "final", whole / "final")
    assert untimed(run) == untimed(whole)

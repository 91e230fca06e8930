"""Launchers that receive a signal or lose a rank; the same command resumes."""

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
from runs import assert_same_bits, losses, metrics, untimed

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "scripts" / "train_craft.py"
KILLED_RANK = Path(__file__).with_name("killed_rank.py")
FLAGS = ["--engine=fsdp", "--resume=auto", "--save_freq=2"]


TORCHRUN = ["torchrun", "--nproc-per-node=2", "--master-port"]
DEEPSPEED = ["deepspeed", "--num_gpus=2", "--master_port"]


def launch(launcher: list[str], program: object, *arguments: object, **environment: str) -> subprocess.Popen:
    """Start two ranks of a program."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    binaries = Path(sys.executable).parent
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PATH"] = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [str(part) for part in (binaries / launcher[0], *launcher[1:], port, program, *arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory):
    """An uninterrupted run of 6 steps on 2 ranks."""
    run = tmp_path_factory.mktemp("preemption") / "uninterrupted"
    process = launch(TORCHRUN, TRAIN, *inputs.flags(run), *inputs.craft_flags(), *FLAGS, "--steps=6")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return run


@pytest.mark.sample(1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_that_is_signalled_saves_on_all_ranks(inputs, tmp_path, number):
    run = tmp_path / "run"
    flags = [*inputs.flags(run), *inputs.craft_flags(), *FLAGS, "--save_freq=0", "--steps=100000"]
    process = launch(TORCHRUN, TRAIN, *flags)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (
        (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= 3
    ):
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    found = re.search(
        rf"({number.name} received|another rank was asked to stop): saved (\S+step_(\d+));", output
    )
    assert found, output
    manifest = json.loads((Path(found[2]) / "manifest.json").read_text())
    assert manifest["step"] == int(found[3]) == metrics(run)[-1]["step"]
    assert "exitcode" not in output or "-9" not in output  # no rank was killed


@pytest.mark.sample(0)
def test_torchrun_restarts_and_resumes(inputs, uninterrupted, tmp_path):
    run, killed = tmp_path / "run", tmp_path / "killed"
    flags = [*inputs.flags(run), *inputs.craft_flags(), *FLAGS, "--steps=6"]
    restarting = [TORCHRUN[0], "--max-restarts=1", *TORCHRUN[1:]]
    process = launch(restarting, KILLED_RANK, *flags, DIES_AT="4", KILLED=str(killed))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert killed.exists()
    assert f"resuming from {run}/step_000004" in output
    assert_same_bits(run / "final", uninterrupted / "final")
    assert untimed(run) == untimed(uninterrupted)


@pytest.mark.sample(0)
def test_deepspeed_stops_with_a_killed_rank_and_resumes(inputs, uninterrupted, tmp_path):
    run, killed = tmp_path / "run", tmp_path / "killed"
    zero3 = ["--ds_config", ROOT / "ds_configs" / "zero3.json", "--engine=zero"]
    flags = [*inputs.flags(run), *inputs.craft_flags(), *FLAGS, *zero3, "--steps=6"]
    process = launch(DEEPSPEED, KILLED_RANK, *flags, DIES_AT="4", KILLED=str(killed))
    output, _ = process.communicate(timeout=120)
    assert process.returncode, output
    assert killed.exists()
    assert "error: rank 1 has stopped or its machine is gone" in output

    process = launch(DEEPSPEED, KILLED_RANK, *flags, DIES_AT="4", KILLED=str(killed))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert f"resuming from {run}/step_000004" in output
    assert losses(run) == pytest.approx(losses(uninterrupted), rel=1e-5)

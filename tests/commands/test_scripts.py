"""The scripts themselves, each in a process of its own, from another directory than the repository's."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from runs import assert_trained, losses
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(command: list[object], directory: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def python(script: str, *arguments: object, directory: Path, **environment: str):
    return run([sys.executable, SCRIPTS / script, *arguments], directory, **environment)


@pytest.mark.parametrize("script", ["build_anchor_cache.py", "export_checkpoint.py"])
def test_help_and_a_misspelt_flag_answer_at_once(script, tmp_path):
    ended = python(script, "--help", directory=tmp_path)
    assert ended.returncode == 0
    assert "usage:" in ended.stdout
    ended = python(script, "--nonsense", directory=tmp_path)
    assert ended.returncode == 2
    assert ended.stdout == ""


def test_bad_input_is_one_line_and_nothing_else(inputs, tmp_path):
    ended = python("train_craft.py", *inputs.flags(tmp_path / "run"), "--nonsense=1", directory=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: unrecognized arguments: --nonsense=1 (see --help)\n"


def test_export_of_a_non_checkpoint_is_one_line(inputs, tmp_path):
    ended = python("export_checkpoint.py", inputs.policy, "--output", tmp_path / "out", directory=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"error: {inputs.policy} is not a craft-ds checkpoint")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_dry_run_goes_through_every_command(tmp_path):
    ended = run(["bash", SCRIPTS / "train_craft_dryrun.sh"], tmp_path, TMPDIR=str(tmp_path))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    parts = (
        "data set",
        "policy",
        "anchors",
        "data report",
        "forward pass",
        "backward pass",
        "optimizer step",
    )
    said = [line for line in ended.stdout.splitlines() if line.startswith("✓")]
    assert len(said) == len(parts)
    assert all(line.startswith(f"✓ {part}") for line, part in zip(said, parts, strict=True))
    assert "Step 3/3 | loss=" in ended.stdout
    assert "exported" in ended.stdout
    assert ended.stdout.endswith("dry run passed\n")
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.glob("tmp.*")) == []


def test_the_training_script_takes_flags_over_its_own(inputs, tmp_path):
    """Its bf16 and ZeRO-3 on the GPUs of this machine, or on one rank without any."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    flags = [*inputs.flags(tmp_path / "run"), *inputs.craft_flags(), "--steps=2", "--eval_freq=0"]
    ended = run(["bash", SCRIPTS / "train_craft.sh", *flags], tmp_path, MASTER_PORT=port)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "zero engine on" in ended.stdout
    assert "bfloat16" in ended.stdout
    assert len(losses(tmp_path / "run")) == 2
    assert_trained(tmp_path / "run" / "final", inputs.policy)
    assert all(t.dtype.itemsize == 4 for t in load_file(tmp_path / "run/final/model.safetensors").values())

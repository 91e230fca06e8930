"""`benchmarks/gpu_check.py` runs on the CPU with tiny policies, so that it works when there is a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_part_runs_without_a_gpu(tmp_path, request):
    command = [sys.executable, ROOT / "benchmarks" / "gpu_check.py", "--device", "cpu", "--small"]
    parts = ["card", "parity", "surgery", "save", "speed"]
    if request.config.getoption("--all"):  # what it runs are the commands, which have tests of their own
        parts.append("trainer")
    chosen = ["--parts", *parts, "--systems", "lerobot_fp32", "fsdp_int8", "zero3_bf16"]
    end = subprocess.run(
        [*command, *chosen, "--output", tmp_path], capture_output=True, text=True, check=False
    )
    assert end.returncode == 0, end.stdout + end.stderr
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    assert set(result) == set(parts)
    assert {(row["engine"], row["dtype"]) for row in result["parity"]["rows"]} >= {
        ("fsdp", "bfloat16"),
        ("zero3", "float32"),
    }
    for row in result["speed"]["rows"]:
        assert set(row["cameras"]) == {"1 of 1", "3 of 3", "1 of 3"}
        assert all(cells["task_s"] > 0 for cells in row["cameras"].values())
    assert all(planned > 0 for cells in result["speed"]["planned"].values() for planned in cells.values())
    assert (tmp_path / "gpu_check.md").read_text().count("|---") >= 4


@pytest.mark.sample(0)
@pytest.mark.slow
def test_a_part_that_fails_is_named_and_hides_no_other(tmp_path):
    """With no layer left, the policies cannot be built; the card is measured all the same."""
    command = [
        sys.executable,
        ROOT / "benchmarks" / "gpu_check.py",
        "--device",
        "cpu",
        "--small",
        "--layers",
        "0",
    ]
    parts = ["--parts", "card", "speed", "--systems", "fsdp_fp32", "--output", tmp_path]
    end = subprocess.run([*command, *parts], capture_output=True, text=True, check=False)
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    assert end.returncode == 2
    assert "error: failed: fsdp_fp32" in end.stderr
    assert result["card"]["float32_flop_per_s"] > 0
    assert "error" in result["speed"]["rows"][0]

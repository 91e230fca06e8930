"""The comparison of checkpoint methods under faults, with a few trials of each kind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
DAMAGES = ["bit flipped", "cut", "removed", "page zeroed", "older file"]
METHODS = ["craft", "craft_per_rank", "dcp", "dcp_one_directory", "dcp_hf", "deepspeed", "lerobot"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, list[dict]]:
    file = tmp_path_factory.mktemp("bench") / "result.json"
    command = [sys.executable, ROOT / "benchmarks" / "bench_fault_tolerance.py", "--quick", "--output", file]
    ended = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=900, check=False
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    assert "| craft-ds, one file | 2 kills |" in ended.stdout
    return json.loads(file.read_text())["rows"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_meets_every_fault(rows, method):
    damages = [] if method == "dcp_one_directory" else DAMAGES
    assert [row["kind"] for row in rows[method]] == ["kill", "kill", *damages]


@pytest.mark.parametrize("method", ["craft", "craft_per_rank"])
def test_craft_ds_resumes_by_itself(rows, method):
    assert [row["outcome"] for row in rows[method]] == ["harmless"] * 7


def test_comparison_sees_a_wrong_state(rows):
    """Otherwise every method would look right: DCP and DeepSpeed load a part of the older checkpoint."""
    for method in ("dcp", "deepspeed"):
        (row,) = [row for row in rows[method] if row["kind"] == "older file"]
        assert row["outcome"] == "silently wrong"

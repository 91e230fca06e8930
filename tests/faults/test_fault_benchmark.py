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
def rows(tmp_path_factory, full_campaign) -> dict[str, list[dict]]:
    methods = METHODS if full_campaign else ["craft", "dcp"]
    file = tmp_path_factory.mktemp("bench") / "result.json"
    command = [sys.executable, ROOT / "benchmarks" / "bench_fault_tolerance.py", "--quick", "--output", file]
    command += ["--methods", *methods]
    ended = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=900, check=False
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    assert "| craft-ds, one file | 2 kills |" in ended.stdout
    return json.loads(file.read_text())["rows"]


def test_every_method_meets_every_fault(rows):
    for method, found in rows.items():
        damages = [] if method == "dcp_one_directory" else DAMAGES
        assert [row["kind"] for row in found] == ["kill", "kill", *damages], method


def test_craft_ds_resumes_by_itself(rows):
    for method in {"craft", "craft_per_rank"} & {*rows}:
        assert [row["outcome"] for row in rows[method]] == ["harmless"] * 7, method


def test_comparison_sees_a_wrong_state(rows):
    """Otherwise every method would look right: DCP and DeepSpeed load a part of the older checkpoint."""
    for method in {"dcp", "deepspeed"} & {*rows}:
        (row,) = [row for row in rows[method] if row["kind"] == "older file"]
        assert row["outcome"] == "silently wrong"

"""The same global batch gives the same run on any number of ranks, in every engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# tests/distributed/test_parity.py compares all engines on 2, 3 and 4 ranks in any case.
pytestmark = [pytest.mark.distributed, pytest.mark.sample(0)]

ROOT = Path(__file__).parents[2]
KEYS = ("train/loss", "craft/retention_loss", "craft/lambda")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Figures of the benchmark for 30 CRaFT steps in fp32."""
    file = tmp_path_factory.mktemp("bench") / "result.json"
    command = [sys.executable, ROOT / "benchmarks" / "bench_world_sizes.py", "--dtypes", "float32"]
    command += ["--output", file]
    ended = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=900, check=False
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    return json.loads(file.read_text())


def test_every_engine_ran_on_1_to_4_ranks(result):
    runs = {(row["engine"], row["world_size"]) for row in result["rows"]}
    assert runs == {("single", 1)} | {(name, n) for name in ("zero3", "fsdp") for n in (1, 2, 3, 4)}
    assert result["steps"] == 30


def test_the_loss_curves_agree(result):
    for row in result["rows"]:
        for key in KEYS:
            assert row[key] <= 1e-4, row


def test_the_run_learns(result):
    """Otherwise the runs would agree because nothing changes."""
    first, last = result["loss"]
    assert first - last > 0.3

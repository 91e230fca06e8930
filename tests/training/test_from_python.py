"""The example for Python runs as it stands, with data-loader workers, and as quietly as the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_python_example_trains_with_four_workers(inputs, tmp_path):
    output = tmp_path / "run"
    example = ROOT / "examples" / "train_from_python.py"
    assert "num_workers=4" in example.read_text()
    ended = subprocess.run(
        [sys.executable, example, inputs.policy, inputs.new, inputs.anchors, output, "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == f"trained: {output}/final"
    assert (output / "final" / "lambda_history.csv").read_text().count("\n") == 2
    assert "Traceback" not in ended.stderr
    assert ended.stdout.count("✓ optimizer step") == 1  # no worker trains

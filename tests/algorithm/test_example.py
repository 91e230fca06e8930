"""`craft_ds.algorithm` alone: in a bare process, and in a plain FSDP2 loop."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp2_language_model.py"
BARE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lerobot", "deepspeed", "transformers", "peft"):
            raise ImportError(f"{name} is refused here")

sys.meta_path.insert(0, Refuse())
from craft_ds.algorithm import GramTriple, merge
from craft_ds import CraftConfig
print(merge(GramTriple(1.0, -0.5, 1.0), 1.0, CraftConfig(enabled=True)).b)
"""


def test_the_algorithm_needs_no_lerobot_and_no_deepspeed(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", BARE], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "1.5\n"), ended.stderr


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_example_learns_and_keeps_the_constraint(fork_server, world_size):
    ended = fork_server.run([], world_size, program=EXAMPLE).check()
    rows = [
        [float(x) for x in re.findall(r"[=]([\d.]+)", line)]
        for line in ended.outputs[0].splitlines()
        if "L_ret" in line
    ]
    (first_loss, *_), (last_loss, retention, multiplier) = rows[0], rows[-1]
    assert last_loss < 0.1 < first_loss
    assert retention < 0.02  # without the retention gradient it ends above 0.2
    assert 0.0 < multiplier < 10.0

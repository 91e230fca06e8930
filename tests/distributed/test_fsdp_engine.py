"""FSDP2 alone on 2 ranks and on one process; recomputation under both sharded engines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from scenarios_fsdp import CHECKS

from craft_ds.config.configs import FsdpConfig
from craft_ds.engines.fsdp import mesh_shape
from craft_ds.errors import UserError

RANKS = 2
ALONE = """
import pytest
import torch
from torch import nn
from craft_ds.config.configs import FsdpConfig
from craft_ds.distributed.collectives import init_process_group
from craft_ds.engines.fsdp import FsdpEngine
from craft_ds.engines.single import SingleEngine
from craft_ds.policies.token_loss import PolicyWithLoss
from craft_ds.testing.policies import read_from
from craft_ds.training.train_step import task_step
from toy import ToyPolicy, samples

init_process_group()
batch, norms = samples(0, retention=False), []
for build in (
    lambda *parts: FsdpEngine(*parts, FsdpConfig(), torch.float32),
    lambda *parts: SingleEngine(*parts, torch.device("cpu"), torch.float32),
):
    policy = ToyPolicy()
    engine = build(
        PolicyWithLoss(policy),
        read_from(policy),
        lambda: torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad]),
    )
    results = [task_step(engine, [batch], 1.0) for _ in range(3)]
    norms.append([value for result in results for value in (result.loss, result.grad_norm)])
    if len(norms) == 1:
        engine.close()
assert norms[0] == pytest.approx(norms[1], rel=1e-6), norms  # sums of other blocks
"""


@pytest.fixture(scope="module")
def results(reference, fork_server, tmp_path_factory):
    directory = tmp_path_factory.mktemp("fsdp_checks")
    worker = Path(__file__).with_name("scenarios_fsdp.py")
    ended = fork_server.run([directory, reference.lab.policy_dir], RANKS, program=worker, timeout=240)
    (directory / "output").write_text("\n".join(ended.outputs))
    return directory


@pytest.mark.parametrize("name", CHECKS)
def test_on_ranks(results, name):
    errors = [path.read_text() for path in sorted(results.glob(f"{name}.?.error"))]
    assert not errors, "\n".join(errors)
    passed = len(list(results.glob(f"{name}.?.passed")))
    assert passed == RANKS, (results / "output").read_text()[-4000:]


def test_a_plain_process_is_a_world_of_one():
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launcher}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", ALONE], env=environment, check=True, timeout=120)


@pytest.mark.parametrize(
    ("options", "world_size", "shape"),
    [
        (FsdpConfig(), 1, (1, 1)),
        (FsdpConfig(), 4, (1, 4)),
        (FsdpConfig(dp_replicate=2), 4, (2, 2)),
        (FsdpConfig(dp_replicate=3, dp_shard=2), 6, (3, 2)),
        (FsdpConfig(dp_replicate=4, dp_shard=-1), 4, (4, 1)),
    ],
)
def test_mesh_shape(options, world_size, shape):
    assert mesh_shape(options, world_size) == shape


@pytest.mark.parametrize(
    ("options", "world_size", "message"),
    [
        (FsdpConfig(dp_shard=2), 4, "--engine.fsdp.dp_replicate=1 times --engine.fsdp.dp_shard=2 is not 4"),
        (FsdpConfig(dp_replicate=2), 3, "--engine.fsdp.dp_replicate=2 times any --engine.fsdp.dp_shard"),
        (FsdpConfig(dp_replicate=2, dp_shard=2), 2, "is not 2, the number of processes"),
    ],
)
def test_degrees_that_do_not_multiply_to_the_ranks_are_refused(options, world_size, message):
    with pytest.raises(UserError) as error:
        mesh_shape(options, world_size)
    assert message in str(error.value)
    assert "\n" not in str(error.value)

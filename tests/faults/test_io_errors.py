"""A disk that fails at any point of a save: the error is plain, older checkpoints stay, the next works."""

import random
import resource
import signal
import sys

import pytest
import torch
from faulty_disk import FaultyDisk
from lerobot.configs.default import DatasetConfig

from craft_ds.checkpoints import save_checkpoint, verify_checkpoint, whole_checkpoints
from craft_ds.engines.single import SingleEngine
from craft_ds.errors import UserError
from craft_ds.policies.adapter import PolicyWithLoss
from craft_ds.policies.loading import load_policy, load_policy_config
from craft_ds.policies.testing import random_batch, read_from
from craft_ds.train_config import TrainConfig

FAULTS = ("ENOSPC", "EIO", "EDQUOT", "EROFS", "short")
SAMPLE = 25


@pytest.fixture(scope="module")
def kept(inputs):
    """What every save here writes."""
    policy = load_policy(load_policy_config(inputs.policy), inputs.policy)
    engine = SingleEngine(
        PolicyWithLoss(policy),
        read_from(policy),
        lambda: torch.optim.AdamW(policy.parameters()),
        torch.device("cpu"),
    )
    engine.backward(engine.forward(random_batch(policy.config, 2, 0)).total, last=True)
    engine.step()
    config = TrainConfig(dataset=DatasetConfig("craft-ds/test"), policy=load_policy_config(inputs.policy))
    config.policy.pretrained_path = inputs.policy
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["train_craft.py"])
        config.validate()
    return {
        "engine": engine,
        "config": config,
        "policy_dir": inputs.policy,
        "scheduler_state": None,
        "craft_state": {"multiplier": 0.5},
    }


@pytest.fixture(scope="module", params=["consolidated", "per_rank"])
def layout(request):
    return request.param


@pytest.fixture(scope="module")
def asked(kept, layout, tmp_path_factory):
    """Everything that one save asks of the disk, in order."""
    kept["config"].checkpoint.layout = layout
    with FaultyDisk().in_place() as disk:
        save_checkpoint(tmp_path_factory.mktemp("dry") / "step_000002", step=2, **kept)
    return disk.asked


@pytest.fixture
def cases(asked, request):
    """Call and fault: all of them in the campaign, else a sample that the seed draws."""
    every = [
        (at, fault)
        for at, name in enumerate(asked)
        for fault in FAULTS
        if fault != "short" or name == "pwrite"
    ]
    if request.config.getoption("--all", default=False):
        return every
    return random.Random(request.config.getoption("--faults-seed", default=0)).sample(every, SAMPLE)


def test_a_save_asks_for_all_of_these(asked):
    """Else the cases below would be about nothing."""
    names = ["mkdir", "open", "posix_fallocate", "pwrite", "fsync", "rename", "symlink", "copyfile"]
    assert {name for name in names if name in asked} == set(names)


def test_each_call_of_a_save_may_fail(kept, layout, cases, tmp_path):
    older = tmp_path / "step_000002"
    kept["config"].checkpoint.layout = layout
    save_checkpoint(older, step=2, **kept)
    for number, (at, fault) in enumerate(cases):
        step = 3 + number
        target = tmp_path / f"step_{step:06d}"
        said = None
        with FaultyDisk(at, fault).in_place() as disk:
            try:
                save_checkpoint(target, step=step, **kept)
            except UserError as error:
                said = str(error)
        assert len(disk.asked) > at, "the fault was never met"
        if fault == "short":
            assert said is None, (at, said)  # the write goes on where it stopped
        else:
            assert said is not None, (at, fault)
            assert f"checkpoint {target} cannot be" in said, (at, fault)
            assert "[Errno" in said, (at, fault)
        verify_checkpoint(older, 0, 1)
        assert not list(tmp_path.glob("step_*.tmp")), (at, fault)
        if target.exists():
            # The disk failed after the checkpoint had got its name, if at all: it is whole.
            assert verify_checkpoint(target, 0, 1)["step"] == step
            older = target
        else:
            assert said, (at, fault)
    save_checkpoint(tmp_path / "step_999999", step=999999, **kept)
    assert whole_checkpoints(tmp_path)[0][0] == (999999, tmp_path / "step_999999")


@pytest.mark.parametrize("limit", [100, 5_000, 100_000, 400_000])
def test_a_quota_of_the_kernel(kept, tmp_path, limit):
    """No shim: files larger than the limit cannot be written, and the call that would is cut short first."""
    kept["config"].checkpoint.layout = "consolidated"
    save_checkpoint(tmp_path / "step_000002", step=2, **kept)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match=r"step_000003 cannot be written: \[Errno 27\] File too large"):
            save_checkpoint(tmp_path / "step_000003", step=3, **kept)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step_000002"]
    verify_checkpoint(tmp_path / "step_000002", 0, 1)
    save_checkpoint(tmp_path / "step_000003", step=3, **kept)

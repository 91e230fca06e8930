"""A disk that fails at any call of a save: one clear error, older checkpoints stay, the next save works."""

import random
import resource
import signal
import sys

import pytest
import torch
from faulty_disk import FaultyDisk
from lerobot.configs.default import DatasetConfig

from craft_ds.checkpoints import complete_checkpoints, save_checkpoint, verify_checkpoint
from craft_ds.config.train_config import TrainConfig
from craft_ds.engines.single import SingleEngine
from craft_ds.errors import UserError
from craft_ds.policies.loading import load_policy, load_policy_config
from craft_ds.policies.token_loss import PolicyWithLoss
from craft_ds.testing.policies import random_batch, read_from

FAULTS = ("ENOSPC", "EIO", "EDQUOT", "EROFS", "short")
SAMPLE = 25


@pytest.fixture(scope="module")
def kept(inputs):
    """Arguments of every save here."""
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
def disk_calls(kept, layout, tmp_path_factory):
    """All calls of one save to the disk, in order."""
    kept["config"].checkpoint.layout = layout
    run = tmp_path_factory.mktemp("dry")
    save_checkpoint(run / "step_000001", step=1, **kept)  # calls that are made only once
    with FaultyDisk().in_place() as disk:
        save_checkpoint(run / "step_000002", step=2, **kept)
    return disk.calls


@pytest.fixture
def cases(disk_calls, full_campaign, faults_seed):
    """Pairs of call and fault: all in the full campaign, otherwise a random sample."""
    every = [
        (at, fault)
        for at, name in enumerate(disk_calls)
        for fault in FAULTS
        if fault != "short" or name == "pwrite"
    ]
    return every if full_campaign else random.Random(faults_seed).sample(every, SAMPLE)


def test_a_save_makes_all_kinds_of_calls(disk_calls):
    """Without this, the cases below could test nothing."""
    names = ["mkdir", "open", "reserve", "pwrite", "fsync", "rename", "symlink", "copyfile"]
    assert {name for name in names if name in disk_calls} == set(names)


def test_each_call_of_a_save_may_fail(kept, layout, disk_calls, cases, fault_table, tmp_path):
    older = tmp_path / "step_000002"
    kept["config"].checkpoint.layout = layout
    save_checkpoint(older, step=2, **kept)
    series = fault_table.series("I/O error in a save", layout)
    for number, (at, fault) in enumerate(cases):
        with series.case(f"{fault} at call {at}, {disk_calls[at]}"):
            older = save_onto(FaultyDisk(at, fault), kept, tmp_path, 3 + number, older)
    series.check()
    save_checkpoint(tmp_path / "step_999999", step=999999, **kept)
    assert complete_checkpoints(tmp_path)[0][0] == (999999, tmp_path / "step_999999")


def save_onto(disk, kept, run, step, older):
    """Save with the fault, check the outcome and return the newest complete checkpoint."""
    target, message = run / f"step_{step:06d}", None
    with disk.in_place():
        try:
            save_checkpoint(target, step=step, **kept)
        except UserError as error:
            message = str(error)
    assert disk.failed, "the failing call was never made"
    if disk.fault == "short":
        assert message is None  # the write continues where it stopped
    elif message is not None or not disk.failed_mkdir:  # the directory may exist already
        assert message is not None
        assert f"checkpoint {target} cannot be" in message
        assert "[Errno" in message
    verify_checkpoint(older, 0, 1)
    assert not list(run.glob("step_*.tmp"))
    if not target.exists():
        assert message is not None
        return older
    # The disk failed after the rename, if at all: the checkpoint is complete.
    assert verify_checkpoint(target, 0, 1)["step"] == step
    for path in older.glob("*.safetensors"):  # the same engine in the same state
        assert (target / path.name).read_bytes() == path.read_bytes(), path.name
    return target


@pytest.mark.parametrize("limit", [100, 5_000, 100_000, 400_000])
def test_a_file_size_limit_of_the_kernel(kept, tmp_path, limit):
    """Without a shim: a write beyond the limit is first cut short and then refused."""
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

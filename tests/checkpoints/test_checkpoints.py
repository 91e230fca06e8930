"""Checkpoints of one process; those of several ranks are tested in tests/distributed."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from lerobot.configs.default import DatasetConfig
from safetensors.torch import load_file

from craft_ds.checkpoints import (
    load_optimizer,
    manifest,
    read_manifest,
    read_states,
    save_checkpoint,
    step_directory,
    verify_checkpoint,
)
from craft_ds.checkpoints import save as save_module
from craft_ds.config.train_config import TrainConfig
from craft_ds.engines.single import SingleEngine
from craft_ds.errors import UserError
from craft_ds.policies.loading import load_policy, load_policy_config
from craft_ds.policies.token_loss import PolicyWithLoss
from craft_ds.tensor_io.tensor_file import TensorFile
from craft_ds.testing.policies import random_batch, read_from

FILES = {
    "config.json",
    "model.safetensors",
    "policy_preprocessor.json",
    "policy_postprocessor.json",
    "optimizer.safetensors",
    "scheduler.pt",
    "craft_state.pt",
    "train_config.json",
    "manifest.json",
    "text_tokenizer",
    "action_tokenizer",
}


def make_engine(policy_dir) -> SingleEngine:
    policy = load_policy(load_policy_config(policy_dir), policy_dir)
    return SingleEngine(
        PolicyWithLoss(policy),
        read_from(policy),
        lambda: torch.optim.AdamW(policy.parameters(), lr=1e-3),
        torch.device("cpu"),
    )


def step(engine: SingleEngine, seed: int) -> None:
    batch = random_batch(engine.module.policy.config, 2, seed)
    engine.backward(engine.forward(batch).total, last=True)
    engine.step()


@pytest.fixture(scope="module")
def engine(inputs):
    engine = make_engine(inputs.policy)
    step(engine, 0)
    step(engine, 1)
    return engine


@pytest.fixture
def save(engine, inputs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_craft.py"])
    policy = load_policy_config(inputs.policy)
    policy.pretrained_path = inputs.policy
    config = TrainConfig(dataset=DatasetConfig("craft-ds/test"), policy=policy)
    config.validate()

    def save(directory, number=2, **changes):
        given = {
            "engine": engine,
            "config": config,
            "policy_dir": inputs.policy,
            "scheduler_state": {"last_epoch": number},
            "craft_state": {"multiplier": 0.25, "history": []},
            "step": number,
        }
        save_checkpoint(directory, **{**given, **changes})
        return directory

    return save


@pytest.fixture
def saved(save, tmp_path):
    return save(step_directory(tmp_path / "run", 2))


def test_the_layout(saved):
    assert saved.name == "step_000002"
    names = {path.name for path in saved.iterdir()}
    assert names >= FILES
    assert {name for name in names - FILES if not name.startswith("policy_")} == set()
    assert (saved.parent / "last").readlink().name == "step_000002"
    assert sorted(path.name for path in saved.parent.iterdir()) == ["last", "step_000002"]


def test_weights_and_moments_are_plain_safetensors(saved, engine):
    weights = load_file(saved / "model.safetensors")
    moments = load_file(saved / "optimizer.safetensors")
    policy = engine.module.policy
    assert weights.keys() == policy.state_dict().keys()
    for name, tensor in policy.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    for name, parameter in policy.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments[f"{name}.{key}"], engine.optimizer.state[parameter][key]), name
    assert len(moments) == 2 * len(list(policy.parameters()))


def test_states_are_plain_values(saved):
    assert torch.load(saved / "scheduler.pt", weights_only=True) == {"last_epoch": 2}
    assert torch.load(saved / "craft_state.pt", weights_only=True)["multiplier"] == 0.25


def test_loading_restores_the_training_state(saved, engine):
    other = make_engine(saved)
    load_optimizer(saved, other)
    scheduler_state, craft_state = read_states(saved)
    assert (scheduler_state, craft_state["multiplier"]) == ({"last_epoch": 2}, 0.25)
    for expected, found in zip(engine.shards(), other.shards(), strict=True):
        assert expected.name == found.name
        assert torch.equal(expected.master, found.master)
        assert expected.state.keys() == found.state.keys() == {"exp_avg", "exp_avg_sq"}
        for key, values in expected.state.items():
            assert torch.equal(values, found.state[key])
    steps = {int(state["step"]) for state in other.optimizer.state.values()}
    assert steps == {2}


def test_a_checkpoint_before_the_first_step_has_no_moments(save, inputs, tmp_path):
    fresh = make_engine(inputs.policy)
    directory = save(tmp_path / "step_000000", 0, engine=fresh, scheduler_state=None)
    again = make_engine(directory)
    load_optimizer(directory, again)
    assert read_states(directory)[0] is None
    step(fresh, 5)
    step(again, 5)
    for expected, found in zip(fresh.shards(), again.shards(), strict=True):
        assert torch.equal(expected.master, found.master)


def test_the_manifest_lists_every_file(saved):
    manifest = read_manifest(saved)
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == files - {"manifest.json"}
    assert (manifest["step"], manifest["world_size"], manifest["engine"]) == (2, 1, "single")
    assert verify_checkpoint(saved, 0, 1) == manifest


def test_long_files_are_hashed_in_segments(save, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "SEGMENT", 1000)
    directory = save(tmp_path / "step_000002")
    size = (directory / "model.safetensors").stat().st_size
    assert len(read_manifest(directory)["files"]["model.safetensors"]["xxh3_128"]) == -(-size // 1000)
    verify_checkpoint(directory, 0, 1)


def test_extra_files_are_in_the_manifest(save, tmp_path):
    directory = save(tmp_path / "final", extra=lambda path: (path / "history.csv").write_text("a\n"))
    assert (directory / "history.csv").read_text() == "a\n"
    assert "history.csv" in read_manifest(directory)["files"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "craft_state.pt", "config.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_its_file_named(saved, name, damage):
    path = saved / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[-3] ^= 1
        path.write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(UserError, match=rf"{name} is .*resume from an older checkpoint"):
        verify_checkpoint(saved, 0, 1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "is not a craft-ds checkpoint"),
        ("{", "is damaged"),
        ("[1]", "is damaged"),
        (json.dumps({"format_version": 99}), "has format version 99"),
    ],
)
def test_an_unreadable_manifest_is_refused(saved, text, reason):
    manifest = saved / "manifest.json"
    manifest.unlink() if text is None else manifest.write_text(text)
    with pytest.raises(UserError, match=reason):
        read_manifest(saved)


def test_nothing_is_overwritten(save, saved):
    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=f"{saved} exists already"):
        save(saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert [path.name for path in saved.parent.iterdir() if path.name.endswith(".tmp")] == []


class Killed(BaseException):
    """Stand-in for Ctrl-C or a killed process."""


@pytest.mark.parametrize("place", ["create", "write", "hash", "sync", "rename"])
@pytest.mark.parametrize("failure", [Killed(), OSError(28, "No space left on device")])
def test_a_failed_save_leaves_no_checkpoint(save, saved, monkeypatch, place, failure):
    def fail(*_: object, **__: object) -> None:
        raise failure

    target = saved.with_name("step_000004")
    with monkeypatch.context() as patched:
        match place:
            case "create":
                patched.setattr(save_module, "create_tensor_file", fail)
            case "write":
                patched.setattr(TensorFile, "write", fail)
            case "hash":
                patched.setattr(manifest, "_hash", fail)
            case "sync":
                patched.setattr(save_module, "fsync", fail)
            case "rename":
                rename = Path.rename
                patched.setattr(
                    Path, "rename", lambda path, to: rename(path, to) if path.is_symlink() else fail()
                )
        expected = Killed if isinstance(failure, Killed) else (UserError, OSError)
        with pytest.raises(expected) as raised:
            save(target, 4)
        if isinstance(raised.value, UserError):
            assert str(target) in str(raised.value)
            assert "No space left on device" in str(raised.value)
    assert not target.exists()
    assert (saved.parent / "last").resolve() == saved
    with pytest.raises(UserError, match="is not a craft-ds checkpoint"):
        read_manifest(target)
    verify_checkpoint(saved, 0, 1)

    # Leftovers of the failure do not prevent the next save.
    save(target, 4)
    verify_checkpoint(target, 0, 1)
    assert (saved.parent / "last").resolve() == target


def test_a_checkpoint_may_be_moved(saved, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.move(saved, moved)
    other = make_engine(moved)
    load_optimizer(moved, other)
    assert verify_checkpoint(moved, 0, 1)["step"] == 2


def test_hash_files_does_not_access_files_after_the_exchange(tmp_path, monkeypatch):
    """Once all hashes are exchanged, rank 0 may rename the directory."""
    directory = tmp_path / "final.tmp"
    directory.mkdir()
    (directory / "config.json").write_text("{}")

    def gather_and_rename(value, group):
        directory.rename(tmp_path / "final")
        return [value]

    monkeypatch.setattr(manifest, "gather_objects", gather_and_rename)
    assert manifest.hash_files(directory, 0, 1)["config.json"]["bytes"] == 2

"""Checkpoints of a run: retention, layouts, background saves, and a full disk."""

import shutil
import threading
import time

import pytest
import torch
from runs import assert_same_bits
from safetensors.torch import load_file

from craft_ds.checkpoints import manifest as manifest_module
from craft_ds.checkpoints import verify_checkpoint
from craft_ds.checkpoints.save import PendingCheckpoint
from craft_ds.export.export import export_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture
def disk_full_at_step_2(monkeypatch):
    writes = PendingCheckpoint._write_shards

    def fail(save):
        if save.step == 2:
            raise OSError(28, "No space left on device")
        writes(save)

    monkeypatch.setattr(PendingCheckpoint, "_write_shards", fail)


def test_the_oldest_are_deleted_and_the_periodic_ones_kept(train, inputs, tmp_path):
    run = tmp_path / "run"
    flags = [*inputs.craft_flags(), "--steps=8", "--save_freq=1", "--save_total_limit=2", "--keep_period=3"]
    assert train(run, *flags).status == 0
    names = [path.name for path in sorted(run.glob("step_*"))]
    assert names == ["step_000003", "step_000006", "step_000007"]
    for name in (*names, "final"):
        verify_checkpoint(run / name, 0, 1)


def test_nothing_is_deleted_before_the_newer_one_is_complete(train, saving, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def fail(*_: object, **__: object):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        hashes = manifest_module._hash
        patched.setattr(
            manifest_module,
            "_hash",
            lambda path, *rest: fail() if "step_000003" in str(path) else hashes(path, *rest),
        )
        ended = train(run, *saving, "--steps=4", "--save_freq=1", "--save_total_limit=1")
    assert ended.status == 0
    assert "Input/output error; training continues, earlier checkpoints are unchanged" in ended.output
    assert [path.name for path in run.glob("step_*")] == ["step_000002"]


def test_a_background_save_is_the_same_save(train, saving, unbroken, tmp_path, monkeypatch):
    run, writes, seen = tmp_path / "run", PendingCheckpoint._write_shards, []

    def slow(save):
        seen.append(threading.current_thread().name)
        time.sleep(0.3)  # training continues, and changes what is being saved
        writes(save)

    monkeypatch.setattr(PendingCheckpoint, "_write_shards", slow)
    ended = train(run, *saving, "--checkpoint.background=true")
    assert ended.status == 0, ended.errors
    assert seen == ["save", "save", "MainThread"]
    for name in ("step_000002", "step_000004", "final"):
        verify_checkpoint(run / name, 0, 1)
        assert_same_bits(run / name, unbroken / name)
    assert ended.output.count("saved ") == 3


def test_a_failed_background_save_is_reported(train, saving, tmp_path, disk_full_at_step_2):
    run = tmp_path / "run"
    ended = train(run, *saving, "--checkpoint.background=true")
    assert ended.status == 0, ended.errors
    assert "No space left on device; training continues" in ended.output
    assert sorted(path.name for path in run.iterdir() if path.is_dir() and not path.is_symlink()) == [
        "final", "step_000004"
    ]  # fmt: skip


@pytest.mark.sample(1)
@pytest.mark.parametrize("lora", [(), ("--lora=preset",)], ids=["full", "lora"])
def test_shards_per_rank_resume_and_export(train, saving, tmp_path, lora):
    weights = "adapter_model" if lora else "model"
    one, pieces = tmp_path / "one", tmp_path / "pieces"
    assert train(one, *saving, *lora).status == 0
    flags = [*saving, *lora, "--checkpoint.layout=per_rank"]
    assert train(pieces, *flags).status == 0
    names = {path.name for path in (pieces / "final").iterdir()}
    assert {f"{weights}.rank_00000.safetensors", "optimizer.rank_00000.safetensors"} <= names
    assert not {f"{weights}.safetensors", "optimizer.safetensors"} & names

    # Resumed, and consolidated from there on.
    shutil.rmtree(pieces / "final")
    ended = train(None, f"--config_path={pieces}", "--resume=true", "--checkpoint.layout=consolidated")
    assert ended.status == 0, ended.errors
    for name in (weights, "optimizer"):
        found, expected = (load_file(run / "final" / f"{name}.safetensors") for run in (pieces, one))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)

    export_checkpoint(pieces / "step_000004", tmp_path / "exported")
    export_checkpoint(one / "step_000004", tmp_path / "expected")
    found, expected = (tmp_path / name / f"{weights}.safetensors" for name in ("exported", "expected"))
    assert found.read_bytes() == expected.read_bytes()
    if lora:
        export_checkpoint(pieces / "step_000004", tmp_path / "merged", merge_lora=True)
        assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_a_full_disk_does_not_end_a_run(train, saving, unbroken, tmp_path, disk_full_at_step_2):
    run = tmp_path / "run"
    ended = train(run, *saving)
    assert ended.status == 0
    [line] = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert f"{run}/step_000002 cannot be written" in line
    assert not list(run.glob("step_000002*"))
    assert_same_bits(run / "final", unbroken / "final")


def test_a_final_save_that_fails_is_an_error(train, tmp_path, monkeypatch):
    def fail(save):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PendingCheckpoint, "_write_shards", fail)
    ended = train(tmp_path / "run", "--steps=1")
    assert ended.status == 2
    assert "run/final cannot be written: [Errno 28] No space left on device" in ended.errors
    assert not (tmp_path / "run" / "final").exists()

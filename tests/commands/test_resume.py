"""Resume: from the newest complete checkpoint, with the same or other flags, after preemption."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from runs import assert_same_bits, losses, metrics, trained, untimed

from craft_ds.checkpoints import verify_checkpoint
from craft_ds.checkpoints.save import PendingCheckpoint
from craft_ds.testing.checkpoints import renew_manifest
from craft_ds.training.run import Run

pytestmark = pytest.mark.slow


@pytest.fixture
def interrupted(unbroken, tmp_path):
    """A copy of it that has not got to its end."""
    run = tmp_path / "run"
    shutil.copytree(unbroken, run, symlinks=True)
    shutil.rmtree(run / "final")
    return run


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- which checkpoint -----------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["", "last", "last/train_config.json"])
def test_the_newest_complete_checkpoint_is_resumed(train, unbroken, interrupted, named):
    flip_a_byte(interrupted / "step_000004" / "optimizer.safetensors")
    ended = train(None, f"--config_path={interrupted / named}", "--resume=true")
    assert ended.status == 0, ended.errors
    assert "step_000004/optimizer.safetensors is damaged (checksum)" in ended.output
    assert f"resuming from {interrupted}/step_000002" in ended.output
    assert f"step_000004 to {interrupted}/step_000004.aside-1" in ended.output
    verify_checkpoint(interrupted / "step_000004", 0, 1)
    assert_same_bits(interrupted / "final", unbroken / "final")
    assert untimed(interrupted) == untimed(unbroken)


def test_a_directory_without_a_manifest_is_moved_out_of_the_way(train, unbroken, interrupted):
    (interrupted / "step_000004" / "manifest.json").unlink()
    ended = train(None, f"--output_dir={interrupted}", "--resume=true")
    assert ended.status == 0, ended.errors
    assert "step_000004 is not a craft-ds checkpoint" in ended.output
    assert (interrupted / "step_000004.aside-1" / "model.safetensors").is_file()
    verify_checkpoint(interrupted / "step_000004", 0, 1)
    assert_same_bits(interrupted / "final", unbroken / "final")


def test_a_missing_last_link_is_not_needed(train, unbroken, interrupted):
    (interrupted / "last").unlink()
    ended = train(None, f"--config_path={interrupted}/last", "--resume=true")
    assert ended.status == 0, ended.errors
    assert_same_bits(interrupted / "final", unbroken / "final")


def test_a_moved_run_resumes_in_its_new_place(train, unbroken, interrupted, tmp_path):
    moved = interrupted.rename(tmp_path / "moved")
    assert train(None, f"--config_path={moved}", "--resume=true").status == 0
    assert_same_bits(moved / "final", unbroken / "final")
    assert not interrupted.exists()


def test_resuming_without_a_complete_checkpoint_is_refused(refuses, interrupted):
    for step in (2, 4):
        flip_a_byte(interrupted / f"step_{step:06d}" / "model.safetensors")
    line = refuses(None, f"--config_path={interrupted}", "--resume=true", untouched=interrupted)
    assert "holds no complete checkpoint" in line
    assert "step_000002/model.safetensors is damaged" in line
    assert "step_000004/model.safetensors is damaged" in line


# --- the same command again and again -------------------------------------------------------------------


def test_auto_starts_resumes_and_ends(train, saving, unbroken, tmp_path, monkeypatch):
    run = tmp_path / "run"
    again = ["--resume=auto", *saving]
    writes = PendingCheckpoint._commit

    def die(save, files):
        if save.step == 4:
            raise KeyboardInterrupt
        writes(save, files)

    with monkeypatch.context() as patched:
        patched.setattr(PendingCheckpoint, "_commit", die)
        assert train(run, *again).status == 130
    assert (run / "step_000004.tmp").is_dir()
    ended = train(run, *again)
    assert ended.status == 0, ended.errors
    assert f"resuming from {run}/step_000002" in ended.output
    assert sorted(path.name for path in run.iterdir()) == [
        "final", "last", "metrics.jsonl", "step_000002", "step_000004"
    ]  # fmt: skip
    assert_same_bits(run / "final", unbroken / "final")
    assert untimed(run) == untimed(unbroken)

    ended = train(run, *again)
    assert (ended.status, ended.errors) == (0, "")
    assert "has done all --steps=6: nothing to do" in ended.output


def test_auto_starts_again_where_nothing_was_saved(train, saving, unbroken, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    ended = train(run, "--resume=auto", *saving)
    assert ended.status == 0, ended.errors
    assert "starting a new run" in ended.output
    assert_same_bits(run / "final", unbroken / "final")
    assert (tmp_path / "run.aside-1" / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_auto_reads_the_output_directory_of_a_file(train, unbroken, interrupted, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"output_dir: {interrupted}\n")
    ended = train(None, f"--config_path={file}", "--resume=auto")
    assert ended.status == 0, ended.errors
    assert_same_bits(interrupted / "final", unbroken / "final")


# --- what may change, and what may not ------------------------------------------------------------------


def test_changed_flags_are_listed_in_one_line_and_count(train, unbroken, interrupted):
    ended = train(
        None, f"--config_path={interrupted}", "--resume=true", "--policy.optimizer_lr=0.5", "--log_freq=5"
    )
    assert ended.status == 0, ended.errors
    [line] = [line for line in ended.output.splitlines() if line.startswith("changed since")]
    assert "--policy.optimizer_lr=0.5 (was " in line
    assert "--log_freq=5 (was 1)" in line
    assert "tokenizer" not in line
    assert "pretrained_path" not in line
    rates = [row["train/lr"] for run in (unbroken, interrupted) for row in metrics(run) if row["step"] == 5]
    assert rates[1] > 100 * rates[0]


def test_nothing_is_listed_where_nothing_changed(train, interrupted):
    ended = train(None, f"--config_path={interrupted}", "--resume=true")
    assert "changed since" not in ended.output


@pytest.mark.parametrize(
    "flag",
    ["--policy.tokenizer_max_length=100", "--dataset.repo_id=craft-ds/other", "--dataset.episodes=[0]"],
)
def test_another_run_is_refused(refuses, interrupted, flag):
    line = refuses(None, f"--config_path={interrupted}", "--resume=true", flag, untouched=interrupted)
    assert line.startswith(f"{flag}, but the checkpoint was trained with ")
    assert "start a new run" in line


def test_other_samples_are_refused(refuses, interrupted):
    flags = ["--eval_freq=2", "--dataset.eval_split=0.25"]
    line = refuses(None, f"--config_path={interrupted}", "--resume=true", *flags, untouched=interrupted)
    assert "has 60 training samples, but" in line
    assert "was trained on 80" in line


def test_the_checkpoints_statistics_win(train, inputs, unbroken, interrupted, tmp_path):
    """The data set says something else by now; states and actions must mean what they meant."""
    data = tmp_path / "data"
    shutil.copytree(inputs.new, data)
    stats = data / "meta" / "stats.json"
    content = json.loads(stats.read_text())
    for values in content.values():
        for name in ("min", "max", "mean", "std"):
            values[name] = (
                [value + 1 for value in values[name]] if isinstance(values[name][0], float) else values[name]
            )
    stats.write_text(json.dumps(content))
    ended = train(None, f"--config_path={interrupted}", "--resume=true", f"--dataset.root={data}")
    assert ended.status == 0, ended.errors
    assert_same_bits(interrupted / "final", unbroken / "final")


def test_another_batch_size_counts_from_there(train, interrupted, unbroken):
    ended = train(None, f"--config_path={interrupted}", "--resume=true", "--batch_size=3")
    assert ended.status == 0, ended.errors
    progress = torch.load(interrupted / "final" / "craft_state.pt", weights_only=True)["progress"]
    assert progress["samples_seen"] == 4 * 2 + 2 * 3
    assert losses(interrupted)[:4] == losses(unbroken)[:4]
    assert losses(interrupted)[4:] != losses(unbroken)[4:]


# --- preemption -----------------------------------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_exits(train, saving, unbroken, tmp_path, monkeypatch, number):
    run, again = tmp_path / "run", ["--resume=auto", *saving]

    record = Run.record

    def signalled(of_run, *args, **kwargs):
        record(of_run, *args, **kwargs)
        if of_run.progress.step == 3:
            os.kill(os.getpid(), number)
            while not of_run.preemption.requested:
                time.sleep(0.01)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "record", signalled)
        ended = train(run, *again)
    assert ended.status == 75
    assert ended.errors == (
        f"{number.name} received: saved {run}/step_000004; resume with: python train_craft.py "
        f"--config_path={run}/last/train_config.json --resume=true\n"
    )
    assert sorted(path.name for path in run.iterdir() if path.is_dir() and not path.is_symlink()) == [
        "step_000002", "step_000004"
    ]  # fmt: skip
    assert train(run, *again).status == 0
    assert_same_bits(run / "final", unbroken / "final")
    assert untimed(run) == untimed(unbroken)


def test_an_interrupt_that_saves_nothing_has_status_130(train, tmp_path, monkeypatch):
    record = Run.record

    def interrupted(run, *args, **kwargs):
        record(run, *args, **kwargs)
        if run.progress.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
            while not run.preemption.requested:
                time.sleep(0.01)

    monkeypatch.setattr(Run, "record", interrupted)
    ended = train(tmp_path / "run", "--save_checkpoint=false")
    assert (ended.status, ended.errors) == (130, "interrupted\n")
    assert [row["step"] for row in metrics(tmp_path / "run") if "train/loss" in row] == [1, 2]


def test_the_time_is_over(train, saving, unbroken, tmp_path, monkeypatch):
    run = tmp_path / "run"
    ended = train(run, *saving, "--save_freq=0", "--max_runtime=0.1s")
    assert ended.status == 75
    assert "--max_runtime is over: saved" in ended.errors
    [saved] = run.glob("step_*")
    ended = train(None, f"--config_path={run}", "--resume=true", "--max_runtime=", "--save_freq=2")
    assert ended.status == 0, ended.errors
    assert_same_bits(run / "final", unbroken / "final")
    assert saved.name == "step_000001"


# --- state besides parameters, moments and λ -------------------------------------------------------------


def test_wandb_continues_its_run_in_another_directory(train, tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    wandb = ["--wandb.enable=true", "--wandb.mode=offline", "--wandb.project=craft"]
    assert train(tmp_path / "run", "--save_freq=2", *wandb).status == 0
    state = torch.load(tmp_path / "run" / "step_000002" / "craft_state.pt", weights_only=True)
    on = tmp_path / "on"
    ended = train(None, f"--config_path={tmp_path}/run/step_000002", "--resume=true", f"--output_dir={on}")
    assert ended.status == 0, ended.errors
    [directory] = on.glob("wandb/offline-run-*")
    assert directory.name.endswith(f"-{state['tracker_run_ids']['wandb']}")


@pytest.mark.sample(1)
@pytest.mark.parametrize("workers", [0, 1])
def test_random_image_transforms_are_resumed(train, tmp_path, workers):
    flags = ["--dataset.image_transforms.enable=true", "--save_freq=2", f"--num_workers={workers}"]
    flags += ["--dataloader_multiprocessing_context=fork"] if workers else []
    assert train(tmp_path / "complete", *flags).status == 0
    on = ["--resume=true", f"--output_dir={tmp_path}/on"]
    ended = train(None, f"--config_path={tmp_path}/complete/step_000002", *on)
    assert ended.status == 0, ended.errors
    assert_same_bits(tmp_path / "on" / "final", tmp_path / "complete" / "final")
    assert train(tmp_path / "plain").status == 0
    assert losses(tmp_path / "plain") != losses(tmp_path / "complete")


def test_a_malformed_state_is_refused(refuses, interrupted):
    path = interrupted / "step_000004" / "craft_state.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "progress": {**state["progress"], "samples_seen": -1}}, path)
    renew_manifest(interrupted / "step_000004")
    line = refuses(None, f"--config_path={interrupted}", "--resume=true", untouched=interrupted)
    assert "craft_state.pt is damaged (samples_seen=-1)" in line


def test_the_parameters_move_between_the_checkpoints(unbroken):
    """Else all of these comparisons would hold whatever is loaded."""
    one, two = (trained(unbroken / name) for name in ("step_000002", "step_000004"))
    assert any(not torch.equal(one[name], two[name]) for name in one)

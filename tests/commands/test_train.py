"""`scripts/train_craft.py` on one process: what a run writes and says, and that runs can be repeated."""

import csv
import json
import re
import shutil
import sys
import time

import pytest
import torch
import yaml
from runs import assert_same_bits, assert_trained, losses, metrics, trained, untimed

from craft_ds import CraftConfig, TrainConfig, train_craft
from craft_ds.anchors.cache import AnchorCache

LINE = re.compile(
    r"Step (\d+)/4 \| loss=\d+\.\d{3} \| grdn=\d+\.\d{3} \| lr=\d\.\de[+-]\d\d "
    r"\| L_ret=\d+\.\d{3} \| λ=\d+\.\d\d \| ε=\d+\.\d\d \| conflict=[✓✗] \| cos=-?\d\.\d\d"
    r" \| \d+\.\d\d s/step \| [\d.e+]+ samples/s \| \d+:\d\d:\d\d left"
)


@pytest.fixture(scope="module")
def whole_run(inputs, tmp_path_factory):
    """An uninterrupted CRaFT run of 4 steps: accumulation, evaluation, a checkpoint after 2."""
    from craft_ds.config.parser import parse_arguments

    output = tmp_path_factory.mktemp("runs") / "complete"
    flags = ["--save_freq=2", "--eval_freq=2", "--dataset.eval_split=0.25", "--gradient_accumulation_steps=2"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["train_craft.py"])
        final = train_craft(parse_arguments([*inputs.flags(output), *inputs.craft_flags(), *flags]))
    assert final == output / "final"
    return output


def test_the_layout_of_a_run(whole_run):
    assert sorted(path.name for path in whole_run.iterdir()) == [
        "final",
        "last",
        "metrics.jsonl",
        "step_000002",
    ]
    assert (whole_run / "last").readlink().name == "final"
    final = {path.name for path in (whole_run / "final").iterdir()}
    step = {path.name for path in (whole_run / "step_000002").iterdir()}
    assert final - step == {"lambda_history.csv", "lambda_analysis.png"}
    assert step >= {"config.json", "model.safetensors", "optimizer.safetensors", "manifest.json"}


def test_metrics_have_the_documented_keys(whole_run):
    rows = metrics(whole_run)
    training = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in training] == [1, 2, 3, 4]
    keys = {"train/loss", "train/grad_norm", "train/lr"} | {
        f"craft/{name}"
        for name in ("retention_loss", "lambda", "epsilon", "grad_conflict", "grad_dot", "grad_cos")
    }
    means = {"craft/conflict_rate", "craft/mean_grad_cos", "craft/removed_energy"}
    assert [row["step"] for row in training if row.keys() >= means] == [1, 3]  # the retention steps
    assert all(row.keys() >= keys for row in training)
    evaluations = [row for row in rows if "eval/task_loss" in row]
    assert [row["step"] for row in evaluations] == [2, 4]
    assert all(row["eval/anchor_loss"] > 0 for row in evaluations)
    assert losses(whole_run)[-1] < losses(whole_run)[0]


def test_the_history_holds_the_retention_steps(whole_run):
    with (whole_run / "final" / "lambda_history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 3]
    assert {"lambda", "epsilon", "retention_loss", "conflict", "cos"} <= rows[0].keys()
    # λ ← λ + lambda_lr (L_ret − ε), and ε falls from 1 to 0.1 in 4 steps.
    assert [float(row["epsilon"]) for row in rows] == pytest.approx([1.0, 0.55])
    first, second = (float(row["lambda"]) for row in rows)
    assert first == 1.0
    assert second == pytest.approx(1.0 + 0.01 * (float(rows[0]["retention_loss"]) - 1.0))
    assert (whole_run / "final" / "lambda_analysis.png").read_bytes().startswith(b"\x89PNG")


def test_the_log_lines_are_those_of_the_guide(train, inputs, tmp_path):
    ended = train(tmp_path / "run", *inputs.craft_flags())
    assert ended.status == 0
    lines = [line for line in ended.output.splitlines() if line.startswith("Step")]
    assert [LINE.fullmatch(line) and LINE.fullmatch(line)[1] for line in lines] == list("1234")
    for said in (
        "✓ data set",
        "✓ policy",
        "✓ anchors",
        "✓ forward pass",
        "✓ backward pass",
        "✓ optimizer step",
    ):
        assert said in ended.output
    assert "Traceback" not in ended.output + ended.errors
    assert not re.search("error|warning", ended.errors, re.IGNORECASE), ended.errors


def test_the_same_command_gives_the_same_run(train, inputs, tmp_path):
    for name in ("one", "two"):
        assert train(tmp_path / name, *inputs.craft_flags(), "--steps=2").status == 0
    assert_same_bits(tmp_path / "one" / "final", tmp_path / "two" / "final")
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert train(tmp_path / "three", *inputs.craft_flags(), "--steps=2", "--seed=7").status == 0
    assert losses(tmp_path / "three") != losses(tmp_path / "one")


@pytest.fixture
def tf32_backends():
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    yield backends
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


@pytest.mark.parametrize("asked", [True, False])
def test_tf32_is_used_as_asked(train, tmp_path, asked, tf32_backends):
    for backend in tf32_backends:
        backend.allow_tf32 = not asked
    ended = train(tmp_path / "run", "--steps=1", f"--engine.tf32={str(asked).lower()}")
    assert ended.status == 0, ended.errors
    assert [backend.allow_tf32 for backend in tf32_backends] == [asked, asked]


def resume_after_2_steps(train, whole, run):
    """Resume a copy of a run of 4 steps; its last checkpoint must be that of the complete run."""
    shutil.copytree(whole, run, symlinks=True)
    shutil.rmtree(run / "final")
    ended = train(
        None, f"--config_path={run}/step_000002/train_config.json", "--resume=true", f"--output_dir={run}"
    )
    assert ended.status == 0, ended.errors
    assert_same_bits(run / "final", whole / "final")


def test_resume_is_the_uninterrupted_run_bit_by_bit(train, whole_run, tmp_path):
    run = tmp_path / "run"
    resume_after_2_steps(train, whole_run, run)
    different = trained(run / "step_000002")
    assert any(not torch.equal(different[name], tensor) for name, tensor in trained(run / "final").items())

    # What the interrupted run had logged after the checkpoint is logged once.
    assert untimed(run) == untimed(whole_run)
    assert [float(row) for row in losses(run)] == losses(whole_run)
    history = [path / "final" / "lambda_history.csv" for path in (run, whole_run)]
    assert history[0].read_text() == history[1].read_text()


def test_resume_takes_a_directory_and_another_output(train, whole_run, tmp_path):
    before = sorted(whole_run.iterdir())
    ended = train(
        None, f"--config_path={whole_run}/step_000002", "--resume=true", f"--output_dir={tmp_path}/on"
    )
    assert ended.status == 0, ended.errors
    assert_same_bits(tmp_path / "on" / "final", whole_run / "final")
    assert sorted(whole_run.iterdir()) == before


def test_a_saved_config_reruns_the_run(train, whole_run, tmp_path):
    ended = train(
        None, f"--config_path={whole_run}/final/train_config.json", f"--output_dir={tmp_path}/again"
    )
    assert ended.status == 0, ended.errors
    assert_same_bits(tmp_path / "again" / "final", whole_run / "final")


def test_a_yaml_file_is_the_same_as_flags(train, inputs, tmp_path):
    assert (
        train(tmp_path / "flags", *inputs.craft_flags(), "--steps=2", "--policy.optimizer_lr=0.01").status
        == 0
    )
    path = tmp_path / "run.yaml"
    content = {
        "policy": {"path": str(inputs.policy), "device": "cpu", "optimizer_lr": 0.01},
        "dataset": {"repo_id": "craft-ds/test", "root": str(inputs.new)},
        "craft": {
            "enabled": True,
            "anchor_cache_dir": str(inputs.anchors),
            "anchor_batch_size": 2,
            "retention_freq": 2,
        },
        "output_dir": str(tmp_path / "yaml"),
        "steps": 3,
        "batch_size": 2,
        "num_workers": 0,
        "log_freq": 1,
        "save_freq": 0,
    }
    path.write_text(yaml.dump(content))
    assert train(None, f"--config_path={path}", "--steps=2").status == 0
    assert_same_bits(tmp_path / "yaml" / "final", tmp_path / "flags" / "final")


def test_the_python_form_is_the_same_as_flags(train, inputs, tmp_path, monkeypatch):
    from lerobot.configs import PreTrainedConfig
    from lerobot.configs.default import DatasetConfig

    assert train(tmp_path / "flags", *inputs.craft_flags(), "--steps=2").status == 0
    monkeypatch.setattr(sys, "argv", ["notebook", "--mine"])
    policy = PreTrainedConfig.from_pretrained(inputs.policy)
    policy.pretrained_path = inputs.policy
    config = TrainConfig(
        dataset=DatasetConfig("craft-ds/test", root=str(inputs.new)),
        policy=policy,
        output_dir=tmp_path / "python",
        steps=2,
        batch_size=2,
        num_workers=0,
        log_freq=1,
        save_freq=0,
    )
    craft = CraftConfig(
        enabled=True, anchor_cache_dir=str(inputs.anchors), anchor_batch_size=2, retention_freq=2
    )
    assert train_craft(config, craft_config=craft) == tmp_path / "python" / "final"
    assert_same_bits(tmp_path / "python" / "final", tmp_path / "flags" / "final")


def test_the_baseline_reads_no_anchor(train, inputs, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("an anchor cache was opened")

    monkeypatch.setattr(AnchorCache, "open", fail)
    ended = train(tmp_path / "run", *inputs.craft_flags(), "--craft.enabled=false", "--eval_freq=4")
    assert ended.status == 0
    rows = metrics(tmp_path / "run")
    assert not any(key.startswith("craft/") for row in rows for key in row)
    assert [row["eval/task_loss"] > 0 for row in rows if "eval/task_loss" in row] == [True]
    assert not any("eval/anchor_loss" in row for row in rows)
    assert "L_ret" not in ended.output
    assert not (tmp_path / "run" / "final" / "lambda_history.csv").exists()
    assert_trained(tmp_path / "run" / "final", inputs.policy)


def test_craft_differs_from_the_baseline_at_retention_steps(train, inputs, tmp_path):
    assert train(tmp_path / "plain").status == 0
    assert train(tmp_path / "craft", *inputs.craft_flags()).status == 0
    plain, craft = losses(tmp_path / "plain"), losses(tmp_path / "craft")
    assert plain[0] == craft[0]  # the same samples and the same parameters
    assert plain[1] != craft[1]


@pytest.mark.parametrize("flag", ["--craft.projection_mode=task_priority", "--craft.epsilon_schedule=cosine"])
def test_choices_reach_the_loop(train, inputs, tmp_path, flag):
    assert train(tmp_path / "run", *inputs.craft_flags(), "--steps=2", flag).status == 0
    config = json.loads((tmp_path / "run" / "final" / "train_config.json").read_text())
    name, value = flag.removeprefix("--craft.").split("=")
    assert config["craft"][name] == value


@pytest.mark.parametrize(
    "flags",
    [
        ("--craft.merging=upgrad", "--craft.multiplier=nupi", "--craft.nupi_nu=0.5", "--craft.nupi_kp=5"),
        ("--craft.multiplier=dynamic_barrier", "--craft.use_grad_projection=false"),
    ],
)
def test_rules_for_merging_and_lambda_are_resumed_exactly(train, inputs, tmp_path, flags):
    run, whole = tmp_path / "run", tmp_path / "whole"
    flags = [*inputs.craft_flags(), *flags, "--save_freq=2", "--craft.retention_freq=1", "--log_freq=3"]
    ended = train(whole, *flags)
    assert ended.status == 0, ended.errors
    resume_after_2_steps(train, whole, run)
    assert untimed(run) == untimed(whole)  # the means since the last line span the checkpoint

    with (whole / "final" / "lambda_history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["lambda"] for row in rows}) == 4
    [logged] = [row for row in metrics(whole) if "train/loss" in row]
    assert logged["craft/mean_grad_cos"] == pytest.approx(sum(float(row["cos"]) for row in rows[:3]) / 3)
    assert logged["craft/conflict_rate"] == sum(int(row["conflict"]) for row in rows[:3]) / 3
    assert logged["craft/lambda"] == float(rows[2]["lambda"])


def test_layers_tasks_and_intervals_are_resumed_exactly(train, inputs, tmp_path):
    """ε falls from 100 to 0.1 in two steps: slack in step 0, whose interval doubles, violated in step 2."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    flags = ["--craft.surgery_scope=layer", "--craft.multiplier_scope=task", "--craft.retention_scale=freq"]
    flags += ["--craft.retention_freq=1", "--craft.retention_freq_max=8", "--craft.lambda_lr=0.3"]
    flags += ["--craft.epsilon_start=100", "--craft.epsilon_decay_steps=2", "--craft.initial_lambda=5"]
    ended = train(whole, *inputs.craft_flags(), *flags, "--save_freq=2")
    assert ended.status == 0, ended.errors
    assert "a retention step every 1 to 8" in ended.output
    resume_after_2_steps(train, whole, run)
    assert untimed(run) == untimed(whole)

    with (whole / "final" / "lambda_history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 3, 4]
    tasks = AnchorCache.open(inputs.anchors).tasks
    for task in tasks:
        *_, second, third = (float(row[f"lambda/{task}"]) for row in rows)
        violation = float(rows[1][f"retention_loss/{task}"]) - float(rows[1][f"epsilon/{task}"])
        assert third == pytest.approx(min(10.0, second + 0.3 * violation))
    last = [row for row in metrics(whole) if "train/loss" in row][-1]
    assert [last[f"craft/lambda/{task}"] for task in tasks] == [
        float(rows[2][f"lambda/{task}"]) for task in tasks
    ]
    assert last["craft/lambda"] == pytest.approx(sum(last[f"craft/lambda/{task}"] for task in tasks) / 2)
    assert len({last[f"craft/retention_loss/{task}"] for task in tasks}) == 2
    assert last["craft/retention_interval"] == 1
    assert 0.0 <= last["craft/layer_conflict"] <= 1.0


def test_bf16_trains_with_fp32_masters(train, inputs, tmp_path):
    assert train(tmp_path / "run", "--engine.dtype=bfloat16", "--steps=2").status == 0
    weights = trained(tmp_path / "run" / "final")
    assert all(t.dtype == torch.float32 for t in weights.values() if t.is_floating_point())
    assert_trained(tmp_path / "run" / "final", inputs.policy)


def test_workers_give_the_same_run(train, inputs, tmp_path):
    assert train(tmp_path / "none", "--steps=2").status == 0
    workers = ["--num_workers=1", "--dataloader_multiprocessing_context=fork"]
    assert train(tmp_path / "one", "--steps=2", *workers).status == 0
    assert_same_bits(tmp_path / "one" / "final", tmp_path / "none" / "final")


def test_without_checkpoints_only_the_metrics_are_written(train, tmp_path):
    assert train(tmp_path / "run", "--save_checkpoint=false", "--save_freq=1", "--steps=2").status == 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_wandb_offline_holds_the_documented_keys(train, inputs, tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    ended = train(
        tmp_path / "run",
        *inputs.craft_flags(),
        "--steps=2",
        "--wandb.enable=true",
        "--wandb.mode=offline",
        "--wandb.project=craft",
    )
    assert ended.status == 0, ended.errors
    [file] = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30
    while len(content := file.read_bytes()) < 100 and time.monotonic() < deadline:
        time.sleep(0.05)  # wandb's own process writes the file a moment after `finish`
    for key in ("loss", "grad_norm", "lr"):
        assert f"train/{key}".encode() in content
    for key in ("retention_loss", "lambda", "epsilon", "grad_conflict", "grad_dot", "grad_cos"):
        assert f"craft/{key}".encode() in content


def test_divergence_ends_with_one_line(train, tmp_path):
    flags = ["--policy.optimizer_lr=1e30", "--policy.scheduler_decay_lr=1e30", "--steps=20"]
    ended = train(tmp_path / "run", *flags, "--save_freq=1", "--max_skipped_steps=2")
    assert ended.status == 1
    assert ended.errors.startswith("error: 3 steps in a row")
    assert ended.errors.count("\n") == 1
    skipped = [line for line in ended.output.splitlines() if "skipped, non-finite" in line]
    assert len(skipped) == 3
    dump = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert [json.loads(line.split(": ", 1)[1]) for line in skipped] == dump["skipped"]
    assert all(seen["loss"] == "nan" and len(seen["samples"]) == 2 for seen in dump["skipped"])
    assert dump["config"]["steps"] == 20
    assert not (tmp_path / "run" / "final").exists()


class Stopped(KeyboardInterrupt):
    pass


def test_an_interrupted_save_keeps_the_last_checkpoint(train, inputs, whole_run, tmp_path, monkeypatch):
    from craft_ds.checkpoints.save import PendingCheckpoint

    run = tmp_path / "run"
    writes = PendingCheckpoint._write_shards

    def stop_at_the_second(save) -> None:
        writes(save)
        if save.directory.name == "step_000002":
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(PendingCheckpoint, "_write_shards", stop_at_the_second)
        ended = train(run, *inputs.craft_flags(), "--save_freq=1")
    assert (ended.status, ended.errors) == (130, "interrupted\n")
    assert (run / "last").resolve() == run / "step_000001"
    assert not (run / "step_000002").exists()

    assert train(None, f"--config_path={run}/last/train_config.json", "--resume=true").status == 0
    assert train(tmp_path / "unbroken", *inputs.craft_flags(), "--save_freq=1").status == 0
    assert_same_bits(run / "final", tmp_path / "unbroken" / "final")

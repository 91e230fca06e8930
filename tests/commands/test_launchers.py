"""`deepspeed` and `torchrun` with `scripts/train_craft.py` for real: two ranks, without GPUs too."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import assert_same_bits, assert_trained, losses, metrics

from craft_ds.anchors.cache import read_metadata
from craft_ds.checkpoints import read_manifest
from craft_ds.testing.datasets import edit_metadata, make_test_dataset

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
ZERO3 = ROOT / "ds_configs" / "zero3.json"
RUN = [
    "--gradient_accumulation_steps=2",
    "--save_freq=2",
    "--eval_freq=2",
    "--dataset.eval_split=0.25",
]


# How two ranks of each engine are launched from the repository's root, as the README has it.
LAUNCHERS = {
    "zero": ["deepspeed", "--num_gpus", "2", "--master_port"],
    "fsdp": ["torchrun", "--nproc-per-node", "2", "--master-port"],
}
ENGINE = {"zero": ["--ds_config", str(ZERO3)], "fsdp": ["--engine=fsdp"]}
OTHER = {"zero": "fsdp", "fsdp": "zero"}


def launch(engine: str, *flags: object) -> subprocess.CompletedProcess:
    """Two ranks of an engine's own launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    binaries = Path(sys.executable).parent
    launcher, *options = LAUNCHERS[engine]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
    }
    if torch.cuda.device_count() < 2:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        [str(part) for part in (binaries / launcher, *options, port, "scripts/train_craft.py", *flags)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


# torchrun has tests of its own: signals, restarts, hosts.
@pytest.fixture(scope="module", params=["zero", pytest.param("fsdp", marks=pytest.mark.sample(0))])
def engine(request):
    return request.param


@pytest.fixture(scope="module")
def whole_run(engine, inputs, tmp_path_factory):
    """An uninterrupted CRaFT run of 4 steps: accumulation, evaluation, a checkpoint after 2."""
    output = tmp_path_factory.mktemp(engine) / "complete"
    ended = launch(engine, *ENGINE[engine], *inputs.flags(output), *inputs.craft_flags(), *RUN)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return output, ended


def test_the_run_is_complete(engine, whole_run, inputs):
    output, ended = whole_run
    assert sorted(path.name for path in output.iterdir()) == ["final", "last", "metrics.jsonl", "step_000002"]
    assert read_manifest(output / "final")["world_size"] == 2
    assert_trained(output / "final", inputs.policy)
    assert len([line for line in ended.stdout.splitlines() if line.startswith("Step 4/4 | loss")]) == 1
    assert f"{engine} engine on 2 ranks" in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr


def test_losses_are_those_of_one_process(whole_run, inputs, train, tmp_path):
    output, _ = whole_run
    flags = [*inputs.craft_flags(), *RUN, "--batch_size=4", "--craft.anchor_batch_size=4"]
    assert train(tmp_path / "single", *flags).status == 0
    one, two = measured(tmp_path / "single"), measured(output)
    assert len(one) == 7  # 4 steps, 2 evaluations, the last λ
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


def measured(run: Path) -> list[dict]:
    """The logged rows without time and memory."""
    rows = [{key: row[key] for key in row if key[:4] not in ("time", "memo")} for row in metrics(run)]
    return [row for row in rows if len(row) > 1]


@pytest.mark.sample(1)
def test_resume_is_the_uninterrupted_run_bit_by_bit(engine, whole_run, tmp_path):
    output, _ = whole_run
    config = f"--config_path={output}/step_000002/train_config.json"
    ended = launch(engine, config, "--resume=true", f"--output_dir={tmp_path}/on")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert_same_bits(tmp_path / "on" / "final", output / "final")
    assert losses(tmp_path / "on") == losses(output)[2:]


@pytest.mark.sample(1)
def test_a_run_resumes_in_the_other_engine(engine, whole_run, tmp_path):
    output, _ = whole_run
    other = OTHER[engine]
    flags = [f"--engine={other}", f"--ds_config={ZERO3 if other == 'zero' else 'null'}"]
    config = f"--config_path={output}/step_000002/train_config.json"
    ended = launch(other, config, "--resume=true", f"--output_dir={tmp_path}/on", *flags)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{other} engine on 2 ranks" in ended.stdout
    assert losses(tmp_path / "on") == pytest.approx(losses(output)[2:], abs=1e-5)


@pytest.mark.sample(1)
@pytest.mark.parametrize("flags", ENGINE.values(), ids=ENGINE)
def test_a_sharded_engine_runs_without_a_launcher(inputs, tmp_path, flags):
    """Whatever an earlier launch has left over in the shell."""
    left = {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "no-such-host.invalid", "RANK": ""}
    ended = subprocess.run(
        [sys.executable, "scripts/train_craft.py", *inputs.flags(tmp_path / "run"), "--steps=1", *flags],
        cwd=ROOT,
        env=os.environ | left | {"OMP_NUM_THREADS": "1", "MASTER_PORT": "one"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "engine on 1 rank " in ended.stdout
    assert ended.stderr.startswith("warning: ignored WORLD_SIZE=2, LOCAL_RANK=1, MASTER_ADDR=no-such-host.in")
    assert "--batch_size=2" in inputs.flags(tmp_path)
    assert [row["train/samples_seen"] for row in metrics(tmp_path / "run") if "train/loss" in row] == [2]
    assert_trained(tmp_path / "run" / "final", inputs.policy)


@pytest.mark.sample(1)
def test_the_launcher_reports_bad_input(engine, inputs, tmp_path):
    """A damaged shard, which rank 0 alone reads in full."""
    anchors = tmp_path / "anchors"
    shutil.copytree(inputs.anchors, anchors)
    damage(anchors / "shard_00000.safetensors")
    flags = [*inputs.craft_flags(), f"--craft.anchor_cache_dir={anchors}"]
    ended = launch(engine, *ENGINE[engine], *inputs.flags(tmp_path / "run"), *flags)
    assert ended.returncode != 0
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert f"anchor shard {anchors}/shard_00000.safetensors is damaged" in lines[0]
    assert not (tmp_path / "run").exists()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


BAD_INPUT = {
    "damaged_cache": "anchor shard",
    "other_tokenizer": "tokenizers",
    "more_ranks_than_samples": "has 1 training samples for 2 ranks",
    "more_ranks_than_anchors": "has 0 heldout anchors to measure the constraint",
    "output_exists": "exists already",
    "unknown_flag": "--nonsense=1",
    "contradicting_ds_config": "train_batch_size=3",
    "no_weights": "model.safetensors",
    "no_data": "holds no LeRobot data set",
    "epsilon": "--craft.epsilon_start=0.05",
    "retention_freq": "--craft.retention_freq=0",
    "mesh": "--engine.fsdp.dp_shard=3",
    "fsdp_more_ranks_than_samples": "has 1 training samples for 2 ranks",
}


@pytest.fixture(scope="module")
def bad_input(inputs, fork_server, tmp_path_factory):
    """Every bad input on two ranks, one after the other; a hang would end at the time limit."""
    scratch = tmp_path_factory.mktemp("bad")
    for name in ("damaged", "tokenizer", "few"):
        shutil.copytree(inputs.anchors, scratch / name)
    damage(scratch / "damaged" / "shard_00000.safetensors")
    edit_metadata(scratch / "tokenizer", tokenizer="0" * 64)
    shutil.copytree(inputs.policy, scratch / "policy", ignore=shutil.ignore_patterns("model.safetensors"))
    one = make_test_dataset(scratch / "one", tasks=1, episodes_per_task=1, frames=1)
    ds_config = scratch / "ds.json"
    ds_config.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_batch_size": 3}))
    (scratch / "output_exists").mkdir()
    (scratch / "output_exists" / "precious.txt").write_text("precious")
    dataset = read_metadata(scratch / "few")["dataset"]
    edit_metadata(scratch / "few", dataset={**dataset, "episodes": {"train": [0], "heldout": []}})
    own = {
        "damaged_cache": [f"--craft.anchor_cache_dir={scratch}/damaged"],
        "other_tokenizer": [f"--craft.anchor_cache_dir={scratch}/tokenizer"],
        "more_ranks_than_samples": [f"--dataset.root={one}"],
        "more_ranks_than_anchors": [f"--craft.anchor_cache_dir={scratch}/few"],
        "output_exists": [],
        "unknown_flag": ["--nonsense=1"],
        "contradicting_ds_config": [f"--ds_config={ds_config}"],
        "no_weights": [f"--policy.path={scratch}/policy"],
        "no_data": [f"--dataset.root={scratch}/none"],
        "epsilon": ["--craft.epsilon_start=0.05"],
        "retention_freq": ["--craft.retention_freq=0"],
        "mesh": ["--engine=fsdp", "--ds_config=null", "--engine.fsdp.dp_shard=3"],
        "fsdp_more_ranks_than_samples": ["--engine=fsdp", "--ds_config=null", f"--dataset.root={one}"],
    }
    commands = {
        name: [*inputs.flags(scratch / name), *inputs.craft_flags(), f"--ds_config={ZERO3}", *flags]
        for name, flags in own.items()
    }
    (scratch / "commands.json").write_text(json.dumps(commands))
    program = Path(__file__).with_name("training_ranks.py")
    fork_server.run([scratch / "commands.json", scratch], 2, program=program, timeout=240).check()
    return scratch, [json.loads((scratch / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_all_ranks_with_one_line(bad_input, name):
    scratch, ranks = bad_input
    assert [rank[name]["status"] for rank in ranks] == [2, 2]
    main, other = (rank[name]["errors"] for rank in ranks)
    assert main.startswith("error: ")
    assert main.count("\n") == 1
    assert BAD_INPUT[name] in main
    assert other == ""
    if name == "output_exists":
        assert [path.name for path in (scratch / name).iterdir()] == ["precious.txt"]
    else:
        assert not (scratch / name).exists()

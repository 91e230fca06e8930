"""Bad input to `craft-ds train`: one line that names the flag or file, status 2, nothing touched."""

import json
import shutil

import pytest

from craft_ds.testing.datasets import edit_metadata, make_test_dataset
from craft_ds.testing.policies import make_test_policy_dir


@pytest.fixture
def run(tmp_path):
    """The output directory of a run that must not start."""
    return tmp_path / "run"


@pytest.fixture
def anchors(inputs, tmp_path):
    """A copy of the cache, to be damaged."""
    copy = tmp_path / "anchors"
    shutil.copytree(inputs.anchors, copy)
    return copy


@pytest.fixture(scope="module")
def two_cameras(tmp_path_factory):
    """A policy with a second camera."""
    return make_test_policy_dir(tmp_path_factory.mktemp("two") / "policy", cameras=2)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


# --- flags ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--nonsense=1"], ["--nonsense=1"]),
        (["--craft.nonsense=1"], ["--craft.nonsense=1"]),
        (["--policy.nonsense=1"], ["--policy.nonsense=1"]),
        (["--steps=abc"], ["--steps", "abc"]),
        (["--steps=0"], ["--steps=0"]),
        (["--batch_size=0"], ["--batch_size=0"]),
        (["--config_path=missing.json"], ["--config_path=missing.json"]),
        (["--engine=ddp"], ["--engine=ddp", "fsdp"]),
        (["--engine=fsdp", "--engine.fsdp.dp_shard=2"], ["--engine.fsdp.dp_shard=2"]),
        (["--engine.fsdp.dp_replicate=2"], ["--engine.fsdp", "--engine=single"]),
        (["--activation_checkpointing=some"], ["--activation_checkpointing=some", "full"]),
        (["--world.name=metaworld"], ["--world.name=metaworld", "--eval_freq"]),
        (["--world.name=moon", "--eval_freq=2"], ["--world.name=moon", "blocks"]),
        (["--engine=zero"], ["--ds_config"]),
        (["--env.type=pusht"], ["--env"]),
        (["--optimizer.type=adamw"], ["--optimizer", "--policy.optimizer_"]),
        (["--resume=true"], ["--resume=true", "holds no complete checkpoint"]),
        (["--resume=auto", "--output_dir="], ["--resume=auto", "--output_dir"]),
        (["--checkpoint.layout=zip"], ["--checkpoint.layout=zip", "per_rank"]),
        (["--max_runtime=soon"], ["--max_runtime=soon", "30m"]),
        (["--save_total_limit=-1"], ["--save_total_limit=-1"]),
        (["--rank_timeout=0"], ["--rank_timeout=0"]),
        (["--wandb.enable=true", "--wandb.mode=ofline"], ["--wandb.mode=ofline"]),
        (["--log_to=wandb,mlflow"], ["--log_to=mlflow", "wandb, tensorboard, trackio"]),
    ],
)
def test_a_bad_flag_is_named(refuses, run, flags, names):
    line = refuses(run, *flags)
    assert all(name in line for name in names), line


def test_a_tracker_that_is_not_installed_before_the_data_set_is_opened(refuses, run, monkeypatch):
    monkeypatch.setattr("craft_ds.training.trackers.find_spec", lambda _: None)
    monkeypatch.setattr("craft_ds.training.open_data.load_datasets", None)
    line = refuses(run, "--log_to=trackio")
    assert "--log_to=trackio" in line
    assert "pip install trackio" in line


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--craft.epsilon_start=0.05"], ["--craft.epsilon_start=0.05", "--craft.epsilon_end=0.1"]),
        (["--craft.retention_freq=0"], ["--craft.retention_freq=0"]),
        (["--craft.anchor_batch_size=0"], ["--craft.anchor_batch_size=0"]),
        (["--craft.anchor_cache_dir="], ["--craft.anchor_cache_dir"]),
        (["--craft.projection_mode=sum"], ["--craft.projection_mode=sum"]),
        (["--craft.gradient_buffer=disk"], ["--craft.gradient_buffer=disk", "device, bf16, cpu"]),
        (
            ["--craft.gradient_buffer=bf16", "--craft.use_grad_projection=false"],
            ["--craft.gradient_buffer=bf16", "--craft.use_grad_projection=false"],
        ),
        (
            ["--craft.gradient_buffer=cpu", "--engine=fsdp", "--engine.fsdp.cpu_offload=true"],
            ["--craft.gradient_buffer=cpu", "--engine.fsdp.cpu_offload=true"],
        ),
        (
            ["--craft.gradient_buffer=bf16", "--ds_config=zero3_offload"],
            ["--craft.gradient_buffer=bf16", "offload_optimizer"],
        ),
    ],
)
def test_a_bad_craft_flag_is_named(refuses, inputs, run, flags, names):
    line = refuses(run, *inputs.craft_flags(), *flags)
    assert all(name in line for name in names), line


def test_an_output_directory_that_exists(refuses, run):
    run.mkdir()
    (run / "precious.txt").write_text("precious")
    assert f"--output_dir={run} exists already" in refuses(run)


def test_an_output_directory_that_cannot_be_made(refuses, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"--output_dir={tmp_path}/file/run" in refuses(tmp_path / "file" / "run")


# --- DeepSpeed's file, as far as it can be checked without ranks ------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (None, ["no such file"]),
        ("{", ["not readable as JSON"]),
        (
            '{"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 64}',
            ["=64", "--batch_size=2"],
        ),
        ('{"zero_optimization": {"stage": 3}, "optimizer": {"type": "Adam"}}', ["'optimizer'"]),
        (
            '{"zero_optimization": {"stage": 3}, "bf16": {"enabled": true}}',
            ["bf16", "--engine.dtype=float32"],
        ),
    ],
)
def test_a_contradicting_ds_config(refuses, run, tmp_path, text, names):
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    line = refuses(run, "--ds_config", path)
    assert all(name in line for name in [f"--ds_config={path}", *names]), line


def test_processes_without_an_engine_that_shards(refuses, run, set_launch):
    set_launch(0, 2)
    line = refuses(run, "--engine=single")
    assert "2 processes were launched, but --engine=single" in line


# --- the policy -------------------------------------------------------------------------------------------


def test_a_missing_policy_path(refuses, run, tmp_path):
    line = refuses(run, f"--policy.path={tmp_path}/none/at/all")
    assert f"{tmp_path}/none/at/all" in line


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.safetensors", "model.safetensors"),
        ("config.json", "config.json is missing"),
        ("policy_preprocessor.json", "policy_preprocessor.json is missing"),
    ],
)
def test_a_policy_path_without_a_file(refuses, inputs, run, tmp_path, name, reason):
    policy = tmp_path / "policy"
    shutil.copytree(inputs.policy, policy)
    (policy / name).unlink()
    line = refuses(run, f"--policy.path={policy}")
    assert reason in line
    assert str(policy) in line


def test_damaged_weights(refuses, inputs, run, tmp_path):
    policy = tmp_path / "policy"
    shutil.copytree(inputs.policy, policy)
    weights = policy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert str(weights) in refuses(run, f"--policy.path={policy}")


def test_a_hub_policy_without_a_network(refuses, run, monkeypatch):
    from craft_ds.policies import loading

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known\nand more")

    monkeypatch.setattr(loading, "snapshot_download", unreachable)
    assert "lerobot/none" in refuses(run, "--policy.path=lerobot/none")


# --- the data set -----------------------------------------------------------------------------------------


def test_a_missing_data_set(refuses, run, tmp_path):
    assert f"--dataset.root={tmp_path}/none" in refuses(run, f"--dataset.root={tmp_path}/none")


def test_a_data_set_without_the_policys_cameras(refuses, run, two_cameras):
    line = refuses(run, f"--policy.path={two_cameras}")
    assert "lacks the policy's camera observation.images.side1" in line
    assert "--dataset.repo_id=craft-ds/test" in line


def test_a_data_set_of_another_robot(refuses, run, tmp_path):
    root = make_test_dataset(tmp_path / "six", tasks=1, episodes_per_task=1, frames=3, action_dim=6)
    line = refuses(run, f"--dataset.root={root}")
    assert "action has 6 entries (x0, x1, x2, x3, x4, x5), the policy takes 4" in line


def test_too_few_episodes_to_hold_out(refuses, run):
    line = refuses(run, "--eval_freq=1", "--dataset.episodes=[0]")
    assert "eval_split=0.05 leaves 0 training episodes" in line


# --- the anchor cache -------------------------------------------------------------------------------------


def test_a_missing_anchor_cache(refuses, inputs, run, tmp_path):
    line = refuses(run, *inputs.craft_flags(), f"--craft.anchor_cache_dir={tmp_path}/none")
    assert f"no anchor cache at {tmp_path}/none" in line
    assert "craft-ds anchors" in line


@pytest.mark.parametrize("name", ["metadata.json", "shard_00000.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_anchor_cache(refuses, inputs, run, anchors, name, damage):
    flip_a_byte(anchors / name) if damage == "flip" else (anchors / name).unlink()
    line = refuses(run, *inputs.craft_flags(), f"--craft.anchor_cache_dir={anchors}")
    assert str(anchors) in line
    assert "build" in line


def test_a_cache_of_another_tokenizer(refuses, inputs, run, anchors):
    edit_metadata(anchors, tokenizer="0" * 64)
    line = refuses(run, *inputs.craft_flags(), f"--craft.anchor_cache_dir={anchors}")
    assert f"anchor cache {anchors}" in line
    assert "tokenizers 000000000000 in the cache" in line


def test_a_cache_of_another_camera_set(refuses, inputs, run, two_cameras, tmp_path):
    root = make_test_dataset(
        tmp_path / "both", tasks=1, episodes_per_task=1, frames=3, cameras=("top", "side1")
    )
    line = refuses(run, *inputs.craft_flags(), f"--policy.path={two_cameras}", f"--dataset.root={root}")
    assert f"anchor cache {inputs.anchors}" in line
    assert "cameras ['observation.images.top'] in the cache" in line


# --- resuming ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A run of 2 steps with a checkpoint after 1."""
    from craft_ds.config.parser import parse_arguments
    from craft_ds.training.trainer import train_craft

    output = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.argv", ["train_craft.py"])
        train_craft(parse_arguments([*inputs.flags(output), "--steps=2", "--save_freq=1"]))
    return output


@pytest.fixture
def resume(refuses, finished, tmp_path):
    """Refuse to resume a copy of the finished run, after `change` modified it."""

    def resume(checkpoint: str, change, *flags: str) -> str:
        copy = tmp_path / "copy"
        shutil.copytree(finished, copy, symlinks=True)
        change(copy)
        path = copy / checkpoint / "train_config.json"
        return refuses(
            None, f"--config_path={path}", "--resume=true", f"--output_dir={copy}", *flags, untouched=copy
        )

    return resume


def nothing(_: object) -> None:
    pass


def test_resuming_a_finished_run(resume):
    line = resume("final", nothing)
    assert "has done 2 of --steps=2" in line


@pytest.mark.parametrize("later", ["final", "step_000002"])
def test_resuming_would_overwrite_a_later_checkpoint(resume, later):
    def change(run):
        (run / "final").rename(run / later)

    line = resume("step_000001", change)
    assert "resuming at step 1 would overwrite" in line
    assert f"copy/{later}:" in line


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "scheduler.pt"])
def test_resuming_from_a_damaged_checkpoint(resume, name):
    def change(run):
        shutil.rmtree(run / "final")
        flip_a_byte(run / "step_000001" / name)

    line = resume("step_000001", change)
    assert f"step_000001/{name} is damaged" in line


def test_resuming_from_a_directory_that_is_not_a_checkpoint(resume):
    def change(run):
        shutil.rmtree(run / "final")
        (run / "step_000001" / "manifest.json").unlink()

    assert "step_000001 is not a craft-ds checkpoint" in resume("step_000001", change)


def test_a_checkpoint_of_another_format(resume):
    def change(run):
        shutil.rmtree(run / "final")
        path = run / "step_000001" / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))

    assert "format version 99" in resume("step_000001", change)

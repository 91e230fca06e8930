"""`scripts/train_craft.py --lora…`: runs with adapters, their checkpoints, loading, and refusals."""

import json
import shutil
import sys

import peft
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.policies.factory import make_policy
from runs import assert_same_bits_of_adapters, losses
from safetensors.torch import load_file

from craft_ds import train_craft
from craft_ds.lora.weights import load_trained_policy
from craft_ds.policies.loading import load_policy, load_policy_config, load_processors
from craft_ds.policies.pi0_fast.generation import action_chunk
from craft_ds.testing.checkpoints import renew_manifest
from craft_ds.testing.policies import random_batch

pytestmark = pytest.mark.slow

LORA = ["--lora=preset", "--lora.rank=4", "--policy.optimizer_lr=0.01", "--policy.scheduler_warmup_steps=0"]


@pytest.fixture(scope="module")
def whole_run(inputs, tmp_path_factory):
    """An uninterrupted CRaFT run of 4 steps on adapters, with a checkpoint after 2."""
    from craft_ds.config.parser import parse_arguments

    output = tmp_path_factory.mktemp("runs") / "complete"
    flags = [*inputs.flags(output), *inputs.craft_flags(), *LORA, "--save_freq=2"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["train_craft.py"])
        train_craft(parse_arguments(flags))
    return output


def test_a_checkpoint_holds_adapters_and_nothing_of_the_base(whole_run, inputs):
    for name in ("step_000002", "final"):
        checkpoint = whole_run / name
        assert not list(checkpoint.glob("model*.safetensors"))
        adapters = load_file(checkpoint / "adapter_model.safetensors")
        assert len(adapters) == 28
        assert all(tensor.any() for tensor in adapters.values())
        moments = load_file(checkpoint / "optimizer.safetensors")
        assert moments.keys() == {f"{key}.{m}" for key in adapters for m in ("exp_avg", "exp_avg_sq")}
        assert json.loads((checkpoint / "config.json").read_text())["use_peft"] is True
        config = json.loads((checkpoint / "adapter_config.json").read_text())
        assert (config["r"], config["base_model_name_or_path"]) == (4, str(inputs.policy))
    assert load_file(whole_run / "step_000002" / "adapter_model.safetensors").keys() == adapters.keys()


def test_lerobot_loads_a_checkpoint(whole_run, inputs):
    """As `lerobot-eval --policy.path=…` does."""
    final = whole_run / "final"
    config = PreTrainedConfig.from_pretrained(final)
    config.pretrained_path, config.device = final, "cpu"
    meta = LeRobotDatasetMetadata("craft-ds/test", root=inputs.new)
    policy = make_policy(cfg=config, ds_meta=meta).eval()
    assert isinstance(policy, peft.PeftModel)
    ours = load_trained_policy(load_policy_config(final), final)
    plain = load_policy(load_policy_config(inputs.policy), inputs.policy)
    batch = random_batch(ours.config, 3, seed=0)
    with torch.no_grad():
        (theirs, _), (expected, _), (before, _) = (each.forward(batch) for each in (policy, ours, plain))
    torch.testing.assert_close(theirs, expected)
    assert abs(before - theirs) > 1e-4
    base = {name.replace("base_layer.", ""): p for name, p in policy.get_base_model().named_parameters()}
    for name, parameter in plain.named_parameters():
        assert torch.equal(base[name], parameter), name


def test_the_actions_of_a_checkpoint_are_decoded(whole_run):
    final = whole_run / "final"
    config = load_policy_config(final)
    policy, (_, postprocessor) = load_trained_policy(config, final), load_processors(config, final)
    chunk = postprocessor(action_chunk(policy, random_batch(config, 2, seed=0)))
    assert chunk.shape == (2, config.n_action_steps, 4)
    assert chunk.isfinite().all()


def resume(train, checkpoint, output, *flags):
    return train(
        None,
        f"--config_path={checkpoint}/train_config.json",
        "--resume=true",
        f"--output_dir={output}",
        *flags,
    )


def test_resuming_is_the_uninterrupted_run_bit_by_bit(train, whole_run, tmp_path):
    ended = resume(train, whole_run / "step_000002", tmp_path / "on")
    assert ended.status == 0, ended.errors
    assert_same_bits_of_adapters(tmp_path / "on" / "final", whole_run / "final")
    assert losses(tmp_path / "on") == losses(whole_run)[2:]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora.enabled=false"], "--lora.* has no effect without adapters"),
        (["--lora.rank=8"], "--lora.rank=8, but the adapters in"),
        (["--lora.alpha=4"], "were trained with 16: set --lora.alpha to that"),
        (["--lora=attention"], "--lora.preset=attention, but"),
        (["--lora.use_dora=true"], "--lora.use_dora=True, but"),
        (['--lora.modules_to_save=["lm_head"]'], "--lora.modules_to_save=['lm_head'], but"),
        (["--peft.r=4"], "--lora.* and --peft.* both describe adapters"),
    ],
)
def test_resuming_other_adapters_is_refused(refuses, whole_run, tmp_path, flags, message):
    config = f"--config_path={whole_run}/step_000002/train_config.json"
    assert message in refuses(
        None, config, "--resume=true", f"--output_dir={tmp_path}/on", *flags, untouched=whole_run
    )
    assert not (tmp_path / "on").exists()


def test_resuming_adapters_without_lora_is_refused(refuses, whole_run, tmp_path):
    """Resume with a configuration without LoRA flags, such as LeRobot's own."""
    copy = tmp_path / "run" / "step_000002"
    shutil.copytree(whole_run / "step_000002", copy)
    config = json.loads((copy / "train_config.json").read_text())
    del config["lora"]
    (copy / "train_config.json").write_text(json.dumps(config))
    renew_manifest(copy)
    message = refuses(
        None, f"--config_path={copy}/train_config.json", "--resume=true", f"--output_dir={tmp_path}/on"
    )
    assert "holds LoRA adapters (rank 4), but --lora.enabled=false" in message


def test_resuming_full_training_with_lora_is_refused(train, refuses, inputs, tmp_path):
    assert train(tmp_path / "full", "--save_freq=2").status == 0
    config = f"--config_path={tmp_path}/full/step_000002/train_config.json"
    message = refuses(None, config, "--resume=true", f"--output_dir={tmp_path}/on", "--lora=preset")
    assert "--lora.enabled=true, but" in message
    assert "is a checkpoint of full training" in message


def test_a_new_run_starts_with_stored_adapters(train, refuses, whole_run, tmp_path):
    final = whole_run / "final"
    assert "holds LoRA adapters" in refuses(tmp_path / "a", f"--policy.path={final}")
    ended = train(
        tmp_path / "b",
        f"--policy.path={final}",
        *LORA[:2],
        "--policy.optimizer_lr=1e-30",
        "--policy.scheduler_decay_lr=1e-31",
    )
    assert ended.status == 0, ended.errors
    interrupted, ended_with = (
        load_file(directory / "adapter_model.safetensors") for directory in (final, tmp_path / "b" / "final")
    )
    for key, tensor in interrupted.items():
        assert torch.equal(ended_with[key], tensor), key


@pytest.mark.parametrize(
    ("flags", "rank", "alpha", "count"),
    [
        (["--lora.enabled=true"], 8, 16, 28),
        (["--lora=attention"], 8, 16, 16),
        (["--lora", "attention_mlp_vision", "--lora.rank=2"], 2, 16, 40),
        (["--peft.r=4"], 4, 8, 28),
        (["--peft.target_modules=['q_proj', 'fc1']", "--peft.lora_alpha=32"], 16, 32, 8),
    ],
)
def test_flags_of_both_kinds(train, tmp_path, flags, rank, alpha, count):
    ended = train(tmp_path / "run", "--steps=1", *flags)
    assert ended.status == 0, ended.errors
    assert f"of them train (LoRA of rank {rank})" in ended.output
    config = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, alpha)
    assert len(load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")) == count


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora.rank=4"], "add --lora.enabled=true"),
        (["--lora=nonsense"], "--lora.preset=nonsense is unknown"),
        (["--lora=preset", "--lora.target_modules=nothing"], "--lora.target_modules=nothing"),
        (["--lora=preset", "--peft.r=4"], "both describe adapters"),
        (["--peft.method_type=MISS"], "--peft.method_type=MISS is not supported"),
    ],
)
def test_bad_flags_are_one_line(refuses, tmp_path, flags, message):
    assert message in refuses(tmp_path / "run", *flags)


def test_evaluation_and_bf16(train, tmp_path):
    ended = train(
        tmp_path / "run", *LORA, "--engine.dtype=bfloat16", "--eval_freq=2", "--dataset.eval_split=0.25"
    )
    assert ended.status == 0, ended.errors
    adapters = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapters.values()} == {torch.float32}

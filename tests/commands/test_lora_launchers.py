"""The LoRA presets as files, under their own launchers: two ranks train, and resume in the other engine."""

import subprocess
from pathlib import Path

import pytest
import yaml
from runs import assert_same_bits_of_adapters, losses
from safetensors.torch import load_file
from test_launchers import ROOT, launch

from craft_ds.checkpoints import read_manifest
from craft_ds.config.configs import LoraConfig
from craft_ds.engines.deepspeed_config import read_ds_config

pytestmark = pytest.mark.distributed

PRESET = {
    "fsdp": ["--config_path=fsdp_configs/lora.yaml"],
    "zero": [
        "--ds_config=ds_configs/zero3_lora.json",
        "--engine.dtype=bfloat16",
        "--lora=preset",
        "--activation_checkpointing=full",
    ],
}
SWITCH = {
    "fsdp": ["--engine=zero", "--ds_config=ds_configs/zero3_lora.json"],
    "zero": ["--engine=fsdp", "--ds_config=null"],
}
OTHER = {"fsdp": "zero", "zero": "fsdp"}


@pytest.fixture(scope="module", params=[pytest.param("zero", marks=pytest.mark.sample(0)), "fsdp"])
def engine(request):
    return request.param


@pytest.fixture(scope="module")
def whole_run(engine, inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp(f"lora_{engine}") / "complete"
    flags = [*inputs.flags(output), *inputs.craft_flags(), "--save_freq=2", "--policy.optimizer_lr=0.01"]
    ended = launch(engine, *PRESET[engine], *flags)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "train (LoRA of rank 8)" in ended.stdout
    return output


def resume(engine, run, output, *flags):
    config = f"--config_path={run}/step_000002/train_config.json"
    ended = launch(engine, config, "--resume=true", f"--output_dir={output}", *flags)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return output / "final"


def test_the_run_saves_adapters(engine, whole_run):
    assert read_manifest(whole_run / "final")["world_size"] == 2
    adapters = load_file(whole_run / "final" / "adapter_model.safetensors")
    assert len(adapters) == 28
    assert all(tensor.any() for tensor in adapters.values())


@pytest.mark.sample(0)
def test_resume_is_the_uninterrupted_run_bit_by_bit(engine, whole_run, tmp_path):
    final = resume(engine, whole_run, tmp_path / "on")
    assert_same_bits_of_adapters(final, whole_run / "final")
    assert losses(tmp_path / "on") == losses(whole_run)[2:]


@pytest.mark.sample(0)
def test_a_run_resumes_in_the_other_engine(engine, whole_run, tmp_path):
    resume(OTHER[engine], whole_run, tmp_path / "on", *SWITCH[engine])
    # Both compute in bf16, each in an order of its own.
    assert losses(tmp_path / "on") == pytest.approx(losses(whole_run)[2:], rel=2e-3)


def test_both_files_are_the_same_preset():
    """The FSDP2 file has the default adapters; both files mean bf16."""
    content = yaml.safe_load((ROOT / "fsdp_configs" / "lora.yaml").read_text())
    named = {"attention_mlp": "default"}
    lora = content["lora"] | {"preset": named[content["lora"]["preset"]]}
    assert LoraConfig(**lora) == LoraConfig(enabled=True)
    assert content["engine"]["dtype"] == "bfloat16"
    assert read_ds_config(ROOT / "ds_configs" / "zero3_lora.json")["bf16"] == {"enabled": True}


@pytest.mark.sample(0)
def test_the_script_passes_the_users_flags_on(inputs, tmp_path):
    """One rank, so that it runs anywhere; the user's flags come last and win."""
    output: Path = tmp_path / "run"
    flags = [*inputs.flags(output), *inputs.craft_flags(), "--steps=1", "--eval_freq=0"]
    ended = subprocess.run(
        ["env", "NPROC=1", "bash", "scripts/train_craft_lora.sh", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "fsdp engine on 1 rank (cpu, bfloat16)" in ended.stdout
    assert (output / "final" / "adapter_model.safetensors").is_file()

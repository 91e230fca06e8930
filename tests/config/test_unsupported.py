"""Every flag that the parser accepts is honoured, or refused by name with what to use instead."""

import dataclasses
from collections.abc import Iterator
from typing import get_args, get_type_hints

import pytest
from lerobot.configs.train import TrainPipelineConfig

from craft_ds.config.parser import parse_arguments
from craft_ds.config.unsupported import UNSUPPORTED
from craft_ds.errors import UserError

# Flags of LeRobot that act here as in `lerobot-train`. A new flag of LeRobot belongs here once it does, or
# into UNSUPPORTED.
HONOURED = set(
    [
        "dataset.repo_id",
        "dataset.root",
        "dataset.episodes",
        "dataset.revision",
        "dataset.use_imagenet_stats",
        "dataset.video_backend",
        "dataset.return_uint8",
        "dataset.depth_output_unit",
        "dataset.eval_split",
        "dataset.image_transforms.enable",
        "dataset.image_transforms.max_num_transforms",
        "dataset.image_transforms.random_order",
        "dataset.image_transforms.tfs",
        "policy",
        "optimizer",
        "scheduler",
        "output_dir",
        "job_name",
        "resume",
        "seed",
        "cudnn_deterministic",
        "num_workers",
        "batch_size",
        "prefetch_factor",
        "dataloader_multiprocessing_context",
        "steps",
        "log_freq",
        "eval_steps",
        "max_eval_samples",
        "tolerance_s",
        "save_checkpoint",
        "save_freq",
        "use_policy_training_preset",
        "rename_map",
        "wandb.enable",
        "wandb.project",
        "wandb.entity",
        "wandb.notes",
        "wandb.run_id",
        "wandb.mode",
        "wandb.add_tags",
        "peft.target_modules",
        "peft.full_training_modules",
        "peft.method_type",
        "peft.init_type",
        "peft.r",
        "peft.lora_alpha",
    ]
)
_CHOICES = ("policy", "env", "reward_model", "optimizer", "scheduler", "sample_weighting", "tfs")


def flags(config: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        kinds = [hints[field.name], *get_args(hints[field.name])]
        nested = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        if not field.init:
            continue
        if nested and field.name not in _CHOICES:
            yield from flags(nested[0], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def is_unsupported(name: str) -> bool:
    return any(f"--{name}.".startswith(f"{flag}.") for flag in UNSUPPORTED)


def test_every_flag_of_lerobot_is_honoured_or_refused():
    every = set(flags(TrainPipelineConfig))
    refused = {name for name in every if is_unsupported(name)}
    assert every == HONOURED | refused
    assert not HONOURED & refused


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        ("--env_eval_freq=100", "--world.name"),
        ("--env_eval_freq=20000", "--world.name"),  # LeRobot's default, asked for
        ("--eval.n_episodes=3", "lerobot-eval"),
        ("--eval.batch_size=2", "lerobot-eval"),
        ("--save_checkpoint_to_hub=true", "hf upload"),
        ("--dataset.streaming=true", "download"),
        ("--persistent_workers=false", "as long as the run"),
        ("--job.image=a", "machine that trains"),
        ("--job.target=a10g", "machine that trains"),
        ("--wandb.disable_artifact=false", "no artifact"),
        ("--policy.push_to_hub=true", "hf upload"),
        ("--policy.repo_id=me/policy", "hf upload"),
        ("--policy.private=true", "hf upload"),
        ("--policy.use_amp=true", "--engine.dtype=bfloat16"),
        ("--policy.use_peft=true", "--lora.enabled=true"),
        ("--policy.compile_model=true", "--engine.compile=true compiles the layers"),
        ("--policy.use_relative_actions=true", "statistics"),
        ("--policy.relative_exclude_joints=[]", "statistics"),
        ("--policy.dtype=bfloat16", "--engine.dtype=bfloat16"),
        ("--policy.n_obs_steps=2", "omit it"),
        ("--policy.action_expert_variant=gemma_2b", "omit it"),
        ("--dataset.use_imagenet_stats=false", "--normalization=dataset"),
        ("--craft.lambda_lr=0.1", "--craft.enabled=true"),
    ],
)
def test_a_flag_without_an_effect_is_refused(inputs, tmp_path, flag, instead):
    with pytest.raises(UserError) as raised:
        parse_arguments([*inputs.flags(tmp_path / "run"), flag]).validate()
    assert flag in str(raised.value).replace("'", "") or flag.partition("=")[0] in str(raised.value)
    assert instead in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "flag",
    [
        "--env_eval_freq=0",
        "--persistent_workers=true",
        "--job.target=local",
        "--wandb.disable_artifact=true",
        "--policy.push_to_hub=false",
        "--policy.use_amp=false",
        "--policy.compile_model=false",
        "--policy.dtype=float32",
        "--dataset.streaming=false",
        "--dataset.repo_type=dataset",
    ],
)
def test_a_flag_that_asks_for_what_happens_is_accepted(inputs, tmp_path, flag):
    parse_arguments([*inputs.flags(tmp_path / "run"), flag]).validate()


def test_a_file_is_held_to_the_same(inputs, tmp_path):
    (tmp_path / "run.yaml").write_text("env_eval_freq: 5\n")
    config = parse_arguments([*inputs.flags(tmp_path / "run"), f"--config_path={tmp_path / 'run.yaml'}"])
    with pytest.raises(UserError, match="--env_eval_freq=5 is not supported"):
        config.validate()


# --- paths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a #1", "a: b", "yes", "it's", "[x]", "a{b}", "null "])
def test_any_name_of_a_directory_is_taken_as_it_is(tmp_path, name):
    config = parse_arguments(
        ["--dataset.repo_id=a/b", f"--output_dir={tmp_path / name}", f"--dataset.root={name}"]
    )
    assert (config.output_dir, config.dataset.root) == (tmp_path / name, name)


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse_arguments(["--dataset.repo_id=a/b", "--output_dir=~/run", "--dataset.root", "~/data~1"])
    assert (config.output_dir, config.dataset.root) == (tmp_path / "run", str(tmp_path / "data~1"))


def test_lerobots_form_of_a_pretrained_policy_is_read(inputs, tmp_path):
    flags = [flag for flag in inputs.flags(tmp_path / "run") if not flag.startswith("--policy.path")]
    flags += [
        "--policy.type=tiny_pi0_fast",
        f"--policy.pretrained_path={inputs.policy}",
        "--policy.optimizer_lr=1e-5",
    ]
    config = parse_arguments(flags)
    config.validate()
    assert config.policy.pretrained_path == inputs.policy
    assert (config.policy.text_width, config.policy.optimizer_lr) == (32, 1e-5)  # the policy's own sizes


def test_another_type_than_that_of_the_policy_is_refused(inputs, tmp_path):
    config = parse_arguments([*inputs.flags(tmp_path / "run"), "--policy.type=act"])
    with pytest.raises(UserError, match=r"--policy.type=act, but .* is of type tiny_pi0_fast"):
        config.validate()

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
from lerobot.configs import PreTrainedConfig
from lerobot.configs.default import DatasetConfig

from craft_ds.config.configs import EngineConfig, FsdpConfig, LoraConfig
from craft_ds.config.craft_config import CraftConfig
from craft_ds.config.parser import parse_arguments
from craft_ds.config.train_config import TrainConfig
from craft_ds.errors import UserError
from craft_ds.policies.loading import load_policy_config


@pytest.fixture(autouse=True)
def own_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_craft.py"])


@pytest.fixture
def make(inputs):
    """Make a configuration in Python; `policy__name` sets a field of the policy."""

    def make(**changes) -> TrainConfig:
        policy = load_policy_config(inputs.policy)
        policy.pretrained_path = inputs.policy
        for name in [name for name in changes if name.startswith("policy__")]:
            setattr(policy, name.removeprefix("policy__"), changes.pop(name))
        return TrainConfig(**{"dataset": DatasetConfig("craft-ds/test"), "policy": policy, **changes})

    return make


def test_validation_resolves_defaults_once(make):
    config = make()
    config.validate()
    assert config.engine.name == "single"
    assert config.optimizer == config.policy.get_optimizer_preset()
    assert config.scheduler == config.policy.get_scheduler_preset()
    assert config.policy.push_to_hub is False
    assert config.output_dir.parts[:2] == ("outputs", "train")
    assert config.eval_freq == config.eval_steps == 0
    before = config.to_dict()
    config.validate()
    assert config.to_dict() == before


@pytest.mark.parametrize("name", ["eval_freq", "eval_steps"])
def test_evaluation_needs_a_held_out_part(make, name):
    config = make(**{name: 3})
    config.validate()
    assert config.eval_freq == config.eval_steps == 3
    assert config.dataset.eval_split == 0.05

    config = make(**{name: 3}, dataset=DatasetConfig("craft-ds/test", eval_split=0.2))
    config.validate()
    assert config.dataset.eval_split == 0.2


def test_own_optimizer_and_scheduler_are_used_without_preset(make):
    preset = make().policy.get_optimizer_preset()
    preset.lr = 0.5
    scheduler = make().policy.get_scheduler_preset()
    config = make(optimizer=preset, scheduler=scheduler, use_policy_training_preset=False)
    config.validate()
    assert config.optimizer.lr == 0.5


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "name"),
    [
        ({"lr": 0.0}, {}, "--optimizer.lr=0.0"),
        ({}, {"peak_lr": 0.0}, "--scheduler.peak_lr=0.0"),
        ({}, {"num_decay_steps": 0}, "--scheduler.num_decay_steps=0"),
    ],
)
def test_own_rates_that_are_zero_are_refused(make, optimizer, scheduler, name):
    policy = make().policy
    config = make(
        optimizer=dataclasses.replace(policy.get_optimizer_preset(), **optimizer),
        scheduler=dataclasses.replace(policy.get_scheduler_preset(), **scheduler),
        use_policy_training_preset=False,
    )
    with pytest.raises(UserError, match=name):
        config.validate()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"steps": 0}, ["--steps=0"]),
        ({"batch_size": 0}, ["--batch_size=0"]),
        ({"gradient_accumulation_steps": 0}, ["--gradient_accumulation_steps=0"]),
        ({"num_workers": -1}, ["--num_workers=-1"]),
        ({"policy__optimizer_lr": 0.0}, ["--policy.optimizer_lr=0.0"]),
        ({"policy__optimizer_lr": -1e-4}, ["--policy.optimizer_lr=-0.0001"]),
        ({"policy__scheduler_decay_steps": 0}, ["--policy.scheduler_decay_steps=0"]),
        ({"eval_freq": 2, "eval_steps": 3}, ["--eval_freq=2", "--eval_steps=3"]),
        ({"save_checkpoint_to_hub": True}, ["--save_checkpoint_to_hub"]),
        ({"policy__repo_id": "me/mine", "policy__push_to_hub": True}, ["--policy.repo_id"]),
        ({"policy__pretrained_path": None}, ["--policy.path"]),
        ({"policy": None}, ["--policy.path"]),
        ({"use_policy_training_preset": False}, ["Optimizer and Scheduler"]),
        ({"craft": CraftConfig(enabled=True)}, ["--craft.anchor_cache_dir"]),
        ({"engine": EngineConfig(name="zero")}, ["--ds_config"]),
        ({"resume": True}, ["--resume=true", "--config_path"]),
        ({"dataloader_multiprocessing_context": "thread"}, ["dataloader_multiprocessing_context"]),
        # The parser accepts null for a value of any type.
        ({"steps": None}, ["--steps=null: give it a value"]),
        ({"engine": EngineConfig(fsdp=FsdpConfig(dp_shard=None))}, ["--engine.fsdp.dp_shard=null"]),
        ({"policy__optimizer_lr": None}, ["--policy.optimizer_lr=null"]),
    ],
)
def test_bad_values_are_named(make, changes, names):
    with pytest.raises(UserError) as raised:
        make(**changes).validate()
    message = str(raised.value)
    assert "\n" not in message
    assert all(name in message for name in names), message


def test_an_optimizer_with_the_preset_is_refused(make):
    optimizer = make().policy.get_optimizer_preset()
    optimizer.lr = 0.5
    with pytest.raises(UserError, match=r"--optimizer.*--policy.optimizer_.*--use_policy_training_preset"):
        make(optimizer=optimizer).validate()


@pytest.mark.parametrize("what", ["directory", "file"])
def test_an_output_that_exists_is_refused(make, tmp_path, what):
    path = tmp_path / "run"
    (path if what == "file" else path.mkdir() or path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=f"--output_dir={path} exists already"):
        make(output_dir=path).validate()


@pytest.mark.parametrize("given", [Path, str])
def test_an_output_that_is_empty_is_accepted(make, tmp_path, given):
    path = tmp_path / "run"
    (path / "lost+found").mkdir(parents=True)  # what the root of a file system may hold
    config = make(output_dir=given(path))
    config.validate()
    assert config.output_dir == given(path)


def test_policy_path_flag_loads_its_config(inputs, monkeypatch):
    flags = [f"--policy.path={inputs.policy}", "--policy.optimizer_lr=0.25"]
    monkeypatch.setattr(sys, "argv", ["train_craft.py", *flags])
    config = TrainConfig(dataset=DatasetConfig("craft-ds/test"))
    config.validate()
    assert config.policy.pretrained_path == inputs.policy
    assert config.optimizer.lr == 0.25
    assert Path(config.policy.text_tokenizer_name) == inputs.policy / "text_tokenizer"


@pytest.mark.parametrize("flag", ["--policy.nonsense=1", "--policy.chunk_size=abc"])
def test_bad_policy_flags_are_one_line(inputs, monkeypatch, capfd, flag):
    monkeypatch.setattr(sys, "argv", ["train_craft.py", f"--policy.path={inputs.policy}", flag])
    with pytest.raises(UserError) as raised:
        TrainConfig(dataset=DatasetConfig("craft-ds/test")).validate()
    assert flag in str(raised.value)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_policy_path_contradicts_resume(make, inputs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_craft.py", f"--policy.path={inputs.policy}"])
    with pytest.raises(UserError, match=r"--policy.path=.*--resume=true.*--config_path"):
        make(resume=True).validate()


def test_tokenizers_follow_the_policy_directory(make, inputs, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(inputs.policy, moved)
    # LeRobot's own reader keeps the relative names in the file.
    policy = PreTrainedConfig.from_pretrained(moved)
    assert policy.text_tokenizer_name == "text_tokenizer"
    policy.pretrained_path = moved
    config = make(policy=policy)
    config.validate()
    assert Path(config.policy.text_tokenizer_name) == moved / "text_tokenizer"
    assert Path(config.policy.action_tokenizer_name) == moved / "action_tokenizer"


def test_a_saved_configuration_reads_back_the_same(make, tmp_path):
    config = make(craft=CraftConfig(enabled=True, anchor_cache_dir="anchors", lambda_lr=0.5), eval_freq=2)
    config.validate()
    config._save_pretrained(tmp_path)
    again = TrainConfig.from_pretrained(tmp_path)
    config.output_dir = config.output_dir.absolute()
    assert json.loads((tmp_path / "train_config.json").read_text()) == config.to_dict()
    assert again.to_dict() == config.to_dict()
    again.validate()
    assert again.to_dict() == config.to_dict()


def test_config_saved_with_old_field_names_is_read(make, tmp_path):
    config = make(lora=LoraConfig(enabled=True, modules_to_save=["lm_head"]))
    config.validate()
    config._save_pretrained(tmp_path)
    path = tmp_path / "train_config.json"
    path.write_text(path.read_text().replace('"modules_to_save"', '"full_modules"'))
    assert "full_modules" in path.read_text()
    config.output_dir = config.output_dir.absolute()
    assert TrainConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert parse_arguments([f"--config_path={path}", "--steps=7"]).lora == config.lora
    assert "full_modules" in path.read_text()

"""Help texts and answers to misspelt flags."""

import re
import resource
import subprocess
import sys
from dataclasses import fields
from typing import get_type_hints

import pytest
from lerobot.configs.train import TrainPipelineConfig
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig

from craft_ds.cli import COMMANDS, run_command
from craft_ds.config.arguments import normalise_arguments
from craft_ds.config.help import LEROBOT_FLAGS, train_help, without_refused
from craft_ds.config.shipped_files import shipped_names
from craft_ds.config.suggestions import own_flags, suggestion
from craft_ds.config.unsupported import UNSUPPORTED
from craft_ds.engines.deepspeed_config import read_ds_config
from craft_ds.errors import UserError


@pytest.mark.parametrize("command", COMMANDS)
def test_help_takes_less_than_one_second_of_cpu(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "craft_ds", command, "--help"],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=60,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_train_help_lists_our_flags_before_those_of_lerobot():
    text = train_help()
    places = [text.index(f"\n  {flag}") for flag in [*own_flags(), *LEROBOT_FLAGS]]
    assert max(places[: len(own_flags())]) < min(places[len(own_flags()) :])


def test_refused_flags_are_left_out_of_the_full_help():
    text = "Group:\n  --env.type str  a\n        more\n  --steps int  b\n  --environment x\nNext:\n  --env x"
    assert without_refused(text) == "Group:\n  --steps int  b\n  --environment x\nNext:"


def test_full_help_has_every_flag_but_the_refused_ones(capsys):
    run_command("train", ["--help=all"])
    flags = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")}
    lerobot = {f"--{entry.name}" for entry in fields(TrainPipelineConfig) if entry.init}
    groups = {
        f"--{name}" for name in ("dataset", "wandb", "peft", "eval", "optimizer", "scheduler", "policy")
    }
    assert lerobot - groups - set(UNSUPPORTED) <= flags
    assert {"--dataset.eval_split", "--wandb.entity", *own_flags()} <= flags
    assert [flag for flag in flags if any(f"{flag}.".startswith(f"{name}.") for name in UNSUPPORTED)] == []


def test_lerobot_flags_exist_and_have_the_stated_defaults():
    for flag, line in LEROBOT_FLAGS.items():
        config, *names = TrainPipelineConfig, *flag.removeprefix("--").split(".")
        if names[0] == "policy":
            assert names[1] == "path" or names[1] in {entry.name for entry in fields(PI0FastConfig)}, flag
            continue
        for name in names[:-1]:
            config = get_type_hints(config)[name]
        if flag == "--config_path":
            continue
        entry = {entry.name: entry for entry in fields(config)}[names[-1]]
        stated = re.search(r"\(default: (.*)\)|default: (.*)$", line)
        if stated and stated[1]:
            shown = str(entry.default).lower() if isinstance(entry.default, bool) else str(entry.default)
            assert shown == stated[1], flag
        elif stated:
            assert (stated[2], entry.default) == ("all", None), flag


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("--craft.enable", "--craft.enabled"),
        ("--lr=1e-4", "--policy.optimizer_lr"),
        ("--bf16", "--engine.dtype=bfloat16"),
        ("--deepspeed=x.json", "--ds_config FILE"),
        ("--lora.r=8", "--lora.rank"),
        ("--lora.full_modules=[lm_head]", "renamed: use --lora.modules_to_save"),
        ("--craft=true", "--craft.enabled=true"),
        ("--engine=zero3", "--ds_config zero3"),
        ("--ds_config=zero9", "the shipped ones are zero2"),
        ("--engine=zro", "did you mean zero?"),
        ("--world.tasks=red", "reach-red"),
        ("--world.tasks=reach-red", "--world.tasks=[reach-red]"),
        ("--craft.projection_mode=weigted", "did you mean weighted?"),
    ],
)
def test_misspelt_flag_names_the_right_one(argument, meant, capfd):
    with pytest.raises(SystemExit) as ended:
        run_command("train", argument.split())
    assert ended.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert meant in line


def test_flag_with_one_letter_dropped_suggests_itself():
    for flag in own_flags():
        for place in range(2, len(flag)):
            name = flag[:place] + flag[place + 1 :]
            near = [
                other
                for other in own_flags()
                if len(other) == len(flag) and name == other[:place] + other[place + 1 :]
            ]
            if name not in own_flags():
                assert suggestion(name) in [f"; did you mean {other}?" for other in near]


def test_shipped_fsdp_config_is_found_by_name():
    for name in shipped_names("--config_path"):
        ((_, path),) = [argument.split("=") for argument in normalise_arguments(["--config_path", name])]
        assert path.endswith(f"/fsdp_configs/{name}.yaml")
    with pytest.raises(UserError, match=r"--config_path=none: no such file.* of the names lora$"):
        normalise_arguments(["--config_path", "none"])


def test_shipped_ds_config_is_found_by_name():
    assert normalise_arguments(["--ds_config", "zero3"]) == ["--engine.ds_config=zero3"]
    names = shipped_names("--engine.ds_config")
    assert {"zero2", "zero3", "zero3_bf16", "zero3_lora", "zero3_offload"} == set(names)
    for name in names:
        assert read_ds_config(name)["zero_optimization"]["stage"] == int(name[4])
    with pytest.raises(UserError, match=r"--ds_config=none: no such file.*zero3_bf16"):
        read_ds_config("none")

"""Help texts and answers to misspelt flags."""

import resource
import subprocess
import sys

import pytest

from craft_ds.cli import COMMANDS, run_command
from craft_ds.config.arguments import normalise_arguments
from craft_ds.config.help import LEROBOT_FLAGS, train_help, without_refused
from craft_ds.config.shipped_files import shipped_names
from craft_ds.config.suggestions import own_flags, suggestion
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


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("--craft.enable", "--craft.enabled"),
        ("--lr=1e-4", "--policy.optimizer_lr"),
        ("--bf16", "--engine.dtype=bfloat16"),
        ("--deepspeed=x.json", "--ds_config FILE"),
        ("--lora.r=8", "--lora.rank"),
        ("--craft=true", "--craft.enabled=true"),
        ("--engine=zero3", "--ds_config zero3"),
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
            if name not in own_flags():
                assert suggestion(name) == f"; did you mean {flag}?"


@pytest.mark.parametrize("flag", ["--ds_config", "--config_path"])
def test_shipped_file_is_found_by_name(flag):
    field = "--engine.ds_config" if flag == "--ds_config" else flag
    for name in shipped_names(field):
        ((_, path),) = [argument.split("=") for argument in normalise_arguments([flag, name])]
        assert path.rsplit("/", 1)[1].startswith(f"{name}.")
    with pytest.raises(UserError, match=rf"{flag}=none: no such file.*{shipped_names(field)[0]}"):
        normalise_arguments([flag, "none"])

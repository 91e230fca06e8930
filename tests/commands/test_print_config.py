"""`craft-ds train --print_config`."""

import sys

import pytest
import yaml

from craft_ds.cli import run_command
from craft_ds.config.parser import parse_arguments


@pytest.fixture
def flags(inputs, tmp_path, monkeypatch) -> list[str]:
    """Flags of a run that must not start."""
    monkeypatch.setattr(sys, "argv", ["craft-ds"])
    return [
        *inputs.flags(tmp_path / "run"),
        *inputs.craft_flags(),
        "--lora=attention",
        "--policy.optimizer_lr=1e-7",
        "--eval_freq=2",
        "--world.name=blocks",
        "--max_runtime=30m",
        "--rename_map={a: b}",
    ]


def test_printed_config_parses_to_the_same_config(flags, tmp_path, capsys):
    run_command("train", ["--print_config", *flags])
    printed = capsys.readouterr().out
    assert not (tmp_path / "run").exists()

    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    config = parse_arguments([f"--config_path={path}"])
    assert config.to_dict() == yaml.safe_load(printed)
    config.validate()
    assert config.to_yaml() == printed

    given = parse_arguments(flags)
    given.validate()
    assert given.to_yaml() == printed
    given.dataset = config.dataset  # LeRobot's default image transforms hold tuples, which no file has
    assert config == given


def test_printed_config_has_the_resolved_values(flags, capsys):
    run_command("train", [*flags, "--print_config=true"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["engine"]["name"] == "single"
    assert printed["eval_steps"] == 2
    assert printed["dataset"]["eval_split"] == 0.05
    assert printed["optimizer"]["lr"] == 1e-7
    assert printed["policy"]["type"] == "tiny_pi0_fast"


@pytest.mark.parametrize(("rank", "lines"), [(0, True), (1, False)])
def test_only_rank_0_prints(flags, set_launch, capsys, rank, lines):
    set_launch(rank, 2)
    run_command("train", ["--print_config", *flags])
    printed = capsys.readouterr().out
    assert bool(printed) is lines
    assert not lines or yaml.safe_load(printed)["engine"]["name"] == "fsdp"


@pytest.mark.parametrize(
    ("flag", "names"),
    [
        ("--resume=auto", ["--print_config", "--resume"]),
        ("--wandb.notes=hf_abcdefghijklmnopqrstuvwxyz", ["--wandb.notes", "token"]),
        ("--steps=0", ["--steps=0"]),
    ],
)
def test_bad_input_is_one_line_and_prints_nothing(flags, flag, names, capfd):
    with pytest.raises(SystemExit) as ended:
        run_command("train", ["--print_config", *flags, flag])
    assert ended.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert all(name in line for name in names)
    assert "hf_abc" not in line

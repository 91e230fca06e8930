"""The demo: its choices, its commands, and one small demo in an empty directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from craft_ds.cli import run_command
from craft_ds.commands import demo
from craft_ds.errors import UserError

PACKAGE = Path(demo.__file__).parents[2]
HEAVY = ("torch", "lerobot", "matplotlib", "transformers", "mujoco")


@pytest.mark.parametrize(
    "command",
    [
        "demo --help",
        "eval --help",
        "worlds",
        "worlds --help",
        "worlds record --help",
        "worlds pretrain --help",
    ],
)
def test_help_imports_nothing_heavy(command):
    program = (
        "import sys, contextlib\nfrom craft_ds.cli import run_command\n"
        f"name, *arguments = {command.split()}\n"
        "with contextlib.suppress(SystemExit):\n    run_command(name, arguments)\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONPATH": str(PACKAGE)}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.stdout
    assert ended.stderr == "[]\n"


def test_without_deepspeed_the_demo_trains_on_fsdp(monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert demo.choose_engine("auto") == "fsdp"
    assert "pip install 'craft-ds[deepspeed,world]'" in capsys.readouterr().out
    assert demo.choose_engine("fsdp") == "fsdp"
    with pytest.raises(UserError, match="--engine=zero3: DeepSpeed is not installed"):
        demo.choose_engine("zero3")


def test_with_deepspeed_the_demo_trains_on_zero3(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: object())
    assert demo.choose_engine("auto") == demo.choose_engine("zero3") == "zero3"
    assert demo.choose_engine("fsdp") == "fsdp"


def test_without_gl_the_demo_uses_the_blocks(monkeypatch, capsys):
    monkeypatch.setattr("craft_ds.worlds.gl_problem", lambda: "no EGL here")
    assert demo.choose_world("auto") == "blocks"
    assert "no EGL here" in capsys.readouterr().out
    with pytest.raises(UserError, match="--world=metaworld: no EGL here; or use --world=blocks"):
        demo.choose_world("metaworld")


@pytest.mark.parametrize("engine", list(demo.ENGINES))
def test_ranks_start_the_installed_package(engine):
    command = demo.training_command(engine, 3)
    assert command[:2] == [sys.executable, "-m"]
    assert command[command.index("craft_ds") + 1] == "train"
    assert any(part.endswith("=3") for part in command)
    assert not any("scripts" in part for part in command)


def test_the_demo_uses_all_seeds_and_methods():
    args = demo.parse_arguments(["--lora", "--batch_size=6", "--ranks=2", "--", "--craft.lambda_lr=1"])
    flags = demo.methods(Path("cache"), args)
    assert tuple(flags) == demo.METHODS[1:]
    assert flags["baseline"] == []
    assert flags["lora_baseline"] == demo.LORA_FLAGS
    assert flags["craft"][-2:] == ["--craft.anchor_batch_size=3", "--craft.lambda_lr=1"]
    assert flags["lora_craft"] == [*demo.LORA_FLAGS, *flags["craft"]]


def test_a_bad_number_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command("demo", ["--world=blocks", "--ranks=0"])
    assert ended.value.code == 2
    assert "--ranks=0 must be at least 1" in capsys.readouterr().err


def test_a_failed_command_stops_the_demo_with_a_line(capsys):
    with pytest.raises(SystemExit) as ended:
        demo.call([sys.executable, "-c", "raise SystemExit(3)"])
    assert ended.value.code == 1
    assert "failed with status 3" in capsys.readouterr().err


@pytest.mark.sample(0)
@pytest.mark.distributed
def test_a_small_demo_runs_in_an_empty_directory(tmp_path):
    flags = [
        "--world=blocks",
        "--engine=fsdp",
        "--steps=2",
        "--episodes=1",
        "--num_anchors=16",
        "--batch_size=2",
    ]
    ended = subprocess.run(
        [sys.executable, "-m", "craft_ds", "demo", *flags],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = json.loads((tmp_path / "outputs/demo/summary.json").read_text())
    assert [(row["method"], row["seed"]) for row in summary["rows"]] == [
        ("teacher", 0),
        ("baseline", 0),
        ("craft", 0),
    ]
    assert summary["eval_seed"] == demo.EVAL_SEED
    assert (tmp_path / "outputs/demo/summary.png").stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]

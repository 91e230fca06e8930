"""The demo: its choices, its commands, and one small demo in an empty directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from craft_ds.cli import run_command
from craft_ds.commands import demo
from craft_ds.commands.subcommands import call, training_command
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


def test_ranks_are_those_of_the_engine(monkeypatch):
    assert demo.choose_ranks("single", None) == 1
    assert demo.choose_ranks("fsdp", None) == demo.choose_ranks("zero3", None) == 2
    assert demo.choose_ranks("fsdp", 3) == 3
    with pytest.raises(UserError, match="--ranks=2 needs an engine that shards"):
        demo.choose_ranks("single", 2)
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--engine=zero3: DeepSpeed is not installed; pip install"):
        demo.choose_ranks("zero3", None)


def test_without_gl_the_demo_uses_the_blocks(monkeypatch, capsys):
    monkeypatch.setattr("craft_ds.worlds.gl_problem", lambda: "no EGL here")
    assert demo.choose_world("auto") == "blocks"
    assert "no EGL here" in capsys.readouterr().out
    with pytest.raises(UserError, match="--world=metaworld: no EGL here; or use --world=blocks"):
        demo.choose_world("metaworld")


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_ranks_start_the_installed_package(engine):
    command = training_command(engine, 3)
    assert command[:2] == [sys.executable, "-m"]
    assert command[command.index("craft_ds") + 1] == "train"
    assert any(part.endswith("=3") for part in command)
    assert not any("scripts" in part for part in command)


def test_the_demo_uses_all_methods():
    args = demo.parse_arguments(["--lora", "--batch_size=6", "--", "--craft.lambda_lr=1"])
    args.ranks = 2
    flags = demo.methods(Path("cache"), args)
    assert tuple(flags) == demo.METHODS[1:]
    assert flags["baseline"] == []
    assert flags["lora_baseline"] == demo.LORA_FLAGS
    for name, preset in (("replay", "replay"), ("craft", "recommended")):
        assert flags[name][0] == f"--craft.preset={preset}"
        assert {"--craft.anchor_cache_dir=cache", "--craft.anchor_batch_size=3"} <= set(flags[name])
    assert flags["craft"][-1] == "--craft.lambda_lr=1"
    assert flags["lora_craft"] == [*demo.LORA_FLAGS, *flags["craft"]]


def test_no_setting_was_chosen_with_the_seeds_and_scenes_of_the_demo(monkeypatch):
    monkeypatch.syspath_prepend(PACKAGE / "benchmarks")
    from continual_parts.cells import SCENES
    from continual_parts.tiers import TIERS

    seeds = {seed for tier in TIERS.values() for seed in (*tier.seeds, *tier.more_seeds, *tier.tuning_seeds)}
    assert seeds.isdisjoint(demo.SEEDS)
    assert demo.EVAL_SEED not in {first + seed for first in SCENES.values() for seed in seeds}


def test_a_bad_number_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command("demo", ["--world=blocks", "--ranks=0"])
    assert ended.value.code == 2
    assert "--ranks=0 must be at least 1" in capsys.readouterr().err


def test_a_failed_command_stops_the_demo_with_a_line(capsys):
    with pytest.raises(SystemExit) as ended:
        call([sys.executable, "-c", "raise SystemExit(3)"])
    assert ended.value.code == 1
    assert "failed with status 3" in capsys.readouterr().err


@pytest.mark.sample(0)
@pytest.mark.distributed
def test_a_small_demo_runs_in_an_empty_directory(tmp_path):
    flags = [
        "--world=blocks",
        "--seeds=3",
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
        ("teacher", 3),
        ("baseline", 3),
        ("replay", 3),
        ("craft", 3),
    ]
    assert summary["eval_seed"] == demo.EVAL_SEED
    assert (tmp_path / "outputs/demo/summary.png").stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]

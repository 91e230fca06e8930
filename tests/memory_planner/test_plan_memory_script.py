"""`craft-ds plan` in a separate process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig

from craft_ds.lora.targets import lora_presets

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "plan_memory.py"
SMALL = (
    "--policy.type=tiny_pi0_fast",
    "--policy.text_width=32",
    "--policy.text_depth=2",
    "--batch_size=1",
    "--world_size=2",
)


def run(*arguments: str, directory: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_policy_type_is_planned_for_the_given_engines(tmp_path):
    ended = run(*SMALL, "--engine", "fsdp", "zero3", "--lora_rank=2", "--json", directory=tmp_path)
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(ended.stdout)
    assert [(row["engine"], row["lora_rank"], row["lora_preset"]) for row in rows] == [
        ("fsdp", 0, ""),
        ("zero3", 0, ""),
        ("fsdp", 2, "default"),
        ("zero3", 2, "default"),
    ]
    for row in rows:
        plans = row["activation_checkpointing"]
        assert 0 < plans["full"]["total"] <= plans["none"]["total"]
        assert plans["none"]["fits_gib"] == "24"


def test_every_preset_of_the_policy_can_be_planned(tmp_path):
    flags = (*SMALL, "--engine=fsdp", "--lora_rank=4")
    refused = run(*flags, "--lora_preset=nonsense", directory=tmp_path)
    assert refused.returncode == 2
    presets = lora_presets(PI0FastConfig())
    assert re.findall(r"'(\w+)'", refused.stderr.split("choose from")[1]) == list(presets)
    ended = run(*flags, "--lora_preset=attention", directory=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "LoRA, preset attention, rank 4: " in ended.stdout


def test_a_policy_directory_needs_only_its_configuration(inputs, tmp_path):
    (tmp_path / "config.json").write_text((inputs.policy / "config.json").read_text())
    ended = run(f"--policy.path={tmp_path}", "--engine=single", "--lora_rank=0", directory=tmp_path)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("tiny_pi0_fast in bfloat16 on 1 ranks")
    assert lines[-1].split()[0] == "single"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: give either --policy.path or --policy.type"),
        (["--policy.type=pi0_fast", "--nonsense=1"], "error: unknown argument --nonsense=1"),
        (["--policy.type=nonsense"], "error: no policy configuration from these --policy.* flags"),
        (
            [*SMALL, "--craft.gradient_buffer=bf16", "--craft.use_grad_projection=false"],
            "error: --craft.gradient_buffer=bf16 has no effect with --craft.use_grad_projection=false",
        ),
        ([*SMALL, "--lora_rank=-1"], "error: --lora_rank=-1 must not be negative"),
        ([*SMALL, "--dp_replicate=3"], "error: --dp_replicate=3 must divide --world_size=2"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    ended = run(*arguments, directory=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(message)
    assert ended.stderr.count("\n") == 1

"""The wheel: it holds every file that the commands need, and answers outside the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built offline from a copy of the sources, because setuptools writes beside them."""
    copy, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "craft_ds", copy / "craft_ds", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", output, copy]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = output.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


def test_wheel_holds_every_file_of_the_package(unpacked):
    source = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "craft_ds").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {
        str(path.relative_to(unpacked)) for path in (unpacked / "craft_ds").rglob("*") if path.is_file()
    }
    assert source == packed
    assert {
        "craft_ds/py.typed",
        "craft_ds/fsdp_configs/lora.yaml",
        "craft_ds/ds_configs/zero3.json",
    } <= packed
    for name in ("ds_configs", "fsdp_configs", "worlds/assets"):
        assert any(path.startswith(f"craft_ds/{name}/") for path in packed)


def test_wheel_has_the_console_script_and_the_licence(unpacked):
    (information,) = unpacked.glob("*.dist-info")
    assert "craft-ds = craft_ds.cli:main" in (information / "entry_points.txt").read_text()
    assert (information / "licenses" / "LICENSE").is_file()


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], "usage: craft-ds COMMAND"),
        (["train", "--help"], "--craft.enabled"),
        (["version"], "craft-ds "),
    ],
)
def test_unpacked_wheel_answers_in_an_empty_directory(unpacked, tmp_path, arguments, shown):
    ended = run(unpacked, tmp_path, "-m", "craft_ds", *arguments)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert shown in ended.stdout


def test_unpacked_wheel_finds_its_configs_by_name(unpacked, tmp_path):
    program = (
        "from craft_ds.config.shipped_files import resolve_shipped as resolve;"
        "print(resolve('--engine.ds_config', 'zero3'), resolve('--config_path', 'lora'))"
    )
    ended = run(unpacked, tmp_path, "-c", program)
    expected = [f"{unpacked}/craft_ds/{name}" for name in ("ds_configs/zero3.json", "fsdp_configs/lora.yaml")]
    assert ended.stdout.split() == expected


def run(unpacked: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

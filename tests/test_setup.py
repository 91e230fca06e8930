"""scripts/setup.sh with fake Python, pip and uv: nothing is downloaded, nothing is slow."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "scripts" / "setup.sh"
TOOLS = ["bash", "basename", "cat", "chmod", "cp", "dirname", "env", "mkdir", "rm"]
# A Python that works, but notes how it is called, makes a virtual environment of itself and never runs pip.
FAKE_PYTHON = f"""#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$1 $2" in
    "-m venv") rm -rf "$4"; mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "-m pip") [[ "$3" != install || -z "$PIP_FAILS" ]] ;;
    *) exec "{sys.executable}" "$@" ;;
esac
"""
FAKE_UV = """#!/usr/bin/env bash
echo "uv $*" >>"$CALLS"
mkdir -p "${@: -1}/bin" && cp "$FAKE_PYTHON" "${@: -1}/bin/python"
"""


class Machine:
    """A bare machine: a PATH with shell tools and nothing else, and a fresh clone."""

    def __init__(self, path: Path):
        self.bin, self.repo, self.calls_file = path / "bin", path / "a clone", path / "calls"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.add("c++", "#!/usr/bin/env bash\n")
        (self.repo / "scripts").mkdir(parents=True)
        shutil.copy(SETUP, self.repo / "scripts")
        (self.repo / "pyproject.toml").write_text("[project]\n")
        self.spare = path / "spare-python"
        self.write(self.spare, FAKE_PYTHON)
        self.environment = {
            "PATH": str(self.bin),
            "HOME": str(path / "home"),
            "CALLS": str(self.calls_file),
            "FAKE_PYTHON": str(self.spare),
            "PIP_FAILS": "",
        }

    @staticmethod
    def write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def add(self, name: str, text: str = FAKE_PYTHON) -> None:
        self.write(self.bin / name, text)

    def run(self, command: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        self.calls_file.write_text("")
        return subprocess.run(
            [shutil.which("bash"), "-c", command or f"bash '{self.repo}/scripts/setup.sh'"],
            env=self.environment | environment,
            cwd=self.bin,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self, start: str) -> list[str]:
        return [line for line in self.calls_file.read_text().splitlines() if line.startswith(start)]

    @property
    def venv_python(self) -> Path:
        return self.repo / ".venv" / "bin" / "python"


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def ready(machine):
    """A machine on which set-up has been run."""
    machine.add("python3.12")
    assert machine.run().returncode == 0
    return machine


def test_the_first_run_installs_and_the_second_does_nothing(machine):
    machine.add("python3.12")
    first = machine.run()
    assert first.returncode == 0, first.stderr
    assert "creating .venv with" in first.stdout
    [install] = machine.calls("-m pip install")
    assert install.endswith("--editable .[deepspeed,world,dev]")

    start = time.monotonic()
    second = machine.run()
    assert time.monotonic() - start < 2
    assert second.returncode == 0
    assert "up to date" in second.stdout
    assert not machine.calls("-m")


def test_shims_that_do_not_run_are_skipped(machine):
    machine.add(
        "python3.12", "#!/usr/bin/env bash\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"
    )
    machine.add("python3", "#!/usr/bin/env bash\nexit 1\n")  # an older Python fails the version check
    machine.write(machine.bin.parent / "home/.pyenv/versions/3.13.1/bin/python", FAKE_PYTHON)
    result = machine.run()
    assert result.returncode == 0, result.stderr
    assert "/.pyenv/versions/3.13.1/bin/python" in result.stdout
    assert "command not found" not in result.stderr


def test_python_variable_wins(machine):
    machine.add("python3.12")
    result = machine.run(PYTHON=str(machine.spare))
    assert f"creating .venv with {machine.spare}" in result.stdout


@pytest.mark.parametrize("python", ["/nowhere/python", "bash"])
def test_a_python_variable_that_does_not_work_is_an_error(machine, python):
    machine.add("python3.12")
    result = machine.run(PYTHON=python)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"error: PYTHON={python} is not a working Python 3.12 or 3.13 with venv; unset it or point it at one"
    ]
    assert not (machine.repo / ".venv").exists()


def test_uv_is_the_last_resort(machine):
    machine.add("uv", FAKE_UV)
    result = machine.run()
    assert result.returncode == 0, result.stderr
    assert machine.calls("uv venv")
    assert machine.calls("-m pip install")

    shutil.rmtree(machine.repo / ".venv")
    machine.add("python3.13")
    assert machine.run().returncode == 0
    assert not machine.calls("uv")


def test_without_python_the_error_is_one_line(machine):
    result = machine.run()
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: no Python 3.12 or 3.13")
    assert "PYTHON=" in line


def test_changed_requirements_install_into_the_same_venv(ready):
    (ready.repo / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert ready.run().returncode == 0
    assert ready.calls("-m pip install")
    assert not ready.calls("-m venv")


def test_moved_repository_installs_again(ready):
    moved = ready.repo.with_name("moved")
    ready.repo.rename(moved)
    ready.repo = moved
    assert ready.run().returncode == 0
    assert ready.calls("-m pip install")


def test_a_failed_installation_is_retried(machine):
    machine.add("python3.12")
    failed = machine.run(PIP_FAILS="1")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: pip could not install")
    again = machine.run()
    assert again.returncode == 0
    assert machine.calls("-m pip install")
    assert not machine.calls("-m venv")


def test_an_interrupted_venv_is_created_again(machine):
    machine.add("python3.12")
    machine.venv_python.parent.mkdir(parents=True)
    machine.venv_python.symlink_to("/nowhere/python3.12")
    result = machine.run()
    assert result.returncode == 0, result.stderr
    [made] = machine.calls("-m venv")
    assert "--clear" in made


def test_interrupted_packages_are_removed(ready):
    packages = ready.repo / ".venv/lib/python3.12/site-packages"
    whole, cut = packages / "numpy-2.0.dist-info", packages / "torch-2.11.0.dist-info"
    for info in (whole, cut):
        info.mkdir(parents=True)
        (info / "METADATA").touch()
    (whole / "INSTALLER").write_text("pip\n")
    (ready.repo / ".venv/craft-ds.stamp").unlink()
    result = ready.run()
    assert "repairing torch-2.11.0" in result.stdout
    assert whole.exists()
    assert not cut.exists()


def test_a_missing_compiler_is_a_note(ready):
    (ready.bin / "c++").unlink()
    result = ready.run()
    assert result.returncode == 0
    [note] = [line for line in result.stdout.splitlines() if "C++" in line]
    assert "g++" in note


def test_sourcing_keeps_the_options_of_the_shell(ready):
    source = f"source '{ready.repo}/scripts/setup.sh' >/dev/null"
    shown = 'echo "$PATH|$OMP_NUM_THREADS|$-|$PWD"'
    path, threads, options, folder = ready.run(f"{source}; {shown}").stdout.strip().split("|")
    assert path.startswith(str(ready.venv_python.parent) + os.pathsep)
    assert threads == "1"
    assert "e" not in options
    assert "u" not in options
    assert folder == str(ready.bin)
    assert ready.run(f"{source}; {shown}", OMP_NUM_THREADS="8").stdout.split("|")[1] == "8"


def test_sourcing_reports_failure(machine):
    result = machine.run(f"source '{machine.repo}/scripts/setup.sh' || echo went wrong")
    assert result.stdout == "went wrong\n"
    strict = machine.run(f"set -e; source '{machine.repo}/scripts/setup.sh'; echo not reached")
    assert strict.returncode == 1
    assert strict.stdout == ""

"""The lock of an output directory: where its files are, what they say, and that nothing is left."""

import multiprocessing
import os
import socket

import pytest

from craft_ds.errors import UserError
from craft_ds.tensor_io.output_lock import LOCK_FILE, NotWritableError, locked_output

FORK = multiprocessing.get_context("fork")


def in_another_process(action):
    """Run a function in a fork and return its result, or the text of its error."""
    results = FORK.Queue()

    def run():
        try:
            results.put(action())
        except Exception as error:
            results.put(f"{type(error).__name__}: {error}")

    process = FORK.Process(target=run)
    process.start()
    result = results.get(timeout=60)
    process.join()
    return result


def try_to_lock(output, **options):
    def action():
        from craft_ds.tensor_io import output_lock

        output_lock._held.clear()  # a fork has the parent's memory, but not its locks
        with locked_output(output, **options):
            return "locked"

    return in_another_process(action)


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"])
def test_the_file_names_the_holder(tmp_path, monkeypatch, name):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv(name, "4711")
    with locked_output(tmp_path / "out"):
        said = try_to_lock(tmp_path / "out", flag="--output")
    assert said.startswith(f"UserError: --output={tmp_path}/out is in use by process {os.getpid()} on ")
    assert f"on {socket.gethostname()}, job 4711 ({name}), started 20" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("depth", [1, 3])
def test_parents_that_it_made_are_removed(tmp_path, depth):
    output = tmp_path.joinpath(*["sub"] * depth, "out")
    with locked_output(output):
        assert output.parent.is_dir()
    assert list(tmp_path.iterdir()) == []
    with locked_output(output):
        output.mkdir()
    assert output.is_dir()


def test_it_is_held_until_the_outermost_ends(tmp_path):
    with locked_output(tmp_path / "out"):
        with locked_output(tmp_path / "out"), locked_output(tmp_path / "sub" / ".." / "out"):
            pass
        assert "in use" in try_to_lock(tmp_path / "out")
    assert try_to_lock(tmp_path / "out") == "locked"


def test_one_file_in_common_suffices(tmp_path):
    """Beside for the first, inside for the second, as where the parents differ."""
    output = tmp_path / "out"
    output.mkdir()
    with locked_output(output, inside=True):
        assert (output / LOCK_FILE).exists()
        (tmp_path / ".out.lock").unlink()
        assert "in use" in try_to_lock(output, inside=True)
    assert list(tmp_path.rglob("*")) == [output]


def test_an_error_inside_releases_it(tmp_path):
    with pytest.raises(OSError, match="full"), locked_output(tmp_path / "out"):
        raise OSError("full")
    assert try_to_lock(tmp_path / "out") == "locked"


@pytest.mark.parametrize("kind", ["link", "directory"])
def test_a_lock_file_that_is_none(tmp_path, kind):
    """Nothing is written through a link."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    lock = tmp_path / ".out.lock"
    lock.mkdir() if kind == "directory" else lock.symlink_to(precious)
    with (
        pytest.raises(NotWritableError, match=r"out cannot be written: \[Errno"),
        locked_output(tmp_path / "out"),
    ):
        pass
    assert precious.read_text() == "precious"


def test_control_characters_are_not_printed(tmp_path):
    def rename_holder():
        (tmp_path / ".out.lock").write_text("\x1b[31mred\n\nrows" + "x" * 1000)

    with locked_output(tmp_path / "out"):
        in_another_process(rename_holder)
        said = try_to_lock(tmp_path / "out")
    assert "in use by [31mred rows" in said
    assert "\n" not in said
    assert len(said) < 500
    assert issubclass(NotWritableError, UserError)

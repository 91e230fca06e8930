"""Two builders of the same cache at once: one builds, the other ends with one line."""

import fcntl
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from builds import contents, refuses

from craft_ds.anchors.build import build_anchor_cache
from craft_ds.errors import UserError
from craft_ds.tensor_io.output_lock import locked_output

FORK = multiprocessing.get_context("fork")


def hold(output, ready):
    with locked_output(output):
        ready.set()
        signal.pause()


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path / "out"`."""
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path / "out", ready))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


@pytest.mark.usefixtures("no_policy")
def test_the_holder_is_named(options, holder, tmp_path):
    refuses(
        options(tmp_path / "out"),
        f"--output_dir={tmp_path / 'out'} is in use by process {holder.pid} on {socket.gethostname()}",
        "wait until that has ended",
    )
    # Not even read, and the lock is still the holder's.
    refuses(options(tmp_path / "out", policy_path="nowhere"), f"process {holder.pid}")
    with locked_output(tmp_path / "another"):
        pass


def test_a_killed_holder_does_not_block(options, built, holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (tmp_path / ".out.lock").exists()
    assert build_anchor_cache(options(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(built)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_build_leaves_no_lock(options, tmp_path):
    refuses(options(tmp_path / "out", num_samples=73), "--num_samples=73")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(options, tmp_path):
    (tmp_path / "file").write_text("")
    refuses(options(tmp_path / "file" / "out"), f"--output_dir={tmp_path}/file/out cannot be written")


def test_a_file_system_without_locks(options, built, tmp_path, monkeypatch, caplog):
    def lockf(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", lockf)
    assert build_anchor_cache(options(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(built)
    assert "cannot be locked (Operation not supported)" in caplog.text


def test_a_lock_file_deleted_before_it_is_locked(tmp_path, monkeypatch):
    """The holder ends between opening and locking: the lock must be on the file that others will open."""
    calls, lockf = [], fcntl.lockf

    def late(file, operation):
        calls.append(operation)
        if len(calls) == 1:
            (tmp_path / ".out.lock").unlink()
        lockf(file, operation)

    monkeypatch.setattr("fcntl.lockf", late)
    with locked_output(tmp_path / "out"):
        assert len(calls) == 2
        text = (tmp_path / ".out.lock").read_text()
        assert text.startswith(f"process {os.getpid()} on {socket.gethostname()}")
    assert list(tmp_path.iterdir()) == []


def build(options, start, results):
    start.wait()
    try:
        results.put("built" if build_anchor_cache(options) else "already built")
    except UserError as error:
        results.put(str(error))


def test_four_builders_at_once(options, built, tmp_path):
    start, results = FORK.Event(), FORK.Queue()
    builders = [
        FORK.Process(target=build, args=(options(tmp_path / "out"), start, results)) for _ in range(4)
    ]
    for builder in builders:
        builder.start()
    start.set()
    said = sorted(results.get(timeout=120) for _ in builders)
    for builder in builders:
        builder.join()
    assert said.count("built") == 1, said
    assert all("is in use by process" in line for line in said if "built" not in line.split(":")[0]), said
    assert contents(tmp_path / "out") == contents(built)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["out"]


def lock_often(output, results):
    held, end = 0, time.monotonic() + 3.0
    while time.monotonic() < end:
        try:
            with locked_output(output):
                inside = output.with_name("inside")
                inside.mkdir()  # fails if another is inside
                inside.rmdir()
                held += 1
        except UserError:
            pass
    results.put(held)


def test_the_lock_is_exclusive_although_its_file_is_deleted(tmp_path):
    results = FORK.Queue()
    processes = [FORK.Process(target=lock_often, args=(tmp_path / "out", results)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sum(results.get(timeout=10) for _ in processes) > 3  # who holds it how often is up to the system

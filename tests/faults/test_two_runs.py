"""Two runs in one output directory: the first ends as if it were alone, the second with one line."""

import os
import re
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from launch import FaultInjector, ForkServer, LaunchResult
from runs import losses

from craft_ds.checkpoints import verify_checkpoint
from craft_ds.checkpoints.run_directory import checkpoint_directories
from craft_ds.tensor_io.output_lock import LOCK_FILE

FIRST = ["--steps=6", "--save_freq=2"]


@pytest.fixture(scope="module")
def other_server(tmp_path_factory):
    """A second server: each runs one launch at a time."""
    server = ForkServer(tmp_path_factory.mktemp("other_ranks"))
    yield server
    server.close()


@dataclass
class Beside:
    """A launch that runs while the test does something else."""

    thread: threading.Thread
    results: list[LaunchResult] = field(default_factory=list)

    def end(self) -> LaunchResult:
        self.thread.join(150)
        return self.results[0]


@contextmanager
def beside(server, argv, world_size=1, **more):
    results: list[LaunchResult] = []
    thread = threading.Thread(target=lambda: results.append(server.run(argv, world_size, **more)))
    thread.start()
    try:
        yield Beside(thread, results)
    finally:
        thread.join(150)


@pytest.fixture
def run(tmp_path):
    """A directory whose parent holds nothing else."""
    (tmp_path / "parent").mkdir()
    return tmp_path / "parent" / "run"


def wait_for(condition):
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def holder(run) -> int:
    """Process id that the lock file names, 0 if there is none."""
    try:
        found = re.match(r"process (\d+) on ", run.with_name(f".{run.name}.lock").read_text())
    except FileNotFoundError:
        return 0
    return int(found[1]) if found else 0


def rows(run) -> int:
    log = run / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def stop(path: Path, step: int = 2) -> list[FaultInjector]:
    """Hold a run after a step, before its save, until a file exists."""
    return [FaultInjector("fault_injectors:hold_at_step", {"step": step, "until": str(path)})]


def is_refused(ended, run, process):
    assert ended.statuses == [2] * len(ended.statuses), ended.outputs
    errors = [line for output in ended.outputs for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ended.outputs
    assert f"error: --output_dir={run} is in use by process {process} on " in errors[0]
    assert "wait until that has ended, or choose another directory" in errors[0]


def ended_alone(run):
    assert verify_checkpoint(run / "final", 0, 1)["step"] == 6
    for path in checkpoint_directories(run):
        verify_checkpoint(path, 0, 1)
    assert len(losses(run)) == 6
    assert [path.name for path in run.parent.iterdir()] == ["run"]
    assert not (run / LOCK_FILE).exists()


@pytest.mark.parametrize(
    ("mode", "ranks", "existing"),
    [
        ("--resume=false", 1, False),
        ("--resume=auto", 1, True),
        ("--resume=auto", 2, False),
        ("--resume=true", 1, False),
    ],
)
def test_a_run_beside_a_living_one(
    inputs, fork_server, other_server, run, tmp_path, mode, ranks, existing, fault_table
):
    """The directory existed before, or the first run creates it."""
    if existing:
        run.mkdir()
    flags, go = [*inputs.flags(run), *FIRST], tmp_path / "go"
    if mode == "--resume=true":
        second = [f"--output_dir={run}", f"--config_path={run}/last/train_config.json", mode]
    else:
        second = [*flags, mode]
    with (
        fault_table.case("two runs at once", mode, f"{ranks} ranks, existing: {existing}"),
        beside(fork_server, [*flags, "--resume=auto"], injectors={0: stop(go)}) as first,
    ):
        wait_for(lambda: rows(run) == 2)
        process = holder(run)
        before = sorted(path.name for path in run.iterdir())
        ended = other_server.run(second, ranks)
        if mode == "--resume=false":  # does not even ask for the lock
            assert ended.statuses == [2] * ranks
            assert f"--output_dir={run} exists already" in ended.outputs[0]
        else:
            is_refused(ended, run, process)
        assert sorted(path.name for path in run.iterdir()) == before
        go.touch()
        first.end().check()
    ended_alone(run)


@pytest.mark.parametrize("mode", ["--resume=false", "--resume=auto"])
def test_two_runs_that_start_at_once(inputs, fork_server, other_server, run, mode, fault_table):
    """Whichever is first."""
    flags = [*inputs.flags(run), *FIRST, mode]
    with (
        fault_table.case("two runs at once", mode, "started at once"),
        beside(fork_server, [*flags, "--seed=1"]) as first,
    ):
        ended = [other_server.run([*flags, "--seed=2"], 1), first.end()]
        won = [result for result in ended if result.statuses == [0]]
        lost = [result for result in ended if result.statuses == [2]]
        # One that waited for the other finds the finished run.
        done = [result for result in won if "nothing to do" in result.outputs[0]]
        assert len(won) - len(done) == 1, [result.outputs for result in ended]
        assert len(won) + len(lost) == 2
        for result in lost:
            assert re.search(
                r"error: --output_dir=\S+ (is in use by process|exists already)", result.outputs[0]
            )
    ended_alone(run)


@pytest.mark.parametrize("existing", [False, True])
def test_a_killed_holder_leaves_no_lock(
    inputs, fork_server, other_server, run, tmp_path, existing, fault_table
):
    if existing:
        run.mkdir()
    flags = [*inputs.flags(run), *FIRST, "--resume=auto"]
    with fault_table.case("two runs at once", "kill -9 of the holder", f"existing: {existing}"):
        injectors = {0: stop(tmp_path / "never", step=3)}
        with beside(fork_server, flags, injectors=injectors) as first:
            wait_for(lambda: rows(run) == 3)
            process = holder(run)
            is_refused(other_server.run(flags, 1), run, process)
            # The second waits while the first dies, as ranks do that a launcher restarts.
            with beside(other_server, flags) as waiting:
                time.sleep(1.0)
                os.kill(process, signal.SIGKILL)
                assert first.end().statuses == [-9]
                ended = waiting.end()
        ended.check()
        ended_alone(run)


def test_a_run_of_another_directory_is_not_held_up(inputs, fork_server, other_server, run, tmp_path):
    flags = inputs.flags(run)
    with beside(fork_server, flags, injectors={0: stop(tmp_path / "go")}) as first:
        wait_for(lambda: rows(run) == 2)
        other_server.run(inputs.flags(run.with_name("another")), 1).check()
        (tmp_path / "go").touch()
        first.end().check()


def test_a_link_to_the_directory_is_the_same_lock(inputs, fork_server, other_server, run, tmp_path):
    run.mkdir()
    (tmp_path / "link").symlink_to(run)
    flags = inputs.flags(run)
    with beside(fork_server, flags, injectors={0: stop(tmp_path / "go")}) as first:
        wait_for(lambda: rows(run) == 2)
        process = holder(run)
        is_refused(
            other_server.run([*inputs.flags(tmp_path / "link"), "--resume=auto"], 1),
            tmp_path / "link",
            process,
        )
        (tmp_path / "go").touch()
        first.end().check()


def test_a_second_mount_of_the_volume(inputs, fork_server, other_server, run, tmp_path, mounts, mount):
    """As in two containers, which have nothing but the volume in common."""
    mount(run)
    volume = tmp_path / "volume"
    volume.mkdir()
    mounts(volume, "--bind", str(run))
    with beside(fork_server, inputs.flags(run), injectors={0: stop(tmp_path / "go")}) as first:
        wait_for(lambda: rows(run) == 2)
        process = holder(run)
        is_refused(other_server.run([*inputs.flags(volume), "--resume=auto"], 1), volume, process)
        (tmp_path / "go").touch()
        first.end().check()
    assert not list(run.glob(".*"))

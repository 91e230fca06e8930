"""Hostile output directories: a run ends right or with one line, never well with a damaged `final`."""

import errno
import fcntl
import os
import shutil

import pytest
from runs import assert_same_bits, metrics

from craft_ds.checkpoints import run_directory, save, verify_checkpoint
from craft_ds.checkpoints.save import PendingCheckpoint
from craft_ds.errors import UserError
from craft_ds.tensor_io.output_lock import LOCK_FILE
from craft_ds.training import build
from craft_ds.training.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture
def interrupted(unbroken, tmp_path):
    """A run with checkpoints of steps 2 and 4, but not at its end."""
    run = tmp_path / "run"
    shutil.copytree(unbroken, run, symlinks=True)
    shutil.rmtree(run / "final")
    run_directory.point_last_at(run / "step_000004")
    return run


@pytest.fixture
def before_the_model(monkeypatch):
    """Fail if a model is built."""

    def build_policy(*_: object) -> None:
        raise AssertionError("the model was built")

    monkeypatch.setattr(build, "build_fp32_policy", build_policy)


@pytest.fixture
def at_step_3(monkeypatch):
    """Call a function when step 3 has been recorded."""

    def install(action):
        record = Run.record

        def recorded(run, *args, **kwargs):
            record(run, *args, **kwargs)
            if run.progress.step == 3:
                action(run.output_dir)

        monkeypatch.setattr(Run, "record", recorded)

    return install


def holds(ended, run):
    """Assert what must hold of every run here."""
    assert ended.status in (0, 2), ended
    assert "Traceback" not in ended.errors
    if ended.status == 0:
        verify_checkpoint(run / "final", 0, 1)
        assert (run / "last").resolve() == (run / "final").resolve()
    else:
        assert ended.errors.splitlines()[-1].startswith("error: "), ended.errors
    assert not list(run.parent.glob(".*.lock"))
    assert not (run / LOCK_FILE).exists()


# --- at the start ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["--resume=false", "--resume=auto"])
@pytest.mark.parametrize("kind", ["file", "fifo", "dangling link", "link to a file"])
@pytest.mark.usefixtures("before_the_model")
def test_what_is_not_a_directory_is_refused(refuses, tmp_path, kind, mode):
    run = tmp_path / "run"
    if kind == "fifo":
        os.mkfifo(run)
    elif kind == "dangling link":
        run.symlink_to("nowhere/run")
    else:
        (tmp_path / "file").write_text("precious")
        run.symlink_to("file") if "link" in kind else (tmp_path / "file").rename(run)
    assert "--output_dir" in refuses(run, mode, untouched=tmp_path / "none")
    assert os.path.lexists(run)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("mode", ["--resume=false", "--resume=auto"])
@pytest.mark.parametrize("kind", ["empty", "link", "mount point"])
def test_an_empty_directory_is_a_new_run(train, tmp_path, mount, kind, mode):
    run = tmp_path / "run"
    if kind == "mount point":
        mount(run)
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        run.symlink_to("elsewhere")
    else:
        run.mkdir()
    ended = train(run, mode)
    assert ended.status == 0, ended
    holds(ended, run)
    assert sorted(path.name for path in run.iterdir()) == ["final", "last", "metrics.jsonl"]
    assert ended.output.count("aside") == 0


def test_a_mount_point_with_an_unfinished_run_is_emptied(train, tmp_path, mount):
    run = mount(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    ended = train(run, "--resume=auto")
    assert ended.status == 0, ended
    holds(ended, run)
    assert f"moved its contents to {run}/run.aside-1" in ended.output
    assert (run / "run.aside-1" / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("mode", ["--resume=false", "--resume=auto"])
def test_a_writable_directory_in_a_read_only_one(train, tmp_path, mount, read_only, mode):
    parent = tmp_path / "parent"
    (parent / "run").mkdir(parents=True)
    read_only(parent)
    run = mount(parent / "run")
    ended = train(run, mode)
    assert ended.status == 0, ended
    holds(ended, run)


@pytest.mark.parametrize("mode", ["--resume=false", "--resume=auto"])
@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.usefixtures("before_the_model")
def test_a_read_only_place_is_refused(refuses, tmp_path, read_only, mode, exists):
    parent = tmp_path / "parent"
    (parent / "run").mkdir(parents=True)
    read_only(parent)
    run = parent / ("run" if exists else "another")
    line = refuses(run, mode)
    assert f"--output_dir={run} cannot be written: [Errno 30]" in line


@pytest.mark.usefixtures("before_the_model")
def test_a_read_only_run_cannot_be_resumed_but_is_done(train, refuses, unbroken, tmp_path, saving, read_only):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run, symlinks=True)
    read_only(run)
    ended = train(run, *saving, "--resume=auto")
    assert (ended.status, ended.errors) == (0, "")
    assert "nothing to do" in ended.output
    line = refuses(run, *saving, "--resume=auto", "--steps=8")
    assert f"--output_dir={run} cannot be written: [Errno 30]" in line


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_said(train, tmp_path, monkeypatch, caplog, number):
    def lockf(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    run = tmp_path / "run"
    ended = train(run)
    assert ended.status == 0, ended
    holds(ended, run)
    [line] = [record.message for record in caplog.records if "locked" in record.message]
    assert f"--output_dir={run} cannot be locked ({os.strerror(number)})" in line


# --- strange nodes in it ---------------------------------------------------------------------------------

KINDS = ["file", "directory", "link to a directory", "dangling link", "fifo"]
TEMPORARY = ["step_000006.tmp", "step_000099.tmp", "final.tmp", "last.tmp", "metrics.jsonl.tmp"]


def put(kind, path):
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / "precious").write_text("precious")
    if kind == "file":
        path.write_text("")
    elif kind == "directory":
        path.mkdir()
        (path / "file").write_text("")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(elsewhere if kind == "link to a directory" else "nowhere")
    return elsewhere


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", KINDS)
def test_any_node_at_a_temporary_name(train, unbroken, interrupted, tmp_path, kind):
    for name in TEMPORARY:
        elsewhere = put(kind, interrupted / name)
    ended = train(None, f"--config_path={interrupted}", "--resume=true", "--save_freq=1")
    assert ended.status == 0, ended
    holds(ended, interrupted)
    assert "error: " not in ended.output
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]
    verify_checkpoint(interrupted / "step_000005", 0, 1)
    assert not list(interrupted.glob("*.tmp"))
    assert_same_bits(interrupted / "final", unbroken / "final")


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["step_000005", "final"])
def test_any_node_at_the_name_of_a_checkpoint(train, unbroken, interrupted, kind, name):
    elsewhere = put(kind, interrupted / name)
    ended = train(None, f"--config_path={interrupted}", "--resume=true", "--save_freq=1")
    assert ended.status == 0, ended
    holds(ended, interrupted)
    assert f"{interrupted}/{name}.aside-1" in ended.output
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]
    verify_checkpoint(interrupted / "step_000005", 0, 1)
    assert_same_bits(interrupted / "final", unbroken / "final")


# --- `last` as a directory -------------------------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["copy", "only one", "older copy", "damaged", "other", "file"])
def test_last_as_a_directory(train, unbroken, interrupted, kind):
    """Copies from object stores have no links."""
    last, newest = interrupted / "last", interrupted / "step_000004"
    last.unlink()
    if kind == "only one":
        newest.rename(last)
    elif kind == "file":
        last.write_text("step_000004")
    else:
        shutil.copytree(interrupted / "step_000002" if kind == "older copy" else newest, last)
    if kind == "damaged":
        (last / "manifest.json").write_text("{}")
    if kind == "other":
        (newest / "manifest.json").unlink()
    limits = ["--save_freq=1", "--save_total_limit=1"]
    ended = train(None, f"--config_path={interrupted}/last/train_config.json", "--resume=true", *limits)
    assert ended.status == 0, ended
    holds(ended, interrupted)
    assert "resuming from " + str(newest) in ended.output
    assert "error: " not in ended.output
    aside = kind in ("older copy", "damaged", "file")
    assert (interrupted / "last.aside-1").exists() == aside
    assert [path.name for path in interrupted.glob("step_*") if "aside" not in path.name] == ["step_000005"]
    assert_same_bits(interrupted / "final", unbroken / "final")


def test_a_last_that_appears_during_a_run(train, tmp_path, at_step_3, caplog):
    def copy(run):
        (run / "last").unlink()
        shutil.copytree(run / "step_000002", run / "last")

    at_step_3(copy)
    run = tmp_path / "run"
    ended = train(run, "--save_freq=2", "--steps=5")
    assert ended.status == 0, ended
    holds(ended, run)
    assert "error: " not in ended.output
    assert f"{run}/last is not a link: renamed it to {run}/last.aside-1" in caplog.text


# --- a finished run is extended --------------------------------------------------------------------------


@pytest.fixture
def finished(unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run, symlinks=True)
    return run


@pytest.fixture
def extended(train, unbroken, tmp_path):
    """The same run extended in another directory."""
    flags = ["--resume=true", "--steps=8", f"--output_dir={tmp_path}/extended"]
    ended = train(None, f"--config_path={unbroken}/final/train_config.json", *flags)
    assert ended.status == 0, ended
    return tmp_path / "extended" / "final"


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("named", "periodic"),
    [("", True), ("last/train_config.json", False), ("final/train_config.json", False), ("auto", False)],
)
def test_a_finished_run_is_extended_in_place(train, saving, unbroken, finished, extended, named, periodic):
    if periodic:
        shutil.copytree(finished / "final", finished / "step_000006")
    if named == "auto":
        ended = train(finished, *saving, "--resume=auto", "--steps=8")
    else:
        ended = train(None, f"--config_path={finished / named}", "--resume=true", "--steps=8")
    assert ended.status == 0, ended
    holds(ended, finished)
    assert_same_bits(finished / "final", extended)
    assert verify_checkpoint(finished / "step_000006", 0, 1)["step"] == 6
    assert_same_bits(finished / "step_000006", unbroken / "final")
    assert not list(finished.glob("*.tmp"))


CALLS = ["_verify", "set_old_final_aside", "publish_directory", "point_last_at"]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("call", "after", "periodic"),
    [(call, after, False) for call in CALLS for after in (False, True)]
    + [(call, True, True) for call in CALLS[1:]],
)
def test_an_extension_killed_in_its_final_save(
    train, saving, finished, extended, monkeypatch, call, after, periodic
):
    if periodic:
        shutil.copytree(finished / "final", finished / "step_000006")
    again = [*saving, "--resume=auto", "--steps=8"]
    owner = PendingCheckpoint if call == "_verify" else save
    original = getattr(owner, call)

    def die(*args):
        if after:
            original(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(owner, call, die)
        assert train(finished, *again, "--save_freq=0").status == 130
    complete, skipped = run_directory.complete_checkpoints(finished)
    assert not skipped
    for _, path in complete:
        verify_checkpoint(path, 0, 1)
    assert complete[0][0] in (6, 8)
    ended = train(finished, *again, "--save_freq=0")
    assert ended.status == 0, ended
    holds(ended, finished)
    assert_same_bits(finished / "final", extended)


def test_an_extension_that_is_stopped_keeps_both(train, saving, finished, extended):
    ended = train(finished, *saving, "--resume=auto", "--steps=8", "--max_runtime=0.1s")
    assert ended.status == 75, ended
    assert verify_checkpoint(finished / "final", 0, 1)["step"] == 6
    assert verify_checkpoint(finished / "step_000007", 0, 1)["step"] == 7
    ended = train(finished, *saving, "--resume=auto", "--steps=8")
    assert ended.status == 0, ended
    assert f"resuming from {finished}/step_000007" in ended.output
    holds(ended, finished)
    assert_same_bits(finished / "final", extended)


# --- during the run --------------------------------------------------------------------------------------


@pytest.mark.sample(3)
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("kind", ["deleted", "moved", "a file"])
def test_a_directory_that_vanishes(train, tmp_path, at_step_3, kind, background):
    def vanish(run):
        run.rename(tmp_path / "moved")
        if kind == "deleted":
            shutil.rmtree(tmp_path / "moved")
        if kind == "a file":
            run.write_text("precious")

    at_step_3(vanish)
    run = tmp_path / "run"
    flags = ["--save_freq=4", "--steps=5", f"--checkpoint.background={str(background).lower()}"]
    ended = train(run, *flags)
    assert ended.status == 2, ended
    holds(ended, run)
    assert ended.errors.count("\n") == 1, ended.errors
    assert f"no checkpoint can be saved: {run} was deleted, moved or unmounted" in ended.errors
    said = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert len(said) == 2, said
    assert f"error: {run}/metrics.jsonl cannot be written" in said[0]
    assert f"error: no checkpoint can be saved: {run}" in said[1]
    assert not run.exists() or run.is_file()


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["file deleted", "file replaced", "directory created anew"])
def test_metrics_that_vanish_are_noticed(train, tmp_path, at_step_3, kind):
    def vanish(run):
        if kind == "directory created anew":
            shutil.rmtree(run)
            run.mkdir()
        else:
            (run / "metrics.jsonl").unlink()
        if kind == "file replaced":
            (run / "metrics.jsonl").write_text('{"step": 0}\n')

    at_step_3(vanish)
    run = tmp_path / "run"
    ended = train(run, "--save_freq=2", "--steps=5")
    assert ended.status == 0, ended
    holds(ended, run)
    said = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert said == [
        f"error: {run}/metrics.jsonl was deleted or replaced: earlier rows of this run are not in it"
    ]
    assert [row["step"] for row in metrics(run) if "train/loss" in row] == [4, 5]


@pytest.mark.sample(2)
@pytest.mark.parametrize("what", ["model.safetensors", "config.json", None])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", [2, 4])
def test_a_save_that_vanishes_before_it_is_verified(train, tmp_path, monkeypatch, what, when, step):
    """Step 2 is a periodic save, step 4 the final one; before or after its files are read back."""
    hashes = save.hash_files

    def vanish(directory):
        (directory / what).unlink() if what else shutil.rmtree(directory)

    def hash_files(directory, *rest):
        due = directory.name == ("step_000002.tmp" if step == 2 else "final.tmp")
        if due and when == "before":
            vanish(directory)
        files = hashes(directory, *rest)
        if due and when == "after":
            vanish(directory)
        return files

    monkeypatch.setattr(save, "hash_files", hash_files)
    run = tmp_path / "run"
    ended = train(run, "--save_freq=2")
    holds(ended, run)
    assert ended.status == (0 if step == 2 else 2)
    name = "step_000002" if step == 2 else "final"
    [line] = [line for line in (ended.output + ended.errors).splitlines() if line.startswith("error: ")]
    assert name in line
    assert "cannot be" in line
    assert not (run / name).exists()


@pytest.mark.sample(3)
@pytest.mark.parametrize("megabytes", [0.1, 2, 3, 4.5, 6, 7.5, 9, 12, 15])
def test_a_run_on_a_small_disk(train, saving, tmp_path, mount, megabytes):
    run = mount(tmp_path / "run", f"{round(megabytes * 1024)}k")
    ended = train(run, *saving)
    holds(ended, run)
    for path in run_directory.checkpoint_directories(run):
        verify_checkpoint(path, 0, 1)
    said = [line for line in (ended.output + ended.errors).splitlines() if line.startswith("error: ")]
    assert all("No space left on device" in line for line in said)
    assert ended.status == 0 or said


def test_builders_are_locked_too(tmp_path, unbroken):
    """An export beside another one would delete its unfinished directory."""
    from multiprocessing import get_context

    from craft_ds.export.export import export_checkpoint
    from craft_ds.tensor_io.filesystem import atomic_directory

    context = get_context("fork")
    ready, stop = context.Event(), context.Event()
    output = tmp_path / "exported"

    def hold():
        with atomic_directory(output) as temporary:
            temporary.mkdir()
            ready.set()
            stop.wait(60)

    process = context.Process(target=hold)
    process.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match=f"--output={output} is in use by process {process.pid} on "):
        export_checkpoint(unbroken / "final", output)
    assert (tmp_path / "exported.tmp").is_dir()
    stop.set()
    process.join()
    assert process.exitcode == 0
    with pytest.raises(UserError, match=f"--output={output} exists already"):
        export_checkpoint(unbroken / "final", output)
    export_checkpoint(unbroken / "final", tmp_path / "another")
    assert not list(tmp_path.glob(".*"))

"""`--profile.*`: what a run writes, and that it trains as without."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import assert_same_bits, metrics

from craft_ds.training.step_profiler import StepProfiler

TASK = {"data", "task_forward", "task_backward", "all_reduce", "optimizer"}
PLAIN = TASK | {"clipping"}
RETENTION = TASK | {"surgery", "retention_forward", "retention_backward", "constraint_forward"}


def ranges(file: Path) -> dict[str, int]:
    """How often each named range is in a Chrome trace."""
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    return {name: names.count(name) for name in names}


@pytest.fixture
def profiled(train, inputs, tmp_path):
    """A CRaFT run that recorded steps 3 and 4; the third is a retention step."""
    run = tmp_path / "run"
    flags = [*inputs.craft_flags(), "--save_freq=2", "--profile.skip=2", "--profile.steps=2"]
    ended = train(run, *flags, "--steps=6")
    assert ended.status == 0, ended.errors
    return run, ended


def test_the_files_of_a_profile(profiled):
    run, ended = profiled
    directory = run / "profile" / "step_000003"
    assert {path.name for path in directory.iterdir()} == {"rank_0.trace.json.gz", "rank_0.seconds.json"}
    found = ranges(directory / "rank_0.trace.json.gz")
    assert found.keys() >= PLAIN | RETENTION
    assert found["task_forward"] == found["task_backward"] == found["optimizer"] == 2
    assert found["retention_forward"] == found["retention_backward"] == 1

    means = json.loads((directory / "rank_0.seconds.json").read_text())
    assert (means.pop("rank"), means.pop("first_step"), means.pop("last_step")) == (0, 3, 4)
    parts = {name.removesuffix("_s") for name in means} - {"step", "update", "other"}
    assert parts == PLAIN | RETENTION
    rows = [row for row in metrics(run) if "time/step_s" in row][2:4]
    step_s, data_s = (sum(row[f"time/{name}"] for row in rows) / 2 for name in ("step_s", "data_s"))
    assert means["step_s"] == pytest.approx(step_s)
    assert means["data_s"] <= data_s  # the same wait, timed inside the other
    assert means["update_s"] == pytest.approx(means["step_s"] - means["data_s"])
    assert means["update_s"] == pytest.approx(
        sum(means[f"{name}_s"] for name in (parts - {"data"}) | {"other"})
    )
    assert all(value > 0 for value in means.values())
    assert "profile of steps 3 to 4, means per step: step_s " in ended.output
    assert f"profile: wrote {directory} " in ended.output
    assert "no memory snapshot, which only CUDA has" in ended.output


def test_a_profiled_run_trains_the_same_bits(profiled, unbroken):
    run, _ = profiled
    for name in ("step_000004", "final"):
        assert_same_bits(run / name, unbroken / name)


def test_a_resumed_run_keeps_earlier_profiles(profiled, train):
    run, _ = profiled
    first = run / "profile" / "step_000003"
    kept = (first / "rank_0.seconds.json").read_bytes()
    first.rename(run / "profile" / "step_000005")  # which the resumed run records
    for name in ("final", "step_000004"):
        shutil.rmtree(run / name)
    ended = train(None, f"--config_path={run}/step_000002", "--resume=true")
    assert ended.status == 0, ended.errors
    aside = run / "profile" / "step_000005.aside-1"
    assert f"renamed {run}/profile/step_000005 to {aside}" in ended.output
    assert (aside / "rank_0.seconds.json").read_bytes() == kept
    assert json.loads((run / "profile" / "step_000005" / "rank_0.seconds.json").read_text())["last_step"] == 6


def test_a_profile_beyond_the_last_step(train, tmp_path):
    run = tmp_path / "run"
    ended = train(run, "--steps=3", "--save_freq=2", "--profile.skip=2", "--profile.steps=50")
    assert ended.status == 0, ended.errors
    means = json.loads((run / "profile" / "step_000003" / "rank_0.seconds.json").read_text())
    assert (means["first_step"], means["last_step"]) == (3, 3)
    shutil.rmtree(run / "final")
    ended = train(None, f"--config_path={run}/step_000002", "--resume=true")
    assert ended.status == 0, ended.errors
    assert "no profile: --profile.skip=2 steps from step 2 on, of 3, leave none" in ended.output


def profiler(directory: Path, say, skip: int = 1) -> StepProfiler:
    from craft_ds.config.configs import ProfileConfig

    options = ProfileConfig(steps=2, skip=skip)
    return StepProfiler(options, directory, rank=0, device=torch.device("cpu"), first=skip + 1, say=say)


def test_a_run_that_fails_while_recording(tmp_path):
    said: list[str] = []
    found = profiler(tmp_path / "profile", said.append)
    found.after_step(0.1)
    found.close()
    found.close()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank_0.trace.json.gz"]
    assert len(said) == 1


def test_a_run_that_ends_before_its_profile(tmp_path):
    said: list[str] = []
    profiler(tmp_path / "profile", said.append, skip=2).close()
    assert said == ["no profile: the run ended before step 3"]
    assert list(tmp_path.iterdir()) == []


def test_a_profile_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file")
    found = profiler(tmp_path / "profile", print)
    for _ in range(3):
        found.after_step(0.1)
    assert "profile cannot be written" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--profile.skip=3"], "--profile.skip=3 has no effect without --profile.steps: add it, or omit it"),
        (["--profile.steps=-1"], "--profile.steps=-1 must be at least 0"),
        (["--profile.steps=1", "--profile.skip=0"], "--profile.skip=0 must be at least 1"),
        (["--profile.steps=1", "--profile.skip=4"], "--profile.skip=4 of --steps=4 leaves no step to record"),
    ],
)
def test_contradictory_profile_flags_are_refused(refuses, tmp_path, flags, message):
    assert message in refuses(tmp_path / "run", *flags)


@pytest.mark.distributed
def test_each_rank_writes_its_own_profile(inputs, fork_server, tmp_path):
    run = tmp_path / "run"
    flags = [*inputs.flags(run), *inputs.craft_flags(), "--engine=fsdp", "--profile.steps=2"]
    commands = tmp_path / "commands.json"
    commands.write_text(json.dumps({"run": [*flags, "--profile.skip=1", "--save_checkpoint=false"]}))
    program = Path(__file__).with_name("training_ranks.py")
    fork_server.run([commands, tmp_path], 2, program=program, timeout=240).check()
    for rank in range(2):
        files = f"rank_{rank}"
        found = ranges(run / "profile" / "step_000002" / f"{files}.trace.json.gz")
        assert found.keys() >= PLAIN | RETENTION
        means = json.loads((run / "profile" / "step_000002" / f"{files}.seconds.json").read_text())
        assert means["rank"] == rank

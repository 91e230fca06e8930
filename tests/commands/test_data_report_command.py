"""`craft-ds data-report`, and the same report at the start of a run."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from craft_ds.cli import run_command
from craft_ds.testing.datasets import edit_metadata, make_test_dataset
from craft_ds.testing.launch_ranks import run_ranks
from craft_ds.worlds import teacher_directory
from craft_ds.worlds.demonstrations import write_demonstrations
from craft_ds.worlds.recording import Recipe

pytestmark = pytest.mark.slow

STATE, ACTION = "observation.state", "action"


def edit_column(root: Path, key: str, change) -> None:
    """Change a tabular column of a data set: `change(values)` gets float32 (frames, width) in order."""
    (file,) = (root / "data").rglob("*.parquet")
    table = pq.read_table(file)
    index = table.column_names.index(key)
    values = np.stack(table.column(key).to_numpy()).astype(np.float32)
    column = pa.array(list(change(values).astype(np.float32)), type=table.schema.field(key).type)
    pq.write_table(table.set_column(index, table.schema.field(key), column), file)


def edit_info(root: Path, **changes) -> None:
    file = root / "meta" / "info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def names(root: Path, key: str, new: list[str]) -> None:
    features = json.loads((root / "meta" / "info.json").read_text())["features"]
    features[key]["names"] = new
    edit_info(root, features=features)


def nan_at(*rows: int):
    def change(values):
        values[list(rows), 1] = np.nan
        return values

    return change


@pytest.fixture
def data(inputs, tmp_path):
    """A copy of the new task's data set, to be changed: 4 episodes of 20 frames."""
    return Path(shutil.copytree(inputs.new, tmp_path / "data"))


@pytest.fixture
def report(inputs, capsys):
    """Run `craft-ds data-report` on data sets; return the status and what it printed."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = 0
        try:
            run_command("data-report", [f"--policy_path={inputs.policy}", *map(str, arguments)])
        except SystemExit as leaving:
            status = leaving.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


# --- the command ----------------------------------------------------------------------------------------


def test_a_fitting_data_set_is_a_table_and_status_0(report, inputs):
    status, output, errors = report(f"--dataset_root={inputs.new}")
    assert (status, errors) == (0, "")
    assert "data set new: 4 episodes, 80 frames, 10 fps, 1 task" in output
    assert "camera observation.images.top: 64x64x3, for the policy 64x64x3" in output
    assert "prompt tokens: max" in output
    assert output.splitlines()[-1].startswith("ok: no errors, ")


def test_errors_are_status_2_and_one_line_each(report, data):
    edit_column(data, STATE, nan_at(0, 25))
    edit_column(data, ACTION, np.rad2deg)
    status, output, errors = report(f"--dataset_root={data}")
    assert status == 2
    assert "data set data: 4 episodes" in output
    lines = errors.splitlines()
    places = "2 of 80 frames have NaN or Inf (episode 0 frame 0, episode 1 frame 5)"
    assert lines[0].startswith(f"error: data set data, observation.state: {places}")
    assert lines[1].startswith("error: data set data, action[x3]: ")
    assert all(line.startswith("error: ") for line in lines)


def test_old_and_new_data_are_compared(report, inputs, data):
    edit_info(data, fps=30)
    names(data, ACTION, ["x1", "x0", "x2", "x3"])
    names(data, STATE, ["a", "b", "c", "d"])
    status, output, errors = report(f"--dataset_root={inputs.old}", f"--dataset_root={data}")
    assert status == 2
    assert "warning: data set data: 30 fps, but 10 in old" in output
    assert "warning: data set data, observation.state: entries a, b, c, d" in output
    assert "error: data set data, action: another order than in old (entry 0 is x1, there x0)" in errors


def test_json_holds_what_the_table_holds(report, inputs, data, tmp_path):
    edit_column(data, ACTION, nan_at(79))
    status, output, _ = report(
        f"--dataset_root={inputs.old}", f"--dataset_root={data}", f"--json={tmp_path}/report.json"
    )
    content = json.loads((tmp_path / "report.json").read_text())
    assert status == 2
    assert [dataset["name"] for dataset in content["datasets"]] == ["old", "data"]
    action = next(field for field in content["datasets"][1]["fields"] if field["key"] == ACTION)
    assert (action["non_finite"], action["non_finite_at"]) == (1, [[3, 19]])
    assert [finding["level"] for finding in content["findings"]].count("error") == 1
    assert "data set old: 6 episodes" in output


def test_json_alone_goes_to_standard_output(report, inputs):
    status, output, errors = report(f"--dataset_root={inputs.new}", "--json=-")
    assert status == 0
    assert json.loads(output)["datasets"][0]["frames"] == 80
    assert "ok: no errors" in errors


def test_thresholds_and_samples_are_flags(report, inputs):
    _, output, _ = report(f"--dataset_root={inputs.new}", "--samples=10", "--images=0", "--frames=40")
    assert "measured: 40 of 80 frames, 10 tokenized\n" in output
    status, _, errors = report(f"--dataset_root={inputs.new}", "--clip_error=0.1")
    assert status == 2
    assert "of the values of observation.state clip" in errors


def test_renamed_cameras_and_missing_ones(report, tmp_path):
    wrist = make_test_dataset(tmp_path / "wrist", tasks=1, episodes_per_task=1, cameras=("wrist",))
    status, output, _ = report(f"--dataset_root={wrist}")
    assert status == 0
    assert (
        "observation.images.top: missing, but a camera of the policy (it has observation.images.wrist)"
        in output
    )
    names = {"observation.images.wrist": "observation.images.top"}
    _, output, _ = report(f"--dataset_root={wrist}", f"--rename_map={json.dumps(names)}")
    assert "missing" not in output
    assert "observation.images.wrist: 64x64x3, for the policy as observation.images.top 64x64x3" in output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "--dataset_root is missing"),
        (["--dataset_root={none}"], "--dataset_root={none} holds no LeRobot data set"),
        (["--dataset_root={new}", "--dataset_repo_id=a", "--dataset_repo_id=b"], "2 times --dataset_repo_id"),
        (["--dataset_root={new}", "--rename_map=top"], "--rename_map=top must be JSON"),
        (["--dataset_root={new}", "--samples=0"], "--data_report.samples=0 must be at least 1"),
        (["--dataset_root={new}", "--json={none}/a.json"], "--json={none}/a.json cannot be written"),
    ],
)
def test_wrong_arguments_are_one_line(report, inputs, tmp_path, arguments, reason):
    places = {"none": str(tmp_path / "none"), "new": str(inputs.new)}
    status, _, errors = report(*(argument.format(**places) for argument in arguments))
    assert status == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert reason.format(**places) in errors


def test_demonstrations_of_the_blocks_fit_their_teacher(tmp_path, capsys):
    old, new = write_demonstrations(Recipe("blocks", episodes_per_task=2), tmp_path / "blocks", processes=1)
    capsys.readouterr()
    sets = [f"--dataset_root={old}", f"--dataset_root={new}"]
    run_command("data-report", [f"--policy_path={teacher_directory('blocks')}", *sets])
    assert capsys.readouterr().out.splitlines()[-1] == "ok: no errors, 0 warnings"


def test_demonstrations_of_metaworld_fit_their_teacher(metaworld, tmp_path, capsys):
    recipe = Recipe("metaworld", episodes_per_task=1)
    old, new = write_demonstrations(recipe, tmp_path / "metaworld", processes=1)
    capsys.readouterr()
    sets = [f"--dataset_root={old}", f"--dataset_root={new}"]
    run_command("data-report", [f"--policy_path={teacher_directory('metaworld')}", *sets])
    assert capsys.readouterr().out.splitlines()[-1] == "ok: no errors, 0 warnings"


# --- at the start of a run ------------------------------------------------------------------------------


def test_every_start_prints_the_report(train, tmp_path):
    first = train(tmp_path / "run", "--save_freq=2")
    assert first.status == 0
    line = "data report (80 of 80 frames, 80 tokenized, 4 with images): observation.state 3 of 4 dimensions"
    assert line in first.output
    assert "warning: data set craft-ds/test, observation.state[x3]: " in first.output
    config = tmp_path / "run" / "step_000002" / "train_config.json"
    moved = tmp_path / "again"
    resumed = train(None, f"--config_path={config}", "--resume=true", f"--output_dir={moved}")
    assert resumed.status == 0
    assert line in resumed.output


@pytest.mark.parametrize("key", [STATE, ACTION])
def test_nan_ends_the_run_with_one_line(refuses, data, tmp_path, key):
    edit_column(data, key, nan_at(33))
    line = refuses(tmp_path / "run", f"--dataset.root={data}")
    assert f"data set craft-ds/test, episode 1, frame 13: {key}[1] is nan" in line


def test_errors_come_before_the_policy_is_built(refuses, data, tmp_path, monkeypatch):
    from craft_ds.training import build

    def built(*_):
        raise AssertionError("the policy was built")

    monkeypatch.setattr(build, "build_fp32_policy", built)
    edit_column(data, ACTION, np.rad2deg)
    assert "action[x3]" in refuses(tmp_path / "run", f"--dataset.root={data}")


def test_warn_prints_the_errors_and_trains(train, data, tmp_path):
    edit_column(data, STATE, np.rad2deg)
    ended = train(tmp_path / "run", f"--dataset.root={data}", "--data_check=warn")
    assert ended.status == 0
    assert "warning: data set craft-ds/test, observation.state[x3]: " in ended.output
    assert (tmp_path / "run" / "final").is_dir()


def test_off_skips_the_report(train, data, tmp_path):
    edit_column(data, STATE, np.rad2deg)
    ended = train(tmp_path / "run", f"--dataset.root={data}", "--data_check=off")
    assert ended.status == 0
    assert "data report" not in ended.output
    assert "data set craft-ds/test, " not in ended.output


def test_thresholds_are_flags_of_a_run(refuses, tmp_path):
    line = refuses(tmp_path / "run", "--data_report.clip_error=0.1")
    assert "of the values of observation.state clip" in line


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--data_check=maybe", "data_check"),
        ("--data_report.far=0.5", "--data_report.far=0.5 must exceed 1"),
        ("--data_report.frames=0", "--data_report.frames=0 must be at least 1"),
        ("--data_report.clip_error=-1", "--data_report.clip_error=-1.0 must not be negative"),
    ],
)
def test_wrong_flags_are_refused(refuses, tmp_path, flag, reason):
    assert reason in refuses(tmp_path / "run", flag)


# --- against the anchors --------------------------------------------------------------------------------


@pytest.fixture
def anchors(inputs, tmp_path):
    """Flags of a run with a copy of the anchors, and a function that changes its data set's metadata."""
    cache = Path(shutil.copytree(inputs.anchors, tmp_path / "cache"))

    def change(**entries) -> list[str]:
        dataset = json.loads((cache / "metadata.json").read_text())["dataset"]
        edit_metadata(cache, dataset={**dataset, **entries})
        return [*inputs.craft_flags(), f"--craft.anchor_cache_dir={cache}"]

    return change


def entries(names: list[str] | None) -> dict:
    return {ACTION: {"shape": [4], "names": names}, STATE: {"shape": [4], "names": ["x0", "x1", "x2", "x3"]}}


def test_anchors_of_another_frame_rate_are_a_warning(train, anchors, tmp_path):
    ended = train(tmp_path / "run", *anchors(fps=30, features=entries(["x0", "x1", "x2", "x3"])))
    assert ended.status == 0
    assert (
        "warning: data set craft-ds/test: 10 fps, but 30 in the anchors' data set craft-ds/test"
        in ended.output
    )


@pytest.mark.parametrize("names", [["x0", "x2", "x1", "x3"], ["a", "b", "c", "d"]])
def test_anchors_of_other_actions_are_refused(refuses, anchors, tmp_path, names):
    line = refuses(tmp_path / "run", *anchors(features=entries(names)))
    assert "data set craft-ds/test, action: " in line
    assert "the anchors' data set craft-ds/test" in line


@pytest.mark.parametrize("features", [None, entries(None), {}])
def test_anchors_without_names_are_not_compared(train, anchors, tmp_path, features):
    ended = train(tmp_path / "run", *anchors(fps=None, features=features))
    assert ended.status == 0
    assert "the anchors' data set" not in ended.output


# --- several ranks --------------------------------------------------------------------------------------

RANK = """
import os, sys
os.environ["LOCAL_RANK"] = "0"  # every rank prints
from craft_ds.cli import exit_without_teardown, run_command
exit_without_teardown(lambda: run_command("train", sys.argv[1:]))
"""


@pytest.mark.distributed
def test_two_ranks_end_with_the_same_line(inputs, data, tmp_path):
    edit_column(data, ACTION, np.rad2deg)
    flags = [*inputs.flags(tmp_path / "run"), f"--dataset.root={data}", "--engine=fsdp"]
    ends = run_ranks([sys.executable, "-c", RANK, *flags], 2, timeout=240)
    assert [end.status for end in ends] == [2, 2], "\n".join(end.output for end in ends)
    lines = [next(line for line in end.output.splitlines() if line.startswith("error: ")) for end in ends]
    assert "action[x3]" in lines[0]
    assert lines[1] == lines[0]
    assert not (tmp_path / "run").exists()

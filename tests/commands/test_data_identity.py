"""What trains is the data set that was asked for, and a resumed run's is the one it began with."""

import json
import shutil

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import assert_same_bits, assert_trained, trained

from craft_ds.testing.checkpoints import renew_manifest
from craft_ds.testing.datasets import TASK_TEXTS, make_test_dataset
from craft_ds.testing.policies import make_test_policy_dir

pytestmark = pytest.mark.slow

RUN = ["--steps=4", "--save_freq=2"]


# --- the fingerprint --------------------------------------------------------------------------------------


@pytest.fixture
def stopped(train, inputs, tmp_path):
    """A run that stopped after 2 of 4 steps, and its own copy of the data."""
    root = shutil.copytree(inputs.new, tmp_path / "new")
    ended = train(tmp_path / "run", *RUN, f"--dataset.root={root}")
    assert ended.status == 0, ended.errors
    shutil.copytree(tmp_path / "run" / "final", tmp_path / "reference")
    shutil.rmtree(tmp_path / "run" / "final")
    return tmp_path / "run", root


def record_anew(root, **changes):
    shutil.rmtree(root)
    make_test_dataset(root, tasks=1, episodes_per_task=4, **{"seed": 99, **changes})


def edit_action(root):
    (file,) = (root / "data").rglob("*.parquet")
    table = pq.read_table(file)
    values = table["action"].to_pylist()
    values[33][2] += 1e-6
    at = table.schema.get_field_index("action")
    pq.write_table(
        table.set_column(
            at, table.schema.field("action"), pa.array(values, type=table.schema.field("action").type)
        ),
        file,
    )


def rename_task(root):
    path = root / "meta" / "tasks.parquet"
    table = pd.read_parquet(path)
    table.index = pd.Index(["another text"], name="task")
    table.to_parquet(path)
    (file,) = (root / "meta" / "episodes").rglob("*.parquet")
    episodes = pq.read_table(file).to_pandas()
    episodes["tasks"] = [["another text"]] * len(episodes)
    episodes.to_parquet(file)


def edit_robot(root):
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"robot_type": "another"}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (record_anew, "data/ and meta/"),
        (edit_action, "its files in data/ have"),
        (rename_task, "its files in meta/ have"),
        (edit_robot, "its files in meta/ have"),
    ],
)
def test_a_data_set_that_changed_is_refused_at_resume(train, stopped, change, named):
    run, root = stopped
    change(root)
    ended = train(None, f"--config_path={run}", "--resume=true")
    assert ended.status == 2
    assert ended.errors.count("\n") == 1
    assert "--dataset.repo_id=craft-ds/test is not the data set that" in ended.errors
    assert named in ended.errors
    assert not (run / "final").exists()


def test_a_copy_elsewhere_is_the_same_data_set(train, stopped, tmp_path):
    run, root = stopped
    shutil.copytree(root, tmp_path / "elsewhere")
    shutil.rmtree(root)
    ended = train(None, f"--config_path={run}", "--resume=true", f"--dataset.root={tmp_path}/elsewhere")
    assert ended.status == 0, ended.errors
    assert_same_bits(run / "final", tmp_path / "reference")


def test_a_checkpoint_without_a_fingerprint_resumes(train, stopped, tmp_path):
    run, _ = stopped
    path = run / "step_000002" / "craft_state.pt"
    state = torch.load(path, weights_only=True)
    assert set(state.pop("dataset_fingerprint")) == {"meta", "data"}
    del state["progress"]["bad_samples"]
    torch.save(state, path)
    renew_manifest(path.parent)
    ended = train(None, f"--config_path={run}", "--resume=true")
    assert ended.status == 0, ended.errors
    assert_same_bits(run / "final", tmp_path / "reference")


# --- one data set, with its own texts ---------------------------------------------------------------------


@pytest.mark.parametrize("repo_id", ["[a/one,a/two]", "['a/one', 'a/two']", "a/one,a/two"])
def test_several_data_sets_are_refused_by_name(refuses, tmp_path, repo_id):
    line = refuses(tmp_path / "run", f"--dataset.repo_id={repo_id}")
    assert "--dataset.repo_id=" in line
    assert "names several data sets" in line
    assert "lerobot-edit-dataset --operation.type merge" in line


def test_rows_of_task_texts_in_another_order_train_the_same(train, inputs, tmp_path):
    plain = make_test_dataset(tmp_path / "plain", tasks=2, episodes_per_task=2, seed=1)
    turned = shutil.copytree(plain, tmp_path / "turned")
    table = pd.DataFrame({"task_index": [1, 0]}, index=pd.Index([TASK_TEXTS[1], TASK_TEXTS[0]], name="task"))
    table.to_parquet(turned / "meta" / "tasks.parquet")
    for root in (plain, turned):
        ended = train(tmp_path / f"run_{root.name}", f"--dataset.root={root}", "--steps=3")
        assert ended.status == 0, ended.errors
    one, other = (trained(tmp_path / f"run_{root.name}" / "final") for root in (plain, turned))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_task_texts_of_other_tasks_are_refused(refuses, tmp_path):
    root = make_test_dataset(tmp_path / "new", tasks=2, episodes_per_task=2)
    table = pd.DataFrame({"task_index": [0, 1]}, index=pd.Index([TASK_TEXTS[1], TASK_TEXTS[0]], name="task"))
    table.to_parquet(root / "meta" / "tasks.parquet")
    assert f"gives the frames of episode 0 the task {TASK_TEXTS[1]!r}" in refuses(
        tmp_path / "run", f"--dataset.root={root}"
    )


# --- what is held out -------------------------------------------------------------------------------------


def test_the_start_says_what_is_held_out(train, tmp_path):
    ended = train(tmp_path / "run", "--eval_freq=4", "--steps=1")
    assert ended.status == 0, ended.errors
    assert "60 samples, 20 held out (episode 3: 1 of 4 episodes, 25%)" in ended.output
    assert "warning: 25% of the episodes are held out for --eval_freq, not --dataset.eval_split=0.05" in (
        ended.output
    )
    ended = train(tmp_path / "asked", "--eval_freq=4", "--steps=1", "--dataset.eval_split=0.25")
    assert "held out (episode 3" in ended.output
    assert "are held out for" not in ended.output


# --- unusual, but right -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_states_and_actions_of_one_entry_train(train, tmp_path, workers):
    policy = make_test_policy_dir(tmp_path / "policy", width=1)
    root = make_test_dataset(tmp_path / "one", 1, 4, state_dim=1, action_dim=1)
    flags = [f"--policy.path={policy}", f"--dataset.root={root}", f"--num_workers={workers}"]
    flags += ["--dataloader_multiprocessing_context=fork"]
    ended = train(tmp_path / "run", *flags, "--eval_freq=2", "--dataset.eval_split=0.25")
    assert ended.status == 0, ended.errors
    assert_trained(tmp_path / "run" / "final", policy)


def test_pictures_of_another_size_train(train, inputs, tmp_path):
    """pi0_fast resizes them."""
    root = make_test_dataset(tmp_path / "large", 1, 4, image_size=(48, 96))
    assert train(tmp_path / "run", f"--dataset.root={root}").status == 0
    assert_trained(tmp_path / "run" / "final", inputs.policy)


# --- refused before the model is built --------------------------------------------------------------------


def old_format(root):
    info = json.loads((root / "meta" / "info.json").read_text())
    (root / "meta" / "info.json").write_text(json.dumps(info | {"codebase_version": "v2.1"}))


def without_action(root):
    unnamed_action(root)
    path = next((root / "data").rglob("*.parquet"))
    pq.write_table(pq.read_table(path).drop_columns(["action"]).replace_schema_metadata(None), path)


def unnamed_action(root):
    info = json.loads((root / "meta" / "info.json").read_text())
    del info["features"]["action"]
    (root / "meta" / "info.json").write_text(json.dumps(info))


def empty_texts(root):
    path = root / "meta" / "tasks.parquet"
    pd.read_parquet(path).iloc[:0].to_parquet(path)


def lost_data(root):
    next((root / "data").rglob("*.parquet")).rename(root / "data" / "chunk-000" / "file-001.parquet")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (old_format, ["format v2.1", "lerobot.scripts.convert_dataset_v21_to_v30"]),
        (without_action, ["has no action", "observation.state"]),
        (unnamed_action, ["has the columns action, which meta/info.json does not name"]),
        (empty_texts, ["has no task texts", "meta/tasks.parquet has no row"]),
        (lost_data, ["lacks data/chunk-000/file-000.parquet", "episodes 0, 1, 2, 3 need"]),
    ],
)
def test_an_unusable_data_set_is_one_line(refuses, inputs, tmp_path, monkeypatch, change, words):
    root = shutil.copytree(inputs.new, tmp_path / "new")
    change(root)
    monkeypatch.setattr("craft_ds.training.build.build_fp32_policy", None)
    line = refuses(tmp_path / "run", f"--dataset.root={root}")
    assert all(word in line for word in words), line
    assert "hub" not in line.lower().replace("--push-to-hub", "")


def test_lerobots_version_error_has_a_text(refuses, tmp_path, monkeypatch):
    """The data set on the hub has another version: LeRobot's message begins with an empty line."""
    import packaging.version
    from lerobot.datasets.utils import BackwardCompatibilityError

    def refuse(*_: object) -> None:
        raise BackwardCompatibilityError("craft-ds/test", packaging.version.parse("v2.1"))

    monkeypatch.setattr("craft_ds.data.task_data.make_train_eval_datasets", refuse)
    line = refuses(tmp_path / "run")
    assert "in another format than v3.0 (The dataset you requested (craft-ds/test) is in 2.1 format" in line
    assert "lerobot.scripts.convert_dataset_v21_to_v30" in line

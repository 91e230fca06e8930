"""`craft-ds sequence`: its plan, its commands, its report, and a sequence that is killed and continued."""

import copy
import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from runs import assert_same_bits

from craft_ds.cli import run_command
from craft_ds.commands import sequence
from craft_ds.commands.sequence_file import read_plan
from craft_ds.commands.sequence_plan import SequencePlan
from craft_ds.commands.sequence_report import Column, stage_matrix, write_report
from craft_ds.commands.sequence_steps import sequence_steps
from craft_ds.errors import UserError
from craft_ds.worlds import teacher_directory
from craft_ds.worlds.demonstrations import Recipe, write_demonstrations

ROOT = Path(__file__).parents[2]


def content(output="out") -> dict:
    """A plan of two stages in the world of blocks, with anchors of the start policy's tasks."""
    return {
        "output_dir": str(output),
        "start": {"policy": "teacher", "repo_id": "me/old", "root": "old", "tasks": ["reach-red"]},
        "stages": [
            {"name": "a", "repo_id": "me/a", "root": "a", "tasks": ["reach-green", "reach-blue"]},
            {"name": "b", "repo_id": "me/b", "tasks": ["reach-yellow"], "train": {"steps": 7}},
        ],
        "train": {
            "steps": 5,
            "craft": {"enabled": True},
            "craft.retention_freq": 2,
            "policy.optimizer_lr": 1e-3,
        },
        "anchors": {"num_samples": 10, "targets": ["hidden", "teacher_kl"], "vision_features": True},
        "evaluation": {"world": "blocks", "episodes": 3},
        "launcher": {"engine": "fsdp", "ranks": 2},
    }


def read(tmp_path: Path, plan: dict | str) -> SequencePlan:
    file = tmp_path / "plan.yaml"
    file.write_text(plan if isinstance(plan, str) else yaml.safe_dump(plan))
    return read_plan(file)


def changed(path: str, value, plan: dict | None = None) -> dict:
    """The plan with one entry set, or removed if the value is `...`."""
    plan = content() if plan is None else plan
    *groups, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    section = plan
    for group in groups:
        section = section[group] if isinstance(section, list) else section.setdefault(group, {})
    if value is ...:
        del section[last]
    else:
        section[last] = value
    return plan


def flags(command: list[str]) -> dict[str, str]:
    return dict(word.partition("=")[::2] for word in command if word.startswith("--"))


def test_steps_follow_the_plan(tmp_path):
    steps = list(sequence_steps(read(tmp_path, content())))
    kinds = [next(word for word in step.command if word in ("eval", "anchors", "train")) for step in steps]
    assert kinds == ["eval", "anchors", "train", "eval", "anchors", "train", "eval"]
    assert [step.measures for step in steps] == [0, None, None, 1, None, None, 2]
    assert len({step.output for step in steps}) == len(steps)
    first, second = flags(steps[2].command), flags(steps[5].command)
    assert first["--policy.path"] == "teacher"
    assert second["--policy.path"] == "out/01_a/train/final"
    assert first["--resume"] == second["--resume"] == "auto"
    assert (first["--dataset.root"], second.get("--dataset.root")) == ("a", None)
    assert (first["--steps"], second["--steps"]) == ("5", "7")
    assert first["--craft.anchor_cache_dir"] == "out/00_start/anchors"
    assert second["--craft.anchor_cache_dir"] == "out/00_start/anchors,out/01_a/anchors"
    assert first["--craft.enabled"] == "true"
    assert first["--policy.optimizer_lr"] == "0.001"
    assert "--nproc-per-node=2" in steps[2].command
    assert first["--engine"] == "fsdp"
    teachers = [flags(steps[number].command)["--policy_path"] for number in (1, 4)]
    assert teachers == ["teacher", "out/01_a/train/final"]
    words = steps[4].command
    assert words[words.index("--targets") :] == ["--targets", "hidden", "teacher_kl", "--vision_features"]
    assert flags(steps[3].command)["--policy.path"] == "out/01_a/train/final"
    tasks = steps[3].command[steps[3].command.index("--tasks") + 1 :]
    assert tasks == ["reach-red", "reach-green", "reach-blue", "reach-yellow"]


def test_a_preset_decides_whether_anchors_are_used(tmp_path):
    for train in ({"craft.preset": "l2"}, {"craft": {"preset": "sequential"}}):
        with pytest.raises(UserError, match="anchors: have no effect without CRaFT or EWC"):
            read(tmp_path, changed("train", train))
    plan = changed("start", {"policy": "teacher"}) | {"train": {"craft.preset": "ewc", "penalty.weight": 3.0}}
    first, second = (flags(s.command) for s in sequence_steps(read(tmp_path, plan)) if "train" in s.command)
    assert not any(name.startswith(("--craft", "--penalty")) for name in first)
    assert (second["--penalty.name"], second["--penalty.weight"]) == ("ewc", "3.0")
    assert second["--craft.anchor_cache_dir"] == "out/01_a/anchors"


def test_a_home_directory_is_expanded_as_in_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    plan = read(tmp_path, changed("output_dir", "~/out") | {"start": {"policy": "~/teacher"}})
    assert (plan.output_dir, plan.start.policy) == ("/home/me/out", "/home/me/teacher")
    assert read(tmp_path, changed("stages/0/root", "~/a")).stages[0].root == "/home/me/a"


def test_the_first_stage_without_anything_learned_is_plain(tmp_path):
    plan = changed("start", {"policy": "teacher"})
    plan["evaluation"]["every"] = 2
    steps = [step for step in sequence_steps(read(tmp_path, plan)) if "train" in step.command]
    assert not any(name.startswith("--craft") for name in flags(steps[0].command))
    assert "without craft.*" in steps[0].title
    assert flags(steps[1].command)["--craft.anchor_cache_dir"] == "out/01_a/anchors"
    assert flags(steps[0].command)["--world.tasks"] == '["reach-green", "reach-blue"]'
    assert flags(steps[1].command)["--eval_freq"] == "2"


def observing(**changes) -> dict:
    """The plan with anchors from observations."""
    plan = content() | {"anchors_from": "observations"} | changes
    plan["start"] = {"policy": "teacher", "tasks": ["reach-red"], "instructions": ["Reach red"]}
    plan["stages"][0]["instructions"] = ["Reach green", "Reach blue"]
    return plan


def test_anchors_from_observations_need_no_old_data(tmp_path):
    """Each stage's own data, seen with the instructions of all before, by the policy that it starts from."""
    steps = list(sequence_steps(read(tmp_path, observing())))
    kinds = [next(word for word in step.command if word in ("eval", "anchors", "train")) for step in steps]
    assert kinds == ["eval", "anchors", "train", "eval", "anchors", "train", "eval"]
    expected = [
        ("me/a", "teacher", "out/01_a/anchors", ["Reach red"]),
        ("me/b", "out/01_a/train/final", "out/02_b/anchors", ["Reach red", "Reach green", "Reach blue"]),
    ]
    for number, (data, teacher, cache, texts) in zip((1, 4), expected, strict=True):
        words, given = steps[number].command, flags(steps[number].command)
        assert (given["--dataset_repo_id"], given["--policy_path"], given["--output_dir"]) == (
            data,
            teacher,
            cache,
        )
        first = words.index("--instructions") + 1
        assert words[first : first + len(texts) + 1] == [*texts, "--num_samples=10"]
        assert flags(steps[number + 1].command)["--craft.anchor_cache_dir"] == cache


def test_a_policy_that_knows_nothing_has_no_observations_before_the_first_stage(tmp_path):
    plan = observing()
    plan["start"] = {"policy": "teacher"}
    steps = list(sequence_steps(read(tmp_path, plan)))
    assert "without craft.*" in steps[1].title
    assert [step.title for step in steps if "anchors" in step.command] == ["anchors of me/b"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("anchors_from", "memory", "anchors_from: Cannot convert 'memory' into one of: data, obs"),
        ("anchors_from", "data", "start.instructions: have no effect without anchors_from: observations"),
        ("anchors", ..., "anchors_from: has no effect without anchors"),
        ("anchors", {"instructions": ["x"]}, "anchors.instructions: set start.instructions and"),
        (
            "start",
            {"policy": "teacher", "repo_id": "me/old"},
            "start.repo_id: has no effect with anchors_from",
        ),
        ("stages/0/instructions", ..., "stages.0.instructions: name those of its tasks"),
    ],
)
def test_a_wrong_plan_of_observations_names_the_key(tmp_path, path, value, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read(tmp_path, changed(path, value, observing()))


def test_a_stage_may_learn_a_mixture(tmp_path):
    plan = content()
    data = [{"repo_id": "me/a", "root": "a", "weight": 2}, {"repo_id": "me/c", "weight": 1}]
    plan["stages"][0] = {"name": "a", "datasets": data, "tasks": ["reach-green"]}
    steps = list(sequence_steps(read(tmp_path, plan)))
    training = flags(steps[2].command)
    assert json.loads(training["--datasets"]) == data
    assert not any(name.startswith("--dataset.") for name in training)
    anchors = [flags(step.command) for step in steps if "anchors" in step.command][1:]
    assert [found["--dataset_repo_id"] for found in anchors] == ["me/a", "me/c"]
    caches = ["out/00_start/anchors", "out/01_a/anchors_1", "out/01_a/anchors_2"]
    assert [found["--output_dir"] for found in anchors] == caches[1:]
    last = next(step for step in steps if step.title.startswith("stage 2"))
    assert flags(last.command)["--craft.anchor_cache_dir"] == ",".join(caches)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("stages", ..., "Missing required field(s) `stages`"),
        ("stages", [], "stages: give at least one"),
        ("stages/0/name", "../up", "stages: the name '../up'"),
        ("stages/1/name", "a", "stages: two are named a"),
        ("stages/0/stpes", 3, "stages.0: The fields `stpes` are not valid"),
        ("epochs", 3, "The fields `epochs` are not valid"),
        ("evaluation/episodes", "many", "evaluation.episodes: Couldn't parse 'many'"),
        ("evaluation/episodes", 0, "evaluation.episodes: 0 must be at least 1"),
        ("stages/0/name", None, "stages.0: Missing required field(s) `name`"),
        ("stages/0/repo_id", None, "stages.0: give repo_id, or datasets for a mixture"),
        ("stages/0/datasets", [{"repo_id": "me/c"}], "stages.0: give repo_id, or datasets"),
        ("train/datasets", [], "train.datasets: the sequence sets this flag: set stages.N.datasets"),
        ("stages/0/tasks", "reach-red", "stages.0.tasks:"),
        ("stages/0/tasks", ["reach-pink"], "tasks: blocks has no task reach-pink"),
        ("stages/0/tasks", ["reach-yellow"], "tasks: reach-yellow is listed twice"),
        ("stages/1/tasks", [], "stages.1.tasks: name the tasks"),
        ("evaluation/world", "mars", "evaluation.world: mars is unknown"),
        ("evaluation/world", ..., "start.tasks: needs evaluation.world"),
        ("evaluation/references", ["x"], "evaluation.references: give one directory per stage"),
        ("stages/1/heldout", {"repo_id": "me/h"}, "stages.1.heldout: give it for every stage"),
        ("train/output_dir", "x", "train.output_dir: the sequence sets this flag: set output_dir"),
        ("train/resume", "auto", "train.resume: the sequence sets this flag: omit it"),
        ("stages/1/train/dataset", {"root": "x"}, "stages.1.train.dataset.root: the sequence sets"),
        ("train/world.seed", 3, "train.world.seed: the sequence sets this flag: set evaluation"),
        ("train/steps", None, "train.steps: has no value"),
        ("train/craft.enabled", True, "train.craft.enabled: is given twice"),
        ("anchors/output_dir", "x", "anchors.output_dir: omit it"),
        ("anchors", ..., "train.craft.enabled: needs anchors"),
        ("train", {"steps": 5}, "anchors: have no effect without CRaFT or EWC"),
        ("launcher", {"ranks": 2}, "launcher.ranks: 2 needs an engine that shards"),
        ("launcher/engine", "zero9", "--ds_config=zero9: no such file"),
        ("start/repo_id", ..., "start.root: give start.repo_id too"),
    ],
)
def test_a_wrong_plan_names_the_key(tmp_path, path, value, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read(tmp_path, changed(path, value))
    assert str(error.value).startswith(f"{tmp_path}/plan.yaml: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "must hold a mapping"),
        ("a: [", "not readable"),
        ("output_dir: a\noutput_dir: b", "'output_dir' is given twice in line 2"),
        ("output_dir: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("train: {api_key: sk-abcdefghijklmnopqrstuvwxyz}", "holds"),
    ],
)
def test_an_unreadable_plan_is_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read(tmp_path, text)


def test_a_flag_of_craft_that_no_stage_reads_is_refused(tmp_path):
    def plan(**train):
        return {
            **content(),
            "anchors": None,
            "start": {"policy": "t"},
            "train": {"craft.preset": "l2", **train},
        }

    with pytest.raises(UserError, match=r"train.craft.merging: has no effect with a preset"):
        read(tmp_path, plan(**{"craft.merging": "cagrad"}))
    read(
        tmp_path, plan(**{"craft.merging": "cagrad", "craft.enabled": False})
    )  # CRaFT off by the user's flag
    mixed = content()
    mixed["train"] = {"craft.preset": "kl", "craft.anchor_batch_size": 4}  # which one of two stages reads
    mixed["stages"][0]["train"] = {"craft.preset": "sequential"}
    read(tmp_path, mixed)
    mixed["stages"][0]["train"]["craft.merging"] = "pcgrad"
    with pytest.raises(UserError, match=r"stages.0.train.craft.merging: has no effect with a preset"):
        read(tmp_path, mixed)


def test_merges_of_yaml_fill_in_what_a_stage_leaves_out(tmp_path):
    plan = read(
        tmp_path,
        """
output_dir: out
start: {policy: teacher}
train: &all {steps: 5, save_freq: 1}
stages:
- {name: a, repo_id: me/a, tasks: [reach-red], train: &long {<<: *all, steps: 7}}
- {name: b, repo_id: me/b, tasks: [reach-blue], train: {<<: *long, save_freq: 2}}
evaluation: {world: blocks}
""",
    )
    flags = [plan.flags_of(stage) for stage in plan.stages]
    assert flags == [{"steps": 7, "save_freq": 1}, {"steps": 7, "save_freq": 2}]


def test_a_missing_plan_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none.yaml: not readable"):
        read_plan(tmp_path / "none.yaml")


def test_the_plans_of_the_documents_are_valid(tmp_path):
    text = (ROOT / "docs" / "sequences.md").read_text()
    plans = re.findall(r"^```yaml\n(output_dir:.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert plans
    for plan in plans:
        assert list(sequence_steps(read(tmp_path, plan)))


def test_another_plan_does_not_continue_a_sequence(tmp_path):
    plan = read(tmp_path, content(tmp_path / "out"))
    sequence.keep_plan(plan)
    sequence.keep_plan(plan)
    more_ranks = content(tmp_path / "out")
    more_ranks["launcher"]["ranks"] = 3
    sequence.keep_plan(read(tmp_path, more_ranks))
    longer = content(tmp_path / "out")
    longer["stages"][1]["train"]["steps"] = 8
    with pytest.raises(UserError, match=r"begun with stages.1.train.steps: 7, and the plan has 8"):
        sequence.keep_plan(read(tmp_path, longer))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="holds something else"):
        sequence.keep_plan(read(tmp_path, content(tmp_path / "full")))


def test_results_of_a_stage_are_means_over_its_tasks(tmp_path):
    plan = read(tmp_path, changed("evaluation/every", 2))
    plan.output_dir = str(tmp_path / "out")
    rows = [
        {"reach-red": 0.9, "reach-green": 0.0, "reach-blue": 0.2, "reach-yellow": 0.1},
        {"reach-red": 0.7, "reach-green": 0.6, "reach-blue": 1.0, "reach-yellow": 0.1},
        {"reach-red": 0.5, "reach-green": 0.4, "reach-blue": 0.6, "reach-yellow": 0.9},
    ]
    logged = [(2, 0.2, 0.4), (4, 0.6, 0.6), (5, 0.9, 0.9)]
    for number, row in enumerate(rows):
        directory = plan.directory(number)
        (directory / "train" / "final").mkdir(parents=True)
        (directory / "eval.json").write_text(json.dumps({"success": row}))
        (directory / "train" / "final" / "manifest.json").write_text(json.dumps({"step": 5}))
        lines = [
            {"step": step, "eval/success/reach-green": green, "eval/success/reach-blue": blue}
            for step, green, blue in logged
            if number == 1
        ]
        (directory / "train" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    [start] = write_report(plan, 0)
    assert start["metrics"] == {}
    assert start["rows"] == ["start"]
    [report] = write_report(plan, 2)
    assert report["R"] == [list(row.values()) for row in rows]
    assert report["stage_of_task"] == [0, 1, 1, 2]
    assert report["curves"][0] == pytest.approx([0.1, 0.3, 0.6, 0.8])  # step 5 is the end itself
    assert report["curves"][1] == pytest.approx([0.1, 0.9])
    expected = {
        "SR": (0.5 + 0.9) / 2,
        "FWT": (0.45 + 0.5) / 2,
        "NBT": 0.3,
        "AUC": ((0.45 + 0.5) / 2 + 0.5) / 2,
        "forgetting": 0.15,
        "start_tasks": 0.5,
        "start_forgetting": 0.4,
    }
    assert report["metrics"] == pytest.approx(expected)
    assert json.loads((tmp_path / "out" / "success.json").read_text()) == report
    with (tmp_path / "out" / "success.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["after", *report["tasks"]]
    assert [[float(value) for value in line[1:]] for line in lines] == report["R"]
    assert (tmp_path / "out" / "success.png").read_bytes().startswith(b"\x89PNG")

    for name, curve in (("alone_a", [0.0, 0.2]), ("alone_b", [0.1, 0.3])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "success.json").write_text(json.dumps({"curves": [curve]}))
    plan.evaluation.references = [str(tmp_path / "alone_a"), str(tmp_path / "alone_b")]
    transfer = write_report(plan, 2)[0]["metrics"]["forward_transfer"]
    assert transfer == pytest.approx(((0.45 - 0.1) / 0.9 + (0.5 - 0.2) / 0.8) / 2)


def test_losses_that_rise_are_forgetting(tmp_path):
    plan = content(tmp_path / "out")
    plan["evaluation"], heldout = {}, {"repo_id": "me/heldout"}
    for part in (plan["start"], *plan["stages"]):
        del part["tasks"]
    for stage in plan["stages"]:
        stage["heldout"] = heldout
    read_back = read(tmp_path, plan)
    for number, losses in enumerate([[4.0, 5.0], [1.0, 4.5], [2.5, 1.5]]):
        read_back.directory(number).mkdir(parents=True)
        row = {"datasets": [{"loss": loss} for loss in losses]}
        (read_back.directory(number) / "eval.json").write_text(json.dumps(row))
    [report] = write_report(read_back, 2)
    assert report["metrics"] == pytest.approx(
        {"SR": 2.0, "FWT": 1.25, "NBT": 1.5, "AUC": (1.75 + 1.5) / 2, "forgetting": 0.75}
    )


def test_the_square_matrix_leaves_the_start_out():
    columns = [Column("old", 0), Column("second", 2), Column("first", 1)]
    assert stage_matrix(columns, [[9, 9, 9], [1, 2, 3], [4, 5, 6]]) == [[3, 2], [6, 5]]


def run_in_process(command: list[str]) -> None:
    """Run a subcommand here, where LeRobot is imported already."""
    name, *arguments = command[command.index("craft_ds") + 1 :]
    run_command(name, arguments)


@pytest.fixture(scope="module")
def blocks_plan(tmp_path_factory):
    data = tmp_path_factory.mktemp("world") / "data"
    old, new = write_demonstrations(Recipe("blocks", episodes_per_task=4), data, processes=1)
    heldout = {"repo_id": "craft-ds/blocks", "root": str(new)}
    tasks = [["reach-yellow"], ["reach-red", "reach-green", "reach-blue"]]
    stages = [
        {"name": name, "repo_id": "craft-ds/blocks", "root": str(root), "tasks": own, "heldout": heldout}
        for name, root, own in zip(("new", "old"), (new, old), tasks, strict=True)
    ]
    stages[0]["train"] = {"steps": 30, "save_freq": 5}
    return {
        "output_dir": "out",
        "start": {"policy": str(teacher_directory("blocks")), "repo_id": "craft-ds/blocks", "root": str(old)},
        "stages": stages,
        "train": {
            "steps": 4,
            "batch_size": 2,
            "num_workers": 0,
            "craft": {"enabled": True, "retention_freq": 2, "anchor_batch_size": 2},
        },
        "anchors": {"num_samples": 16, "num_workers": 0, "heldout_fraction": 0.5},
        "evaluation": {"world": "blocks", "episodes": 1},
    }


def test_flags_of_every_stage_are_checked_at_the_start(tmp_path, blocks_plan, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = list(sys.argv)
    sequence.check_runs(read(tmp_path, blocks_plan))
    for key, value, message in [
        ("train", {"batch_sise": 2}, r"stages.1.train: .*--batch_sise.*--batch_size"),
        ("train", {"craft.retention_freq": 0}, r"stages.1.train: --craft.retention_freq=0"),
        ("root", "none", r"stages.1.root=none"),
        ("heldout", {"repo_id": "x", "root": "none"}, r"stages.1.heldout.root=none"),
    ]:
        plan = copy.deepcopy(blocks_plan)
        plan["stages"][1][key] = value
        with pytest.raises(UserError, match=message):
            sequence.check_runs(read(tmp_path, plan))
    plan = copy.deepcopy(blocks_plan)
    plan["anchors"]["targets"] = ["logits"]
    with pytest.raises(UserError, match=r"anchors: .*--targets"):
        sequence.check_runs(read(tmp_path, plan))
    assert sys.argv == arguments
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.yaml"]


@pytest.mark.slow
def test_a_killed_sequence_continues_to_the_same_result(tmp_path, blocks_plan, monkeypatch, capfd):
    monkeypatch.setattr(sequence, "call", run_in_process)
    monkeypatch.setattr(sys, "argv", ["craft-ds"])
    for name in ("unbroken", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.yaml").write_text(yaml.safe_dump(blocks_plan))
    unbroken, killed = tmp_path / "unbroken" / "out", tmp_path / "killed" / "out"
    monkeypatch.chdir(tmp_path / "unbroken")
    run_command("sequence", ["plan.yaml"])

    # As if it had been killed after its first step, and again in the middle of the first training.
    killed.mkdir()
    shutil.copy(unbroken / "plan.json", killed)
    shutil.copytree(unbroken / "00_start", killed / "00_start")
    kill_in_training(tmp_path / "killed", killed / "01_new" / "train")
    assert not (killed / "01_new" / "train" / "final").exists()
    monkeypatch.chdir(tmp_path / "killed")
    capfd.readouterr()
    run_command("sequence", ["plan.yaml"])
    assert "sequence: evaluation of all tasks after start: complete" in capfd.readouterr().out
    for stage in ("01_new", "02_old"):
        assert_same_bits(killed / stage / "train" / "final", unbroken / stage / "train" / "final")
    config = json.loads((killed / "02_old" / "train" / "final" / "train_config.json").read_text())
    caches = config["craft"]["anchor_cache_dir"].split(",")
    assert [Path(cache).parent.name for cache in caches] == ["00_start", "01_new"]
    for measure in ("success", "loss"):
        report = json.loads((killed / f"{measure}.json").read_text())
        assert report == json.loads((unbroken / f"{measure}.json").read_text())
        assert report["rows"] == ["start", "new", "old"]
        assert all(math.isfinite(value) for row in report["R"] for value in row)
    assert report["R"][1][0] < report["R"][0][0]  # the new task was learned


def kill_in_training(directory: Path, run: Path) -> None:
    """Start a sequence, kill it after the first checkpoint of a run, and wait until the run has ended."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "craft_ds", "sequence", "plan.yaml"],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 300
    while not any(run.glob("step_*")):
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()  # ends when the training run, which shares the pipe, has ended
    assert b"stage 1 of 2, new: training" in output

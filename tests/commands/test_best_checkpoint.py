"""`--save_best` and `--early_stop_patience`: what is chosen, kept and said, and that it survives kills."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from runs import assert_same_bits, metrics, untimed

from craft_ds.checkpoints import read_manifest, verify_checkpoint
from craft_ds.checkpoints import save as save_module
from craft_ds.export.export import export_checkpoint
from craft_ds.lora.weights import load_trained_policy
from craft_ds.policies.loading import load_policy_config
from craft_ds.training.evaluator import Evaluator

pytestmark = pytest.mark.slow

HELD_OUT = "--dataset.eval_split=0.25"
FAST = ["--policy.optimizer_lr=0.05", "--policy.scheduler_warmup_steps=0"]
# ε falls below the anchors' loss after step 5, while the task loss still improves.
BEST = ["--steps=8", "--save_freq=1", "--save_best=true", HELD_OUT, "--save_total_limit=1", *FAST]
BEST += ["--craft.epsilon_start=5.5", "--craft.epsilon_end=4"]


def evaluations(run: Path) -> list[dict]:
    return [row for row in metrics(run) if "eval/task_loss" in row]


def state(checkpoint: Path) -> dict:
    return torch.load(checkpoint / "craft_state.pt", weights_only=True)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


@pytest.fixture
def scripted(monkeypatch):
    """Replace the evaluations: task loss, L_ret and ε by step."""

    def script(task, retention=None, epsilon=1.0):
        def evaluate(_, step):
            found = {"eval/task_loss": task[step - 1]}
            if retention is not None:
                found |= {"eval/anchor_loss": retention[step - 1], "eval/epsilon": epsilon}
            return found

        monkeypatch.setattr(Evaluator, "evaluate", evaluate)

    return script


@pytest.fixture(scope="module")
def chosen(inputs, tmp_path_factory):
    """A CRaFT run that keeps its best and its newest checkpoint, and what it printed."""
    from craft_ds.config.parser import parse_arguments
    from craft_ds.training.trainer import train_craft

    run = tmp_path_factory.mktemp("best") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["train_craft.py"])
        train_craft(parse_arguments([*inputs.flags(run), *inputs.craft_flags(), *BEST]))
    return run


def test_best_is_the_lowest_task_loss_within_epsilon(chosen):
    rows = evaluations(chosen)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["eval/epsilon"] for row in rows] == pytest.approx([5.5 - 1.5 * n / 8 for n in range(1, 9)])
    within = [row for row in rows if row["eval/anchor_loss"] <= row["eval/epsilon"]]
    best = min(within, key=lambda row: row["eval/task_loss"])["step"]
    assert 1 < best < 7, "not the first, nor among those that are kept anyway"
    assert (chosen / "best").readlink() == Path(f"step_{best:06d}")
    assert names(chosen) == ["best", "final", "last", "metrics.jsonl", f"step_{best:06d}", "step_000007"]
    assert [record["step"] for record in state(chosen / "best")["evaluations"]] == list(range(1, best + 1))
    assert state(chosen / "final")["evaluations"] == [
        {
            "step": row["step"],
            "task_loss": row["eval/task_loss"],
            "retention_loss": row["eval/anchor_loss"],
            "epsilon": row["eval/epsilon"],
        }
        for row in rows
    ]


def test_best_is_exported_and_loaded_like_last(chosen, tmp_path):
    export_checkpoint(chosen / "best", tmp_path / "exported")
    config = load_policy_config(chosen / "best")
    loaded = load_trained_policy(config, chosen / "best").state_dict()
    exported = load_trained_policy(load_policy_config(tmp_path / "exported"), tmp_path / "exported")
    last = load_trained_policy(config, chosen / "last").state_dict()
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, loaded[name]), name
    assert any(not torch.equal(tensor, last[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", [5, 6, 8])
@pytest.mark.sample(1)
def test_a_kill_around_the_link_changes_nothing(train, inputs, chosen, tmp_path, monkeypatch, when, step):
    run, update = tmp_path / "run", save_module.update_best_link

    def die(output_dir, records):
        if when == "before" and records[-1].step == step:
            raise KeyboardInterrupt
        best = update(output_dir, records)
        if records[-1].step == step:
            raise KeyboardInterrupt
        return best

    flags = [*inputs.craft_flags(), *BEST, "--resume=auto"]
    with monkeypatch.context() as patched:
        patched.setattr(save_module, "update_best_link", die)
        assert train(run, *flags).status == 130
    assert (run / "best").exists()
    ended = train(run, *flags)
    assert ended.status == 0, ended.errors
    assert ("nothing to do" in ended.output) == (step == 8)
    assert (run / "best").readlink() == (chosen / "best").readlink()
    assert set(names(run)) - {"step_000006"} == set(names(chosen))  # a kill before the deletion at the end
    assert untimed(run) == untimed(chosen)
    assert_same_bits(run / "final", chosen / "final")
    assert_same_bits(run / "best", chosen / "best")


def test_an_extended_run_keeps_its_best(train, chosen, tmp_path):
    """The old final checkpoint is renamed, and may be the best."""
    run = tmp_path / "run"
    shutil.copytree(chosen, run, symlinks=True)
    (run / "best").unlink()
    (run / "best").symlink_to("step_000007")  # as a run that died between save and link
    ended = train(None, f"--config_path={run}", "--resume=true", "--steps=9", "--save_freq=3")
    assert ended.status == 0, ended.errors
    assert (run / "best").readlink() == (chosen / "best").readlink()
    assert names(run) == ["best", "final", "last", "metrics.jsonl", "step_000005", "step_000008"]


def die_at_final(publish):
    """Die after the old final checkpoint was renamed."""

    def publish_or_die(temporary, directory):
        if directory.name == "final":
            raise KeyboardInterrupt
        publish(temporary, directory)

    return publish_or_die


# --- with given evaluations ----------------------------------------------------------------------------


@pytest.mark.parametrize("background", ["false", "true"])
@pytest.mark.sample(1)
def test_a_final_that_was_the_best_is_renamed_and_kept(
    train, inputs, tmp_path, scripted, background, monkeypatch
):
    scripted([4, 3, 2, 1, 2, 3, 4, 5], [0.5] * 8)
    run, flags = tmp_path / "run", [*inputs.craft_flags(), "--save_freq=1", "--save_best=true", HELD_OUT]
    flags += ["--save_total_limit=1", f"--checkpoint.background={background}", "--resume=auto"]
    assert train(run, *flags, "--steps=4").status == 0
    assert (run / "best").readlink() == Path("final")
    with monkeypatch.context() as patched:
        patched.setattr(save_module, "publish_directory", die_at_final(save_module.publish_directory))
        assert train(run, *flags, "--steps=6").status == 130
    assert (run / "best").readlink() == Path("step_000004")
    ended = train(run, *flags, "--steps=6")
    assert ended.status == 0, ended.errors
    assert (run / "best").readlink() == Path("step_000004")
    assert names(run) == ["best", "final", "last", "metrics.jsonl", "step_000004", "step_000005"]
    for name in ("final", "step_000004", "step_000005"):
        verify_checkpoint(run / name, 0, 1)


@pytest.mark.parametrize(
    ("retention", "best"),
    [([0.5, 0.6, 1.5], "step_000002"), ([1.6, 1.2, 1.5], "step_000002"), (None, "final")],
)
def test_constrained_nearest_and_baseline(train, inputs, tmp_path, scripted, retention, best):
    scripted([3.0, 2.0, 1.0], retention)
    craft = inputs.craft_flags() if retention else []
    run = tmp_path / "run"
    ended = train(run, *craft, "--steps=3", "--save_freq=1", "--save_best=true", HELD_OUT)
    assert ended.status == 0, ended.errors
    assert (run / "best").readlink() == Path(best)
    said = [line for line in ended.output.splitlines() if line.startswith("best checkpoint: ")]
    assert said[-1].startswith(f"best checkpoint: {run / best} (task loss {1 if best == 'final' else 2}")
    assert ("no checkpoint satisfies" in said[-1]) == (retention == [1.6, 1.2, 1.5])


def test_a_failed_save_is_no_candidate(train, tmp_path, scripted, monkeypatch):
    scripted([3, 1, 2, 2])
    writes = save_module.PendingCheckpoint._write_shards

    def fail(save):
        if save.step == 2:
            raise OSError(28, "No space left on device")
        writes(save)

    monkeypatch.setattr(save_module.PendingCheckpoint, "_write_shards", fail)
    ended = train(tmp_path / "run", "--save_freq=1", "--save_best=true", HELD_OUT)
    assert ended.status == 0, ended.errors
    assert (tmp_path / "run" / "best").readlink() == Path("step_000003")


@pytest.mark.parametrize("kind", ["copy", "only one", "damaged"])
@pytest.mark.sample(1)
def test_best_as_a_directory(train, chosen, tmp_path, kind):
    """Copies from object stores have no links."""
    run = tmp_path / "run"
    shutil.copytree(chosen, run, symlinks=True)
    shutil.rmtree(run / "final")
    (run / "best").unlink()
    if kind == "only one":
        (run / "step_000005").rename(run / "best")
    else:
        shutil.copytree(run / "step_000005", run / "best")
    if kind == "damaged":
        (run / "best" / "manifest.json").write_text("{}")
    ended = train(None, f"--config_path={run}", "--resume=true")
    assert ended.status == 0, ended.errors
    assert "resuming from " + str(run / "step_000007") in ended.output
    assert (run / "best").readlink() == Path("step_000005")
    assert (run / "best.aside-1").exists() == (kind == "damaged")
    assert_same_bits(run / "best", chosen / "best")
    assert_same_bits(run / "final", chosen / "final")


def test_a_run_stops_early_once_and_says_so_again(train, tmp_path, scripted):
    scripted([3, 2, 2.5, 2, 1, 1, 1, 1])
    run = tmp_path / "run"
    flags = ["--steps=8", "--eval_freq=1", "--save_freq=2", "--early_stop_patience=2"]
    ended = train(run, *flags)
    assert ended.status == 0, ended.errors
    why = "the held-out task loss did not improve in 2 evaluations on 2 at step 2"
    assert f"\nstopping early at step 4: {why}\n" in ended.output
    assert verify_checkpoint(run / "final", 0, 1)["step"] == 4
    assert (metrics(run)[-1]["step"], names(run)) == (4, ["final", "last", "metrics.jsonl", "step_000002"])

    again = train(run, *flags, "--resume=auto")
    assert (again.status, again.errors) == (0, "")
    assert f"{run}/final stopped early by --early_stop_patience=2: {why}: nothing to do" in again.output
    refused = train(None, f"--config_path={run}", "--resume=true")
    assert refused.status == 2
    assert f"{why}: raise --early_stop_patience, or set it to 0" in refused.errors

    ended = train(run, *flags, "--resume=auto", "--early_stop_patience=3")
    assert ended.status == 0, ended.errors
    assert read_manifest(run / "final")["step"] == 8
    assert read_manifest(run / "step_000004")["step"] == 4


def test_a_smaller_patience_waits_for_an_evaluation(train, tmp_path, scripted):
    scripted([1, 2, 3, 4, 5, 6])
    run, flags = tmp_path / "run", ["--save_freq=2", HELD_OUT, "--eval_freq=2", "--resume=auto"]
    assert train(run, *flags, "--steps=6").status == 0
    shutil.rmtree(run / "final")
    ended = train(run, *flags, "--steps=8", "--early_stop_patience=1")
    assert ended.status == 0, ended.errors
    assert "stopping early at step 6" in ended.output
    assert read_manifest(run / "final")["step"] == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--save_best=true", "--save_freq=2"], "hold some out with --dataset.eval_split=0.05"),
        (["--save_best=true", HELD_OUT], "--save_best=true has nothing to choose from with --save_freq=0"),
        (["--save_best=true", HELD_OUT, "--save_freq=4"], "which save only final: set --save_freq below"),
        (["--save_best=true", "--save_checkpoint=false"], "no effect with --save_checkpoint=false"),
        (["--early_stop_patience=2"], "--early_stop_patience=2 counts evaluations, and none would run"),
        (["--early_stop_patience=-1"], "--early_stop_patience=-1 must be at least 0"),
    ],
)
def test_a_choice_without_data_is_refused(refuses, tmp_path, flags, message):
    assert message in refuses(tmp_path / "run", *flags)


def test_anchors_without_held_out_ones_are_refused(refuses, inputs, tmp_path):
    anchors = inputs.build_anchors(tmp_path / "anchors", heldout_fraction=0.0)
    flags = [*inputs.craft_flags(), f"--craft.anchor_cache_dir={anchors}", "--craft.constraint_split=train"]
    line = refuses(tmp_path / "run", *flags, "--save_freq=2", "--save_best=true", HELD_OUT)
    assert f"--save_best=true measures retention on held-out anchors, and {anchors} has none" in line


# --- two ranks -----------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_two_ranks_choose_and_stop_as_one_process(chosen, inputs, fork_server, tmp_path):
    best, early = tmp_path / "best", tmp_path / "early"
    halves = ["--engine=fsdp", "--batch_size=1"]
    wild = ["--steps=8", "--eval_freq=1", "--early_stop_patience=2", "--policy.optimizer_lr=1"]
    commands = {
        "best": [*inputs.flags(best), *inputs.craft_flags(), *BEST, *halves, "--craft.anchor_batch_size=1"],
        "early": [*inputs.flags(early), *wild, "--policy.scheduler_warmup_steps=0", *halves],
    }
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    ranks = Path(__file__).with_name("training_ranks.py")
    fork_server.run([tmp_path / "commands.json", tmp_path], 2, program=ranks, timeout=240).check()
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for result in results:
        assert {name: ended["status"] for name, ended in result.items()} == {"best": 0, "early": 0}, result
    assert (best / "best").readlink() == (chosen / "best").readlink()
    assert names(best) == names(chosen)
    for found, expected in zip(evaluations(best), evaluations(chosen), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)

    values = [row["eval/task_loss"] for row in evaluations(early)]
    assert len(values) < 8
    assert min(values[:-2]) <= min(values[-2:])
    assert verify_checkpoint(early / "final", 0, 1)["step"] == len(values)
    assert f"stopping early at step {len(values)}: " in results[0]["early"]["output"]

"""`--craft.retention_loss` from the command that builds the anchors to the evaluation of the run."""

import math
import shutil

import pytest
import torch
from runs import assert_same_bits, metrics
from safetensors.torch import load_file

from craft_ds.anchors.schema import TARGETS
from craft_ds.config.craft_config import CraftConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def craft_flags(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("targets") / "anchors"
    inputs.build_anchors(output, targets=TARGETS)
    return [*inputs.craft_flags(), f"--craft.anchor_cache_dir={output}"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", TARGETS)
def test_a_run_is_constrained_by_the_loss_it_asks_for(train, craft_flags, tmp_path, name):
    flags = [f"--craft.retention_loss={name}", "--eval_freq=4", "--dataset.eval_split=0.25"]
    flags += ["--policy.optimizer_lr=0.01", "--policy.scheduler_warmup_steps=0"]
    ended = train(tmp_path / "run", *craft_flags, *flags)
    assert ended.status == 0, ended.errors
    rows = metrics(tmp_path / "run")
    losses = [row["craft/retention_loss"] for row in rows if "craft/retention_loss" in row]
    evaluated = [row["eval/retention_loss"] for row in rows if "eval/retention_loss" in row]
    assert evaluated
    assert all(math.isfinite(value) for value in [*losses, *evaluated])
    if name != "teacher_tokens":
        # Step 0 starts from the teacher itself, which later steps leave.
        assert abs(losses[0]) < 1e-6 < 1e-4 < evaluated[-1]
        assert f"the teacher's own {name} is 0" in ended.output
    assert any(row.get("eval/anchor_loss", 0) > 0.1 for row in rows)
    assert (tmp_path / "run" / "final" / "lambda_analysis.png").is_file()


def test_one_gradient_gives_the_run_of_two(train, craft_flags, tmp_path, monkeypatch):
    flags = [*craft_flags, "--craft.preset=kl", "--gradient_accumulation_steps=2", "--save_freq=2"]
    one, two, again = tmp_path / "one", tmp_path / "two", tmp_path / "again"
    ended = train(one, *flags)
    assert ended.status == 0, ended.errors
    assert "both losses in one gradient: no cosine is measured" in ended.output
    with monkeypatch.context() as patched:
        patched.setattr(CraftConfig, "adds_losses", False)
        assert train(two, *flags).status == 0
    weights, others = (load_file(run / "final" / "model.safetensors") for run in (one, two))
    for name, values in weights.items():
        torch.testing.assert_close(values, others[name], rtol=1e-4, atol=2e-5)  # Adam amplifies rounding
    rows = [[row for row in metrics(run) if "craft/lambda" in row] for run in (one, two)]
    for key in ("train/loss", "train/grad_norm", "craft/retention_loss"):
        assert [row[key] for row in rows[0]] == pytest.approx([row[key] for row in rows[1]], rel=1e-4)
    apart = {"craft/grad_cos", "craft/grad_dot", "craft/grad_conflict", "craft/conflict_rate"}
    assert rows[1][0].keys() - rows[0][0].keys() == apart | {"craft/mean_grad_cos", "craft/removed_energy"}

    shutil.copytree(one, again, symlinks=True)
    shutil.rmtree(again / "final")
    ended = train(None, f"--config_path={again}/step_000002", "--resume=true")
    assert ended.status == 0, ended.errors
    assert_same_bits(again / "final", one / "final")


def test_a_threshold_that_decides_nothing_is_refused(train, craft_flags, tmp_path):
    flags = [*craft_flags, "--craft.use_grad_projection=false", "--craft.conflict_threshold=0.2"]
    ended = train(tmp_path / "run", *flags)
    assert ended.status == 2
    assert (
        "--craft.conflict_threshold=0.2 has no effect with --craft.use_grad_projection=false" in ended.errors
    )


def test_a_cache_without_the_targets_is_refused_before_anything_is_written(train, inputs, tmp_path):
    ended = train(tmp_path / "run", *inputs.craft_flags(), "--craft.retention_loss=teacher_kl")
    assert ended.status == 2
    assert "`craft-ds anchors --targets teacher_kl`" in ended.errors
    assert not (tmp_path / "run").exists()


def test_a_relative_epsilon_needs_a_loss_that_the_teacher_has(train, craft_flags, tmp_path):
    flags = ["--craft.retention_loss=teacher_kl", "--craft.epsilon_relative=true"]
    ended = train(tmp_path / "run", *craft_flags, *flags)
    assert ended.status == 2
    assert "--craft.epsilon_relative=true: the teacher's own teacher_kl is 0" in ended.errors

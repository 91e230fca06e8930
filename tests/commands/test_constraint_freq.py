"""`--craft.constraint_freq`: what a run measures, its λ, and resuming it."""

import csv
import math
import shutil
from itertools import pairwise

import pytest
from runs import assert_same_bits, metrics

pytestmark = pytest.mark.slow

FLAGS = ["--craft.retention_freq=1", "--craft.constraint_freq=3", "--craft.lambda_lr=0.1", "--steps=7"]


def test_every_third_retention_step_measures_and_moves_lambda(train, inputs, tmp_path):
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    ended = train(run, *inputs.craft_flags(), *FLAGS, "--save_freq=2")
    assert ended.status == 0, ended.errors
    with (run / "final" / "lambda_history.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["retention_loss"]) for row in rows]
    assert [step for step, loss in enumerate(losses) if not math.isnan(loss)] == [0, 3, 6]
    multipliers = [float(row["lambda"]) for row in rows]
    moves = [one != other for one, other in pairwise(multipliers)]
    assert moves == [True, False, False, True, False, False]
    # Between the measurements the log keeps the last.
    logged = [row["craft/retention_loss"] for row in metrics(run) if "train/loss" in row]
    assert logged == pytest.approx([losses[step // 3 * 3] for step in range(7)])

    shutil.copytree(run, resumed, symlinks=True)
    for name in ("final", "step_000006"):
        shutil.rmtree(resumed / name)
    ended = train(None, f"--config_path={resumed}/step_000004", "--resume=true")
    assert ended.status == 0, ended.errors
    assert_same_bits(resumed / "final", run / "final")

"""Runs in which a loss is non-finite on one rank: every rank skips that step, and nothing else changes.

Compared, step by step, with the same run in a single process.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from runs import metrics, trained
from safetensors.torch import load_file

from craft_ds.algorithm.multiplier import ascend
from craft_ds.config.craft_config import CraftConfig

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PROGRAM = Path(__file__).with_name("non_finite_ranks.py")
DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
GLOBAL_BATCH, STEPS, RETENTION_FREQ = 6, 10, 2
# Pass and factor of the loss, by step; a step is a retention step if it is even.
SPOILT = {
    1: ("task", "nan"),
    2: ("task", "inf"),
    4: ("anchors", "nan"),
    5: ("task", "-inf"),  # two in a row
    6: ("constraint", "inf"),
    8: ("constraint", "nan"),
}
ENGINES = {
    "fsdp": ["--engine=fsdp"],
    "zero2": [f"--ds_config={DS_CONFIGS / 'zero2.json'}"],
    "zero3": [f"--ds_config={DS_CONFIGS / 'zero3.json'}"],
}
# Single steps on 3 ranks are in tests/distributed/test_non_finite_steps.py.
CASES = [(engine, 2, 1) for engine in ENGINES]
CASES += [pytest.param((engine, 3, 0), marks=pytest.mark.sample(0)) for engine in ENGINES]


@pytest.fixture(scope="module")
def runs(request, inputs, fork_server, tmp_path_factory):
    """Return the runs by engine, number of ranks and spoilt rank; `single` is the reference."""
    root = tmp_path_factory.mktemp("non_finite")
    found = {}
    groups = [(1, 0, {"single": []}), (2, 1, ENGINES)]
    if request.config.getoption("--all"):
        groups.append((3, 0, ENGINES))
    for world, victim, engines in groups:
        directory = root / str(world)
        directory.mkdir()
        commands = {
            name: [
                *inputs.flags(directory / name),
                *inputs.craft_flags(),
                f"--steps={STEPS}",
                f"--batch_size={GLOBAL_BATCH // world}",
                f"--craft.anchor_batch_size={GLOBAL_BATCH // world}",
                f"--craft.retention_freq={RETENTION_FREQ}",
                "--save_freq=1",
                *flags,
            ]
            for name, flags in engines.items()
        }
        file = directory / "commands.json"
        file.write_text(json.dumps(commands))
        arguments = [file, directory, victim, json.dumps(SPOILT)]
        fork_server.run(arguments, world, program=PROGRAM, timeout=400).check()
        for rank in range(world):
            for name, ended in json.loads((directory / f"{rank}.json").read_text()).items():
                assert ended["status"] == 0, (name, rank, ended["errors"][-4000:])
        found |= {(name, world, victim): directory / name for name in engines}
    return found


def checkpoint(run: Path, step: int) -> Path:
    """The checkpoint after a number of steps."""
    return run / "final" if step == STEPS else run / f"step_{step:06d}"


def state(run: Path, step: int, file: str = "craft_state.pt") -> dict:
    return torch.load(checkpoint(run, step) / file, weights_only=True)


def find(node: dict, name: str):
    """Return the entry of a nested dictionary by its name."""
    if name in node:
        return node[name]
    return next(
        (
            found
            for value in node.values()
            if isinstance(value, dict) and (found := find(value, name)) is not None
        ),
        None,
    )


@pytest.mark.parametrize("case", [("single", 1, 0), *CASES], ids=str)
def test_a_skipped_step_changes_neither_weights_nor_moments_nor_multiplier(runs, case):
    run = runs[case]
    for step in range(1, STEPS):
        before, after = (trained(checkpoint(run, number)) for number in (step, step + 1))
        same = all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert same == (step in SPOILT), step
        one, two = state(run, step), state(run, step + 1)
        schedules = [state(run, number, "scheduler.pt") for number in (step, step + 1)]
        assert (schedules[0] == schedules[1]) == (step in SPOILT), step
        if step in SPOILT or step % RETENTION_FREQ:
            assert find(one, "multiplier") == find(two, "multiplier")
            assert find(one, "history") == find(two, "history")
        else:
            assert find(one, "multiplier") != find(two, "multiplier")
            assert len(find(two, "history")) == len(find(one, "history")) + 1


@pytest.mark.parametrize("case", [("single", 1, 0), *CASES], ids=str)
def test_counters_and_positions_advance_over_a_skipped_step(runs, case):
    run, skipped, in_a_row = runs[case], 0, 0
    for step in range(STEPS):
        skipped += step in SPOILT
        in_a_row = in_a_row + 1 if step in SPOILT else 0
        now = state(run, step + 1)
        assert find(now, "skipped") == skipped
        assert find(now, "skipped_in_a_row") == in_a_row
        assert find(now, "samples_seen") == (step + 1) * GLOBAL_BATCH
        assert find(now, "anchors_seen") == (step // RETENTION_FREQ + 1) * GLOBAL_BATCH


@pytest.mark.parametrize("case", [("single", 1, 0), *CASES], ids=str)
def test_the_multiplier_is_that_of_the_steps_that_were_taken(runs, case):
    history = find(state(runs[case], STEPS), "history")
    taken = [step for step in range(0, STEPS, RETENTION_FREQ) if step not in SPOILT]
    assert [record["step"] for record in history] == [step + 1 for step in taken]
    craft = CraftConfig(enabled=True)
    multiplier = craft.initial_lambda
    for record in history:
        assert record["lambda_"] == multiplier
        multiplier = ascend(multiplier, record["retention_loss"], record["epsilon"], craft)
    assert find(state(runs[case], STEPS), "multiplier") == multiplier


def comparable(row: dict) -> dict:
    """Return a logged row without time and memory; JSON has null for a non-finite number."""
    kept = {key: value for key, value in row.items() if key.split("/")[0] in ("step", "train", "craft")}
    return {key: math.nan if value is None else value for key, value in kept.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_run_is_that_of_a_single_process(runs, inputs, case):
    run, reference = runs[case], runs["single", 1, 0]
    rows = [[comparable(row) for row in metrics(each)] for each in (run, reference)]
    assert len(rows[0]) == len(rows[1]) >= STEPS
    for found, expected in zip(*rows, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, nan_ok=True)
    finite = [row["step"] for row in rows[0] if math.isfinite(row.get("train/loss", math.nan))]
    assert finite == [step + 1 for step in range(STEPS) if step not in SPOILT]
    assert change_error(run, reference, inputs.policy) < 1e-4


def change_error(run: Path, reference: Path, policy: Path) -> float:
    """Return the difference between two runs' weights, relative to how far the reference has moved.

    Biases of keys are left out: their gradient is rounding error, which AdamW scales up.
    """
    files = [directory / "model.safetensors" for directory in (run / "final", reference / "final", policy)]
    found, expected, initial = map(load_file, files)
    names = [name for name in initial if not name.endswith("k_proj.bias")]
    difference = torch.cat([(found[name] - expected[name]).flatten() for name in names])
    change = torch.cat([(expected[name] - initial[name]).flatten() for name in names])
    return float(difference.norm() / change.norm())

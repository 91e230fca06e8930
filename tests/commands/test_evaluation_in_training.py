"""`--world.*`: closed-loop success every `eval_freq` steps, which a training run does not notice."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import losses, metrics, trained

import craft_ds.worlds
from craft_ds import train_craft
from craft_ds.config.parser import parse_arguments
from craft_ds.policies.loading import load_policy, load_policy_config, load_processors
from craft_ds.policies.pi0_fast.generation import action_chunk
from craft_ds.worlds import make_world
from craft_ds.worlds.demonstrations import Recipe, write_demonstrations
from craft_ds.worlds.evaluation import ClosedLoopPolicy, evaluate

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train_craft.py"
TEACHER = Path(craft_ds.worlds.__file__).parent / "assets" / "blocks_teacher"
TASKS = ["reach-red", "reach-yellow"]
WORLD = ["--world.name=blocks", f"--world.tasks=[{','.join(TASKS)}]", "--world.episodes=3"]
NEVER = "--eval_freq=100"  # in 4 steps; the same episodes are held out
ENGINES = {"zero3": [f"--ds_config={ROOT / 'ds_configs' / 'zero3.json'}"], "fsdp": ["--engine=fsdp"]}


@pytest.fixture(scope="module")
def teaching(tmp_path_factory):
    """Flags that train the blocks' teacher on its new task."""
    data = tmp_path_factory.mktemp("world") / "data"
    _, new = write_demonstrations(Recipe("blocks", episodes_per_task=4), data, processes=1)
    held_out = ["--dataset.eval_split=0.25", "--eval_freq=2"]
    return [f"--policy.path={TEACHER}", f"--dataset.root={new}", *held_out]


def evaluations(run):
    return [row for row in metrics(run) if "eval/task_loss" in row]


def success(row):
    return {key.removeprefix("eval/success/"): row[key] for key in row if key.startswith("eval/success/")}


@pytest.fixture(scope="module")
def one_process(teaching, inputs, tmp_path_factory):
    run = tmp_path_factory.mktemp("one_process") / "world"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["train_craft.py"])
        train_craft(parse_arguments([*inputs.flags(run), *teaching, *WORLD]))
    return run


def test_logged_success_is_that_of_the_checkpoint(one_process):
    run, rows = one_process, evaluations(one_process)
    assert [row["step"] for row in rows] == [2, 4]
    assert [list(success(row)) for row in rows] == [TASKS, TASKS]
    config = load_policy_config(run / "final")
    act = partial(action_chunk, load_policy(config, run / "final"))
    processors = load_processors(config, run / "final")
    world = make_world("blocks")
    assert success(rows[-1]) == evaluate(
        ClosedLoopPolicy(act, *processors), world, TASKS, episodes=3, seed=1000
    )
    assert success(rows[-1])["reach-red"] > 0  # the teacher still knows it


def test_training_is_the_same_bit_by_bit_without_it(one_process, train, teaching, tmp_path):
    assert train(tmp_path / "without", *teaching, NEVER).status == 0
    assert evaluations(tmp_path / "without") == []
    assert losses(one_process) == losses(tmp_path / "without")
    checkpoints = [run / "final" for run in (one_process, tmp_path / "without")]
    weights = [trained(checkpoint) for checkpoint in checkpoints]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    states = [torch.load(checkpoint / "craft_state.pt", weights_only=True) for checkpoint in checkpoints]
    assert [len(state.pop("evaluations")) for state in states] == [2, 0]
    assert states[0] == states[1]


def test_a_saved_configuration_runs_the_same_world(one_process):
    saved = json.loads((one_process / "final" / "train_config.json").read_text())
    assert saved["world"] == {"name": "blocks", "tasks": TASKS, "episodes": 3, "seed": 1000}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--world.name=marbles", "--world.name=marbles is unknown: choose one of metaworld, blocks"),
        (
            "--world.tasks=[reach-pink]",
            "--world.tasks=[reach-pink]: no task reach-pink; the tasks are reach-red, reach-green",
        ),
        ("--world.episodes=0", "--world.episodes=0 must be at least 1"),
        ("--eval_freq=0", "--world.name=blocks is evaluated every --eval_freq steps: set --eval_freq too"),
    ],
)
def test_bad_input_is_refused_before_the_build(refuses, teaching, tmp_path, flag, message):
    assert message in refuses(tmp_path / "run", *teaching, *WORLD, flag)


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_measure_the_success_of_one_process(
    engine, teaching, one_process, inputs, fork_server, tmp_path
):
    flags = [*inputs.flags(tmp_path / "run"), *teaching, *WORLD, *ENGINES[engine], "--batch_size=1"]
    fork_server.run(flags, 2, timeout=240).check()
    found, expected = evaluations(tmp_path / "run"), evaluations(one_process)
    assert [row["eval/task_loss"] for row in found] == pytest.approx(
        [row["eval/task_loss"] for row in expected], rel=1e-4
    )
    assert [success(row) for row in found] == [success(row) for row in expected]

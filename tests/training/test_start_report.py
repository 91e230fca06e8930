"""Lines that a run prints before its first step."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lerobot.configs.default import DatasetConfig

from craft_ds.config.craft_config import CraftConfig
from craft_ds.config.train_config import TrainConfig
from craft_ds.training.start_report import (
    anchor_line,
    dataset_line,
    epsilon_lines,
    heldout_lines,
    precision_lines,
    size_lines,
)
from craft_ds.training.train_state import Progress


def config(**craft):
    return TrainConfig(
        dataset=DatasetConfig(repo_id="us/data"),
        output_dir=Path("outputs/run"),
        craft=CraftConfig(enabled=True, retention_freq=5, **craft),
        batch_size=8,
        gradient_accumulation_steps=2,
        steps=100,
    )


class Part(SimpleNamespace):
    def __len__(self) -> int:
        return self.samples


def part(episodes, samples, tasks):
    """Some episodes of a data set."""
    meta = SimpleNamespace(tasks=SimpleNamespace(index=tasks))
    return Part(episodes=list(episodes), num_episodes=len(episodes), samples=samples, meta=meta)


def progress(world_size, batch_size=8):
    counters = Progress()
    counters.set_step_size(batch_size, 2, 4, world_size)
    return counters


def test_the_effective_batch_names_its_factors():
    batch, steps, _ = size_lines(config(), progress(3), samples=480, world_size=3)
    assert batch == "effective batch: 48 samples per step (8 batch_size × 2 accumulation × 3 ranks)"
    assert steps == "100 steps, 10 epochs; a retention step every 5, 12 anchors each"
    assert size_lines(config(use_grad_projection=False), progress(3), samples=480, world_size=3)[1] == (
        f"{steps}, both losses in one gradient: no cosine is measured"
    )


def test_a_resumed_run_says_that_its_batch_is_kept():
    batch, *_ = size_lines(config(), progress(3), samples=480, world_size=2)
    assert batch.endswith("(8 batch_size × 2 accumulation × 2 ranks, kept from the checkpoint)")


def test_the_data_set_names_its_tasks():
    line = dataset_line(part(range(38), 388, ["a", "b", "c", "", "d"]), None)
    assert line == "✓ data set: 38 episodes, 388 samples; 4 tasks: 'a', 'b', 'c', and 1 more"


def test_the_data_set_names_its_held_out_episodes():
    line = dataset_line(part([0, 1, 2], 60, ["a"]), part([3], 20, ["a"]))
    assert line == (
        "✓ data set: 3 episodes, 60 samples, 20 held out (episode 3: 1 of 4 episodes, 25%); 1 task: 'a'"
    )
    line = dataset_line(part(range(80), 60, ["a"]), part(range(80, 100), 20, ["a"]))
    assert "(episodes 80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 90, 91, … 99: 20 of 100" in line


@pytest.mark.parametrize(
    ("asked", "train", "heldout", "warned"),
    [(0.05, 3, 1, "25%"), (0.05, 36, 4, "10%"), (0.05, 38, 2, None), (0.25, 3, 1, None), (0.05, 19, 1, None)],
)
def test_a_share_that_is_not_the_one_asked_for_is_warned(asked, train, heldout, warned):
    lines = heldout_lines(asked, train, heldout)
    assert bool(lines) == bool(warned)
    if warned:
        assert lines[0].startswith(f"warning: {warned} of the episodes are held out")
        assert f"--dataset.eval_split={asked}" in lines[0]


@pytest.mark.parametrize(
    ("dtype", "device", "told"), [("float32", "cuda", 1), ("bfloat16", "cuda", 0), ("float32", "cpu", 0)]
)
def test_a_run_in_fp32_on_a_gpu_is_told_of_bf16(dtype, device, told):
    lines = precision_lines(dtype, device)
    assert len(lines) == told
    assert all("fp32: --engine.dtype=bfloat16" in line for line in lines)


def test_anchors_are_counted_by_task_and_split_with_l0():
    cache = SimpleNamespace(
        tasks=["reach", "push"],
        task=torch.tensor([0, 1, 1, 0]),
        splits={"train": [0, 1, 2], "heldout": [3]},
        loss_of={"token_ce": {"heldout": {"by_task": {"reach": 0.0025}}}}.get,
    )
    line = anchor_line(cache, CraftConfig(enabled=True))
    assert line == "✓ anchors: 3 + 1 held out; 'reach' 1 + 1 held out (L0 0.0025); 'push' 2 + 0 held out"


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        ({"epsilon_start": 1.0, "epsilon_end": 0.1}, "may never be met"),
        ({"epsilon_start": 3.0, "epsilon_end": 2.5}, "may never bind"),
        ({"epsilon_start": 1.0, "epsilon_end": 0.6}, None),
        ({"epsilon_relative": True, "epsilon_start": 1.3, "epsilon_end": 1.1}, None),
        ({"epsilon_relative": True, "epsilon_start": 1.0, "epsilon_end": 0.1}, "may never be met"),
        ({"epsilon_relative": True, "epsilon_start": 5.0, "epsilon_end": 4.0}, "may never bind"),
    ],
)
def test_an_epsilon_out_of_reach_is_a_warning(flags, warned):
    first, *warnings = epsilon_lines(CraftConfig(enabled=True, **flags), teacher_loss=0.6)
    assert first.endswith("L0 is 0.600")
    assert [warned in line for line in warnings] == ([True] if warned else [])


@pytest.mark.parametrize("name", ["teacher_kl", "hidden"])
def test_an_epsilon_has_no_unit_where_the_teachers_loss_is_zero(name):
    craft = CraftConfig(enabled=True, retention_loss=name, epsilon_start=0.2, epsilon_end=0.08)
    assert epsilon_lines(craft, 1e-9) == [f"ε: 0.200 to 0.08; the teacher's own {name} is 0"]


def test_a_relative_epsilon_is_shown_in_absolute_units():
    craft = CraftConfig(enabled=True, epsilon_relative=True, epsilon_start=1.5, epsilon_end=1.0)
    assert epsilon_lines(craft, 0.6)[0] == "ε: 0.900 to 0.600; the teacher's own loss L0 is 0.600"


@pytest.mark.parametrize(("teacher_loss", "ratio"), [(0.002, "50"), (0.0004, "250")])
def test_the_default_epsilon_never_binds_on_a_good_teacher(teacher_loss, ratio):
    """The default falls from 1.0 to 0.1: a policy may lose all that such a teacher knows."""
    first, warning = epsilon_lines(CraftConfig(enabled=True), teacher_loss)
    assert first == f"ε: 1.000 to 0.100; the teacher's own loss L0 is {teacher_loss}"
    assert warning.startswith(f"warning: ε ends at {ratio} times L0 and may never bind")
    assert "--craft.epsilon_relative=true --craft.epsilon_start=1.3 --craft.epsilon_end=1.1" in warning


def test_the_default_epsilon_is_never_met_by_a_poor_teacher():
    _, warning = epsilon_lines(CraftConfig(enabled=True), 1.7)
    assert warning.startswith("warning: ε ends below L0 and may never be met")
    assert "--craft.epsilon_relative=true --craft.epsilon_start=1.3 --craft.epsilon_end=1.1" in warning


@pytest.mark.parametrize("teacher_loss", [1e-4, 0.002, 0.6, 1.7, 9.0])
def test_the_advised_epsilon_is_without_a_warning(teacher_loss):
    craft = CraftConfig(enabled=True, epsilon_relative=True, epsilon_start=1.3, epsilon_end=1.1)
    assert len(epsilon_lines(craft, teacher_loss)) == 1


def test_a_teacher_without_any_loss():
    for relative in (False, True):
        _, warning = epsilon_lines(CraftConfig(enabled=True, epsilon_relative=relative), 0.0)
        assert warning.startswith("warning: L0 is 0")

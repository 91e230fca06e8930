import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.utils.constants import ACTION_TOKEN_MASK, ACTION_TOKENS

import craft_ds.worlds
from craft_ds.policies.loading import load_policy, load_policy_config, load_processors
from craft_ds.policies.pi0_fast.generation import action_chunk
from craft_ds.worlds import make_world
from craft_ds.worlds.base import ACTION, CAMERA, STATE
from craft_ds.worlds.evaluation import ClosedLoopPolicy, evaluate
from craft_ds.worlds.recording import record_episode
from craft_ds.worlds.tasks import WITH_TEACHER

ASSETS = Path(craft_ds.worlds.__file__).parent / "assets"
TEACHERS = [ASSETS / f"{world}_teacher" for world in WITH_TEACHER]


def load(path):
    config = load_policy_config(path)
    return load_policy(config, path), *load_processors(config, path)


@pytest.fixture(scope="module")
def teacher():
    return load(ASSETS / "metaworld_teacher")


def test_assets_are_small_and_have_no_absolute_paths():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4e6
    for path in (path for path in files if path.suffix == ".json" and "tokenizer" not in path.parts[-2]):
        assert '"/' not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("teacher", TEACHERS, ids=WITH_TEACHER)
def test_the_record_has_the_measured_success(teacher):
    record = json.loads((teacher / "teacher.json").read_text(encoding="utf-8"))
    success = record["success"]
    assert np.mean([success[task] for task in record["old_tasks"]]) >= 0.9
    assert all(success[task] <= 0.1 for task in record["new_tasks"])
    assert {"command", "hardware"} <= record.keys()


def test_the_blocks_teacher_solves_only_the_old_tasks():
    world = make_world("blocks")
    policy, *processors = load(ASSETS / "blocks_teacher")
    act = partial(action_chunk, policy)
    success = evaluate(ClosedLoopPolicy(act, *processors), world, world.tasks("all"), episodes=10, seed=7)
    assert np.mean([success[task] for task in world.old_tasks]) >= 0.9
    assert success[world.new_tasks[0]] <= 0.3


def test_the_metaworld_teacher_solves_only_the_old_tasks(metaworld, teacher):
    policy, *processors = teacher
    act = partial(action_chunk, policy)
    success = evaluate(
        ClosedLoopPolicy(act, *processors), metaworld(), metaworld.tasks("all"), episodes=5, seed=7
    )
    assert np.mean([success[task] for task in metaworld.old_tasks]) >= 0.8
    assert success[metaworld.new_tasks[0]] <= 0.2


@pytest.mark.filterwarnings(r"ignore:Constant\(s\) may be too high")
def test_tokens_represent_the_new_task(metaworld, teacher):
    policy, preprocessor, postprocessor = teacher
    world = metaworld()
    task = world.new_tasks[0]
    episode = record_episode(world, task, seed=1)
    low, high = np.array(world.state_range)
    assert (episode.states >= low).all()
    assert (episode.states <= high).all()

    chunks = np.lib.stride_tricks.sliding_window_view(episode.actions, world.chunk_size, axis=0)
    chunks = torch.from_numpy(chunks.transpose(0, 2, 1).copy())
    count = len(chunks)
    sample = {
        CAMERA: torch.zeros(count, 3, 64, 64),
        STATE: torch.from_numpy(episode.states[:count]),
        ACTION: chunks,
        "task": [world.task_text(task)] * count,
    }
    batch = preprocessor(sample)
    assert batch[ACTION_TOKEN_MASK].sum(1).max() < policy.config.max_action_tokens  # nothing was truncated
    spelled = batch[ACTION_TOKENS][:, 1:]  # as a policy generates them, after the start token
    decoded = postprocessor(policy.detokenize_actions(spelled, world.chunk_size, 4))
    assert (decoded.clip(-1, 1) - chunks).abs().mean() < 0.05

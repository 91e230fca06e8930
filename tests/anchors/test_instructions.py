"""Anchors without data of the old tasks: observations under their instructions, labelled by the teacher."""

import json

import pytest
import torch
from builds import contents, refuses, run_script
from lerobot.utils.constants import ACTION_TOKEN_MASK, ACTION_TOKENS, OBS_LANGUAGE_TOKENS
from test_build import dataset_batch

from craft_ds.anchors.build import build_anchor_cache
from craft_ds.anchors.cache import AnchorCache, read_metadata
from craft_ds.anchors.sampler import to_policy_batch
from craft_ds.errors import UserError
from craft_ds.policies.loading import load_policy, load_policy_config
from craft_ds.policies.pi0_fast.retention import (
    RETENTION_LOSSES,
    TEACHER_TOKEN_MASK,
    TEACHER_TOKENS,
    teacher_tokens,
)

TEXTS = ("fold the towel", "press the red button", "open the lid")
TARGETS = ("teacher_tokens", "teacher_kl")


@pytest.fixture(scope="module")
def relabelled(options, tmp_path_factory):
    path = tmp_path_factory.mktemp("relabelled") / "cache"
    assert build_anchor_cache(options(path, instructions=TEXTS, targets=TARGETS, num_samples=24))
    return path


@pytest.fixture(scope="module")
def policy(teacher):
    return load_policy(load_policy_config(teacher), teacher)


def test_each_instruction_has_equal_shares_of_the_observations(relabelled):
    cache = AnchorCache.open(relabelled)
    assert cache.tasks == list(TEXTS)
    assert torch.bincount(cache.task).tolist() == [8, 8, 8]
    dataset = cache.metadata["dataset"]
    assert dataset["observed_tasks"] == ["press the red button", "close the drawer"]
    assert dataset["task_frames"] == [72, 72, 72]
    assert cache.metadata["request"]["instructions"] == list(TEXTS)
    episodes = {split: set(cache.episode[members].tolist()) for split, members in cache.splits.items()}
    assert episodes["heldout"] == set(dataset["episodes"]["heldout"])
    for task in range(3):  # observations of both tasks, in both splits
        of_task = cache.episode[cache.task == task]
        assert {episode % 2 for episode in of_task.tolist()} == {0, 1}
        assert set(of_task.tolist()) & episodes["heldout"]


def test_the_prompt_is_the_instruction_and_the_image_the_observation(relabelled, data, teacher):
    cache = AnchorCache.open(relabelled)
    anchors = cache.read(range(len(cache)))
    rows = (anchors["episode"] * 12 + anchors["frame"]).tolist()
    observed = dataset_batch(data, load_policy_config(teacher), teacher, rows)
    batch = to_policy_batch(anchors, "cpu")
    for camera in cache.cameras:
        assert torch.equal(batch[camera], observed[camera])
    same_text = [
        index
        for index, episode in enumerate(cache.episode.tolist())
        if cache.task[index] == 1 and episode % 2 == 0
    ]
    assert same_text
    prompts, own = batch[OBS_LANGUAGE_TOKENS], observed[OBS_LANGUAGE_TOKENS]
    for index in range(len(cache)):
        assert torch.equal(prompts[index], own[index]) == (index in same_text)


def test_actions_and_losses_are_the_teachers_own(relabelled, policy):
    cache = AnchorCache.open(relabelled)
    anchors = cache.read(range(len(cache)), retention_loss="teacher_tokens")
    decoded = teacher_tokens(policy, to_policy_batch(anchors, "cpu"))
    for stored, target in ((ACTION_TOKENS, TEACHER_TOKENS), (ACTION_TOKEN_MASK, TEACHER_TOKEN_MASK)):
        assert torch.equal(anchors[stored], decoded[target])
        assert torch.equal(anchors[target], decoded[target])
    assert cache.targets["teacher_tokens"] == cache.teacher_loss
    with torch.no_grad():
        loss = RETENTION_LOSSES["token_ce"].loss(policy, to_policy_batch(anchors, "cpu"))
    assert cache.teacher_loss["all"]["overall"] == pytest.approx(float(loss.total / loss.count), rel=1e-5)
    assert cache.targets["teacher_kl"]["all"]["overall"] == pytest.approx(0.0, abs=1e-5)


def test_the_recorded_actions_do_not_enter(relabelled, built):
    one, other = (AnchorCache.open(path) for path in (relabelled, built))
    recorded = {tuple(row) for row in other.read(range(len(other)))[ACTION_TOKENS].tolist()}
    assert not recorded & {tuple(row) for row in one.read(range(len(one)))[ACTION_TOKENS].tolist()}


def test_the_command(relabelled, data, teacher, tmp_path, monkeypatch, capsys):
    flags = ["--dataset_repo_id=craft-ds/test", f"--dataset_root={data}", f"--policy_path={teacher}"]
    flags += [f"--output_dir={tmp_path / 'cache'}", "--num_samples=24", "--num_workers=0", "--shard_size=6"]
    flags += ["--batch_size=4", "--targets", *TARGETS, "--instructions", *TEXTS]
    assert run_script(monkeypatch, *flags) == 0
    assert "actions: the teacher's own, for observations of craft-ds/test" in capsys.readouterr().out
    made, expected = contents(tmp_path / "cache"), contents(relabelled)
    assert json.loads(made["metadata.json"]) == json.loads(expected["metadata.json"])
    assert made == expected


@pytest.mark.usefixtures("no_policy")
def test_unusable_instructions_are_refused(options, relabelled, tmp_path):
    with pytest.raises(UserError, match="--instructions names fold the towel more than once"):
        options(tmp_path / "cache", instructions=("fold the towel", "fold the towel"))
    with pytest.raises(UserError, match="--instructions: a text is empty"):
        options(tmp_path / "cache", instructions=("fold the towel", " "))
    refuses(options(tmp_path / "cache", instructions=TEXTS, num_samples=217), "216 frames", "3 instructions")
    refuses(options(tmp_path / "cache", instructions=TEXTS, num_samples=2), "the 3 tasks of --instructions")
    refuses(options(relabelled, num_samples=24, targets=TARGETS), "another anchor cache")
    assert "instructions" not in read_metadata(relabelled)["dataset"]

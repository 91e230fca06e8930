"""Several anchor caches as one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lerobot.utils.constants import ACTION

from craft_ds.anchors.cache import METADATA_FILE, SPLITS
from craft_ds.anchors.cache_list import AnchorCaches, open_caches
from craft_ds.anchors.coverage import check_coverage, count_by_task
from craft_ds.anchors.sampler import AnchorSampler
from craft_ds.config.craft_config import CraftConfig
from craft_ds.data.batch_partition import partition_step
from craft_ds.errors import UserError
from craft_ds.testing.datasets import TASK_TEXTS, edit_metadata, write_test_cache


def paths_of(paths):
    return [Path(path) for path in paths]


def dataset_of(path):
    return json.loads((path / METADATA_FILE).read_text())["dataset"]


def set_losses(path, overall, tokens, by_task):
    losses = {"overall": overall, "by_task": by_task, "tokens": tokens}
    edit_metadata(path, teacher_loss=dict.fromkeys((*SPLITS, "all"), losses))


@pytest.fixture
def paths(tmp_path):
    """A cache of the tasks 0 and 1, and one of 1 and two others, whose own indices are 0, 1 and 2."""
    one, two = tmp_path / "one", tmp_path / "two"
    write_test_cache(one, [0, 1, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5], [4, 5])
    write_test_cache(two, [0, 1, 2, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 6], [5, 6])
    edit_metadata(two, dataset={**dataset_of(two), "tasks": [TASK_TEXTS[1], *TASK_TEXTS[2:4]]})
    return [str(one), str(two)]


def refused(paths):
    with pytest.raises(UserError) as caught:
        open_caches(paths)
    line = str(caught.value)
    assert "\n" not in line
    assert all(path in line for path in paths)
    return line


def test_one_cache_is_opened_as_itself(paths):
    assert str(open_caches(paths[:1]).path) == paths[0]
    assert not isinstance(open_caches(paths[:1]), AnchorCaches)


def test_a_text_of_two_caches_is_one_task(paths):
    caches = open_caches(paths)
    assert caches.tasks == list(TASK_TEXTS)
    assert caches.task.tolist() == [0, 1, 0, 1, 0, 1, 1, 2, 3, 1, 2, 3, 1]
    assert caches.task_frames == [3, 6, 2, 2]
    assert caches.splits == {"train": [0, 1, 2, 3, 6, 7, 8, 9, 10], "heldout": [4, 5, 11, 12]}
    assert count_by_task(caches) == {"train": [2, 4, 2, 1], "heldout": [1, 2, 0, 1]}
    check_coverage(caches, "heldout", world_size=4)


def test_anchors_are_those_of_their_own_caches(paths):
    caches = open_caches(paths)
    order = [12, 0, 6, 5, 0, 11]
    batch = caches.read(order)
    one, two = (part.read(range(len(part))) for part in caches.parts)
    for name, values in batch.items():
        if name != "task":
            expected = torch.cat([one[name], two[name]])[order]
            assert values.dtype == expected.dtype
            assert torch.equal(values, expected), name
    assert batch["task"].tolist() == [1, 0, 1, 1, 0, 3]
    assert caches.read([7])["episode"].tolist() == [1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_ranks_draws_the_same_balanced_anchors(paths, world_size):
    caches = open_caches(paths)
    share = partition_step(8, world_size, 2, "anchors")
    sampler = AnchorSampler(caches, "train", share, seed=0)
    step = sorted(
        position
        for rank in range(world_size)
        for micro_batch in range(share.micro_batches)
        for position in share.positions(16, rank, micro_batch)
    )
    assert step == list(range(16, 24))
    drawn = sampler.draw(step)
    assert drawn == AnchorSampler(caches, "train", partition_step(8, 1, 8, "anchors"), seed=0).draw(step)
    assert torch.bincount(caches.task[drawn]).tolist() == [2, 2, 2, 2]
    epoch = sampler.draw(range(16))
    assert {index for index in epoch if caches.task[index] == 1} == {1, 3, 6, 9}


def test_the_teachers_loss_is_the_mean_over_all_tokens(paths):
    set_losses(paths_of(paths)[0], 1.0, 100, {TASK_TEXTS[0]: 0.5, TASK_TEXTS[1]: 2.0})
    set_losses(paths_of(paths)[1], 4.0, 300, {TASK_TEXTS[1]: 1.0, TASK_TEXTS[2]: 7.0})
    losses = open_caches(paths).loss_of("token_ce")
    for split in (*SPLITS, "all"):
        assert losses[split]["overall"] == pytest.approx((1.0 * 100 + 4.0 * 300) / 400)
        assert losses[split]["tokens"] == 400
        assert losses[split]["by_task"][TASK_TEXTS[0]] == 0.5  # of its own teacher
    assert losses["train"]["by_task"][TASK_TEXTS[2]] == 7.0
    # Two anchors of each cache train; in all, three of each.
    assert losses["train"]["by_task"][TASK_TEXTS[1]] == pytest.approx((2 * 2.0 + 2 * 1.0) / 4)
    assert losses["heldout"]["by_task"][TASK_TEXTS[1]] == pytest.approx((1 * 2.0 + 1 * 1.0) / 2)


def test_a_split_that_one_cache_lacks_is_measured_on_the_other(tmp_path):
    write_test_cache(tmp_path / "one", [0, 0], [0, 1])
    write_test_cache(tmp_path / "two", [0, 0], [0, 1], [1])
    for name, overall, tokens in (("one", None, 0), ("two", 3.0, 9)):
        losses = {"overall": 2.0, "by_task": {}, "tokens": 5}
        heldout = {"overall": overall, "by_task": {}, "tokens": tokens}
        edit_metadata(
            tmp_path / name, teacher_loss={**dict.fromkeys(("train", "all"), losses), "heldout": heldout}
        )
    caches = open_caches([str(tmp_path / "one"), str(tmp_path / "two")])
    assert caches.teacher_loss["heldout"]["overall"] == 3.0


def test_targets_are_missing_if_one_cache_lacks_them(paths):
    with pytest.raises(UserError, match=f"anchor cache {paths[0]} holds no such targets"):
        open_caches(paths).loss_of("teacher_kl")


def test_what_does_not_fit_together_is_named(paths):
    second = paths_of(paths)[1]
    original = json.loads((second / METADATA_FILE).read_text())
    step = json.loads(json.dumps(original["preprocessing"]))
    step[0]["features"][ACTION]["max"][1] = 3.0
    changes = {
        "tokenizer 0123456789ab in the first, fedcba987654 in the second": {"tokenizer": "fedcba9876543210"},
        "chunk_size 8 in the first, 4 in the second": {"chunk_size": 4},
        "max of action[1] 2 in the first, 3 in the second": {"preprocessing": step},
    }
    for words, change in changes.items():
        edit_metadata(second, **{**original, **change})
        assert words in refused(paths)
    edit_metadata(second, **original)
    open_caches(paths)


def test_the_same_cache_twice_is_refused(paths):
    assert "twice" in refused([paths[0], paths[0]])


def test_an_episode_held_out_in_one_must_not_train_in_another(paths, tmp_path):
    one, two = paths_of(paths)
    for path in (one, two):
        edit_metadata(path, dataset={**dataset_of(path), "meta_sha256": "0" * 64})
    assert "its episode 4 is held out in the first and trained in the second" in refused(paths)
    copy = shutil.copytree(one, tmp_path / "copy")
    open_caches([str(one), str(copy)])


def test_the_flag_is_a_list_separated_by_commas(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    craft = CraftConfig(enabled=True, anchor_cache_dir="data/a, ~/b")
    assert craft.anchor_caches == ["data/a", "/home/me/b"]
    assert CraftConfig(anchor_cache_dir="data/a").anchor_caches == ["data/a"]
    with pytest.raises(UserError, match=r"needs --craft\.anchor_cache_dir"):
        CraftConfig(enabled=True, anchor_cache_dir=" ,").validate()

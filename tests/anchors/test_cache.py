import json

import pytest
import torch

from craft_ds.anchors.cache import METADATA_FILE, AnchorCache, partial_directory, shard_name
from craft_ds.errors import UserError
from craft_ds.testing.datasets import edit_metadata, write_test_cache

TASK = [0, 0, 1, 1, 2, 0, 1, 2, 2, 0]
EPISODE = [0, 0, 1, 1, 2, 3, 4, 5, 5, 3]


@pytest.fixture
def path(tmp_path):
    write_test_cache(tmp_path / "cache", TASK, EPISODE, heldout_episodes=[3, 5])
    return tmp_path / "cache"


def refuses(path, *words, verify=True):
    with pytest.raises(UserError) as caught:
        AnchorCache.open(path, verify=verify)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


def test_reads_any_rows_in_any_order(tmp_path):
    anchors = write_test_cache(tmp_path / "cache", TASK, EPISODE)
    cache = AnchorCache.open(tmp_path / "cache")
    rows = [9, 0, 4, 4, 3, 8]
    read = cache.read(rows)
    assert read.keys() == anchors.keys()
    for name, tensor in anchors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor[rows])
    assert len(cache) == 10
    assert cache.read([])["task"].shape == (0,)


def test_splits_share_no_episode(path):
    cache = AnchorCache.open(path)
    assert cache.splits == {"train": [0, 1, 2, 3, 4, 6], "heldout": [5, 7, 8, 9]}
    assert cache.task.tolist() == TASK
    assert not {EPISODE[i] for i in cache.splits["train"]} & {EPISODE[i] for i in cache.splits["heldout"]}


def test_missing_directory_names_the_builder(tmp_path):
    refuses(tmp_path / "nowhere", tmp_path / "nowhere", "craft-ds anchors")


def test_an_interrupted_build_is_reported(tmp_path):
    partial_directory(tmp_path / "cache").mkdir()
    refuses(tmp_path / "cache", "interrupted", "again to finish")


def test_missing_metadata(path):
    (path / METADATA_FILE).unlink()
    refuses(path, METADATA_FILE)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "x"}'])
def test_unreadable_metadata(path, text):
    (path / METADATA_FILE).write_text(text)
    refuses(path, METADATA_FILE, "damaged")


def test_changed_metadata(path):
    metadata = json.loads((path / METADATA_FILE).read_text())
    metadata["cameras"] = ["another"]
    (path / METADATA_FILE).write_text(json.dumps(metadata))
    refuses(path, METADATA_FILE, "damaged")


def test_other_version(path):
    edit_metadata(path, version=2)
    refuses(path, "version 2", "version 1")


def test_missing_shard(path):
    (path / shard_name(1)).unlink()
    refuses(path, shard_name(1), "missing", verify=False)


def test_truncated_shard(path):
    shard = path / shard_name(2)
    shard.write_bytes(shard.read_bytes()[:-1])
    refuses(path, shard_name(2), "damaged", verify=False)


def test_flipped_byte_is_found_by_the_checksum(path):
    shard = path / shard_name(1)
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    refuses(path, shard_name(1), "SHA-256")
    AnchorCache.open(path, verify=False)


def test_damaged_shard_header(path):
    shard = path / shard_name(0)
    data = bytearray(shard.read_bytes())
    data[7] = 255
    shard.write_bytes(data)
    refuses(path, shard_name(0), "damaged", verify=False)


def test_wrong_sample_count(path):
    shards = json.loads((path / METADATA_FILE).read_text())["shards"]
    shards[1]["samples"] = 3
    edit_metadata(path, shards=shards)
    refuses(path, METADATA_FILE, "sample counts of 1")

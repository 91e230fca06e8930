"""Every way of saving writes the same checkpoint, and a disk error on one rank reaches all ranks."""

import pytest
from registry import every
from test_checkpoint_of_ranks import assert_same, in_file, renamed

from craft_ds.checkpoints import read_manifest
from craft_ds.export.export import export_checkpoint
from craft_ds.tensor_io.per_rank_file import pieces_of


@pytest.fixture
def root(ranks):
    return ranks.scratch / f"saving_{ranks.kind}_on{ranks.world_size}"


@every("saving")
def test_a_background_save_has_the_state_at_its_start(ranks, name, root):
    assert_same(in_file(root / "background" / "step_000002"), renamed(ranks[name], "saved"))
    for rank in ranks[name].values:
        assert rank["background"] == str(root / "background" / "step_000002")
        assert rank["idle"] == "None"


@every("saving")
def test_pieces_load_and_export_to_the_same_file(ranks, name, root, tmp_path):
    checkpoint = root / "pieces" / "step_000002"
    assert len(pieces_of(checkpoint / "model.safetensors")) == ranks.world_size
    assert_same(renamed(ranks[name], "loaded"), renamed(ranks[name], "saved"))
    export_checkpoint(checkpoint, tmp_path / "joined")
    consolidated = root / "plain" / "step_000002" / "model.safetensors"
    assert (tmp_path / "joined" / "model.safetensors").read_bytes() == consolidated.read_bytes()


@every("saving")
def test_a_full_disk_on_one_rank_is_an_error_on_all_ranks(ranks, name, root):
    for rank in ranks[name].values:
        assert f"{root}/plain/step_000004 cannot be written: [Errno 28]" in rank["failed"]
        assert rank["left"] == ["last", "step_000002"]
    assert read_manifest(root / "plain" / "step_000004")["step"] == 4


@every("saving")
def test_each_rank_flushes_its_own_data(ranks, name):
    """On a network file system no other rank can."""
    for rank in ranks[name].values:
        assert {"model.safetensors", "optimizer.safetensors"} <= set(rank["synced"])


@every("holes")
def test_a_file_with_a_gap_is_not_written(ranks, name):
    for rank in ranks[name].values:
        assert "the ranks do not hold" in rank["refused"]
        assert not rank["written"]

"""`craft-ds anchors --extend`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from builds import Killed, contents, run_script

from craft_ds.anchors import extend
from craft_ds.anchors.cache_list import AnchorCaches, open_caches
from craft_ds.anchors.extend import extend_anchor_cache
from craft_ds.errors import UserError
from craft_ds.testing.policies import make_test_policy_dir


@pytest.fixture(scope="module")
def change(built, data):
    """Options of a cache of other tasks on the same data, with the same held-out episodes."""
    return {"instructions": ("fold the towel",), "num_samples": 8, "seed": 0}


@pytest.fixture(scope="module")
def extended(built, options, change, tmp_path_factory):
    path = tmp_path_factory.mktemp("extended") / "cache"
    assert extend_anchor_cache(options(path, **change), built)
    return path


def test_it_holds_the_old_anchors_and_the_new(extended, built):
    assert sorted(path.name for path in extended.iterdir()) == ["00000", "00001", "caches.json"]
    assert contents(extended / "00000") == contents(built)
    shard = "shard_00000.safetensors"
    assert (extended / "00000" / shard).stat().st_ino == (built / shard).stat().st_ino
    assert not list(extended.parent.glob(".*"))
    caches = open_caches([str(extended)])
    assert isinstance(caches, AnchorCaches)
    assert caches.tasks == ["press the red button", "close the drawer", "fold the towel"]
    assert torch.bincount(caches.task).tolist() == [11, 11, 8]


def test_the_old_cache_may_be_deleted(extended, built, tmp_path):
    moved = shutil.copytree(extended, tmp_path / "moved")
    assert len(open_caches([str(moved)])) == 30


def test_the_same_command_again_does_nothing(extended, built, options, change):
    before = {path: path.stat().st_mtime_ns for path in extended.rglob("*.*")}
    assert not extend_anchor_cache(options(extended, **change), built)
    assert {path: path.stat().st_mtime_ns for path in extended.rglob("*.*")} == before
    with pytest.raises(UserError, match="holds another anchor cache"):
        extend_anchor_cache(options(extended, **change | {"num_samples": 9}), built)


def test_an_extended_cache_is_extended_and_listed(extended, data, teacher, tmp_path, monkeypatch, capsys):
    flags = ["--dataset_repo_id=craft-ds/test", f"--dataset_root={data}", f"--policy_path={teacher}"]
    flags += [f"--output_dir={tmp_path / 'again'}", "--num_samples=4", "--num_workers=0"]
    flags += [f"--extend={extended}", "--instructions", "lift the lid"]
    assert run_script(monkeypatch, *flags) == 0
    printed = capsys.readouterr().out
    assert "anchors of 4 tasks" in printed
    assert "'lift the lid'" in printed
    assert len(open_caches([str(tmp_path / "again")]).parts) == 3


def test_an_interrupted_extension_is_continued(built, options, change, extended, tmp_path, monkeypatch):
    def die(*_, **__):
        raise Killed

    monkeypatch.setattr(extend, "atomic_directory", die)
    with pytest.raises(Killed):
        extend_anchor_cache(options(tmp_path / "cache", **change), built)
    assert not (tmp_path / "cache").exists()
    monkeypatch.undo()
    monkeypatch.setattr("craft_ds.anchors.build.load_trained_policy", die)  # it is built already
    assert extend_anchor_cache(options(tmp_path / "cache", **change), built)
    assert contents(tmp_path / "cache" / "00001") == contents(extended / "00001")


@pytest.mark.usefixtures("no_policy")
class TestRefused:
    def refused(self, options, old):
        with pytest.raises(UserError) as caught:
            extend_anchor_cache(options, old)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_no_old_cache(self, options, tmp_path):
        assert f"no anchor cache at {tmp_path / 'none'}" in self.refused(
            options(tmp_path / "cache"), tmp_path / "none"
        )

    def test_another_directory(self, options, built, data, tmp_path):
        for path in (built, data):
            assert "does not extend" in self.refused(options(path), built)

    def test_another_teacher_whose_tokens_differ(self, options, built, tmp_path):
        other = make_test_policy_dir(tmp_path / "policy", cameras=1)
        line = self.refused(options(tmp_path / "cache", policy_path=str(other)), built)
        assert "does not fit the policy: cameras" in line

    @pytest.mark.parametrize("damage", ["another part", "no list", "a part is gone"])
    def test_damage(self, extended, tmp_path, damage):
        path = Path(shutil.copytree(extended, tmp_path / "cache"))
        if damage == "another part":
            shutil.rmtree(path / "00000")
            shutil.copytree(path / "00001", path / "00000")
        elif damage == "no list":
            (path / "caches.json").write_text(json.dumps({"format": "craft-ds anchor caches", "version": 1}))
        else:
            shutil.rmtree(path / "00001")
        with pytest.raises(UserError, match=r"caches\.json is damaged"):
            open_caches([str(path)])

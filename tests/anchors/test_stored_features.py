"""Vision features in an anchor cache: built, read back, and refused where they do not fit."""

import json
import shutil

import pytest
import torch
from builds import Killed, contents, refuses, run_script
from safetensors.torch import load_file, save_file

from craft_ds.anchors import build
from craft_ds.anchors.build import build_anchor_cache
from craft_ds.anchors.cache import AnchorCache
from craft_ds.anchors.sampler import to_policy_batch
from craft_ds.anchors.vision import check_frozen_tower, check_vision_features, read_vision_tower
from craft_ds.errors import UserError
from craft_ds.policies.loading import load_policy, load_policy_config
from craft_ds.policies.pi0_fast.vision import vision_features, vision_tower
from craft_ds.policies.token_loss import token_loss


@pytest.fixture(scope="module")
def with_features(options, tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "cache"
    assert build_anchor_cache(options(path, vision_features=True))
    return path


def test_features_are_the_output_of_the_teachers_tower(with_features, teacher):
    cache = AnchorCache.open(with_features)
    everything = range(len(cache))
    images, features = cache.read(everything), cache.read(everything, vision_features=True)
    policy = load_policy(load_policy_config(teacher), teacher)
    expected = vision_features(policy, to_policy_batch(images, "cpu"))
    assert set(expected) == {f"{camera}.vision_features" for camera in cache.cameras}
    assert len(expected) == 2
    for name, tensor in expected.items():
        assert features[name].dtype == torch.float16
        torch.testing.assert_close(features[name].float(), tensor, rtol=2**-10, atol=1e-6)
    assert set(features) - set(images) == set(expected)
    assert set(images) - set(features) == set(cache.cameras)
    batch = to_policy_batch(features, "cpu")
    for name in expected:
        assert batch[name].dtype == torch.float16
        assert torch.equal(batch[name], features[name])
    losses = [
        token_loss(policy, to_policy_batch(anchors, "cpu")).total.item() for anchors in (images, features)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_the_rest_of_the_cache_is_as_without_features(built, with_features):
    without, has = (json.loads((path / "metadata.json").read_text()) for path in (built, with_features))
    assert "vision_features" not in without
    assert not any("vision_features" in name for name in without["fields"])
    assert set(has.pop("vision_features")) == {"fingerprint"}
    for name in [name for name in has["fields"] if "vision_features" in name]:
        assert has["fields"].pop(name) == {"dtype": "float16", "shape": [16, 32]}
    assert {**has, "shards": 0, "sha256": 0} == {**without, "shards": 0, "sha256": 0}
    caches = [AnchorCache.open(path) for path in (built, with_features)]
    one, other = (cache.read(range(len(cache))) for cache in caches)
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(KeyError, match="no vision features"):
        caches[0].read([0], vision_features=True)


def test_images_are_not_read_with_features(with_features):
    cache = AnchorCache.open(with_features)
    for slices in cache._slices:
        for camera in cache.cameras:
            del slices[camera]
    assert len(cache.read([3, 0], vision_features=True)["task"]) == 2
    with pytest.raises(KeyError, match=r"observation\.images"):
        cache.read([3, 0])


@pytest.mark.parametrize("moment", ["in a shard", "behind a shard"])
def test_an_interrupted_build_of_features_is_continued(with_features, options, tmp_path, monkeypatch, moment):
    output = tmp_path / "cache"
    calls = []
    name, on_call = {"in a shard": ("fp16_vision_features", 4), "behind a shard": ("_write_json", 3)}[moment]
    original = getattr(build, name)

    def die(*args):
        calls.append(name)
        if len(calls) == on_call:
            raise Killed
        return original(*args)

    monkeypatch.setattr(build, name, die)
    with pytest.raises(Killed):
        build_anchor_cache(options(output, vision_features=True))
    monkeypatch.undo()
    refuses(options(output), "interrupted", "vision_features differs")
    assert build_anchor_cache(options(output, vision_features=True))
    assert contents(output) == contents(with_features)


@pytest.mark.usefixtures("no_policy")
def test_a_cache_without_features_is_another_than_one_with(built, with_features, options):
    assert not build_anchor_cache(options(with_features, vision_features=True))
    refuses(options(built, vision_features=True), f"--output_dir={built}", "vision_features differs")
    refuses(options(with_features), f"--output_dir={with_features}", "vision_features differs")


def changed_teacher(teacher, directory, edit):
    """A copy of the teacher with other weights."""
    shutil.copytree(teacher, directory)
    tensors = load_file(directory / "model.safetensors")
    edit({name.rpartition("vision_tower.vision_model.")[2]: tensor for name, tensor in tensors.items()})
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_features_that_fp16_cannot_hold(options, teacher, tmp_path):
    large = changed_teacher(
        teacher, tmp_path / "large", lambda tower: tower["post_layernorm.weight"].mul_(1e6)
    )
    refuses(options(tmp_path / "out", policy_path=str(large), vision_features=True), "float16", "e+0")
    assert not (tmp_path / "out").exists()
    assert build_anchor_cache(options(tmp_path / "without", policy_path=str(large)))


def test_features_fit_the_tower_that_made_them(with_features, built, teacher, tmp_path):
    cache = AnchorCache.open(with_features)
    config = load_policy_config(teacher)
    check_vision_features(cache, teacher, config)

    def refused(cache, directory):
        with pytest.raises(UserError) as caught:
            check_vision_features(cache, directory, config)
        return str(caught.value)

    other = changed_teacher(
        teacher, tmp_path / "other", lambda tower: tower["encoder.layers.0.mlp.fc1.weight"][0, :1].add_(1)
    )
    line = refused(cache, other)
    for word in (with_features, other, cache.vision_fingerprint[:12], "--craft.vision_features"):
        assert str(word) in line
    assert read_vision_tower(config, other).fingerprint[:12] in line
    assert f"{built} holds no vision features" in refused(AnchorCache.open(built), teacher)


def test_features_need_a_frozen_tower(teacher):
    policy = load_policy(load_policy_config(teacher), teacher)
    with pytest.raises(UserError, match=r"--craft\.vision_features=true: the vision tower trains"):
        check_frozen_tower(policy)
    vision_tower(policy).requires_grad_(False)
    check_frozen_tower(policy)


def test_the_flag_of_the_script(with_features, data, teacher, tmp_path, monkeypatch, capsys):
    flags = [
        "--dataset_repo_id=craft-ds/test",
        f"--dataset_root={data}",
        f"--policy_path={teacher}",
        f"--output_dir={tmp_path / 'cache'}",
        "--num_samples=22",
        "--batch_size=4",
        "--shard_size=6",
        "--num_workers=0",
    ]
    assert run_script(monkeypatch, *flags, "--vision_features") == 0
    assert capsys.readouterr().out.startswith("built: ")
    assert contents(tmp_path / "cache") == contents(with_features)

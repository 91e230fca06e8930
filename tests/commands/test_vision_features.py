"""`--craft.vision_features` end to end, with a policy whose vision tower is frozen."""

import json
import shutil

import pytest
import torch
from runs import metrics, trained
from safetensors.torch import load_file, save_file

import craft_ds.training.build
from craft_ds.anchors.cache import AnchorCache
from craft_ds.policies.pi0_fast.vision import vision_tower

pytestmark = pytest.mark.slow

FLAGS = ["--craft.vision_features=true", "--eval_freq=2", "--dataset.eval_split=0.25"]


@pytest.fixture(scope="module")
def features(inputs, tmp_path_factory):
    """The shared anchors, with vision features."""
    output = tmp_path_factory.mktemp("features") / "anchors"
    return inputs.build_anchors(output, vision_features=True)


@pytest.fixture
def frozen_tower(monkeypatch):
    """Freezes the tower of every policy that is trained; the images of every call of it are counted."""
    build, counts = craft_ds.training.build.build_fp32_policy, []

    def build_frozen(*args):
        policy = build(*args)
        tower = vision_tower(policy)
        tower.requires_grad_(False)
        tower.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
        return policy

    monkeypatch.setattr(craft_ds.training.build, "build_fp32_policy", build_frozen)
    return counts


@pytest.fixture
def craft_flags(inputs, features):
    return [*inputs.craft_flags(), f"--craft.anchor_cache_dir={features}"]


def test_a_run_on_features_is_the_run_on_images(train, craft_flags, frozen_tower, inputs, tmp_path):
    ended = train(tmp_path / "images", *craft_flags, *FLAGS, "--craft.vision_features=false")
    assert ended.status == 0, ended.errors
    on_images, frozen_tower[:] = sum(frozen_tower), []
    ended = train(tmp_path / "features", *craft_flags, *FLAGS)
    assert ended.status == 0, ended.errors
    on_features = sum(frozen_tower)

    heldout = len(AnchorCache.open(inputs.anchors).splits["heldout"])
    # Retention steps 0 and 2 draw 2 anchors and 2 that measure; two evaluations see all held-out ones.
    assert on_images - on_features == 2 * (2 + 2) + 2 * heldout
    assert on_features > 0  # of the task

    expected, found = (metrics(tmp_path / name) for name in ("images", "features"))
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    assert found[0]["train/loss"] == expected[0]["train/loss"]
    for name in ("craft/retention_loss", "eval/anchor_loss"):
        one, other = ([row[name] for row in rows if name in row] for rows in (expected, found))
        assert len(one) >= 2
        assert other == pytest.approx(one, rel=2e-3)
    assert found[0]["craft/retention_loss"] != expected[0]["craft/retention_loss"]  # fp16 rounds

    stored = load_file(inputs.policy / "model.safetensors")
    weights = trained(tmp_path / "features" / "final")
    changed = {name for name, tensor in stored.items() if not torch.equal(weights[name], tensor)}
    assert any("multi_modal_projector" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)


def test_such_a_run_is_resumed(train, craft_flags, frozen_tower, tmp_path):
    """The checkpoint holds the same tower, so the cache still fits."""
    flags = ["--craft.vision_features=true", "--save_freq=2"]
    assert train(tmp_path / "complete", *craft_flags, *flags).status == 0
    config = f"--config_path={tmp_path}/complete/step_000002/train_config.json"
    ended = train(None, config, "--resume=true", f"--output_dir={tmp_path}/on")
    assert ended.status == 0, ended.errors
    one, other = (trained(tmp_path / name / "final") for name in ("complete", "on"))
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    saved = json.loads((tmp_path / "on" / "final" / "train_config.json").read_text())
    assert saved["craft"]["vision_features"] is True


def test_adapters_freeze_the_tower(train, craft_flags, tmp_path):
    ended = train(tmp_path / "run", *craft_flags, "--craft.vision_features=true", "--lora=preset")
    assert ended.status == 0, ended.errors


@pytest.mark.parametrize("lora", [[], ["--lora=attention_mlp_vision"]])
def test_a_tower_that_trains(refuses, craft_flags, tmp_path, monkeypatch, lora):
    def build(*_):
        raise AssertionError("weights were read first")

    monkeypatch.setattr(craft_ds.training.build, "build_engine", build)
    line = refuses(tmp_path / "run", *craft_flags, "--craft.vision_features=true", *lora)
    assert "--craft.vision_features=true: the vision tower trains in this run" in line


@pytest.fixture
def no_model(monkeypatch):
    def build(*_):
        raise AssertionError("the model was built first")

    monkeypatch.setattr(craft_ds.training.build, "build_fp32_policy", build)


@pytest.mark.usefixtures("no_model")
def test_a_cache_without_features(refuses, inputs, tmp_path):
    line = refuses(tmp_path / "run", *inputs.craft_flags(), "--craft.vision_features=true")
    assert f"{inputs.anchors} holds no vision features" in line
    assert "craft-ds anchors --vision_features" in line


@pytest.mark.usefixtures("no_model")
def test_features_of_another_tower(refuses, craft_flags, inputs, tmp_path):
    other = shutil.copytree(inputs.policy, tmp_path / "policy")
    tensors = load_file(other / "model.safetensors")
    (bias,) = (
        tensor for name, tensor in tensors.items() if "vision_tower" in name and "post_layernorm.b" in name
    )
    bias[0] += 1
    save_file(tensors, other / "model.safetensors")
    line = refuses(tmp_path / "run", *craft_flags, "--craft.vision_features=true", f"--policy.path={other}")
    assert "of another vision tower" in line
    assert str(other) in line
    assert "--craft.vision_features=true" in line


def test_without_craft_the_flag_has_no_effect(refuses, train, tmp_path):
    line = refuses(tmp_path / "run", "--craft.vision_features=true")
    assert "--craft.vision_features has no effect without --craft.enabled=true" in line
    off = ["--craft.vision_features=true", "--craft.enabled=false", "--steps=1"]
    assert train(tmp_path / "run", *off).status == 0

"""Runs on several anchor caches as one, and with augmented anchors."""

import json
import re

import pytest
from runs import assert_same_bits, metrics

from craft_ds.anchors.cache import read_metadata

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def second(inputs, tmp_path_factory):
    """Anchors of an old task without data: observations of the new task, labelled by the teacher."""
    output = tmp_path_factory.mktemp("second") / "anchors"
    return inputs.build_anchors(
        output, dataset_root=str(inputs.new), instructions=("fold the towel",), num_samples=12
    )


@pytest.fixture
def flags(inputs, second):
    caches = f"--craft.anchor_cache_dir={inputs.anchors},{second}"
    return [*inputs.craft_flags(), caches, "--craft.anchor_augmentation=lerobot", "--save_freq=2"]


def test_a_run_on_two_caches_is_resumed_exactly(train, inputs, second, flags, tmp_path, monkeypatch):
    relative = ["--craft.epsilon_relative=true", "--craft.epsilon_start=1.5", "--craft.epsilon_end=1.5"]
    ended = train(tmp_path / "run", *flags, *relative)
    assert ended.status == 0, ended.errors
    assert "'press the red button' 8 + 4 held out" in ended.output
    assert re.search(r"'fold the towel' \d+ \+ \d+ held out \(L0 ", ended.output)
    losses = [read_metadata(path)["teacher_loss"]["heldout"] for path in (inputs.anchors, second)]
    mean = sum(loss["overall"] * loss["tokens"] for loss in losses) / sum(loss["tokens"] for loss in losses)
    epsilons = [row["craft/epsilon"] for row in metrics(tmp_path / "run") if "craft/epsilon" in row]
    assert epsilons == pytest.approx([1.5 * mean] * len(epsilons))

    config = json.loads((tmp_path / "run" / "step_000002" / "train_config.json").read_text())
    assert config["craft"]["anchor_cache_dir"] == f"{inputs.anchors},{second}"
    on = [f"--config_path={tmp_path}/run/step_000002", "--resume=true", f"--output_dir={tmp_path}/on"]
    monkeypatch.chdir(second.parent)
    ended = train(None, *on, f"--craft.anchor_cache_dir={inputs.anchors}, {second.name}")
    assert ended.status == 0, ended.errors
    assert "anchor_cache_dir" not in ended.output  # the same list in another form
    assert_same_bits(tmp_path / "on" / "final", tmp_path / "run" / "final")


def test_augmentation_changes_the_gradient_alone(train, flags, tmp_path):
    plain = [flag for flag in flags if "augmentation" not in flag]
    for name, given in (("augmented", flags), ("plain", plain)):
        ended = train(tmp_path / name, *given, "--steps=1")
        assert ended.status == 0, ended.errors
    (one, *_), (other, *_) = (metrics(tmp_path / name) for name in ("augmented", "plain"))
    assert one["craft/retention_loss"] == other["craft/retention_loss"]  # the constraint's, before the step
    assert one["train/loss"] == other["train/loss"]
    assert one["train/grad_norm"] != other["train/grad_norm"]


def test_caches_that_do_not_fit_are_refused_before_anything_is_written(refuses, inputs, flags, tmp_path):
    line = refuses(tmp_path / "run", *flags, f"--craft.anchor_cache_dir={inputs.anchors},{inputs.anchors}")
    assert f"--craft.anchor_cache_dir names {inputs.anchors} twice" in line
    line = refuses(tmp_path / "run", *flags, f"--craft.anchor_cache_dir={inputs.anchors},{tmp_path}/none")
    assert f"no anchor cache at {tmp_path}/none" in line
    transforms = ["--dataset.image_transforms.max_num_transforms=0"]
    assert "has no effect" in refuses(tmp_path / "run", *flags, *transforms)

"""Anchors fit a policy whose processors do what the teacher's did, and no other."""

import json
import shutil

import pytest
from builds import edit_processor, make_dataset
from lerobot.processor import NormalizerProcessorStep
from safetensors.torch import load_file, save_file

from craft_ds.anchors.build import build_anchor_cache
from craft_ds.anchors.cache import METADATA_FILE, AnchorCache
from craft_ds.errors import UserError
from craft_ds.policies.loading import load_policy_config, load_processors
from craft_ds.testing.datasets import edit_metadata
from craft_ds.testing.policies import make_test_policy_dir

NORMALIZER = "policy_preprocessor_step_3_normalizer_processor.safetensors"


@pytest.fixture
def other(teacher, tmp_path):
    return shutil.copytree(teacher, tmp_path / "other")


@pytest.fixture
def old(built, tmp_path):
    """The cache as craft-ds 0.1 wrote it."""
    path = shutil.copytree(built, tmp_path / "old")
    metadata = json.loads((path / METADATA_FILE).read_text())
    for name in ("preprocessing", "chunk_size"):
        del metadata[name]
    for name in ("fps", "features", "task_frames"):
        del metadata["dataset"][name]
    (path / METADATA_FILE).write_text("{}")
    edit_metadata(path, **metadata)
    return path


def change_statistics(directory, factor=3.0):
    tensors = load_file(directory / NORMALIZER)
    save_file({name: tensor * factor for name, tensor in tensors.items()}, directory / NORMALIZER)


def check(cache, directory):
    config = load_policy_config(directory)
    cache.check_policy(config)
    cache.check_preprocessor(load_processors(config, directory)[0], directory)


def refusal(cache, directory):
    with pytest.raises(UserError) as caught:
        check(cache, directory)
    line = str(caught.value)
    assert "\n" not in line
    assert str(cache.path) in line
    return line


def test_statistics_of_another_policy_are_named(built, teacher, other):
    cache = AnchorCache.open(built)
    check(cache, teacher)
    check(cache, other)
    change_statistics(other)
    line = refusal(cache, other)
    assert "min of action[0] (x0) -1 in the cache, -3 in the policy" in line
    assert "train with the teacher's processors" in line


def test_names_of_dimensions_may_be_in_a_dictionary(options, teacher, other, tmp_path):
    data = make_dataset(tmp_path / "data", [["a"] * 3] * 2)
    build_anchor_cache(options(tmp_path / "cache", dataset_root=str(data), num_samples=4))
    cache = AnchorCache.open(tmp_path / "cache")
    assert cache.metadata["dataset"]["fps"] == 10
    vector = {"shape": [4], "names": {"motors": ["shoulder", "elbow", "wrist", "gripper"]}}
    assert cache.metadata["dataset"]["features"] == {"observation.state": vector, "action": vector}
    tensors = load_file(other / NORMALIZER)
    tensors["observation.state.max"][3] += 1
    save_file(tensors, other / NORMALIZER)
    assert "max of observation.state[3] (gripper) 0.5 in the cache, 1.5" in refusal(cache, other)


def test_a_policy_with_other_chunks(built, teacher):
    cache = AnchorCache.open(built)
    config = load_policy_config(teacher)
    config.n_action_steps = 3  # acts at inference alone
    cache.check_policy(config)
    config.chunk_size = 16
    with pytest.raises(UserError, match="chunk_size 8 in the cache, 16 in the policy"):
        cache.check_policy(config)


def test_an_old_cache_fits_the_policy_with_its_files(old, teacher, other):
    cache = AnchorCache.open(old)
    check(cache, teacher)
    # The files have other hashes, but the teacher is still there to be compared with.
    edit_processor(other, lambda steps: steps["device_processor"].update(device="cuda"))
    check(cache, other)
    change_statistics(other)
    assert "min of action[0] -1 in the cache, -3 in the policy" in refusal(cache, other)


def test_an_old_cache_of_a_teacher_that_is_gone(old, teacher, other):
    metadata = json.loads((old / METADATA_FILE).read_text())
    edit_metadata(old, teacher=metadata["teacher"] | {"path": "gone"})
    cache = AnchorCache.open(old)
    # A tokenizer's folder is not part of the hash.
    edit_processor(other, lambda steps: steps["tokenizer_processor"].update(tokenizer_name="elsewhere"))
    check(cache, other)
    changed = load_processors(load_policy_config(other), other)[0]
    for step in changed.steps:
        if isinstance(step, NormalizerProcessorStep):
            step.load_state_dict({name: 3 * tensor for name, tensor in step.state_dict().items()})
    with pytest.raises(UserError, match=r"min of action\[0\] -1 in the cache, -3 in the policy"):
        cache.check_preprocessor(changed, other)  # statistics in effect that are not those of the folder
    change_statistics(other)
    line = refusal(cache, other)
    assert f"holds no statistics, only hashes, and neither the policy's processors in {other}" in line
    assert "teacher gone" in line
    assert "build it again" in line


def test_chunks_of_an_old_cache(old, teacher):
    config = load_policy_config(teacher)
    config.chunk_size = 16
    with pytest.raises(UserError, match="chunk_size 8 in the cache, 16 in the policy"):
        AnchorCache.open(old).check_policy(config)


def test_an_old_cache_without_any_hash(old, teacher):
    edit_metadata(old, processors=None)
    assert "holds no statistics" in refusal(AnchorCache.open(old), teacher)


@pytest.mark.usefixtures("no_policy")
def test_an_old_cache_is_the_same_build(old, options):
    before = (old / METADATA_FILE).read_bytes()
    assert not build_anchor_cache(options(old))
    with pytest.raises(UserError, match=r"request\.seed differs"):
        build_anchor_cache(options(old, seed=3))
    assert (old / METADATA_FILE).read_bytes() == before


@pytest.mark.usefixtures("no_policy")
def test_a_teacher_without_statistics_builds_nothing(options, other, tmp_path):
    save_file({}, other / NORMALIZER)
    with pytest.raises(UserError, match=r"no statistics \(min, max\) of observation\.state"):
        build_anchor_cache(options(tmp_path / "cache", policy_path=str(other)))


@pytest.mark.usefixtures("no_policy")
def test_anchors_are_for_pi0_fast(options, tmp_path, monkeypatch):
    from lerobot.policies.act.configuration_act import ACTConfig

    from craft_ds.anchors import build

    monkeypatch.setattr(build, "load_policy_config", lambda _: ACTConfig(device="cpu"))
    with pytest.raises(
        UserError, match="CRaFT is for policies of type pi0_fast, and this one is of type act"
    ):
        build_anchor_cache(options(tmp_path / "cache"))


def test_another_seed_of_the_weights_is_no_difference(built, tmp_path):
    """What is trained is another policy with the same processors, in general."""
    check(AnchorCache.open(built), make_test_policy_dir(tmp_path / "policy", seed=5, cameras=2))

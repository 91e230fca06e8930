"""Anchors that are not what the trained policy would make, and old tasks that they do not cover."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import craft_ds.training.build
from craft_ds.anchors.cache import METADATA_FILE
from craft_ds.testing.datasets import edit_metadata, make_test_dataset

pytestmark = pytest.mark.slow

NORMALIZER = "policy_preprocessor_step_3_normalizer_processor.safetensors"


@pytest.fixture
def no_model(monkeypatch):
    def build(*_):
        raise AssertionError("the model was built first")

    monkeypatch.setattr(craft_ds.training.build, "build_fp32_policy", build)


@pytest.fixture
def policy(inputs, tmp_path):
    """A copy of the teacher, to be changed."""
    return shutil.copytree(inputs.policy, tmp_path / "policy")


@pytest.fixture(scope="module")
def single_episodes(inputs, tmp_path_factory):
    """Anchors of two tasks with one episode each: none can be held out."""
    root = tmp_path_factory.mktemp("single")
    make_test_dataset(root / "data", tasks=2, episodes_per_task=1)
    return inputs.build_anchors(
        root / "anchors", dataset_root=str(root / "data"), num_samples=12, heldout_fraction=0.2
    )


@pytest.mark.usefixtures("no_model")
class TestRefused:
    @pytest.mark.parametrize("key", ["observation.state", "action"])
    def test_other_statistics(self, refuses, inputs, policy, tmp_path, key):
        tensors = load_file(policy / NORMALIZER)
        tensors[f"{key}.max"][1] *= 1.01
        save_file(tensors, policy / NORMALIZER)
        line = refuses(tmp_path / "run", *inputs.craft_flags(), f"--policy.path={policy}")
        assert f"anchor cache {inputs.anchors} (teacher {inputs.policy}) does not fit the policy" in line
        assert f"max of {key}[1] (x1) 2 in the cache, 2.02 in the policy" in line

    def test_another_normalisation(self, refuses, inputs, policy, tmp_path):
        file = policy / "policy_preprocessor.json"
        file.write_text(file.read_text().replace('"MIN_MAX"', '"IDENTITY"'))
        line = refuses(tmp_path / "run", *inputs.craft_flags(), f"--policy.path={policy}")
        assert "normalisation of action MIN_MAX in the cache, none in the policy" in line

    def test_other_chunks(self, refuses, inputs, tmp_path):
        flags = ["--policy.chunk_size=4", "--policy.n_action_steps=4"]
        line = refuses(tmp_path / "run", *inputs.craft_flags(), *flags)
        assert "chunk_size 8 in the cache, 4 in the policy" in line

    def test_an_old_cache_of_other_statistics(self, refuses, inputs, policy, tmp_path):
        old = shutil.copytree(inputs.anchors, tmp_path / "anchors")
        edit_metadata(old, preprocessing=None, teacher={"path": "gone"})
        save_file(
            {name: 2 * tensor for name, tensor in load_file(policy / NORMALIZER).items()}, policy / NORMALIZER
        )
        flags = [*inputs.craft_flags(), f"--craft.anchor_cache_dir={old}"]
        line = refuses(tmp_path / "run", *flags, f"--policy.path={policy}")
        assert f"anchor cache {old}" in line
        assert "holds no statistics, only hashes" in line
        assert "build it again with `craft-ds anchors`" in line

    def test_no_heldout_anchors(self, refuses, inputs, single_episodes, tmp_path):
        flags = [*inputs.craft_flags(), f"--craft.anchor_cache_dir={single_episodes}"]
        line = refuses(tmp_path / "run", *flags)
        for word in ("0 heldout anchors", "--craft.constraint_split=train", "--heldout_fraction"):
            assert word in line

    def test_a_task_without_training_anchors(self, refuses, inputs, tmp_path):
        cache = shutil.copytree(inputs.anchors, tmp_path / "anchors")
        dataset = json.loads((cache / METADATA_FILE).read_text())["dataset"]
        dataset["tasks"].append("fold the towel")
        dataset["task_frames"].append(9)
        edit_metadata(cache, dataset=dataset)
        flags = [*inputs.craft_flags(), f"--craft.anchor_cache_dir={cache}"]
        assert "no training anchors of task 'fold the towel'" in refuses(tmp_path / "run", *flags)


def test_the_constraint_on_trained_anchors(train, inputs, single_episodes, tmp_path):
    flags = [*inputs.craft_flags(), f"--craft.anchor_cache_dir={single_episodes}", "--steps=1"]
    ended = train(tmp_path / "run", *flags, "--craft.constraint_split=train")
    assert ended.status == 0, ended.errors
    assert "✓ anchors: 12 + 0 held out; 'press the red button' 6 + 0 held out (L0 " in ended.output
    assert "no held-out anchors" not in ended.output


def test_an_unmeasured_task_is_named_at_the_start(train, inputs, tmp_path):
    """The held-out episodes of one task are given to training, as in a cache with such a task."""
    cache = shutil.copytree(inputs.anchors, tmp_path / "anchors")
    dataset = json.loads((cache / METADATA_FILE).read_text())["dataset"]
    # Episodes of the two tasks alternate.
    dataset["episodes"]["heldout"] = [one for one in dataset["episodes"]["heldout"] if one % 2 == 0]
    edit_metadata(cache, dataset=dataset)
    flags = [*inputs.craft_flags(), f"--craft.anchor_cache_dir={cache}", "--steps=1"]
    ended = train(tmp_path / "run", *flags)
    assert ended.status == 0, ended.errors
    assert "warning: no held-out anchors of task 'close the drawer', which the constraint" in ended.output


def test_other_names_and_devices_are_no_difference(train, inputs, policy, tmp_path):
    """The same statistics, with another rename map, another device and statistics that are not used."""
    file = policy / "policy_preprocessor.json"
    pipeline = json.loads(file.read_text())
    settings = {step["registry_name"]: step["config"] for step in pipeline["steps"]}
    settings["rename_observations_processor"]["rename_map"] = {"observation.images.x": "observation.images.y"}
    settings["device_processor"]["device"] = "cuda"
    file.write_text(json.dumps(pipeline, sort_keys=True))
    tensors = load_file(policy / NORMALIZER)
    save_file({**tensors, "action.std": tensors["action.max"] * 9}, policy / NORMALIZER)
    ended = train(tmp_path / "run", *inputs.craft_flags(), f"--policy.path={policy}", "--steps=1")
    assert ended.status == 0, ended.errors

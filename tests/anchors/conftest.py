"""A data set, a teacher and their cache for the tests of building: made once, never changed."""

import pytest

from craft_ds.anchors import build
from craft_ds.anchors.build import BuildOptions, build_anchor_cache
from craft_ds.testing.datasets import make_test_dataset
from craft_ds.testing.policies import make_test_policy_dir


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_test_dataset(tmp_path_factory.mktemp("data") / "set", cameras=("top", "side1"), frames=12)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    return make_test_policy_dir(tmp_path_factory.mktemp("teacher") / "policy", cameras=2)


@pytest.fixture(scope="session")
def options(data, teacher):
    def make(output, **changes):
        values = {
            "dataset_repo_id": "craft-ds/test",
            "dataset_root": str(data),
            "policy_path": str(teacher),
            "output_dir": str(output),
            "num_samples": 22,
            "batch_size": 4,
            "num_workers": 0,
            "shard_size": 6,
        }
        return BuildOptions(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def built(options, tmp_path_factory):
    path = tmp_path_factory.mktemp("built") / "cache"
    assert build_anchor_cache(options(path))
    return path


@pytest.fixture
def no_policy(monkeypatch):
    """Fails where the policy's weights are loaded before bad input was found."""

    def load_trained_policy(*args, **kwargs):
        raise AssertionError("the policy was loaded first")

    monkeypatch.setattr(build, "load_trained_policy", load_trained_policy)

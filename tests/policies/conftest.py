import pytest

from craft_ds.testing.policies import make_test_policy_dir


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory):
    """A one-camera policy directory; read-only for tests (copy it to change it)."""
    return make_test_policy_dir(tmp_path_factory.mktemp("shared") / "policy")

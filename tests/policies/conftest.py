import sys

import pytest
from torch.utils.data import default_collate

from craft_ds.config.parser import parse_arguments
from craft_ds.data.policy_input import images_to_float
from craft_ds.data.task_data import load_datasets
from craft_ds.policies.loading import load_processors
from craft_ds.testing.policies import make_test_policy_dir


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory):
    """A one-camera policy directory; read-only for tests (copy it to change it)."""
    return make_test_policy_dir(tmp_path_factory.mktemp("shared") / "policy")


@pytest.fixture
def other_batches(inputs, monkeypatch):
    """Make the policy batch of some frames; the last frames of episodes have padded actions."""

    def make(config, policy_dir, frames=(0, 17, 19, 38)):
        flags = [*inputs.flags(policy_dir / "unused"), f"--policy.path={policy_dir}"]
        monkeypatch.setattr(sys, "argv", ["train_craft.py", *flags])
        run = parse_arguments(flags)
        run.validate()
        dataset, _ = load_datasets(run)
        preprocessor, _ = load_processors(config, policy_dir)
        return preprocessor(images_to_float(default_collate([dataset[frame] for frame in frames])))

    return make

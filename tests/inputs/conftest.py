"""A policy whose statistics hold the test data, and its anchors: situations start from what is right."""

import dataclasses
import shutil

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="session")
def fitting(inputs, tmp_path_factory):
    """The shared inputs with statistics of -1.1 to 1.1: data in [-1, 1] neither clip nor saturate."""
    root = tmp_path_factory.mktemp("fitting")
    policy = shutil.copytree(inputs.policy, root / "policy")
    for file in policy.glob("policy_*processor*.safetensors"):
        bounds = {"min": -1.1, "max": 1.1}
        state = load_file(file)
        save_file(
            {name: value.new_full(value.shape, bounds[name[-3:]]) for name, value in state.items()}, file
        )
    changed = dataclasses.replace(inputs, policy=policy, anchors=root / "anchors")
    changed.build_anchors(changed.anchors)
    return changed

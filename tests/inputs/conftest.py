"""A policy whose statistics hold the test data, and its anchors: situations start from what is right."""

import dataclasses
import shutil

import pytest
from safetensors.torch import load_file, save_file

from craft_ds.anchors.build import BuildOptions, build_anchor_cache


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
    build_anchor_cache(
        BuildOptions(
            dataset_repo_id="craft-ds/test",
            dataset_root=str(inputs.old),
            policy_path=str(policy),
            output_dir=str(root / "anchors"),
            num_samples=24,
            num_workers=0,
            heldout_fraction=0.34,
        )
    )
    return dataclasses.replace(inputs, policy=policy, anchors=root / "anchors")

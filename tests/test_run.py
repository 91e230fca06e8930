"""What a run does before its first step."""

import json

import torch
from safetensors.torch import load_file

from craft_ds.engines.single import SingleEngine
from craft_ds.policies.adapter import PolicyWithLoss
from craft_ds.policies.loading import load_policy_config
from craft_ds.policies.testing import make_test_policy_dir
from craft_ds.policies.weights import WeightReader
from craft_ds.run import build_fp32_policy, seed_step


def test_masters_are_fp32_whatever_the_policy_was_saved_as(tmp_path):
    make_test_policy_dir(tmp_path / "policy")
    file = tmp_path / "policy" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "bfloat16"}))
    config = load_policy_config(tmp_path / "policy")

    policy = build_fp32_policy(config, tmp_path / "policy")
    with WeightReader(tmp_path / "policy", policy) as weights:
        SingleEngine(
            PolicyWithLoss(policy),
            weights.read,
            lambda: torch.optim.SGD(policy.parameters()),
            torch.device("cpu"),
        )

    assert config.dtype == "bfloat16"  # what is saved with a checkpoint stays the teacher's
    stored = load_file(tmp_path / "policy" / "model.safetensors")
    for name, parameter in policy.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, stored[name]), name


def test_seeds_differ_by_step_and_rank_and_repeat():
    def draw(step, rank):
        seed_step(0, step, rank)
        return torch.rand(4).tolist()

    draws = [draw(step, rank) for step in range(3) for rank in range(3)]
    assert len({tuple(values) for values in draws}) == 9
    assert draw(1, 2) == draws[5]

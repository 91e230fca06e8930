"""Preparation of a run before its first step."""

import json
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import nn

from craft_ds.config.configs import EngineConfig
from craft_ds.engines.single import SingleEngine
from craft_ds.policies.loading import load_policy_config
from craft_ds.policies.token_loss import PolicyWithLoss
from craft_ds.policies.weights import WeightReader
from craft_ds.testing.policies import make_test_policy_dir
from craft_ds.training.build import _wrapping_warning, build_fp32_policy
from craft_ds.training.run import seed_step


def test_master_weights_are_fp32_for_a_bf16_policy(tmp_path):
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

    assert config.dtype == "bfloat16"  # checkpoints keep the policy's own dtype
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


class OneBlock(nn.Module):
    """One layer, which cannot be split, with almost all parameters."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(512, 2048)

    def forward(self, x):
        return self.layer(x)


def test_a_large_fsdp_unit_is_warned_of():
    config = SimpleNamespace(engine=EngineConfig(name="fsdp", dtype="bfloat16"))
    warning = _wrapping_warning(config, OneBlock())
    assert "100% of the parameters are gathered at once" in warning
    assert "2.0 MiB" in warning  # (512 + 1) * 2048 parameters of 2 bytes
    assert _wrapping_warning(SimpleNamespace(engine=EngineConfig(name="zero")), OneBlock()) is None

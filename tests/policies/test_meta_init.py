"""Policies without weights: nothing takes memory, nothing that is not stored with the weights is lost."""

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from torch import nn

from craft_ds.policies import meta_init
from craft_ds.policies.loading import load_policy, load_policy_config
from craft_ds.policies.meta_init import build_on_meta, materialize_
from craft_ds.policies.weights import tied_names, unique_tensors
from craft_ds.testing.policies import make_test_policy_dir


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory):
    return make_test_policy_dir(tmp_path_factory.mktemp("meta_init") / "policy")


def test_parameters_are_on_meta_and_buffers_have_values(policy_dir):
    config = load_policy_config(policy_dir)
    policy = build_on_meta(config)
    complete = type(policy)(config)
    assert all(parameter.is_meta for parameter in policy.parameters())
    assert {name: p.shape for name, p in policy.named_parameters()} == {
        name: p.shape for name, p in complete.named_parameters()
    }
    found, expected = dict(policy.named_buffers()), dict(complete.named_buffers())
    assert found.keys() == expected.keys()
    assert any("inv_freq" in name for name in found)
    for name, buffer in expected.items():
        assert torch.equal(found[name], buffer), name


def test_the_configuration_is_not_changed(policy_dir):
    config = load_policy_config(policy_dir)
    before = repr(config)
    build_on_meta(config)
    assert repr(config) == before
    assert load_policy(config, policy_dir).config.device == "cpu"


class Tied(nn.Module):
    """Ties its parts in the constructor, and has a persistent and a plain buffer."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.to(config.device)


@pytest.fixture
def tied(monkeypatch, policy_dir):
    monkeypatch.setattr(meta_init, "get_policy_class", lambda name: Tied)
    config: PreTrainedConfig = load_policy_config(policy_dir)
    return build_on_meta(config)


def test_ties_survive_meta_init_and_materialisation(tied):
    assert tied.head.weight is tied.embedding.weight
    assert tied.head.weight.is_meta
    materialize_(tied, "cpu")
    assert tied.head.weight is tied.embedding.weight
    assert not any(parameter.is_meta for parameter in tied.parameters())
    assert not tied.frozen.requires_grad
    assert tied.scale.item() == 2.0


def test_a_file_holds_a_tied_tensor_once(tied):
    names = set(unique_tensors(tied))
    assert {"embedding.weight", "norm.running_mean", "frozen"} <= names
    assert "head.weight" not in names
    assert "scale" not in names
    assert tied_names(tied) == {"head.weight": "embedding.weight"}

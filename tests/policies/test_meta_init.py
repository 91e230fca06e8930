"""Policies without weights: nothing takes memory, nothing that is not stored with the weights is lost."""

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from torch import nn

from craft_ds.policies import meta_init
from craft_ds.policies.loading import load_policy, load_policy_config
from craft_ds.policies.meta_init import build_on_meta, materialize_
from craft_ds.policies.weights import tied_names, unique_tensors
from craft_ds.testing.policies import make_test_policy_dir
from craft_ds.testing.small_policies import make_small_policy_dir, small_sizes


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


INITIAL = {"act": {}, "diffusion": {"use_group_norm": False}, "pi0": {}, "pi05": {}, "smolvla": {}}
DOWNLOADS = {
    "act": {"pretrained_backbone_weights": "ResNet18_Weights.IMAGENET1K_V1"},
    "diffusion": {"pretrained_backbone_weights": "ResNet18_Weights.IMAGENET1K_V1"},
    "smolvla": {"load_vlm_weights": True},
}


@pytest.mark.parametrize("name", INITIAL)
def test_other_policies_have_their_buffers_and_nothing_else(name, tmp_path):
    with small_sizes():
        config = load_policy_config(make_small_policy_dir(tmp_path, name, **INITIAL[name]))
        complete = get_policy_class(name)(config)
        for field, value in DOWNLOADS.get(name, {}).items():
            setattr(config, field, value)  # as hub policies have it: nothing is fetched for values read later
        policy = build_on_meta(config)
    assert all(parameter.is_meta for parameter in policy.parameters())
    assert {n: (p.shape, p.requires_grad) for n, p in policy.named_parameters()} == {
        n: (p.shape, p.requires_grad) for n, p in complete.named_parameters()
    }
    found, expected = dict(policy.named_buffers()), dict(complete.named_buffers())
    assert found.keys() == expected.keys()
    statistics = ("running_mean", "running_var", "num_batches_tracked")  # read from the file
    for key, buffer in expected.items():
        assert not found[key].is_meta, key
        if not key.endswith(statistics):
            assert torch.equal(found[key], buffer), key
    for field, value in DOWNLOADS.get(name, {}).items():
        assert getattr(policy.config, field) == value

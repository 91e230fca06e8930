"""Activation checkpointing changes memory, not numbers. Sharded engines: `tests/distributed`."""

import pytest
import torch
from torch import nn

from craft_ds.engines.activation_checkpointing import checkpoint_activations
from craft_ds.errors import UserError
from craft_ds.memory_planner.tensor_memory import MemoryCounter
from craft_ds.policies.loading import load_policy, load_policy_config
from craft_ds.policies.token_loss import token_loss
from craft_ds.testing.policies import make_test_policy_dir, random_batch


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory):
    return make_test_policy_dir(tmp_path_factory.mktemp("policy") / "policy")


def run(policy_dir, *, recompute: bool, training: bool = True):
    """Loss, gradients, how often a layer ran, and the peak memory of a pass."""
    config = load_policy_config(policy_dir)
    policy = load_policy(config, policy_dir).train(training)
    if recompute:
        checkpoint_activations(policy)
    calls = []
    layer = policy.model.paligemma_with_expert.paligemma.model.language_model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with MemoryCounter() as counter:
        loss = token_loss(policy, random_batch(config, 8, seed=0)).total
        loss.backward()
    gradients = {name: p.grad for name, p in policy.named_parameters()}
    return loss.detach(), gradients, len(calls), counter.peak


@pytest.fixture(scope="module")
def kept(policy_dir):
    return run(policy_dir, recompute=False)


@pytest.fixture(scope="module")
def recomputed(policy_dir):
    return run(policy_dir, recompute=True)


def test_loss_and_gradients_are_bitwise_the_same(kept, recomputed):
    assert recomputed[0].equal(kept[0])
    assert recomputed[1].keys() == kept[1].keys()
    for name, gradient in kept[1].items():
        assert gradient.equal(recomputed[1][name]), name


def test_layers_run_twice_and_hold_less(kept, recomputed):
    assert (kept[2], recomputed[2]) == (1, 2)
    assert recomputed[3] < 0.8 * kept[3]


def test_without_gradients_layers_run_once(policy_dir):
    config = load_policy_config(policy_dir)
    policy = load_policy(config, policy_dir)
    checkpoint_activations(policy)
    layer = policy.model.paligemma_with_expert.paligemma.model.language_model.layers[0]
    calls = []
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        token_loss(policy, random_batch(config, 2, seed=0))
    assert len(calls) == 1


def test_names_and_weights_are_those_of_before(policy_dir):
    config = load_policy_config(policy_dir)
    policy = load_policy(config, policy_dir)
    before = policy.state_dict()
    checkpoint_activations(policy)
    after = policy.state_dict()
    assert list(after) == list(before)
    assert [name for name, _ in policy.named_parameters()] == list(before)


def test_dropout_draws_the_same_again():
    torch.manual_seed(0)
    policy = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)) for _ in range(10)))
    x = torch.ones(3, 8)

    def gradient():
        torch.manual_seed(1)
        policy.zero_grad()
        policy(x).sum().backward()
        return [p.grad.clone() for p in policy.parameters()]

    expected = gradient()
    checkpoint_activations(policy)
    assert all(torch.equal(a, b) for a, b in zip(gradient(), expected, strict=True))


def test_a_policy_without_known_layers_is_refused():
    with pytest.raises(UserError, match=r"--activation_checkpointing=full.*checkpoint_units"):
        checkpoint_activations(nn.Linear(3, 3))

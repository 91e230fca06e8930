"""Sharding units of policies."""

import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from torch import nn

from craft_ds.policies.loading import load_policy, load_policy_config
from craft_ds.policies.token_loss import token_loss
from craft_ds.policies.wrapping import (
    checkpoint_units,
    largest_unit,
    parameter_count,
    shard_units,
    wrapping_warning,
)
from craft_ds.testing.small_policies import OTHER_POLICIES, make_small_policy_dir, small_sizes


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return x + self.inner(x)


class Policy(nn.Module):
    """A policy that nobody wrote an adapter for."""

    def __init__(self, width: int = 8, layers: int = 20, classes: int = 8, tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(classes, width)
        self.positions = nn.Embedding(classes, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, classes, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def names(policy, units):
    found = {id(module): name for name, module in policy.named_modules()}
    return [found[id(unit)] for unit in units]


def assert_disjoint(policy, units):
    parameters = [id(p) for unit in units for p in unit.parameters()]
    assert len(parameters) == len(set(parameters))
    assert set(parameters) <= {id(p) for p in policy.parameters()}


@pytest.fixture(scope="module")
def tiny(policy_dir):
    return load_policy(load_policy_config(policy_dir), policy_dir)


def test_pi0_fast_units_are_layers_embedding_and_head(tiny):
    prefix = "model.paligemma_with_expert.paligemma."
    layers = [
        f"{prefix}model.vision_tower.vision_model.encoder.layers.0",
        f"{prefix}model.language_model.layers.0",
        f"{prefix}model.language_model.layers.1",
    ]
    both = [f"{prefix}model.language_model.embed_tokens", f"{prefix}lm_head"]
    units = shard_units(tiny)
    assert names(tiny, units) == layers + both
    assert_disjoint(tiny, units)
    assert names(tiny, checkpoint_units(tiny)) == layers
    assert wrapping_warning(tiny) is None


def test_tied_embedding_and_head_are_left_to_the_root(policy_dir):
    policy = load_policy(load_policy_config(policy_dir), policy_dir)
    paligemma = policy.model.paligemma_with_expert.paligemma
    paligemma.lm_head.weight = paligemma.model.language_model.embed_tokens.weight
    units = shard_units(policy)
    assert paligemma.lm_head not in units
    assert paligemma.model.language_model.embed_tokens not in units
    assert len(units) == 3


def test_without_an_adapter_units_are_the_members_of_lists():
    policy = Policy()
    units = shard_units(policy)
    assert names(policy, units)[1:-1] == [f"layers.{i}" for i in range(20)]
    assert_disjoint(policy, units)
    assert names(policy, checkpoint_units(policy)) == [f"layers.{i}" for i in range(20)]


def test_a_module_whose_weight_is_read_is_no_unit():
    policy = Policy()
    units = shard_units(policy)
    assert policy.embed in units
    assert policy.head in units
    assert policy.positions not in units


def test_tied_modules_are_no_units():
    policy = Policy(tied=True)
    units = shard_units(policy)
    assert policy.embed not in units
    assert policy.head not in units
    assert len(units) == 20


def test_a_large_block_is_split():
    policy = nn.Sequential(nn.Sequential(Block(16), Block(16)), *(Block(4) for _ in range(4)))
    assert names(policy, shard_units(policy)) == ["0.0.inner", "0.1.inner", "1", "2", "3", "4"]


def test_attention_that_reads_its_parts_weights_is_never_split():
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2)
    policy = nn.Sequential(layers, Block(4))
    assert names(policy, shard_units(policy)) == ["0.layers.0", "0.layers.1", "1"]


def test_the_units_of_act_hold_most_of_it():
    visual, vector = PolicyFeature(FeatureType.VISUAL, (3, 64, 64)), PolicyFeature(FeatureType.STATE, (4,))
    config = ACTConfig(
        input_features={"observation.images.top": visual, "observation.state": vector},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (4,))},
        pretrained_backbone_weights=None,
        device="cpu",
    )
    with torch.device("meta"):
        policy = ACTPolicy(config)
    units = shard_units(policy)
    assert_disjoint(policy, units)
    # Its positions are read by weight, the backbone by a getter that calls the members of a dictionary.
    assert "model.decoder_pos_embed" not in names(policy, units)
    assert {"model.encoder.layers.0", "model.backbone.layer3"} <= set(names(policy, units))
    assert largest_unit(policy, units).share < 1 / 8
    assert sum(map(parameter_count, units)) > 0.9 * parameter_count(policy)


def test_the_largest_unit_may_be_what_is_left_over():
    policy = Policy(width=8, layers=2, classes=8)
    total = parameter_count(policy)
    name, share, gathered = largest_unit(policy, list(policy.layers), torch.bfloat16)
    assert name == ""
    assert gathered == 2 * (total - 2 * 72)
    assert share == pytest.approx((total - 2 * 72) / total)
    assert largest_unit(policy, [policy.layers[0], policy.embed, policy.head, policy.positions]).name in (
        "layers.0",
        "",
    )


def test_a_policy_that_is_mostly_one_unit_is_warned_of():
    policy = Policy(width=8, layers=2, classes=4096, tied=True)
    warning = wrapping_warning(policy, torch.bfloat16)
    share = 2 * 4096 * 8 / parameter_count(policy)
    assert warning.startswith(
        f"{share:.0%} of the parameters are gathered at once (those outside of all units)"
    )
    assert "holds 0.1 MiB" in warning
    assert "shard_units" in warning
    assert "\n" not in warning
    assert wrapping_warning(Policy()) is None


@pytest.mark.parametrize("name", OTHER_POLICIES)
def test_units_of_other_policies_are_called_themselves(name, tmp_path, other_batches):
    """A unit is gathered when it is called: no part of it may run while the unit does not."""
    with small_sizes():
        policy = load_policy(load_policy_config(make_small_policy_dir(tmp_path, name)), tmp_path)
        policy.train()
        units = shard_units(policy)
        assert_disjoint(policy, units)
        running, called, outside = [], set(), []
        for unit, label in zip(units, names(policy, units), strict=True):
            unit.register_forward_pre_hook(lambda *_, label=label: running.append(label))
            unit.register_forward_hook(lambda *_, label=label: called.add(running.pop()))
            for part in unit.modules():
                if part is not unit and any(True for _ in part.parameters(recurse=False)):
                    part.register_forward_pre_hook(
                        lambda *_, label=label: None if label in running else outside.append(label)
                    )
        loss = token_loss(policy, other_batches(policy.config, tmp_path))
        assert outside == []
        # A recomputation in the backward pass may call parts alone: the unit is gathered for that pass then.
        loss.total.backward()
    used = {
        label
        for unit, label in zip(units, names(policy, units), strict=True)
        if any(parameter.grad is not None for parameter in unit.parameters())
    }
    assert used <= called
    assert sum(map(parameter_count, units)) > 0.6 * parameter_count(policy)
    assert wrapping_warning(policy) is None


def test_the_heads_of_pi0_are_units_that_are_never_gathered(tmp_path):
    with small_sizes():
        policy = load_policy(load_policy_config(make_small_policy_dir(tmp_path, "pi0")), tmp_path)
    model = policy.model.paligemma_with_expert
    units = shard_units(policy)
    assert model.gemma_expert.lm_head in units
    # No layer of the two decoders is called, so none is a unit; the layers of the vision tower are.
    assert not {*model.paligemma.model.language_model.layers, *model.gemma_expert.model.layers} & {*units}
    assert {*model.paligemma.model.vision_tower.vision_model.encoder.layers} <= {*units}

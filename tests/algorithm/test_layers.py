"""Layers by name, and surgery by layer against vectors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craft_ds.algorithm.gradient_surgery import merge, merge_layers
from craft_ds.algorithm.gram_triple import GramTriple
from craft_ds.algorithm.layers import layer_of, split_by_layer
from craft_ds.config.craft_config import CraftConfig

DECODER = "model.paligemma_with_expert.paligemma.model.language_model"


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        (f"{DECODER}.layers.3.self_attn.q_proj.weight", f"{DECODER}.layers.3"),
        (f"{DECODER}.layers.13.input_layernorm.weight", f"{DECODER}.layers.13"),
        (f"{DECODER}.layers.3.mlp.up_proj.lora_B.default.weight", f"{DECODER}.layers.3"),
        ("tower.encoder.layers.0.mlp.experts.7.weight", "tower.encoder.layers.0"),
        (f"{DECODER}.embed_tokens.weight", f"{DECODER}.embed_tokens"),
        (f"{DECODER}.norm.weight", f"{DECODER}.norm"),
        ("model.lm_head.modules_to_save.default.weight", "model.lm_head"),
        ("model.projector.linear.lora_A.default.weight", "model.projector.linear"),
        ("model.projector.linear.lora_magnitude_vector.default.weight", "model.projector.linear"),
        ("model.projector.linear.base_layer.weight", "model.projector.linear"),
        ("weight", ""),
    ],
)
def test_layer_of(name, layer):
    assert layer_of(name) == layer


def test_parts_are_grouped_in_the_order_of_all_names():
    """A rank without a part of a layer has an empty group, so that the ranks' groups correspond."""
    names = ["embed.weight", "layers.0.a", "layers.0.b", "layers.1.a", "head.weight"]
    parts = {name: torch.tensor([float(number)]) for number, name in enumerate(names)}
    mine = [(name, parts[name]) for name in ("layers.0.b", "head.weight", "layers.0.a")]
    groups = split_by_layer(names, mine)
    assert [[part.item() for part in group] for group in groups] == [[], [2.0, 1.0], [], [4.0]]
    parts["head.weight"].zero_()
    assert groups[3][0].item() == 0.0  # views


def craft(**changes) -> CraftConfig:
    return CraftConfig(**{"conflict_threshold": 0.0, **changes})


def triple(g_t, g_r) -> GramTriple:
    return GramTriple(float(g_t @ g_t), float(g_t @ g_r), float(g_r @ g_r))


def test_only_the_layer_in_conflict_is_projected():
    """Layer 1: g_t = (2, 0), g_r = (0, 1). Layer 2: g_t = (-1, 1), g_r = (2, 0): (0, 1) is left."""
    layers = [GramTriple(4.0, 0.0, 1.0), GramTriple(2.0, -2.0, 4.0)]
    merged, parts = merge_layers(layers, 0.5, craft())
    assert [(part.a, part.b) for part in parts] == [(1.0, 0.5), (1.0, 1.0)]
    assert [part.conflict for part in parts] == [False, True]
    # (2, 0.5) and (1, 1); together cos = -2 / sqrt(6 · 5)
    assert merged.norm == pytest.approx(math.sqrt(4.25 + 2.0))
    assert merged.cosine == pytest.approx(-2.0 / math.sqrt(30.0))
    assert merged.conflict
    assert merged.conflict_share == 0.5
    assert merged.removed == pytest.approx(1.0 / 6.0)  # 1 of ‖g_t‖² = 4 + 2
    assert merged.a == 1.0
    assert merged.b == pytest.approx((1.0 * 0.5 + 4.0 * 1.0) / 5.0)


vectors = st.lists(st.floats(-3, 3), min_size=12, max_size=12).map(np.array)


@settings(max_examples=60, deadline=None)
@given(
    vectors,
    vectors,
    st.floats(0, 5),
    st.sampled_from(["guide", "pcgrad", "agem", "cagrad", "mgda", "upgrad"]),
)
def test_the_norm_is_that_of_the_layers_together(task, retention, multiplier, rule):
    config = craft(merging=rule)
    pairs = list(zip(np.split(task, 3), np.split(retention, 3), strict=True))
    merged, parts = merge_layers([triple(*pair) for pair in pairs], multiplier, config)
    vector = np.concatenate([part.a * t + part.b * r for part, (t, r) in zip(parts, pairs, strict=True)])
    assert merged.norm == pytest.approx(np.linalg.norm(vector), rel=1e-6, abs=1e-6)
    complete = merge(triple(task, retention), multiplier, config)
    assert merged.cosine == pytest.approx(complete.cosine, abs=1e-9)
    assert 0.0 <= merged.removed <= 1.0 + 1e-9
    assert merge_layers([triple(task, retention)], multiplier, config)[0] == complete


def test_layers_without_gradients_change_nothing():
    layer = GramTriple(2.0, -2.0, 4.0)
    merged, _ = merge_layers([layer, GramTriple(0.0, 0.0, 0.0)], 0.5, craft())
    alone = merge(layer, 0.5, craft())
    assert merged == alone._replace(conflict_share=0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_layer_that_is_not_finite_raises_nothing(bad):
    merge_layers([GramTriple(1.0, 0.0, 1.0), GramTriple(bad, bad, 1.0)], 1.0, craft())

"""Adapters in a policy: trainable parameters, names, initial values, and refused flags."""

import json
import math
import re
import shutil
import time

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from craft_ds.config.configs import LoraConfig
from craft_ds.errors import UserError
from craft_ds.lora import targets as targets_module
from craft_ds.lora.adapters import add_adapters, plan_adapters, plan_stored_adapters
from craft_ds.lora.peft_config import make_peft_config
from craft_ds.lora.targets import resolve_pattern
from craft_ds.lora.weights import AdaptedWeights, load_trained_policy
from craft_ds.policies.loading import build_policy, load_policy, load_policy_config
from craft_ds.policies.tiny_pi0_fast.policy import TinyPI0FastPolicy
from craft_ds.policies.token_loss import token_loss
from craft_ds.policies.weights import weights_sha256
from craft_ds.testing.adapters import make_test_adapters
from craft_ds.testing.policies import random_batch

RANK = 4


def build(policy_dir, **lora):
    config = load_policy_config(policy_dir)
    config.pretrained_path = policy_dir
    plan = plan_adapters(LoraConfig(enabled=True, rank=RANK, **lora), config, policy_dir)
    return build_policy(config, policy_dir), plan


def values_of(policy_dir, seed=0, **lora):
    """Return the initial value of every trainable parameter, by name."""
    policy, plan = build(policy_dir, **lora)
    with AdaptedWeights(policy, plan, add_adapters(policy, plan.config, "base"), seed) as weights:
        return {
            name: weights.read(name, 0, p.numel()).view(p.shape)
            for name, p in policy.named_parameters()
            if p.requires_grad
        }


@pytest.mark.parametrize(
    ("preset", "decoder", "encoder"),
    [("attention", 4, 0), ("attention_mlp", 7, 0), ("attention_mlp_vision", 7, 6)],
)
def test_a_preset_adapts_the_layers_it_names(policy_dir, preset, decoder, encoder):
    policy, plan = build(policy_dir, preset=preset)
    adapters = add_adapters(policy, plan.config)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert set(trained) == adapters.keys.keys()
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    # Two decoder layers and one encoder layer; A and B each.
    assert len([name for name in trained if ".language_model." in name]) == 2 * 2 * decoder
    assert len([name for name in trained if ".vision_tower." in name]) == 2 * encoder
    assert len(trained) == 2 * (2 * decoder + encoder)


def test_the_real_pi0_fast_has_the_layers():
    """The full-size model on the meta device: 18 layers of language, 27 of vision."""
    from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig

    from craft_ds.memory_planner.shapes import meta_policy_without_tokenizers

    counts = {}
    for preset in ("attention", "attention_mlp", "attention_mlp_vision"):
        config = PI0FastConfig(device="cpu", dtype="float32")
        policy = meta_policy_without_tokenizers(config)
        add_adapters(policy, make_peft_config(LoraConfig(enabled=True, preset=preset), config, "base"))
        counts[preset] = len([name for name, p in policy.named_parameters() if p.requires_grad])
    assert counts == {
        "attention": 2 * 18 * 4,
        "attention_mlp": 2 * 18 * 7,
        "attention_mlp_vision": 2 * (18 * 7 + 27 * 6),
    }


@pytest.mark.parametrize(
    "lora", [{}, {"use_dora": True}, {"preset": "attention", "modules_to_save": ["lm_head"]}]
)
def test_names_on_disk_are_pefts(policy_dir, lora):
    """Against what a PeftModel of the same configuration stores."""
    policy, plan = build(policy_dir, **lora)
    keys = add_adapters(policy, plan.config).keys
    stock = load_policy(load_policy_config(policy_dir), policy_dir)
    wrapped = peft.get_peft_model(stock, plan.config)
    theirs = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    assert set(keys.values()) == theirs.keys()
    shapes = {name: p.shape for name, p in policy.named_parameters()}
    for name, key in keys.items():
        assert shapes[name] == theirs[key].shape, key


def test_new_adapters_start_as_pefts(policy_dir):
    found = values_of(policy_dir)
    for name, values in found.items():
        if ".lora_B." in name:
            assert not values.any()
        else:
            bound = 1 / math.sqrt(values.shape[1])
            assert values.abs().max() <= bound
            # Uniform: the standard deviation is bound / √3.
            assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.25)
    drawn = [values for name, values in found.items() if ".lora_A." in name]
    assert len({values.flatten()[0].item() for values in drawn}) == len(drawn)


def test_the_seed_decides(policy_dir):
    one, same, other = (values_of(policy_dir, seed=seed) for seed in (1, 1, 2))
    for name, values in one.items():
        assert torch.equal(values, same[name])
        assert torch.equal(values, other[name]) == (".lora_B." in name)


def test_gaussian_initial_values(policy_dir):
    drawn = torch.cat(
        [v.flatten() for n, v in values_of(policy_dir, init="gaussian").items() if ".lora_A." in n]
    )
    assert drawn.std() == pytest.approx(1 / RANK, rel=0.1)
    assert drawn.abs().max() > 2.5 / RANK  # a uniform distribution ends at √3 standard deviations


def test_doras_magnitudes_start_as_the_norms_of_the_rows(policy_dir):
    base = load_file(policy_dir / "model.safetensors")
    found = {n: v for n, v in values_of(policy_dir, use_dora=True).items() if "magnitude" in n}
    assert len(found) == 14
    for name, values in found.items():
        weight = base[name.split(".lora_magnitude_vector")[0] + ".weight"]
        torch.testing.assert_close(values, weight.norm(dim=1))


def test_ranges_of_a_tensor_are_ranges_of_the_full_tensor(policy_dir):
    policy, plan = build(policy_dir, use_dora=True, modules_to_save=["lm_head"])
    with AdaptedWeights(policy, plan, add_adapters(policy, plan.config, "base"), 0) as weights:
        for name, parameter in policy.named_parameters():
            count = parameter.numel()
            cut = count // 3
            complete = weights.read(name, 0, count)
            parts = [weights.read(name, 0, cut), weights.read(name, cut, count)]
            torch.testing.assert_close(torch.cat(parts), complete)


def test_new_adapters_change_nothing(policy_dir, tmp_path):
    """B is zero, and DoRA's magnitudes are the weights' own norms."""
    base, batch = load_policy(load_policy_config(policy_dir), policy_dir), None
    for use_dora in (False, True):
        policy, plan = build(policy_dir, use_dora=use_dora)
        with AdaptedWeights(policy, plan, add_adapters(policy, plan.config, "base"), 0) as weights:
            from craft_ds.policies.loading import fill_policy_

            fill_policy_(policy, weights.read, "cpu")
        batch = batch or random_batch(base.config, 4, seed=1)
        expected, found = token_loss(base, batch), token_loss(policy, batch)
        torch.testing.assert_close(found.total, expected.total, rtol=1e-5, atol=0)


def test_modules_that_train_fully_are_not_doubled(policy_dir):
    policy, plan = build(policy_dir, preset="attention", modules_to_save=["lm_head", "multi_modal_projector"])
    base = sum(p.numel() for p in policy.parameters())
    adapters = add_adapters(policy, plan.config)
    trained = {name: p.numel() for name, p in policy.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {
        "model.paligemma_with_expert.paligemma.lm_head.weight",
        "model.paligemma_with_expert.paligemma.model.multi_modal_projector.linear.weight",
        "model.paligemma_with_expert.paligemma.model.multi_modal_projector.linear.bias",
    }
    low_rank = sum(count for name, count in trained.items() if "lora_" in name)
    assert sum(p.numel() for p in policy.parameters()) == base + low_rank
    assert adapters.keys.keys() == trained.keys()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is a .*Embedding, and only linear layers"),
        ({"target_modules": ["nonsense"]}, "--lora.target_modules=.*nonsense"),
        ({"modules_to_save": ["nonsense"]}, "--lora.modules_to_save=nonsense: the policy has no such module"),
        ({"modules_to_save": ["q_proj"]}, "--lora.modules_to_save=q_proj has adapters too"),
        ({"modules_to_save": ["self_attn"]}, "--lora.modules_to_save=self_attn has adapters too"),
    ],
)
def test_unusable_targets_are_refused(policy_dir, lora, message):
    policy, plan = build(policy_dir, **lora)
    with pytest.raises(UserError, match=message):
        add_adapters(policy, plan.config)


@pytest.mark.parametrize(
    "lora", [{}, {"use_dora": True}, {"use_rslora": True, "modules_to_save": ["lm_head"]}]
)
def test_stored_adapters_load_as_peft_loads_them(policy_dir, tmp_path, lora):
    directory = make_test_adapters(policy_dir, tmp_path / "a", LoraConfig(enabled=True, rank=RANK, **lora))
    ours = load_trained_policy(load_policy_config(directory), directory)
    base = load_policy(load_policy_config(policy_dir), policy_dir)
    batch = random_batch(base.config, 4, seed=1)
    before = token_loss(base, batch).total
    stock = peft.PeftModel.from_pretrained(base, str(directory)).eval().get_base_model()
    assert isinstance(stock, TinyPI0FastPolicy)
    expected = token_loss(stock, batch).total
    assert abs(expected - before) > 2e-4 * before
    torch.testing.assert_close(token_loss(ours, batch).total, expected, rtol=1e-6, atol=0)


def test_the_hub_id_or_the_absolute_path_of_the_base_is_stored(policy_dir, monkeypatch):
    config = load_policy_config(policy_dir)
    monkeypatch.chdir(policy_dir.parent)
    config.pretrained_path = policy_dir.name
    plan = plan_adapters(LoraConfig(enabled=True), config, policy_dir)
    assert plan.config.base_model_name_or_path == str(policy_dir)
    config.pretrained_path = "someone/policy"
    plan = plan_adapters(LoraConfig(enabled=True), config, policy_dir)
    assert plan.config.base_model_name_or_path == "someone/policy"


@pytest.fixture
def adapters(policy_dir, tmp_path):
    """Adapters on a base of their own, that a test may break."""
    base = tmp_path / "base"
    shutil.copytree(policy_dir, base)
    return make_test_adapters(base, tmp_path / "adapters", LoraConfig(enabled=True, rank=RANK))


def test_a_moved_base_policy(adapters, tmp_path):
    base = tmp_path / "base"
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"base policy of the adapters in {adapters} is missing"):
        plan_stored_adapters(adapters)
    plan = plan_stored_adapters(adapters, str(moved))
    assert plan.base == moved
    assert plan.config.base_model_name_or_path == str(moved)
    load_trained_policy(load_policy_config(adapters), adapters, base_path=str(moved))


def test_another_base_policy_is_refused(adapters, tmp_path):
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file)
    with pytest.raises(UserError, match="were trained on another base policy than"):
        load_trained_policy(load_policy_config(adapters), adapters)


def test_adapters_that_name_no_base(adapters, tmp_path):
    path = adapters / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match=r"names no base policy .* set --lora\.base_path to"):
        plan_stored_adapters(adapters)
    assert plan_stored_adapters(adapters, str(tmp_path / "base")).base == tmp_path / "base"


def test_a_base_of_adapters_is_refused(adapters):
    with pytest.raises(UserError, match="holds adapters itself: merge those first"):
        plan_stored_adapters(adapters, str(adapters))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def _without_one(path):
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]), path)


def _one_more(path):
    save_file({**load_file(path), "surplus": torch.ones(3)}, path)


def _another_shape(path):
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: torch.ones(2, 2)}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing or damaged"),
        (_truncate, "is missing or damaged"),
        (_without_one, "lacks 1 tensors of the adapters"),
        (_one_more, "has unknown 1 tensors"),
        (_another_shape, "has another shape for 1 tensors"),
    ],
)
def test_damaged_adapters_are_refused(adapters, damage, message):
    damage(adapters / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        load_trained_policy(load_policy_config(adapters), adapters)


def test_the_fingerprint_sees_every_byte(policy_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(policy_dir, copy)
    assert weights_sha256(copy) == weights_sha256(policy_dir)
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert weights_sha256(copy) != weights_sha256(policy_dir)


def test_frozen_layers_are_the_policys_own(policy_dir):
    """Injection wraps layers; it copies none."""
    policy, plan = build(policy_dir)
    before = {id(p) for p in policy.parameters()}
    add_adapters(policy, plan.config)
    assert before <= {id(p) for p in policy.parameters()}
    assert all(isinstance(m, nn.Linear) for n, m in policy.named_modules() if n.endswith(".base_layer"))


# --- patterns ---------------------------------------------------------------------------------------------


def test_a_pattern_has_the_names_that_python_matches():
    names = [
        f"model.language_model.layers.{i}.{part}" for i in range(3) for part in ("self_attn.q_proj", "mlp")
    ]
    for pattern in (r".*\.q_proj", r".*layers\.[12]\..*", r"(.*mlp|.*\.k_proj)", "nothing"):
        expected = [name for name in names if re.fullmatch(pattern, name)]
        assert resolve_pattern(pattern, names, "target_modules") == expected
    assert resolve_pattern(["q_proj"], names, "target_modules") == ["q_proj"]
    assert resolve_pattern(None, names, "exclude_modules") is None
    assert resolve_pattern("all-linear", names, "target_modules") == "all-linear"


@pytest.mark.parametrize("pattern", [r"(a|aa)+", r"(?:a|a|a)*[^a]!", r"((\w)+\2)*z.", "(" * 3])
def test_a_pattern_that_never_ends_is_refused(monkeypatch, pattern):
    monkeypatch.setattr(targets_module, "_LONGEST_MATCH_S", 0.2)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"--lora.target_modules=") as raised:
        resolve_pattern(pattern, ["a" * 45 + "zz!"] * 100, "target_modules")
    assert time.monotonic() - started < 60
    assert "\n" not in str(raised.value)

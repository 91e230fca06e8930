"""PEFT's configuration from flags, and the check of stored adapters against it."""

import dataclasses
import json

import peft
import pytest
from lerobot.configs.default import PeftConfig
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config

from craft_ds.config.configs import LoraConfig
from craft_ds.config.train_config import from_lerobot
from craft_ds.errors import UserError
from craft_ds.lora.peft_config import check_adapters_match, make_peft_config, read_adapter_config
from craft_ds.lora.targets import describe_targets, lora_presets, preset_targets
from craft_ds.policies.tiny_pi0_fast.policy import TinyPI0FastConfig

TINY = TinyPI0FastConfig(device="cpu")


def test_every_flag_reaches_peft():
    lora = LoraConfig(
        enabled=True,
        rank=5,
        alpha=7,
        dropout=0.1,
        use_rslora=True,
        use_dora=True,
        init="gaussian",
        modules_to_save=["lm_head"],
    )
    config = make_peft_config(lora, TINY, "someone/policy")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (5, 7, 0.1)
    assert (config.use_rslora, config.use_dora, config.init_lora_weights) == (True, True, "gaussian")
    assert config.modules_to_save == ["lm_head"]
    assert config.base_model_name_or_path == "someone/policy"
    assert config.target_modules == lora_presets(TINY)["attention_mlp"]


def test_lerobots_flags_mean_the_same():
    """Against what LeRobot itself builds of them (`PreTrainedPolicy._build_peft_config`)."""
    from lerobot.policies.pi0.modeling_pi0 import PI0Policy

    flags = PeftConfig(target_modules=["q_proj", "v_proj"], r=4, full_training_modules=["lm_head"])
    for changed in ({}, {"lora_alpha": 32}, {"init_type": "gaussian"}, {"target_modules": r".*\.q_proj"}):
        given = dataclasses.replace(flags, **changed)
        policy = PI0Policy.__new__(PI0Policy)
        theirs = policy._build_peft_config(dataclasses.asdict(given))
        ours = make_peft_config(from_lerobot(given), TINY, "base")
        for field in ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save"):
            assert getattr(ours, field) == getattr(theirs, field), field
        assert ours.init_lora_weights == theirs.init_lora_weights


def test_other_policies_have_lerobots_own_targets():
    assert ".*\\.gemma_expert" in preset_targets(PI0Config(), "default")
    with pytest.raises(UserError, match=r"--lora\.preset=default is unknown for policies of type act"):
        preset_targets(ACTConfig(), "default")
    with pytest.raises(UserError, match="choose one of default, or name the layers"):
        preset_targets(PI0Config(), "attention")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (PeftConfig(method_type="IA3"), "--peft.method_type=IA3"),
        (PeftConfig(init_type="pissa"), "--peft.init_type=pissa"),
    ],
)
def test_what_lerobot_has_and_this_has_not_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        from_lerobot(flags)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraConfig(rank=4), "add --lora.enabled=true"),
        (LoraConfig(enabled=True, rank=0), "--lora.rank=0 must be at least 1"),
        (LoraConfig(enabled=True, alpha=0), "--lora.alpha=0 must be at least 1"),
        (LoraConfig(enabled=True, dropout=1.0), r"--lora.dropout=1.0 must lie in \[0, 1\)"),
        (LoraConfig(enabled=True, init="pissa"), "--lora.init=pissa: choose one of default, gaussian"),
    ],
)
def test_bad_flags(lora, message):
    with pytest.raises(UserError, match=message):
        lora.validate()


def test_presets_are_told_by_name():
    assert describe_targets(TINY, lora_presets(TINY)["attention"]) == "attention"
    assert describe_targets(TINY, {"b", "a"}) == "['a', 'b']"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 4}, "--lora.rank=4, but the adapters in .* were trained with 8"),
        ({"alpha": 4}, "--lora.alpha=4, but .* with 16"),
        ({"use_dora": True}, "--lora.use_dora=True, but .* with False"),
        ({"use_rslora": True}, "--lora.use_rslora=True, but .* with False"),
        ({"preset": "attention"}, "--lora.preset=attention, but .* with attention_mlp"),
        ({"target_modules": ["q_proj"]}, r"--lora.preset=\['q_proj'\], but .* with attention_mlp"),
        ({"modules_to_save": ["lm_head"]}, r"--lora.modules_to_save=\['lm_head'\], but .* with \[\]"),
    ],
)
def test_adapters_of_another_shape_are_refused(changed, message, tmp_path):
    stored = make_peft_config(LoraConfig(enabled=True), TINY, "base")
    asked = make_peft_config(LoraConfig(enabled=True, **changed), TINY, "base")
    with pytest.raises(UserError, match=message):
        check_adapters_match(asked, stored, TINY, tmp_path)
    check_adapters_match(asked, asked, TINY, tmp_path)


def test_a_stored_configuration_reads_back(tmp_path):
    config = make_peft_config(LoraConfig(enabled=True, modules_to_save=["lm_head"]), TINY, "base")
    config.save_pretrained(str(tmp_path))
    assert read_adapter_config(tmp_path) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing or damaged"),
        ("{", "is missing or damaged"),
        (json.dumps({"peft_type": "IA3", "base_model_name_or_path": "base"}), "holds a PeftType.IA3 adapter"),
        (
            json.dumps({"peft_type": "LORA", "bias": "all", "base_model_name_or_path": "base"}),
            "uses bias, which craft-ds does not support",
        ),
    ],
)
def test_a_configuration_that_cannot_be_used(content, message, tmp_path):
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_adapter_config(tmp_path)


def test_known_fields_are_pefts():
    from craft_ds.lora.peft_config import _KNOWN, _SHAPE

    names = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert names >= _KNOWN
    assert _SHAPE.keys() <= _KNOWN

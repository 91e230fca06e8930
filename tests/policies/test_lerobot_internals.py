"""LeRobot's private names, and temporary replacement of library functions."""

import pytest
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy, PI0FastPytorch
from lerobot.policies.pretrained import PreTrainedPolicy

from craft_ds.errors import UserError
from craft_ds.lora.targets import lora_presets
from craft_ds.policies.loading import build_policy, load_policy_config
from craft_ds.policies.replace_attribute import replace_attribute
from craft_ds.testing.policies import make_test_policy_dir


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory):
    return make_test_policy_dir(tmp_path_factory.mktemp("internals") / "policy")


@pytest.mark.parametrize(
    ("owner", "name"),
    [(PI0FastPolicy, "_preprocess_images"), (PI0FastPytorch, "_create_custom_attention_mask_fast")],
)
def test_a_missing_private_name_is_reported(policy_dir, monkeypatch, owner, name):
    monkeypatch.delattr(owner, name)
    with pytest.raises(UserError, match=rf"lacks {owner.__name__}\.{name}, .*lerobot==0\.6\.1"):
        build_policy(load_policy_config(policy_dir), policy_dir)


def test_missing_default_targets_are_reported(monkeypatch):
    monkeypatch.delattr(PreTrainedPolicy, "_get_default_peft_targets")
    config = PreTrainedConfig.get_choice_class("diffusion")(device="cpu")
    with pytest.raises(UserError, match=r"DiffusionPolicy\._get_default_peft_targets, .*lerobot==0\.6\.1"):
        lora_presets(config)


class Library:
    @classmethod
    def name(cls):
        return cls.__name__


class Derived(Library):
    pass


def test_an_attribute_is_replaced_and_restored():
    original = vars(Library)["name"]
    with pytest.raises(ZeroDivisionError), replace_attribute(Library, "name", lambda: 1 / 0):
        Library.name()
    assert vars(Library)["name"] is original
    assert Derived.name() == "Derived"


def test_an_inherited_attribute_is_not_replaced():
    with (
        pytest.raises(AttributeError, match="Derived does not define name"),
        replace_attribute(Derived, "name", None),
    ):
        pass

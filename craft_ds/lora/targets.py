"""Presets of the layers that get adapters, by policy type."""

from functools import singledispatch

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig

from craft_ds.errors import UserError
from craft_ds.policies.lerobot_internals import default_peft_targets

DEFAULT = "default"
_ATTENTION = r"self_attn\.[qkvo]_proj"
_ATTENTION_MLP = rf"({_ATTENTION}|mlp\.(gate|up|down)_proj)"
_DECODER = r".*\.language_model\.layers\.\d+\."
_ENCODER = r".*\.vision_tower\..*\.encoder\.layers\.\d+\."
_PI0_FAST = {
    "attention": _DECODER + _ATTENTION,
    "attention_mlp": _DECODER + _ATTENTION_MLP,
    "attention_mlp_vision": (
        rf"({_DECODER}{_ATTENTION_MLP}|{_ENCODER}(self_attn\.(q|k|v|out)_proj|mlp\.fc[12]))"
    ),
}


@singledispatch
def lora_presets(config: PreTrainedConfig) -> dict[str, list[str] | str]:
    """Return PEFT's `target_modules` by preset name; if there are presets, `default` is one of them.

    A policy type without presets has LeRobot's default targets, if any.

    Args:
        config: The policy's configuration; no policy is built.
    """
    targets = default_peft_targets(config)
    return {DEFAULT: targets} if targets else {}


@lora_presets.register
def _pi0_fast_presets(config: PI0FastConfig) -> dict[str, list[str] | str]:
    return {DEFAULT: _PI0_FAST["attention_mlp"], **_PI0_FAST}


def preset_targets(config: PreTrainedConfig, preset: str) -> list[str] | str:
    """Return the target modules of a preset.

    Raises:
        UserError: The policy's type has no such preset.
    """
    presets = lora_presets(config)
    if preset not in presets:
        choices = f"choose one of {', '.join(presets)}, or " if presets else ""
        raise UserError(
            f"--lora.preset={preset} is unknown for policies of type {config.type}: {choices}"
            "name the layers by --lora.target_modules"
        )
    return presets[preset]


def describe_targets(config: PreTrainedConfig, targets: set[str] | list[str] | str | None) -> str:
    """Return the name of the preset with these targets, else the targets."""
    names = [name for name, known in lora_presets(config).items() if known == targets and name != DEFAULT]
    return names[0] if names else repr(sorted(targets) if isinstance(targets, set) else targets)

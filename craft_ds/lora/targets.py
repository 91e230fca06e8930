"""Layers that get adapters: presets by policy type, and the names that a pattern matches."""

import time
from collections.abc import Sequence
from functools import singledispatch

import regex
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig

from craft_ds.errors import UserError, one_line
from craft_ds.policies.lerobot_internals import default_peft_targets

DEFAULT = "default"
_LONGEST_MATCH_S = 10.0
_ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the head
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


def resolve_pattern(
    targets: set[str] | list[str] | str | None, names: Sequence[str], field: str
) -> list[str] | str | None:
    """Replace a regular expression by the names of modules that it matches, within a time limit.

    An expression from a file may take forever to match; Python's own module has no limit.

    Args:
        targets: An expression, or suffixes of names.
        names: Names of all modules of the policy.
        field: PEFT's name of the targets, for the error message.

    Raises:
        UserError: It does not compile or takes too long.
    """
    if targets is None or targets == _ALL_LINEAR:
        return targets
    if not isinstance(targets, str):
        return sorted(targets)
    shown = targets if len(targets) <= 100 else f"{targets[:100]}…"
    end = time.monotonic() + _LONGEST_MATCH_S
    try:
        pattern = regex.compile(targets)
        return [name for name in names if pattern.fullmatch(name, timeout=max(end - time.monotonic(), 0.01))]
    except regex.error as error:
        raise UserError(f"--lora.{field}={shown}: {one_line(error)}") from error
    except TimeoutError as error:
        raise UserError(
            f"--lora.{field}={shown} takes more than {_LONGEST_MATCH_S:g} s to match: name the layers instead"
        ) from error

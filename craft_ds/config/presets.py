"""Presets of `--craft.preset`: named sets of flags, each of which the user's own flag replaces.

A preset on the command line stands for its flags there; one in a configuration file stands for its flags in
that file, so that explicit values of the file replace it. Saved configurations contain the flags, not the
preset's name. Imports neither torch nor LeRobot.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from craft_ds.config.craft_config import CraftConfig
from craft_ds.config.penalty import PenaltyConfig
from craft_ds.errors import UserError

FLAG = "--craft.preset"


@dataclass(frozen=True)
class Preset:
    """A method, as a set of flags.

    Attributes:
        summary: Description in a few words.
        flags: Values by name, such as `craft.enabled`: all that any preset sets, so that a preset is the same
            method whatever a configuration file holds.
    """

    summary: str
    flags: Mapping[str, Any]


_DEFAULTS: dict[str, Any] = {
    **{
        f"craft.{name}": getattr(CraftConfig(), name)
        for name in (
            "enabled",
            "retention_loss",
            "retention_freq",
            "merging",
            "use_grad_projection",
            "multiplier",
            "initial_lambda",
            "projection_mode",
            "conflict_threshold",
            "surgery_scope",
            "multiplier_scope",
            "retention_scale",
            "retention_freq_max",
            "constraint_freq",
        )
    },
    **{f"penalty.{name}": getattr(PenaltyConfig(), name) for name in ("name", "weight")},
}
_CRAFT = _DEFAULTS | {"craft.enabled": True}
_JOINT_LOSS = _CRAFT | {
    "craft.retention_freq": 1,
    "craft.use_grad_projection": False,
    "craft.multiplier": "fixed",
    "craft.initial_lambda": 1.0,
}
_KL = _JOINT_LOSS | {"craft.retention_loss": "teacher_kl"}

PRESETS = {
    "guide": Preset("CRaFT with the guide's defaults", _CRAFT),
    "sequential": Preset("plain fine-tuning: no anchors, no penalty", _DEFAULTS),
    "replay": Preset("replay of old data: the joint loss on task samples and anchors", _JOINT_LOSS),
    "agem": Preset(
        "A-GEM: in every step g_t is projected off g_r where they conflict",
        _CRAFT | {"craft.retention_freq": 1, "craft.merging": "agem"},
    ),
    "kl": Preset("replay with the KL divergence from the teacher in place of the recorded actions", _KL),
    "recommended": Preset("`kl`, which led on the tuning seeds of docs/continual_metaworld.md", _KL),
    "l2": Preset(
        "L2-SP: penalty on the distance from the start",
        _DEFAULTS | {"penalty.name": "l2", "penalty.weight": 0.1},
    ),
    "ewc": Preset(
        "EWC: that distance weighted by the Fisher information of anchors",
        _DEFAULTS | {"penalty.name": "ewc", "penalty.weight": 100.0},
    ),
}
"""The presets by name. The weights of `l2` and `ewc` are starting points, not tuned values."""


def expand_preset(arguments: Sequence[str]) -> list[str]:
    """Replace `--craft.preset=NAME` by the preset's flags, before the user's own.

    Args:
        arguments: In the form of `normalise_arguments`.

    Raises:
        UserError: The preset is unknown, or trains without CRaFT and a flag of CRaFT is given.
    """
    given = dict(argument.partition("=")[::2] for argument in arguments)
    if FLAG not in given:
        return list(arguments)
    flags = find_preset(given[FLAG]).flags
    _refuse_without_effect(given[FLAG], {name.removeprefix("--") for name in given})
    added = [f"--{name}={_shown(value)}" for name, value in flags.items() if f"--{name}" not in given]
    return added + [argument for argument in arguments if argument.partition("=")[0] != FLAG]


def expand_preset_in(content: Any) -> bool:
    """Replace `craft.preset` of a configuration file by the preset's flags; return True if there was one.

    Args:
        content: The file's content, changed in place; its own values win.

    Raises:
        UserError: The preset is unknown, or trains without CRaFT and the file has a flag of CRaFT.
    """
    name = _named_in(content)
    if name is None:
        return False
    del content["craft"]["preset"]
    _refuse_without_effect(name, {f"craft.{field}" for field in content["craft"]})
    for flag, value in find_preset(name).flags.items():
        group, field = flag.split(".")
        section = content.setdefault(group, {})
        if isinstance(section, dict):
            section.setdefault(field, value)
    return True


def preset_line(arguments: Sequence[str]) -> str | None:
    """Return the line that names the preset and the flags that it sets; None without a preset.

    Args:
        arguments: In the form of `normalise_arguments`; the file of `--config_path` is read too.

    Raises:
        UserError: The preset is unknown.
    """
    given = dict(argument.partition("=")[::2] for argument in arguments)
    own, name = set(given), given.get(FLAG)
    if name is None:
        content = _read(given.get("--config_path"))
        name = _named_in(content)
        own |= {f"--{group}.{field}" for group, field in _fields(content)}
    if name is None:
        return None
    flags = find_preset(name).flags
    added = [f"--{flag}={_shown(value)}" for flag, value in flags.items() if f"--{flag}" not in own]
    replaced = [f"--{flag}" for flag in flags if f"--{flag}" in own]
    yours = f"; your own: {' '.join(replaced)}" if replaced else ""
    return f"preset {name}: {' '.join(added)}{yours}"


def find_preset(name: Any) -> Preset:
    """Return a preset by its name.

    Raises:
        UserError: The preset is unknown.
    """
    if name not in PRESETS:
        nearest = get_close_matches(str(name), PRESETS, n=1)
        meant = f"did you mean {nearest[0]}? Choose" if nearest else "choose"
        raise UserError(f"{FLAG}={name}: {meant} one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _refuse_without_effect(preset: str, own: set[str]) -> None:
    """Refuse flags of CRaFT beside a preset that trains without it.

    Args:
        preset: Name of the preset.
        own: Names of the user's flags, such as `craft.merging`.
    """
    if find_preset(preset).flags["craft.enabled"] or "craft.enabled" in own:
        return
    # Commands that differ in the preset alone may all name the anchors.
    for name in sorted(own - {"craft.preset", "craft.anchor_cache_dir"}):
        if name.startswith("craft."):
            raise UserError(
                f"--{name} has no effect with {FLAG}={preset}, which trains without CRaFT: omit it, or add "
                "--craft.enabled=true"
            )


def _named_in(content: Any) -> Any:
    craft = content.get("craft") if isinstance(content, dict) else None
    return craft.get("preset") if isinstance(craft, dict) else None


def _fields(content: Any) -> Iterator[tuple[str, str]]:
    for group in ("craft", "penalty"):
        section = content.get(group) if isinstance(content, dict) else None
        yield from ((group, str(field)) for field in section or ())


def _read(config_path: str | None) -> Any:
    """Return the content of a configuration file; None if the parser will report it."""
    try:
        return yaml.safe_load(Path(config_path or "").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

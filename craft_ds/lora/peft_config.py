"""PEFT's configuration: made from flags, read from disk, and compared with stored adapters."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
from lerobot.configs import PreTrainedConfig

from craft_ds.config.configs import LoraConfig
from craft_ds.errors import UserError, one_line
from craft_ds.lora.targets import describe_targets, preset_targets
from craft_ds.policies.directory import CONFIG
from craft_ds.tensor_io.safe_json import is_count, read_object

ADAPTER_CONFIG = "adapter_config.json"
_MAX_RANK = 1 << 16


def _is_rank(value: Any) -> bool:
    return is_count(value, 1) and value <= _MAX_RANK


def _is_finite_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_names(value: Any) -> bool:
    return isinstance(value, list | set) and all(isinstance(name, str) for name in value)


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def _is_plain_name(value: Any) -> bool:
    """Return True for a name, with or without escaped dots: PEFT matches these without a time limit."""
    return isinstance(value, str) and bool(re.fullmatch(r"(?:[\w.]|\\\.)+", value))


def _is_plain_map(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_plain_name, value))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | set | tuple) else [value]


# Fields of PEFT's configuration that change neither shapes nor products, or that are supported here.
_KNOWN = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
# PEFT does not check the values of its file.
_VALUES: dict[str, Callable[[Any], bool]] = {
    "r": _is_rank,
    "lora_alpha": _is_finite_number,
    "lora_dropout": lambda value: _is_finite_number(value) and 0 <= value <= 1,
    "use_rslora": lambda value: isinstance(value, bool),
    "use_dora": lambda value: isinstance(value, bool),
    "target_modules": lambda value: value is None or _is_pattern(value) or _are_names(value),
    "exclude_modules": lambda value: value is None or _is_pattern(value) or _are_names(value),
    "modules_to_save": lambda value: value is None or _are_names(value),
    "rank_pattern": lambda value: _is_plain_map(value) and all(map(_is_rank, value.values())),
    "alpha_pattern": lambda value: _is_plain_map(value) and all(map(_is_finite_number, value.values())),
    "layers_pattern": lambda value: value is None or all(map(_is_plain_name, _listed(value))),
    "base_model_name_or_path": lambda value: value is None or isinstance(value, str),
}
# Fields that stored adapters and flags must agree on, with their flags.
_SHAPE = {
    "r": "--lora.rank",
    "lora_alpha": "--lora.alpha",
    "use_rslora": "--lora.use_rslora",
    "use_dora": "--lora.use_dora",
    "target_modules": "--lora.preset",
    "modules_to_save": "--lora.modules_to_save",
}


def make_peft_config(lora: LoraConfig, policy: PreTrainedConfig, base_path: str) -> peft.LoraConfig:
    """Make PEFT's configuration from the flags.

    Args:
        lora: Validated flags.
        policy: The policy's configuration.
        base_path: Hub id or folder of the base policy.

    Raises:
        UserError: The policy's type has no such preset.
    """
    targets = lora.target_modules or preset_targets(policy, lora.preset)
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
        target_modules=targets,
        modules_to_save=lora.modules_to_save or None,
        base_model_name_or_path=base_path,
    )


def read_adapter_config(directory: Path) -> peft.LoraConfig:
    """Read PEFT's configuration of the adapters in a directory.

    Raises:
        UserError: It is damaged, its method is not LoRA, or it uses a feature that merging does not support.
    """
    path = directory / ADAPTER_CONFIG
    try:
        read_object(path)  # PEFT would read a file of any size and depth
        config = peft.PeftConfig.from_pretrained(str(directory))
    except Exception as error:
        raise UserError(f"{path} is missing or damaged: {one_line(error)}") from error
    if not isinstance(config, peft.LoraConfig):
        raise UserError(f"{path} holds a {config.peft_type} adapter: craft-ds supports LoRA only")
    invalid = [name for name, known in _VALUES.items() if not known(getattr(config, name))]
    if invalid:
        raise UserError(f"{path} is damaged: {invalid[0]}={str(getattr(config, invalid[0]))[:100]}")
    plain = _fields(peft.LoraConfig(target_modules=config.target_modules))
    unknown = [name for name, value in _fields(config).items() if name not in _KNOWN and value != plain[name]]
    if unknown:
        raise UserError(f"{path} uses {', '.join(unknown)}, which craft-ds does not support")
    return config


def _fields(config: peft.LoraConfig) -> dict[str, Any]:
    return {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}


def check_adapters_match(
    asked: peft.LoraConfig, stored: peft.LoraConfig, policy: PreTrainedConfig, directory: Path
) -> None:
    """Check that stored adapters match the flags.

    Raises:
        UserError: A flag differs; the message names both values.
    """
    for field, flag in _SHAPE.items():
        wanted, found = (getattr(config, field) for config in (asked, stored))
        if field == "target_modules":
            wanted, found = (describe_targets(policy, value) for value in (wanted, found))
        elif field == "modules_to_save":
            wanted, found = ([*(value or [])] for value in (wanted, found))
        if wanted != found:
            raise UserError(
                f"{flag}={wanted}, but the adapters in {directory} were trained with {found}: "
                f"set {flag} to that value"
            )


def write_adapter_config(directory: Path, config: peft.LoraConfig) -> None:
    """Write PEFT's configuration beside a policy's, and mark the directory as an adapter for LeRobot.

    Args:
        directory: Holds the policy's `config.json`.
        config: PEFT's configuration.
    """
    # As PEFT itself stores adapters; loading for training clears it.
    dataclasses.replace(config, inference_mode=True).save_pretrained(str(directory))
    set_use_peft(directory, True)


def set_use_peft(directory: Path, use_peft: bool) -> None:
    """Set `use_peft` in `config.json`, which makes LeRobot load adapters from the directory."""
    path = directory / CONFIG
    content = json.loads(path.read_text()) | {"use_peft": use_peft}
    path.write_text(json.dumps(content, indent=4) + "\n")


def remove_adapter_config(directory: Path) -> None:
    """Turn a copied policy directory of adapters into one of a full policy."""
    (directory / ADAPTER_CONFIG).unlink(missing_ok=True)
    set_use_peft(directory, False)

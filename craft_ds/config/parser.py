"""The command line of a training run: LeRobot's own parser, every complaint of which becomes one line."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import draccus
import yaml
from lerobot.configs import parser
from lerobot.configs.train import TRAIN_CONFIG_NAME

from craft_ds.config.secret_scan import redact
from craft_ds.config.train_config import TrainConfig
from craft_ds.errors import UserError, exits_as_user_error

# Written by the user as the launcher or the guide has it; understood as the field it means.
_ALIASES = {"--engine": "--engine.name", "--ds_config": "--engine.ds_config", "--lora": "--lora.preset"}
_LAUNCHER_FLAGS = ("--local_rank", "--local-rank")


def parse_arguments(arguments: Sequence[str]) -> TrainConfig:
    """Parse the command line with LeRobot's own parser.

    `sys.argv` is replaced too, because LeRobot reads `--policy.path` and `--config_path` from it again
    when the configuration is validated.

    Raises:
        UserError: An unknown flag, a value that does not parse, or a configuration file that is missing or
            unreadable.
    """
    sys.argv[1:] = normalise_arguments(arguments)
    config_path = parser.parse_arg("config_path")
    if config_path is not None:
        _check_config_file(Path(config_path))
    # LeRobot keeps what it took from the configuration file of an earlier call.
    parser._config_path_args.clear()
    parser._config_yaml_overrides.clear()

    @parser.wrap()
    def identity(config: TrainConfig) -> TrainConfig:
        return config

    where = f" (--config_path={config_path}, or see --help)" if config_path else " (see --help)"
    try:
        with exits_as_user_error():
            return identity()
    except (UserError, argparse.ArgumentError, draccus.ParsingError) as error:
        message = " ".join(str(error.__cause__ or error).split())
        # draccus writes a flag as `name`.
        message = re.sub(r"^`([\w.]+)`", r"--\1", message)
        raise UserError(redact(message) + where) from error


def normalise_arguments(arguments: Sequence[str]) -> list[str]:
    """Bring every flag into the form `--name=value`, once.

    The short forms (`--engine=zero`, `--ds_config FILE`, `--lora=PRESET`) become the fields that they mean,
    and the launcher's own flag goes. Of a flag that is given twice the last counts, for `--policy.path` too,
    of which LeRobot would take the first: so a script's own flags can be followed by the user's.
    """
    joined: list[str] = []
    for argument in arguments:
        if joined and _is_flag(joined[-1]) and "=" not in joined[-1] and not _is_flag(argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    last: dict[str, str] = {}
    for argument in joined:
        name, equals, value = argument.partition("=")
        name = _ALIASES.get(name, name)
        if name == "--config_path" and Path(value).is_dir():
            value = str(Path(value) / TRAIN_CONFIG_NAME)
        last.pop(name, None)
        if name == "--lora.preset" and argument.startswith("--lora="):
            last["--lora.enabled"] = "--lora.enabled=true"
            value = "default" if value == "preset" else value
        if name not in _LAUNCHER_FLAGS:
            last[name] = name + equals + value
    return list(last.values())


def _is_flag(argument: str) -> bool:
    return argument.startswith("--") or argument == "-h"


def _check_config_file(path: Path) -> None:
    loaders: dict[str, Any] = {".json": json.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}
    load = loaders.get(path.suffix.lower())
    if load is None:
        raise UserError(f"--config_path={path}: must be a .json or .yaml file, or a checkpoint's directory")
    if path.exists() and not path.is_file():
        raise UserError(f"--config_path={path}: not a file")
    try:
        content = load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--config_path={path}: no such file") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--config_path={path}: not readable ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"--config_path={path}: must hold a mapping of flags to values")

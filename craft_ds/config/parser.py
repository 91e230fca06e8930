"""Parser of the command line of a training run: LeRobot's own, with every error reduced to one line."""

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

from craft_ds.config.arguments import normalise_arguments, quote_paths
from craft_ds.config.presets import expand_preset
from craft_ds.config.secret_scan import redact
from craft_ds.config.suggestions import suggestion
from craft_ds.config.train_config import TrainConfig
from craft_ds.errors import UserError, exits_as_user_error, one_line
from craft_ds.tensor_io.filesystem import no_temporary_files

_OFF = "--data_check=off"


def parse_arguments(arguments: Sequence[str]) -> TrainConfig:
    """Parse the command line with LeRobot's own parser.

    Also replaces `sys.argv`, because LeRobot reads `--policy.path` and `--config_path` from it again when the
    configuration is validated.

    Raises:
        UserError: An unknown flag, a value that does not parse, or a configuration file that is missing or
            unreadable.
    """
    normal = quote_paths(expand_preset(normalise_arguments(arguments)))
    # Values are read as YAML, which takes an unquoted off for false.
    sys.argv[1:] = [argument for argument in normal if argument != _OFF]
    config_path = parser.parse_arg("config_path")
    if config_path is not None:
        _check_config_file(Path(config_path))
    # LeRobot keeps values from the configuration file of an earlier call.
    parser._config_path_args.clear()
    parser._config_yaml_overrides.clear()

    @parser.wrap()
    def identity(config: TrainConfig) -> TrainConfig:
        return config

    # LeRobot accepts either --policy.path or --policy.type; with both, the type is checked later.
    given = sys.argv[1:]
    if parser.get_path_arg("policy"):
        sys.argv[1:] = parser.filter_arg("policy.type", given)
    where = f" (--config_path={config_path}, or see --help)" if config_path else " (see --help)"
    try:
        with exits_as_user_error(), no_temporary_files():
            config = identity()
    except (UserError, argparse.ArgumentError, draccus.ParsingError) as error:
        message = one_line(error.__cause__ or error, limit=None)
        # draccus writes a flag as `name`.
        message = re.sub(r"^`([\w.]+)`", r"--\1", message)
        unknown = re.match(r"unrecognized arguments: (--[\w.-]+)", message)
        if unknown:
            message += suggestion(unknown[1])
        raise UserError(redact(message) + where) from error
    sys.argv[1:] = given
    if _OFF in normal:
        config.data_check = "off"
    return config


def _check_config_file(path: Path) -> None:
    loaders: dict[str, Any] = {".json": json.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}
    load = loaders.get(path.suffix.lower())
    if load is None:
        raise UserError(f"--config_path={path}: must be a .json or .yaml file, or a checkpoint directory")
    if path.exists() and not path.is_file():
        raise UserError(f"--config_path={path}: not a file")
    try:
        content = load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--config_path={path}: no such file") from None
    except yaml.YAMLError as error:  # its text quotes the file, which may hold a key
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or type(error).__name__
        raise UserError(f"--config_path={path}: not readable ({redact(one_line(why, 100))}{where})") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--config_path={path}: not readable ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"--config_path={path}: must hold a mapping of flags to values")

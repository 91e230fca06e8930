"""Normal form of the flags of a training run. Imports neither torch nor LeRobot."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from craft_ds.config.shipped_files import resolve_shipped
from craft_ds.errors import UserError

TRAIN_CONFIG_NAME = "train_config.json"  # the name that LeRobot gives it
# Short forms of flags, with the fields that they set.
_ALIASES = {
    "--engine": "--engine.name",
    "--ds_config": "--engine.ds_config",
    "--optimizer.state": "--engine.optimizer_state",
    "--lora": "--lora.preset",
}
_LAUNCHER_FLAGS = ("--local_rank", "--local-rank")
# Flags whose values are paths and which the parser would read as YAML, in which `#` and `: ` have a meaning.
_PATH_FLAGS = (
    "--output_dir",
    "--dataset.root",
    "--craft.anchor_cache_dir",
    "--engine.ds_config",
    "--lora.base_path",
)
_PLAIN = re.compile(r"[\w./+-]+")
_YAML_BOOLEANS = ("true", "false", "yes", "no", "on", "off", "y", "n")


def normalise_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the flags in the form `--name=value`, each of them once.

    Short forms (`--engine=zero`, `--ds_config FILE`, `--lora=PRESET`) become the fields that they set, and
    launcher flags are removed. If a flag is given twice, the last one counts, so that the flags of a script
    can be followed by the user's. (LeRobot would use the first `--policy.path`.)
    """
    joined: list[str] = []
    for argument in expand_home(arguments):
        if joined and _is_flag(joined[-1]) and "=" not in joined[-1] and not _is_flag(argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    last: dict[str, str] = {}
    for argument in joined:
        name, equals, value = argument.partition("=")
        name = _ALIASES.get(name, name)
        if name == "--config_path":
            value = resolve_shipped(name, value)
            value = str(Path(value) / TRAIN_CONFIG_NAME) if Path(value).is_dir() else value
        last.pop(name, None)
        if name == "--lora.preset" and argument.startswith("--lora="):
            last["--lora.enabled"] = "--lora.enabled=true"
            value = "default" if value == "preset" else value
        if name not in _LAUNCHER_FLAGS:
            last[name] = name + equals + value
    return [
        f"--policy.path={argument.partition('=')[2]}"
        if name == "--policy.pretrained_path" and not {"--policy.path", "--resume"} & last.keys()
        else argument
        for name, argument in last.items()
    ]


def expand_home(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with a leading `~` expanded: the shell leaves it in `--flag=~/path`."""
    home = str(Path.home())
    return [
        re.sub(r"^(--[\w.-]+=)?~(?=/|$)", lambda found: (found[1] or "") + home, argument)
        for argument in arguments
    ]


def quote_paths(arguments: Sequence[str]) -> list[str]:
    """Return the flags with paths quoted, so that a YAML parser reads them as they are."""
    quoted = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        special = not _PLAIN.fullmatch(value) or value.lower() in _YAML_BOOLEANS
        literal = name in _PATH_FLAGS and value[:1] not in ("", '"', "'") and special
        quoted.append(f"{name}={json.dumps(value)}" if equals and literal else argument)
    return quoted


def parse_rename_map(text: str) -> dict[str, str]:
    """Read the value of `--rename_map`.

    Raises:
        UserError: It is not a JSON object of strings.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not all(isinstance(entry, str) for entry in value.values()):
        raise UserError(f'--rename_map={text} must be JSON such as {{"old name": "new name"}}')
    return value


def _is_flag(argument: str) -> bool:
    return argument.startswith("--") or argument == "-h"

"""Forms of the flags of a training run. Imports neither torch nor LeRobot."""

from collections.abc import Sequence
from pathlib import Path

from craft_ds.config.shipped_files import resolve_shipped

TRAIN_CONFIG_NAME = "train_config.json"  # the name that LeRobot gives it
# Written by the user as the launcher or the guide has it; understood as the field it means.
_ALIASES = {"--engine": "--engine.name", "--ds_config": "--engine.ds_config", "--lora": "--lora.preset"}
_LAUNCHER_FLAGS = ("--local_rank", "--local-rank")


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
        value = resolve_shipped(name, value)
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

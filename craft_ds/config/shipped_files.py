"""Configuration files in the package, found by name: `--ds_config zero3`, `--config_path lora`."""

from pathlib import Path

from craft_ds.errors import UserError

_PACKAGE = Path(__file__).parents[1]
_SHIPPED = {"--engine.ds_config": ("ds_configs", ".json"), "--config_path": ("fsdp_configs", ".yaml")}


def shipped_names(flag: str) -> list[str]:
    """Return the names of the shipped files for a flag."""
    directory, suffix = _SHIPPED[flag]
    return sorted(path.stem for path in (_PACKAGE / directory).glob(f"*{suffix}"))


def resolve_shipped(flag: str, value: str) -> str:
    """Return the path of the shipped file of this name; other values are returned as they are.

    A file or directory of that name in the working directory is preferred. The name is kept in a run's
    configuration, so that the run can be resumed where the package is installed elsewhere.

    Raises:
        UserError: The value is a bare name, and no shipped file has it.
    """
    if flag not in _SHIPPED or not value or value == "null" or Path(value).exists():
        return value
    if Path(value).name != value or Path(value).suffix:
        return value
    if value not in shipped_names(flag):
        shown = flag.replace("--engine.ds_config", "--ds_config")
        raise UserError(
            f"{shown}={value}: no such file; must be a .json or .yaml file, a checkpoint directory or one "
            f"of the names {', '.join(shipped_names(flag))}"
            if flag == "--config_path"
            else f"{shown}={value}: no such file; the shipped ones are {', '.join(shipped_names(flag))}"
        )
    directory, suffix = _SHIPPED[flag]
    return str(_PACKAGE / directory / f"{value}{suffix}")

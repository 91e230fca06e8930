"""Suggestions for misspelt flags, renamed flags and well-known flags of other programs."""

from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache

from craft_ds.config.describe import FlagDescription, describe_flags
from craft_ds.config.help import LEROBOT_FLAGS
from craft_ds.config.presets import FLAG as PRESET_FLAG
from craft_ds.config.presets import find_preset
from craft_ds.config.shipped_files import resolve_shipped
from craft_ds.errors import UserError
from craft_ds.worlds.tasks import TASKS

FOREIGN_FLAGS = {
    "--lr": "--policy.optimizer_lr",
    "--learning_rate": "--policy.optimizer_lr",
    "--bf16": "--engine.dtype=bfloat16",
    "--fp16": "--engine.dtype=bfloat16",
    "--mixed_precision": "--engine.dtype=bfloat16",
    "--deepspeed": "--ds_config FILE",
    "--deepspeed_config": "--ds_config FILE",
    "--fsdp": "--engine=fsdp",
    "--gradient_checkpointing": "--activation_checkpointing=full",
    "--lora.r": "--lora.rank",
    "--lora.lora_alpha": "--lora.alpha",
    "--lora.init_lora_weights": "--lora.init",
    "--craft": "--craft.enabled=true",
    "--epochs": "--steps",
    "--max_steps": "--steps",
    "--per_device_train_batch_size": "--batch_size",
    "--save_steps": "--save_freq",
    "--resume_from_checkpoint": "--resume=true --config_path=RUN/last",
}
"""Flags of other training programs, with the flag of the same meaning here."""

RENAMED_FLAGS = {"--lora.full_modules": "--lora.modules_to_save"}
"""Flags of earlier versions, with their names now. Saved configurations may have either."""

FOREIGN_ENGINES = {
    "zero2": "--ds_config zero2",
    "zero3": "--ds_config zero3",
    "deepspeed": "--ds_config zero3",
    "ddp": "--engine=fsdp or --ds_config zero2",
    "fsdp2": "--engine=fsdp",
}
"""Values of `--engine` that are not engines here, with the flag that is meant."""


def refuse_misspelt_flags(arguments: Iterable[str]) -> None:
    """Check flags in the form `--name=value` before anything expensive is imported.

    Only flags that cannot be LeRobot's are refused here: those of our own groups, and well-known foreign
    ones. LeRobot's parser checks the others.

    Raises:
        UserError: Names the flag that was probably meant.
    """
    own = own_flags()
    arguments = list(arguments)
    given = dict(argument.partition("=")[::2] for argument in arguments)
    _refuse_tasks(given.get("--world.tasks", ""), given.get("--world.name", ""))
    prefixes = {flag[: flag.index(".") + 1] for flag in own if "." in flag}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in RENAMED_FLAGS:
            raise UserError(f"{name} was renamed: use {RENAMED_FLAGS[name]}")
        if name in FOREIGN_FLAGS:
            raise UserError(f"{name}: no such flag; use {FOREIGN_FLAGS[name]}")
        if name == "--engine.name" and value in FOREIGN_ENGINES:
            raise UserError(f"--engine={value}: no such engine; use {FOREIGN_ENGINES[value]}")
        if name == "--engine.ds_config":
            resolve_shipped(name, value)
        if name == PRESET_FLAG:
            find_preset(value)
        elif name in own:
            _refuse_value(own[name], value)
        elif any(name.startswith(prefix) for prefix in prefixes) and name not in _groups(own):
            raise UserError(f"unrecognized arguments: {argument}{suggestion(name)} (see --help)")


def suggestion(name: str) -> str:
    """Return `; did you mean FLAG?` for the flag nearest to a name, or nothing."""
    if name in FOREIGN_FLAGS:
        return f"; did you mean {FOREIGN_FLAGS[name]}?"
    nearest = get_close_matches(name, [*own_flags(), PRESET_FLAG, *LEROBOT_FLAGS], n=1, cutoff=0.7)
    return f"; did you mean {nearest[0]}?" if nearest else ""


@cache
def own_flags() -> dict[str, FlagDescription]:
    """Return the descriptions of all flags of craft-ds by name."""
    return {entry.flag: entry for group in describe_flags() for entry in group.flags}


def _groups(own: Iterable[str]) -> set[str]:
    return {flag.rsplit(".", 1)[0] for flag in own if "." in flag}


def _refuse_value(entry: FlagDescription, value: str) -> None:
    if not entry.choices or entry.type == "true|false" or value in entry.choices or not value:
        return
    nearest = get_close_matches(value, entry.choices, n=1)
    meant = f"did you mean {nearest[0]}? Choose" if nearest else "choose"
    flag = entry.flag.replace("--engine.name", "--engine")
    raise UserError(f"{flag}={value}: {meant} one of {', '.join(entry.choices)}")


def _refuse_tasks(value: str, world: str) -> None:
    if not value or value == "null":
        return
    splits = [TASKS[world]] if world in TASKS else TASKS.values()
    known = [task for split in splits for task in (*split.old, *split.new)]
    tasks = [task.strip(" '\"") for task in value.strip("[] ").split(",") if task.strip()]
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise UserError(f"--world.tasks={value}: no task {unknown[0]}; the tasks are {', '.join(known)}")
    if not value.startswith("["):
        raise UserError(f"--world.tasks={value}: write a list, --world.tasks=[{value}]")

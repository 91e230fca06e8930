"""Resolve `--resume`: find the checkpoint to resume from and check that it belongs to the same run."""

import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lerobot.configs.train import TRAIN_CONFIG_NAME

from craft_ds.checkpoints import complete_checkpoints, verify_checkpoint
from craft_ds.checkpoints.run_directory import (
    LAST,
    checkpoint_directories,
    replace_best_copy,
    replace_last_copy,
)
from craft_ds.config.craft_config import split_directories
from craft_ds.config.train_config import flat
from craft_ds.distributed.collectives import init_process_group, rank0_only
from craft_ds.distributed.env import RANK_TIMEOUT_S, launched_rank, launched_world_size
from craft_ds.errors import UserError
from craft_ds.tensor_io.move_aside import move_aside, move_contents_aside

# These cannot change within a run.
_FIXED = ("policy.", "dataset.repo_id", "dataset.revision", "dataset.episodes", "normalization")
_FREE_OF_POLICY = (
    "optimizer_",
    "scheduler_",
    "device",
    "use_amp",
    "use_peft",
    "dtype",
    "gradient_checkpointing",
    "compile_",
    "pretrained_path",
    "push_to_hub",
    "repo_id",
    "private",
    "tags",
    "license",
)
# Locations, and flags of this command alone.
_NOT_LISTED = (
    "resume",
    "checkpoint_path",
    "verified_checkpoint",
    "job_name",
    "output_dir",
    "policy.pretrained_path",
)
_PATHS = ("dataset.root", "engine.ds_config", "lora.base_path")
_PATH_LISTS = ("craft.anchor_cache_dir",)


class ResumeChoice(NamedTuple):
    """A command line with `--resume` resolved.

    Attributes:
        arguments: The command line, with the chosen checkpoint.
        checkpoint: The checkpoint, verified; None: the run is new.
        step: Steps done in the checkpoint.
        messages: Log lines about the choice.
        auto: True for `--resume=auto`, for which a finished run is not an error.
    """

    arguments: list[str]
    checkpoint: Path | None = None
    step: int = 0
    messages: tuple[str, ...] = ()
    auto: bool = False


def resolve_resume(arguments: Sequence[str]) -> ResumeChoice:
    """Find and verify the checkpoint to resume from. Collective under a launcher: call on all ranks.

    `--resume=true` resumes from the checkpoint whose directory or `train_config.json` is `--config_path`, or
    from the newest complete one if `--config_path` is a run's directory or its `last`, or is not given (then
    `--output_dir` names the run). `--resume=auto` resumes from the newest complete checkpoint of
    `--output_dir`, or starts the run if there is none: the same command can be repeated.

    Damaged checkpoints that the run would overwrite are renamed; nothing is deleted.

    Args:
        arguments: In the form of `normalise_arguments`.

    Raises:
        UserError: There is no such checkpoint, or the one named by `--config_path` is damaged.
    """
    flags = _flags(arguments)
    mode = flags.get("--resume", "false").lower()
    if mode not in ("true", "auto"):
        return ResumeChoice(list(arguments))
    join_ranks(arguments)
    config_path = Path(flags["--config_path"]) if flags.get("--config_path") else None
    output_dir = flags.get("--output_dir") or _output_dir_of(config_path)
    if mode == "auto":
        if not output_dir:
            raise UserError("--resume=auto needs --output_dir, the directory of the run to start or resume")
        run: Path | None = Path(output_dir)
    else:
        run = _named_run(config_path, output_dir)
        if run is None:
            assert config_path is not None
            manifest = verify_checkpoint(config_path.parent, launched_rank(), launched_world_size())
            return ResumeChoice(list(arguments), config_path.parent, manifest["step"])
    assert run is not None
    found, skipped = _newest(run)
    if found is None:
        if mode == "true":
            reasons = "".join(f"; {reason}" for reason in skipped.values())
            raise UserError(f"--resume=true: {run} holds no complete checkpoint{reasons}")
        moved = rank0_only(_as_user_error(move_contents_aside, run))(run)
        messages = [f"warning: {reason}" for reason in skipped.values()]
        if moved:
            messages.append(
                f"no complete checkpoint in {run}: moved its contents to {moved}; starting a new run"
            )
        return ResumeChoice([a for a in arguments if not a.startswith("--resume=")], messages=tuple(messages))
    step, checkpoint = found
    messages = [f"warning: skipped: {reason}" for reason in skipped.values()]
    if Path(flags.get("--output_dir") or run).resolve() == run.resolve():
        checkpoint, renamed = rank0_only(_as_user_error(_tidy, run))(run, checkpoint, list(skipped))
        messages += renamed
    # The same command starts and resumes a run; the initial policy is not needed to resume.
    replaced = ("--resume", "--config_path", *(("--policy.path",) if mode == "auto" else ()))
    kept = [argument for argument in arguments if argument.partition("=")[0] not in replaced]
    if "--output_dir" not in flags:
        kept.append(f"--output_dir={run}")
    kept += [f"--config_path={checkpoint / TRAIN_CONFIG_NAME}", "--resume=true"]
    return ResumeChoice(kept, checkpoint, step, (*messages, f"resuming from {checkpoint}"), mode == "auto")


def resumed_output(arguments: Sequence[str]) -> Path | None:
    """Return the directory that a resumed run writes into; None without `--resume`, or if it is not named.

    Args:
        arguments: In the form of `normalise_arguments`.

    Raises:
        UserError: As `resolve_resume`.
    """
    flags = _flags(arguments)
    mode = flags.get("--resume", "false").lower()
    if mode not in ("true", "auto"):
        return None
    if flags.get("--output_dir"):
        return Path(flags["--output_dir"])
    config_path = Path(flags["--config_path"]) if flags.get("--config_path") else None
    output_dir = _output_dir_of(config_path)
    if mode == "auto":
        return Path(output_dir) if output_dir else None
    run = _named_run(config_path, output_dir)
    return config_path.parent.parent if run is None and config_path is not None else run


def _flags(arguments: Sequence[str]) -> dict[str, str]:
    """Return the value of each flag; the last one wins, as in the parser."""
    return dict(argument.partition("=")[::2] for argument in arguments)


def _tidy(run: Path, checkpoint: Path, damaged: Sequence[Path]) -> tuple[Path, list[str]]:
    """Rename what a resumed run would overwrite; return the checkpoint's path now, and messages."""
    messages = [f"renamed {path} to {move_aside(path)}" for path in damaged]
    checkpoint, last = replace_last_copy(run, checkpoint)
    return checkpoint, [*messages, *filter(None, (last, replace_best_copy(run)))]


def _as_user_error[**P, R](function: Callable[P, R], run: Path) -> Callable[P, R]:
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except OSError as error:
            raise UserError(f"--output_dir={run} cannot be written: {error}") from error

    return wrapped


def join_ranks(arguments: Sequence[str]) -> None:
    """Form the process group that ranks need to choose a checkpoint. Collective: call on all ranks."""
    flags = _flags(arguments)
    if launched_world_size() > 1:
        init_process_group(_rank_timeout(flags.get("--rank_timeout", "")))


def _rank_timeout(text: str) -> float:
    """Return the flag's value; the default if it is absent or wrong, which the parser reports later."""
    try:
        seconds = float(text)
    except ValueError:
        return RANK_TIMEOUT_S
    return seconds if 0 < seconds < math.inf else RANK_TIMEOUT_S


def _named_run(config_path: Path | None, output_dir: str | None) -> Path | None:
    """Return the run whose newest checkpoint to use; None: `config_path` names one checkpoint."""
    if config_path is not None and config_path.name == LAST:
        return config_path.parent
    if config_path is None or config_path.name != TRAIN_CONFIG_NAME:
        if not output_dir:
            raise UserError(
                f"--resume=true needs --config_path=<run>/step_NNNNNN/{TRAIN_CONFIG_NAME}, or <run>/last/…"
            )
        return Path(output_dir)
    directory = config_path.parent
    if directory.name == LAST:
        return directory.parent
    return directory if not config_path.exists() and checkpoint_directories(directory) else None


def _output_dir_of(config_path: Path | None) -> str | None:
    """Return `output_dir` of a configuration file, or None; the parser reports a damaged file."""
    if config_path is None:
        return None
    try:
        content = yaml.safe_load(config_path.read_text(encoding="utf-8"))
        return str(content["output_dir"]) if content["output_dir"] else None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _newest(run: Path) -> tuple[tuple[int, Path] | None, dict[Path, str]]:
    """Return the newest undamaged checkpoint, and why others were skipped. Collective."""
    complete, skipped = rank0_only(complete_checkpoints)(run)
    for step, path in complete:
        try:
            verify_checkpoint(path, launched_rank(), launched_world_size())
        except UserError as error:
            skipped[path] = str(error)
        else:
            return (step, path), skipped
    return None, skipped


def resume_command(run: Path) -> str:
    """Return the command line that resumes a run from its newest checkpoint, as this process was started.

    Only the arguments are known where a user's own program called `train_craft`.
    """
    program = Path(sys.argv[0])
    arguments = shlex.join([f"--config_path={run / LAST / TRAIN_CONFIG_NAME}", "--resume=true"])
    if program.name == "craft-ds":
        command = f"craft-ds train {arguments}"
    elif program.parts[-2:] == ("craft_ds", "__main__.py"):
        command = f"python -m craft_ds train {arguments}"
    elif program.name == "train_craft.py":
        command = f"python {shlex.quote(str(program))} {arguments}"
    else:
        return arguments
    return f"{command} (under the same launcher)" if launched_world_size() > 1 else command


def changed_flags(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return the flags that differ from those of a checkpoint, as `--flag=new (was old)`.

    Raises:
        UserError: A flag differs that cannot change within a run.
    """
    before, now = flat(saved), flat(current)
    changed = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new or _same_path(name, old, new) or name in _NOT_LISTED or name.startswith("checkpoint_"):
            continue
        if name.endswith("tokenizer_name") and old and new and Path(old).name == Path(new).name:
            continue  # the checkpoint's own tokenizer, in another location
        field = name.removeprefix("policy.")
        free = field != name and field.startswith(_FREE_OF_POLICY)
        if name.startswith(_FIXED) and not free:
            raise UserError(
                f"--{name}={_shown(new)}, but the checkpoint was trained with {_shown(old)}: leave the flag "
                "out, or start a new run with --policy.path instead of --resume"
            )
        changed.append(f"--{name}={_shown(new)} (was {_shown(old)})")
    return changed


def check_same_policy(trained: dict[str, Any], stored: dict[str, Any]) -> None:
    """Check that the two configurations of a checkpoint describe the same policy.

    A resumed run is built from the first and copies the second.

    Args:
        trained: `policy` in `train_config.json`.
        stored: `config.json`.

    Raises:
        ValueError: They differ in a field that cannot change within a run.
    """
    for name in sorted(trained.keys() | stored.keys()):
        if name.startswith(_FREE_OF_POLICY) or name.endswith("tokenizer_name"):
            continue
        if trained.get(name) != stored.get(name):
            raise ValueError(f"config.json has another {name}: resume from an older checkpoint")


def _same_path(name: str, old: Any, new: Any) -> bool:
    """Return True for one path, or list of paths, in two forms: checkpoints contain absolute paths."""
    if name == "datasets":
        return _absolute(old) == _absolute(new)
    if name in _PATH_LISTS and old and new:
        lists = [[Path(path).resolve() for path in split_directories(text)] for text in (old, new)]
        return lists[0] == lists[1]
    return name in _PATHS and bool(old and new) and Path(old).resolve() == Path(new).resolve()


def _absolute(sources: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Return the entries of `--datasets` with absolute paths; none in checkpoints from before that flag."""
    return [
        source | {"root": source["root"] and str(Path(source["root"]).resolve())} for source in sources or []
    ]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

"""Resolve `--resume`: find the checkpoint to resume from and check that it belongs to the same run."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lerobot.configs.train import TRAIN_CONFIG_NAME

from craft_ds.checkpoints import complete_checkpoints, verify_checkpoint
from craft_ds.checkpoints.run_directory import LAST, checkpoint_directories, move_aside
from craft_ds.config.train_config import flat
from craft_ds.distributed.collectives import init_process_group, rank0_only
from craft_ds.distributed.env import launched_rank, launched_world_size
from craft_ds.errors import UserError

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
_PATHS = ("dataset.root", "craft.anchor_cache_dir", "engine.ds_config", "lora.base_path")


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

    def is_finished(self, steps: int) -> bool:
        """Return True if `--resume=auto` found a run that has done all its steps."""
        return self.auto and self.checkpoint is not None and self.step >= steps


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
    flags = dict(argument.partition("=")[::2] for argument in arguments)
    mode = flags.get("--resume", "false").lower()
    if mode not in ("true", "auto"):
        return ResumeChoice(list(arguments))
    if launched_world_size() > 1:
        init_process_group()
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
        moved = rank0_only(lambda: move_aside(run) if run.exists() else None)()
        messages = [f"warning: {reason}" for reason in skipped.values()]
        if moved:
            messages.append(f"no complete checkpoint in {run}: renamed it to {moved}; starting a new run")
        return ResumeChoice([a for a in arguments if not a.startswith("--resume=")], messages=tuple(messages))
    step, checkpoint = found
    # The same command starts and resumes a run; the initial policy is not needed to resume.
    replaced = ("--resume", "--config_path", *(("--policy.path",) if mode == "auto" else ()))
    kept = [argument for argument in arguments if argument.partition("=")[0] not in replaced]
    if "--output_dir" not in flags:
        kept.append(f"--output_dir={run}")
    kept += [f"--config_path={checkpoint / TRAIN_CONFIG_NAME}", "--resume=true"]
    messages = [f"warning: skipped: {reason}" for reason in skipped.values()]
    if Path(flags.get("--output_dir") or run).resolve() == run.resolve():
        messages += rank0_only(lambda: [f"renamed {path} to {move_aside(path)}" for path in skipped])()
    return ResumeChoice(kept, checkpoint, step, (*messages, f"resuming from {checkpoint}"), mode == "auto")


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
    """Return True for one path in two forms: checkpoints contain absolute paths."""
    return name in _PATHS and bool(old and new) and Path(old).resolve() == Path(new).resolve()


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

"""Which checkpoint a command goes on from, and whether it is the same run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lerobot.configs.train import TRAIN_CONFIG_NAME

from craft_ds.checkpoints import complete_checkpoints, verify_checkpoint
from craft_ds.checkpoints.run_directory import LAST, checkpoint_directories, move_aside
from craft_ds.distributed.collectives import init_process_group, rank0_only
from craft_ds.distributed.env import launched_rank, launched_world_size
from craft_ds.errors import UserError

# Another value of these makes another run of it.
_FIXED = ("policy.", "dataset.repo_id", "dataset.revision", "dataset.episodes")
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
# Where things lie, and how this command was given.
_NOT_LISTED = (
    "resume",
    "checkpoint_path",
    "verified_checkpoint",
    "job_name",
    "output_dir",
    "policy.pretrained_path",
)


class ResumeChoice(NamedTuple):
    """What a command line came down to.

    Attributes:
        arguments: It, with the checkpoint that was chosen.
        checkpoint: The checkpoint, verified; None: the run begins.
        step: Steps that it has done.
        said: What there is to say about the choice.
        begins_if_new: Whether `--resume=auto` was given, for which a finished run is no error.
    """

    arguments: list[str]
    checkpoint: Path | None = None
    step: int = 0
    said: tuple[str, ...] = ()
    begins_if_new: bool = False

    def is_finished(self, steps: int) -> bool:
        """Whether there is nothing to do for a command that may be given again and again."""
        return self.begins_if_new and self.checkpoint is not None and self.step >= steps


def choose_checkpoint(arguments: Sequence[str]) -> ResumeChoice:
    """Find and verify what `--resume` goes on from. Collective under a launcher: call on all ranks.

    `--resume=true` goes on from the checkpoint whose directory or `train_config.json` is `--config_path`, or
    from the newest whole one where that names a run's directory, its `last`, or nothing (then `--output_dir`
    does). `--resume=auto` goes on from the newest whole one of `--output_dir` and begins the run where there
    is none, so that the same command can be given again and again.

    Args:
        arguments: In the form of `normalise_arguments`.

    Raises:
        UserError: There is no such checkpoint, or the one that was named is damaged.
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
            raise UserError(
                "--resume=auto needs --output_dir, the directory of the run to begin or to go on with"
            )
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
            raise UserError(f"--resume=true: {run} holds no whole checkpoint{reasons}")
        moved = rank0_only(lambda: move_aside(run) if run.exists() else None)()
        said = [f"warning: {reason}" for reason in skipped.values()]
        said += [f"no whole checkpoint in {run}, which is {moved} now: the run begins anew"] if moved else []
        return ResumeChoice([a for a in arguments if not a.startswith("--resume=")], said=tuple(said))
    step, checkpoint = found
    # The same command begins a run and goes on with it: what the run began with has done its part.
    replaced = ("--resume", "--config_path", *(("--policy.path",) if mode == "auto" else ()))
    kept = [argument for argument in arguments if argument.partition("=")[0] not in replaced]
    if "--output_dir" not in flags:
        kept.append(f"--output_dir={run}")
    kept += [f"--config_path={checkpoint / TRAIN_CONFIG_NAME}", "--resume=true"]
    said = [f"warning: skipped: {reason}" for reason in skipped.values()]
    if Path(flags.get("--output_dir") or run).resolve() == run.resolve():
        said += rank0_only(lambda: [f"{path} is {move_aside(path)} now" for path in skipped])()
    return ResumeChoice(kept, checkpoint, step, (*said, f"going on from {checkpoint}"), mode == "auto")


def _named_run(config_path: Path | None, output_dir: str | None) -> Path | None:
    """The run whose newest checkpoint is meant; None: `config_path` names one checkpoint."""
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
    """`output_dir` of a configuration file. Whether that file is sound is for the parser to say."""
    if config_path is None:
        return None
    try:
        content = yaml.safe_load(config_path.read_text(encoding="utf-8"))
        return str(content["output_dir"]) if content["output_dir"] else None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _newest(run: Path) -> tuple[tuple[int, Path] | None, dict[Path, str]]:
    """The newest checkpoint of which every byte is right, and why others were passed over. Collective."""
    whole, skipped = rank0_only(complete_checkpoints)(run)
    for step, path in whole:
        try:
            verify_checkpoint(path, launched_rank(), launched_world_size())
        except UserError as error:
            skipped[path] = str(error)
        else:
            return (step, path), skipped
    return None, skipped


def changed_flags(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Flags that differ from those of a checkpoint, as `--flag=new (was old)`.

    Raises:
        UserError: One of them makes it another run.
    """
    before, now = _flat(saved), _flat(current)
    changed = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new or name in _NOT_LISTED or name.startswith("checkpoint_"):
            continue
        if name.endswith("tokenizer_name") and old and new and Path(old).name == Path(new).name:
            continue  # the checkpoint's own, wherever the checkpoint lies
        field = name.removeprefix("policy.")
        free = field != name and field.startswith(_FREE_OF_POLICY)
        if name.startswith(_FIXED) and not free:
            raise UserError(
                f"--{name}={_shown(new)}, but the checkpoint was trained with {_shown(old)}: leave the flag "
                "out, or begin a new run with --policy.path instead of --resume"
            )
        changed.append(f"--{name}={_shown(new)} (was {_shown(old)})")
    return changed


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
        )
    return flat


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

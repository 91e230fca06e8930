"""Runs that have nothing left to do when they are resumed: all steps done, or stopped early."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from craft_ds.algorithm.model_selection import EvalRecord, describe_stall, is_stalled
from craft_ds.checkpoints import read_states
from craft_ds.checkpoints.best_link import update_best_link
from craft_ds.checkpoints.load import damaged_state
from craft_ds.checkpoints.run_directory import FINAL, repair_last_link
from craft_ds.checkpoints.save import CRAFT_STATE
from craft_ds.config.train_config import TrainConfig
from craft_ds.training.resume import ResumeChoice
from craft_ds.training.train_state import read_evaluations


def finished_line(chosen: ResumeChoice, config: TrainConfig) -> str | None:
    """Return why `--resume=auto` has nothing to do; None if there is something to do.

    Args:
        chosen: From `resolve_resume`; its checkpoint is verified.
        config: The configuration with the flags of this command.

    Raises:
        UserError: The checkpoint's state is damaged.
    """
    if not chosen.auto or chosen.checkpoint is None:
        return None
    if chosen.step >= config.steps:
        return f"{chosen.checkpoint} has done all --steps={config.steps}: nothing to do"
    if not config.early_stop_patience:
        return None
    line = stopped_early_line(chosen.checkpoint, _evaluations(chosen.checkpoint), config)
    return f"{line}: nothing to do" if line else None


def stopped_early_line(
    checkpoint: Path, evaluations: Sequence[EvalRecord], config: TrainConfig
) -> str | None:
    """Return a description of a run that stopped early; None if it did not, or may continue now.

    Args:
        checkpoint: The checkpoint to resume from; a run that stopped early has a final one.
        evaluations: Those in its state.
        config: Its `early_stop_patience` decides.
    """
    if checkpoint.name != FINAL or not is_stalled(evaluations, config.early_stop_patience):
        return None
    return (
        f"{checkpoint} stopped early by --early_stop_patience={config.early_stop_patience}: "
        f"{describe_stall(evaluations)}"
    )


def repair_links(checkpoint: Path, config: TrainConfig) -> None:
    """Point `last` and `best` where they belong, in case the run died between two renames.

    Does nothing if the disk is not writable.

    Args:
        checkpoint: The final checkpoint of the run.
        config: The configuration with the flags of this command.
    """
    repair_last_link(checkpoint)
    if config.save_best:
        with contextlib.suppress(OSError):
            update_best_link(checkpoint.parent, _evaluations(checkpoint))


def _evaluations(checkpoint: Path) -> list[EvalRecord]:
    _, craft = read_states(checkpoint)
    try:
        return read_evaluations(craft)
    except (TypeError, ValueError) as error:
        raise damaged_state(checkpoint / CRAFT_STATE, error) from error

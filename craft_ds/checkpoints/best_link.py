"""The link `best` of a run: the lowest held-out task loss among checkpoints that satisfy the constraint."""

from collections.abc import Sequence
from pathlib import Path

from craft_ds.algorithm.model_selection import EvalRecord, best_record
from craft_ds.checkpoints.run_directory import BEST, LINKS, complete_checkpoints, point_link_at


def best_checkpoint(output_dir: Path, evaluations: Sequence[EvalRecord]) -> tuple[EvalRecord, Path] | None:
    """Return the best checkpoint of a run and its evaluation; None if no checkpoint was evaluated.

    Args:
        output_dir: The run's directory; its complete checkpoints are the candidates.
        evaluations: The run's evaluations. A checkpoint without one at its step is not a candidate.
    """
    complete, _ = complete_checkpoints(output_dir)
    paths = {step: path for step, path in complete if path.name not in LINKS}
    record = best_record(record for record in evaluations if record.step in paths)
    return None if record is None else (record, paths[record.step])


def update_best_link(output_dir: Path, evaluations: Sequence[EvalRecord]) -> Path | None:
    """Point the link `best` at the best checkpoint, if the file system has symbolic links.

    Without a candidate, a link of that name is removed. Anything but a link is moved aside, with a warning.

    Returns:
        The best checkpoint; None if there is none.

    Raises:
        OSError: The disk is full or not writable.
    """
    link = output_dir / BEST
    found = best_checkpoint(output_dir, evaluations)
    if found is None:
        if link.is_symlink():
            link.unlink()
        return None
    _, best = found
    if not (link.is_symlink() and link.readlink() == Path(best.name)):
        point_link_at(link, best)
    return best

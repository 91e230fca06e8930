"""Number of anchors per task and split: what is preserved, and what the constraint measures."""

from collections import Counter
from collections.abc import Sequence

from craft_ds.anchors.cache import SPLITS
from craft_ds.anchors.cache_list import Anchors
from craft_ds.config.craft_config import CraftConfig
from craft_ds.errors import UserError


def count_by_task(cache: Anchors) -> dict[str, list[int]]:
    """Return the number of anchors of each task, by split, in the order of `cache.tasks`."""
    counted = {split: Counter(cache.task[cache.splits[split]].tolist()) for split in SPLITS}
    return {split: [counted[split][task] for task in range(len(cache.tasks))] for split in SPLITS}


def trained_tasks(cache: Anchors) -> list[str]:
    """Return the texts of the tasks with training anchors."""
    counts = count_by_task(cache)["train"]
    return list(dict.fromkeys(text for text, count in zip(cache.tasks, counts, strict=True) if count))


def check_task_constraints(cache: Anchors, craft: CraftConfig) -> None:
    """Check that the constraint of every task can be measured and has a unit (`multiplier_scope=task`).

    Args:
        cache: The anchors.
        craft: `constraint_split`, `epsilon_relative`, `multiplier_scope` and `retention_loss` are read.

    Raises:
        UserError: A task has no anchors in the split of the constraint, or no L0.
    """
    if craft.multiplier_scope != "task":
        return
    split, tasks = craft.constraint_split, trained_tasks(cache)
    counts = dict(zip(cache.tasks, count_by_task(cache)[split], strict=True))
    if unmeasured := [task for task in tasks if not counts[task]]:
        raise UserError(
            f"--craft.multiplier_scope=task: anchor cache {cache.path} has no {split} anchors of "
            f"{named_tasks(unmeasured)}, so that L_ret of each task cannot be measured: build anchors of at "
            "least two episodes per task, or set --craft.constraint_split=train"
        )
    losses = cache.loss_of(craft.retention_loss)[split]["by_task"]
    if craft.epsilon_relative and (without := [task for task in tasks if task not in losses]):
        raise UserError(
            f"--craft.multiplier_scope=task with --craft.epsilon_relative=true: anchor cache {cache.path} "
            f"records no teacher's loss of {named_tasks(without)}: give an absolute ε, or build it again"
        )


def coverage_table(cache: Anchors) -> list[str]:
    """Return the lines of a table of the anchors per task and split, with the teacher's own loss L0."""
    counts = count_by_task(cache)
    losses = cache.teacher_loss["all"]["by_task"]
    texts = [repr(text if len(text) <= 60 else text[:57] + "...") for text in cache.tasks]
    width = max(len("task"), *map(len, texts))
    lines = [f"{'task':<{width}}  train  heldout      L0"]
    for text, shown, train, heldout in zip(cache.tasks, texts, *counts.values(), strict=True):
        loss = f"{losses[text]:.4f}" if text in losses else "-"
        lines.append(f"{shown:<{width}}  {train:5}  {heldout:7}  {loss:>6}")
    return lines


def check_enough(cache: Anchors, split: str, world_size: int) -> None:
    """Check that a split gives every rank an anchor.

    Raises:
        UserError: It has fewer anchors than there are ranks.
    """
    count = len(cache.splits[split])
    if count >= world_size:
        return
    if split == "heldout" and count == 0:
        raise UserError(
            f"anchor cache {cache.path} has 0 heldout anchors to measure the constraint: measure it on the "
            "trained ones by --craft.constraint_split=train, or build a cache of tasks with at least two "
            "episodes by `craft-ds anchors --heldout_fraction=0.2`"
        )
    raise UserError(
        f"anchor cache {cache.path} has {count} {split} anchors for {world_size} ranks: build a cache "
        "with more (`craft-ds anchors --num_samples --heldout_fraction`) or start fewer ranks"
    )


def check_coverage(cache: Anchors, constraint_split: str, world_size: int) -> None:
    """Check that every old task has anchors that give a gradient, and that the constraint can be measured.

    Args:
        cache: The anchors.
        constraint_split: `--craft.constraint_split`.
        world_size: Number of ranks.

    Raises:
        UserError: A task has no training anchors, or a split has fewer anchors than there are ranks.
    """
    for split in {"train": None, constraint_split: None}:
        check_enough(cache, split, world_size)
    trained = count_by_task(cache)["train"]
    without = [
        text
        for text, train, available in zip(cache.tasks, trained, cache.task_frames, strict=True)
        if not train and available
    ]
    if without:
        raise UserError(
            f"anchor cache {cache.path} has no training anchors of {named_tasks(without)}, which nothing "
            "would preserve: build the cache again with a larger `craft-ds anchors --num_samples`"
        )


def coverage_warnings(cache: Anchors, constraint_split: str) -> list[str]:
    """Return warnings of tasks that the constraint does not measure.

    Args:
        cache: The anchors.
        constraint_split: `--craft.constraint_split`.
    """
    if constraint_split != "heldout":
        return []
    if not cache.splits["heldout"]:
        return ["warning: no anchors are held out: train with --craft.constraint_split=train"]
    counts = count_by_task(cache)
    unmeasured = [
        text
        for text, train, heldout in zip(cache.tasks, *counts.values(), strict=True)
        if train and not heldout
    ]
    if not unmeasured:
        return []
    return [
        f"warning: no held-out anchors of {named_tasks(unmeasured)}, which the constraint does not measure: "
        "build anchors of at least two episodes per task, or set --craft.constraint_split=train"
    ]


def named_tasks(texts: Sequence[str]) -> str:
    """Return the texts of tasks for a message, at most five of them."""
    shown = ", ".join(repr(text[:60]) for text in texts[:5])
    more = f" and {len(texts) - 5} more" if len(texts) > 5 else ""
    return f"task{'s' if len(texts) > 1 else ''} {shown}{more}"

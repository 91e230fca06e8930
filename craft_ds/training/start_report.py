"""Lines that a run prints before its first step: what it trains, on what, and how much."""

from collections.abc import Sequence
from pathlib import Path

from lerobot.datasets.lerobot_dataset import LeRobotDataset

import craft_ds
from craft_ds.anchors.cache_list import Anchors
from craft_ds.anchors.coverage import count_by_task
from craft_ds.config.craft_config import CraftConfig
from craft_ds.config.train_config import TrainConfig
from craft_ds.data.mixture import mixture_weights
from craft_ds.data.task_texts import UNUSED
from craft_ds.distributed.env import launched_world_size
from craft_ds.policies.pi0_fast.retention import RETENTION_LOSSES
from craft_ds.training.train_state import Progress

_NEVER_BINDS = 3.0
_NEVER_MET = 0.9


def first_line(config: TrainConfig) -> str:
    """Return the line that a run prints before it opens anything."""
    ranks = launched_world_size()
    return (
        f"craft-ds {craft_ds.__version__}: {config.steps} steps on {ranks} rank{'s' if ranks > 1 else ''}, "
        f"writing to {config.output_dir or 'outputs/'}"
    )


def dataset_lines(
    config: TrainConfig, parts: Sequence[tuple[LeRobotDataset, LeRobotDataset | None]]
) -> list[str]:
    """Return a line for each data set of a run, of a mixture with its share of the samples.

    Args:
        config: The configuration of the run.
        parts: For each data set, the episodes that train and those held out, as for `dataset_line`.
    """
    if not config.datasets:
        return [dataset_line(*part) for part in parts]
    weights = mixture_weights(config) or [len(train) for train, _ in parts]
    shares = [weight / sum(weights) for weight in weights]
    return [
        dataset_line(*part, name=f"data set {source.repo_id} ({share:.1%} of the samples)")
        for part, source, share in zip(parts, config.datasets, shares, strict=True)
    ]


def dataset_line(train: LeRobotDataset, heldout: LeRobotDataset | None, name: str = "data set") -> str:
    """Return the data set's size, its held-out episodes and its tasks.

    Args:
        train: The episodes that train.
        heldout: The episodes held out for `--eval_freq`; None: none.
        name: Words that the line begins with.
    """
    held_out = ""
    if heldout is not None:
        count, total = heldout.num_episodes, train.num_episodes + heldout.num_episodes
        held_out = (
            f", {len(heldout)} held out ({_episodes(heldout.episodes or [])}: {count} of {total} episodes, "
            f"{count / total:.0%})"
        )
    tasks = [] if train.meta.tasks is None else [text for text in train.meta.tasks.index if text != UNUSED]
    return f"✓ {name}: {train.num_episodes} episodes, {len(train)} samples{held_out}; {_texts(tasks)}"


def heldout_lines(asked: float, train: int, heldout: int) -> list[str]:
    """Return a warning if the share that is held out is far from the one that was asked for.

    LeRobot holds out the last episodes of every task, rounded up to at least one per task.

    Args:
        asked: `--dataset.eval_split`.
        train: Episodes that train.
        heldout: Episodes that are held out.
    """
    share = heldout / (train + heldout)
    if share <= 1.5 * asked:
        return []
    return [
        f"warning: {share:.0%} of the episodes are held out for --eval_freq, not --dataset.eval_split="
        f"{asked:g}: at least one episode per task is; choose --dataset.episodes, or record more of each task"
    ]


def anchor_line(cache: Anchors, craft: CraftConfig) -> str:
    """Return the number of anchors by task and split, and L0, the teacher's own loss, by task."""
    losses = cache.loss_of(craft.retention_loss)[craft.constraint_split]["by_task"]
    by_task = "; ".join(
        f"{text[:40]!r} {train} + {heldout} held out"
        + (f" (L0 {_loss(losses[text])})" if text in losses else "")
        for text, train, heldout in zip(cache.tasks, *count_by_task(cache).values(), strict=True)
    )
    held_out = len(cache.splits["heldout"])
    return f"✓ anchors: {len(cache.splits['train'])} + {held_out} held out; {by_task}"


def precision_lines(dtype: str, device_type: str) -> list[str]:
    """Return what bfloat16 would bring to a run in float32 on a GPU.

    Args:
        dtype: `--engine.dtype`.
        device_type: Type of the device that trains, such as `cuda`.
    """
    if device_type != "cuda" or dtype != "float32":
        return []
    return [
        "this run computes in fp32: --engine.dtype=bfloat16 would halve activations and gathered parameters, "
        "and keep fp32 master weights"
    ]


def size_lines(config: TrainConfig, progress: Progress, samples: int, world_size: int) -> list[str]:
    """Return the effective batch with its factors, and the steps with their epochs.

    Args:
        config: A validated configuration.
        progress: Has the size of a step, which a resumed run keeps on another number of ranks.
        samples: Samples of the data set that train.
        world_size: Number of ranks.
    """
    batch = progress.samples_per_step
    factors = (config.batch_size, config.gradient_accumulation_steps, world_size)
    named = " × ".join(
        f"{value} {name}"
        for value, name in zip(factors, ("batch_size", "accumulation", "ranks"), strict=True)
    )
    kept = "" if batch == factors[0] * factors[1] * factors[2] else ", kept from the checkpoint"
    lines = [f"effective batch: {batch} samples per step ({named}{kept})"]
    epochs = config.steps * batch / samples
    line = f"{config.steps} steps, {epochs:.3g} epochs"
    if config.craft.enabled:
        every, anchors = str(config.craft.retention_freq), progress.anchors_per_step
        if config.craft.retention_freq_max:
            every += f" to {config.craft.retention_freq_max}"
        line += f"; a retention step every {every}, {anchors} anchors each"
        if config.one_gradient:
            line += ", both losses in one gradient: no cosine is measured"
    return [*lines, line, f"output: {Path(config.output_dir)}"]


def epsilon_lines(craft: CraftConfig, teacher_loss: float) -> list[str]:
    """Return ε against L0, with a warning if the constraint can never bind or never be met.

    A policy does not stay far below the teacher's own loss on anchors that it does not train on: an ε below
    0.9 · L0 drives λ to `lambda_max`. Plain fine-tuning of the embedded Meta-World teacher ends at about
    2 · L0, so an ε that stays above 3 · L0 protects nothing.

    Args:
        craft: The ε flags.
        teacher_loss: L0 on the anchors that measure the constraint.
    """
    unit = teacher_loss if craft.epsilon_relative else 1.0
    start, end = craft.epsilon_start * unit, craft.epsilon_end * unit
    if RETENTION_LOSSES[craft.retention_loss].zero_for_teacher:
        return [f"ε: {_loss(start)} to {_loss(end)}; the teacher's own {craft.retention_loss} is 0"]
    lines = [f"ε: {_loss(start)} to {_loss(end)}; the teacher's own loss L0 is {_loss(teacher_loss)}"]
    advice = "set --craft.epsilon_relative=true --craft.epsilon_start=1.3 --craft.epsilon_end=1.1"
    if teacher_loss == 0:
        lines.append("warning: L0 is 0, so that no ε can be given relative to it: set an absolute one")
    elif end >= _NEVER_BINDS * teacher_loss:
        lines.append(
            f"warning: ε ends at {end / teacher_loss:.3g} times L0 and may never bind, which would protect "
            f"nothing: {advice}"
        )
    elif end < _NEVER_MET * teacher_loss:
        lines.append(f"warning: ε ends below L0 and may never be met, so that λ grows: {advice}")
    return lines


def _loss(value: float) -> str:
    """Format a loss with three decimals, a small one with three digits."""
    return f"{value:.3f}" if value >= 0.1 or value == 0 else f"{value:.3g}"


def _episodes(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:12])) + (f", … {numbers[-1]}" if len(numbers) > 12 else "")
    return f"episode{'s' if len(numbers) != 1 else ''} {shown}"


def _texts(tasks: list[str]) -> str:
    shown = ", ".join(repr(text[:60]) for text in tasks[:3])
    more = f", and {len(tasks) - 3} more" if len(tasks) > 3 else ""
    return f"{len(tasks)} task{'s' if len(tasks) != 1 else ''}: {shown}{more}"

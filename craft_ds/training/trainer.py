"""The training loop. It reads like the algorithm; what it needs is set up in `craft_ds.training.build`."""

import math
import time
from pathlib import Path

from craft_ds.algorithm.multiplier import RetentionRecord, epsilon_at
from craft_ds.config.configs import CraftConfig
from craft_ds.config.train_config import TrainConfig
from craft_ds.training.build import open_run
from craft_ds.training.run import Run, seed_step
from craft_ds.training.train_step import RetentionResult, StepResult, retention_step, task_step


def train_craft(config: TrainConfig, craft_config: CraftConfig | None = None) -> Path:
    """Fine-tune a policy on a new task under a retention constraint on the old ones.

    Minimises L_task(θ) subject to L_ret(θ) ≤ ε(t): every `retention_freq`-th step is a retention step,
    which merges the gradients of both losses and moves the multiplier λ by dual ascent. With
    `craft.enabled=false` every step is a plain task step and no anchor is read.

    Collective under a launcher (`torchrun`, `deepspeed`): call on all ranks.

    Args:
        config: The run, as `lerobot-train` knows it, with craft-ds's additions.
        craft_config: Takes the place of `config.craft`.

    Returns:
        The directory of the final checkpoint.

    Raises:
        UserError: Bad input, found before anything is written.
        RankLost: Another rank has failed, died or hangs.
        Preempted: The run was asked to leave, and has saved.
        TrainingDiverged: More than `max_skipped_steps` steps in a row were not finite.
    """
    if craft_config is not None:
        config.craft = craft_config
    with open_run(config) as run:
        run.watchdog.progress()
        for step in range(run.progress.step, config.steps):
            began = time.perf_counter()
            seed_step(config.seed or 0, step, run.engine.rank)
            result, retention = _one_step(run, step)
            if result.applied:
                run.advance_scheduler()
            run.record(result, retention, seconds=time.perf_counter() - began)
            run.after_step(leave=result.leave)
        return run.finish()


def _one_step(run: Run, step: int) -> tuple[StepResult, RetentionRecord | None]:
    """Task step or retention step, and the dual step that follows the latter."""
    craft, dual, leave = run.config.craft, run.dual, run.preemption.requested
    batches = run.task_batches()
    if run.anchors is None or step % craft.retention_freq:
        return task_step(run.engine, batches, run.max_norm, leave), None

    epsilon = run.anchors.epsilon_unit * epsilon_at(step, run.config.steps, craft)
    result, seen = retention_step(
        run.engine,
        batches,
        run.anchors.gradient_batches(run.progress.anchors_seen),
        run.anchors.constraint_batches(run.progress.anchors_seen),
        dual.multiplier,
        craft,
        run.max_norm,
        leave,
    )
    record = _record(step, dual.multiplier, epsilon, seen)
    if result.applied:
        dual.update(record)
    return result, record


def _record(step: int, multiplier: float, epsilon: float, seen: RetentionResult) -> RetentionRecord:
    merged = seen.merge
    return RetentionRecord(
        step=step + 1,
        lambda_=multiplier,
        epsilon=epsilon,
        retention_loss=seen.loss,
        conflict=merged.conflict,
        cos=merged.cosine,
        retention_weight=merged.b / merged.a if merged.a else math.nan,
        dot=seen.triple.tr,
    )

"""The training loop. It reads like the algorithm; `craft_ds.training.build` sets up what it needs."""

import math
import time
from functools import partial
from pathlib import Path

from craft_ds.algorithm.multiplier import RetentionRecord, TaskRecord, epsilon_at
from craft_ds.anchors.stream import AnchorStream
from craft_ds.config.craft_config import CraftConfig
from craft_ds.config.train_config import TrainConfig
from craft_ds.training.build import open_run
from craft_ds.training.joint_step import joint_step
from craft_ds.training.run import Run, seed_step
from craft_ds.training.train_step import StepResult, retention_step, task_step


def train_craft(config: TrainConfig, craft_config: CraftConfig | None = None) -> Path:
    """Fine-tune a policy on a new task under a retention constraint on the old ones.

    Minimises L_task(θ) subject to L_ret(θ) ≤ ε(t): every `retention_freq`-th step, or with an adaptive
    interval a rarer one, is a retention step, which merges the gradients of both losses and updates the
    multiplier λ by dual ascent. With `craft.enabled=false` every step is a plain task step and no anchor is
    read.

    Collective under a launcher (`torchrun`, `deepspeed`): call on all ranks.

    Args:
        config: The run's configuration: LeRobot's, with craft-ds's additions.
        craft_config: Replaces `config.craft`.

    Returns:
        The directory of the final checkpoint.

    Raises:
        UserError: Bad input, found before anything is written; or a bad sample.
        RankLost: Another rank has failed, died or hangs.
        Preempted: The run was asked to stop, and has saved.
        TrainingDiverged: More than `max_skipped_steps` steps in a row were non-finite.
    """
    if craft_config is not None:
        config.craft = craft_config
    with open_run(config) as run:
        train(run)
        return run.finish()


def train(run: Run) -> None:
    """Run the remaining steps. Collective: call on all ranks.

    Raises:
        Preempted: The run was asked to stop, and has saved.
        TrainingDiverged: More than `max_skipped_steps` steps in a row were non-finite.
        UserError: A sample is bad, and bad samples are errors.
    """
    config, craft, anchors, dual, schedule = run.config, run.config.craft, run.anchors, run.dual, run.schedule
    run.watchdog.progress()
    for step in range(run.progress.step, config.steps):
        started = time.perf_counter()
        seed_step(config.seed or 0, step, run.engine.rank)
        votes = run.votes()  # summed over ranks in the step's all-reduce
        record = None

        if anchors is None or not schedule.due(step):
            result = task_step(run.engine, run.task_batches(votes), run.max_norm, votes, run.penalty)
        else:
            epsilon = epsilon_at(step, config.steps, craft)  # in the units that `anchors` has
            seen = run.progress.anchors_seen
            if config.one_gradient:
                take_step = partial(joint_step, anchor_tokens=anchors.tokens(seen))
            else:
                scale = schedule.retention_scale(step)
                take_step = partial(retention_step, retention_scale=scale, penalty=run.penalty)
            result = take_step(
                run.engine,
                task=run.task_batches(votes),
                anchors=anchors.gradient_batches(seen),
                constraint=anchors.constraint_batches(seen),
                multiplier=dual.in_step(anchors.epsilon_unit * epsilon),
                craft=craft,
                max_norm=run.max_norm,
                anchor_loss=anchors.step_loss,
                extra=votes,
            )
            record = _record(step, epsilon, anchors, result)
            if result.applied:
                dual.ascend(record)  # by default λ ← clip(λ + lambda_lr · (L_ret − ε), 0, lambda_max)
            schedule.advance(step, slack=record.slack if result.applied else False)

        stop, replaced = result.extra
        run.count_bad_samples(replaced)
        if result.applied:
            run.advance_scheduler()
            run.update_average()
        run.record(result, record, seconds=time.perf_counter() - started)
        run.after_step(stop=stop > 0)
        if run.stopped_early:
            break


def _record(step: int, epsilon: float, anchors: AnchorStream, result: StepResult) -> RetentionRecord:
    assert result.merged is not None
    assert result.multiplier is not None
    return RetentionRecord(
        step=step + 1,
        lambda_=result.multiplier,
        epsilon=anchors.epsilon_unit * epsilon,
        retention_loss=math.nan if result.retention_loss is None else result.retention_loss,
        conflict=result.merged.conflict,
        cos=result.merged.cosine,
        retention_weight=result.merged.retention_weight,
        dot=math.nan if result.triple is None else result.triple.tr,
        removed=result.merged.removed,
        conflict_share=result.merged.conflict_share,
        tasks=tuple(
            TaskRecord(multiplier, unit * epsilon, loss)
            for multiplier, unit, loss in zip(
                result.task_multipliers, anchors.task_epsilon_units, result.task_losses, strict=True
            )
        ),
    )

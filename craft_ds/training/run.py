"""A training run: what the loop calls around the algorithm."""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.optim.lr_scheduler import LRScheduler

from craft_ds.algorithm.model_selection import EvalRecord, describe_stall, is_stalled
from craft_ds.algorithm.multiplier import DualState, RetentionRecord
from craft_ds.algorithm.penalty import QuadraticPenalty
from craft_ds.algorithm.retention_schedule import RetentionSchedule
from craft_ds.algorithm.task_multipliers import TaskDualState
from craft_ds.anchors.stream import AnchorStream
from craft_ds.config.train_config import TrainConfig
from craft_ds.data.read_ahead import Counted
from craft_ds.distributed.collectives import destroy_process_group, gather_objects
from craft_ds.distributed.preemption import Preemption
from craft_ds.distributed.watchdog import RankWatchdog
from craft_ds.engines.base import Batch, Engine
from craft_ds.errors import Preempted, TrainingDiverged
from craft_ds.training.bad_samples import BadSampleLog
from craft_ds.training.checkpointer import Checkpointer
from craft_ds.training.evaluator import Evaluator
from craft_ds.training.metrics import MetricsLogger, peak_memory_bytes
from craft_ds.training.resume import resume_command
from craft_ds.training.step_profiler import StepProfiler
from craft_ds.training.task_stream import TaskStream
from craft_ds.training.train_state import Progress, TrainState
from craft_ds.training.train_step import StepResult
from craft_ds.training.weight_average import WeightAverage

DUMP = "diverged.json"


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch by step and rank alone: a resumed run draws the same numbers as an uninterrupted one."""
    torch.manual_seed((seed * 1_000_003 + step) * 4099 + rank)


@dataclass
class Run:
    """A training run on one rank: the parts that the training loop uses.

    Attributes:
        config: The validated configuration.
        engine: Model, optimizer and ranks.
        state: Progress and λ, as saved in `craft_state.pt`.
        tasks: Samples of the new task.
        anchors: Anchors of the old tasks; None for the baseline.
        penalty: Penalty on the distance from the start; None: none.
        average: Moving average of the weights; None: none.
        scheduler: Learning-rate schedule; None: constant.
        logger: Metrics and log lines.
        evaluator: Evaluates every `eval_freq` steps, and with `save_best` before every save.
        checkpointer: Saves every `save_freq` steps, on preemption and at the end.
        preemption: Tells if this rank was asked to stop.
        watchdog: Detects failed ranks.
        bad_samples: Stops the run at a bad sample, or logs it.
        profiler: Records some steps; None: none.
        owns_process_group: True if the run created the process group; it must then destroy it.
    """

    config: TrainConfig
    engine: Engine
    state: TrainState
    tasks: TaskStream
    anchors: AnchorStream | None
    penalty: QuadraticPenalty | None
    average: WeightAverage | None
    scheduler: LRScheduler | None
    logger: MetricsLogger
    evaluator: Evaluator
    checkpointer: Checkpointer
    preemption: Preemption
    watchdog: RankWatchdog
    bad_samples: BadSampleLog
    profiler: StepProfiler | None
    owns_process_group: bool
    _first_step_logged: bool = False
    _seconds: list[float] = field(default_factory=list)
    _skipped: list[dict[str, Any]] = field(default_factory=list)

    @property
    def progress(self) -> Progress:
        """Counters of the run."""
        return self.state.progress

    @property
    def dual(self) -> DualState:
        """λ and its history."""
        return self.state.dual

    @property
    def schedule(self) -> RetentionSchedule:
        """When retention steps are due."""
        return self.state.schedule

    @property
    def output_dir(self) -> Path:
        """Directory of the run."""
        return Path(self.config.output_dir)

    @property
    def max_norm(self) -> float:
        """Norm to which gradients are clipped."""
        assert self.config.optimizer is not None
        return self.config.optimizer.grad_clip_norm

    def votes(self) -> list[float]:
        """Return what is summed over ranks with a step: asked to stop, and the number of replaced samples."""
        return [float(self.preemption.requested), 0.0]

    def task_batches(self, votes: list[float]) -> Counted[Batch]:
        """Return this rank's micro-batches of the next step.

        Args:
            votes: From `votes`; the replaced samples are added while batches are read.
        """
        return self.tasks.next_step(votes)

    def count_bad_samples(self, replaced: float) -> None:
        """Stop at bad samples, or count and log them. Collective: call on all ranks, after every step.

        Args:
            replaced: Samples of all ranks that were replaced in the step.

        Raises:
            UserError: A sample is bad, and bad samples are errors.
        """
        self.bad_samples.settle(replaced, self.tasks.take_bad())
        self.progress.bad_samples += int(replaced)

    def record(self, result: StepResult, retention: RetentionRecord | None, *, seconds: float) -> None:
        """Count a step; every `log_freq` steps, log its metrics.

        Raises:
            TrainingDiverged: More than `max_skipped_steps` steps in a row were skipped.
        """
        self.watchdog.progress()
        progress = self.progress
        position = (progress.samples_seen, progress.anchors_seen)
        progress.advance(result, retention=retention is not None)
        self._seconds.append(seconds)
        if self.profiler is not None:
            self.profiler.after_step(seconds)
        if retention is not None:
            progress.latest |= {
                "craft/lambda": retention.lambda_,
                "craft/epsilon": retention.epsilon,
                "craft/retention_weight": retention.retention_weight,
                **self._scoped(retention),
            }
        if result.applied:
            self._applied()
        else:
            self._skip(result, retention, *position)
        self.logger.advance()
        if self.config.log_freq > 0 and progress.step % self.config.log_freq == 0:
            self.logger.log(
                progress.step,
                {
                    "train/loss": progress.take_mean_loss(),
                    "train/grad_norm": result.grad_norm,
                    "train/lr": self.engine.optimizer.param_groups[0]["lr"],
                    "train/skipped_steps": progress.skipped,
                    "train/bad_samples": progress.bad_samples,
                    "train/samples_seen": progress.samples_seen,
                    "train/tokens_seen": progress.tokens_seen,
                    **({} if self.penalty is None else {"penalty/loss": result.penalty_loss}),
                    **progress.latest,
                    **progress.take_conflict_metrics(self.dual.history),
                    **self._times(),
                    "memory/peak_mb": peak_memory_bytes(self.engine.device) / 2**20,
                },
            )

    def _scoped(self, retention: RetentionRecord) -> dict[str, float]:
        """Return what only some retention steps have: L_ret, two gradients, layers, tasks, an interval."""
        craft, metrics = self.config.craft, dict[str, float]()
        if not math.isnan(retention.retention_loss):  # else the last measured one stays
            metrics["craft/retention_loss"] = retention.retention_loss
        if not math.isnan(retention.cos):
            metrics |= {
                "craft/grad_conflict": float(retention.conflict),
                "craft/grad_dot": retention.dot,
                "craft/grad_cos": retention.cos,
            }
        if craft.surgery_scope == "layer":
            metrics["craft/layer_conflict"] = retention.conflict_share
        if craft.retention_freq_max:
            metrics["craft/retention_interval"] = self.schedule.interval
        if isinstance(self.dual, TaskDualState):
            for text, task in zip(self.dual.tasks, retention.tasks, strict=True):
                metrics[f"craft/lambda/{text}"] = task.lambda_
                if not math.isnan(task.retention_loss):  # else the last measured one stays
                    metrics[f"craft/retention_loss/{text}"] = task.retention_loss
        return metrics

    def _times(self) -> dict[str, float]:
        """Return the mean times since the last logged step, in LeRobot's terms, and the wall-clock time."""
        steps, seconds, data_s = len(self._seconds), sum(self._seconds), self.tasks.take_seconds()
        if self.anchors is not None:
            data_s += self.anchors.take_seconds()
        self._seconds.clear()
        return {
            "time/step_s": seconds / steps,
            "time/data_s": data_s / steps,
            "time/update_s": (seconds - data_s) / steps,
            "time/samples_per_s": self.progress.samples_per_step * steps / seconds,
            "time/unix_s": time.time(),
        }

    def _applied(self) -> None:
        self._skipped.clear()
        if not self._first_step_logged:
            self._first_step_logged = True
            for line in ("forward pass", "backward pass", "optimizer step"):
                self.logger.say(f"✓ {line}")

    def _skip(
        self, result: StepResult, retention: RetentionRecord | None, samples: int, anchors: int
    ) -> None:
        step = self.progress.step
        seen: dict[str, Any] = {
            "step": step,
            "loss": str(result.loss),
            "grad_norm": str(result.grad_norm),
            "samples": self.tasks.indices(samples),
        }
        if retention is not None and self.anchors is not None:
            seen |= {
                "retention_loss": str(retention.retention_loss),
                "anchors": self.anchors.indices(anchors),
            }
        self._skipped.append(seen)
        self.logger.say(f"step {step} skipped, non-finite: {json.dumps(seen)}")
        if self.progress.skipped_in_a_row > self.config.max_skipped_steps:
            dump = self.output_dir / DUMP
            content = {
                "skipped": self._skipped,
                "lambda": self.dual.multiplier,
                "latest": {key: str(value) for key, value in self.progress.latest.items()},
                "config": self.config.to_dict(),
            }
            self.logger.write(dump, json.dumps(content, indent=1))
            raise TrainingDiverged(
                f"{self.progress.skipped_in_a_row} steps in a row up to step {step} had a non-finite loss or "
                f"gradient (--max_skipped_steps={self.config.max_skipped_steps}): look at their "
                f"samples in {dump}, or lower the learning rate, and resume from {self.output_dir / 'last'}"
            )

    def advance_scheduler(self) -> None:
        """Advance the learning-rate schedule by one step."""
        if self.scheduler is not None:
            self.scheduler.step()

    def update_average(self) -> None:
        """Move the average of the weights, if there is one, towards the present weights."""
        if self.average is not None:
            self.average.update()

    def after_step(self, *, stop: bool) -> None:
        """Evaluate and save if due after this step. Collective: call on all ranks.

        Args:
            stop: A rank was asked to stop: save now and exit.

        Raises:
            Preempted: With `stop`, after everything is saved.
            UserError: With `stop`, if the checkpoint cannot be written.
        """
        config, step = self.config, self.progress.step
        self.checkpointer.report_finished_saves()
        is_last = step >= config.steps
        saves = config.save_checkpoint and config.save_freq > 0 and step % config.save_freq == 0
        if (config.eval_freq and step % config.eval_freq == 0) or (config.save_best and (saves or is_last)):
            self._evaluate()
        if is_last:
            return
        if self.stopped_early:
            self.logger.say(f"stopping early at step {step}: {describe_stall(self.state.evaluations)}")
            return
        if stop:
            self._save_and_exit()
        if saves:
            self.checkpointer.save_periodic()

    @property
    def stopped_early(self) -> bool:
        """True if the evaluation after the last step ends the run: the same on all ranks."""
        evaluations = self.state.evaluations
        evaluated = bool(evaluations) and evaluations[-1].step == self.progress.step
        return evaluated and is_stalled(evaluations, self.config.early_stop_patience)

    def _evaluate(self) -> None:
        metrics = self.evaluator.evaluate(self.progress.step)
        if "eval/task_loss" in metrics:
            retention = metrics.get("eval/retention_loss", metrics.get("eval/anchor_loss"))
            record = EvalRecord(
                self.progress.step, metrics["eval/task_loss"], retention, metrics.get("eval/epsilon")
            )
            self.state.evaluations.append(record)
        self.logger.log(self.progress.step, metrics)

    def _save_and_exit(self) -> NoReturn:
        if not self.config.save_checkpoint:
            raise Preempted(f"{self.preemption.reason}: nothing saved (--save_checkpoint=false)")
        saved = self.checkpointer.save_before_exit()
        raise Preempted(
            f"{self.preemption.reason}: saved {saved}; resume with: {resume_command(self.output_dir)}"
        )

    def finish(self) -> Path:
        """Log peak memory and write the final checkpoint. Collective: call on all ranks.

        Returns:
            The checkpoint's directory, or the run's if `save_checkpoint` is false.
        """
        peaks = gather_objects(peak_memory_bytes(self.engine.device) / 2**20)
        self.logger.say("peak memory per rank: " + ", ".join(f"{peak:.0f} MiB" for peak in peaks))
        summary = {"memory/peak_mb": max(peaks)}
        if self.anchors is not None:
            summary["craft/lambda_final"] = self.dual.multiplier  # after the last dual step
        self.logger.log(self.progress.step, summary)
        if not self.config.save_checkpoint:
            return self.output_dir
        return self.checkpointer.save_final()

    def close_alone(self) -> None:
        """Close what needs no other rank: the streams of samples and anchors, the profile, and the log."""
        self.tasks.close()
        if self.anchors is not None:
            self.anchors.close()
        if self.profiler is not None:
            self.profiler.close()
        self.logger.close()

    def close(self) -> None:
        """Close the streams, the log, the watchdog, the engine and the process group.

        Collective: call on all ranks.
        """
        self.close_alone()
        self.watchdog.close()
        self.engine.close()
        if self.owns_process_group:
            destroy_process_group()

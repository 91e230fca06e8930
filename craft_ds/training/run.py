"""A training run: everything around the loop."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.processor import PolicyProcessorPipeline
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from craft_ds.algorithm.multiplier import DualState, RetentionRecord
from craft_ds.anchors.stream import AnchorStream
from craft_ds.checkpoints import BackgroundSaver, prepare_checkpoint, step_directory
from craft_ds.checkpoints.run_directory import FINAL
from craft_ds.checkpoints.save import PendingCheckpoint
from craft_ds.config.train_config import TrainConfig
from craft_ds.data.batch_partition import StepPartition
from craft_ds.data.task_data import StepSampler, heldout_batches, images_to_float
from craft_ds.distributed.collectives import destroy_process_group, gather_objects
from craft_ds.distributed.preemption import Preemption
from craft_ds.distributed.watchdog import RankWatchdog
from craft_ds.engines.base import Batch, Engine
from craft_ds.errors import Preempted, TrainingDiverged, UserError
from craft_ds.lora.adapters import Adapters
from craft_ds.training.metrics import MetricsLogger, peak_memory_bytes
from craft_ds.training.plots import plot_lambda_analysis
from craft_ds.training.train_state import Progress
from craft_ds.training.train_step import StepResult, TokenSums, measure
from craft_ds.training.world_eval import evaluate_in_world

HISTORY_CSV = "lambda_history.csv"
HISTORY_PLOT = "lambda_analysis.png"
DUMP = "diverged.json"


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch by step and rank alone, so that a resumed run draws what an unbroken one does."""
    torch.manual_seed((seed * 1_000_003 + step) * 4099 + rank)


@dataclass
class Run:
    """One run on one rank.

    Attributes:
        config: The validated configuration.
        engine: Model, optimizer and ranks.
        dual: λ and its history.
        anchors: The old tasks' anchors; None for the baseline.
        progress: Where the run is.
        preemption: Whether this rank was asked to leave.
        peers: The other ranks, which must not wait for this one for ever.
        output_dir: Directory of the run.
        owns_process_group: Whether the process group is the run's own, to be left at its end.
        adapters: What trains, if not the policy's own weights.
    """

    config: TrainConfig
    engine: Engine
    dual: DualState
    anchors: AnchorStream | None
    progress: Progress
    preemption: Preemption
    watchdog: RankWatchdog
    output_dir: Path
    owns_process_group: bool
    adapters: Adapters | None
    policy_dir: Path
    preprocessor: PolicyProcessorPipeline
    postprocessor: PolicyProcessorPipeline
    heldout: LeRobotDataset | None
    scheduler: LRScheduler | None
    logger: MetricsLogger
    batches: Iterator[dict[str, Any]]
    share: StepPartition
    sampler: StepSampler
    saver: BackgroundSaver | None
    _greeted: bool = False
    _seconds: list[float] = field(default_factory=list)
    _skipped: list[dict[str, Any]] = field(default_factory=list)

    @property
    def max_norm(self) -> float:
        """The norm to which gradients are clipped."""
        assert self.config.optimizer is not None
        return self.config.optimizer.grad_clip_norm

    def task_batches(self) -> Iterator[Batch]:
        """This rank's micro-batches of the next step, through the policy's processors."""
        for _ in range(self.share.micro_batches):
            yield self.preprocessor(images_to_float(next(self.batches)))

    def record(self, result: StepResult, retention: RetentionRecord | None, *, seconds: float) -> None:
        """Count a step and move the schedule on; every `log_freq` steps, say what it was.

        Raises:
            TrainingDiverged: It was one skipped step in a row too many.
        """
        self.watchdog.progress()
        progress = self.progress
        place = (progress.samples_seen, progress.anchors_seen)
        progress.advance(result, retention=retention is not None)
        self._seconds.append(seconds)
        if retention is not None:
            progress.latest |= {
                "craft/retention_loss": retention.retention_loss,
                "craft/lambda": self.dual.multiplier,
                "craft/epsilon": retention.epsilon,
                "craft/grad_conflict": float(retention.conflict),
                "craft/grad_dot": retention.dot,
                "craft/grad_cos": retention.cos,
                "craft/retention_weight": retention.retention_weight,
            }
        if result.applied:
            self._applied()
        else:
            self._skip(result, retention, *place)
        self.logger.advance()
        if self.config.log_freq > 0 and progress.step % self.config.log_freq == 0:
            self.logger.log(
                progress.step,
                {
                    "train/loss": progress.take_mean_loss(),
                    "train/grad_norm": result.grad_norm,
                    "train/lr": self.engine.optimizer.param_groups[0]["lr"],
                    "train/skipped_steps": progress.skipped,
                    **progress.latest,
                    "time/step_s": sum(self._seconds) / len(self._seconds),
                    "memory/peak_mb": peak_memory_bytes(self.engine.device) / 2**20,
                },
            )
            self._seconds.clear()

    def _applied(self) -> None:
        self._skipped.clear()
        if not self._greeted:
            self._greeted = True
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
            "samples": self.sampler.draw(range(samples, samples + self.share.total)),
        }
        if retention is not None and self.anchors is not None:
            seen |= {
                "retention_loss": str(retention.retention_loss),
                "anchors": self.anchors.indices(anchors),
            }
        self._skipped.append(seen)
        self.logger.say(f"step {step} skipped, not finite: {json.dumps(seen)}")
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
                f"{self.progress.skipped_in_a_row} steps in a row up to step {step} had a loss or gradient "
                f"that was not finite (--max_skipped_steps={self.config.max_skipped_steps}): look at their "
                f"samples in {dump}, or lower the learning rate, and resume from {self.output_dir / 'last'}"
            )

    def advance_scheduler(self) -> None:
        """Move the learning rate on by one step."""
        if self.scheduler is not None:
            self.scheduler.step()

    def after_step(self, *, stop: bool) -> None:
        """Evaluate and save where this step asks for it. Collective: call on all ranks.

        Args:
            stop: A rank was asked to stop, so this is the last step for now.

        Raises:
            Preempted: With `stop`, once everything is saved.
            UserError: With `stop`, if it cannot be saved.
        """
        config, step = self.config, self.progress.step
        self._report_finished_saves()
        if config.eval_freq and step % config.eval_freq == 0:
            self.logger.log(step, self.evaluate())
        due = config.save_freq > 0 and step % config.save_freq == 0
        if config.save_checkpoint and step < config.steps and (due or stop):
            self._save_periodic(needed=stop)
        if stop and step < config.steps:
            self._exit()

    def _exit(self) -> NoReturn:
        directory = step_directory(self.output_dir, self.progress.step)
        saved = f"saved {directory}; " if self.config.save_checkpoint else ""
        raise Preempted(
            f"{self.preemption.reason}: {saved}go on with --resume=auto, or --resume=true "
            f"--config_path={self.output_dir / 'last'}"
        )

    def evaluate(self) -> dict[str, float]:
        """Held-out task loss; with anchors, held-out anchor loss; with a world, success in it. Collective."""
        metrics = {}
        if self.heldout is not None:
            raw = heldout_batches(self.config, self.heldout, self.engine.rank, self.engine.world_size)
            batches = ((self.preprocessor(images_to_float(batch)), counts) for batch, counts in raw)
            metrics["eval/task_loss"] = self._mean_loss(batches)
        if self.anchors is not None:
            metrics["eval/anchor_loss"] = self._mean_loss(
                self.anchors.heldout_batches(self.config.batch_size, self.config.max_eval_samples)
            )
        return metrics | evaluate_in_world(
            self.config.world,
            self._act,
            self.preprocessor,
            self.postprocessor,
            self.engine.rank,
            self.engine.world_size,
        )

    def _act(self, batch: Batch) -> Tensor:
        self.watchdog.progress()
        return self.engine.act(batch)

    def _mean_loss(self, batches: Iterator[tuple[Batch, bool]]) -> float:
        total = TokenSums(*torch.zeros(2, dtype=torch.float64, device=self.engine.device))
        for batch, counts in batches:
            self.watchdog.progress()
            sums = measure(self.engine, [batch])
            if counts:
                total = TokenSums(total.loss + sums.loss, total.tokens + sums.tokens)
        loss, tokens = self.engine.sum_scalars(torch.stack(total))
        return loss / tokens if tokens else math.nan

    def _save_periodic(self, *, needed: bool) -> None:
        """Save; training goes on without it, unless the checkpoint is needed."""
        directory = step_directory(self.output_dir, self.progress.step)
        try:
            if self.saver is None or needed:
                self._save(directory)
            else:
                self._report_finished_saves(wait=True)
                self.saver.start(self._prepare(directory))
        except UserError as error:
            if needed:
                raise
            self._say_not_saved(error)

    def _report_finished_saves(self, *, wait: bool = False) -> None:
        """Say how a save in the background has ended, if it has."""
        if self.saver is not None and (wait or self.saver.idle):
            try:
                if (directory := self.saver.wait()) is not None:
                    self.logger.say(f"saved {directory}")
            except UserError as error:
                self._say_not_saved(error)

    def _say_not_saved(self, error: UserError) -> None:
        self.logger.say(f"error: {error}; training goes on, earlier checkpoints are as they were")

    def _save(self, directory: Path, *, final: bool = False) -> None:
        self._report_finished_saves(wait=True)
        self._prepare(directory, final=final).write()
        self.logger.say(f"saved {directory}")

    def _prepare(self, directory: Path, *, final: bool = False) -> PendingCheckpoint:
        return prepare_checkpoint(
            directory,
            engine=self.engine,
            config=self.config,
            policy_dir=self.policy_dir,
            scheduler_state=self.scheduler.state_dict() if self.scheduler else None,
            craft_state={
                **self.dual.state_dict(),
                "progress": self.progress.state_dict(),
                "dataset_samples": self.sampler.size,
                "wandb_run_id": self.logger.wandb_run_id,
            },
            step=self.progress.step,
            adapters=self.adapters,
            extra=self._write_history if final and self.anchors is not None else None,
            progress=self.watchdog.progress,
        )

    def _write_history(self, directory: Path) -> None:
        self.dual.write_csv(directory / HISTORY_CSV)
        if self.dual.history:
            plot_lambda_analysis(directory / HISTORY_CSV, directory / HISTORY_PLOT)

    def finish(self) -> Path:
        """Write the final checkpoint. Collective: call on all ranks.

        Returns:
            Its directory, or the run's where `save_checkpoint` is false.
        """
        peaks = gather_objects(peak_memory_bytes(self.engine.device) / 2**20)
        self.logger.say("peak memory a rank: " + ", ".join(f"{peak:.0f} MiB" for peak in peaks))
        self.logger.log(self.config.steps, {"memory/peak_mb": max(peaks)})
        if not self.config.save_checkpoint:
            return self.output_dir
        self._save(self.output_dir / FINAL, final=True)
        return self.output_dir / FINAL

    def close(self) -> None:
        """Let go of the log and of the other ranks. Collective: call on all ranks."""
        self.logger.close()
        self.watchdog.close()
        self.engine.close()
        if self.owns_process_group:
            destroy_process_group()

"""Saving during training: periodic, in the background, on preemption, and at the end."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from torch.optim.lr_scheduler import LRScheduler

from craft_ds.checkpoints import BackgroundSaver, prepare_checkpoint, step_directory
from craft_ds.checkpoints.best_link import best_checkpoint, update_best_link
from craft_ds.checkpoints.run_directory import FINAL
from craft_ds.checkpoints.save import PendingCheckpoint
from craft_ds.config.train_config import TrainConfig
from craft_ds.distributed.collectives import rank0_only
from craft_ds.distributed.watchdog import RankWatchdog
from craft_ds.engines.base import Engine
from craft_ds.errors import UserError
from craft_ds.lora.adapters import Adapters
from craft_ds.policies.directory import PolicyEdits
from craft_ds.training.metrics import METRICS_FILE, MetricsLogger
from craft_ds.training.plots import plot_lambda_analysis
from craft_ds.training.train_state import TrainState
from craft_ds.training.weight_average import WeightAverage

HISTORY_CSV = "lambda_history.csv"
HISTORY_PLOT = "lambda_analysis.png"


@dataclass(frozen=True)
class Checkpointer:
    """Write the checkpoints of a run and report how each save ended.

    Attributes:
        config: The validated configuration; `output_dir` is the run's directory.
        engine: Model, optimizer and ranks.
        state: Content of `craft_state.pt`.
        scheduler: Learning-rate schedule; None: constant.
        adapters: The adapters that train; None: the policy's own weights train.
        average: Moving average of the weights; None: there is none.
        policy_dir: Directory with the policy's configuration and processors.
        edits: What the run changes in them.
        logger: Receives a line per save.
        watchdog: Told of progress while files are written.
        teacher_loss: L0 on the anchors that measure the constraint, for the plot; None: the baseline.
        background: Writes periodic checkpoints beside training; None: training waits for them.
    """

    config: TrainConfig
    engine: Engine
    state: TrainState
    scheduler: LRScheduler | None
    adapters: Adapters | None
    average: WeightAverage | None
    policy_dir: Path
    edits: PolicyEdits
    logger: MetricsLogger
    watchdog: RankWatchdog
    teacher_loss: float | None
    background: BackgroundSaver | None

    def save_periodic(self) -> None:
        """Save at the current step; if that fails, log it and continue. Collective: call on all ranks."""
        try:
            if self.background is None:
                self._save(self._step_directory)
            else:
                self.report_finished_saves(wait=True)
                self.background.start(self._prepare(self._step_directory))
        except UserError as error:
            self._log_failed_save(error)

    def save_before_exit(self) -> Path:
        """Save at the current step and wait for it. Collective: call on all ranks.

        Returns:
            The checkpoint's directory.

        Raises:
            UserError: The checkpoint cannot be written.
        """
        self._save(self._step_directory)
        return self._step_directory

    def save_final(self) -> Path:
        """Save the final checkpoint, with λ's history and plot. Collective: call on all ranks.

        Returns:
            The checkpoint's directory.

        Raises:
            UserError: The checkpoint cannot be written.
        """
        directory = Path(self.config.output_dir) / FINAL
        self._save(directory, final=True)
        return directory

    def repair_best_link(self) -> None:
        """Point `best` where it belongs, in case the run died before, or a checkpoint was moved aside."""
        if self.config.save_best and self.config.save_checkpoint and self.engine.rank == 0:
            with contextlib.suppress(OSError):  # the next save reports it
                update_best_link(Path(self.config.output_dir), self.state.evaluations)

    def report_finished_saves(self, *, wait: bool = False) -> None:
        """Log how the save in the background ended, if it ended. Collective: call on all ranks.

        Args:
            wait: Wait for its end.
        """
        if self.background is not None and (wait or self.background.idle):
            try:
                if (directory := self.background.wait()) is not None:
                    self._say_saved(directory)
            except UserError as error:
                self._log_failed_save(error)

    @property
    def _step_directory(self) -> Path:
        return step_directory(Path(self.config.output_dir), self.state.progress.step)

    def _log_failed_save(self, error: UserError) -> None:
        self.logger.say(f"error: {error}; training continues, earlier checkpoints are unchanged")

    def _save(self, directory: Path, *, final: bool = False) -> None:
        self.report_finished_saves(wait=True)
        self._prepare(directory, final=final).write()
        self._say_saved(directory)

    def _say_saved(self, directory: Path) -> None:
        self.logger.say(f"saved {directory}")
        if self.config.save_best and self.engine.rank == 0:
            found = best_checkpoint(Path(self.config.output_dir), self.state.evaluations)
            if found is not None:
                self.logger.say(f"best checkpoint: {found[1]} ({found[0].describe()})")

    def _check_output_dir(self) -> None:
        """Check that the run's directory still exists: one created anew may be on another file system."""
        output_dir = Path(self.config.output_dir)
        if not output_dir.is_dir():
            raise UserError(f"no checkpoint can be saved: {output_dir} was deleted, moved or unmounted")

    def _prepare(self, directory: Path, *, final: bool = False) -> PendingCheckpoint:
        rank0_only(self._check_output_dir)()
        return prepare_checkpoint(
            directory,
            engine=self.engine,
            config=self.config,
            policy_dir=self.policy_dir,
            edits=self.edits,
            scheduler_state=self.scheduler.state_dict() if self.scheduler else None,
            craft_state=self.state.state_dict(),
            step=self.state.progress.step,
            adapters=self.adapters,
            extra=self._write_history if final and self.config.craft.enabled else None,
            progress=self.watchdog.progress,
            average=self.average.by_name() if self.average else None,
            evaluations=tuple(self.state.evaluations) if self.config.save_best else (),
        )

    def _write_history(self, directory: Path) -> None:
        self.state.dual.write_csv(directory / HISTORY_CSV)
        if self.state.dual.history:
            plot_lambda_analysis(
                directory / HISTORY_CSV,
                directory / HISTORY_PLOT,
                metrics_jsonl=Path(self.config.output_dir) / METRICS_FILE,
                teacher_loss=self.teacher_loss,
            )

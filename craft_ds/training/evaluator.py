"""Evaluation during training: held-out task loss, held-out anchor loss, success in an embedded world."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.processor import PolicyProcessorPipeline
from torch import Tensor

from craft_ds.anchors.stream import AnchorStream
from craft_ds.config.train_config import TrainConfig
from craft_ds.data.task_data import heldout_batches, images_to_float
from craft_ds.distributed.watchdog import RankWatchdog
from craft_ds.engines.base import Batch, Engine
from craft_ds.training.train_step import TokenSums, measure
from craft_ds.training.world_eval import evaluate_in_world


@dataclass(frozen=True)
class Evaluator:
    """Evaluate the policy in training; parameters and training state stay unchanged.

    Attributes:
        config: The validated configuration.
        engine: Model and ranks.
        watchdog: Told of progress after every batch.
        preprocessor: From samples or observations to the policy's input.
        postprocessor: From the policy's output to actions.
        heldout: Held-out episodes of the task; None: no task loss is measured.
        anchors: Anchors of the old tasks; None for the baseline.
    """

    config: TrainConfig
    engine: Engine
    watchdog: RankWatchdog
    preprocessor: PolicyProcessorPipeline
    postprocessor: PolicyProcessorPipeline
    heldout: LeRobotDataset | None
    anchors: AnchorStream | None

    def evaluate(self) -> dict[str, float]:
        """Evaluate the policy as it is now. Collective: call on all ranks.

        Returns:
            `eval/task_loss`, `eval/anchor_loss` and `eval/success/<task>`, each where it is configured; the
            same on all ranks.
        """
        config, engine = self.config, self.engine
        metrics = {}
        if self.heldout is not None:
            raw = heldout_batches(config, self.heldout, engine.rank, engine.world_size)
            batches = ((self.preprocessor(images_to_float(batch)), counts) for batch, counts in raw)
            metrics["eval/task_loss"] = self._mean_loss(batches)
        if self.anchors is not None:
            metrics["eval/anchor_loss"] = self._mean_loss(
                self.anchors.heldout_batches(config.batch_size, config.max_eval_samples)
            )
        success = evaluate_in_world(
            config.world, self._act, self.preprocessor, self.postprocessor, engine.rank, engine.world_size
        )
        return metrics | success

    def _act(self, batch: Batch) -> Tensor:
        self.watchdog.progress()
        return self.engine.act(batch)

    def _mean_loss(self, batches: Iterator[tuple[Batch, bool]]) -> float:
        """Return the mean loss per token over all ranks; NaN where there is no token."""
        total = TokenSums(*torch.zeros(2, dtype=torch.float64, device=self.engine.device))
        for batch, counts in batches:
            self.watchdog.progress()
            sums = measure(self.engine, [batch])
            if counts:
                total = TokenSums(total.loss + sums.loss, total.tokens + sums.tokens)
        loss, tokens = self.engine.sum_scalars(torch.stack(total))
        return loss / tokens if tokens else math.nan

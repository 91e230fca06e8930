"""Evaluation during training: held-out task loss, held-out anchor loss, success in an embedded world."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from lerobot.processor import PolicyProcessorPipeline
from torch import Tensor

from craft_ds.algorithm.multiplier import epsilon_at
from craft_ds.anchors.stream import AnchorStream
from craft_ds.config.train_config import TrainConfig
from craft_ds.data.checked_samples import BadSample, Samples
from craft_ds.data.policy_input import PolicyInput
from craft_ds.data.task_data import heldout_batches
from craft_ds.distributed.watchdog import RankWatchdog
from craft_ds.engines.base import Batch, Engine, Loss
from craft_ds.policies.token_loss import token_loss
from craft_ds.training.bad_samples import BadSampleLog
from craft_ds.training.train_step import TokenSums, measure
from craft_ds.training.world_eval import evaluate_in_world


@dataclass(frozen=True)
class Evaluator:
    """Evaluate the policy in training; parameters and training state stay unchanged.

    Attributes:
        config: The validated configuration.
        engine: Model and ranks.
        watchdog: Told of progress after every batch.
        task_input: From held-out samples to the policy's input.
        preprocessor: From observations to the policy's input.
        postprocessor: From the policy's output to actions.
        heldout: Held-out episodes of the task; None: no task loss is measured.
        anchors: Anchors of the old tasks; None for the baseline.
        bad_samples: Told of bad held-out samples.
    """

    config: TrainConfig
    engine: Engine
    watchdog: RankWatchdog
    task_input: PolicyInput
    preprocessor: PolicyProcessorPipeline
    postprocessor: PolicyProcessorPipeline
    heldout: Samples | None
    anchors: AnchorStream | None
    bad_samples: BadSampleLog

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluate the policy as it is now. Collective: call on all ranks.

        Args:
            step: Optimizer steps done.

        Returns:
            `eval/task_loss`, `eval/anchor_loss`, `eval/retention_loss` (where it is another loss),
            `eval/epsilon` (in its unit) and `eval/success/<task>`, each where it is configured; the same on
            all ranks.

        Raises:
            UserError: A held-out sample is bad, and bad samples are errors.
        """
        config, engine = self.config, self.engine
        metrics = {}
        if self.heldout is not None:
            metrics["eval/task_loss"] = self._task_loss(self.heldout)
        if self.anchors is not None:
            sizes = (config.batch_size, config.max_eval_samples)
            metrics["eval/anchor_loss"] = self._mean_loss(self.anchors.heldout_batches(*sizes))
            if config.craft.retention_loss != "token_ce":
                metrics["eval/retention_loss"] = self._mean_loss(
                    self.anchors.heldout_batches(*sizes), self.anchors.loss
                )
            unit = self.anchors.heldout_epsilon_unit
            metrics["eval/epsilon"] = unit * epsilon_at(step, config.steps, config.craft)
        success = evaluate_in_world(
            config.world, self._act, self.preprocessor, self.postprocessor, engine.rank, engine.world_size
        )
        return metrics | success

    def _act(self, batch: Batch) -> Tensor:
        self.watchdog.progress()
        return self.engine.act(batch)

    def _task_loss(self, heldout: Samples) -> float:
        found: list[BadSample] = []
        replaced = 0

        def read() -> Iterator[tuple[Batch, bool]]:
            nonlocal replaced
            ranks = (self.engine.rank, self.engine.world_size)
            for batch, counts in heldout_batches(self.config, heldout, *ranks, self.task_input.process):
                found.extend(batch.bad)
                replaced += batch.replaced
                yield self.task_input.to_device(batch.samples, self.engine.device), counts

        loss = self._mean_loss(read())
        (all_replaced,) = self.engine.sum_scalars(
            torch.tensor([replaced], dtype=torch.float64, device=self.engine.device)
        )
        self.bad_samples.settle(all_replaced, found)
        return loss

    def _mean_loss(self, batches: Iterator[tuple[Batch, bool]], loss: Loss = token_loss) -> float:
        """Return the mean loss per token over all ranks; NaN where there is no token."""
        total = TokenSums(*torch.zeros(2, dtype=torch.float64, device=self.engine.device))
        for batch, counts in batches:
            self.watchdog.progress()
            sums = measure(self.engine, [batch], loss)
            if counts:
                total = TokenSums(total.loss + sums.loss, total.tokens + sums.tokens)
        summed, tokens = self.engine.sum_scalars(torch.stack(total))
        return summed / tokens if tokens else math.nan

"""Where a run is: what a checkpoint keeps besides the model, the schedule and λ."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from craft_ds.training.train_step import StepResult


@dataclass
class Progress:
    """Counters that go on where they stood, and what was measured since the last line of the log.

    Attributes:
        step: Optimizer steps done, skipped ones included.
        samples_seen: Place in the stream of task samples.
        anchors_seen: Place in the stream of anchors.
        samples_per_step: Task samples of a step over all ranks.
        anchors_per_step: Anchors of a retention step over all ranks; 0: the baseline.
        asked: `batch_size`, `gradient_accumulation_steps` and `anchor_batch_size` as the flags had them when
            the two above were worked out: while they stay, another number of ranks changes no step.
        skipped: Steps that were not finite.
        skipped_in_a_row: Of these the last ones.
        losses: Task losses since the last logged step.
        latest: What the last retention step saw, by the log's keys.
    """

    step: int = 0
    samples_seen: int = 0
    anchors_seen: int = 0
    samples_per_step: int = 0
    anchors_per_step: int = 0
    asked: list[int] = field(default_factory=list)
    skipped: int = 0
    skipped_in_a_row: int = 0
    losses: list[float] = field(default_factory=list)
    latest: dict[str, float] = field(default_factory=dict)

    def share(self, batch_size: int, accumulation: int, anchor_batch_size: int, world_size: int) -> None:
        """Work out what a step takes, unless the flags are those for which it is known.

        Args:
            batch_size: Task samples a rank and micro-batch.
            accumulation: Micro-batches a step.
            anchor_batch_size: Anchors a rank and retention step; 0: the baseline.
            world_size: Number of ranks.
        """
        asked = [batch_size, accumulation, anchor_batch_size]
        if asked != self.asked:
            self.samples_per_step = batch_size * accumulation * world_size
            self.anchors_per_step = anchor_batch_size * world_size
            self.asked = asked

    def advance(self, result: StepResult, *, retention: bool) -> None:
        """Count a step."""
        self.step += 1
        self.samples_seen += self.samples_per_step
        if retention:
            self.anchors_seen += self.anchors_per_step
        if result.applied:
            self.skipped_in_a_row = 0
            self.losses.append(result.loss)
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1

    def take_mean_loss(self) -> float:
        """Mean task loss of the applied steps since the last call; NaN where there was none."""
        losses, self.losses = self.losses, []
        return sum(losses) / len(losses) if losses else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values, fit for `torch.load(weights_only=True)`."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Progress":
        """The inverse of `state_dict`.

        Raises:
            TypeError: The state has other entries.
            ValueError: An entry is of another kind.
        """
        progress = cls(**state)
        for name, value in asdict(cls()).items():
            found = getattr(progress, name)
            if type(found) is not type(value) or (isinstance(found, int) and found < 0):
                raise ValueError(f"{name}={found!r}")
        return progress

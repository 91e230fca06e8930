"""State of a run besides model, optimizer and schedule: the content of `craft_state.pt`."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from craft_ds.algorithm.model_selection import EvalRecord
from craft_ds.algorithm.multiplier import DualState, RetentionRecord, conflict_metrics, is_step
from craft_ds.algorithm.retention_schedule import RetentionSchedule
from craft_ds.training.start_policy import StartPolicy
from craft_ds.training.train_step import StepResult


@dataclass
class Progress:
    """Counters of a run, and the measurements since the last logged step.

    Attributes:
        step: Optimizer steps done, skipped ones included.
        samples_seen: Position in the stream of task samples.
        anchors_seen: Position in the stream of anchors.
        tokens_seen: Supervised task tokens of all ranks.
        samples_per_step: Task samples per step over all ranks.
        anchors_per_step: Anchors per retention step over all ranks; 0: the baseline.
        asked: `batch_size`, `gradient_accumulation_steps` and `anchor_batch_size` from which the two above
            were computed: while these flags stay the same, another number of ranks does not change a step.
        skipped: Steps with a non-finite loss or gradient.
        skipped_in_a_row: The most recent consecutive ones of these.
        bad_samples: Task samples that were replaced because they were bad.
        retention_logged: Records of the history that logged steps have covered.
        losses: Task losses since the last logged step.
        latest: Metrics of the last retention step, by their names in the log.
    """

    step: int = 0
    samples_seen: int = 0
    anchors_seen: int = 0
    tokens_seen: int = 0
    samples_per_step: int = 0
    anchors_per_step: int = 0
    asked: list[int] = field(default_factory=list)
    skipped: int = 0
    skipped_in_a_row: int = 0
    bad_samples: int = 0
    retention_logged: int = 0
    losses: list[float] = field(default_factory=list)
    latest: dict[str, float] = field(default_factory=dict)

    def set_step_size(
        self, batch_size: int, accumulation: int, anchor_batch_size: int, world_size: int
    ) -> None:
        """Compute the size of a step, unless the flags are unchanged since it was computed.

        Args:
            batch_size: Task samples per rank and micro-batch.
            accumulation: Micro-batches per step.
            anchor_batch_size: Anchors per rank and retention step; 0: the baseline.
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
        self.tokens_seen += result.tokens
        if retention:
            self.anchors_seen += self.anchors_per_step
        if result.applied:
            self.skipped_in_a_row = 0
            self.losses.append(result.loss)
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1

    def take_mean_loss(self) -> float:
        """Return the mean task loss of the steps applied since the last call; NaN if there was none."""
        losses, self.losses = self.losses, []
        return sum(losses) / len(losses) if losses else math.nan

    def take_conflict_metrics(self, history: Sequence[RetentionRecord]) -> dict[str, float]:
        """Return the means over the retention steps applied since the last call; none if there was none."""
        start, self.retention_logged = self.retention_logged, len(history)
        return conflict_metrics(history[start:])

    def state_dict(self) -> dict[str, Any]:
        """Return plain Python values, which `torch.load(weights_only=True)` accepts."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Progress":
        """Return the progress that `state_dict` described.

        Raises:
            TypeError: The state has other entries.
            ValueError: An entry has the wrong type or is negative.
        """
        progress = cls(**state)
        for name, value in asdict(cls()).items():
            found = getattr(progress, name)
            if type(found) is not type(value) or (isinstance(found, int) and not is_step(found)):
                raise ValueError(f"{name}={found!r}")
        numbers = [*progress.losses, *progress.latest.values()]
        counts = all(map(is_step, progress.asked))
        if not (counts and all(type(number) in (int, float) for number in numbers)):
            raise ValueError("its lists do not hold numbers")
        if not progress.skipped_in_a_row <= progress.skipped <= progress.step:
            raise ValueError(f"skipped={progress.skipped} of {progress.step} steps")
        return progress


@dataclass
class TrainState:
    """Content of `craft_state.pt`.

    Attributes:
        progress: Counters of the run.
        dual: λ and its history.
        dataset_samples: Number of training samples; a data set of another size is another run.
        tracker_run_ids: Identity of the run at each tracker, by the tracker's name.
        dataset_fingerprint: Hashes of the data set's files; empty in checkpoints of older versions.
        evaluations: All evaluations of the held-out task loss, in order.
        schedule: When retention steps are due.
        start: The policy that training started from; None without a penalty.
    """

    progress: Progress
    dual: DualState
    dataset_samples: int = 0
    tracker_run_ids: dict[str, str] = field(default_factory=dict)
    dataset_fingerprint: dict[str, str] = field(default_factory=dict)
    evaluations: list[EvalRecord] = field(default_factory=list)
    start: StartPolicy | None = None
    schedule: RetentionSchedule = field(init=False)

    def __post_init__(self) -> None:
        self.schedule = RetentionSchedule(self.dual.config)

    def state_dict(self) -> dict[str, Any]:
        """Return plain Python values, which `torch.load(weights_only=True)` accepts."""
        return {
            **self.dual.state_dict(),
            "progress": self.progress.state_dict(),
            "retention_schedule": self.schedule.state_dict() if self.dual.config.enabled else None,
            "dataset_samples": self.dataset_samples,
            "tracker_run_ids": dict(self.tracker_run_ids),
            "dataset_fingerprint": dict(self.dataset_fingerprint),
            "evaluations": [asdict(record) for record in self.evaluations],
            "start": None if self.start is None else self.start.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], lambda_max: float = math.inf) -> None:
        """Take over the state that `state_dict` described.

        Args:
            state: From `state_dict`.
            lambda_max: Upper bound of λ in the run that saved it.

        Raises:
            KeyError: An entry is missing.
            TypeError: An entry has the wrong type.
            ValueError: An entry has the wrong type or value.
        """
        self.progress = Progress.from_state_dict(state["progress"])
        self.dataset_samples = int(state["dataset_samples"])
        self.dual.load_state_dict(state, lambda_max)
        self.schedule.load_state_dict(state.get("retention_schedule"), self.progress.step)
        if "retention_logged" not in state["progress"]:  # before the means over retention steps were logged
            self.progress.retention_logged = len(self.dual.history)
        if self.progress.retention_logged > len(self.dual.history):
            raise ValueError(f"retention_logged={self.progress.retention_logged} exceeds the history")
        run_ids = state.get("tracker_run_ids")
        if run_ids is None:  # before `--log_to`, only wandb's was stored
            run_ids = {"wandb": state["wandb_run_id"]} if state.get("wandb_run_id") else {}
        self.tracker_run_ids = _texts("tracker_run_ids", run_ids)
        self.dataset_fingerprint = _texts("dataset_fingerprint", state.get("dataset_fingerprint", {}))
        self.evaluations = read_evaluations(state)
        if self.evaluations and self.evaluations[-1].step > self.progress.step:
            raise ValueError(f"an evaluation after step {self.evaluations[-1].step} of {self.progress.step}")
        start = state.get("start")  # checkpoints of older versions do not have it
        self.start = None if start is None else StartPolicy.from_state_dict(start)


def read_evaluations(state: dict[str, Any]) -> list[EvalRecord]:
    """Return the evaluations in the content of `craft_state.pt`; none in checkpoints of older versions.

    Raises:
        TypeError: A record has other entries.
        ValueError: A record is not one that a run can have, or they are out of order.
    """
    records = [EvalRecord(**row) for row in state.get("evaluations", [])]
    steps = [record.step for record in records]
    if not all(map(is_step, steps)) or steps != sorted({*steps}):
        raise ValueError("its evaluations are out of order")
    for record in records:
        constraint = [record.retention_loss, record.epsilon]
        numbers = [record.task_loss, *(constraint if constraint != [None, None] else [])]
        if not all(type(number) in (int, float) for number in numbers):
            raise ValueError(f"an evaluation does not hold numbers: {record}")
    return records


def _texts(name: str, value: Any) -> dict[str, str]:
    """Return a dictionary of texts from a file.

    Raises:
        ValueError: It is anything else.
    """
    if not isinstance(value, dict) or not all(
        isinstance(part, str) for entry in value.items() for part in entry
    ):
        raise ValueError(f"{name}={value!r}")
    return dict(value)

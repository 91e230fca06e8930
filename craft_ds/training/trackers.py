"""Trackers that show a run's metrics beside `metrics.jsonl`: Weights & Biases, TensorBoard and trackio.

Each tracker's package is imported only if the run uses it.
"""

import shutil
import uuid
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from craft_ds.config.train_config import TrainConfig
from craft_ds.errors import UserError


class Tracker(Protocol):
    """Receives the metrics of a run; exists on rank 0 only.

    Attributes:
        name: Its name in `--log_to`.
    """

    name: str

    @property
    def run_id(self) -> str | None:
        """Name by which a resumed run continues at the tracker; None: the output directory identifies it."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics.

        Args:
            step: Optimizer steps done so far.
            metrics: Numbers by key, as in `metrics.jsonl`.
        """

    def close(self) -> None:
        """Write what is pending and end the tracker's run."""


def check_trackers(names: Iterable[str]) -> None:
    """Check that the packages of the trackers are installed.

    Args:
        names: `TrainConfig.trackers`.

    Raises:
        UserError: A package is missing; names the flag and the command that installs it.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"--log_to={name} needs the package {name}, which is not installed: pip install {name}"
            )


def open_trackers(config: TrainConfig, run_ids: Mapping[str, str], resume_step: int | None) -> list[Tracker]:
    """Start the trackers of a run, or continue them. Call on rank 0 only.

    Args:
        config: The validated configuration; `trackers` names them.
        run_ids: `Tracker.run_id` by name, from the checkpoint to resume.
        resume_step: Step of that checkpoint; None: a new run.

    Raises:
        OSError: The output directory cannot be written.
        UserError: A tracker did not start. An output directory made for it is removed: the corrected command
            must not be refused because its directory exists.
    """
    output_dir = Path(config.output_dir)
    is_new = not output_dir.exists()
    trackers: list[Tracker] = []
    try:
        for name in config.trackers:
            output_dir.mkdir(parents=True, exist_ok=True)
            match name:
                case "wandb":
                    trackers.append(WandbTracker(config, run_ids.get(name), resume_step is not None))
                case "tensorboard":
                    trackers.append(TensorBoardTracker(output_dir, resume_step))
                case "trackio":
                    trackers.append(TrackioTracker(config, run_ids.get(name)))
    except UserError:
        for tracker in trackers:
            tracker.close()
        if is_new:
            shutil.rmtree(output_dir, ignore_errors=True)
        raise
    return trackers


class WandbTracker:
    """Weights & Biases, with LeRobot's flags `--wandb.*`.

    Args:
        config: The validated configuration, which is stored with the run.
        run_id: Identity of the run to continue unless `--wandb.run_id` gives one.
        resume: The run is resumed: without an identity, LeRobot's convention finds it in the output
            directory.

    Raises:
        UserError: wandb did not start.
    """

    name = "wandb"

    def __init__(self, config: TrainConfig, run_id: str | None, resume: bool) -> None:
        import wandb
        from lerobot.common.wandb_utils import get_wandb_run_id_from_filesystem

        flags, output_dir = config.wandb, Path(config.output_dir)
        run_id = flags.run_id or run_id
        if run_id is None and resume and (output_dir / "wandb" / "latest-run").exists():
            run_id = get_wandb_run_id_from_filesystem(output_dir)
        mode: Any = flags.mode or "online"
        if mode not in ("online", "offline", "disabled"):
            raise UserError(f"--wandb.mode={mode}: choose online, offline or disabled")
        try:
            self._run = wandb.init(
                id=run_id,
                project=flags.project,
                entity=flags.entity,
                name=config.job_name,
                notes=flags.notes,
                tags=_wandb_tags(config) if flags.add_tags else None,
                dir=output_dir,
                config=config.to_dict(),
                job_type="train",
                # Offline runs have no history to ask for; the same id joins them when they are synchronised.
                resume="allow" if run_id is not None and mode == "online" else None,
                mode=mode,
                settings=wandb.Settings(silent=True),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"--log_to=wandb: wandb did not start ({_first_line(error)}); log in with 'wandb login' or "
                "set --wandb.mode=offline"
            ) from error

    @property
    def run_id(self) -> str:
        """Wandb's id of the run."""
        return str(self._run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Upload what is pending, unless offline, and end the run."""
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard event files in `<output_dir>/tensorboard`.

    Args:
        output_dir: Directory of the run.
        resume_step: Step of the checkpoint to resume; events of later steps, which are done again, are
            hidden. None: a new run.
    """

    name = "tensorboard"
    run_id = None

    def __init__(self, output_dir: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(
            str(output_dir / "tensorboard"), purge_step=None if resume_step is None else resume_step + 1
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics and write them to disk."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class TrackioTracker:
    """trackio, in the project `--wandb.project`; trackio's own environment variables select a Space.

    Args:
        config: The validated configuration, which is stored with the run.
        run_id: Name of the run to continue; None: a new run, named like the output directory with a random
            suffix. trackio accepts a name twice and resumes the latest run of that name.

    Raises:
        UserError: trackio did not start.
    """

    name = "trackio"

    def __init__(self, config: TrainConfig, run_id: str | None) -> None:
        import trackio

        try:
            self._run: Any = trackio.init(
                project=config.wandb.project,
                name=run_id or f"{Path(config.output_dir).name}-{uuid.uuid4().hex[:8]}",
                config=config.to_dict(),
                resume="never" if run_id is None else "allow",
            )
        except Exception as error:  # trackio has no base class for its errors
            raise UserError(f"--log_to=trackio: trackio did not start ({_first_line(error)})") from error

    @property
    def run_id(self) -> str:
        """Trackio's name of the run."""
        return str(self._run.name)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Write what is pending and end the run."""
        self._run.finish()


def _wandb_tags(config: TrainConfig) -> list[str]:
    """Return LeRobot's tags of a run, cut to the 64 characters that wandb allows."""
    values = {
        "policy": config.policy.type if config.policy else None,
        "seed": config.seed,
        "dataset": config.dataset.repo_id,
    }
    return [f"{name}:{value}"[:64] for name, value in values.items() if value is not None]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

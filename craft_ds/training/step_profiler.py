"""Profile of some steps: a Chrome trace, a snapshot of CUDA memory, and the seconds of each phase.

Each rank writes its own files below `OUTPUT/profile/`.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from craft_ds.config.configs import ProfileConfig
from craft_ds.distributed.collectives import rank0_only
from craft_ds.engines.base import Engine
from craft_ds.engines.phase_timer import PhaseTimer
from craft_ds.errors import UserError
from craft_ds.tensor_io.move_aside import move_aside

DIRECTORY = "profile"

# Allocations and frees that the snapshot lists with their stacks, the last ones; as in torchtitan.
_MEMORY_EVENTS = 100_000

logger = logging.getLogger(__name__)


class StepProfiler:
    """Records some steps of this rank, and writes what it recorded after the last of them.

    Args:
        options: The flags.
        directory: Directory of the files; created when they are written.
        rank: This rank.
        device: Device of training.
        first: Number of the first step that is recorded.
        say: Prints a line, on rank 0.
    """

    def __init__(
        self,
        options: ProfileConfig,
        directory: Path,
        *,
        rank: int,
        device: torch.device,
        first: int,
        say: Callable[[str], None],
    ):
        self._options, self._directory, self._rank, self._device = options, directory, rank, device
        self._first, self._say = first, say
        self._steps_until_first = options.skip
        self._seconds: list[float] = []
        self._timer = PhaseTimer(device)
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # In its warm-up step the profiler already observes: that step pays for starting CUPTI.
        steps = schedule(wait=options.skip - 1, warmup=1, active=options.steps, repeat=1)
        self._profile: profile | None = profile(activities=activities, schedule=steps, acc_events=True)
        self._profile.start()

    def after_step(self, seconds: float) -> None:
        """Note the end of a step; writes the files after the last recorded one.

        Args:
            seconds: Time of the step.
        """
        if self._profile is None:
            return
        self._profile.step()
        if self._steps_until_first:
            self._steps_until_first -= 1
            if not self._steps_until_first:
                self._timer.start()
                if self._device.type == "cuda":
                    torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
            return
        self._seconds.append(seconds)
        if len(self._seconds) == self._options.steps:
            self._end(self._profile)

    def close(self) -> None:
        """Write what was recorded so far if the run ends early, as at an out-of-memory error."""
        if self._profile is not None:
            self._end(self._profile)

    def _end(self, recorded: profile) -> None:
        self._profile = None
        self._timer.stop()
        recorded.stop()
        if self._steps_until_first:
            self._say(f"no profile: the run ended before step {self._first}")
            return
        try:
            self._write(recorded)
        except (OSError, RuntimeError) as error:
            logger.error("%s cannot be written (%s): the profile is incomplete", self._directory, error)
        finally:
            if self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, recorded: profile) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        files = self._directory / f"rank_{self._rank}"
        memory = "no memory snapshot, which only CUDA has"
        if self._device.type == "cuda":
            memory = "rank_N.memory.pickle is for https://docs.pytorch.org/memory_viz"
            torch.cuda.memory._dump_snapshot(f"{files}.memory.pickle")
        recorded.export_chrome_trace(f"{files}.trace.json.gz")
        if self._seconds:
            last = self._first + len(self._seconds) - 1
            means = mean_seconds(self._seconds, self._timer.seconds())
            content = {"rank": self._rank, "first_step": self._first, "last_step": last, **means}
            Path(f"{files}.seconds.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            described = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
            self._say(f"profile of steps {self._first} to {last}, means per step: {described}")
        trace = "rank_N.trace.json.gz is for https://ui.perfetto.dev"
        self._say(f"profile: wrote {self._directory} ({trace}; {memory})")


def mean_seconds(steps: list[float], phases: dict[str, float]) -> dict[str, float]:
    """Return the mean times per step in LeRobot's terms: `step_s`, `data_s`, `update_s` and its parts.

    Args:
        steps: Seconds of each step.
        phases: Seconds of each phase, over all steps.
    """
    means = {f"{name}_s": seconds / len(steps) for name, seconds in phases.items()}
    step_s, data_s = sum(steps) / len(steps), means.pop("data_s", 0.0)
    update_s = step_s - data_s
    other_s = update_s - sum(means.values())
    return {"step_s": step_s, "data_s": data_s, "update_s": update_s, **means, "other_s": other_s}


def open_profiler(
    options: ProfileConfig,
    engine: Engine,
    output_dir: Path,
    done: int,
    total: int,
    say: Callable[[str], None],
) -> StepProfiler | None:
    """Open the profile that the flags ask for; an earlier one of the same steps is moved aside.

    Collective: call on all ranks.

    Args:
        options: The flags.
        engine: Of the run.
        output_dir: The run's directory.
        done: Steps done before this start.
        total: Steps of the complete run.
        say: Prints a line, on rank 0.

    Returns:
        None if no step is to be recorded.

    Raises:
        UserError: The earlier one cannot be moved.
    """
    if not options.steps:
        return None
    first = done + options.skip + 1
    if first > total:
        say(f"no profile: --profile.skip={options.skip} steps from step {done} on, of {total}, leave none")
        return None
    directory = output_dir / DIRECTORY / f"step_{first:06d}"
    if message := rank0_only(_set_aside)(directory):
        say(message)
    return StepProfiler(options, directory, rank=engine.rank, device=engine.device, first=first, say=say)


def _set_aside(directory: Path) -> str:
    try:
        return f"renamed {directory} to {move_aside(directory)}" if directory.exists() else ""
    except OSError as error:
        raise UserError(f"{directory} cannot be moved: {error}") from error

"""Logging of a run: console lines, `metrics.jsonl` and trackers.

One call of `MetricsLogger.log` feeds all of them under the same keys, which docs/logging.md lists.
"""

import contextlib
import errno
import json
import math
import os
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from io import FileIO
from pathlib import Path

import torch
from tqdm import tqdm

from craft_ds.distributed.launcher_watch import drop_unread_output
from craft_ds.tensor_io.filesystem import atomic_file
from craft_ds.training.trackers import Tracker

METRICS_FILE = "metrics.jsonl"


def console_line(step: int, total_steps: int, metrics: Mapping[str, float]) -> str:
    """Format one training step for a reader.

    Args:
        step: Optimizer steps done so far.
        total_steps: Optimizer steps of the complete run.
        metrics: At least `train/loss`, `train/grad_norm` and `train/lr`; with `craft/retention_loss` the
            retention values too, with `time/step_s` the speed and the time left.

    Returns:
        For example `Step 100/10000 | loss=0.523 | grdn=1.234 | lr=3.0e-04 | L_ret=0.456 | λ=1.23 | ε=0.95 |
        conflict=✓ | cos=-0.15 | 0.21 s/step | 76 samples/s | 0:34:39 left` (✓: the gradients conflicted in
        the last retention step).
    """
    fields = [
        f"Step {step}/{total_steps}",
        f"loss={metrics['train/loss']:.3f}",
        f"grdn={metrics['train/grad_norm']:.3f}",
        f"lr={metrics['train/lr']:.1e}",
    ]
    if "craft/retention_loss" in metrics:
        fields += [
            f"L_ret={metrics['craft/retention_loss']:.3f}",
            f"λ={metrics['craft/lambda']:.2f}",
            f"ε={metrics['craft/epsilon']:.2f}",
        ]
    if "craft/grad_cos" in metrics:
        fields += [
            f"conflict={'✓' if metrics['craft/grad_conflict'] else '✗'}",
            f"cos={metrics['craft/grad_cos']:.2f}",
        ]
    if "time/samples_per_s" in metrics:
        left = timedelta(seconds=round((total_steps - step) * metrics["time/step_s"]))
        fields += [
            f"{metrics['time/step_s']:.2f} s/step",
            f"{metrics['time/samples_per_s']:.3g} samples/s",
            f"{left} left",
        ]
    return " | ".join(fields)


def eval_line(step: int, total_steps: int, metrics: Mapping[str, float]) -> str:
    """Format the `eval/` values: `Step 100/10000 | eval | task_loss=0.412 | anchor_loss=0.298`."""
    values = [f"{key[5:]}={value:.3f}" for key, value in metrics.items() if key.startswith("eval/")]
    return " | ".join([f"Step {step}/{total_steps}", "eval", *values])


def json_row(step: int, metrics: Mapping[str, float]) -> str:
    """Return one line of `metrics.jsonl`: strict JSON, so NaN and infinities become `null`."""
    row: dict[str, float | int | None] = {"step": step}
    for key, value in metrics.items():
        row[key] = value if math.isfinite(value) else None
    return json.dumps(row, allow_nan=False)


def drop_rows_after(path: Path, step: int) -> None:
    """Remove the rows of `metrics.jsonl` after `step`, atomically.

    A run that died has logged steps after its last checkpoint, which the resumed run does again. An
    incomplete last line is removed too.

    Args:
        path: The file; may be missing.
        step: Step of the checkpoint.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    with atomic_file(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


@contextlib.contextmanager
def _outliving_readers() -> Iterator[None]:
    """Continue without output once its reader has ended.

    A launcher that was killed, or a viewer of the log that was closed, must not end a run before it has
    saved.
    """
    try:
        yield
    except BrokenPipeError:
        drop_unread_output()


class MetricsLogger:
    """Logs the metrics of one run; on ranks other than 0 every method does nothing.

    Args:
        output_dir: Directory of the run; created if missing.
        total_steps: Optimizer steps of the complete run.
        trackers: Receive the same metrics; a tracker that fails is dropped, the run continues.
        is_main: This is rank 0.
        resume_step: Step of the checkpoint to resume; None: a new run.

    Raises:
        OSError: The directory cannot be written.

    Example:
        >>> logger = MetricsLogger(Path("outputs/run"), 10_000, is_main=False)
        >>> logger.log(100, {"train/loss": 0.523, "train/grad_norm": 1.234, "train/lr": 3e-4})
        >>> logger.close()
    """

    def __init__(
        self,
        output_dir: Path,
        total_steps: int,
        trackers: Sequence[Tracker] = (),
        *,
        is_main: bool = True,
        resume_step: int | None = None,
    ) -> None:
        self._active = is_main
        self._file: FileIO | None = None
        self._failing = False
        self._trackers = list(trackers)
        if not is_main:
            return
        self._total_steps = total_steps
        output_dir.mkdir(parents=True, exist_ok=True)
        self._path = output_dir / METRICS_FILE
        if resume_step is not None:
            drop_rows_after(self._path, resume_step)
        self._file = self._path.open("wb" if resume_step is None else "ab", buffering=0)
        self._bar = tqdm(
            total=total_steps,
            initial=resume_step or 0,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=None,  # None: no bar where stderr is not a terminal
        )

    @property
    def tracker_run_ids(self) -> dict[str, str]:
        """Identity of the run at each tracker that gives it one, by the tracker's name."""
        return {tracker.name: tracker.run_id for tracker in self._trackers if tracker.run_id is not None}

    def advance(self) -> None:
        """Move the progress bar by one optimizer step."""
        if self._active:
            with _outliving_readers():
                self._bar.update(1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step everywhere.

        Args:
            step: Optimizer steps done so far.
            metrics: Numbers by key. The console shows a training line if `train/loss` is among them and an
                evaluation line if an `eval/` key is. Empty metrics are not recorded.
        """
        if not self._active or not metrics:
            return
        self._append(json_row(step, metrics) + "\n")
        for tracker in list(self._trackers):
            try:
                tracker.log(step, metrics)
            except Exception as error:  # of any library: a tracker must not end the run
                self._trackers.remove(tracker)
                self.say(f"error: --log_to={tracker.name} failed ({error}); training continues without it")
        if "train/loss" in metrics:
            self.say(console_line(step, self._total_steps, metrics))
        if any(key.startswith("eval/") for key in metrics):
            self.say(eval_line(step, self._total_steps, metrics))

    def _append(self, row: str) -> None:
        """Append to `metrics.jsonl`; a full disk or missing directory loses rows, not the run."""
        assert self._file is not None
        content = row.encode()
        size = None
        try:
            self._reopen_if_replaced()
            size = self._file.seek(0, os.SEEK_END)
            if self._file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._failing = False
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    self._file.truncate(size)  # no torn row
            if not self._failing:
                self.say(f"error: {self._path} cannot be written ({error}); training continues without it")
            self._failing = True

    def _reopen_if_replaced(self) -> None:
        """Open the file again if it was deleted or replaced: rows in a deleted file are lost in silence.

        Raises:
            OSError: The directory is missing or not writable.
        """
        assert self._file is not None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                return
        opened = self._path.open("ab", buffering=0)
        self._file.close()
        self._file = opened
        self.say(f"error: {self._path} was deleted or replaced: earlier rows of this run are not in it")

    def write(self, path: Path, text: str) -> None:
        """Write a small file; if that fails, print its content."""
        if not self._active:
            return
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            self.say(f"error: {path} cannot be written ({error}): {text}")

    def say(self, line: str) -> None:
        """Print a line on rank 0's standard output, above the progress bar."""
        if not self._active:
            return
        # A terminal that cannot show λ must not end a training run.
        encoding = sys.stdout.encoding or "utf-8"
        with _outliving_readers():
            tqdm.write(line.encode(encoding, "replace").decode(encoding))
            sys.stdout.flush()

    def close(self) -> None:
        """Close the bar, the file and the trackers; calling it again does nothing."""
        if not self._active:
            return
        self._active = False
        with _outliving_readers():
            self._bar.close()
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:  # of any library: a tracker must not end the run
                print(f"error: --log_to={tracker.name} failed ({error})", flush=True)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the accelerator, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

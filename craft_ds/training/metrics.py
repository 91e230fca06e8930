"""Logging of a run: console lines, `metrics.jsonl` and Weights & Biases.

One call of `MetricsLogger.log` feeds all three under the same keys, which docs/logging.md lists.
"""

import contextlib
import errno
import json
import math
import os
import resource
import shutil
import sys
from collections.abc import Mapping
from datetime import timedelta
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.default import WandBConfig
from tqdm import tqdm

from craft_ds.errors import UserError
from craft_ds.tensor_io.filesystem import atomic_file

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
    """Cut ``metrics.jsonl`` back to what a checkpoint of ``step`` has seen, atomically.

    A run that died went on logging after its last checkpoint; resuming does those steps again. A line torn by
    the crash is dropped as well.

    Args:
        path: The file; nothing happens when it does not exist.
        step: Rows of later steps go.
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


class MetricsLogger:
    """Logs the metrics of one run; on ranks other than the main one every method does nothing.

    Example:
        >>> logger = MetricsLogger(Path("outputs/run"), 10_000, WandBConfig(), {}, is_main=False)
        >>> logger.log(100, {"train/loss": 0.523, "train/grad_norm": 1.234, "train/lr": 3e-4})
        >>> logger.close()
    """

    def __init__(
        self,
        output_dir: Path,
        total_steps: int,
        wandb_config: WandBConfig,
        run_config: Mapping[str, Any],
        is_main: bool = True,
        resume_step: int | None = None,
    ) -> None:
        """Open ``<output_dir>/metrics.jsonl``, the progress bar and, where asked for, the wandb run.

        Args:
            output_dir: Directory of the run; made when missing.
            total_steps: Optimizer steps of the whole run.
            wandb_config: LeRobot's own ``--wandb.*`` options.
            run_config: The configuration as plain values, kept with the wandb run.
            is_main: Whether this rank logs at all.
            resume_step: Step of the checkpoint the run goes on from, ``None`` for a new run.

        Raises:
            UserError: wandb was asked for and could not start (on the main rank only).
        """
        self._active = is_main
        self._file: FileIO | None = None
        self._failing = False
        self._wandb: Any = None
        if not is_main:
            return
        self._total_steps = total_steps
        is_new = not output_dir.exists()
        output_dir.mkdir(parents=True, exist_ok=True)
        if wandb_config.enable:
            try:
                self._wandb = _start_wandb(output_dir, wandb_config, run_config, resume_step is not None)
            except UserError:
                if is_new:  # the mended command must not find its own directory in the way
                    shutil.rmtree(output_dir, ignore_errors=True)
                raise
        path = output_dir / METRICS_FILE
        if resume_step is not None:
            drop_rows_after(path, resume_step)
        self._file = path.open("wb" if resume_step is None else "ab", buffering=0)
        self._bar = tqdm(
            total=total_steps,
            initial=resume_step or 0,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=None,  # None: no bar where stderr is not a terminal
        )

    @property
    def wandb_run_id(self) -> str | None:
        """Identity of the wandb run, where there is one."""
        return None if self._wandb is None else str(self._wandb.id)

    def advance(self) -> None:
        """Move the progress bar by one optimizer step."""
        if self._active:
            self._bar.update(1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step everywhere.

        Args:
            step: Optimizer steps done so far.
            metrics: Plain numbers by key (see the module's docstring). The console shows a training line when
                ``train/loss`` is among them and an evaluation line when an ``eval/`` key is. An empty
                mapping is not recorded.
        """
        if not self._active or not metrics:
            return
        self._append(json_row(step, metrics) + "\n")
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)
        if "train/loss" in metrics:
            self.say(console_line(step, self._total_steps, metrics))
        if any(key.startswith("eval/") for key in metrics):
            self.say(eval_line(step, self._total_steps, metrics))

    def _append(self, row: str) -> None:
        """A disk that is full costs rows of the log, not the run."""
        assert self._file is not None
        content, size = row.encode(), self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._failing = False
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(size)  # no torn row
            if not self._failing:
                self.say(f"error: {self._file.name} cannot be written ({error}); training goes on without it")
            self._failing = True

    def write(self, path: Path, text: str) -> None:
        """Write a small file, or say what it would have held."""
        if not self._active:
            return
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            self.say(f"error: {path} cannot be written ({error}): {text}")

    def say(self, line: str) -> None:
        """Print a line on the main rank's standard output without tearing the progress bar."""
        if not self._active:
            return
        # A terminal that cannot show λ must not end a training run.
        encoding = sys.stdout.encoding or "utf-8"
        tqdm.write(line.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()

    def close(self) -> None:
        """Finish the bar, the file and the wandb run; calling it again does nothing."""
        if not self._active:
            return
        self._active = False
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(output_dir: Path, config: WandBConfig, run_config: Mapping[str, Any], resume: bool) -> Any:
    """Start or continue the wandb run of ``output_dir``, whose id LeRobot's convention finds in its files."""
    # Imported here: a run without wandb should not pay for it.
    import wandb
    from lerobot.common.wandb_utils import get_wandb_run_id_from_filesystem

    run_id = config.run_id
    if run_id is None and resume and (output_dir / "wandb" / "latest-run").exists():
        run_id = get_wandb_run_id_from_filesystem(output_dir)
    mode: Any = config.mode or "online"
    if mode not in ("online", "offline", "disabled"):
        raise UserError(f"--wandb.mode={mode}: choose online, offline or disabled")
    try:
        return wandb.init(
            id=run_id,
            project=config.project,
            entity=config.entity,
            name=run_config.get("job_name"),
            notes=config.notes,
            tags=_tags(run_config) if config.add_tags else None,
            dir=output_dir,
            config=dict(run_config),
            job_type="train",
            # Offline runs have no history to ask for; the same id joins them when they are synchronised.
            resume="allow" if run_id is not None and mode == "online" else None,
            mode=mode,
            settings=wandb.Settings(silent=True),
        )
    except wandb.errors.Error as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--wandb.enable=true: wandb did not start ({reason}); "
            "log in with 'wandb login' or pass --wandb.mode=offline"
        ) from error


def _tags(run_config: Mapping[str, Any]) -> list[str]:
    """Return LeRobot's tags of a run, cut to the 64 characters that wandb allows."""
    values = {
        "policy": (run_config.get("policy") or {}).get("type"),
        "seed": run_config.get("seed"),
        "dataset": (run_config.get("dataset") or {}).get("repo_id"),
    }
    return [f"{name}:{value}"[:64] for name, value in values.items() if value is not None]


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the accelerator, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

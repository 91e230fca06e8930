"""DeepSpeed's Adam for optimizers that are offloaded to the CPU."""

import contextlib
import logging
import time
from pathlib import Path

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder
from filelock import FileLock

from craft_ds.distributed.env import is_local_rank0
from craft_ds.errors import UserError, one_line

logger = logging.getLogger(__name__)

LONGEST_BUILD_S = 600
QUIET_S = 5  # once it is built, each rank of a run holds the marker only briefly

_INSTEAD = 'write "zero_force_ds_cpu_optimizer": false into the --ds_config file to step with torch'
_HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")


def cpu_adam(optimizer: torch.optim.Optimizer) -> DeepSpeedCPUAdam:
    """Return DeepSpeed's vectorised Adam for the parameter groups of torch's Adam or AdamW.

    It is compiled on first use on a machine, which takes minutes. It computes 1 − β₂ in fp32, so that its
    second moments differ from torch's by a relative 1.3e-5.

    Raises:
        UserError: It cannot replace this optimizer, or cannot be compiled.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        raise UserError(f"DeepSpeedCPUAdam cannot replace {type(optimizer).__name__}: {_INSTEAD}")
    for name in ("amsgrad", "maximize"):
        if any(group[name] for group in optimizer.param_groups):
            raise UserError(f"DeepSpeedCPUAdam has no {name}: {_INSTEAD}")
    groups = [{key: group[key] for key in ("params", *_HYPERPARAMETERS)} for group in optimizer.param_groups]
    try:
        compile_cpu_adam()
        return DeepSpeedCPUAdam(groups, adamw_mode=isinstance(optimizer, torch.optim.AdamW))
    except RuntimeError as error:
        reason = one_line(error.__cause__ or error)
        raise UserError(
            f"DeepSpeedCPUAdam needs g++ and ninja ({reason}): install them, or {_INSTEAD}"
        ) from error


def compile_cpu_adam() -> None:
    """Compile DeepSpeed's Adam if this machine has not yet, and load it.

    Raises:
        RuntimeError: The compilation failed.
    """
    from torch.utils import cpp_extension  # late: its import warns of a CUDA toolkit without a GPU

    # torch has no public name for this folder, which it creates.
    wait_for_other_builders(Path(cpp_extension._get_build_directory(CPUAdamBuilder.NAME, verbose=False)))
    CPUAdamBuilder().load()


def wait_for_other_builders(directory: Path) -> None:
    """Wait while another process compiles in `directory`, and remove the marker of a killed one.

    torch marks a folder in which it builds with a file `lock`. A killed process leaves it behind, and torch
    itself would then wait forever without a message.
    """
    marker = directory / "lock"
    started = time.monotonic()
    warned = not is_local_rank0()
    while (age := _age_s(marker)) is not None:
        if age > LONGEST_BUILD_S:
            _remove_old(marker)
        elif not warned and time.monotonic() - started > QUIET_S:
            logger.warning(
                "%s: another process compiles DeepSpeed's Adam, or was killed while compiling; waiting for "
                "at most %d s; remove the file if nothing compiles",
                marker,
                LONGEST_BUILD_S - age,
            )
            warned = True
        time.sleep(0.1)


def _remove_old(marker: Path) -> None:
    """Remove an old marker under a lock: a slow process must not remove the marker of a new build."""
    with contextlib.ExitStack() as stack:
        # Some network file systems have no locks; there, it may happen.
        with contextlib.suppress(OSError, NotImplementedError):
            stack.enter_context(FileLock(marker.with_name("craft_ds.lock")))
        age = _age_s(marker)
        if age is not None and age > LONGEST_BUILD_S:
            marker.unlink(missing_ok=True)
            logger.warning("%s: removed, its process was killed %d min ago", marker, age // 60)


def _age_s(path: Path) -> float | None:
    """Return the seconds since a file was written; None if it does not exist."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None

"""DeepSpeed's Adam for optimizers that are offloaded to the CPU."""

import contextlib
import fcntl
import logging
import time
from pathlib import Path

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder

from craft_ds.distributed.env import is_local_rank0
from craft_ds.errors import UserError, one_line

logger = logging.getLogger(__name__)

LONGEST_BUILD_S = 600
QUIET_S = 5  # where it is built already, each rank of a run holds the mark for a moment only

_INSTEAD = 'write "zero_force_ds_cpu_optimizer": false into the --ds_config file to step with torch'
_HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")


def cpu_adam(optimizer: torch.optim.Optimizer) -> DeepSpeedCPUAdam:
    """DeepSpeed's vectorised Adam over the parameter groups of torch's Adam or AdamW.

    It is compiled when it is first used on a machine, which takes minutes. It computes 1 − β₂ in fp32, so
    that its second moments differ from torch's by 1.3e-5 of their value.

    Raises:
        UserError: It cannot stand in for this optimizer, or cannot be compiled.
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
    """Compile DeepSpeed's Adam where this machine has not yet, and load it.

    Raises:
        RuntimeError: It cannot be compiled.
    """
    from torch.utils import cpp_extension  # late: it warns, on import, of a CUDA toolkit without a GPU

    # torch has no public name for this folder, which it creates.
    wait_for_other_builders(Path(cpp_extension._get_build_directory(CPUAdamBuilder.NAME, verbose=False)))
    CPUAdamBuilder().load()


def wait_for_other_builders(directory: Path) -> None:
    """Wait while another process compiles there, and clear away what a killed one has left behind.

    torch marks a folder it builds in with a file that a killed process leaves there; torch itself would wait
    for it to go until the end of time, and without a word.
    """
    mark = directory / "lock"
    began = time.monotonic()
    said = not is_local_rank0()
    while (age := _age_s(mark)) is not None:
        if age > LONGEST_BUILD_S:
            _remove_old(mark)
        elif not said and time.monotonic() - began > QUIET_S:
            logger.warning(
                "%s: another process compiles DeepSpeed's Adam, or was killed while it did; waiting for "
                "%d s at most; remove the file if nothing compiles",
                mark,
                LONGEST_BUILD_S - age,
            )
            said = True
        time.sleep(0.1)


def _remove_old(mark: Path) -> None:
    """One waiter at a time: a slow one must not take the mark of him who begins where the old one was."""
    with mark.with_name("craft_ds.lock").open("w") as turn:
        # Some network file systems have no locks; there, that may happen.
        with contextlib.suppress(OSError):
            fcntl.flock(turn, fcntl.LOCK_EX)
        age = _age_s(mark)
        if age is not None and age > LONGEST_BUILD_S:
            mark.unlink(missing_ok=True)
            logger.warning("%s: removed, its process was killed %d min ago", mark, age // 60)


def _age_s(path: Path) -> float | None:
    """Seconds since a file was written; None where there is none."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None

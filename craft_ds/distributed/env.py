"""The launch that this process belongs to, from the environment variables of its launcher.

`torchrun`, `deepspeed`, `accelerate` and job scripts describe a rank by RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT. `read_launch` alone decides what they mean; an empty variable is an unset one.
Without RANK the process runs as one rank, and a launcher's other variables are ignored. torch, DeepSpeed,
accelerate and LeRobot read the same variables themselves, so `settle_environment` removes what is ignored.

Imports nothing heavy.
"""

import os
import re
import sys
from collections.abc import Mapping
from typing import NamedTuple

from craft_ds.errors import UserError

RANK_TIMEOUT_S = 600.0
"""Default of `--rank_timeout`."""
REQUIRED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Ranks of this machine: torchrun's name, and DeepSpeed's.
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
# Sizes that only these set for the processes that they start: Open MPI, MPICH, Slurm's srun.
_PROCESS_MANAGERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_UNSET = f"or unset {', '.join(REQUIRED)} to run as one rank"


class Launch(NamedTuple):
    """This process among those that the launcher started.

    Attributes:
        rank: Rank of this process.
        world_size: Number of ranks.
        local_rank: Rank among those of this machine.
        address: Host name or address of rank 0; empty without a launcher.
        port: TCP port of the store on that host; 0 without a launcher.
        ignored: Variables of a launcher that mean nothing without RANK.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0
    ignored: tuple[str, ...] = ()

    @property
    def by_launcher(self) -> bool:
        """True if a launcher started this process, also as the only rank."""
        return bool(self.address)


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Return the launch that the environment describes.

    Raises:
        UserError: RANK is set and the set is incomplete or contradicts itself, or MPI or Slurm started
            several processes without it; the message names the variable.
    """
    names = (*REQUIRED, *_LOCAL_SIZES)
    given = {name: value for name in names if (value := environment.get(name, "").strip())}
    if "RANK" not in given:
        for name in _PROCESS_MANAGERS:
            size = environment.get(name, "")
            if re.fullmatch("[0-9]+", size) and int(size) > 1:
                raise UserError(
                    f"{name}={size}, but RANK is not set: each of these processes would run alone; export "
                    f"{', '.join(REQUIRED)} in the job script (docs/multi-node.md)"
                )
        return Launch(ignored=tuple(given))
    missing = [name for name in REQUIRED if name not in given]
    if missing:
        raise UserError(
            f"RANK={given['RANK']} is set, but not {', '.join(missing)}: torchrun and deepspeed set them, a "
            f"job script must export them (docs/multi-node.md), {_UNSET}"
        )
    sizes = ["WORLD_SIZE", *(name for name in _LOCAL_SIZES if name in given)]
    numbers = {name: _number(name, given[name], 1) for name in (*sizes, "MASTER_PORT")}
    numbers |= {name: _number(name, given[name], 0) for name in ("RANK", "LOCAL_RANK")}
    for size in sizes[1:]:
        if numbers[size] > numbers["WORLD_SIZE"]:
            raise _contradiction(given, size, "WORLD_SIZE", "at most")
    for number, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", sizes[-1])):
        if numbers[number] >= numbers[size]:
            raise _contradiction(given, number, size, "less than")
    if numbers["MASTER_PORT"] > 65535:
        raise UserError(f"MASTER_PORT={numbers['MASTER_PORT']}: must be at most 65535; correct it, {_UNSET}")
    return Launch(
        numbers["RANK"],
        numbers["WORLD_SIZE"],
        numbers["LOCAL_RANK"],
        given["MASTER_ADDR"],
        numbers["MASTER_PORT"],
    )


def _number(name: str, text: str, minimum: int) -> int:
    if not re.fullmatch("[0-9]+", text) or int(text) < minimum:
        raise UserError(f"{name}={text}: must be an integer of at least {minimum}; correct it, {_UNSET}")
    return int(text)


def _contradiction(given: Mapping[str, str], small: str, large: str, relation: str) -> UserError:
    return UserError(
        f"{small}={given[small]}: must be {relation} {large}={given[large]}; correct one of them, {_UNSET}"
    )


def settle_environment() -> Launch:
    """Return the launch, and remove variables that do not describe it, for the libraries that read them too.

    Prints one line that names the ignored ones, if any. Call before torch, DeepSpeed or accelerate read them.

    Raises:
        UserError: See `read_launch`.
    """
    launch = read_launch()
    left = ", ".join(f"{name}={os.environ[name].strip()}" for name in launch.ignored)
    if left and left != "LOCAL_RANK=0":  # `set_local_rank`, in an earlier run of this process
        print(
            f"warning: ignored {left}: without RANK this process runs as one rank",
            file=sys.stderr,
            flush=True,
        )
    for name in (*REQUIRED, *_LOCAL_SIZES):
        if name in launch.ignored or not os.environ.get(name, "0").strip():
            del os.environ[name]
    return launch


def variables_of_this_rank() -> set[tuple[str, str]]:
    """Return the variables that a launcher, or a wrapper script under `mpirun`, sets for one rank."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
    return {(name, os.environ[name]) for name in names if os.environ.get(name)}


def launched_world_size() -> int:
    """Return the number of launched processes; 1 without a launcher."""
    return read_launch().world_size


def launched_rank() -> int:
    """Return the rank of this process; 0 without a launcher."""
    return read_launch().rank


def is_local_rank0() -> bool:
    """Return True on the process of each node that prints messages and checks shared files.

    Never raises: a process whose environment is wrong must be able to say so.
    """
    try:
        return read_launch().local_rank == 0
    except UserError:
        return True


def set_local_rank() -> None:
    """Set LOCAL_RANK without a launcher too: DeepSpeed reads it throughout a run."""
    os.environ.setdefault("LOCAL_RANK", "0")

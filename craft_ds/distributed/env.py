"""Environment variables set by the launcher (`deepspeed`, `torchrun`). Imports nothing heavy."""

import os


def launched_world_size() -> int:
    """Return the number of launched processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """Return the rank of this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def is_local_rank0() -> bool:
    """Return True on the process of each node that prints messages and checks shared files."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0

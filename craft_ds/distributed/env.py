"""What the launcher (`deepspeed`, `torchrun`) told this process. Imports nothing heavy."""

import os


def launched_world_size() -> int:
    """Number of processes that were launched; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process among those that were launched."""
    return int(os.environ.get("RANK", "0"))


def is_local_rank0() -> bool:
    """Whether this process speaks for its node before the process group exists."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0

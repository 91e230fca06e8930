"""`scripts/train_craft.py` with rank 1 killed once, at step DIES_AT of the environment."""

import os
import signal
import sys
from pathlib import Path

from craft_ds.cli import exit_without_teardown, run_command
from craft_ds.training import trainer

seed_step = trainer.seed_step
killed = Path(os.environ["KILLED"])


def kill_once(seed, step, rank):
    if step == int(os.environ["DIES_AT"]) and rank == 1 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return seed_step(seed, step, rank)


if __name__ == "__main__":
    trainer.seed_step = kill_once
    exit_without_teardown(lambda: run_command("train", sys.argv[1:]))

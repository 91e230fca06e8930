"""A rank that joins the others and leaves again. Argument: `--rank_timeout`.

With STUCK, the ranks meet but never connect, as behind a firewall.
"""

import os
import sys
import time

import torch.distributed as dist

from craft_ds.cli import exit_without_teardown, run_main
from craft_ds.distributed import collectives


def run() -> None:
    if "STUCK" in os.environ:
        collectives.meet = lambda launch, timeout: (dist.HashStore(), [os.uname().nodename, "other"])
    collectives.init_process_group(float(sys.argv[1]))
    collectives.destroy_process_group()


if __name__ == "__main__":
    print(f"at {time.time()}", flush=True)
    exit_without_teardown(lambda: run_main(run))

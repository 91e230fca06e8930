"""One rank of a spawn: runs the scenarios in order and writes down what each finds.

Arguments: the directory of results, the policy directory, the scratch directory, and names of scenarios
(none: all).
"""

import faulthandler
import os
import signal
import sys
import time
import traceback
from pathlib import Path

faulthandler.register(signal.SIGUSR1)

import torch  # noqa: E402

torch.set_num_threads(1)


def main() -> None:
    from lab import Lab
    from scenarios import scenarios_of

    from craft_ds.engines.zero import init_distributed

    results, policy_dir, scratch = map(Path, sys.argv[1:4])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    init_distributed()
    lab = Lab(rank, world_size, policy_dir, scratch)
    for name, scenario in scenarios_of(world_size).items():
        if sys.argv[4:] and name not in sys.argv[4:]:
            continue
        began = time.perf_counter()
        try:
            scenario(lab).save(results, name, rank)
        except Exception:
            (results / f"{name}.{rank}.error").write_text(traceback.format_exc())
        print(f"{name}: {time.perf_counter() - began:.1f} s")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

"""One rank of a spawn: runs the scenarios in order and writes their results.

Arguments: the family of engines, the directory of results, the policy directory, the scratch directory, and
scenarios as KIND/NAME (none: all).
"""

import os
import sys
import time
import traceback
from pathlib import Path

import torch


def main() -> None:
    from lab import Lab
    from registry import SPAWNS, Spawn

    from craft_ds.policies.pi0_fast import vocabulary_blocks

    vocabulary_blocks._LARGEST = 4096  # several blocks of this vocabulary; one in the reference
    family = sys.argv[1]
    if family.startswith("zero"):
        from craft_ds.engines.deepspeed import init_distributed
    else:
        from craft_ds.distributed.collectives import init_process_group as init_distributed

    results, policy_dir, scratch = map(Path, sys.argv[2:5])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    init_distributed()
    for kind, scenarios in SPAWNS[Spawn(family, world_size)].items():
        lab = Lab(kind, rank, world_size, policy_dir, scratch)
        for name, scenario in scenarios.items():
            if sys.argv[5:] and f"{kind}/{name}" not in sys.argv[5:]:
                continue
            began = time.perf_counter()
            try:
                scenario(lab).save(results, f"{kind}.{name}", rank)
            except Exception:
                (results / f"{kind}.{name}.{rank}.error").write_text(traceback.format_exc())
            print(f"{kind} {name}: {time.perf_counter() - began:.1f} s", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

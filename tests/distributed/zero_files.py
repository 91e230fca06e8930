"""DeepSpeed files that must all give the numbers of the single process, and a rank that runs each.

As a program: one rank. Arguments: the directory of results.
"""

import json
import os
import sys
from pathlib import Path

import lab
import torch

from craft_ds.engines.deepspeed_config import read_ds_config
from craft_ds.training.train_step import accumulate, retention_step, task_step

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# Small enough that the toy policy fills several buckets.
SMALL3 = {"sub_group_size": 60, "reduce_bucket_size": 150, "stage3_prefetch_bucket_size": 10}
FILES: dict[str, tuple[str, dict]] = {
    "zero2": ("zero2.json", {}),
    "zero2-offload": ("zero2.json", OFFLOAD),
    "zero2-round-robin": ("zero2.json", {"round_robin_gradients": True, "overlap_comm": False}),
    "zero2-not-contiguous": ("zero2.json", {"contiguous_gradients": False}),
    "zero2-all-reduce": ("zero2.json", {"reduce_scatter": False, "allgather_partitions": False}),
    "zero2-small-buckets": (
        "zero2.json",
        {"reduce_bucket_size": 30, "allgather_bucket_size": 50, "use_multi_rank_bucket_allreduce": False},
    ),
    "zero3-offload": ("zero3_offload.json", SMALL3),
    "zero3-small-buckets": ("zero3.json", SMALL3 | {"overlap_comm": False, "stage3_max_live_parameters": 10}),
    "zero3-all-reduce": (
        "zero3.json",
        {"contiguous_gradients": False, "reduce_scatter": False, "memory_efficient_linear": False},
    ),
}


def train(ranks: lab.Lab) -> lab.Output:
    """Run three steps whose micro-batches use different parameters."""
    engine, output = ranks.toy_engine(persistence=0), lab.Output()

    def mixed(step: int) -> list:
        # The gradient of the first micro-batch must survive the others.
        return ranks.toy_batches(step, 1) + 2 * ranks.toy_batches(step, 1, retention=True)

    task_step(engine, mixed(0), 0.0)
    # A discarded gradient must have no effect.
    accumulate(engine, mixed(5))
    engine.zero_grad()
    config = lab.craft_config("weighted", threshold=0.0)
    seen = retention_step(
        engine,
        task=mixed(1),
        anchors=ranks.toy_batches(1, 2, retention=True),
        constraint=None,
        multiplier=0.7,
        craft=config,
        max_norm=0.05,
    )
    output.values["triple"] = list(seen.triple)
    task_step(engine, ranks.toy_batches(2, 1), 0.0)
    output.add("parameters", lab.masters(engine))
    output.add("moments", lab.moments(engine))
    engine.close()
    return output


def main() -> None:
    from craft_ds.engines.deepspeed import init_distributed

    init_distributed()
    rank, world_size, results = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(sys.argv[1])
    for name, (file, changes) in FILES.items():
        config = read_ds_config(lab.DS_CONFIGS / file)
        config["zero_optimization"] |= changes
        # DeepSpeed's own Adam would have to be compiled.
        config["zero_force_ds_cpu_optimizer"] = False
        own = results / f"{name}.{rank}.ds_config"
        own.write_text(json.dumps(config))
        lab.ZERO[name] = (str(own), {})
        train(lab.Lab(name, rank, world_size, results, results)).save(results, name, rank)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

"""One rank: gradients of compiled layers on ranks against those of one process that compiles nothing.

Arguments: the directory of results, the policy directory, the directory of adapters, the backend of
`torch.compile`, and the names of cases.
"""

import json
import os
import sys
import traceback
from functools import partial
from pathlib import Path

import torch
from lab import Lab, gradients, masters
from scenarios_lora import KINDS
from torch._dynamo.utils import counters

from craft_ds.engines.base import Engine
from craft_ds.training.train_step import accumulate

CASES = {
    "fsdp": ("fsdp", {}),
    "fsdp-recompute": ("fsdp", {"recompute": True}),
    "fsdp-bf16": ("fsdp", {"dtype": "bfloat16"}),
    "fsdp-lora": ("fsdp", {"lora": "plain"}),
    "fsdp-dora": ("fsdp", {"lora": "dora"}),
    "zero2": ("zero2", {}),
}
SEEDS = (0, 1, 2)
"""Batches with prompts and actions of different lengths."""


def build(lab: Lab, adapters: Path, *, lora: str = "", **options) -> Engine:
    """Build an engine over the tiny pi0_fast, or over its adapters."""
    if lora:
        return lab.lora_engine(KINDS[lora], adapters / lora, **options)[0]
    return lab.pi0_engine(**options)


def compare(lab: Lab, adapters: Path, options: dict) -> dict:
    """Return the largest relative errors of loss and gradient, and the number of graphs.

    The error of a parameter's gradient is relative to its norm, or to a thousandth of the norm of all: some
    gradients of the attention are zero except for rounding.
    """
    alone = Lab("single", 0, 1, lab.policy_dir, lab.scratch)
    reference = build(alone, adapters, **options)
    engine = build(lab, adapters, compiled=True, **options)
    names = [name for name, _, _ in masters(engine)]
    counters.clear()
    found = {"loss": 0.0, "gradient": 0.0}
    for seed in SEEDS:
        expected_sums = accumulate(reference, [lab.whole(lab.pi0_batches, seed)])
        expected = {name: part.clone() for name, _, part in gradients(reference)}
        reference.zero_grad()
        sums = accumulate(engine, lab.pi0_batches(seed, 1))
        loss = engine.sum_scalars(sums.loss[None])[0]
        found["loss"] = max(found["loss"], abs(loss / expected_sums.loss.item() - 1))
        norm = torch.cat([*expected.values()]).norm()
        for name, start, part in gradients(engine):
            wanted = expected[name]
            error = (part - wanted[start : start + part.numel()]).norm() / max(wanted.norm(), 1e-3 * norm)
            found["gradient"] = max(found["gradient"], float(error))
        engine.zero_grad()
    found |= {"graphs": counters["stats"]["unique_graphs"], "names": sorted(set(names))}
    engine.close()
    return found


def main() -> None:
    from craft_ds.distributed.collectives import init_process_group
    from craft_ds.engines.deepspeed import init_distributed as init_deepspeed

    results, policy_dir, adapters = map(Path, sys.argv[1:4])
    torch.compile = partial(torch.compile, backend=sys.argv[4])
    init_deepspeed()
    init_process_group()  # the process group exists already
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name in sys.argv[5:]:
        kind, options = CASES[name]
        try:
            found = compare(Lab(kind, rank, world_size, policy_dir, results), adapters, options)
            (results / f"{name}.{rank}.json").write_text(json.dumps(found))
        except Exception:
            (results / f"{name}.{rank}.error").write_text(traceback.format_exc())
        torch._dynamo.reset()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

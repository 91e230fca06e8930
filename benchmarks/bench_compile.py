"""Time a task step with and without `--engine.compile=true`, in one process.

python benchmarks/bench_compile.py

A pi0_fast of 119 M parameters with random weights and one camera; batches of changing lengths. Steps with and
without compiled layers take turns on the same batches. On a GPU, if there is one.
"""

import argparse
import statistics
import time

import torch
from harness import (
    argument_parser,
    default_device,
    hardware,
    make_engine,
    mid_size_config,
    random_values,
    write_result,
)
from torch._dynamo.utils import counters

from craft_ds.cli import run_main
from craft_ds.engines.base import Engine
from craft_ds.engines.compiled_layers import check_compile, compile_layers_
from craft_ds.memory_planner.shapes import meta_policy_without_tokenizers
from craft_ds.testing.policies import random_batch
from craft_ds.training.train_step import task_step

WARM_UP = 2


def build(dtype: torch.dtype, *, compiled: bool) -> Engine:
    """Return an engine of the policy with random weights."""
    policy = meta_policy_without_tokenizers(mid_size_config())
    if compiled:
        compile_layers_(policy)
    return make_engine("single", policy, random_values, dtype)


def timed_step(engine: Engine, batch_size: int, seed: int) -> tuple[float, float]:
    """Take a step on a batch of the seed; return its seconds and its loss."""
    batch = random_batch(mid_size_config(), batch_size, seed)
    batch = {name: values.to(engine.device) for name, values in batch.items()}
    started = time.perf_counter()
    result = task_step(engine, [batch], 1.0)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result.loss


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    check_compile(mid_size_config())
    device = torch.cuda.get_device_name() if default_device().type == "cuda" else hardware()
    print(f"{device}; {args.dtype}, batch {args.batch_size}, medians of {args.steps} steps", flush=True)
    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype)
    engines = {"eager": build(dtype, compiled=False), "compiled": build(dtype, compiled=True)}
    seconds: dict[str, list[float]] = {way: [] for way in engines}
    first, difference = 0.0, 0.0
    for step in range(-WARM_UP, args.steps):
        measured = {way: timed_step(engine, args.batch_size, step) for way, engine in engines.items()}
        losses = [loss for _, loss in measured.values()]
        difference = max(difference, abs(losses[1] / losses[0] - 1))
        if step == -WARM_UP:
            first = measured["compiled"][0]
        if step >= 0:
            for way, (duration, _) in measured.items():
                seconds[way].append(duration)
    medians = {way: statistics.median(durations) for way, durations in seconds.items()}
    graphs = counters["stats"]["unique_graphs"]
    eager, compiled = medians.values()
    print(f"eager {eager:.3f} s, compiled {compiled:.3f} s: {eager / compiled:.2f} times as fast")
    print(f"the first compiled step {first:.0f} s, {graphs} graphs; losses differ by {difference:.0e}")
    write_result(
        "bench_compile",
        {"hardware": device, **vars(args), "seconds": seconds, "medians": medians}
        | {"first_step": first, "graphs": graphs, "loss_difference": difference},
    )


if __name__ == "__main__":
    run_main(main)

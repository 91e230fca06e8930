"""Measure gradient surgery: scalars, merge and dual step as a share of the retention step.

    python benchmarks/bench_surgery.py

Compared with it, on the same gradients in the same steps: the usual loop over parameters, sharded in the two
obvious ways, with dot products all-reduced per parameter and with gradients gathered per parameter. Medians
over interleaved repetitions; the tiny pi0_fast on one process and on two ZeRO-3 ranks that the script starts.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from harness import (
    CRAFT,
    argument_parser,
    batches,
    build_engine,
    hardware,
    run_case,
    serve_case,
    shard_sizes,
    write_result,
)
from torch import Tensor

import craft_ds.training.train_step as steps
from craft_ds.algorithm.multiplier import DualState, RetentionRecord
from craft_ds.cli import run_main
from craft_ds.engines.base import Engine

WARM_UP = 5
ROWS = {
    "step": "retention step",
    "surgery": "surgery: scalars, merge, dual step",
    "copy_gradient": "copy g_t (the shard)",
    "reduce_each": "naive: all-reduce each parameter's dots",
    "gather_each": "naive: gather each parameter's gradient",
}


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=30, help="measured steps (default: 30)")
    parser.add_argument(
        "--batch_size",
        type=int,
        default=16,
        help="samples per step over all ranks; as many anchors, and as many for the constraint (default: 16)",
    )
    return parser.parse_args()


def reduce_each(g_t: list[Tensor], g_r: list[Tensor], multiplier: float) -> None:
    """Project and merge with one all-reduce and one copy to the host per parameter."""
    total = [0.0, 0.0, 0.0]
    for t, r in zip(g_t, g_r, strict=True):
        dots = torch.stack([torch.sum(t * t), torch.sum(t * r), torch.sum(r * r)])
        if dist.is_initialized():
            dist.all_reduce(dots)
        total = [a + b for a, b in zip(total, dots.tolist(), strict=True)]
    _naive_merge(g_t, g_r, total[1] / total[2], multiplier)


def gather_each(g_t: list[Tensor], g_r: list[Tensor], multiplier: float) -> None:
    """Project and merge with the two full gradients of one parameter at a time."""
    tr = rr = 0.0
    for t, r in zip(g_t, g_r, strict=True):
        t, r = _full(t), _full(r)
        tr, rr = tr + torch.sum(t * r).item(), rr + torch.sum(r * r).item()
    _naive_merge(g_t, g_r, tr / rr, multiplier)


def _full(part: Tensor) -> Tensor:
    if not dist.is_initialized():
        return part
    full = part.new_empty(part.numel() * dist.get_world_size())
    dist.all_gather_into_tensor(full, part.contiguous())
    return full


def _naive_merge(g_t: list[Tensor], g_r: list[Tensor], removed: float, multiplier: float) -> None:
    for t, r in zip(g_t, g_r, strict=True):
        projected = t - removed * r
        t.copy_(projected + multiplier * r)


class Stopwatch:
    """Sum of the seconds spent in wrapped functions."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def wrap(self, function: Callable) -> Callable:
        """Return the function with its time measured."""

        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            result = function(*args)
            self._seconds += time.perf_counter() - started
            return result

        return timed

    def read(self) -> float:
        """Return the seconds since the last call and reset them."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def timed_together(engine: Engine, action: Callable[[], None]) -> float:
    """Return the seconds of an action that all ranks start together."""
    engine.barrier()
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def copy_by_parameter(shards: Sequence[Tensor], sizes: list[int]) -> list[Tensor]:
    """Return a copy of shards with one tensor per parameter."""
    if len(shards) == len(sizes):
        return [shard.clone() for shard in shards]
    (flat,) = shards
    return [part.clone() for part in flat.split(sizes)]


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Return the median seconds of every row of the table on this rank."""
    engine = build_engine()
    share = max(1, case["batch_size"] // engine.world_size)
    task, anchors, constraint = (batches(engine, share, seed) for seed in (1, 2, 3))
    dual, sizes = DualState(CRAFT), shard_sizes(engine)
    surgery, copy_gradient, aside = Stopwatch(), Stopwatch(), Stopwatch()
    pair: list[list[Tensor]] = []

    def keep(g_t: Sequence[Tensor], g_r: Sequence[Tensor]) -> None:
        pair[:] = [copy_by_parameter(g_t, sizes), copy_by_parameter(g_r, sizes)]

    timed_gram, kept = surgery.wrap(steps.gram), aside.wrap(keep)

    def gram_after_keeping(g_t: Sequence[Tensor], g_r: Sequence[Tensor]) -> Tensor:
        kept(g_t, g_r)
        engine.barrier()  # the ranks finish their passes at different times, which is not part of surgery
        return timed_gram(g_t, g_r)

    # The functions that `retention_step` calls, so that the measured code is the executed code.
    steps.gram = gram_after_keeping
    steps.merge_layers, steps.merge_ = surgery.wrap(steps.merge_layers), surgery.wrap(steps.merge_)
    engine.sum_scalars = surgery.wrap(engine.sum_scalars)  # type: ignore[method-assign]
    engine.take_gradient = copy_gradient.wrap(engine.take_gradient)  # type: ignore[method-assign]
    dual.ascend = surgery.wrap(dual.ascend)  # type: ignore[method-assign]

    def step() -> None:
        result = steps.retention_step(
            engine,
            task=task,
            anchors=anchors,
            constraint=constraint,
            multiplier=dual.multiplier,
            craft=CRAFT,
            max_norm=1.0,
        )
        assert result.applied
        merged = result.merged
        record = RetentionRecord(
            0,
            dual.multiplier,
            1.0,
            result.retention_loss,
            merged.conflict,
            merged.cosine,
            merged.b,
            result.triple.tr,
        )
        dual.ascend(record)

    seconds: dict[str, list[float]] = {row: [] for row in ROWS}
    for repeat in range(-WARM_UP, case["repeats"]):
        row = {"step": timed_together(engine, step) - aside.read()}
        row |= {"surgery": surgery.read(), "copy_gradient": copy_gradient.read()}
        for name, naive in (("reduce_each", reduce_each), ("gather_each", gather_each)):
            g_t, g_r = ([part.clone() for part in parts] for parts in pair)
            row[name] = timed_together(engine, partial(naive, g_t, g_r, dual.multiplier))
        if repeat >= 0:
            for name, value in row.items():
                seconds[name].append(value)
    engine.close()
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    serve_case(measure)
    args = parse_arguments()
    results = {world_size: run_case(vars(args), world_size, environment={})[0] for world_size in (1, 2)}
    print(f"{hardware()}; {args.batch_size} samples per step over all ranks, median of {args.repeats}")
    for world_size, seconds in results.items():
        print(f"\n{world_size} rank{'s, ZeRO-3' if world_size > 1 else ', no sharding'}")
        for name, label in ROWS.items():
            share = 100 * seconds[name] / seconds["step"]
            print(f"  {label:<40} {1e3 * seconds[name]:9.2f} ms  {share:6.2f} % of the step")
    write_result("bench_surgery", {"hardware": hardware(), **vars(args), "seconds": results})


if __name__ == "__main__":
    run_main(main)

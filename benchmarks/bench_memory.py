"""Measure the memory of gradient surgery in a step, and of a run while it loads.

    python benchmarks/bench_memory.py

Surgery: the peak of a retention step minus that of a plain step, in elements of tensors, in units of one
gradient shard (the part of the gradient per rank). The shipped tiny pi0_fast on 1, 2 and 3 ranks that the
script starts.

Loading: a pi0_fast of 119 M random parameters, in one file, read directly into shards by the engines of
2 and 3 ranks. Anonymous memory of the process beyond that before the engine was built, in units of one fp32
parameter shard:
  ready    memory of the finished engine: its shard; for ZeRO also masters and gradient accumulator
  making   peak before the first read (DeepSpeed gathers each parameter once, to register hooks on it)
  loading  peak from the first read to the end, without what `ready` has beyond the shard: the memory needed
           to load the weights (limit 1.25)
"""

import argparse
import gc
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from harness import (
    CRAFT,
    argument_parser,
    batches,
    build_engine,
    hardware,
    init_ranks,
    make_engine,
    memory_bytes,
    mid_size_config,
    run_case,
    serve_case,
    shard_sizes,
    write_random_weights,
    write_result,
)

from craft_ds.cli import run_main
from craft_ds.errors import UserError
from craft_ds.memory_planner.shapes import meta_policy_without_tokenizers
from craft_ds.memory_planner.tensor_memory import MemoryCounter
from craft_ds.policies.weights import WeightReader
from craft_ds.training.train_step import retention_step, task_step

WARM_UP, MEASURED = 3, 2
LIMIT = 1.25


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--batch_size", type=int, default=4, help="samples per rank and pass (default: 4)")
    parser.add_argument("--part", choices=("surgery", "loading"), nargs="+", default=["surgery", "loading"])
    parser.add_argument("--engine", nargs="+", default=["zero3", "fsdp"], help="engines that load")
    return parser.parse_args()


def measure_surgery(case: dict[str, Any]) -> dict[str, int]:
    """Return the peaks on this rank, in elements."""
    engine = build_engine()
    task, anchors = (batches(engine, case["batch_size"], seed=1) for _ in range(2))

    def plain() -> None:
        task_step(engine, task, 1.0)

    def retention() -> None:
        retention_step(
            engine, task=task, anchors=anchors, constraint=None, multiplier=1.0, craft=CRAFT, max_norm=1.0
        )

    peaks: dict[str, int] = {}
    for action in (plain, retention):
        for repeat in range(WARM_UP + MEASURED):
            with MemoryCounter() as counter:
                action()
            if repeat >= WARM_UP:
                peaks[action.__name__] = max(peaks.get(action.__name__, 0), counter.peak // 4)
    engine.close()
    return peaks | {"shard": sum(shard_sizes(engine))}


class AnonymousPeak:
    """Peak of this process's anonymous memory, sampled every millisecond in a thread.

    Attributes:
        before: Bytes at the start.
        peak: Largest value since the start, or since it was last set to 0.
    """

    def __enter__(self) -> "AnonymousPeak":
        gc.collect()
        self.before = self.peak = memory_bytes("RssAnon")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, memory_bytes("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, memory_bytes("RssAnon"))


def measure_loading(case: dict[str, Any]) -> dict[str, float]:
    """Return the anonymous memory of this rank, in bytes."""
    init_ranks(case["engine"])
    policy = meta_policy_without_tokenizers(mid_size_config())
    shard = 4 * sum(p.numel() for p in policy.parameters()) / case["world_size"]
    # Import what the libraries otherwise import at first use, during the measurement.
    _import_what_engines_import()
    with WeightReader(Path(case["directory"]), policy) as weights, AnonymousPeak() as memory:
        making = 0

        def read(name: str, start: int, stop: int) -> torch.Tensor:
            nonlocal making
            if not making:
                making, memory.peak = memory.peak, 0
            return weights.read(name, start, stop)

        engine = make_engine(case["engine"], policy, read)
    gc.collect()
    ready = memory_bytes("RssAnon")
    engine.close()
    return {
        "shard": shard,
        "ready": ready - memory.before,
        "making": max(making, memory.peak) - memory.before,
        "loading": memory.peak - max(ready - memory.before - shard, 0) - memory.before,
    }


def _import_what_engines_import() -> None:
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401


def loading(kinds: list[str]) -> list[dict[str, Any]]:
    """Measure and print the loading table."""
    rows = []
    print(f"\n{'engine':<10}{'ranks':>6}{'shard MB':>10}{'ready':>8}{'making':>8}{'loading':>9}   in shards")
    with tempfile.TemporaryDirectory() as directory:
        write_random_weights(
            meta_policy_without_tokenizers(mid_size_config()), Path(directory), torch.float32
        )
        for kind in kinds:
            for world_size in (2, 3):
                case = {"part": "loading", "engine": kind, "world_size": world_size, "directory": directory}
                worst = max(run_case(case, world_size), key=lambda one: one["loading"])
                row = {name: worst[name] / worst["shard"] for name in ("ready", "making", "loading")}
                rows.append({"engine": kind, "ranks": world_size, "shard_bytes": worst["shard"]} | row)
                print(
                    f"{kind:<10}{world_size:>6}{worst['shard'] / 1e6:>10.1f}{row['ready']:>8.2f}"
                    f"{row['making']:>8.2f}{row['loading']:>9.2f}",
                    flush=True,
                )
    return rows


def surgery(results: dict[int, dict[str, Any]], batch_size: int) -> None:
    """Complete and print the table of surgery."""
    print(f"fp32 elements, rank 0, {batch_size} samples per rank and pass")
    print(
        f"{'ranks':>5} {'gradient shard':>15} {'plain peak':>12} {'retention peak':>15} {'extra / shard':>14}"
    )
    for world_size, peaks in results.items():
        peaks["extra_in_shards"] = (peaks["retention"] - peaks["plain"]) / peaks["shard"]
        print(
            f"{world_size:>5} {peaks['shard']:>15,} {peaks['plain']:>12,} {peaks['retention']:>15,} "
            f"{peaks['extra_in_shards']:>14.3f}"
        )


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Measure a case of either part."""
    return measure_surgery(case) if case["part"] == "surgery" else measure_loading(case)


def main() -> None:
    serve_case(measure)
    args = parse_arguments()
    result: dict[str, Any] = {"hardware": hardware(), **vars(args)}
    if "surgery" in args.part:
        case = {"part": "surgery", "batch_size": args.batch_size}
        peaks = {world_size: run_case(case, world_size)[0] for world_size in (1, 2, 3)}
        print(hardware())
        surgery(peaks, args.batch_size)
        result["elements"] = peaks
    if "loading" in args.part:
        result["loading"] = loading(args.engine)
    write_result("bench_memory", result)
    late = [row for row in result.get("loading", []) if row["loading"] > LIMIT]
    if late:
        raise UserError(f"loading took {max(row['loading'] for row in late):.2f} shards, limit {LIMIT}")


if __name__ == "__main__":
    run_main(main)

"""What a run takes in memory while it loads, and what gradient surgery adds to a step.

Surgery: the peak of a retention step over that of a plain step, in elements that tensors ask for, in units
of one gradient shard (a rank's part of the gradient). The shipped tiny pi0_fast on 1, 2 and 3 ranks that the
script starts itself.

Loading: a pi0_fast of 119 M random parameters, in one file, read straight into shards by the engines of
2 and 3 ranks. Anonymous memory of the process above what it was before the engine was made, in units of one
fp32 parameter shard:
  ready    what the engine keeps when it is made: its shard; for ZeRO also masters and gradient accumulator
  making   the most while it is made (DeepSpeed gathers each parameter once, to hang hooks on it)
  loading  the most from the first byte that is read to the end, without what `ready` has beside the shard:
           what it takes to bring the weights in (limit 1.25)
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
    batches,
    build_engine,
    hardware,
    join_ranks,
    make_engine,
    memory_bytes,
    mid_size_config,
    run_benchmark,
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, default=4, help="samples a rank and pass (default: 4)")
    parser.add_argument("--part", choices=("surgery", "loading"), nargs="+", default=["surgery", "loading"])
    parser.add_argument("--engine", nargs="+", default=["zero3", "fsdp"], help="engines that load")
    return parser.parse_args()


def measure_surgery(batch_size: int) -> dict[str, int]:
    """Peaks in elements, on this rank."""
    engine = build_engine()
    task, anchors = batches(engine, batch_size, seed=1), batches(engine, batch_size, seed=1)

    def plain() -> None:
        task_step(engine, task, 1.0)

    def retention() -> None:
        retention_step(
            engine, task=task, anchors=anchors, constraint=None, multiplier=1.0, craft=CRAFT, max_norm=1.0
        )

    peaks = {}
    for action in (plain, retention):
        for repeat in range(WARM_UP + MEASURED):
            with MemoryCounter() as counter:
                action()
            if repeat >= WARM_UP:
                peaks[action.__name__] = max(peaks.get(action.__name__, 0), counter.peak // 4)
    engine.close()
    return peaks | {"shard": sum(shard_sizes(engine))}


class AnonymousPeak:
    """Watches the anonymous memory of this process from a thread, every millisecond.

    Attributes:
        before: Bytes at the beginning.
        peak: The most since then, or since it was last set to 0.
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
    """Anonymous memory of this rank, in bytes."""
    join_ranks(case["engine"])
    policy = meta_policy_without_tokenizers(mid_size_config())
    shard = 4 * sum(p.numel() for p in policy.parameters()) / case["world_size"]
    # Libraries import parts of themselves when they are first used.
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
                case = {"engine": kind, "world_size": world_size, "directory": directory}
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
    """Print the table of surgery."""
    print(f"fp32 elements, rank 0, {batch_size} samples a rank and pass")
    print(
        f"{'ranks':>5} {'gradient shard':>15} {'plain peak':>12} {'retention peak':>15} {'extra / shard':>14}"
    )
    for world_size, peaks in results.items():
        peaks["extra_in_shards"] = (peaks["retention"] - peaks["plain"]) / peaks["shard"]
        print(
            f"{world_size:>5} {peaks['shard']:>15,} {peaks['plain']:>12,} {peaks['retention']:>15,} "
            f"{peaks['extra_in_shards']:>14.3f}"
        )


def main() -> None:
    serve_case(measure_loading)
    args = parse_arguments()
    result: dict[str, Any] = {"hardware": hardware(), **vars(args)}
    if "surgery" in args.part:
        peaks = run_benchmark(lambda: measure_surgery(args.batch_size), (1, 2, 3))
        if peaks is None:
            return
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

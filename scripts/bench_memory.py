"""What gradient surgery costs in memory: the peak of a retention step over that of a plain step.

Counted in elements that tensors ask for, not in resident memory, in units of one gradient shard (a rank's
part of the gradient). The tiny pi0_fast on 1, 2 and 3 ranks that the script starts itself.
"""

import argparse

from bench_common import CRAFT, batches, build_engine, hardware, run_benchmark, shard_sizes, write_result

from craft_ds.cli import run_main
from craft_ds.memory_counter import MemoryCounter
from craft_ds.steps import retention_step, task_step

WARM_UP, MEASURED = 3, 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, default=4, help="samples a rank and pass (default: 4)")
    return parser.parse_args()


def measure(batch_size: int) -> dict[str, int]:
    """Peaks in elements, on this rank."""
    engine = build_engine()
    task, anchors = batches(engine, batch_size, seed=1), batches(engine, batch_size, seed=1)

    def plain() -> None:
        task_step(engine, task, 1.0)

    def retention() -> None:
        retention_step(engine, task, anchors, None, 1.0, CRAFT, 1.0)

    peaks = {}
    for action in (plain, retention):
        for repeat in range(WARM_UP + MEASURED):
            with MemoryCounter() as counter:
                action()
            if repeat >= WARM_UP:
                peaks[action.__name__] = max(peaks.get(action.__name__, 0), counter.peak // 4)
    engine.close()
    return peaks | {"shard": sum(shard_sizes(engine))}


def main() -> None:
    args = parse_arguments()
    results = run_benchmark(lambda: measure(args.batch_size), (1, 2, 3))
    if results is None:
        return
    print(f"fp32 elements, rank 0, {args.batch_size} samples a rank and pass; {hardware()}")
    print(
        f"{'ranks':>5} {'gradient shard':>15} {'plain peak':>12} {'retention peak':>15} {'extra / shard':>14}"
    )
    for world_size, peaks in results.items():
        peaks["extra_in_shards"] = (peaks["retention"] - peaks["plain"]) / peaks["shard"]
        print(
            f"{world_size:>5} {peaks['shard']:>15,} {peaks['plain']:>12,} {peaks['retention']:>15,} "
            f"{peaks['extra_in_shards']:>14.3f}"
        )
    write_result("bench_memory", {"hardware": hardware(), **vars(args), "elements": results})


if __name__ == "__main__":
    run_main(main)

"""Measure a checkpoint: craft-ds, torch.distributed.checkpoint (DCP) and DeepSpeed in one run.

    python benchmarks/bench_checkpoint.py

A pi0_fast with random weights takes one AdamW step on ranks that the script starts, so that masters and two
moments exist: 12 bytes per trainable parameter. Then each method saves it into a new directory of the same
disk, in an order that changes with each repetition. Medians over the repetitions, after one warm-up. After
each save, everything saved is overwritten in memory, loaded by the method's own loader and compared (CRC-32
of every tensor).

Columns:
  held up   seconds until training can continue, from a barrier before to a barrier after: the slowest rank
  done      seconds until the method reports the end; later only for methods that write in the background
  on disk   seconds until an fsync of every file and directory of the checkpoint has returned. craft-ds and
            DCP fsync their files, DeepSpeed does not. craft-ds's seconds include the checksums,
            which no other method computes.
  extra     MB: the peak of resident memory minus that before the save, of the rank with the most. The peak
            is the kernel's (VmHWM, reset before each save), so that it includes short-lived allocations.
            Page cache is not part of it; mapped files are, and no method maps one.
  one file  yes if a model.safetensors with the full shape of every parameter exists at the end

The second part measures craft-ds at several sizes and dtypes, with trained or frozen embeddings: the extra
memory must stay below 64 MB per rank. The vocabulary determines the size, as in pi0_fast, so that the largest
tensor grows with the model.

Other programs on the machine disturb the figures: see the printed load and the range beside each median.
"""

import argparse
import gc
import os
import shutil
import statistics
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from checkpoint_methods import OTHERS, Method, is_consolidated, methods, overwrite
from harness import (
    OUTPUTS,
    argument_parser,
    hardware,
    init_ranks,
    make_engine,
    memory_bytes,
    mid_size_config,
    reset_peak,
    run_case,
    serve_case,
    write_random_weights,
    write_result,
)
from lerobot.policies.pretrained import PreTrainedPolicy

from craft_ds.cli import run_main
from craft_ds.distributed.collectives import gather_objects, rank0_only
from craft_ds.engines.base import Engine
from craft_ds.errors import UserError
from craft_ds.memory_planner.shapes import meta_policy_without_tokenizers
from craft_ds.policies.tiny_pi0_fast.policy import TinyPI0FastConfig
from craft_ds.policies.weights import WeightReader
from craft_ds.tensor_io.filesystem import fsync
from craft_ds.testing.policies import random_batch
from craft_ds.training.train_step import task_step

LIMIT = 64e6
_SMALLEST = 45e6
_CRC_PIECE = 1 << 24


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--part", choices=("compare", "memory"), nargs="+", default=["compare", "memory"])
    add("--engine", choices=("fsdp", "zero3"), nargs="+", default=["fsdp", "zero3"])
    add("--ranks", type=int, default=2)
    add("--repeats", type=int, default=3, help="measured saves per method (default: 3)")
    add("--parameters", type=int, default=150, help="millions, at least 50, to compare with (default: 150)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the forward pass",
    )
    add("--others", choices=OTHERS, nargs="*", default=list(OTHERS), help="compare craft-ds with these")
    add("--sizes", type=int, nargs="+", default=[60, 250], help="millions of the second part")
    add(
        "--directory",
        type=Path,
        default=OUTPUTS,
        help="where to write, and remove, checkpoints",
    )
    return parser.parse_args()


def policy_config(parameters: float) -> TinyPI0FastConfig:
    """Return the configuration of a pi0_fast of about this size, mostly embeddings, as in the real one."""
    config = replace(mid_size_config(), text_depth=2)
    # Even, as pi0_fast's: DCP copies a shard whose storage FSDP2 has padded.
    vocabulary = 64 * round((parameters - _SMALLEST) / (2 * 64 * config.text_width))
    if vocabulary < 2048:
        raise UserError("--parameters and --sizes: at least 50")
    return replace(config, vocab_size=vocabulary)


def freeze(policy: PreTrainedPolicy) -> None:
    """Freeze everything except the decoder's layers."""
    policy.requires_grad_(False)
    policy.model.paligemma_with_expert.paligemma.model.language_model.layers.requires_grad_(True)


def fingerprint(engine: Engine) -> dict[str, int]:
    """Return a CRC-32 of every tensor of parameters and optimizer state on this rank."""
    found = {}
    for shard in engine.shards():
        for key, values in (("", shard.master), *shard.state.items()):
            crc = 0
            for piece in values.split(_CRC_PIECE):
                crc = zlib.crc32(piece.view(torch.uint8).numpy(), crc)
            found[f"{shard.name}.{key}"] = crc
    return found


def save_once(engine: Engine, method: Method, directory: Path) -> dict[str, float]:
    """Save and measure. Collective.

    Returns:
        Seconds of the slowest rank, and bytes of the rank with the most.
    """
    gc.collect()
    rank0_only(os.sync)()  # otherwise the save would wait for earlier writes
    engine.barrier()
    reset_peak()
    before, started = memory_bytes("VmRSS"), time.perf_counter()
    wait = method.save(directory)
    engine.barrier()
    held_up = time.perf_counter() - started
    if wait is not None:
        wait()
        engine.barrier()
    done = time.perf_counter() - started
    extra = memory_bytes("VmHWM") - before
    rank0_only(sync_all)(directory)
    on_disk = time.perf_counter() - started
    worst = [max(values) for values in zip(*gather_objects((held_up, done, on_disk, extra)), strict=True)]
    return dict(zip(("held_up", "done", "on_disk", "extra"), worst, strict=True))


def sync_all(directory: Path) -> None:
    """Force everything in a directory to the disk."""
    for path in (*directory.rglob("*"), directory, directory.parent):
        fsync(path)


def check(engine: Engine, method: Method, directory: Path, saved: dict[str, int]) -> None:
    """Load a checkpoint over overwritten values and compare. Collective.

    Raises:
        UserError: On all ranks: a loaded tensor differs from the saved one.
    """
    overwrite(engine)
    assert fingerprint(engine) != saved
    method.load(directory)
    loaded = fingerprint(engine)
    different = [name for name in saved if loaded.get(name) != saved[name]]
    if any(gather_objects(different)):
        raise UserError(f"{method.label}: {len(different)} tensors changed, {different[:3]}")


def measure(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Save by each method in turn and return one row per save, the same on all ranks."""
    init_ranks(case["engine"])
    source, scratch = Path(case["source"]), Path(case["scratch"])
    policy = meta_policy_without_tokenizers(policy_config(case["parameters"]))
    if case["frozen"]:
        freeze(policy)
    with WeightReader(source, policy) as weights:
        engine = make_engine(case["engine"], policy, weights.read, getattr(torch, case["dtype"]))
    assert task_step(engine, [random_batch(policy.config, 1, engine.rank)], 1.0).applied
    saved = fingerprint(engine)
    known = methods(engine, policy, source)
    order = [name for name in known if name in ("craft", *case["others"])]
    rows = []
    for repeat in range(-1, case["repeats"]):
        turn = repeat % len(order)
        for name in order[turn:] + order[:turn]:
            directory = scratch / f"{name}_{repeat}"
            row: dict[str, Any] = {"method": name, "label": known[name].label, "repeat": repeat}
            row |= save_once(engine, known[name], directory)
            files = [path for path in directory.rglob("*") if path.is_file()]
            row |= {"bytes": sum(path.stat().st_size for path in files), "files": len(files)}
            row["one_file"] = is_consolidated(directory, policy)
            check(engine, known[name], directory, saved)
            engine.barrier()
            rank0_only(shutil.rmtree)(directory)
            if repeat >= 0:
                rows.append(row)
    engine.close()
    return rows


def medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per method: medians, and the range of the seconds that training is held up."""
    summary = []
    for method in sorted({row["method"] for row in rows}):  # craft-ds comes first in the alphabet
        mine = [row for row in rows if row["method"] == method]
        seconds = [row["held_up"] for row in mine]
        measured = ("held_up", "done", "on_disk", "extra", "bytes", "files")
        one = {key: statistics.median(row[key] for row in mine) for key in measured}
        summary.append(
            {"method": method, "label": mine[0]["label"], "range": [min(seconds), max(seconds)]}
            | one
            | {"extra_worst": max(row["extra"] for row in mine)}
            | {"one_file": all(row["one_file"] for row in mine)}
        )
    return summary


def measure_case(args: argparse.Namespace, source: Path, **case: Any) -> list[dict[str, Any]]:
    """Run one case on new ranks, in a temporary directory."""
    args.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        full_case = {"repeats": args.repeats, "frozen": False, "source": str(source)} | case
        return run_case(full_case | {"scratch": scratch}, args.ranks, timeout=3600)[0]


def write_policy(parameters: float, directory: Path) -> int:
    """Write a policy directory of about this size and return the number of parameters."""
    policy = meta_policy_without_tokenizers(policy_config(parameters))
    write_random_weights(policy, directory, torch.float32)
    policy.config._save_pretrained(directory)
    return sum(p.numel() for p in policy.parameters())


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print the comparison."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as source:
        count = write_policy(1e6 * args.parameters, Path(source))
        for engine in args.engine:
            print(
                f"\n{engine}, {args.dtype}, {count / 1e6:.0f} M parameters on {args.ranks} ranks, "
                f"median of {args.repeats}\n"
                f"{'':<27}{'held up':>9}{'(range)':>14}{'done':>8}{'on disk':>9}{'extra MB':>10}"
                f"{'GB':>7}{'files':>7}  one file",
                flush=True,
            )
            rows = measure_case(
                args,
                Path(source),
                engine=engine,
                dtype=args.dtype,
                parameters=1e6 * args.parameters,
                others=args.others,
            )
            result[engine] = {"parameters": count, "medians": medians(rows), "rows": rows}
            for row in result[engine]["medians"]:
                low, high = row["range"]
                print(
                    f"{row['label']:<27}{row['held_up']:>8.2f}s{f'({low:.2f}–{high:.2f})':>14}"
                    f"{row['done']:>7.2f}s{row['on_disk']:>8.2f}s{row['extra'] / 1e6:>10.1f}"
                    f"{row['bytes'] / 1e9:>7.2f}{row['files']:>7.0f}  {'yes' if row['one_file'] else 'no'}",
                    flush=True,
                )
    return result


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and print the extra memory of a save by craft-ds."""
    print(
        f"\ncraft-ds, extra memory of a save on {args.ranks} ranks, the most of {args.repeats}\n"
        f"{'engine':<8}{'dtype':>10}{'parameters':>12}{'embeddings':>12}{'extra MB':>10}",
        flush=True,
    )
    rows = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as source:
            count = write_policy(1e6 * size, Path(source))
            for engine in args.engine:
                for dtype, frozen in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
                    case = {"engine": engine, "dtype": dtype, "parameters": 1e6 * size, "frozen": frozen}
                    (row,) = medians(measure_case(args, Path(source), others=[], **case))
                    rows.append(case | {"parameters": count} | row)
                    print(
                        f"{engine:<8}{dtype:>10}{count / 1e6:>10.0f} M{'frozen' if frozen else 'trained':>12}"
                        f"{row['extra_worst'] / 1e6:>10.1f}",
                        flush=True,
                    )
    return rows


def main() -> None:
    serve_case(measure)
    args = parse_arguments()
    load = os.getloadavg()[0]
    print(f"{hardware()}; load average before: {load:.1f}")
    result: dict[str, Any] = {"hardware": hardware(), "load": load, **vars(args) | {"directory": None}}
    if "compare" in args.part:
        result["compare"] = compare(args)
    if "memory" in args.part:
        result["memory"] = memory(args)
    write_result("bench_checkpoint", result)
    over = [row["extra_worst"] for row in result.get("memory", []) if row["extra_worst"] > LIMIT]
    if over:
        raise UserError(f"a save took {max(over) / 1e6:.0f} MB extra per rank, limit {LIMIT / 1e6:.0f} MB")


if __name__ == "__main__":
    run_main(main)

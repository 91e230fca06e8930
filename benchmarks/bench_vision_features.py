"""Measure a retention step with a trainable vision tower, a frozen one, and stored features.

    python benchmarks/bench_vision_features.py --engine single --rounds 1 --repeats 1

A pi0_fast of 119 M random parameters; one micro-batch of the task, one of anchors for the gradient and one
for the constraint. The tower trains, or is frozen and encodes the anchors' images, or is frozen and the
anchors have stored features (the task's images pass the tower in any case). Steps with and without features
alternate; a trainable tower needs another optimizer and therefore other processes, which alternate with the
first. Processor seconds stand beside wall-clock seconds: other programs on the machine disturb them less.
"""

import argparse
import os
import statistics
import time
from typing import Any

import torch
from harness import (
    CRAFT,
    argument_parser,
    hardware,
    init_ranks,
    make_engine,
    mid_size_config,
    random_values,
    run_case,
    serve_case,
    write_result,
)
from lerobot.policies.pretrained import PreTrainedPolicy

from craft_ds.cli import run_main
from craft_ds.engines.base import Batch
from craft_ds.memory_planner.shapes import meta_policy_without_tokenizers
from craft_ds.policies.meta_init import materialize_
from craft_ds.policies.pi0_fast.vision import vision_features, vision_tower
from craft_ds.policies.weights import unique_tensors
from craft_ds.testing.policies import random_batch, read_from
from craft_ds.training.train_step import measure as measure_loss
from craft_ds.training.train_step import retention_step

ENGINES = ("single", "fsdp", "zero3")
WAYS = {
    "trainable": "trainable",
    "images": "frozen, images",
    "features": "frozen, features",
}


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--engine", choices=ENGINES, nargs="+", default=ENGINES)
    parser.add_argument("--rounds", type=int, default=3, help="alternations of processes (default: 3)")
    parser.add_argument("--repeats", type=int, default=4, help="steps of each kind per round (default: 4)")
    parser.add_argument("--batch_size", type=int, default=2, help="samples per rank and pass (default: 2)")
    parser.add_argument("--world_size", type=int, default=2, help="ranks of the sharded engines (default: 2)")
    return parser.parse_args()


def full_policy() -> PreTrainedPolicy:
    """Return the policy with random weights."""
    policy = meta_policy_without_tokenizers(mid_size_config())
    materialize_(policy, "cpu")
    with torch.no_grad():
        for name, tensor in unique_tensors(policy).items():
            tensor.view(-1).copy_(random_values(name, 0, tensor.numel()))
    return policy


def with_features(policy: PreTrainedPolicy, batch: Batch) -> Batch:
    """Return the batch as an anchor cache stores it: fp16 features instead of the images."""
    features = {name: value.half() for name, value in vision_features(policy, batch).items()}
    return {
        name: value for name, value in batch.items() if name not in policy.config.image_features
    } | features


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds (clock, processor) of every step on this rank, and the anchors' loss, by kind."""
    init_ranks(case["engine"])
    full, rank = full_policy(), int(os.environ["RANK"])
    task, anchors, constraint = (
        random_batch(full.config, case["batch_size"], seed * 97 + rank) for seed in (1, 2, 3)
    )
    passes = {"images": [anchors, constraint]}
    if case["frozen"]:
        passes["features"] = [with_features(full, batch) for batch in passes["images"]]
    else:
        passes = {"trainable": passes["images"]}
    policy = meta_policy_without_tokenizers(mid_size_config())
    vision_tower(policy).requires_grad_(not case["frozen"])
    engine = make_engine(case["engine"], policy, read_from(full))
    del full

    def on_device(batch: Batch) -> Batch:
        return {name: value.to(engine.device) for name, value in batch.items()}

    task = on_device(task)
    passes = {way: [on_device(batch) for batch in batches] for way, batches in passes.items()}
    losses = {way: measure_loss(engine, batches[:1]).loss.item() for way, batches in passes.items()}
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in passes}
    for repeat in range(-1, case["repeats"]):
        for way, (anchor_batch, constraint_batch) in passes.items():
            engine.barrier()
            started, worked = time.perf_counter(), time.process_time()
            result = retention_step(
                engine,
                task=[task],
                anchors=[anchor_batch],
                constraint=[constraint_batch],
                multiplier=1.0,
                craft=CRAFT,
                max_norm=1.0,
            )
            assert result.applied
            if repeat >= 0:
                seconds[way].append((time.perf_counter() - started, time.process_time() - worked))
    engine.close()
    return {"seconds": seconds, "losses": losses}


def compare(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the median seconds of each kind of step in one engine and print them as a row."""
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    difference = 0.0
    for _ in range(args.rounds):
        for frozen in (True, False):
            case = {
                "engine": kind,
                "frozen": frozen,
                "repeats": args.repeats,
                "batch_size": args.batch_size,
            }
            measured = run_case(case, 1 if kind == "single" else args.world_size)[0]
            for way, times in measured["seconds"].items():
                seconds[way] += times
            if frozen:
                losses = measured["losses"]
                difference = abs(losses["features"] / losses["images"] - 1)
    medians = {
        way: [statistics.median(of_one) for of_one in zip(*times, strict=True)]
        for way, times in seconds.items()
    }
    cells = ""
    for clock, processor in medians.values():
        cells += f"{clock:8.2f} s {clock / medians['images'][0]:6.3f}{processor / medians['images'][1]:7.3f}"
    print(f"{kind:<8}{cells}{difference:14.1e}", flush=True)
    return {"engine": kind, "medians": medians, "seconds": seconds, "loss_difference": difference}


def main() -> None:
    serve_case(measure)
    args = parse_arguments()
    count = args.rounds * args.repeats
    print(f"{hardware()}; {args.batch_size} samples per rank and pass, medians of {count}")
    print(
        "retention step: seconds, and ratio to a frozen tower that encodes every image (clock, processor);\n"
        "relative difference of the anchors' loss with fp16 features from that with images"
    )
    labels = "".join(f"{label:>23}" for label in WAYS.values())
    print(f"{'engine':<8}{labels}{'loss differs':>14}", flush=True)
    rows = [compare(kind, args) for kind in args.engine]
    write_result("bench_vision_features", {"hardware": hardware(), **vars(args), "rows": rows})


if __name__ == "__main__":
    run_main(main)

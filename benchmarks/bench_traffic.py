"""Count the bytes that a rank sends in a step, and compare them with the model on paper.

    python benchmarks/bench_traffic.py

Collectives are counted at torch's dispatcher, on ranks of this machine with a pi0_fast of 119 M parameters in
fp32. With rings, a rank sends (N - 1)/N of what an all-gather returns or a reduce-scatter reads, and twice
that in an all-reduce. The model on paper counts parameters:

- FSDP2 gathers them for forward and for backward (once what ends the forward pass, and an embedding), and
  reduce-scatters one gradient per pass.
- ZeRO-3 does so too, but keeps what it uses again within `stage3_max_reuse_distance`: all of a policy of this
  size, which it gathers once per pass.
- ZeRO-2 all-reduces one gradient per pass, and gathers the updated parameters once per step.

A retention step is two passes, and a forward pass more where held-out anchors measure the constraint.

With `--extrapolate` the model alone is printed for pi0_fast on many GPUs.
"""

import argparse
from dataclasses import dataclass
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
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pretrained import PreTrainedPolicy

from craft_ds.cli import run_main
from craft_ds.engines.base import Batch, Engine
from craft_ds.memory_planner.shapes import meta_policy_without_tokenizers, with_cameras
from craft_ds.policies.wrapping import ends_forward, only_looks_up, parameter_count, shard_units
from craft_ds.testing.collective_counter import CollectiveCounter
from craft_ds.testing.policies import random_batch
from craft_ds.training.train_step import retention_step, task_step

KINDS = ("fsdp", "zero3", "zero2")
STEPS = ("task", "retention", "retention, held-out")
# Bytes per second that one GPU sends: NVLink 4 within a node of 8, 400 Gbit/s of InfiniBand between nodes.
NVLINK, NETWORK, NODE = 450e9, 50e9, 8


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters of a policy.

    Attributes:
        total: All of them.
        once: Those that FSDP2 gathers once per pass: an embedding, the head, what belongs to no unit.
    """

    total: int
    once: int

    @classmethod
    def of(cls, policy: PreTrainedPolicy) -> "Sizes":
        """Count the parameters of a policy that is not sharded."""
        units = shard_units(policy)
        twice = sum(
            parameter_count(unit) for unit in units if not (ends_forward(policy, unit) or only_looks_up(unit))
        )
        total = parameter_count(policy)
        return cls(total, total - twice)


def paper(kind: str, sizes: Sizes, step: str, gathered: int = 4, reduced: int = 4) -> dict[str, float]:
    """Return the bytes of collectives of a step, before the factor (N - 1)/N.

    Args:
        kind: `fsdp`, `zero3` or `zero2`.
        sizes: Of the policy.
        step: One of `STEPS`.
        gathered: Bytes per gathered parameter.
        reduced: Bytes per element of a reduced gradient.
    """
    passes = 1 if step == "task" else 2
    forward_only = step == "retention, held-out"
    if kind == "zero2":
        return {"gather": gathered * sizes.total, "reduce": passes * 2 * reduced * sizes.total}
    if kind == "zero3":
        gathers = (passes + forward_only) * sizes.total
    else:
        gathers = passes * (2 * sizes.total - sizes.once) + forward_only * sizes.total
    return {"gather": gathered * gathers, "reduce": passes * reduced * sizes.total}


def sent_bytes(seen: dict[tuple[str, int], int], ranks: int) -> dict[str, float]:
    """Return the bytes of counted collectives, before the factor (N - 1)/N.

    Args:
        seen: Numbers of calls by operator and bytes of all its tensors.
        ranks: Number of ranks.
    """
    found = {"gather": 0.0, "reduce": 0.0, "scalars": 0.0}
    for (name, size), count in seen.items():
        if "gather" in name:
            found["gather"] += count * size / (1 + 1 / ranks)  # output and input
        elif "scatter" in name:
            found["reduce"] += count * size / (1 + 1 / ranks)
        elif size <= 4096:
            found["scalars"] += count * size
        elif "reduce" in name:
            found["reduce"] += count * 2 * size
        elif "barrier" not in name:
            raise ValueError(f"{name} of {size} bytes is not in the model")
    return found


def measure(case: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Count the bytes of each kind of step in a rank."""
    torch.manual_seed(0)
    init_ranks(case["kind"])
    policy = meta_policy_without_tokenizers(mid_size_config())
    engine = make_engine(case["kind"], policy, random_values)
    task, anchors, heldout = ([batch_of(engine, seed)] for seed in (1, 2, 3))

    def retention(constraint: list[Batch] | None) -> None:
        retention_step(
            engine,
            task=task,
            anchors=anchors,
            constraint=constraint,
            multiplier=1.0,
            craft=CRAFT,
            max_norm=1.0,
        )

    actions = {
        "task": lambda: task_step(engine, task, 1.0),
        "retention": lambda: retention(None),
        "retention, held-out": lambda: retention(heldout),
    }
    retention(heldout)  # ZeRO-3 traces the order of its modules first
    found = {}
    for name, action in actions.items():
        with CollectiveCounter() as counter:
            action()
        found[name] = sent_bytes(dict(counter.seen), engine.world_size)
    engine.close()
    return found


def batch_of(engine: Engine, seed: int) -> Batch:
    """Return a batch of this rank on its device."""
    batch = random_batch(mid_size_config(), 1, seed * engine.world_size + engine.rank)
    return {name: values.to(engine.device) for name, values in batch.items()}


def extrapolate() -> list[str]:
    """Return the lines of a table: bytes per GPU and step of pi0_fast in bf16, by number of GPUs."""
    config = with_cameras(PI0FastConfig(), 3)
    sizes = Sizes.of(meta_policy_without_tokenizers(config))
    lines = [
        f"pi0_fast, {sizes.total / 1e9:.2f} B parameters gathered in bf16, gradients reduced in fp32; GB "
        f"that a GPU sends in a step, and its seconds at {NVLINK / 1e9:.0f} GB/s in a node of {NODE} and "
        f"{NETWORK / 1e9:.0f} GB/s between nodes",
        "",
        "| GPUs | sharding | task step | retention step | with held-out anchors |",
        "|---|---|---|---|---|",
    ]
    for gpus in (8, 64, 512):
        cells = [_sharded(sizes, step, gpus, gpus) for step in STEPS]
        lines.append(f"| {gpus} | FSDP2 over all | {' | '.join(cells)} |")
        if gpus > NODE:
            cells = [_sharded(sizes, step, NODE, gpus) for step in STEPS]
            lines.append(f"| {gpus} | hybrid: in a node, replicas between | {' | '.join(cells)} |")
    return lines


def _sharded(sizes: Sizes, step: str, shards: int, gpus: int) -> str:
    traffic = sum(paper("fsdp", sizes, step, gathered=2).values()) * (shards - 1) / shards
    seconds = traffic / (NVLINK if shards <= NODE else NETWORK)
    replicas = gpus // shards
    if replicas > 1:
        # Each pass ends with an all-reduce of the shards of the gradient over the replicas.
        passes = 1 if step == "task" else 2
        between = passes * 2 * 4 * sizes.total / shards * (replicas - 1) / replicas
        traffic, seconds = traffic + between, seconds + between / NETWORK
    return f"{traffic / 1e9:.1f} GB, {seconds:.2f} s"


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--world_sizes", type=int, nargs="+", default=[2, 3], help="ranks (default: 2 3)")
    parser.add_argument("--engine", nargs="+", choices=KINDS, default=KINDS, help="engines (default: all)")
    parser.add_argument("--extrapolate", action="store_true", help="print the model for many GPUs only")
    return parser.parse_args()


def main() -> None:
    serve_case(measure)
    args = parse_arguments()
    if args.extrapolate:
        print("\n".join(extrapolate()))
        return
    sizes = Sizes.of(meta_policy_without_tokenizers(mid_size_config()))
    print(f"{hardware()}; {sizes.total / 1e6:.1f} M parameters, fp32; MB that a rank sends\n")
    print("| engine | ranks | step | counted | on paper | difference |\n|---|---|---|---|---|---|")
    rows = []
    for kind in args.engine:
        for ranks in args.world_sizes:
            of_ranks = run_case({"kind": kind}, ranks)
            for step in STEPS:
                factor = (ranks - 1) / ranks
                counted = [sum(each[step].values()) * factor for each in of_ranks]
                expected = sum(paper(kind, sizes, step).values()) * factor
                worst = max(counted, key=lambda sent: abs(sent - expected))
                rows.append(
                    {"engine": kind, "ranks": ranks, "step": step, "counted": worst, "paper": expected}
                    | {"parts": of_ranks[0][step]}
                )
                print(
                    f"| {kind} | {ranks} | {step} | {worst / 1e6:.1f} | {expected / 1e6:.1f} | "
                    f"{100 * (worst / expected - 1):+.2f} % |",
                    flush=True,
                )
    write_result("bench_traffic", {"hardware": hardware(), "parameters": sizes.__dict__, "rows": rows})


if __name__ == "__main__":
    run_main(main)

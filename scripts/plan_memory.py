"""How much memory a run will take on each rank, and which GPU holds it; nothing is allocated.

    python scripts/plan_memory.py --policy.path=outputs/run/final --world_size=8
    python scripts/plan_memory.py --policy.type=pi0_fast --world_size=8 --engine=zero3 --batch_size=16
    python scripts/plan_memory.py --policy.type=tiny_pi0_fast --policy.text_width=768 --lora_rank=0

One line an engine: the peak of a retention step, the dearest there is, at the lengths given. Other
`--policy.*` flags set fields of the policy's configuration.
"""

import argparse
import json
from collections.abc import Iterator
from functools import cache
from itertools import chain, product
from typing import NamedTuple

import draccus
import torch
from lerobot.configs import PreTrainedConfig

import craft_ds.policies.tiny  # noqa: F401 - makes the type tiny_pi0_fast known
from craft_ds.cli import run_main
from craft_ds.errors import UserError, exits_as_user_error, one_line
from craft_ds.planning.plan import ENGINES, Plan, Setting, plan_memory
from craft_ds.planning.simulate import Lora, PassTrace, Workload, simulate_pass

GIB = 1 << 30
COLUMNS = (
    "parameters",
    "optimizer",
    "gradient",
    "second_gradient",
    "buffers",
    "gathered",
    "activations",
    "logits",
)
HEADINGS = ("params", "optim", "grad", "g_t", "buffers", "gathered", "activ", "logits")


class Row(NamedTuple):
    """One engine's plans, without and with activation checkpointing."""

    engine: str
    lora: Lora | None
    trainable: int
    frozen: int
    plain: Plan
    checkpointed: Plan


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--policy.path", dest="path", help="policy directory or hub id; only its config.json is read")
    add("--policy.type", dest="type", help="policy type, where there is no path, e.g. pi0_fast")
    add("--world_size", type=int, default=1, help="ranks (default: 1)")
    add("--dp_replicate", type=int, default=1, help="replicas of an HSDP run: they divide the sharding ranks")
    add("--engine", choices=ENGINES, nargs="+", default=list(ENGINES), help="default: all of them")
    add("--engine.dtype", dest="dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--batch_size", type=int, default=8, help="samples a rank and micro-batch (default: 8)")
    add("--prompt_length", type=int, default=80, help="prompt tokens, the state included (default: 80)")
    add("--action_length", type=int, default=100, help="action tokens (default: 100)")
    add("--cameras", type=int, help="images a sample (default: the policy's)")
    add("--lora_rank", type=int, default=16, help="plan LoRA of this rank too; 0: full training only")
    add("--lora_targets", choices=("attention", "all"), default="all", help="all: attention and MLP")
    add("--gpu_gb", default="24,48,80", help="sizes of GPUs to try, in GiB (default: 24,48,80)")
    add("--headroom", type=float, default=0.08, help="share of a GPU for context and fragments (0.08)")
    add("--reduce_bucket_size", type=int, default=100_000_000, help="of the DeepSpeed file, in elements")
    add("--json", action="store_true", help="print bytes as JSON instead of the table")
    args, rest = parser.parse_known_args()
    unknown = [flag for flag in rest if not (flag.startswith("--policy.") and "=" in flag)]
    if unknown:
        raise UserError(
            f"unknown argument {unknown[0]} (see --help; a policy's fields as --policy.NAME=VALUE)"
        )
    for name in ("world_size", "dp_replicate", "batch_size", "prompt_length", "action_length"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be at least 1")
    if args.world_size % args.dp_replicate:
        raise UserError(f"--dp_replicate={args.dp_replicate} must divide --world_size={args.world_size}")
    try:
        args.sizes = [float(size) for size in args.gpu_gb.split(",")]
    except ValueError:
        raise UserError(f"--gpu_gb={args.gpu_gb}: sizes in GiB, separated by commas") from None
    return args, [flag.removeprefix("--policy.") for flag in rest]


def policy_config(args: argparse.Namespace, fields: list[str]) -> PreTrainedConfig:
    """The policy's configuration, from its directory or from its type and fields."""
    overrides = ["--device=cpu", *(f"--{field}" for field in fields)]
    if bool(args.path) == bool(args.type):
        raise UserError("give either --policy.path or --policy.type")
    try:
        with exits_as_user_error():
            if args.path:
                return PreTrainedConfig.from_pretrained(args.path, cli_overrides=overrides)
            kind = PreTrainedConfig.get_choice_class(args.type)
            return draccus.parse(kind, args=overrides)
    except Exception as error:
        raise UserError(f"no policy configuration from these --policy.* flags: {one_line(error)}") from error


def plan_all(args: argparse.Namespace, config: PreTrainedConfig) -> Iterator[Row]:
    """A row for every engine, with and without LoRA."""
    workload = Workload(args.batch_size, args.prompt_length, args.action_length, args.cameras)
    dtype = getattr(torch, args.dtype)

    @cache
    def trace(autocast: bool, checkpointing: bool, lora: Lora | None) -> PassTrace:
        return simulate_pass(
            config, workload, dtype=dtype, autocast=autocast, checkpointing=checkpointing, lora=lora
        )

    adapters = [None] + [Lora(args.lora_rank, mlp=args.lora_targets == "all")] * (args.lora_rank > 0)
    for lora, engine in product(adapters, args.engine):
        ranks = 1 if engine == "single" else args.world_size
        if engine.startswith("fsdp"):
            ranks //= args.dp_replicate
        setting = Setting(engine, ranks, dtype.itemsize, reduce_bucket=args.reduce_bucket_size)
        traces = [trace(engine == "single", full, lora) for full in (False, True)]
        plain, checkpointed = (plan_memory(each, workload, setting) for each in traces)
        yield Row(engine, lora, traces[0].trainable, traces[0].frozen, plain, checkpointed)


def smallest(plan: Plan, args: argparse.Namespace) -> str:
    """The smallest GPU that holds a plan."""
    fitting = [size for size in args.sizes if plan.total <= size * GIB * (1 - args.headroom)]
    return f"{min(fitting):g}" if fitting else "none"


def main() -> None:
    args, fields = parse_arguments()
    config = policy_config(args, fields)
    rows = plan_all(args, config)
    if args.json:
        print(json.dumps([as_json(row, args) for row in rows], indent=1))
        return
    first = next(rows)
    unit, scale = ("GiB", GIB) if first.plain.total >= GIB else ("MiB", 1 << 20)
    print(
        f"{config.type}, {first.trainable / 1e6:,.1f} M parameters, {args.dtype}, {args.world_size} ranks; "
        f"{args.batch_size} samples a rank, {args.prompt_length} + {args.action_length} tokens\n"
        f"{unit} a rank at the peak of a retention step; after the bar, --activation_checkpointing=full\n"
        f"fits: the smallest of {args.gpu_gb} GiB, {args.headroom:.0%} of it kept free\n"
    )
    heading = "".join(f"{name:>9}" for name in HEADINGS)
    print(f"{'':14}{heading}{'total':>9}{'host':>7}{'fits':>6} |{'activ':>8}{'total':>8}{'fits':>6}")
    for row in chain([first], rows):
        if row.engine == args.engine[0]:
            print(describe(row))
        print(line(row, args, scale), flush=True)


def describe(row: Row) -> str:
    """What is trained."""
    if row.lora is None:
        return "full training"
    return (
        f"LoRA of rank {row.lora.rank} on attention{' and MLP' * row.lora.mlp} of the decoder: "
        f"{row.trainable / 1e6:,.1f} M train, the base is frozen"
    )


def line(row: Row, args: argparse.Namespace, scale: int) -> str:
    """One engine."""
    plain, full = row.plain, row.checkpointed
    columns = "".join(f"{getattr(plain, name) / scale:9.1f}" for name in COLUMNS)
    return (
        f"  {row.engine:<14}{columns[2:]}{plain.total / scale:9.1f}{plain.host / scale:7.1f}"
        f"{smallest(plain, args):>6} |{full.activations / scale:8.1f}{full.total / scale:8.1f}"
        f"{smallest(full, args):>6}"
    )


def as_json(row: Row, args: argparse.Namespace) -> dict:
    """One engine, in bytes."""
    plans = {"none": row.plain, "full": row.checkpointed}
    return {
        "engine": row.engine,
        "lora_rank": row.lora.rank if row.lora else 0,
        "trainable": row.trainable,
        "frozen": row.frozen,
        "activation_checkpointing": {
            name: vars(plan) | {"total": plan.total, "fits_gib": smallest(plan, args)}
            for name, plan in plans.items()
        },
    }


if __name__ == "__main__":
    run_main(main)

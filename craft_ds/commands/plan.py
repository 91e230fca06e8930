"""Plan the memory of a run per rank, and the smallest GPU that fits it; nothing is allocated.

    craft-ds plan --policy.path=outputs/run/final --world_size=8
    craft-ds plan --policy.type=pi0_fast --world_size=8 --engine zero3 --batch_size=16
    craft-ds plan --policy.type=tiny_pi0_fast --policy.text_width=768 --lora_rank=0

Prints one line per engine: the peak of a retention step, which needs the most memory, at the given sequence
lengths. Other `--policy.*` flags set fields of the policy's configuration.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from craft_ds.errors import UserError, exits_as_user_error, one_line
from craft_ds.memory_planner import ENGINES

# Those of pi0_fast in `craft_ds.lora.targets`, which is too slow to import for --help.
PRESETS = ("default", "attention", "attention_mlp", "attention_mlp_vision")


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the flags; return those of the policy's configuration separately."""
    parser = argparse.ArgumentParser(
        prog="craft-ds plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--policy.path", dest="path", help="policy directory or hub id; only its config.json is read")
    add("--policy.type", dest="type", help="policy type without a path, such as pi0_fast")
    add("--world_size", type=int, default=1, help="number of ranks (default: 1)")
    add("--dp_replicate", type=int, default=1, help="copies of the model in an HSDP run (default: 1)")
    add("--engine", choices=ENGINES, nargs="+", default=list(ENGINES), help="engines to plan (default: all)")
    add("--engine.dtype", dest="dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add(
        "--engine.optimizer_state",
        "--optimizer.state",
        dest="optimizer_state",
        choices=("fp32", "bf16", "int8"),
        default="fp32",
        help="format of Adam's moments, that of the run (default: fp32)",
    )
    add("--batch_size", type=int, default=8, help="samples per rank and micro-batch (default: 8)")
    add("--prompt_length", type=int, default=80, help="prompt tokens, including the state (default: 80)")
    add("--action_length", type=int, default=100, help="action tokens (default: 100)")
    add("--cameras", type=int, help="images per sample (default: the policy's)")
    add(
        "--lora_rank",
        type=int,
        default=8,
        help="also plan LoRA of this rank; 0: full training only (default: 8)",
    )
    add("--lora_preset", choices=PRESETS, default=PRESETS[0], help="layers with adapters, as --lora.preset")
    add(
        "--penalty",
        choices=("none", "l2", "ewc"),
        default="none",
        help="the run's --penalty.name (default: none)",
    )
    add("--ema_decay", type=float, default=0.0, help="that of the run; 0: none (default: 0)")
    add(
        "--craft.use_grad_projection",
        dest="projection",
        choices=("true", "false"),
        default="true",
        help="that of the run; false, as in the presets replay and kl, needs one gradient in place of two "
        "(default: true)",
    )
    add(
        "--craft.gradient_buffer",
        dest="gradient_buffer",
        choices=("device", "bf16", "cpu"),
        default="device",
        help="that of the run: where g_t waits during the second pass; where an offloaded engine refuses it, "
        "the row is that of device (default: device)",
    )
    add("--gpu_gb", default="24,48,80", help="sizes of GPUs to try, in GiB (default: 24,48,80)")
    add(
        "--headroom",
        type=float,
        default=0.08,
        help="share of a GPU for context and fragmentation (default: 0.08)",
    )
    add("--reduce_bucket_size", type=int, help="that of your own DeepSpeed file, in elements")
    add("--json", action="store_true", help="print bytes as JSON instead of the table")
    args, rest = parser.parse_known_args(arguments)
    unknown = [flag for flag in rest if not (flag.startswith("--policy.") and "=" in flag)]
    if unknown:
        raise UserError(
            f"unknown argument {unknown[0]} (see --help; a policy's fields as --policy.NAME=VALUE)"
        )
    if bool(args.path) == bool(args.type):
        raise UserError("give either --policy.path or --policy.type")
    for name in ("world_size", "dp_replicate", "batch_size", "prompt_length", "action_length"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be at least 1")
    if args.gradient_buffer != "device" and args.projection == "false" and args.penalty == "none":
        raise UserError(
            f"--craft.gradient_buffer={args.gradient_buffer} has no effect with "
            "--craft.use_grad_projection=false: both losses accumulate in one gradient; omit one of them"
        )
    if not 0.0 <= args.ema_decay < 1.0:
        raise UserError(f"--ema_decay={args.ema_decay} must lie in [0, 1)")
    if args.lora_rank < 0:
        raise UserError(f"--lora_rank={args.lora_rank} must not be negative")
    if args.world_size % args.dp_replicate:
        raise UserError(f"--dp_replicate={args.dp_replicate} must divide --world_size={args.world_size}")
    try:
        args.gpus = tuple(float(size) for size in args.gpu_gb.split(","))
    except ValueError:
        raise UserError(f"--gpu_gb={args.gpu_gb}: sizes in GiB, separated by commas") from None
    return args, [flag.removeprefix("--policy.") for flag in rest]


def policy_config(args: argparse.Namespace, fields: list[str]) -> Any:
    """Return the policy's configuration, from its directory or from its type and fields."""
    # Imported here so that --help and errors in flags are fast.
    import draccus
    from lerobot.configs import PreTrainedConfig

    import craft_ds.policies.tiny_pi0_fast.policy  # noqa: F401 - registers the type tiny_pi0_fast

    overrides = ["--device=cpu", *(f"--{field}" for field in fields)]
    try:
        with exits_as_user_error():
            if args.path:
                return PreTrainedConfig.from_pretrained(args.path, cli_overrides=overrides)
            kind = PreTrainedConfig.get_choice_class(args.type)
            return draccus.parse(kind, args=overrides)
    except Exception as error:
        raise UserError(f"no policy configuration from these --policy.* flags: {one_line(error)}") from error


def plan_request(args: argparse.Namespace) -> Any:
    """Return the flags as a request to the planner."""
    import torch

    from craft_ds.config.configs import LoraConfig
    from craft_ds.memory_planner.report import PlanRequest
    from craft_ds.memory_planner.shapes import Workload

    lora = LoraConfig(enabled=True, preset=args.lora_preset, rank=args.lora_rank)
    return PlanRequest(
        workload=Workload(args.batch_size, args.prompt_length, args.action_length, args.cameras),
        engines=tuple(args.engine),
        world_size=args.world_size,
        dp_replicate=args.dp_replicate,
        dtype=getattr(torch, args.dtype),
        lora=lora if args.lora_rank else None,
        reduce_bucket=args.reduce_bucket_size,
        penalty=args.penalty,
        ema=args.ema_decay > 0,
        one_gradient=args.projection == "false" and args.penalty == "none",
        gradient_buffer=args.gradient_buffer,
        optimizer_state=args.optimizer_state,
        gpus=args.gpus,
        headroom=args.headroom,
    )


def main(arguments: Sequence[str]) -> None:
    """Print the plan that the flags describe."""
    args, fields = parse_arguments(arguments)
    config, request = policy_config(args, fields), plan_request(args)

    from craft_ds.memory_planner.report import as_json, plan_all, table

    rows = plan_all(config, request)
    if args.json:
        print(json.dumps([as_json(row, request) for row in rows], indent=1))
        return
    print(
        f"{config.type} in {args.dtype} on {args.world_size} ranks, moments in {args.optimizer_state}; "
        f"{args.batch_size} samples per rank, {args.prompt_length} + {args.action_length} tokens"
    )
    for line in table(rows, request):
        print(line, flush=True)

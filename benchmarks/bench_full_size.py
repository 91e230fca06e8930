"""Load the full-size pi0_fast, 3.45 billion random parameters, into two shards and train it on the CPU.

    python benchmarks/bench_full_size.py --engine fsdp

The weights are written once, tensor by tensor, as bf16 safetensors (6.9 GB). Each rank reads its ranges of
that file directly into its shards. The base is frozen and kept in bf16; trainable parameters have fp32
masters: the last decoder layer, or with --lora adapters on the complete decoder. Then one task step and one
retention step follow, forward and backward in bf16, on tiny batches. The output is the planner's arithmetic
and the measurement per rank. Needs 24 GB of memory and, until the end, 6.9 GB of disk.
"""

import argparse
import gc
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from harness import (
    CRAFT,
    OUTPUTS,
    argument_parser,
    hardware,
    init_ranks,
    make_engine,
    memory_bytes,
    reset_peak,
    run_case,
    serve_case,
    shard_sizes,
    write_random_weights,
    write_result,
)
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import (
    ACTION_TOKEN_MASK,
    ACTION_TOKENS,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
)

from craft_ds.cli import run_main
from craft_ds.config.configs import LoraConfig
from craft_ds.engines.activation_checkpointing import checkpoint_activations
from craft_ds.engines.base import Batch
from craft_ds.lora.adapters import AdapterPlan, add_adapters
from craft_ds.lora.peft_config import make_peft_config
from craft_ds.lora.weights import open_weights
from craft_ds.memory_planner.engine_options import EngineOptions
from craft_ds.memory_planner.plan import Plan, plan_memory
from craft_ds.memory_planner.shapes import Workload, meta_policy_without_tokenizers
from craft_ds.memory_planner.simulate import PassTrace, simulate_pass
from craft_ds.training.train_step import retention_step, task_step

GB = 1e9
LORA = LoraConfig(enabled=True)
# Small buffers beside the shards: every gigabyte counts twice on one machine.
DS_OPTIONS = {
    "reduce_bucket_size": 20_000_000,
    "sub_group_size": 50_000_000,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_reuse_distance": 0,
}


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--engine", choices=("fsdp", "zero3"), nargs="+", default=["fsdp", "zero3"])
    add("--ranks", type=int, default=2)
    add(
        "--trainable_layers",
        type=int,
        default=1,
        help="trainable decoder layers, counted from the last (default: 1)",
    )
    add(
        "--lora",
        action="store_true",
        help="train adapters on the complete decoder instead (--lora.preset=default)",
    )
    add("--activation_checkpointing", choices=("none", "full"), default="none")
    add("--layers", type=int, help="layers of decoder and vision encoder, for a trial run (default: all)")
    add("--batch_size", type=int, default=1, help="samples per rank and pass (default: 1)")
    add("--directory", type=Path, default=OUTPUTS / "full_size", help="directory of the weights")
    add("--keep", action="store_true", help="keep the weights at the end, for the next run")
    add("--plan_only", action="store_true", help="print the arithmetic and stop")
    return parser.parse_args()


def config() -> PI0FastConfig:
    """Return the configuration: gemma_2b with 257,152 tokens, and one camera."""
    return PI0FastConfig(
        paligemma_variant="gemma_2b",
        dtype="float32",
        device="cpu",
        push_to_hub=False,
        input_features={
            "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 224, 224)),
            "observation.state": PolicyFeature(FeatureType.STATE, (8,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
    )


def prepare(policy: PreTrainedPolicy, case: dict[str, Any]) -> None:
    """Freeze all but the last decoder layers, unless there are adapters; for a trial, drop layers."""
    model = policy.model.paligemma_with_expert.paligemma.model
    decoder, encoder = model.language_model, model.vision_tower.vision_model.encoder
    if case["layers"] is not None:
        decoder.layers, encoder.layers = (part.layers[: case["layers"]] for part in (decoder, encoder))
        decoder.config.num_hidden_layers = len(decoder.layers)
    if not case["lora"]:
        policy.requires_grad_(False)
        for layer in decoder.layers[len(decoder.layers) - case["trainable_layers"] :]:
            layer.requires_grad_(True)


def skeleton(case: dict[str, Any]) -> PreTrainedPolicy:
    """Return the base policy without weights and without tokenizers, which the loss does not need."""
    policy = meta_policy_without_tokenizers(config())
    prepare(policy, case)
    return policy


def adapter_plan(case: dict[str, Any]) -> AdapterPlan | None:
    """Return new adapters on the base policy, whose directory holds only its weights."""
    directory = Path(case["directory"])
    return (
        AdapterPlan(make_peft_config(LORA, config(), str(directory)), directory, None)
        if case["lora"]
        else None
    )


def random_batch(workload: Workload, seed: int) -> Batch:
    """Return random images and tokens at full length."""
    rng = torch.Generator().manual_seed(seed)
    count = workload.batch_size

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(0, 257_152, (count, length), generator=rng)

    return {
        "observation.images.top": torch.rand(count, 3, 224, 224, generator=rng),
        OBS_LANGUAGE_TOKENS: tokens(workload.prompt_length),
        OBS_LANGUAGE_ATTENTION_MASK: torch.ones(count, workload.prompt_length, dtype=torch.bool),
        ACTION_TOKENS: tokens(workload.action_length),
        ACTION_TOKEN_MASK: torch.ones(count, workload.action_length, dtype=torch.bool),
    }


def workload_of(case: dict[str, Any]) -> Workload:
    """Return a short workload: the model is measured, not the batch."""
    return Workload(case["batch_size"], prompt_length=32, action_length=16, cameras=1)


def plan(case: dict[str, Any]) -> tuple[PassTrace, Plan]:
    """Return the simulated pass, and the planner's arithmetic for one rank."""
    workload = workload_of(case)
    trace = simulate_pass(
        config(),
        workload,
        dtype=torch.bfloat16,
        checkpointing=case["activation_checkpointing"] == "full",
        zero3=case["engine"] == "zero3",
        lora=LORA if case["lora"] else None,
        prepare=lambda policy: prepare(policy, case),
    )
    setting = EngineOptions(
        case["engine"],
        case["ranks"],
        compute=2,
        reduce_bucket=DS_OPTIONS["reduce_bucket_size"],
        prefetch=DS_OPTIONS["stage3_prefetch_bucket_size"],
        max_reuse=DS_OPTIONS["stage3_max_reuse_distance"],
        sub_group=DS_OPTIONS["sub_group_size"],
    )
    return trace, plan_memory(trace, setting)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Load, take a task step and a retention step; return seconds and bytes of resident memory."""
    init_ranks(case["engine"])
    policy = skeleton(case)
    gc.collect()
    result: dict[str, Any] = {"before": memory_bytes("VmRSS")}

    def stage(name: str, action: Any) -> Any:
        reset_peak()
        started = time.perf_counter()
        value = action()
        result[name] = {
            "seconds": time.perf_counter() - started,
            "peak": memory_bytes("VmHWM"),
            "after": memory_bytes("VmRSS"),
        }
        return value

    # These adapters are never stored, so that the base needs no hash.
    plan = adapter_plan(case)
    adapters = add_adapters(policy, plan.config, base_sha256="unknown") if plan else None
    with open_weights(policy, Path(case["directory"]), plan, adapters) as weights:
        if case["activation_checkpointing"] == "full":
            checkpoint_activations(policy)
        options = DS_OPTIONS if case["engine"] == "zero3" else {}
        engine = stage(
            "load", lambda: make_engine(case["engine"], policy, weights.read, torch.bfloat16, **options)
        )
    result["second_gradient"] = 4 * sum(shard_sizes(engine))
    workload = workload_of(case)
    task, anchors = (random_batch(workload, seed * engine.world_size + engine.rank) for seed in (1, 2))
    stepped = stage("task_step", lambda: task_step(engine, [task], 1.0))
    retained = stage(
        "retention_step",
        lambda: retention_step(
            engine, task=[task], anchors=[anchors], constraint=None, multiplier=1.0, craft=CRAFT, max_norm=1.0
        ),
    )
    assert stepped.applied
    assert retained.applied
    engine.close()
    return result | {
        "loss": [stepped.loss, retained.loss],
        "retention_loss": retained.retention_loss,
        "cosine": retained.merged.cosine,
    }


def show_plan(case: dict[str, Any]) -> dict[str, Any]:
    """Print and return the arithmetic of an engine, in GB per rank."""
    trace, planned = plan(case)
    parts = {name: value for name, value in vars(planned).items() if isinstance(value, int) and value}
    print(f"\n{case['engine']} on {case['ranks']} ranks; {trace.trainable / 1e6:.1f} M trainable parameters")
    print("planned GB per rank at the peak of a retention step:")
    print("  " + ", ".join(f"{name} {value / GB:.2f}" for name, value in parts.items()))
    print(f"  total {planned.total / GB:.2f}, all ranks {case['ranks'] * planned.total / GB:.2f}")
    # Gloo gathers into its own buffer and copies: with FSDP2 before the parameters are allocated, with
    # ZeRO-3 without prefetch afterwards.
    copy = 2 * max(unit.numel for unit in trace.units) if case["engine"] == "zero3" else 0
    if copy:
        print(f"  and, on the CPU, gloo's copy of gathered parameters: {copy / GB:.2f}", flush=True)
    sizes = {"trainable": trace.trainable, "frozen": trace.frozen, "gloo": copy}
    return vars(planned) | {"total": planned.total} | sizes


def show_measured(results: list[dict[str, Any]], planned: dict[str, Any]) -> None:
    """Print the measurements of the ranks and the planner's error."""
    for rank, one in enumerate(results):
        stages = ", ".join(
            f"{name} {one[name]['peak'] / GB:.2f} GB {one[name]['seconds']:.1f} s"
            for name in ("load", "task_step", "retention_step")
        )
        print(f"  rank {rank}: {one['before'] / GB:.2f} GB before; peaks: {stages}")
    measured = max(one["retention_step"]["peak"] - one["before"] for one in results)
    error = (planned["total"] + planned["gloo"]) / measured - 1
    together = {
        name: sum(one[name]["peak"] for one in results) for name in ("load", "task_step", "retention_step")
    }
    model = 2 * (planned["trainable"] + planned["frozen"])
    extra = sum(one["second_gradient"] for one in results)
    print(
        f"  a retention step's second gradient: {extra / len(results) / 1e6:.1f} MB per rank, together "
        f"{extra / model:.2%} of the model's {model / GB:.2f} GB\n"
        f"  all ranks together: {together['retention_step'] / GB:.2f} GB resident at the peak of the "
        f"retention step, {max(together.values()) / GB:.2f} GB at most; the plan is {error:+.1%} off\n"
        f"  losses {results[0]['loss']}, cosine {results[0]['cosine']:.4f}",
        flush=True,
    )


def main() -> None:
    serve_case(measure)
    args = parse_arguments()
    cases = [
        {
            "engine": engine,
            "ranks": args.ranks,
            "layers": args.layers,
            "lora": args.lora,
            "trainable_layers": 0 if args.lora else args.trainable_layers,
            "activation_checkpointing": args.activation_checkpointing,
            "batch_size": args.batch_size,
            "directory": str(args.directory),
        }
        for engine in args.engine
    ]
    policy = skeleton(cases[0])
    count = sum(p.numel() for p in policy.parameters())
    print(f"pi0_fast, {count / 1e9:.2f} B parameters; {hardware()}")
    plans = [show_plan(case) for case in cases]
    if args.plan_only:
        return
    if not (args.directory / "model.safetensors").is_file():
        started = time.perf_counter()
        write_random_weights(policy, args.directory, torch.bfloat16)
        seconds = time.perf_counter() - started
        print(f"\n{count * 2 / GB:.1f} GB of weights written in {seconds:.0f} s", flush=True)
    rows = []
    try:
        for case, planned in zip(cases, plans, strict=True):
            print(f"\n{case['engine']}, measured")
            results = run_case(case, args.ranks, timeout=1800)
            show_measured(results, planned)
            rows.append(case | {"hardware": hardware(), "planned": planned, "ranks_measured": results})
    finally:
        if not args.keep:
            shutil.rmtree(args.directory)
    write_result("bench_full_size", {"parameters": count, "rows": rows + earlier_rows(cases)})


def earlier_rows(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return earlier measurements of the same model, except the cases measured again."""
    path = OUTPUTS / "bench_full_size.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []

    def key(row: dict[str, Any]) -> tuple:
        # Earlier versions had neither adapters nor checkpointing.
        checkpointing = row.get("activation_checkpointing", "none")
        return row["engine"], row.get("lora", False), row["trainable_layers"], checkpointing

    measured = {key(case) for case in cases}
    return [row for row in rows if row["layers"] == cases[0]["layers"] and key(row) not in measured]


if __name__ == "__main__":
    run_main(main)

"""Compare the memory planner with measured peaks of one retention step.

    python benchmarks/bench_memory_plan.py --policy teacher

Two policies (the shipped teacher, and a pi0_fast of 119 M random parameters) in each engine, on ranks that
the script starts. Measured is the memory of tensors, as an accelerator's allocator would see it, counted at
every operator; and the resident memory of the process beyond that before the engine was built.
"""

import argparse
import gc
import weakref
from collections.abc import Iterator
from itertools import product
from typing import Any, get_args

import torch
from harness import (
    CRAFT,
    TEACHER,
    argument_parser,
    hardware,
    init_ranks,
    make_engine,
    memory_bytes,
    mid_size_config,
    random_values,
    reset_peak,
    run_case,
    serve_case,
    write_result,
)
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor
from torch.utils._pytree import tree_leaves

from craft_ds.cli import run_main
from craft_ds.config.configs import LoraConfig, OptimizerState
from craft_ds.engines.base import Batch
from craft_ds.errors import UserError
from craft_ds.lora.adapters import add_adapters
from craft_ds.lora.peft_config import make_peft_config
from craft_ds.memory_planner import ENGINES
from craft_ds.memory_planner.engine_options import EngineOptions
from craft_ds.memory_planner.plan import Plan, plan_memory
from craft_ds.memory_planner.shapes import Workload, meta_policy_without_tokenizers
from craft_ds.memory_planner.simulate import simulate_pass
from craft_ds.memory_planner.tensor_memory import MemoryCounter
from craft_ds.policies.loading import load_policy_config
from craft_ds.policies.tiny_pi0_fast.policy import TinyPI0FastConfig
from craft_ds.testing.policies import random_batch
from craft_ds.training.train_step import retention_step

MIB = 1 << 20
LIMIT = 0.15


class AllocationCounter(MemoryCounter):
    """MemoryCounter for storages that change their size, as those of FSDP2's parameters do.

    It measures every storage again after every operator, also inside of sharded tensors.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        older = {storage._cdata for storage in _storages((args, kwargs)) if storage._cdata not in self._alive}
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if storage._cdata not in older:
                self._alive[storage._cdata] = weakref.ref(storage)
        self.look()
        return result

    def look(self) -> None:
        """Sum the storages that are alive."""
        storages = {key: reference() for key, reference in self._alive.items()}
        self._alive = {key: self._alive[key] for key, storage in storages.items() if storage is not None}
        self.live = sum(storage.nbytes() for storage in storages.values() if storage is not None)
        self.peak = max(self.peak, self.live)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and not leaf.is_meta:
            # A sharded tensor wraps the local one.
            yield getattr(leaf, "_local_tensor", leaf).untyped_storage()


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--policy", choices=("teacher", "mid"), nargs="+", default=["teacher", "mid"])
    parser.add_argument("--engine", choices=ENGINES, nargs="+", default=ENGINES)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="+", default=["float32"])
    parser.add_argument("--checkpointing", choices=("none", "full"), nargs="+", default=["none"])
    parser.add_argument(
        "--lora",
        nargs="?",
        const="default",
        metavar="PRESET",
        help="add rows of LoRA on a frozen base, with the default preset or another",
    )
    parser.add_argument(
        "--optimizer_state",
        choices=get_args(OptimizerState),
        nargs="+",
        default=["fp32"],
        help="formats of the moments, as --engine.optimizer_state",
    )
    parser.add_argument("--batch_size", type=int, default=4, help="samples per rank (default: 4)")
    parser.add_argument("--world_size", type=int, default=2, help="ranks of the sharded engines (default: 2)")
    return parser.parse_args()


def policy_config(name: str) -> TinyPI0FastConfig:
    """Return the configuration of the shipped teacher or of the mid-size policy."""
    return load_policy_config(TEACHER) if name == "teacher" else mid_size_config()


def lora_flags(case: dict[str, Any]) -> LoraConfig:
    """Return the adapters of a case with LoRA."""
    return LoraConfig(enabled=True, preset=case["lora"])


def full_batch(config: TinyPI0FastConfig, workload: Workload, seed: int) -> Batch:
    """Return random images and tokens, every sample at full length."""
    batch = random_batch(config, workload.batch_size, seed)
    for key in batch:
        if "mask" in key:
            batch[key] = torch.ones_like(batch[key])
    return batch


def measure(case: dict[str, Any]) -> dict[str, int]:
    """Return the peaks of a retention step on this rank in bytes, of tensors and resident."""
    kind, config = case["engine"], policy_config(case["policy"])
    dtype = getattr(torch, case["dtype"])
    init_ranks(kind)
    workload = Workload(case["batch_size"], config.tokenizer_max_length, config.max_action_tokens)
    policy: PreTrainedPolicy = meta_policy_without_tokenizers(config)
    if case["lora"]:
        add_adapters(policy, make_peft_config(lora_flags(case), config, base_path=""))
    if case["checkpointing"] == "full":
        from craft_ds.engines.activation_checkpointing import checkpoint_activations

        checkpoint_activations(policy)
    task, anchors = full_batch(config, workload, 1), full_batch(config, workload, 2)
    gc.collect()
    before = memory_bytes("VmRSS")
    with AllocationCounter() as counter:
        engine = make_engine(
            kind,
            policy,
            random_values,
            dtype,
            optimizer_state=case["optimizer_state"],
            reduce_bucket_size=case["reduce_bucket"],
        )
        for step in range(2):
            if step == 1:
                counter.peak = counter.live
                reset_peak()
            retention_step(
                engine,
                task=[task],
                anchors=[anchors],
                constraint=None,
                multiplier=1.0,
                craft=CRAFT,
                max_norm=1.0,
            )
        peak = counter.peak
    result = {"tensors": peak, "resident": memory_bytes("VmHWM") - before}
    engine.close()
    return result


def plan(case: dict[str, Any]) -> Plan:
    """Return the plan of the same step."""
    config = policy_config(case["policy"])
    dtype, kind = getattr(torch, case["dtype"]), case["engine"]
    workload = Workload(case["batch_size"], config.tokenizer_max_length, config.max_action_tokens)
    trace = simulate_pass(
        config,
        workload,
        dtype=dtype,
        autocast=kind == "single",
        checkpointing=case["checkpointing"] == "full",
        zero3=kind.startswith("zero3"),
        lora=lora_flags(case) if case["lora"] else None,
    )
    options = EngineOptions(
        kind,
        1 if kind == "single" else case["world_size"],
        dtype.itemsize,
        reduce_bucket=case["reduce_bucket"],
        optimizer_state=case["optimizer_state"],
    )
    return plan_memory(trace, options)


def main() -> None:
    serve_case(measure)
    args = parse_arguments()
    print(f"MiB per rank; {hardware()}")
    print(
        f"{'policy':<9}{'trains':<21}{'engine':<15}{'dtype':<10}{'moments':<8}{'ckpt':<6}{'planned':>9}{'measured':>10}"
        f"{'error':>8}{'resident':>10}"
    )
    trained = [None, args.lora] if args.lora else [None]
    rows = [
        compare(
            {
                "policy": name,
                "lora": lora,
                "engine": kind,
                "dtype": dtype,
                "optimizer_state": state,
                "checkpointing": checkpointing,
                "batch_size": args.batch_size,
                "world_size": 1 if kind == "single" else args.world_size,
                # Small enough to fill at least once, as with a large model.
                "reduce_bucket": 100_000 if name == "teacher" else 5_000_000,
            }
        )
        for name, lora, dtype, state, checkpointing, kind in product(
            args.policy, trained, args.dtype, args.optimizer_state, args.checkpointing, args.engine
        )
    ]
    worst = max(abs(row["error"]) for row in rows)
    print(f"largest error: {worst:.1%}")
    write_result("bench_memory_plan", {"hardware": hardware(), "rows": rows})
    if worst > LIMIT:
        raise UserError(f"the plan differs by more than {LIMIT:.0%} from the measurement: see the rows above")


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """Plan, run and print one case."""
    measured, planned = run_case(case, case["world_size"])[0], plan(case)
    total = planned.total + planned.host  # on the CPU, host and device are one
    error = total / measured["tensors"] - 1
    print(
        f"{case['policy']:<9}{case['lora'] or 'everything':<21}{case['engine']:<15}{case['dtype']:<10}"
        f"{case['optimizer_state']:<8}{case['checkpointing']:<6}"
        f"{total / MIB:9.1f}{measured['tensors'] / MIB:10.1f}{error:+8.1%}{measured['resident'] / MIB:10.1f}",
        flush=True,
    )
    return case | measured | {"planned": total, "error": error, "plan": vars(planned)}


if __name__ == "__main__":
    run_main(main)

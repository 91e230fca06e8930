"""Report of the memory planner: one row per engine, as a table or as JSON."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, product
from typing import Any, NamedTuple

import torch
from lerobot.configs import PreTrainedConfig

from craft_ds.config.configs import LoraConfig, OptimizerState
from craft_ds.config.craft_config import GradientBuffer
from craft_ds.config.penalty import PenaltyName
from craft_ds.memory_planner.engine_options import EngineOptions
from craft_ds.memory_planner.plan import Plan, plan_memory
from craft_ds.memory_planner.shapes import Workload
from craft_ds.memory_planner.simulate import PassTrace, simulate_pass

GIB = 1 << 30
_COPIES: dict[PenaltyName, int] = {"none": 0, "l2": 1, "ewc": 2}
_COLUMNS = {
    "parameters": "params",
    "optimizer": "optim",
    "gradient": "grad",
    "second_gradient": "g_t",
    "buffers": "buffers",
    "gathered": "gathered",
    "activations": "activ",
}


@dataclass(frozen=True)
class PlanRequest:
    """Input of the memory planner.

    Attributes:
        workload: The micro-batch.
        engines: Names from `ENGINES`.
        world_size: Number of ranks.
        dp_replicate: Replicas of an HSDP run.
        dtype: Dtype of forward and backward.
        lora: Adapters to plan besides full training; None: full training only.
        reduce_bucket: ZeRO: `reduce_bucket_size`, in elements; None: as in the shipped configurations.
        penalty: `--penalty.name`.
        ema: The run keeps a moving average of the weights.
        one_gradient: As in `EngineOptions`.
        gradient_buffer: As in `EngineOptions`.
        optimizer_state: As in `EngineOptions`.
        gpus: GPU memory sizes to try, in GiB.
        headroom: Share of GPU memory kept free for context and fragmentation.
    """

    workload: Workload
    engines: tuple[str, ...]
    world_size: int
    dp_replicate: int
    dtype: torch.dtype
    lora: LoraConfig | None
    reduce_bucket: int | None
    penalty: PenaltyName
    ema: bool
    one_gradient: bool
    gradient_buffer: GradientBuffer
    optimizer_state: OptimizerState
    gpus: tuple[float, ...]
    headroom: float

    def smallest_gpu(self, plan: Plan) -> str:
        """Return the smallest GPU that holds a plan, or `none`."""
        fitting = [size for size in self.gpus if plan.total <= size * GIB * (1 - self.headroom)]
        return f"{min(fitting):g}" if fitting else "none"


class Row(NamedTuple):
    """One engine's plans, without and with activation checkpointing."""

    engine: str
    lora: LoraConfig | None
    trainable: int
    frozen: int
    plain: Plan
    checkpointed: Plan


def plan_all(config: PreTrainedConfig, request: PlanRequest) -> Iterator[Row]:
    """Yield one row per engine: full training first, then LoRA.

    Raises:
        UserError: As `simulate_pass`.
    """

    @cache
    def trace(autocast: bool, zero3: bool, checkpointing: bool, adapted: bool) -> PassTrace:
        return simulate_pass(
            config,
            request.workload,
            dtype=request.dtype,
            autocast=autocast,
            checkpointing=checkpointing,
            zero3=zero3,
            lora=request.lora if adapted else None,
        )

    for lora, engine in product((None, request.lora) if request.lora else (None,), request.engines):
        ranks = 1 if engine == "single" else request.world_size
        if engine.startswith("fsdp"):
            ranks //= request.dp_replicate
        bucket = request.reduce_bucket or (50_000_000 if engine == "zero2" else 100_000_000)
        options = EngineOptions(
            engine,
            ranks,
            compute=request.dtype.itemsize,
            reduce_bucket=bucket,
            copies=_COPIES[request.penalty] + request.ema,
            one_gradient=request.one_gradient,
            gradient_buffer=request.gradient_buffer,
            optimizer_state=request.optimizer_state,
        )
        # Without frozen weights every layer keeps its input in any case.
        linear = lora is not None and engine.startswith("zero3")
        traces = [trace(engine == "single", linear, full, lora is not None) for full in (False, True)]
        plain, checkpointed = (plan_memory(each, options) for each in traces)
        yield Row(engine, lora, traces[0].trainable, traces[0].frozen, plain, checkpointed)


def table(rows: Iterable[Row], request: PlanRequest) -> Iterator[str]:
    """Yield the rows as lines of text as they are computed."""
    rows = iter(rows)
    first = next(rows)
    unit, scale = ("GiB", GIB) if first.plain.total >= GIB else ("MiB", 1 << 20)
    gpus = ", ".join(f"{size:g}" for size in request.gpus)
    yield (
        f"{unit} per rank at the peak of a retention step; after the bar: --activation_checkpointing=full\n"
        f"fits: the smallest GPU of {gpus} GiB with {request.headroom:.0%} kept free\n"
    )
    heading = "".join(f"{name:>9}" for name in _COLUMNS.values())
    yield f"{'':14}{heading}{'total':>9}{'host':>7}{'fits':>6} |{'activ':>8}{'total':>8}{'fits':>6}"
    for row in chain([first], rows):
        if row.engine == request.engines[0]:
            yield _trained(row)
        plain, full = row.plain, row.checkpointed
        columns = "".join(f"{getattr(plain, name) / scale:9.1f}" for name in _COLUMNS)
        yield (
            f"  {row.engine:<14}{columns[2:]}{plain.total / scale:9.1f}{plain.host / scale:7.1f}"
            f"{request.smallest_gpu(plain):>6} |{full.activations / scale:8.1f}{full.total / scale:8.1f}"
            f"{request.smallest_gpu(full):>6}"
        )


def _trained(row: Row) -> str:
    if row.lora is None:
        return f"full training: {row.trainable / 1e6:,.1f} M parameters"
    return (
        f"LoRA, preset {row.lora.preset}, rank {row.lora.rank}: {row.trainable / 1e6:,.1f} M parameters "
        "trainable, base frozen"
    )


def as_json(row: Row, request: PlanRequest) -> dict[str, Any]:
    """Return a row as JSON values, in bytes."""
    plans = {"none": row.plain, "full": row.checkpointed}
    return {
        "engine": row.engine,
        "lora_rank": row.lora.rank if row.lora else 0,
        "lora_preset": row.lora.preset if row.lora else "",
        "trainable": row.trainable,
        "frozen": row.frozen,
        "activation_checkpointing": {
            name: vars(plan) | {"total": plan.total, "fits_gib": request.smallest_gpu(plan)}
            for name, plan in plans.items()
        },
    }

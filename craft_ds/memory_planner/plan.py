"""Bytes per rank by engine: arithmetic on a simulated pass.

Each engine stores parameters, gradients and optimizer state differently, as read from the sources (torch
2.11, DeepSpeed 0.19.8); `benchmarks/bench_memory_plan.py` compares the plan with measured peaks.

T trainable and F frozen elements, n ranks that share one copy of the model, c bytes per element in forward
(4, or 2 in bfloat16); AdamW with fp32 masters, and m bytes of moments per element: 8, or with
`--engine.optimizer_state` 4 (bf16) or 2 + 8/256 (int8). The planned step is the most expensive one: a
retention step, which stores the first gradient g_t while the second is computed.

=============  ============  ======================  ==========  =================  =====================
bytes          parameters    masters                 moments     gradient           g_t
=============  ============  ======================  ==========  =================  =====================
single         4 T + c F     are the parameters      m T         4 T                4 T, handed over
fsdp           (4 T + c F)/n are the parameters      m T/n       4 T/n              4 T/n, handed over
zero3          c (T + F)/n   4 T/n, in fp32 too      m T/n       4 T/n, always      4 T/n, a copy
zero3_offload  c (T + F)/n   4 T/n on the host       on the host on the host        on the host, no copy
zero2          c (T + F)     4 T/n                   m T/n       4 T/n              4 T/n, handed over
=============  ============  ======================  ==========  =================  =====================

`fsdp_offload` is `fsdp` with all of this on the host. A penalty keeps 4 T/n (`l2`) or 8 T/n (`ewc`) where the
masters are.
"""

from dataclasses import dataclass, replace

from craft_ds.engines.compact_adam import ROWS_AT_ONCE
from craft_ds.engines.moment_formats import BLOCK, moment_bytes
from craft_ds.memory_planner.engine_models import make_memory_model
from craft_ds.memory_planner.engine_options import EngineOptions
from craft_ds.memory_planner.simulate import PassTrace


@dataclass(frozen=True)
class Plan:
    """Bytes on one rank's device at the peak of a retention step, and in its host's memory.

    Attributes:
        moment: Position of the peak: in the second `pass` or in the optimizer's `step`.
        parameters: As stored between steps.
        optimizer: Masters and moments, and what a penalty and a moving average keep.
        second_gradient: g_t.
        gradient: Accumulated gradient at the peak.
        buffers: Permanent communication buffers of the engine.
        gathered: Parameters and gradients of the units in use, and the buffers that move them.
        activations: Activations of the pass.
        host: The same rank's bytes in the host's memory.
    """

    moment: str
    parameters: int
    optimizer: int
    second_gradient: int
    gradient: int
    buffers: int
    gathered: int
    activations: int
    host: int

    @property
    def total(self) -> int:
        """Peak on the device, in bytes."""
        return (
            self.parameters
            + self.optimizer
            + self.second_gradient
            + self.gradient
            + self.buffers
            + self.gathered
            + self.activations
        )


def plan_memory(trace: PassTrace, options: EngineOptions) -> Plan:
    """Return the memory of a retention step on one rank.

    Args:
        trace: A pass simulated with the engine's own dtypes.
        options: The engine.
    """
    kept = _kept(trace, options)
    in_pass, in_step = _in_pass(trace, options, kept), _in_step(trace, options, kept)
    # The device determines the peak moment; the host must hold both.
    return replace(max(in_pass, in_step, key=lambda plan: plan.total), host=max(in_pass.host, in_step.host))


def _kept(trace: PassTrace, s: EngineOptions) -> Plan:
    """Return the memory that does not change during a step."""
    plan = _kept_by_engine(trace, s)
    on_host = 4 * -(-trace.trainable // s.ranks) * (s.engine == "fsdp_offload")  # ZeRO has it in any case
    if s.one_gradient:
        plan = replace(plan, second_gradient=0, host=plan.host - on_host)
    elif s.gradient_buffer == "bf16":
        plan = replace(plan, second_gradient=plan.second_gradient // 2, host=plan.host - on_host // 2)
    elif s.gradient_buffer == "cpu":
        plan = replace(plan, second_gradient=0, host=plan.host + plan.second_gradient)
    copies = 4 * s.copies * -(-trace.trainable // s.ranks)
    if s.offloads:
        return replace(plan, host=plan.host + copies)
    return replace(plan, optimizer=plan.optimizer + copies)


def _kept_by_engine(trace: PassTrace, s: EngineOptions) -> Plan:
    trainable, frozen = trace.trainable, trace.frozen
    shard, frozen_shard = -(-trainable // s.ranks), -(-frozen // s.ranks)
    plan = Plan("", 0, 0, 0, 0, 0, 0, 0, 0)
    if s.engine == "single":
        return replace(
            plan,
            parameters=4 * trainable + s.compute * frozen,
            optimizer=_moments(trace, s),
            second_gradient=4 * trainable,
        )
    if s.engine == "fsdp":
        return replace(
            plan,
            parameters=4 * shard + s.compute * frozen_shard,
            optimizer=_moments(trace, s),
            second_gradient=4 * shard,
        )
    if s.engine == "fsdp_offload":
        return replace(plan, host=8 * shard + _moments(trace, s) + s.compute * frozen_shard)

    masters = 4 * shard
    bucket = s.compute * s.reduce_bucket
    if s.engine == "zero2":
        return replace(
            plan,
            parameters=s.compute * (trainable + frozen),
            optimizer=masters + _moments(trace, s),
            second_gradient=4 * shard,
            buffers=2 * bucket,  # one is reduced while the other is filled
        )
    # Small parameters are gathered once and stay gathered.
    persistent = sum(size for unit in trace.units for size in unit.sizes if size <= s.persistence)
    stored = s.compute * (shard + frozen_shard + persistent)
    if s.engine == "zero3_offload":
        return replace(plan, parameters=stored, buffers=bucket, host=masters + _moments(trace, s) + 8 * shard)
    return replace(
        plan,
        parameters=stored,
        optimizer=masters + _moments(trace, s),
        second_gradient=4 * shard,
        gradient=4 * shard,  # one buffer, allocated with the engine
        buffers=bucket,
    )


def _moments(trace: PassTrace, s: EngineOptions) -> int:
    """Return the bytes of this rank's moments."""
    return sum(moment_bytes(s.optimizer_state, numel) for numel in _shards(trace, s))


def _shards(trace: PassTrace, s: EngineOptions) -> list[int]:
    """Return the sizes of what the optimizer updates: a shard of each tensor, or DeepSpeed's flat one."""
    sizes = [size for unit in trace.units for size in unit.trainable_sizes]
    return [-(-size // s.ranks) for size in ([trace.trainable] if s.engine.startswith("zero") else sizes)]


def _in_pass(trace: PassTrace, s: EngineOptions, kept: Plan) -> Plan:
    """Return the peak of the second pass."""
    model = make_memory_model(trace, s)
    # With one gradient the second pass adds to that of the first. ZeRO-3's buffer is among what it keeps.
    before = 4 * -(-trace.trainable // s.ranks) * (s.one_gradient and not s.engine.startswith("zero3"))
    peak = kept
    for event in trace.events:
        momentary, steady = model.on(event)
        for own, working in ((event.live, momentary), (event.peak, steady)):
            now = replace(
                kept,
                moment="pass",
                gradient=kept.gradient + max(model.gradient, before) * (not s.offloads),
                host=kept.host + max(model.gradient, before) * s.offloads,
                gathered=working,
                activations=own,
            )
            peak = max(peak, now, key=lambda plan: plan.total)
    return peak


def _in_step(trace: PassTrace, s: EngineOptions, kept: Plan) -> Plan:
    """Return the memory of the optimizer's step, after the pass's own memory is freed."""
    shard = -(-trace.trainable // s.ranks)
    if s.offloads:
        # FSDP2's gradient is beside g_t on the host; DeepSpeed's is part of what it keeps there.
        gradient = 4 * shard * (s.engine == "fsdp_offload")
        return replace(kept, moment="step", host=kept.host + gradient + _temporaries(trace, s))
    # ZeRO updates from a flat copy of the gradient.
    at_once = min(shard, s.sub_group) if s.engine == "zero3" else shard
    copy = 4 * at_once if s.engine.startswith("zero") else 0
    return replace(kept, moment="step", gradient=4 * shard, gathered=copy + _temporaries(trace, s))


def _temporaries(trace: PassTrace, s: EngineOptions) -> int:
    """Return the bytes that the update itself takes; the fused AdamW takes none."""
    if s.optimizer_state == "fp32":
        return 0
    rows = sum(-(-numel // BLOCK) for numel in _shards(trace, s))
    # Both moments in fp32, random numbers, and what the conversion of one moment needs.
    return 28 * BLOCK * min(rows, ROWS_AT_ONCE)

"""Models of the engines: the bytes each holds for gathered parameters and gradients during a pass.

A model receives every event of a simulated pass and returns the bytes it holds: at the event itself, and from
then until the next event.
"""

from typing import Protocol

from craft_ds.memory_planner.engine_options import EngineOptions
from craft_ds.memory_planner.simulate import Event, PassTrace
from craft_ds.memory_planner.zero3_prefetch import Zero3Prefetch


class EngineMemoryModel(Protocol):
    """Memory model of an engine during one pass.

    Attributes:
        gradient: Bytes of the accumulated gradient, on the device or, with offload, on the host.
    """

    gradient: int

    def on(self, event: Event) -> tuple[int, int]:
        """Return the engine's bytes at the event, and from then until the next event."""
        ...


def make_memory_model(trace: PassTrace, options: EngineOptions) -> EngineMemoryModel:
    """Create the memory model of an engine at the start of a pass."""
    if options.engine == "single":
        return SingleMemoryModel()
    if options.engine.startswith("fsdp"):
        return FsdpMemoryModel(trace, options)
    return ZeroMemoryModel(trace, options)


class SingleMemoryModel:
    """One process: gradients grow during backward; nothing is gathered."""

    def __init__(self) -> None:
        self.gradient = 0

    def on(self, event: Event) -> tuple[int, int]:
        """Add the gradient to the accumulated one."""
        self.gradient += 4 * event.numel
        return 0, 0


class FsdpMemoryModel:
    """FSDP2 (torch/distributed/fsdp/_fully_shard: `_fsdp_param_group.py`, `_fsdp_collectives.py`).

    Gathering allocates one flat buffer and then one tensor per parameter; backward prefetches the next
    unit's flat buffer. When the gradients of a unit are complete, its parameters are freed and the gradients
    are copied into one flat fp32 buffer, which lives until the next unit's is made, and reduced into shards.
    """

    def __init__(self, trace: PassTrace, options: EngineOptions):
        self.gradient = 0
        self._units, self._s = trace.units, options
        forward = dict.fromkeys(e.unit for e in trace.events if e.kind == "forward")
        self._before = dict(zip(list(forward)[1:], forward, strict=False))
        self._gathered: set[int] = set()
        self._ahead: set[int] = set()
        self._backward: set[int] = set()
        self._pending = [0] * len(trace.units)
        self._reducing = 0

    def on(self, event: Event) -> tuple[int, int]:
        """Gather, free or reduce the event's unit."""
        unit, momentary = event.unit, 0
        if event.kind == "start":
            momentary = self._gather(len(self._units) - 1)  # the root's own parameters
        elif event.kind == "forward" and unit not in self._backward:
            momentary = self._gather(unit)
        elif event.kind == "forward_end" and unit not in self._backward and self._is_freed(unit):
            self._gathered.discard(unit)
        elif event.kind == "backward":
            # A frozen unit has no gradient event: it ends when the next unit starts.
            self._gathered -= {done for done in self._backward if not self._units[done].trainable}
            self._backward.add(unit)
            momentary = self._gather(unit) if not self._units[unit].only_looks_up else 0
            before = self._before.get(unit)
            if before is not None and not self._units[before].only_looks_up and before not in self._gathered:
                self._ahead.add(before)
        elif event.kind == "gradient":
            self._pending[unit] += event.numel
            if self._pending[unit] == self._units[unit].trainable:
                momentary = self._reduce(unit)
        elif event.kind == "end":
            self._reducing = 0
        steady = self._held()
        return max(momentary, steady), steady

    def _is_freed(self, unit: int) -> bool:
        """Return True if a unit is freed after its forward pass."""
        return self._s.reshard_after_forward and not self._units[unit].ends_forward

    def _gather(self, unit: int) -> int:
        if unit in self._gathered:
            return 0
        self._ahead.discard(unit)
        flat = self._s.compute * self._units[unit].numel
        self._gathered.add(unit)
        return self._held() + flat

    def _reduce(self, unit: int) -> int:
        self._gathered.discard(unit)
        numel = self._units[unit].trainable
        shard = -(-numel // self._s.ranks)
        momentary = self._held() + 4 * (numel + shard)
        self._pending[unit] = 0
        self._reducing = 4 * numel
        self.gradient += 4 * shard
        return momentary

    def _held(self) -> int:
        moved = self._gathered | self._ahead
        parameters = sum(self._units[unit].numel for unit in moved)
        return self._s.compute * (parameters + sum(self._pending)) + self._reducing


class ZeroMemoryModel:
    """DeepSpeed ZeRO (`runtime/zero/stage3.py`, `stage_1_and_2.py`); `Zero3Prefetch` gathers for stage 3.

    Each gradient is copied into the bucket; a full bucket is flattened once more and reduced.
    """

    def __init__(self, trace: PassTrace, options: EngineOptions):
        self.gradient = 0
        self._units, self._s = trace.units, options
        self._parameters = Zero3Prefetch(trace, options) if options.engine != "zero2" else None
        self._bucket = 0
        self._frozen: int | None = None
        self._done = [0] * len(trace.units)

    def on(self, event: Event) -> tuple[int, int]:
        """Gather, free or reduce the event's unit."""
        momentary = 0
        if self._parameters is not None:
            momentary = self._move(self._parameters, event)
        if event.kind == "gradient":
            if self._parameters is None:
                # ZeRO-2 allocates its gradient shard in each pass, at the first gradient.
                self.gradient = 4 * -(-sum(each.trainable for each in self._units) // self._s.ranks)
            momentary = self._held() + self._reduce(event.numel)
            self._done[event.unit] += event.numel
            if self._parameters and self._done[event.unit] == self._units[event.unit].trainable:
                self._parameters.end_backward(event.unit)
        elif event.kind == "end":
            momentary = self._held() + self._flush()
        steady = self._held()
        return max(momentary, steady), steady

    def _move(self, parameters: Zero3Prefetch, event: Event) -> int:
        if event.kind == "forward_end":
            parameters.end_forward(event.unit)
        if event.kind == "backward" and self._frozen is not None:
            # A frozen unit has no gradient event: it ends when the next unit starts.
            parameters.end_backward(self._frozen)
        if event.kind == "backward":
            self._frozen = None if self._units[event.unit].trainable else event.unit
        copying = parameters.use(event.unit) if event.kind in ("forward", "backward") else 0
        return self._s.compute * copying

    def _reduce(self, numel: int) -> int:
        flushed = self._flush() if self._bucket + numel > self._s.reduce_bucket else 0
        self._bucket += numel
        # A gradient larger than the bucket stays in its own tensor.
        own = self._s.compute * numel if numel > self._s.reduce_bucket else 0
        return flushed + own

    def _flush(self) -> int:
        moved, self._bucket = self._bucket, 0
        return self._s.compute * moved

    def _held(self) -> int:
        return self._s.compute * self._parameters.held if self._parameters else 0

"""Model of the parameters that ZeRO-3 keeps gathered, unit by unit.

As in DeepSpeed (`runtime/zero/partitioned_param_coordinator.py`, `partition_parameters.py`): when a module
runs, parameters of the following modules are prefetched together into a flat buffer. The first of them that
is used copies all of them out of the buffer, which stays until the last is used. A parameter that is
prefetched alone is gathered in place.
"""

from dataclasses import dataclass
from math import inf

from craft_ds.memory_planner.engine_options import EngineOptions
from craft_ds.memory_planner.simulate import PassTrace


@dataclass
class _Flat:
    """A buffer of parameters that were prefetched together; `unused` are the units that keep it alive."""

    units: frozenset[int]
    unused: set[int]
    copied: bool = False


class Zero3Prefetch:
    """The gathered parameters during one pass.

    Parameters that the recorded module order uses again within `stage3_max_reuse_distance` elements are kept
    from forward to backward: for a model below half of that, all of them except units without a gradient. So
    are parameters whose prefetch for the backward pass came while they were still gathered.
    """

    def __init__(self, trace: PassTrace, options: EngineOptions):
        self._s = options
        self._sizes = [
            tuple(size for size in unit.sizes if size > options.persistence) for unit in trace.units
        ]
        self._order = [event.unit for event in trace.events if event.kind in ("forward", "backward")]
        self._step = self._looked = 0
        self._gathered: set[int] = set()
        self._flats: list[_Flat] = []
        self._seen_again: set[int] = set()
        self._distance = _distances(trace)

    @property
    def held(self) -> int:
        """Number of gathered elements, in parameters and buffers."""
        return self._numel(self._gathered) + sum(self._numel(flat.units) for flat in self._flats)

    def use(self, unit: int) -> int:
        """Gather a unit whose forward or backward pass starts, and prefetch the following ones.

        Returns:
            Number of elements held while parameters are copied out of their buffer.
        """
        for flat in self._flats:
            if unit in flat.unused and not flat.copied:
                flat.copied = True
                self._gathered |= flat.units
            flat.unused.discard(unit)
        self._gathered.add(unit)
        copying = self.held
        self._flats = [flat for flat in self._flats if flat.unused]
        self._step += 1
        self._looked = max(self._looked, self._step)
        self._prefetch()
        return copying

    def end_forward(self, unit: int) -> None:
        """Free a unit after its forward pass, unless it is used again soon."""
        if self._distance[unit] >= self._s.max_reuse and unit not in self._seen_again:
            self._gathered.discard(unit)

    def end_backward(self, unit: int) -> None:
        """Free a unit after its backward pass."""
        self._gathered.discard(unit)

    def _prefetch(self) -> None:
        present = self._gathered.union(*(flat.units for flat in self._flats if not flat.copied))
        room = min(self._s.prefetch, self._s.max_live - self._numel(present))
        requested: set[int] = set()
        while self._looked < len(self._order) and self._numel(requested) < room:
            unit = self._order[self._looked]
            self._looked += 1
            if unit in present | requested:
                self._seen_again.add(unit)
            else:
                requested.add(unit)
        if sum(len(self._sizes[unit]) for unit in requested) == 1:
            self._gathered |= requested
        elif requested:
            self._flats.append(_Flat(frozenset(requested), requested))

    def _numel(self, units: set[int] | frozenset[int]) -> int:
        return sum(sum(self._sizes[unit]) for unit in units)


def _distances(trace: PassTrace) -> dict[int, float]:
    """Return the number of elements of the modules that run between a unit's forward and backward pass."""
    order = dict.fromkeys(event.unit for event in trace.events if event.kind == "forward")
    returning = {event.unit for event in trace.events if event.kind == "backward"}
    distances: dict[int, float] = {}
    after = 0
    for unit in reversed(order):
        distances[unit] = after if unit in returning else inf
        after += trace.units[unit].numel * (2 if unit in returning else 1)
    return distances

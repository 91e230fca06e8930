"""Which parameters ZeRO-3 holds gathered, unit by unit.

As read in DeepSpeed (`runtime/zero/partitioned_param_coordinator.py`, `partition_parameters.py`): whenever a
module runs, parameters of those that come next are asked for ahead, together, into a flat buffer. The first
of them that is used copies all of them out of it; the buffer stays until the last is used. A parameter that
is asked for alone is gathered where it stays.
"""

from dataclasses import dataclass
from math import inf

from craft_ds.memory_planner.engine_options import EngineOptions
from craft_ds.memory_planner.simulate import PassTrace


@dataclass
class _Flat:
    """A buffer of parameters that were asked for together; `unused` are the units that keep it alive."""

    units: frozenset[int]
    unused: set[int]
    copied: bool = False


class Zero3Prefetch:
    """The gathered parameters during one pass.

    What the recorded order of modules uses again within `stage3_max_reuse_distance` elements is kept from
    forward to backward: of a model below half of that everything, but for units through which no gradient
    flows. So is what was looked at ahead for its backward pass while it was still there.
    """

    def __init__(self, trace: PassTrace, setting: EngineOptions):
        self._s = setting
        self._sizes = [
            tuple(size for size in unit.sizes if size > setting.persistence) for unit in trace.units
        ]
        self._order = [event.unit for event in trace.events if event.kind in ("forward", "backward")]
        self._step = self._looked = 0
        self._whole: set[int] = set()
        self._flats: list[_Flat] = []
        self._seen_again: set[int] = set()
        self._distance = _distances(trace)

    @property
    def held(self) -> int:
        """Elements of parameters and buffers."""
        return self._numel(self._whole) + sum(self._numel(flat.units) for flat in self._flats)

    def use(self, unit: int) -> int:
        """Gather a unit whose forward or backward pass begins, and ask for what comes next.

        Returns:
            Elements held while parameters are copied out of their buffer.
        """
        for flat in self._flats:
            if unit in flat.unused and not flat.copied:
                flat.copied = True
                self._whole |= flat.units
            flat.unused.discard(unit)
        self._whole.add(unit)
        copying = self.held
        self._flats = [flat for flat in self._flats if flat.unused]
        self._step += 1
        self._looked = max(self._looked, self._step)
        self._ask_ahead()
        return copying

    def leave(self, unit: int) -> None:
        """Free a unit after its forward pass, unless it will be used again soon."""
        if self._distance[unit] >= self._s.max_reuse and unit not in self._seen_again:
            self._whole.discard(unit)

    def finish(self, unit: int) -> None:
        """Free a unit after its backward pass."""
        self._whole.discard(unit)

    def _ask_ahead(self) -> None:
        there = self._whole.union(*(flat.units for flat in self._flats if not flat.copied))
        room = min(self._s.prefetch, self._s.max_live - self._numel(there))
        asked: set[int] = set()
        while self._looked < len(self._order) and self._numel(asked) < room:
            unit = self._order[self._looked]
            self._looked += 1
            if unit in there | asked:
                self._seen_again.add(unit)
            else:
                asked.add(unit)
        if sum(len(self._sizes[unit]) for unit in asked) == 1:
            self._whole |= asked
        elif asked:
            self._flats.append(_Flat(frozenset(asked), asked))

    def _numel(self, units: set[int] | frozenset[int]) -> int:
        return sum(sum(self._sizes[unit]) for unit in units)


def _distances(trace: PassTrace) -> dict[int, float]:
    """Elements of the modules that run between a unit's forward and its backward pass."""
    order = dict.fromkeys(event.unit for event in trace.events if event.kind == "forward")
    returning = {event.unit for event in trace.events if event.kind == "backward"}
    distances: dict[int, float] = {}
    after = 0
    for unit in reversed(order):
        distances[unit] = after if unit in returning else inf
        after += trace.units[unit].numel * (2 if unit in returning else 1)
    return distances

"""Exponential moving average (EMA) of the trained weights, on local shards.

After every step that was applied, average ← decay·average + (1 − decay)·weights, elementwise, so that no rank
needs another's shard. It starts at the weights that training starts from. Checkpoints hold it as the entries
`<parameter>.ema` of the optimizer file; the policy's own weights stay those that training resumes from
(`craft-ds export --ema` writes the average).
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from craft_ds.checkpoints.load import open_average
from craft_ds.engines.base import Engine, ReadRange
from craft_ds.lora.adapters import Adapters


class WeightAverage:
    """The average of an engine's trained weights.

    Args:
        decay: Share of the average that a step keeps, in (0, 1).
        engine: Its present weights are where the average starts.
    """

    def __init__(self, decay: float, engine: Engine):
        self._engine = engine
        self._update = get_ema_multi_avg_fn(decay)
        self._shards = [master.clone() for master in engine.masters()]

    def update(self) -> None:
        """Move the average towards the present weights."""
        self._update(self._shards, list(self._engine.masters()), None)

    def by_name(self) -> Mapping[str, Tensor]:
        """Return this rank's part of the average of each parameter, flat, by the parameter's name."""
        return {name: part.reshape(-1) for name, part in self._engine.by_parameter(self._shards)}


def build_average(
    decay: float, engine: Engine, weights: ReadRange, resumed: Path | None, adapters: Adapters | None
) -> WeightAverage | None:
    """Start an average at the engine's weights, or continue that of a checkpoint. Collective.

    Args:
        decay: `--ema_decay`; 0: no average.
        engine: Holds the weights.
        weights: Reads them by name.
        resumed: The checkpoint that the run resumes; None: a new run.
        adapters: The trained adapters; None for full training.

    Returns:
        None with a decay of 0. A checkpoint without an average starts one at its weights.

    Raises:
        UserError: The checkpoint's average is not one of this policy.
    """
    if not decay:
        return None
    if resumed is None:
        return WeightAverage(decay, engine)
    shapes = {shard.name: shard.shape for shard in engine.shards(frozen=False)}
    stored = adapters.keys if adapters is not None else {}
    with open_average(resumed, weights, shapes, stored, all_trained=True) as read:
        if read is None:
            return WeightAverage(decay, engine)
        engine.load_parameters(read)  # it knows which elements this rank holds
        average = WeightAverage(decay, engine)
    engine.load_parameters(weights)
    return average

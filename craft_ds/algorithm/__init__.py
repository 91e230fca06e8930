"""The mathematics of CRaFT on tensors and scalars; usable without LeRobot, DeepSpeed and the trainer.

See `examples/fsdp2_language_model.py` for a plain FSDP2 training loop that uses it.
"""

from craft_ds.algorithm.gradient_surgery import MergedGradient, clip_factor, merge, merge_layers
from craft_ds.algorithm.gram import gram, merge_, scale_, squared_norm
from craft_ds.algorithm.gram_triple import GramTriple
from craft_ds.algorithm.layers import layer_of, split_by_layer
from craft_ds.algorithm.multiplier import DualState, RetentionRecord, ascend, epsilon_at
from craft_ds.algorithm.retention_schedule import RetentionSchedule
from craft_ds.algorithm.task_multipliers import TaskDualState

__all__ = [
    "DualState",
    "GramTriple",
    "MergedGradient",
    "RetentionRecord",
    "RetentionSchedule",
    "TaskDualState",
    "ascend",
    "clip_factor",
    "epsilon_at",
    "gram",
    "layer_of",
    "merge",
    "merge_",
    "merge_layers",
    "scale_",
    "split_by_layer",
    "squared_norm",
]

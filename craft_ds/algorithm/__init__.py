"""The mathematics of CRaFT on tensors and scalars; usable without LeRobot, DeepSpeed and the trainer.

See `examples/fsdp2_language_model.py` for a plain FSDP2 training loop that uses it.
"""

from craft_ds.algorithm.gradient_surgery import MergedGradient, clip_factor, merge
from craft_ds.algorithm.gram import gram, merge_, scale_, squared_norm
from craft_ds.algorithm.gram_triple import GramTriple
from craft_ds.algorithm.multiplier import DualState, RetentionRecord, ascend, epsilon_at

__all__ = [
    "DualState",
    "GramTriple",
    "MergedGradient",
    "RetentionRecord",
    "ascend",
    "clip_factor",
    "epsilon_at",
    "gram",
    "merge",
    "merge_",
    "scale_",
    "squared_norm",
]

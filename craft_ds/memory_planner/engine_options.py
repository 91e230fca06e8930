"""Engine options that determine its memory use."""

from dataclasses import dataclass

from craft_ds.config.configs import OptimizerState
from craft_ds.config.craft_config import GradientBuffer
from craft_ds.engines.deepspeed_config import SUB_GROUP


@dataclass(frozen=True)
class EngineOptions:
    """An engine, its number of ranks and its options; the defaults are those of the shipped configurations.

    Attributes:
        engine: One of `craft_ds.memory_planner.ENGINES`.
        ranks: Ranks that share one copy of the model.
        compute: Bytes per element in forward: 4, or 2 in bfloat16.
        reshard_after_forward: FSDP2 frees a unit after its forward pass.
        reduce_bucket: ZeRO: `reduce_bucket_size`, in elements.
        prefetch: ZeRO-3: `stage3_prefetch_bucket_size`, in elements.
        max_live: ZeRO-3: `stage3_max_live_parameters`; no prefetch beyond this number of elements.
        persistence: ZeRO-3: `stage3_param_persistence_threshold`; parameters up to it stay gathered.
        max_reuse: ZeRO-3: `stage3_max_reuse_distance`; parameters used again within it stay gathered.
        copies: fp32 copies of the trained shard that are kept beside the masters: 1 for `--penalty.name=l2`
            (θ_0), 2 for `ewc` (θ_0 and F), and 1 for `--ema_decay`.
        one_gradient: Both losses of a retention step accumulate in one gradient
            (`craft_ds.training.joint_step`).
        gradient_buffer: `--craft.gradient_buffer`.
        optimizer_state: `--engine.optimizer_state`.
        sub_group: ZeRO-3: `sub_group_size`; elements that the optimizer updates at once.
    """

    engine: str
    ranks: int
    compute: int = 4
    reshard_after_forward: bool = True
    reduce_bucket: int = 100_000_000
    prefetch: int = 50_000_000
    max_live: int = 1_000_000_000
    persistence: int = 100_000
    max_reuse: int = 1_000_000_000
    copies: int = 0
    one_gradient: bool = False
    gradient_buffer: GradientBuffer = "device"
    optimizer_state: OptimizerState = "fp32"
    sub_group: int = SUB_GROUP

    @property
    def offloads(self) -> bool:
        """True if the optimizer state is in host memory."""
        return self.engine.endswith("_offload")

"""A pi0_fast without tokenizers, its batches, and a run of it on one process."""

import torch
from lerobot.configs import FeatureType, PolicyFeature
from torch import Tensor

from craft_ds.memory_planner.shapes import Workload
from craft_ds.policies.tiny_pi0_fast.policy import TinyPI0FastConfig
from craft_ds.testing.policies import random_batch

WORKLOAD = Workload(batch_size=3, prompt_length=40, action_length=20)


def small_config(cameras: int = 1) -> TinyPI0FastConfig:
    image = PolicyFeature(FeatureType.VISUAL, (3, 64, 64))
    return TinyPI0FastConfig(
        input_features={
            **{f"observation.images.camera{i}": image for i in range(cameras)},
            "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (4,))},
        device="cpu",
        push_to_hub=False,
        text_width=64,
        text_depth=2,
        text_mlp_dim=128,
        vision_width=32,
        vision_depth=2,
        vision_mlp_dim=64,
        tokenizer_max_length=WORKLOAD.prompt_length,
        max_action_tokens=WORKLOAD.action_length,
    )


def full_batch(config: TinyPI0FastConfig, seed: int = 0) -> dict[str, Tensor]:
    """Return a batch in which every sample has the full length."""
    batch = random_batch(config, WORKLOAD.batch_size, seed)
    return {key: torch.ones_like(value) if "mask" in key else value for key, value in batch.items()}


def read(name: str, start: int, stop: int) -> Tensor:
    return torch.linspace(-0.02, 0.03, stop - start)
